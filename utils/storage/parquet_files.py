"""parquet:GLOB: images in a column of parquet files, as Hugging Face's `datasets` writes them.

An image is a struct {bytes, path} or the bytes alone. A row is read with its row group, of which some are kept: files
whose row groups are small are read at random as fast as a folder.
"""

import collections
import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from utils.base.external import BadFileError
from utils.base.messages import printable, progress_bar, warn_once
from utils.storage.archive import MAX_MEMBER_BYTES, explaining
from utils.storage.parts import PartsFile, find_files, split_of
from utils.storage.tree import ListedTree

NAMES = ("image", "img", "jpg", "png", "picture", "bytes")  # of the column of images, where the file does not say
LABELS = ("label", "labels", "fine_label", "class")
CACHE_BYTES = 2**28  # of row groups that are kept
LARGE_GROUP = 2**26  # bytes of a row group of which there is a warning
MAX_ROWS = 2**31
MAX_EXPANSION = 64  # of encoded images, which do not compress, over the file's size


def open_parquet(source: str) -> "ParquetTree":
    """Opens parquet files, as parquet:FILE or parquet:GLOB. Raises UserError where there is none, or no column of
    images in them."""
    with explaining(source):
        return ParquetTree(source, find_files(source))


class ParquetTree(ListedTree):
    """The images in parquet files: one folder, or one for each split that the files' names tell.

    They bear the names that they have in the files where these are in order, else the numbers of their rows.
    """

    has_columns = True

    def __init__(self, source: str, files: Sequence[PartsFile], splits: Sequence[str | None] | None = None):
        """`splits` are those of the files; where one is None, its name tells."""
        # What the tree is called, and the files, all of one schema.
        self.source = source
        self.root = source.partition(":")[2]
        self.title = Path(self.root).name.partition(".")[0]
        self.key = "parquet:" + "\0".join(file.key for file in files)
        opened = progress_bar(files, "opening the parquet files", len(files), unit="file", delay=5)
        self.files = [_File(file) for file in opened]
        self.is_remote = any(file.is_remote for file in files)
        self._kept: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        first = self.files[0]
        for file in self.files:
            if not file.schema.equals(first.schema):
                raise BadFileError(
                    f"{file.file.name} has other columns than {first.file.name}; name files of one data set"
                )
        self.default_columns = None if first.label is None else f"class:{first.label}"

        # A path for each row, by splits.
        given = splits or [None] * len(files)
        splits = [split_of(file.name) if part is None else part for file, part in zip(files, given, strict=True)]
        rows: list[tuple[str, int, int]] = []
        for split in dict.fromkeys(splits):
            own = [(number, file) for number, file in enumerate(self.files) if splits[number] == split]
            listed = progress_bar(own, "reading names of images", len(own), unit="file", delay=5)
            names = [name for _, file in listed for name in file.read_names()]
            places = [(number, row) for number, file in own for row in range(file.num_rows)]
            known = [name for name in names if name is not None]
            if len(set(known)) < len(names) or known != sorted(known):
                width = len(str(len(names)))
                known = [f"{row:0{width}}.png" for row in range(len(names))]
            start = f"{split}/" if split else ""
            rows += [(start + name, *place) for name, place in zip(known, places, strict=True)]
        rows.sort()
        self.paths = [path for path, _, _ in rows]
        self.places = np.array([place for _, *place in rows], np.int64).reshape(-1, 2)

    def read(self, path: str, limit: int | None = None) -> bytes:
        # The row's place in its row group, all of whose images are read at once.
        number, row = self.places[self.find_file(path)].tolist()
        group, index = self.files[number].place_of(row)
        value = self._read_group(number, group)[index]
        if not value.is_valid or value.as_buffer().size == 0:
            raise OSError("the row has no image")
        if value.as_buffer().size > MAX_MEMBER_BYTES:
            raise OSError(f"it has {value.as_buffer().size:,} bytes")
        return value.as_buffer().to_pybytes()[:limit]

    def stamp(self, path: str) -> str | None:
        found = self.find(path)
        if found is None:
            return None
        number, row = self.places[found].tolist()
        return f"{self.files[number].file.stamp} {row}"

    def show(self, path: str) -> str:
        found = self.find(path)
        if found is None:
            return super().show(path)
        number, row = self.places[found].tolist()
        return f"row {row} of {self.files[number].file.name}"

    def read_columns(self, paths: Sequence[str]) -> tuple[dict[str, list[Any]], dict[str, tuple[str, ...]]]:
        # Other columns of bytes or structs are no conditions, and may be as large as the images.
        schema = self.files[0].schema
        names = [field.name for field in schema if not (_is_bytes(field.type) or pa.types.is_struct(field.type))]
        # Whole columns are read: the rows that are asked for lie all over them.
        places = [self.places[self.find_file(path)] for path in paths]
        columns: dict[str, list[Any]] = {}
        for name in names:
            whole = [file.read_column(name) for file in self.files]
            columns[name] = [whole[number][row] for number, row in places]
        return columns, self.files[0].class_names

    def _read_group(self, number: int, group: int) -> Any:
        """Returns the encoded images of a row group, kept for the next ones who ask."""
        with self._lock:  # one thread reads it for all
            if (number, group) not in self._kept:
                self._kept[number, group] = self.files[number].read_images(group)
                while len(self._kept) > 1 and sum(array.nbytes for array in self._kept.values()) > CACHE_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((number, group))
            return self._kept[number, group]


class _File:
    """One parquet file. Raises BadFileError for what is none, or has no images."""

    def __init__(self, file: PartsFile):
        self.file = file
        path = file.name
        try:
            with self._open() as opened:
                metadata, self.schema = opened.metadata, opened.schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:
            raise BadFileError(f"{path} is no whole parquet file ({printable(str(error))[:100]})") from None
        self.num_rows = metadata.num_rows
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        check_size(path, self.num_rows, sum(group.total_byte_size for group in groups), file.size)
        self.starts = np.cumsum([0, *(group.num_rows for group in groups)])
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > LARGE_GROUP and len(groups) > 1:
            warn_once(
                f"{path}: a row group has {largest / 2**20:,.0f} MiB, all of which is read for one image; "
                "row_group_size=100 when it is written is faster"
            )

        # Which columns are images and labels: the file says so where `datasets` has written it.
        features = _read_features(self.schema)
        self.image = _find_image(path, self.schema, features)
        self.class_names = {
            name: tuple(map(str, feature["names"]))
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
        }
        self.label = next(iter([*self.class_names, *filter(self._is_label, LABELS)]), None)

    def _is_label(self, name: str) -> bool:
        """Returns whether there is a column of this name, of whole numbers or texts."""
        if name not in self.schema.names:
            return False
        kind = self.schema.field(name).type
        return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)

    @contextlib.contextmanager
    def _open(self) -> Iterator[parquet.ParquetFile]:
        with self.file.open() as opened, parquet.ParquetFile(opened) as file:
            yield file

    def place_of(self, row: int) -> tuple[int, int]:
        """Returns (row group, row in it)."""
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        return group, int(row - self.starts[group])

    def read_images(self, group: int) -> Any:
        """Returns the encoded images of a row group, an array of bytes."""
        # Of a struct, the field of bytes alone.
        is_struct = pa.types.is_struct(self.schema.field(self.image).type)
        with self._open() as file:
            try:
                table = file.read_row_group(group, [f"{self.image}.bytes" if is_struct else self.image])
            except (pa.ArrowException, OSError) as error:
                raise OSError(f"row group {group} cannot be read: {printable(str(error))[:100]}") from None
        column = table.column(0).combine_chunks()
        return column.field("bytes") if is_struct else column

    def read_names(self) -> list[str | None]:
        """Returns the names that the images have in the file; None for those without."""
        kind = self.schema.field(self.image).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return [None] * self.num_rows
        with self._open() as file:
            paths = file.read([f"{self.image}.path"]).column(0).combine_chunks().field("path").to_pylist()
        return [None if path is None else path.replace("\\", "/").lstrip("/") or None for path in paths]

    def read_column(self, name: str) -> list[Any]:
        with self._open() as file:
            return file.read([name]).column(0).to_pylist()


def check_size(path: str, num_rows: int, num_bytes: int, file_bytes: int) -> None:
    """Raises BadFileError where a file says that it holds far more than images of its size can."""
    if num_rows > MAX_ROWS or num_bytes > MAX_EXPANSION * file_bytes + 2**26:
        raise BadFileError(f"{path} says that it holds {num_rows:,} rows of {num_bytes:,} bytes")
    if not num_rows:
        raise BadFileError(f"{path} has no rows")


def _read_features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Returns {column: what `datasets` says of it}; {} where it says nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _find_image(path: str, schema: pa.Schema, features: dict[str, dict[str, Any]]) -> str:
    """Returns the name of the column of images. Raises BadFileError if there is none, or it is not clear which."""

    def has_bytes(name: str) -> bool:
        kind = schema.field(name).type
        if pa.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and _is_bytes(kind.field(index).type)
        return _is_bytes(kind)

    # What the file itself says, or else the only column of bytes, or the one of a usual name.
    said = [name for name, feature in features.items() if feature.get("_type") == "Image" and name in schema.names]
    found = [name for name in said or schema.names if has_bytes(name)]
    named = [name for name in found if name in NAMES]
    if len(found) != 1 and len(named) != 1:
        columns = printable(", ".join(schema.names[:20]))
        what = "several columns of images" if found else "no column of images"
        raise BadFileError(f"{path} has {what} (its columns are {columns}); one of them is to be called image")
    return (found if len(found) == 1 else named)[0]


def _is_bytes(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
