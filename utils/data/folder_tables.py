"""Conditions of the images of a folder: columns of the table beside them, and captions in files of their own
(utils/images/tables.py).

--condition_columns says which columns are read as what: `vector:angle,mass`, `class:species`, `text:caption`, several
of them joined by +.
"""

import dataclasses
import hashlib
import posixpath
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from utils.base.messages import UserError, printable, warn_once
from utils.conditions.condition import Condition
from utils.conditions.words import read_kinds
from utils.data.columns import make_condition
from utils.images.folders import IMAGE_SUFFIXES, scan
from utils.images.tables import (
    CAPTION,
    CAPTION_SUFFIX,
    CLASS_SUFFIX,
    COLUMNS,
    EDM_COLUMN,
    MAX_LISTED,
    SIDECARS,
    TABLES,
    Table,
    find_table,
    has_sidecar,
    read_captions,
    read_sidecars,
    read_table,
)
from utils.storage.tree import Tree, folders_of, relative, stem

KINDS = ("class", "vector", "text")  # that columns of a table can be
TEXT_COLUMNS = (CAPTION, "text")  # that are taken where none is named


@dataclasses.dataclass(frozen=True)
class Asked:
    """Kinds that --condition_columns asks for, {kind: columns}."""

    flag: str
    kinds: Mapping[str, tuple[str, ...]]

    @classmethod
    def of_text(cls, text: str) -> "Asked":
        """Returns what a value of the flag means. Raises UserError for what no table of a folder can have."""
        flag = f"--condition_columns={text}"
        kinds = read_kinds(text)
        if unread := [kind for kind in kinds if kind not in KINDS]:
            raise UserError(f"{flag}: a folder has no columns of {unread[0]}; use {', '.join(KINDS)}, joined by +")
        for kind in ("class", "text"):
            if len(kinds.get(kind, ())) > 1:
                raise UserError(f"{flag}: {kind} takes one column; name one")
        return cls(flag, kinds)

    def find_table(self, tree: Tree, folder: str) -> str | None:
        """Returns the table of the split in `folder`, which may lie above it, too; None where none is needed.

        Raises UserError where there is none that is needed, or several.
        """
        try:
            table = find_table(tree, *folders_of(folder))
        except UserError as error:
            raise UserError(f"{self.flag}: {error}") from None
        # Else what the source keeps beside its images, or what lies in files named as they are.
        if table is None and tree.has_columns:
            return COLUMNS
        if table is None and (image := find_first_image(tree, folder)) and has_sidecar(tree, image):
            return posixpath.join(folder, SIDECARS)
        # Captions may lie in files of their own, and folders may be the classes.
        is_optional = not self.kinds.get("class") and self.kinds.get("text", ()) in ((), (CAPTION,))
        if table is None and ("vector" in self.kinds or not is_optional):
            where = tree.show(folder)
            raise UserError(f"{self.flag}: {where} holds none of {', '.join(TABLES)}; put the table beside the images")
        return table

    def has_folders(self, table: str | None) -> bool:
        """Returns whether folders are the classes: a class is asked for, but no column, nor has the table just one."""
        is_edm = table is not None and (table.endswith(".json") or table == COLUMNS)
        return "class" in self.kinds and not self.kinds["class"] and not is_edm

    def is_read(self, file: str, stems: Collection[str]) -> bool:
        """Whether a file beside images is read: a table, or the caption of one of the images, {path without suffix}."""
        is_beside = file.endswith((*(CAPTION_SUFFIX,) * ("text" in self.kinds), CLASS_SUFFIX, ".json"))
        return posixpath.basename(file) in TABLES or (is_beside and stem(file) in stems)


def find_first_image(tree: Tree, folder: str) -> str | None:
    """Returns the first image at any depth below a folder; None if there is none."""
    scanned = scan(tree, folder, IMAGE_SUFFIXES)
    if scanned.images:
        return scanned.images[0]
    return next(filter(None, (find_first_image(tree, below) for below in scanned.folders)), None)


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Contents of a table for some images: labels, names of their classes, arrays (n, ...) by keys of an example."""

    labels: list[int] | None  # -1: none; None: the table has no classes
    class_names: tuple[str, ...]
    columns: dict[str, np.ndarray]
    names: tuple[str, ...]  # of the numbers in "conditions"


def read_conditions(asked: Asked, tree: Tree, table_file: str | None, images: Sequence[str], folder: str) -> Conditions:
    """Returns the conditions of images below `folder`, in their order.

    Raises UserError, in one line, for images without a row, columns that are not there, values that are missing or not
    finite, and texts where numbers are needed. Of rows without an image it warns.
    """
    try:
        table = None if table_file is None else _read_any(tree, table_file, images, folder)
        kinds = dict(asked.kinds)
        if asked.has_folders(table_file):
            del kinds["class"]

        # Captions are a column, or in files beside the images.
        captions = None
        if "text" in kinds:
            has = () if table is None else table.columns
            kinds["text"] = kinds["text"] or (next((name for name in TEXT_COLUMNS if name in has), CAPTION),)
            if kinds["text"] == (CAPTION,) and CAPTION not in has:
                captions = _read_files(tree, images, folder, table)
                del kinds["text"]
        found = Conditions(None, (), {}, ())
        if table is not None and kinds:
            found = _read_rows(tree, table, kinds, images)
        if captions is not None:
            found.columns["caption"] = np.array(captions, dtype=str)
        return found
    except UserError as error:
        raise UserError(f"{asked.flag}: {error}") from None


def _read_any(tree: Tree, table_file: str, images: Sequence[str], folder: str) -> Table:
    """Reads the table that `Asked.find_table` has found."""
    if table_file == COLUMNS:
        columns, class_names = tree.read_columns(images)
        numbers = {relative(image, folder): row for row, image in enumerate(images)}
        return Table(tree.root, folder, numbers, columns, class_names)
    if posixpath.basename(table_file) == SIDECARS:
        return read_sidecars(tree, images, folder)
    return read_table(tree, table_file)


def _read_files(tree: Tree, images: Sequence[str], folder: str, table: Table | None) -> list[str]:
    """Returns the captions in files beside the images. Raises UserError where there are none, in files or `table`."""
    files = read_captions(tree, images, folder)
    if not any(files.columns[CAPTION]):
        columns = f"; {table.source} has the columns {', '.join(table.columns)}" if table is not None else ""
        raise UserError(
            f"there are no captions {files.source} beside the images{columns}; write one for each image, or name the "
            "column of a table that holds them, text:COLUMN"
        )
    return files.take(CAPTION, range(len(images)))


def _read_rows(tree: Tree, table: Table, kinds: Mapping[str, tuple[str, ...]], images: Sequence[str]) -> Conditions:
    """Returns the columns that are asked for, of the rows of the images."""
    rows = table.find_rows(images)
    _name_rows_without_image(tree, table, set(rows))
    labels, class_names = None, ()
    columns: dict[str, np.ndarray] = {}
    names: tuple[str, ...] = ()
    if "class" in kinds:
        (column,) = kinds["class"] or (EDM_COLUMN,)
        labels, class_names = table.read_classes(column, rows)
    if "vector" in kinds:
        columns["conditions"], names = table.read_numbers(kinds["vector"] or _find_numbers(table), rows)
    if "text" in kinds:
        (column,) = kinds["text"]
        columns["caption"] = np.array(list(map(str, table.take(column, rows))), dtype=str)
    return Conditions(labels, class_names, columns, names)


def make_own_condition(
    asked: Asked,
    columns: Mapping[str, np.ndarray],
    names: Sequence[str],
    class_names: Sequence[str],
    text_encoder: str | None = None,
) -> Condition | None:
    """Returns the condition of a folder whose training images have these columns, labels among them; None of classes
    alone. `names` are those of the numbers.

    Raises UserError for columns that no condition can take, such as a number that is the same everywhere.
    """
    if set(asked.kinds) <= {"class"}:
        return None
    try:
        return make_condition(columns, names, class_names, text_encoder)
    except UserError as error:
        raise UserError(f"{asked.flag}: {error}") from None


def _find_numbers(table: Table) -> tuple[str, ...]:
    """Returns the columns of numbers, where none are named. Raises UserError if there are none."""
    found = table.number_columns()
    if not found:
        raise UserError(f"{table.source} has no column of numbers")
    return found


def _name_rows_without_image(tree: Tree, table: Table, rows: set[int]) -> None:
    """Warns of rows whose image is not there; images of other splits, and broken ones, are."""
    unused = [name for name, row in table.numbers.items() if row not in rows]
    lost = [name for name in unused if not tree.is_file(posixpath.join(table.folder, name))]
    if lost:
        listed = printable(", ".join(lost[:MAX_LISTED])) + ", ..." * (len(lost) > MAX_LISTED)
        warn_once(f"{table.source}: {len(lost):,} row{'s' * (len(lost) > 1)} without an image ({listed})")


def digest_rows(labels: Sequence[int] | np.ndarray, columns: Mapping[str, np.ndarray]) -> list[int]:
    """Returns a number for each row that changes with its label and with its values."""
    digests = []
    for i, label in enumerate(labels):
        digest = hashlib.sha256(str(label).encode())
        for key, values in sorted(columns.items()):
            value: Any = values[i]
            digest.update(key.encode() + (value.encode() if isinstance(value, str) else value.tobytes()))
        digests.append(int.from_bytes(digest.digest()[:7], "big"))
    return digests
