"""Values from outside become values inside: files of others, read without running code, typed, and of bounded size
before anything is allocated for them.

Everything here raises BadFileError with a reason in one line; callers add the flag and the fix.
"""

import json
import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

MAX_JSON_BYTES = 16 * 2**20  # of a manifest or a configuration
MAX_PICKLE_BYTES = 128 * 2**20  # three times EDM2's largest
MAX_PICKLED_VALUES = 10_000
MAX_TEXT_BYTES = 2**16  # of a text within an npz


class BadFileError(ValueError):
    """A file that is not what it should be; the message says in what way."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. BadFileError for anything else, NaN and infinity included."""
    content = read_bounded(path, MAX_JSON_BYTES)

    def refuse(constant: str):
        raise BadFileError(f"it holds {constant}")

    try:
        value = json.loads(content, parse_constant=refuse)
    except BadFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"it is no JSON ({_first_line(error)})") from None
    if not isinstance(value, dict):
        raise BadFileError("it is no JSON object")
    return value


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of no more than `max_bytes`."""
    try:
        if not path.is_file():
            raise BadFileError("it is no regular file" if path.exists() else "there is no such file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise BadFileError(error.strerror or str(error)) from None
    if len(content) > max_bytes:
        raise BadFileError(f"it has more than {max_bytes:,} bytes")
    return content


def read_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The tensors `shapes` ({name: shape}) of a safetensors file as float32, all finite. BadFileError, before a tensor
    is read, where one is missing or of another shape."""
    from safetensors import safe_open

    try:
        with safe_open(path, "flax") as file:  # NumPy has no bfloat16
            names = set(file.keys())
            for name, shape in shapes.items():
                if name not in names:
                    raise BadFileError(f"it has no tensor {name}")
                found = tuple(file.get_slice(name).get_shape())
                if found != shape:
                    raise BadFileError(f"its tensor {name} has the shape {found}, not {shape}")
            tensors = {name: np.asarray(file.get_tensor(name), np.float32) for name in shapes}
    except BadFileError:
        raise
    except Exception as error:  # the library's error is no subclass of a common one
        raise BadFileError(f"it is no whole safetensors file ({_first_line(error)})") from None
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise BadFileError(f"its tensor {name} holds NaN or infinity")
    return tensors


def read_safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{name of a tensor: shape} of a safetensors file, none of which is read."""
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:
        raise BadFileError(f"it is no whole safetensors file ({_first_line(error)})") from None


class ArrayHeader(NamedTuple):
    """What an npz says of one of its arrays."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_npz_headers(path: Path) -> dict[str, ArrayHeader]:
    """{name of an array: header} of an npz, without reading any array. BadFileError where it is no whole npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {}
            for info in archive.infolist():
                with archive.open(info) as file:
                    header = _read_header(file)
                    if file.tell() + header.num_bytes > info.file_size:
                        raise BadFileError(f"array {info.filename} is cut short")
                headers[info.filename.removesuffix(".npy")] = header
            return headers
    except BadFileError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy share no type for what random bytes make them raise
        raise BadFileError(f"it is no whole npz ({_first_line(error)})") from None


def read_npz(path: Path, names: Mapping[str, ArrayHeader]) -> dict[str, np.ndarray]:
    """The arrays `names`, whose headers the caller has found acceptable. Numbers, truth values or short texts alone."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.namelist()
            for name, header in names.items():
                if header.dtype.kind not in "fiubU" or (header.dtype.kind == "U" and header.num_bytes > MAX_TEXT_BYTES):
                    raise BadFileError(f"array {name} holds {header.dtype}, no numbers")
                with archive.open(f"{name}.npy" if f"{name}.npy" in files else name) as file:
                    _read_header(file)
                    content = file.read(header.num_bytes)
                order = "F" if header.is_fortran else "C"
                arrays[name] = np.frombuffer(content, header.dtype).reshape(header.shape, order=order)
    except BadFileError:
        raise
    except Exception as error:
        raise BadFileError(f"it is no whole npz ({_first_line(error)})") from None
    return arrays


def read_rows(path: Path, name: str, num_rows: int) -> Iterator[np.ndarray]:
    """The array `name` of an npz in C order, `num_rows` rows at a time; its header has been found acceptable."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.namelist()
            with archive.open(f"{name}.npy" if f"{name}.npy" in files else name) as file:
                (total, *shape), _, dtype = _read_header(file)
                for start in range(0, total, num_rows):
                    count = min(num_rows, total - start)
                    content = file.read(count * math.prod(shape) * dtype.itemsize)
                    yield np.frombuffer(content, dtype).reshape(count, *shape)
    except BadFileError:
        raise
    except Exception as error:
        raise BadFileError(f"array {name} cannot be read ({_first_line(error)})") from None


def _read_header(file) -> ArrayHeader:
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise BadFileError(f"npy format {version}")
    header = ArrayHeader(*readers[version](file))
    if any(size < 0 for size in header.shape):
        raise BadFileError(f"an array of shape {header.shape}")
    return header


def read_pickled_arrays(path: Path) -> Any:
    """What is in a pickle of dictionaries, lists, texts, numbers and NumPy arrays of float32 or float64.

    No object is built and no function called: the opcodes are read, and arrays recognised in the three forms in which
    NumPy writes them. BadFileError for everything else, naming it.
    """
    content = read_bounded(path, MAX_PICKLE_BYTES)
    try:
        return _PickleReader().read(content)
    except BadFileError:
        raise
    except Exception as error:  # of opcodes that find the stack empty, or of other types than they need
        raise BadFileError(f"it is no whole pickle ({_first_line(error)})") from None


class _Global(NamedTuple):
    """A function or class that a pickle names."""

    module: str
    name: str


_MARK = object()
_ARRAY_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_BUFFER_MODULES = ("numpy.core.numeric", "numpy._core.numeric")
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {
    "BININT", "BININT1", "BININT2", "INT", "LONG1", "BINFLOAT", "FLOAT", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip


class _PickleReader:
    """A machine of the opcodes that such pickles are made of."""

    def __init__(self):
        self.stack, self.memo = [], {}

    def read(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                (value,) = self.stack
                return _finish(value, [MAX_PICKLED_VALUES])
            self._do(opcode.name, argument)
        raise BadFileError("it is cut short")

    def _do(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case _ if name in _VALUES:
                stack.append(argument)
            case _ if name in _LITERALS:
                stack.append(_LITERALS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = self._pop_mark()
                stack.append(dict(zip(map(_key, items[::2]), items[1::2], strict=True)))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(self._pop_mark())
            case "MARK":
                stack.append(_MARK)
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "TUPLE":
                stack.append(tuple(self._pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = self._pop_mark()
                stack[-1].extend(items)
            case "SETITEM":
                key, value = stack.pop(-2), stack.pop()
                stack[-1][_key(key)] = value
            case "SETITEMS":
                items = self._pop_mark()
                stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_Global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [_Global(*stack[-2:])]
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].build(state)
            case _:
                raise BadFileError(f"it holds the opcode {name}, which arrays do not need")

    def _pop_mark(self) -> list:
        place = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items


class _DType:
    """numpy.dtype('f8', ...), and its state (version, byte order, ...)."""

    def __init__(self, code: str):
        self.code, self.order = code, "<"

    def build(self, state: tuple) -> None:
        if state[3:5] != (None, None) or state[2] is not None:
            raise BadFileError("it holds a structured dtype")
        self.order = state[1]

    def resolve(self) -> np.dtype:
        if self.code not in ("f4", "f8") or self.order not in ("<", ">", "="):
            raise BadFileError(f"it holds an array of dtype {self.order}{self.code}, not of float32 or float64")
        return np.dtype(f"{self.order}{self.code}")


class _Array:
    """numpy.ndarray before and after its state (version, shape, dtype, is_fortran, bytes)."""

    def __init__(self):
        self.value = None

    def build(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        self.value = _make_array(content, dtype, shape, "F" if is_fortran else "C")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise BadFileError(f"it holds a dictionary with the key {str(key)[:50]!r}")
    return key


def _call(function: Any, arguments: tuple) -> Any:
    match function, arguments:
        case _Global(module, "_reconstruct"), (_Global("numpy", "ndarray"), _, _) if module in _ARRAY_MODULES:
            return _Array()
        case _Global("numpy", "dtype"), (str(code), *_):
            return _DType(code)
        case _Global("_codecs", "encode"), (str(text), "latin1"):
            return text.encode("latin1")
        case _Global(module, "_frombuffer"), (content, _DType() as dtype, shape, order) if module in _BUFFER_MODULES:
            array = _Array()
            array.value = _make_array(content, dtype, shape, order)
            return array
    name = f"{function.module}.{function.name}" if isinstance(function, _Global) else type(function).__name__
    raise BadFileError(f"it holds {name[:100]}, which is no array")


def _make_array(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not (isinstance(content, (bytes, bytearray)) and isinstance(dtype, _DType) and isinstance(shape, tuple)):
        raise BadFileError("it holds an array whose state is not one")
    resolved = dtype.resolve()
    if any(type(size) is not int or size < 0 for size in shape):
        raise BadFileError(f"it holds an array of shape {str(shape)[:100]}")
    if math.prod(shape) * resolved.itemsize != len(content):
        raise BadFileError(f"it holds an array of shape {str(shape)[:100]} in {len(content)} bytes")
    return np.frombuffer(bytes(content), resolved).reshape(shape, order="F" if order == "F" else "C")


def _finish(value: Any, room: list[int]) -> Any:
    """The value with its arrays; BadFileError for what is left of anything else, and for more than `room` values: those
    that are referred to twice are counted twice."""
    room[0] -= 1
    if room[0] < 0:
        raise BadFileError(f"it holds more than {MAX_PICKLED_VALUES:,} values")
    match value:
        case dict():
            return {key: _finish(item, room) for key, item in value.items()}
        case _Array(value=np.ndarray() as array):
            return array
        case list():
            return [_finish(item, room) for item in value]
        case None | bool() | int() | float() | str() | bytes():
            return value
    raise BadFileError(f"it holds {type(value).__name__.strip('_')}, which is no array")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
