"""Files beside images that may hold labels or captions: recognised, described and named, but not read as labels.

Only the numbered folders of EDM and StyleGAN are understood, as far as to know that they are no classes.
"""

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from utils.base.console import printable
from utils.base.errors import UserError
from utils.base.external import BadFileError, read_bounded
from utils.base.files import open_regular

TABLE_SUFFIXES = (
    ".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".parquet", ".arrow", ".feather",
    ".xls", ".xlsx", ".mat", ".npy", ".npz", ".pkl", ".pickle", ".h5", ".hdf5", ".lst", ".cls", ".caption", ".tags",
    ".data", ".db", ".sqlite",
)  # fmt: skip
ABOUT_DATA = re.compile(r"(readme|licen[cs]e|copying|notice|attribution|citation|changelog|requirements)\b", re.I)
MAX_LISTED = 3  # files named in a message
HEAD_BYTES = 2**16  # of a table that is described
# Those of ImageNet take 50 MB, and some ten times that once they are read.
MAX_EDM_BYTES = 2**26
EDM_TABLE = "dataset.json"


def unused_message(folder: Path, others: Sequence[Path], images: Iterable[Path]) -> str:
    """Names files below `folder` that may hold labels or captions, as not used; '' where none does.

    `others` are files that are no images, `images` those that are.
    """
    found = [path for path in others if is_table(path)]
    if not found:
        return ""
    stems = {os.path.splitext(image)[0] for image in images}
    tables, beside = [], []
    for path in found:
        (beside if os.path.splitext(path)[0] in stems else tables).append(path)
    parts = []
    if tables:
        listed = ", ".join(_name(path, folder) + describe_table(path) for path in tables[:MAX_LISTED])
        more = ", ..." * (len(tables) > MAX_LISTED)
        parts.append(f"{len(tables):,} file{'s' * (len(tables) > 1)} that may hold labels or captions ({listed}{more})")
    if beside:
        several = "s" * (len(beside) > 1)
        parts.append(f"{len(beside):,} file{several} named as an image, such as {_name(beside[0], folder)}")
    return f"{printable(str(folder))}: not used: {'; '.join(parts)}"


def is_table(path: Path) -> bool:
    """Whether a file that is no image may hold labels or captions, by its name."""
    return path.suffix.lower() in TABLE_SUFFIXES and not ABOUT_DATA.match(path.name)


def describe_table(path: Path) -> str:
    """Says in some words, with a space before them, what a table holds; '' where that is not clear."""
    if path.name == EDM_TABLE:
        labels = read_edm_labels(path)
        return "" if labels is None else f" with labels of {len(labels):,} images" if labels else " without labels"
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return ""
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    first = head.decode(encoding, "replace").partition("\n")[0].strip()
    if path.suffix.lower() in (".csv", ".tsv"):
        return f" beginning {printable(first[:60])!r}" if first else " that is empty"
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        try:
            row = json.loads(first if path.suffix.lower() != ".json" or len(head) == HEAD_BYTES else head)
        except (ValueError, RecursionError):
            return ""
        keys = ", ".join(list(row)[:5])[:60] if isinstance(row, dict) else ""
        return f" with {printable(keys)}" if keys else ""
    return ""


def read_edm_labels(table: Path) -> dict[str, str] | None:
    """Returns {path of an image: its label as JSON} of a dataset.json as EDM and StyleGAN write it, empty where it
    says that there are none; None where it is something else, or larger than MAX_EDM_BYTES."""
    try:
        content = json.loads(read_bounded(table, MAX_EDM_BYTES))
        labels = content["labels"]
        pairs = labels.items() if isinstance(labels, dict) else labels or ()
        return {str(name).replace("\\", "/"): json.dumps(label) for name, label in pairs}
    except (BadFileError, ValueError, KeyError, TypeError, RecursionError):
        return None


def are_numbered(images: Mapping[Path, Sequence[Path]]) -> bool:
    """Whether {folder: its images} are a thousand in a folder, numbered as EDM and StyleGAN write any images
    (00001/img00001234.png) or as FFHQ and EDM's samples are (01000/01234.png)."""
    return all(_is_numbered(folder.name, image.stem) for folder, paths in images.items() for image in paths)


def _is_numbered(folder: str, stem: str) -> bool:
    if not re.fullmatch(r"\d{5,8}", folder):
        return False
    is_edm = stem.startswith("img") and stem[3:-3] == folder and stem[3:].isdecimal()
    is_ffhq = stem.isdecimal() and len(stem) == len(folder) and f"{stem[:-3]}000" == folder
    return is_edm or is_ffhq


def check_folders(flag: str, folder: Path, root: Path, images: Mapping[Path, Sequence[Path]]) -> str:
    """Compares folders, {folder of a class: its images}, with the labels of a dataset.json in `folder` or `root`.

    Returns why the folders are no classes, so that all images are of one, or ''. UserError where labels and folders
    tell other classes apart.
    """
    is_numbered = are_numbered(images)
    table = next((path for path in (folder / EDM_TABLE, root / EDM_TABLE) if path.is_file()), None)
    labels = read_edm_labels(table) if table else {}
    fix = (
        "put the images of each label into a folder named after it, or make an npz with `images` and `labels`, and use "
        "npz:FILE"
    )
    if labels is None and is_numbered:
        raise UserError(f"{flag}: {table} cannot be read, and the folders beside it are numbered, no classes; {fix}")

    # Labels of the images in each folder.
    found: list[set[str]] = []
    num_labelled = 0
    for paths in images.values():
        names = [path.relative_to(table.parent).as_posix() for path in paths] if table and labels else []
        own = [labels[name] for name in names if name in labels] if labels else []
        num_labelled += len(own)
        found.append(set(own))
    values = set().union(*found)
    if is_numbered and len(values) <= 1:
        return "folders of a thousand numbered images, as EDM, StyleGAN and FFHQ have them, are no classes"
    is_one_to_one = len(values) == sum(map(len, found)) and all(len(own) <= 1 for own in found)
    if not is_one_to_one:
        folders = f"{len(found):,} folders that they lie in" if len(found) > 1 else "folder that they lie in"
        way_out = "" if is_numbered else f". If the folders are the classes, move {EDM_TABLE} out"
        raise UserError(
            f"{flag}: {table} has labels of {num_labelled:,} images, whose {len(values):,} classes are not the "
            f"{folders}; {fix}{way_out}"
        )
    return ""


def _name(path: Path, folder: Path) -> str:
    return printable(path.relative_to(folder).as_posix()) if path.is_relative_to(folder) else printable(str(path))
