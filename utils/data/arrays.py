"""Data sets of NumPy's files (npz:FILE), and the digits of scikit-learn."""

import importlib.metadata
import itertools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.base.devices import format_bytes, host_memory
from utils.base.external import ArrayHeader, BadFileError, map_npy, read_npz, read_npz_headers
from utils.base.messages import UserError, printable, warn_once
from utils.base.settings import suggest_name
from utils.conditions.images import SPACES
from utils.conditions.words import read_kinds
from utils.data.columns import KEYS, Columns, check_columns, check_splits, make_columns, make_dataset
from utils.data.dataset import SPLITS, DataOptions, ImageDataset, array_dataset, split_rows, unlabelled_message

IMAGES = ("images", "arr_0")  # the second of each as in ADM's files
LABELS = ("labels", "arr_1")
OTHER_LABELS = ("label", "targets", "target", "y")  # taken for labels where they are integers (n,)
VALIDATION = "validation_"
PREFIXES = {"train": "", "validation": VALIDATION}  # of the names of a split's arrays
# Arrays of each kind of --condition_columns; the first of them is needed.
KIND_COLUMNS = {
    "class": ("labels",),
    "vector": ("conditions",),
    "tokens": ("tokens", "token_mask"),
    "text": ("captions", "tokens", "token_mask"),
    "image": ("condition_images",),
}
CONDITION_COLUMNS = [column for column in KEYS if column not in ("images", "labels")]
CLASS_NAMES = "class_names"
CONDITION_NAMES = "condition_names"  # of the numbers of `conditions`
# Names by which arrays are read, for those that are misspelt.
WRITTEN = [prefix + column for prefix in PREFIXES.values() for column in KEYS] + [CLASS_NAMES, CONDITION_NAMES]
MAX_CLASSES = 2**20
MAX_NAMES_BYTES = 2**26  # of class names; NumPy takes four bytes for a letter
MAX_LISTED = 5  # arrays named in a message
NUM_HELD_OUT_DIGITS = 297
WANTED = "images uint8 or float (n, h, w, c) and labels (n,)"


def load_digits(name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns the split of 1,797 real handwritten digits, 8x8 and grey, shipped with scikit-learn (UCI, CC BY 4.0)."""
    # The file alone: to import scikit-learn takes most of a second. A row has 64 levels of ink, 0 .. 16, and the digit.
    path = importlib.metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(path), delimiter=",")
    images = np.round(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = rows[:, -1].astype(np.int64)
    chosen = split_rows(len(rows), split, NUM_HELD_OUT_DIGITS)
    return array_dataset(name, images[chosen], labels[chosen], tuple("0123456789"), split)


def load_array_file(name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns the split of npz:FILE: an npz with `images`, uint8 or float (n, h, w, c) or (n, h, w), and `labels` (n,),
    or ADM's `arr_0` and `arr_1`; or a .npy of images alone.

    Integers (n,) called `label`, `targets`, `target` or `y` are labels too. Without labels all images are of one class;
    images labelled -1 are left out. `validation_images` and `validation_labels` are the validation split; without them,
    or where all of these labels are -1, a part is held out. `class_names` names the classes. An array that the npz
    lacks may lie beside it as a file, FILE.images.npy; it is mapped, all others are held in memory.

    Raises UserError if the file is missing, damaged, larger than the memory, or holds something else.
    """
    path = Path(name.partition(":")[2])
    flag = f"--dataset_name={name}"
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}; name an npz with {WANTED}, or a .npy of images")
    try:
        file = _open_file(path, flag)
        asked = _read_columns_flag(options.condition_columns)
        parts = _find_parts(file, flag, asked)
        labels = {part: file.read(found, ["labels"]).get("labels") for part, found in parts.items()}
        class_names, condition_names = (_read_names(file, key, flag) for key in (CLASS_NAMES, CONDITION_NAMES))
        if "validation" in parts and _is_unlabelled(labels["validation"]):
            warn_once(f"{flag}: no validation image has a label, so a part of the others is held out for validation")
            del parts["validation"]
        # Images of bytes with labels alone are one array for each split. Of others, range and condition are those of
        # the training split.
        is_plain = all(file.is_plain(found) for found in parts.values())
        part = split if split in parts else "train"
        needed = {part: parts[part]} if is_plain else {each: parts[each] for each in dict.fromkeys(("train", part))}
        _check_size(file, needed.values(), flag)
        arrays = {each: file.read(found, found) for each, found in needed.items()}
    except BadFileError as error:
        raise UserError(f"{flag}: {path} cannot be read ({error}); write it with numpy.savez") from None

    # Rows of each split, without those that have no label.
    class_names = _name_classes(class_names, [each for each in labels.values() if each is not None], flag)
    rows = {each: _labelled_rows(found, parts[each], each, flag) for each, found in arrays.items()}
    if "validation" not in parts:
        if len(rows["train"]) == 1:
            raise UserError(f"{flag}: {path} holds 1 image; 2 are needed, one of them to hold out")
        kept = rows["train"]
        rows = {each: kept[split_rows(len(kept), each)] for each in SPLITS}
    if is_plain:
        images = arrays[part]["images"]
        found = arrays[part].get("labels", np.zeros(len(images), np.int32))
        return array_dataset(name, images[rows[split]], found[rows[split]], class_names, split)
    columns = {
        each: make_columns(arrays.get(each, arrays["train"]), rows[each]) for each in dict.fromkeys(("train", split))
    }
    if asked.numbers:
        columns, condition_names = asked.choose_numbers(columns, condition_names)
    names = (class_names, condition_names)
    return make_dataset(
        name, columns, split, *names, options.value_range, text_encoder=options.text_encoder, image_space=asked.space
    )


# The arrays of one split, {column: name in the file}; columns are those of KEYS.
Part = dict[str, str]


class ArrayFile(NamedTuple):
    """The arrays of an npz, and those of .npy files, which are mapped."""

    path: Path
    headers: dict[str, ArrayHeader]  # of all of them
    mapped: dict[str, np.ndarray]

    def read(self, part: Part, columns: Collection[str]) -> dict[str, np.ndarray]:
        """Returns {column: array} of those of the `columns` that the part has. Raises BadFileError."""
        names = {column: name for column, name in part.items() if column in columns}
        packed = {name: self.headers[name] for name in names.values() if name not in self.mapped}
        found = read_npz(self.path, packed, "fiubUS", host_memory()) if packed else {}
        return {column: (found | self.mapped)[name] for column, name in names.items()}

    def is_plain(self, part: Part) -> bool:
        """Whether a part has images of bytes, in the npz, and nothing but labels beside them."""
        images = part["images"]
        return part.keys() <= {"images", "labels"} and self.headers[images].dtype == np.uint8 and not self.mapped


def _open_file(path: Path, flag: str) -> ArrayFile:
    """Returns what `path`, an npz or a .npy of images, and the .npy files beside an npz say of their arrays.

    Raises BadFileError, and UserError for a .npy that cannot be used.
    """
    if path.suffix == ".npy":
        header, images = map_npy(path)
        _check_mapped(header, path, flag)
        return ArrayFile(path, {"images": header}, {"images": images})
    headers = read_npz_headers(path)
    mapped: dict[str, np.ndarray] = {}
    for prefix, column in itertools.product(("", VALIDATION), (*IMAGES, *LABELS, *KEYS)):
        name = prefix + column
        file = path.with_name(f"{path.stem}.{name}.npy")
        if name in mapped or not file.is_file():
            continue
        if name in headers:
            raise UserError(f"{flag}: there are {name} in {path.name} and in {file.name}; remove one of the two")
        try:
            header, mapped[name] = map_npy(file)
        except BadFileError as error:
            raise UserError(f"{flag}: {file} cannot be read ({error}); write it with numpy.save") from None
        _check_mapped(header, file, flag)
    return ArrayFile(path, headers | {name: _header_of(array) for name, array in mapped.items()}, mapped)


def _header_of(array: np.ndarray) -> ArrayHeader:
    return ArrayHeader(array.shape, False, array.dtype)


def _check_mapped(header: ArrayHeader, file: Path, flag: str) -> None:
    if header.is_fortran and len(header.shape) > 1:
        raise UserError(
            f"{flag}: {file.name} is in Fortran order, last axis first; save numpy.ascontiguousarray(images) instead"
        )


class Asked(NamedTuple):
    """The arrays that --condition_columns asks for."""

    flag: str
    kinds: Collection[str] | None  # those of KIND_COLUMNS; None: whatever there is
    numbers: tuple[str, ...]  # those of `conditions`, by name; (): all of them
    space: str = SPACES[0]  # of condition images

    def choose(self, part: Part, path: Path) -> Part:
        """Returns what a split has of them. Raises UserError if it lacks one."""
        if self.kinds is None:
            return part
        chosen = {"images"}
        for kind in self.kinds:
            needed = KIND_COLUMNS[kind][0]
            if needed not in part:
                raise UserError(f"{self.flag}: {path} has no {needed}, which {kind} needs")
            chosen.update(KIND_COLUMNS[kind])
        return {column: name for column, name in part.items() if column in chosen}

    def choose_numbers(
        self, parts: Mapping[str, Columns], names: list[str] | None
    ) -> tuple[dict[str, Columns], list[str]]:
        """Returns the splits with those numbers of `conditions` alone that are asked for, and their names."""
        known = names or [f"c{i}" for i in range(parts["train"].arrays["conditions"].shape[1])]
        if unknown := [name for name in self.numbers if name not in known]:
            raise UserError(f"{self.flag}: there is no number {unknown[0]}; there are {', '.join(known[:MAX_LISTED])}")
        places = [known.index(name) for name in self.numbers]
        return {
            split: Columns({**part.arrays, "conditions": part.arrays["conditions"][:, places]}, part.rows)
            for split, part in parts.items()
        }, list(self.numbers)


def _read_columns_flag(text: str | None) -> Asked:
    """Returns what a value of --condition_columns asks for. Raises UserError for what no npz has."""
    flag = f"--condition_columns={text}"
    if text is None:
        return Asked(flag, None, ())
    kinds = read_kinds(text)
    for kind, names in kinds.items():
        if kind not in KIND_COLUMNS:
            raise UserError(f"{flag}: an npz has no {kind}; use {', '.join(KIND_COLUMNS)}, joined by +")
        if kind == "image" and names and (len(names) > 1 or names[0] not in SPACES):
            raise UserError(f"{flag}: write image:{' or image:'.join(SPACES)}")
        if names and kind not in ("vector", "image"):
            raise UserError(f"{flag}: an npz has one array for {kind}; write {kind} alone")
    (space,) = kinds.get("image") or SPACES[:1]
    return Asked(flag, kinds, kinds.get("vector", ()), space)


def _find_parts(file: ArrayFile, flag: str, asked: Asked) -> dict[str, Part]:
    """Returns {split: its arrays} of a file, of 'train' and, if there is one, of 'validation'.

    Raises UserError if there are no images, or if arrays do not fit together; warns of what is not read.
    """
    headers = file.headers
    parts = {split: _find_split(headers, prefix) for split, prefix in PREFIXES.items()}
    parts = {split: asked.choose(part, file.path) for split, part in parts.items() if part}
    if "train" not in parts:
        found = printable(", ".join(sorted(headers))[:200]) or "nothing"
        raise UserError(f"{flag}: {file.path} holds {found}; needed are {WANTED}")
    _check_headers(headers, parts, flag)
    return parts


def _find_split(headers: Mapping[str, ArrayHeader], prefix: str) -> Part | None:
    """Returns the arrays of a split, named `prefix` and one of the known names; None if it has no images."""
    images = next((prefix + name for name in IMAGES if prefix + name in headers), None)
    if images is None:
        return None
    labels = next((prefix + name for name in LABELS if prefix + name in headers), None)
    if labels is None:
        # Other usual names may hold something else: they count only where their arrays could be labels.
        alike = (prefix + name for name in OTHER_LABELS if prefix + name in headers)
        labels = next((name for name in alike if _may_be_labels(headers[name], headers[images])), None)
    others = {column: prefix + column for column in CONDITION_COLUMNS if prefix + column in headers}
    return {"images": images, **({"labels": labels} if labels else {}), **others}


def _may_be_labels(header: ArrayHeader, images: ArrayHeader) -> bool:
    return header.dtype.kind in "iu" and header.shape == images.shape[:1]


def _check_headers(headers: Mapping[str, ArrayHeader], parts: Mapping[str, Part], flag: str) -> None:
    """Raises UserError if arrays of the splits hold objects or do not fit together; warns of arrays that are not
    read."""
    # Each split by itself, then one beside the other.
    for part in parts.values():
        check_columns(flag.removeprefix("--dataset_name="), {column: headers[name] for column, name in part.items()})
    check_splits(flag, [{column: headers[name] for column, name in part.items()} for part in parts.values()])

    # Arrays that are not read: among them may be the labels that one split lacks.
    used = {name for part in parts.values() for name in part.values()} | {CLASS_NAMES}
    if all("conditions" in part for part in parts.values()):
        used.add(CONDITION_NAMES)
    names = sorted(headers.keys() - used)
    unread = [f"{name} {headers[name].dtype} {headers[name].shape}" for name in names]
    not_read = f"not read: {', '.join(unread[:MAX_LISTED])}{', ...' * (len(unread) > MAX_LISTED)}" if unread else ""
    not_read += next(filter(None, (suggest_name(name, WRITTEN) for name in names if name not in WRITTEN)), "")
    for column in ("labels", *CONDITION_COLUMNS):
        has_it = {split: column in part for split, part in parts.items()}
        if any(has_it.values()) and not all(has_it.values()):
            with_it, without = sorted(parts, key=lambda split: not has_it[split])
            what = f"{'integers ' * (column == 'labels')}{PREFIXES[without]}{column}{' (n,)' * (column == 'labels')}"
            raise UserError(
                f"{flag}: {parts[with_it]['images']} have {column}, but {parts[without]['images']} have none; add "
                f"{what}, or leave validation_images out{f' ({not_read})' * bool(unread)}"
            )

    # What a user may not expect, in one warning.
    remarks = [] if len(parts["train"]) > 1 else ["it has no labels, so all images are of one class"]
    if unread:
        remarks.append(not_read)
    if remarks:
        warn_once(f"{flag}: {'; '.join(remarks)}")


def _check_size(file: ArrayFile, parts: Iterable[Part], flag: str) -> None:
    """Raises UserError if the arrays that are not mapped take more than the memory of this machine."""
    limit = host_memory()
    names = {name for part in parts for name in part.values()} - file.mapped.keys()
    num_bytes = sum(file.headers[name].num_bytes for name in names)
    if num_bytes > limit:
        raise UserError(
            f"{flag}: its arrays take {format_bytes(num_bytes)}, this machine has {format_bytes(limit)} of memory; "
            f"save the images as {file.path.stem}.images.npy beside it, which is read from the disk as it is needed"
        )


def _read_names(file: ArrayFile, key: str, flag: str) -> list[str] | None:
    """Returns the names in the array `key`; None if there is none. Raises UserError if they cannot be names."""
    # One for a class, or a single one: by the header, before any text is read.
    header = file.headers.get(key)
    if header is None:
        return None
    if header.dtype.hasobject:
        raise UserError(
            f"{flag}: {key} is an array of Python objects, which only unpickling, and so running code, would read; "
            "save it as numpy.array(names, dtype=str)"
        )
    if len(header.shape) > 1:
        raise UserError(f"{flag}: {key} has the shape {header.shape}; give one name for a class, (classes,)")
    if header.num_bytes > MAX_NAMES_BYTES:
        raise UserError(
            f"{flag}: {key} takes {format_bytes(header.num_bytes)}, above {format_bytes(MAX_NAMES_BYTES)}; give "
            "shorter names"
        )

    # Numbers are names too; bytes are UTF-8.
    try:
        names = np.atleast_1d(read_npz(file.path, {key: header}, "fiubUS", MAX_NAMES_BYTES)[key]).tolist()
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    except BadFileError:
        raise
    except ValueError as error:  # bytes or code points that stand for no letter
        raise UserError(f"{flag}: {key} cannot be decoded ({error}); save numpy.array(names, dtype=str)") from None


def _is_unlabelled(labels: np.ndarray | None) -> bool:
    """Returns whether all labels are -1, no label."""
    return labels is not None and labels.dtype.kind == "i" and labels.size > 0 and bool((labels == -1).all())


def _labelled_rows(arrays: Mapping[str, np.ndarray], part: Part, split: str, flag: str) -> np.ndarray:
    """Returns the rows whose label is not -1. Raises UserError if -1 may stand for something else."""
    labels = arrays.get("labels")
    if labels is None or labels.dtype.kind != "i" or not (labels == -1).any():
        return np.arange(len(arrays["images"]))
    if _is_unlabelled(labels):
        raise UserError(f"{flag}: all of {part['labels']} are -1, no label; leave them out to train without classes")
    if not (labels == 0).any():  # -1 and 1 as two classes
        raise UserError(
            f"{flag}: {part['labels']} are -1 and {labels[labels != -1].min()} to {labels.max()}, without a 0; number "
            "the classes 0, 1, 2, ..."
        )
    is_labelled = labels != -1
    warn_once(unlabelled_message(flag, split, int((~is_labelled).sum()), len(labels)))
    return np.flatnonzero(is_labelled)


def _name_classes(names: list[str] | None, labels: list[np.ndarray], flag: str) -> list[str]:
    """Returns the names of the classes, by default the numbers up to the highest label of both splits."""
    highest = _highest_label(labels, flag)
    if names is None:
        return list(map(str, range(1 + highest)))
    if len(names) <= highest:
        raise UserError(
            f"{flag}: class_names holds {len(names)}, but a label is {highest}; give {highest + 1} names, one for a "
            "class"
        )
    return names


def _highest_label(labels: list[np.ndarray], flag: str) -> int:
    """Returns the highest label of both splits; 0 where they are no integers, which is refused later."""
    highest = max((int(each.max(initial=0)) for each in labels if each.dtype.kind in "iu"), default=0)
    if highest >= MAX_CLASSES:
        raise UserError(f"{flag}: a label is {highest}; number the classes 0, 1, 2, ...")
    return highest
