"""Tables beside images: metadata.csv and metadata.jsonl as the `datasets` library has them, dataset.json of EDM and
StyleGAN, and captions in a text file for each image.

A table has a row for an image, which `file_name` names relative to the table's folder; of a dataset.json its only
column is called `label`. A caption is the column `caption`.
"""

import csv
import dataclasses
import io
import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from utils.base.external import BadFileError, parse_json
from utils.base.messages import UserError, printable
from utils.base.settings import suggest_name
from utils.storage.tree import Tree, relative, stem

TABLES = ("metadata.csv", "metadata.jsonl", "dataset.json")
MAX_TABLE_BYTES = 2**28  # a million rows of 256 bytes
MAX_CAPTION_BYTES = 2**16
MAX_LISTED = 3  # names in a message
KEY = "file_name"
EDM_COLUMN = "label"
CAPTION = "caption"
CAPTION_SUFFIX = ".txt"
CLASS_SUFFIX = ".cls"  # of WebDataset: the number or name of an image's class
SIDECARS = "*.json"  # stands for a table of the files beside each image: its class, and the keys of its .json
COLUMNS = "*"  # stands for the columns that the tree itself keeps beside its images
MAX_SIDECAR_BYTES = 2**16
WHOLE = re.compile(r"([+-]?[0-9]+)(?:\.0*)?")


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of values, one for each image: texts of a csv, values of JSON, None where a row has none."""

    source: str  # in messages: its path, or what stands in its place
    folder: str  # that the names are relative to
    numbers: dict[str, int]  # {name of an image, relative to the folder: its row}
    columns: dict[str, list[Any]]
    class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=dict
    )  # of columns of labels 0, 1, ...

    def find_rows(self, images: Sequence[str]) -> list[int]:
        """Returns the row of each image. Raises UserError where there is none for some of them."""
        names = [relative(image, self.folder) for image in images]
        missing = [name for name in names if name not in self.numbers]
        if missing:
            # Names that are all of another form: without suffix, absolute, in capitals.
            others = f"; its first is of {_list(list(self.numbers), 1)}" if len(missing) == len(names) else ""
            raise UserError(
                f"{self.source}: no row for {len(missing):,} of {len(names):,} images ({_list(missing)}){others}; add "
                "rows, or move the images out"
            )
        return [self.numbers[name] for name in names]

    def take(self, column: str, rows: Iterable[int]) -> list[Any]:
        """Returns the values of some rows. Raises UserError if there is no such column, or a row has no value."""
        if column not in self.columns:
            raise UserError(
                f"{self.source} has no column {printable(column)!r}{suggest_name(column, self.columns)} (there are "
                f"{_list(list(self.columns), 20)})"
            )
        rows = list(rows)
        values = [self.columns[column][row] for row in rows]
        empty = [row for row, value in zip(rows, values, strict=True) if value is None or value == ""]
        if empty:
            raise UserError(
                f"{self.source}: {column} is empty in {_count(empty)} (first that of {self._name(empty[0])}); fill it "
                "in, or leave these images out"
            )
        return values

    def number_columns(self) -> tuple[str, ...]:
        """Returns the names of the columns that hold numbers, or lists of them, in most rows: a gap or a slip is an
        error where they are read, rather than a column that is silently left out."""

        def is_number(value):
            items = value if isinstance(value, list) else [value]
            return all(_read_number(item) is not None for item in items)

        return tuple(name for name, values in self.columns.items() if 2 * sum(map(is_number, values)) > len(values))

    def read_numbers(
        self, columns: Sequence[str], rows: Sequence[int]
    ) -> tuple[Float32[np.ndarray, "n k"], tuple[str, ...]]:
        """Returns (numbers of some rows, a name for each of them): those of the columns, side by side. A list of a
        dataset.json counts as so many columns.

        Raises UserError for texts, for values that are not finite and for lists of different lengths.
        """
        parts = []
        names: list[str] = []
        for column in columns:
            values = self.take(column, rows)
            lists = [value if isinstance(value, list) else [value] for value in values]
            lengths = {len(value) if isinstance(value, list) else None for value in values}
            if len(lengths) > 1:
                raise UserError(f"{self.source}: {column} holds lists of different lengths; give each row as many")
            (length,) = lengths
            names += [column] if length is None else [f"{column}_{i}" for i in range(length)]
            numbers = [[_read_number(item) for item in value] for value in lists]
            self._check_numbers(column, lists, numbers, rows)
            parts.append(np.array(numbers, np.float64))
        with np.errstate(over="ignore"):  # reported by what takes them
            return np.concatenate(parts, axis=1).astype(np.float32), tuple(names)

    def _check_numbers(
        self, column: str, lists: list[list[Any]], numbers: list[list[Any]], rows: Sequence[int]
    ) -> None:
        """Raises UserError for the first text, and for values that are not finite, with their number."""
        pairs = list(zip(rows, lists, numbers, strict=True))
        for row, items, found in pairs:
            if None in found:
                text = printable(str(items[found.index(None)])[:40])
                raise UserError(
                    f"{self.source}: {column} of {self._name(row)} is {text!r}, no number; a column of texts is a "
                    f"class:{column}"
                )
        bad = [row for row, _, found in pairs if not all(map(math.isfinite, found))]
        if bad:
            raise UserError(
                f"{self.source}: {column} is NaN or infinite in {_count(bad)} (first that of {self._name(bad[0])}); "
                "mend it, or leave these images out"
            )

    def read_classes(self, column: str, rows: Sequence[int]) -> tuple[list[int], tuple[str, ...]]:
        """Returns (labels of some rows, the names of their classes, in order). -1 stands for no label.

        Raises UserError for lists and for numbers that are not whole.
        """
        values = self.take(column, rows)
        if column in self.class_names:
            return self._check_labels(column, values, rows), self.class_names[column]
        texts = [str(value).strip() for value in values]
        for row, value, text in zip(rows, values, texts, strict=True):
            is_number = _read_number(text) is not None
            if not isinstance(value, (str, int, float)) or (is_number and not WHOLE.fullmatch(text)):
                shown = printable(text[:40])
                raise UserError(
                    f"{self.source}: {column} of {self._name(row)} is {shown}, no class; give vector:{column}"
                )
        # pandas writes whole numbers with a point where a column has gaps. They are in their own order: 2 before 10.
        texts = [text if (match := WHOLE.fullmatch(text)) is None else match[1] for text in texts]
        are_numbers = all(map(WHOLE.fullmatch, texts))
        found = sorted(set(texts) - {"-1"}, key=int if are_numbers else None)
        if not found:
            raise UserError(f"{self.source}: no image has a label in {column}; give another column")
        labels = {"-1": -1} | {name: label for label, name in enumerate(found)}
        return [labels[text] for text in texts], tuple(found)

    def _check_labels(self, column: str, labels: list[Any], rows: Sequence[int]) -> list[int]:
        """Returns labels of classes that have names. Raises UserError for one that is out of their range."""
        count = len(self.class_names[column])
        for row, label in zip(rows, labels, strict=True):
            if not isinstance(label, int) or not -1 <= label < count:
                raise UserError(
                    f"{self.source}: {column} of {self._name(row)} is {printable(str(label))[:40]}, but there are "
                    f"{count} classes, 0 to {count - 1}; mend it, or leave this image out"
                )
        return labels

    def _name(self, row: int) -> str:
        return printable(next(name for name, number in self.numbers.items() if number == row))


def find_table(tree: Tree, *folders: str) -> str | None:
    """Returns the table in the first of the folders that has one. Raises UserError if that has several."""
    for folder in folders:
        found = [name for name in TABLES if tree.is_file(posixpath.join(folder, name))]
        if len(found) > 1:
            raise UserError(f"{tree.show(folder)} holds {found[0]} and {found[1]}; leave one of them there")
        if found:
            return posixpath.join(folder, found[0])
    return None


def read_table(tree: Tree, path: str) -> Table:
    """Reads a table of one of TABLES. Raises UserError, with the line, for what cannot be understood, and for images
    that have several rows."""
    read = {".csv": _read_csv, ".jsonl": _read_lines, ".json": _read_edm}[posixpath.splitext(path)[1]]
    source = tree.show(path)
    try:
        content = tree.read_bounded(path, MAX_TABLE_BYTES)
        keys, columns = read(content)
    except (BadFileError, csv.Error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{source} cannot be read ({printable(str(error))[:200]}); mend it") from None

    # Written on Windows, paths have backslashes.
    numbers: dict[str, int] = {}
    for row, key in enumerate(keys):
        name = str(key).replace("\\", "/").removeprefix("./")
        if name in numbers:
            raise UserError(f"{source}: {printable(name)} has several rows; leave it one")
        numbers[name] = row
    return Table(source, posixpath.dirname(path), numbers, columns)


def read_captions(tree: Tree, images: Sequence[str], folder: str) -> Table:
    """Returns the text files named as the images, as the column `caption` of a table; None where an image has none."""
    texts = []
    for image in images:
        file = stem(image) + CAPTION_SUFFIX
        try:
            has_one = tree.is_file(file)
            texts.append(tree.read_bounded(file, MAX_CAPTION_BYTES).decode("utf-8-sig").strip() if has_one else None)
        except (BadFileError, UnicodeDecodeError) as error:
            raise UserError(f"{tree.show(file)} is no caption ({error}); mend it, or move its image out") from None
    names = {relative(image, folder): row for row, image in enumerate(images)}
    return Table(tree.show(posixpath.join(folder, f"*{CAPTION_SUFFIX}")), folder, names, {CAPTION: texts})


def has_sidecar(tree: Tree, image: str) -> bool:
    """Returns whether an image has its class, or a .json, beside it."""
    return any(tree.is_file(stem(image) + suffix) for suffix in (CLASS_SUFFIX, ".json"))


def read_sidecars(tree: Tree, images: Sequence[str], folder: str) -> Table:
    """Returns the files named as the images as a table: its column `label` is the class in KEY.cls, the others are the
    keys of KEY.json.

    Raises UserError for two images of one key, and for files that are no classes or no JSON objects.
    """
    rows: list[dict[str, Any]] = []
    images_of: dict[str, str] = {}
    for image in images:
        key = stem(image)
        if key in images_of:
            raise UserError(
                f"{tree.show(image)} and {tree.show(images_of[key])} are two images of one key, to which the files "
                "beside them belong; leave one of them there"
            )
        images_of[key] = image
        # Numbers and texts of the image, then its class, whichever of the two are there.
        row: dict[str, Any] = {}
        try:
            if tree.is_file(file := f"{key}.json"):
                row |= parse_json(tree.read_bounded(file, MAX_SIDECAR_BYTES), is_finite=False)
            if tree.is_file(file := key + CLASS_SUFFIX):
                row[EDM_COLUMN] = tree.read_bounded(file, MAX_SIDECAR_BYTES).decode("utf-8-sig").strip()
        except (BadFileError, UnicodeDecodeError) as error:
            raise UserError(f"{tree.show(file)} cannot be read ({error}); mend it, or move its image out") from None
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    numbers = {relative(image, folder): row for row, image in enumerate(images)}
    columns = {name: [row.get(name) for row in rows] for name in names}
    beside = posixpath.join(folder, f"*{CLASS_SUFFIX}" if set(names) == {EDM_COLUMN} else SIDECARS)
    return Table(tree.show(beside), folder, numbers, columns)


def _read_csv(content: bytes) -> tuple[list[Any], dict[str, list[Any]]]:
    # Spreadsheets put a byte-order mark in front.
    rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    header = [name.strip() for name in next(rows, [])]
    if KEY not in header or len(set(header)) < len(header):
        raise ValueError(f"its first line names {_list(header, 20) or 'nothing'}, not {KEY} and columns, each once")
    found: list[list[str]] = []
    for row in rows:
        if len(row) not in (0, len(header)):
            raise ValueError(f"line {rows.line_num} has {len(row)} values for {len(header)} columns")
        if row:
            found.append(row)
    columns = (
        dict(zip(header, map(list, zip(*found, strict=True)), strict=True)) if found else {name: [] for name in header}
    )
    return columns.pop(KEY), columns


def _read_lines(content: bytes) -> tuple[list[Any], dict[str, list[Any]]]:
    rows = []
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(row, dict) or KEY not in row:
                raise ValueError(f"line {number} is no object with a {KEY}")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return columns.pop(KEY, []), columns


def _read_edm(content: bytes) -> tuple[list[Any], dict[str, list[Any]]]:
    labels = json.loads(content)["labels"]
    if not labels:
        raise ValueError("it says that there are no labels")
    if not isinstance(labels, (list, dict)):
        raise ValueError(f"its labels are {str(labels)[:40]}, not a list of [file name, label]")
    keys, values = zip(*(labels.items() if isinstance(labels, dict) else labels), strict=True)
    return list(keys), {EDM_COLUMN: list(values)}


def _read_number(value: Any) -> float | None:
    """Returns the number that a value is or says; None for any other."""
    try:
        return float(value) if isinstance(value, (str, int, float)) else None
    except (ValueError, OverflowError):
        return None


def _count(rows: Sequence[int]) -> str:
    return f"{len(rows):,} row{'s' * (len(rows) != 1)}"


def _list(names: Sequence[str], limit: int = MAX_LISTED) -> str:
    return printable(", ".join(map(str, names[:limit]))) + ", ..." * (len(names) > limit)
