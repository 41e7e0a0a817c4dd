"""Other people's files, read as plain data, without running code; sizes are bounded before anything is allocated.

Everything here raises BadFileError with a reason in one line; callers add the flag and the fix.
"""

import contextlib
import io
import json
import math
import mmap
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from utils.base.files import LimitedReads, open_regular

MAX_JSON_BYTES = 16 * 2**20  # a manifest or a configuration
MAX_JSON_VALUES = 2**20  # in it; each takes up to 250 bytes once it is parsed
MAX_DIRECTORY_BYTES = 4 * 2**20  # the list of a zip's members
MAX_HEADER_BYTES = 2**14  # of a .npy; NumPy's own limit, which it applies after reading, is 10,000
MAX_TEXT_BYTES = 2**16  # a text within an npz
CHUNK_BYTES = 2**20  # of an array, read at a time
# Names of the format for the types that NumPy, or ml_dtypes for bfloat16 and float8, can hold.
SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


class BadFileError(ValueError):
    """A file that is not what it should be; the message says how."""


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[io.BufferedReader]:
    """Opens a regular file, and turns whatever the block raises into BadFileError, which says `what` it is not."""
    try:
        with open_regular(path) as file:
            yield file
    except BadFileError:
        raise
    except FileNotFoundError:
        raise BadFileError("there is no such file") from None
    except OSError as error:
        raise BadFileError(error.strerror or str(error)) from None
    except Exception as error:  # zipfile, zlib, json and NumPy share no type for what random bytes make them raise
        raise BadFileError(f"it is no whole {what} ({_first_line(error)})") from None


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file of at most `max_bytes`."""
    with _reading(path, "file") as file:
        is_larger = os.fstat(file.fileno()).st_size > max_bytes
        content = b"" if is_larger else file.read(max_bytes + 1)  # a file of /proc has the size 0
        if is_larger or len(content) > max_bytes:
            raise BadFileError(f"it has more than {max_bytes:,} bytes")
        return content


def read_start(path: Path, num_bytes: int) -> bytes:
    """Returns the first bytes of a regular file, which tell its kind."""
    with _reading(path, "file") as file:
        return file.read(num_bytes)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises BadFileError for anything else, NaN and infinity included."""
    return parse_json(read_bounded(path, MAX_JSON_BYTES))


def parse_json(content: str | bytes, *, is_finite: bool = True) -> dict[str, Any]:
    """Returns the object in a JSON text, as `read_json`; unless `is_finite`, NaN and infinity are read too."""

    def refuse(constant: str) -> float:
        if is_finite:
            raise BadFileError(f"it holds {constant}")
        return float(constant)

    # Sizes first: parsing would take the memory. Commas and brackets bound the number of values.
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if len(raw) > MAX_JSON_BYTES or sum(map(raw.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise BadFileError(f"it is JSON of more than {MAX_JSON_VALUES:,} values")
    # Deep nesting ends in RecursionError. Constants that JSON lacks come to `refuse`.
    try:
        value = json.loads(raw, parse_constant=refuse)
    except BadFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"it is no JSON ({_first_line(error)})") from None
    if not isinstance(value, dict):
        raise BadFileError("it is no JSON object")
    return value


# --- safetensors ---


class Safetensors(NamedTuple):
    """The content of a safetensors file: tensors, which are mapped from the file, and metadata."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]


def open_safetensors(path: Path) -> Safetensors:
    """Maps a safetensors file (an 8-byte length, a header in JSON, the tensors' bytes); arrays are read-only.

    Raises BadFileError if it is cut short, or if tensors share bytes: a small file could then stand for any size.
    """
    with _reading(path, "safetensors file") as file:
        size = os.fstat(file.fileno()).st_size
        # The header, whose length stands before it.
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError("it is cut short")
        if length > MAX_JSON_BYTES:
            raise BadFileError(f"its header has more than {MAX_JSON_BYTES:,} bytes")
        header = parse_json(file.read(length))
        metadata = header.pop("__metadata__", None)

        # Entries are checked against the file's size before any array is made.
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[8 + length :]
        spans = {name: _read_span(name, entry, len(content)) for name, entry in header.items()}

        # In the order of the file, no tensor begins before the last one ends.
        end = 0
        for name, (start, stop, _, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
            if start < end:
                raise BadFileError(f"its tensor {name[:100]} shares bytes with another")
            end = stop

        # Views of the mapped file: pages are read as they are used. An empty tensor has no bytes to view.
        tensors = {
            name: np.frombuffer(content[start:stop], dtype).reshape(shape) if stop > start else np.zeros(shape, dtype)
            for name, (start, stop, dtype, shape) in spans.items()
        }
        return Safetensors(tensors, metadata if isinstance(metadata, dict) else {})


def _read_span(name: str, entry: Any, num_bytes: int) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    """Returns (start, stop, dtype, shape) of a tensor from its entry in the header; ValueError for a bad one."""
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [start, stop]} if kind in SAFETENSORS_DTYPES:
            dtype = np.dtype(SAFETENSORS_DTYPES[kind])
            # `type(...) is int`, as isinstance takes True for a number.
            are_counts = all(type(number) is int and 0 <= number < 2**48 for number in (*shape, start, stop))
            if are_counts and start <= stop <= num_bytes and stop - start == math.prod(shape) * dtype.itemsize:
                return start, stop, dtype, tuple(shape)
    raise ValueError(f"its header says {str(entry)[:100]} of {name[:100]}")


def read_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns the tensors `shapes` ({name: shape}) of a safetensors file as float32.

    Raises BadFileError if one is missing or has another shape, before any is read, or if a value is not finite.
    """
    # Names and shapes first: nothing is read for a refusal.
    found = open_safetensors(path).tensors
    for name, shape in shapes.items():
        if name not in found:
            raise BadFileError(f"it has no tensor {name}")
        if found[name].shape != shape:
            raise BadFileError(f"its tensor {name} has the shape {found[name].shape}, not {shape}")
    tensors = {name: np.array(found[name], np.float32) for name in shapes}

    # NaN would spread through a whole network without an error.
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise BadFileError(f"its tensor {name} holds NaN or infinity")
    return tensors


def read_safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns {name of a tensor: shape} of a safetensors file, without reading any tensor."""
    return {name: tensor.shape for name, tensor in open_safetensors(path).tensors.items()}


# --- NumPy's files ---


class ArrayHeader(NamedTuple):
    """The header of a .npy, or of an array in an npz."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def open_zip(file: io.BufferedIOBase) -> Iterator[zipfile.ZipFile]:
    """Opens a zip as NumPy and PyTorch write them.

    Raises BadFileError for too many members, or for compression that neither uses, in which a few bytes stand for any
    size.
    """
    # zipfile reads the list of members into memory as it opens the file; the bound is for that alone.
    limited = LimitedReads(file, MAX_DIRECTORY_BYTES)
    with zipfile.ZipFile(limited) as archive:  # ty: ignore[no-matching-overload]
        limited.left = math.inf
        for info in archive.infolist():
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadFileError(f"{info.filename[:100]} is compressed in an unusual way")
        yield archive


def read_npz_headers(path: Path) -> dict[str, ArrayHeader]:
    """Returns {name of an array: header} of an npz, without reading any array. Raises BadFileError."""
    with _reading(path, "npz") as content, open_zip(content) as archive:
        headers = {}
        for info in archive.infolist():
            with archive.open(info) as file:
                header = _read_header(file)
                # The size of pickled objects is not the header's.
                if not header.dtype.hasobject and file.tell() + header.num_bytes > info.file_size:
                    raise BadFileError(f"array {info.filename} is cut short")
            headers[info.filename.removesuffix(".npy")] = header
        return headers


def read_npz(
    path: Path, names: Mapping[str, ArrayHeader], kinds: str = "fiubU", max_text_bytes: int = MAX_TEXT_BYTES
) -> dict[str, np.ndarray]:
    """Returns the arrays `names`, {name: header}, whose headers the caller has found acceptable.

    `kinds` are the kinds of dtypes (numpy.dtype.kind) that may be read: numbers, truth values, short texts. Raises
    BadFileError for others, and if an array is cut short.
    """
    arrays = {}
    with _reading(path, "npz") as content, open_zip(content) as archive:
        for name, header in names.items():
            # Pickled objects have the kind O, which no caller asks for.
            is_text = header.dtype.kind in "US"
            if header.dtype.kind not in kinds or (is_text and header.num_bytes > max_text_bytes):
                raise BadFileError(f"array {name} holds {header.dtype}, no numbers")
            with _open_array(archive, name) as file:
                _read_header(file)
                array = _read_exactly(file, header.num_bytes).view(header.dtype)
            arrays[name] = array.reshape(header.shape, order="F" if header.is_fortran else "C")
    return arrays


def read_rows(path: Path, name: str, num_rows: int) -> Iterator[np.ndarray]:
    """Yields the array `name` of an npz in C order, `num_rows` rows at a time. The caller has checked its header."""
    with _reading(path, f"array {name}") as content, open_zip(content) as archive, _open_array(archive, name) as file:
        (total, *shape), _, dtype = _read_header(file)
        for start in range(0, total, num_rows):
            count = min(num_rows, total - start)
            rows = _read_exactly(file, count * math.prod(shape) * dtype.itemsize)
            yield rows.view(dtype).reshape(count, *shape)


def map_npy(path: Path) -> tuple[ArrayHeader, np.ndarray]:
    """Returns (header, array) of a .npy; the array is mapped from the file. Raises BadFileError for objects."""
    with _reading(path, ".npy") as file:
        header = _read_header(file)
        if header.dtype.hasobject:
            raise BadFileError("it holds objects, no numbers")
        # The file has to hold what its header promises; mapping would fail only where it is used.
        start = file.tell()
        if start + header.num_bytes > os.fstat(file.fileno()).st_size:
            raise BadFileError("it is cut short")
        # Of an empty array there is nothing to map.
        if not header.num_bytes:
            return header, np.zeros(header.shape, header.dtype)
        order = "F" if header.is_fortran else "C"
        array = np.memmap(file, header.dtype, "r", start, header.shape, order)
        array.filename = str(path.absolute())  # of a file that is open, NumPy may not know the name
        return header, array


def _open_array(archive: zipfile.ZipFile, name: str) -> Any:
    # NumPy adds .npy to the names; other writers may not.
    return archive.open(f"{name}.npy" if f"{name}.npy" in archive.NameToInfo else name)


def _read_exactly(file: Any, num_bytes: int) -> np.ndarray:
    """Returns the next `num_bytes` as uint8, read-only. Raises ValueError if there are fewer."""
    # Pages get memory as they are written: what a header promises in vain is never filled.
    content = np.empty(num_bytes, np.uint8)
    place = 0
    while place < num_bytes:
        chunk = file.read(min(CHUNK_BYTES, num_bytes - place))
        if not chunk:
            raise ValueError("it is cut short")
        content[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
        place += len(chunk)
    content.flags.writeable = False
    return content


def _read_header(file: Any) -> ArrayHeader:
    # NumPy evaluates the header as a literal, after reading all of it: hence the bound.
    readers = {(1, 0): (2, npy.read_array_header_1_0), (2, 0): (4, npy.read_array_header_2_0)}
    version = npy.read_magic(file)
    if version not in readers:
        raise BadFileError(f"npy format {version}")
    width, read = readers[version]
    prefix = file.read(width)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise BadFileError(f"a header of {length:,} bytes")
    header = ArrayHeader(*read(io.BytesIO(prefix + file.read(length))))
    # A reshape would take -1 for "as many as there are".
    if any(size < 0 for size in header.shape):
        raise BadFileError(f"an array of shape {header.shape}")
    return header


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
