"""Pickles read without running what they hold, and in memory of the order of their size.

Two stages. A pass over the opcodes refuses those that plain data do not need, and bounds what unpickling would make
room for: the index under which a value is put aside, marks within marks, the number of values. Then Python's unpickler
builds the value; it may look up a name only if a stand-in is listed for it, and stand-ins call nothing else.
"""

import io
import math
import mmap
import pickle
import pickletools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from utils.base.external import BadFileError, read_bounded

MAX_BYTES = 64 * 2**20  # half as much again as EDM2's largest; parsing takes up to seven times as much
MAX_DEPTH = 100  # of containers within containers
FLOATS = ("f4", "f8")  # dtypes of the arrays of statistics, as NumPy's pickles spell them
# All that plain data need. Those that call something, such as REDUCE, reach only what `find_class` allows.
OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET",
    "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT",
    "BINFLOAT", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
}  # fmt: skip


class StandIn:
    """A value that a pickle may pass on, but not change: the opcode BUILD calls `__setstate__`."""

    def __init__(self, value: Any = None):
        self.value = value

    def __setstate__(self, state: Any) -> None:
        raise BadFileError("it changes a value that is complete")


class Function(StandIn):
    """A function that a pickle may call, in place of the one that it names."""

    def __call__(self, *args: Any) -> Any:
        return self.value(*args)


class Namespace:
    """Stands for argparse's Namespace, which is nothing but attributes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state  # not copied, as many could share a large one


class SafeUnpickler(pickle.Unpickler):
    """Unpickles data that are made of `containers`, plain values, and arrays, which are StandIns until all is built.

    `file` is a file in memory, or a mapped one: reads of either stop at its end, whatever length a pickle claims.
    `allowed`: (module, name) -> the StandIn or class for which a name stands.
    """

    # For arrays; a reader of other data may override these.
    containers: ClassVar[tuple[type, ...]] = (dict, list)
    key_types: ClassVar[tuple[type, ...]] = (str,)
    max_opcodes = 100_000  # the bytes of an array are an operand of one
    max_values = 10_000  # counted as often as they are referred to

    def __init__(self, file: io.BytesIO | mmap.mmap, allowed: Mapping[tuple[str, str], Any]):
        super().__init__(file)
        self.file = file
        self.allowed = allowed
        self.num_values = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise BadFileError(f"it asks for {module}.{name}"[:100] + ", which no array needs; it was not run")
        return self.allowed[module, name]

    def read(self) -> Any:
        """Returns the value. Raises BadFileError if it is refused, and any other exception if it is no whole pickle."""
        # The pass over the opcodes comes first: Python's unpickler has no bounds of its own.
        _check_opcodes(self.file, self.max_opcodes)
        self.file.seek(0)
        return self._finish(self.load(), MAX_DEPTH)

    def _finish(self, value: Any, depth: int) -> Any:
        """Copies a value, with arrays in place of their StandIns. Values that are referred to twice are counted twice:
        otherwise a few bytes would stand for any number."""
        self.num_values += 1
        if self.num_values > self.max_values or not depth:
            raise BadFileError(f"it holds more than {self.max_values:,} values, or {MAX_DEPTH} levels")
        match value:
            # Plain values.
            case None | bool() | int() | float() | str() | bytes():
                return value
            # Arrays, which have been opaque until now.
            case StandIn(value=np.ndarray() as array):
                return array
            # Containers, of exactly the types that the reader allows.
            case dict() if dict in self.containers:
                for key in value:
                    if not isinstance(key, self.key_types):
                        raise BadFileError(f"it holds a dictionary with a key that is {type(key).__name__}")
                return {key: self._finish(item, depth - 1) for key, item in value.items()}
            case list() | tuple() if type(value) in self.containers:
                return type(value)(self._finish(item, depth - 1) for item in value)
            case Namespace() if Namespace in self.containers:
                finished = Namespace()
                finished.__setstate__(self._finish(value.__dict__, depth - 1))
                return finished
        raise BadFileError(f"it holds {type(value).__name__.strip('_')}, which is no array")


def _check_opcodes(file: io.BytesIO | mmap.mmap, max_opcodes: int) -> None:
    """Raises BadFileError for a pickle whose reading could run something, or take memory without end."""
    num_marks = 0
    opcodes = pickletools.genops(file)  # ty: ignore[invalid-argument-type]
    for count, (opcode, argument, _) in enumerate(opcodes, 1):
        if opcode.name not in OPCODES:
            raise BadFileError(f"it holds the opcode {opcode.name}, which arrays do not need")
        # Writers count up as they put values aside; unpickling makes room for all indices below the largest.
        is_put = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if count > max_opcodes or (is_put and isinstance(argument, int) and argument > count):
            raise BadFileError("it holds more than a description of arrays does")
        # A mark opens a container whose items follow; MARK within MARK is a level.
        num_marks += opcode.name == "MARK"
        num_marks -= pickletools.markobject in opcode.stack_before
        if num_marks > MAX_DEPTH:
            raise BadFileError(f"it holds more than {MAX_DEPTH} levels")


# --- NumPy's arrays, in the forms in which NumPy writes them ---


class _DType(StandIn):
    """Stands for numpy.dtype('f8', ...), and takes its state (version, byte order, ...). `known`: codes to accept."""

    def __init__(self, code: str, known: Collection[str]):
        super().__init__()
        self.code = code
        self.known = known
        self.order = "<"

    def __setstate__(self, state: tuple) -> None:
        if state[3:5] != (None, None) or state[2] is not None:
            raise BadFileError("it holds a structured dtype")
        self.order = state[1]

    def resolve(self) -> np.dtype:
        if self.code not in self.known or self.order not in ("<", ">", "="):
            known = " or ".join(np.dtype(code).name for code in self.known)
            raise BadFileError(f"it holds an array of dtype {self.order}{self.code}, not of {known}")
        return np.dtype(f"{self.order}{self.code}")


class _Array(StandIn):
    """Stands for a numpy.ndarray, before and after it takes its state (version, shape, dtype, is_fortran, bytes)."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        self.value = _make_array(content, dtype, shape, "F" if is_fortran else "C")


def _make_array(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not (isinstance(content, (bytes, bytearray)) and isinstance(dtype, _DType) and isinstance(shape, tuple)):
        raise BadFileError("it holds an array whose state is not one")
    # The bytes have to be those of the shape: an array is a view of them.
    resolved = dtype.resolve()
    if len(shape) > 8 or any(type(size) is not int or not 0 <= size < 2**48 for size in shape):
        raise BadFileError("it holds an array whose shape is none")
    if math.prod(shape) * resolved.itemsize != len(content):
        raise BadFileError(f"it holds an array of shape {str(shape)[:100]} in {len(content)} bytes")
    return np.frombuffer(content, resolved).reshape(shape, order="F" if order == "F" else "C")


def _make_encoder(max_bytes: int) -> Callable[[str, str], bytes]:
    """Returns a `_codecs.encode` of at most `max_bytes` in all; pickles before protocol 3 hold bytes as texts."""
    num_encoded = 0

    def encode(text: str, encoding: str) -> bytes:
        nonlocal num_encoded
        # One text in the file may be encoded many times over.
        num_encoded += len(text)
        if encoding != "latin1" or num_encoded > max_bytes:
            raise BadFileError("it encodes more than the text of its arrays")
        return text.encode("latin1")

    return encode


def numpy_stand_ins(max_bytes: int, dtypes: Collection[str] = FLOATS) -> dict[tuple[str, str], Any]:
    """Returns {(module, name): stand-in} of every name that pickled arrays may ask for, of a pickle of `max_bytes`.

    `dtypes` are the codes of those that the arrays may have.
    """
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): StandIn("ndarray"),
        ("numpy", "dtype"): Function(lambda code, *ignored: _DType(code, dtypes)),
        ("_codecs", "encode"): Function(_make_encoder(max_bytes)),
    }
    for package in ("numpy.core", "numpy._core"):  # the same functions, in NumPy 1 and 2
        allowed[f"{package}.multiarray", "_reconstruct"] = Function(lambda kind, shape, code: _Array())
        allowed[f"{package}.numeric", "_frombuffer"] = Function(
            lambda content, dtype, shape, order: _Array(_make_array(content, dtype, shape, order))
        )
    return allowed


# --- JAX's arrays, which bring the NumPy array that they are made of ---


def _rebuild_jax_array(make: Any, arguments: Any, state: Any, ignored: Any) -> _Array:
    """Stands for the function of `jax.Array.__reduce__`: `make(*arguments)` is a NumPy array, which takes `state`."""
    array = make(*arguments) if isinstance(make, Function) and isinstance(arguments, tuple) else None
    if not isinstance(array, _Array) or array.value is not None:
        raise BadFileError("it holds a JAX array that is not made of a NumPy array")
    array.__setstate__(state)
    return array


def jax_stand_ins() -> dict[tuple[str, str], Any]:
    """Returns {(module, name): stand-in} of what pickled JAX arrays ask for beside `numpy_stand_ins`."""
    return {
        ("jax._src.array", "_reconstruct_array"): Function(_rebuild_jax_array),
        ("jax._src.device_array", "reconstruct_device_array"): Function(_rebuild_jax_array),  # before JAX 0.4
    }


# --- Whole files ---


def read_pickled_arrays(path: Path) -> Any:
    """Returns the content of a pickle of dictionaries, lists, texts, numbers and NumPy arrays of float32 or float64.

    Raises BadFileError for everything else, naming it.
    """
    content = read_bounded(path, MAX_BYTES)
    return read_safely(SafeUnpickler(io.BytesIO(content), numpy_stand_ins(len(content))))


def read_safely(unpickler: SafeUnpickler) -> Any:
    """Returns the value of a pickle. Raises BadFileError, whatever the bytes of a damaged one make Python raise."""
    try:
        return unpickler.read()
    except BadFileError:
        raise
    except Exception as error:  # opcodes that find the stack empty, or values of other types than they need
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BadFileError(f"it is no whole pickle ({reason})") from None
