"""Conditions of samples on the command line: classes, numbers by name, rows of a file, a sweep through one number."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import PyTree, Shaped
from ml_collections import ConfigDict

from utils.base.external import BadFileError, read_npz, read_npz_headers
from utils.base.messages import UserError, warn
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import Condition, count_rows, read_rows
from utils.conditions.images import ImageCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.tokens import TextCondition, TokensCondition
from utils.conditions.vector import VectorCondition
from utils.conditions.words import parse_rows, split_parts, unquote
from utils.data.arrays import CONDITION_NAMES
from utils.data.columns import KEYS
from utils.flags.definitions import define_path
from utils.images.pixels import UINT8, check_pictures
from utils.networks.models import ImageModel
from utils.sampling.editing import read_images

TEXT = "text"  # the field of captions
IMAGE = "image"  # the part of several conditions
MAX_SWEEP = 64  # images in a row
MAX_FILE_BYTES = 2**30
# {array of an npz, as in data: what a kind of condition reads of an example}.
ARRAYS = {name: key for name, key in KEYS.items() if name != "images"}
# Flags that give conditions, of which a command has one.
PARTIAL = ("sweep", "prompt", "condition_images")  # beside which --condition gives the rest
GIVING = (*PARTIAL, "classes", "condition", "condition_file")


def define_condition_flags() -> None:
    """Registers the flags that give conditions of samples."""
    flags.DEFINE_string("classes", None, "Names or numbers of classes, separated by commas, in turn; or all.")
    flags.DEFINE_string("prompt", None, "Texts, in turn, separated by semicolons: a red 3; a 7 above a 1.")
    flags.DEFINE_string("condition", None, "Conditions by name, in turn: angle=0.3,mass=2; angle=1,mass=2.")
    define_path("condition_images", None, "A folder of images that the model is given in turn, in the order of names.")
    define_path("condition_file", None, "A row for each condition: .csv with a column for each name, or .npz as data.")


def read_conditions(config: ConfigDict, model: ImageModel) -> PyTree | None:
    """Returns the conditions (n, ...) of the flag that gives them, one of GIVING, in their order; None without it.

    Raises UserError for two of these flags, and for what is no condition of the run.
    """
    given = [name for name in GIVING if config.get(name) is not None]
    if not given:
        return None
    if len(given) > 1 and (given[0] not in PARTIAL or given[1:] != ["condition"]):
        beside = "; the rest of a condition is given by --condition" if given[1] in PARTIAL else ""
        raise UserError(f"--{given[0]} and --{given[1]}: give one of them{beside}")
    kind = model.condition
    flag = given[0]
    if flag == "classes":
        return choose_conditions(config.classes, model)

    # Each kind of condition reads its own words; its errors do not know the flag.
    try:
        if flag == "condition_images":
            chosen = read_condition_images(config.condition_images, config.condition, kind, config.num_samples)
        elif flag == "sweep":
            chosen = read_sweep(config.sweep, config.condition, kind).conditions
        elif flag == "prompt":
            chosen = read_prompts(config.prompt, config.condition, kind)
        elif flag == "condition":
            chosen = kind.from_fields(parse_rows(config.condition, _fields(kind)))
        else:
            chosen = read_condition_file(Path(config.condition_file), kind)
    except UserError as error:
        raise UserError(f"--{flag}={config[flag]}: {error}") from None
    for remark in kind.remarks(chosen):
        warn(f"--{flag}: {remark}")
    return chosen


def choose_conditions(text: str | None, model: ImageModel, flag: str = "classes") -> PyTree | None:
    """Returns the conditions (n, ...) that --`flag` gives as `text`, in its order; None without it.

    Classes are given by name or number; 'all' stands for those of which the run had images. Raises UserError for a word
    that is no condition.
    """
    if text is None:
        return None
    kind = model.condition
    try:
        chosen = kind.parse(text)
    except UserError as error:
        raise UserError(f"--{flag}={text}: {error}") from None

    # A class whose folder was empty has a label, but the model never saw it.
    if isinstance(kind, ClassCondition):
        labels = dict.fromkeys(chosen.tolist())
        if empty := [kind.class_names[label] for label in labels if label in kind.empty_classes]:
            warn(f"--{flag}={text}: the run had no training images of {', '.join(empty[:5])}; expect noise")
    return chosen


def read_prompts(text: str, given: str | None, kind: Condition) -> PyTree:
    """Returns the conditions (n, ...) of texts between semicolons; one that holds a semicolon is in double quotes.

    `given` has the other fields as --condition writes them, once or for each text. Raises UserError, which does not
    name the flag.
    """
    fields = _fields(kind)
    if TEXT not in fields:
        raise UserError(f"the run has no captions; give {', '.join(fields)} by --condition")
    others = [field for field in fields if field != TEXT]
    if others and given is None:
        raise UserError(f"give {', '.join(others)} by --condition")
    prompts = [unquote(part) for part in split_parts(text, ";")]
    if not prompts:
        raise UserError("it gives no text; write one, or several with semicolons between them")
    if given is not None and not others:
        raise UserError("the text is all of the run's condition; leave --condition out")
    rows = _repeat_rows(given, others, len(prompts), "texts", [TEXT])
    return kind.from_fields([{**row, TEXT: prompt} for row, prompt in zip(rows, prompts, strict=True)])


def read_condition_images(folder: str | Path, given: str | None, kind: Condition, limit: int) -> PyTree:
    """Returns the conditions (n, ...) of the images of a folder, `limit` at most, in the order of their paths.

    `given` has the other fields as --condition writes them, once or for each image. Raises UserError, which does not
    name the flag.
    """
    found = kind.find_part(ImageCondition)
    if found is None:
        raise UserError("the run's condition is no image")
    check_pictures(found.pixels, found.shape, "files hold", "give --condition_file FILE.npz", "the run's")
    chosen = found.check(read_images(folder, found.shape, limit)[0])
    if found is kind:
        if given is not None:
            raise UserError("the image is all of the run's condition; leave --condition out")
        return chosen

    # The other parts are written.
    assert isinstance(kind, SeveralCondition)
    others = SeveralCondition(tuple((name, part) for name, part in kind.parts if part is not found))
    if given is None:
        raise UserError(f"give {', '.join(_fields(others))} by --condition")
    rows = _repeat_rows(given, _fields(others), count_rows(chosen), "images")
    return {**others.from_fields(rows), IMAGE: chosen}


def _repeat_rows(
    given: str | None, fields: Sequence[str], count: int, what: str, elsewhere: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Returns the other `fields` of `count` texts or images, given once for all or for each. Raises UserError."""
    rows = parse_rows(given, fields, elsewhere) if given is not None else [{}]
    if len(rows) not in (1, count):
        raise UserError(f"there are {count} {what}, but {len(rows)} of --condition; give one, or as many")
    return rows * (count // len(rows))


def read_condition_file(path: Path, kind: Condition) -> PyTree:
    """Returns the conditions (n, ...) of a table: .csv with a column for each of the kind's fields, or .npz with the
    arrays that data have, such as `conditions` (n, k). Columns and arrays of other names are left alone.

    Raises UserError, which does not name the flag, if the file cannot be read or lacks something.
    """
    if not path.is_file():
        raise UserError("there is no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
    if path.suffix == ".npz":
        return _read_npz(path, kind)
    if path.suffix != ".csv":
        raise UserError("give a .csv or an .npz")

    # Rows of text, each with a value for each field. Spreadsheets put a byte-order mark in front.
    fields = _fields(kind)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"it is no table in UTF-8 ({error})") from None
    header = [name.strip() for name in header]
    if missing := [name for name in fields if name not in header]:
        raise UserError(f"it has no column {', '.join(missing)}; there are {', '.join(header) or 'none'}")
    if doubled := [name for name in fields if header.count(name) > 1]:
        raise UserError(f"it has several columns {doubled[0]}; leave it one")
    if not rows:
        raise UserError("it has no rows")
    places = {name: header.index(name) for name in fields}
    for number, row in enumerate(rows):
        if lacking := [name for name, place in places.items() if not "".join(row[place : place + 1]).strip()]:
            raise UserError(f"row {number} (from 0) has no {lacking[0]}")
    return kind.from_fields([{name: row[place] for name, place in places.items()} for row in rows])


def _read_npz(path: Path, kind: Condition) -> PyTree:
    try:
        headers = read_npz_headers(path)
        wanted = {name: headers[name] for name in (*ARRAYS, CONDITION_NAMES) if name in headers}
        arrays = read_npz(path, wanted, "fiubUS", MAX_FILE_BYTES)
    except BadFileError as error:
        raise UserError(f"it cannot be read ({error})") from None
    names = arrays.pop(CONDITION_NAMES, None)

    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or not min(lengths):
        found = ", ".join(f"{name} {headers[name].shape}" for name in sorted(headers)) or "nothing"
        raise UserError(f"needed are arrays of one length among {', '.join(ARRAYS)}; it holds {found}")

    # As in data, numbers and images may lack their last axis, of one; numbers are found by name.
    for name, axes in (("conditions", 2), ("condition_images", 4)):
        if name in arrays and arrays[name].ndim == axes - 1:
            arrays[name] = arrays[name][..., None]
    if "captions" in arrays and arrays["captions"].dtype.kind == "S":
        arrays["captions"] = np.char.decode(arrays["captions"], "utf-8", "replace")
    vector = kind.find_part(VectorCondition)
    if vector is not None and names is not None and arrays.get("conditions", np.empty(0)).ndim == 2:
        arrays["conditions"] = _order_numbers(arrays["conditions"], names.reshape(-1).tolist(), vector.names)
    _check_fit(kind, arrays)

    # Row by row, as data are read.
    examples = ({ARRAYS[name]: array[place] for name, array in arrays.items()} for place in range(min(lengths)))
    try:
        rows = read_rows(kind, examples, min(lengths))
    except KeyError as error:
        wanted = next((name for name, key in ARRAYS.items() if key == error.args[0]), error.args[0])
        raise UserError(f"it has no array {wanted}") from None
    except ValueError as error:
        raise UserError(f"its arrays are not of the run's condition ({error})") from None
    return kind.check(rows)


def _check_fit(kind: Condition, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError for arrays (n, ...) whose rows are not of the shapes and dtypes of the condition's parts: NumPy
    would repeat, cut or round them."""
    # {array: (kinds of dtypes, in words, the shape of a row, with None for any size)}.
    wanted: dict[str, tuple[str, str, tuple[int | None, ...]]] = {}
    if kind.find_part(ClassCondition):
        wanted["labels"] = ("iu", "integers", ())
    if vector := kind.find_part(VectorCondition):
        wanted["conditions"] = ("fiub", "numbers", (len(vector.names),))
    if tokens := kind.find_part(TokensCondition):
        wanted["tokens"] = ("f", "floats", (None, tokens.width))
        wanted["token_mask"] = ("biu", "truth values", arrays["tokens"].shape[1:2] if "tokens" in arrays else (None,))
    if kind.find_part(TextCondition):
        wanted["captions"] = ("U", "texts", ())
    if image := kind.find_part(ImageCondition):
        wanted["condition_images"] = (
            ("u", "uint8", image.shape) if image.pixels == UINT8 else ("f", "floats", image.shape)
        )
    for name, (dtypes, words, row) in wanted.items():
        if name not in arrays:  # reported where it is read
            continue
        array = arrays[name]
        sizes = array.shape[1:]
        if (
            array.dtype.kind not in dtypes
            or len(sizes) != len(row)
            or not all(size in (None, found) for size, found in zip(row, sizes, strict=True))
        ):
            shape = ", ".join(["n", *("any" if size is None else str(size) for size in row)])
            raise UserError(f"{name} are {array.dtype} {array.shape}, but the run takes {words} ({shape})")
    if tokens and "tokens" in arrays and arrays["tokens"].shape[1] > tokens.length:
        raise UserError(f"it has {arrays['tokens'].shape[1]} tokens, but the run was trained on up to {tokens.length}")


def _order_numbers(
    conditions: Shaped[np.ndarray, "n m"], given: Sequence[Any], names: Sequence[str]
) -> Shaped[np.ndarray, "n k"]:
    """Returns the numbers called `names` of those that a file calls `given`. Raises UserError where it lacks one."""
    known = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in given]
    if len(known) != conditions.shape[1]:
        raise UserError(f"there are {len(known)} {CONDITION_NAMES} for {conditions.shape[1]} numbers")
    if missing := [name for name in names if name not in known]:
        raise UserError(f"its {CONDITION_NAMES} lack {', '.join(missing)}; there are {', '.join(known)}")
    return conditions[:, [known.index(name) for name in names]]


class Sweep(NamedTuple):
    """Conditions that differ by one field alone."""

    conditions: PyTree  # (n, ...)
    titles: list[str]  # of each, by that field
    others: str  # the other fields, in words


def read_sweep(text: str, given: str | None, kind: Condition) -> Sweep:
    """Returns the conditions of `NAME=FIRST:LAST:COUNT`, at equal distances.

    `given` has the fields that are not swept, as --condition writes them; without it they are typical. Raises
    UserError, which does not name the flag.
    """
    match = re.fullmatch(r"\s*([^=]+?)\s*=([^:]+):([^:]+):\s*([0-9]+)\s*", text)
    fields = _fields(kind)
    if not match or match[1] not in fields:
        raise UserError(f"write NAME=FIRST:LAST:COUNT, with one of {', '.join(fields)}")
    try:
        first, last, count = float(match[2]), float(match[3]), int(match[4])
    except ValueError:
        raise UserError(f"{match[2]} and {match[3]} are no numbers") from None
    if not 2 <= count <= MAX_SWEEP or not np.isfinite([first, last]).all():
        raise UserError(f"use 2 to {MAX_SWEEP} values between two finite numbers")

    # What does not change.
    name = match[1]
    if name == TEXT:
        raise UserError("a text is no number; give texts by --prompt")
    others = [field for field in fields if field != name]
    if given is None:
        constant: Mapping[str, str] = {field: kind.typical[field] for field in others if field in kind.typical}
        if missing := [field for field in others if field not in constant]:
            raise UserError(f"give {', '.join(missing)} by --condition")
    else:
        rows = parse_rows(given, others, [name])
        if len(rows) != 1:
            raise UserError(f"beside it, --condition gives {', '.join(others)} once")
        (constant,) = rows
    texts = [f"{value:.9g}" for value in np.linspace(first, last, count)]
    titles = [f"{name}={float(text):.3g}" for text in texts]
    conditions = kind.from_fields([{**constant, name: text} for text in texts])
    return Sweep(conditions, titles, ", ".join(f"{field}={value}" for field, value in constant.items()))


def _fields(kind: Condition) -> tuple[str, ...]:
    if kind.find_part(ImageCondition):
        raise UserError("the run's condition has an image; give --condition_images, or --condition_file FILE.npz")
    if not kind.fields:
        raise UserError("the run's conditions cannot be written; give --condition_file FILE.npz, or leave the flag out")
    return kind.fields
