"""PyTorch's files without PyTorch, and without running what they hold.

`torch.save` writes an uncompressed zip: `STEM/data.pkl`, a pickle that describes the tensors, and `STEM/data/KEY`, the
bytes of each storage. The pickle may name nothing but what tensors are made of; arrays are views of the mapped file.
"""

import argparse
import collections
import mmap
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from utils.external import MAX_PICKLE_BYTES, BadFileError

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number with which files before 1.6 begin
STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "LongStorage": np.int64,
    "BFloat16Storage": ml_dtypes.bfloat16, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class Namespace:
    """What stands for argparse's: attributes alone."""


class _Storage:
    """A type of storage that a pickle names."""

    def __init__(self, dtype: Any):
        self.dtype = np.dtype(dtype)


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *ignored: Any) -> np.ndarray:
    """A view of a storage, never beyond it."""
    numbers = [offset, *shape, *strides]
    if len(shape) != len(strides) or any(type(number) is not int or number < 0 for number in numbers):
        raise BadFileError(f"it holds a tensor of shape {str(shape)[:50]} and strides {str(strides)[:50]}")
    is_empty = 0 in shape
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if not isinstance(storage, np.ndarray) or (not is_empty and last >= len(storage)):
        raise BadFileError("it holds a tensor that reaches beyond its storage")
    if is_empty:
        return np.zeros(shape, storage.dtype)
    byte_strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides, writeable=False)


def _rebuild_parameter(tensor: np.ndarray, *ignored: Any) -> np.ndarray:
    return tensor


ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    (argparse.__name__, "Namespace"): Namespace,
    **{("torch", name): _Storage(dtype) for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Names of ALLOWED stand for what is given there; every other one is refused before it is looked up."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str, content: mmap.mmap):
        super().__init__(file)
        self.archive, self.root, self.content = archive, root, content
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise BadFileError(f"it asks for {module}.{name}"[:100] + ", which no tensor needs; it was not run")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        match pid:
            case ("storage", _Storage() as storage, str(key), *_):
                if key not in self.storages:
                    self.storages[key] = self._map(f"{self.root}data/{key}", storage.dtype)
                return self.storages[key]
        raise BadFileError("it refers to something that is no storage")

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The bytes of a member, where they are in the file."""
        info = self.archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise BadFileError(f"{name} is compressed, which torch.save does not do")
        # The local header's name and extra field may be longer than those of the directory.
        lengths = struct.unpack("<HH", self.content[info.header_offset + 26 : info.header_offset + 30])
        start = info.header_offset + 30 + sum(lengths)
        if start + info.file_size > len(self.content) or info.file_size % dtype.itemsize:
            raise BadFileError(f"{name} is cut short")
        return np.frombuffer(self.content, dtype, info.file_size // dtype.itemsize, start)


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote: dictionaries, lists, numbers, texts, and tensors as read-only arrays that map the file.

    BadFileError for a file that is none, is cut, is of PyTorch before 1.6, or whose pickle names anything but tensors,
    OrderedDict and argparse.Namespace, which nothing is made of but attributes.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(LEGACY_START)) == LEGACY_START:
                raise BadFileError("PyTorch before 1.6 wrote it; read it there and save it again with torch.save")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(names) != 1:
                raise BadFileError("it holds no data.pkl, as torch.save writes it")
            root = names[0].removesuffix("data.pkl")
            byte_order = f"{root}byteorder"
            if byte_order in archive.namelist() and archive.read(byte_order) != b"little":
                raise BadFileError("it is of a big-endian machine")
            if archive.getinfo(names[0]).file_size > MAX_PICKLE_BYTES:
                raise BadFileError(f"its data.pkl has more than {MAX_PICKLE_BYTES:,} bytes")
            with archive.open(names[0]) as pickled:
                return _Unpickler(pickled, archive, root, content).load()
    except BadFileError:
        raise
    except zipfile.BadZipFile:
        raise BadFileError("it is cut short, or torch.save did not write it (it is no whole zip)") from None
    except OSError as error:
        raise BadFileError(error.strerror or str(error)) from None
    except Exception as error:  # pickle, struct and zipfile share no type for what wrong bytes make them raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise BadFileError(f"it is no whole file of torch.save ({reason})") from None
