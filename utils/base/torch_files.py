"""Reads PyTorch's files without PyTorch, and without running the code that a pickle may hold.

`torch.save` writes an uncompressed zip: `STEM/data.pkl`, a pickle that describes the tensors, and `STEM/data/KEY`, the
bytes of each storage. The pickle may name nothing but what tensors are made of; arrays are views of the mapped file.
"""

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from utils.base.external import BadFileError, open_safetensors, open_zip, read_start
from utils.base.files import open_regular
from utils.base.pickles import MAX_BYTES, Function, Namespace, SafeUnpickler, StandIn, numpy_stand_ins

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # magic number of files from before PyTorch 1.6
# The pickle describes tensors, some fifty opcodes each, and holds none of their numbers.
MAX_PICKLE_BYTES = 16 * 2**20
MAX_SHARING = 4  # bytes of all tensors over those of the file: weights may be tied
# Types of storage, by their names in the module torch.
STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "LongStorage": np.int64,
    "BFloat16Storage": ml_dtypes.bfloat16, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class _OrderedDict(dict):
    """A stand-in for collections': empty at first, and without attributes such as a state_dict's `_metadata`."""

    def __init__(self):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


class _StorageType(StandIn):
    """A type of storage that a pickle names; its value is a dtype."""


def _rebuild_tensor(stored: StandIn, offset: int, shape: tuple, strides: tuple, *ignored: Any) -> StandIn:
    """Returns a view of a storage, neither beyond its end nor larger: with strides of 0, a few bytes could stand for a
    tensor of any size. Raises BadFileError for such a tensor."""
    # Numbers first, as the file may be anyone's: 2^48 bounds what is computed with them.
    storage = stored.value
    numbers = [offset, *shape, *strides]
    if len(shape) != len(strides) or any(type(number) is not int or not 0 <= number < 2**48 for number in numbers):
        raise BadFileError("it holds a tensor whose shape and strides are none")

    # The last element has to be in the storage; an empty tensor has none.
    is_empty = 0 in shape
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if not isinstance(storage, np.ndarray) or (not is_empty and last >= len(storage)):
        raise BadFileError("it holds a tensor that reaches beyond its storage")
    if is_empty:
        return StandIn(np.zeros(shape, storage.dtype))
    if math.prod(shape) > len(storage):
        raise BadFileError(
            f"it holds a tensor of shape {shape} in {len(storage):,} numbers; save it again after .contiguous()"
        )

    # NumPy counts strides in bytes, PyTorch in elements.
    byte_strides = [stride * storage.itemsize for stride in strides]
    return StandIn(np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides, writeable=False))


def _rebuild_parameter(tensor: StandIn, *ignored: Any) -> StandIn:
    return tensor  # without its gradient's settings


# All that a pickle may name: (module, name) -> what stands for it here.
ALLOWED = {
    ("collections", "OrderedDict"): _OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Function(_rebuild_parameter),
    ("argparse", "Namespace"): Namespace,
    # A class as a key of Lightning's "callbacks": a text instead, which can be neither called nor changed.
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): "ModelCheckpoint",
    **{("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in STORAGES.items()},
}


class _Unpickler(SafeUnpickler):
    """Reads the description of tensors; their storages are mapped from the archive's file."""

    # Bounds of what a pickle can build; a state_dict has some fifty opcodes for each tensor.
    containers = (dict, list, tuple, Namespace)
    key_types = (str, int)
    max_opcodes = 10**6
    max_values = 10**6

    def __init__(
        self, pickled: bytes, archive: zipfile.ZipFile, root: str, content: mmap.mmap, others: Mapping[Any, Any]
    ):
        super().__init__(io.BytesIO(pickled), {**ALLOWED, **others})
        self.archive = archive
        self.root = root
        self.mapped = content
        self.storages: dict[str, StandIn] = {}

    def persistent_load(self, pid: Any) -> StandIn:
        # Storages are shared: tied weights refer to one by the same key.
        match pid:
            case ("storage", _StorageType(value=dtype), str(key), *_):
                if key not in self.storages:
                    self.storages[key] = StandIn(self._map(f"{self.root}data/{key}", dtype))
                return self.storages[key]
        raise BadFileError("it refers to something that is no storage")

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Returns a member of the archive as an array over the mapped file: nothing is copied."""
        # Only stored members are in the file as they are.
        info = self.archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise BadFileError(f"{name} is compressed, which torch.save does not do")
        # The local header's name and extra field may be longer than those of the directory.
        lengths = struct.unpack("<HH", self.mapped[info.header_offset + 26 : info.header_offset + 30])
        start = info.header_offset + 30 + sum(lengths)
        if start + info.file_size > len(self.mapped) or info.file_size % dtype.itemsize:
            raise BadFileError(f"{name} is cut short")
        return np.frombuffer(self.mapped, dtype, info.file_size // dtype.itemsize, start)


def _count_bytes(value: Any) -> int:
    """Counts the bytes of all tensors in a dictionary, and in those within it."""
    # A list instead of recursion, which a nested file could exhaust.
    total = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, np.ndarray):
            total += item.nbytes
        elif isinstance(item, dict):
            waiting.extend(item.values())
    return total


def read_torch_file(path: Path, *, with_arrays: bool = False) -> Any:
    """Returns what `torch.save` wrote: dictionaries, lists, numbers, texts, and tensors as read-only arrays that map
    the file. `with_arrays`: NumPy's arrays too, whose numbers are in the pickle itself.

    Raises BadFileError for a file of another kind, one that is cut short or from before PyTorch 1.6, and for a pickle
    that names anything but tensors, OrderedDict and argparse.Namespace (of which only attributes are kept).
    """
    try:
        with open_regular(path) as file:
            if file.read(len(LEGACY_START)) == LEGACY_START:
                raise BadFileError("PyTorch before 1.6 wrote it; read it there and save it again with torch.save")

            # The archive: one pickle, in a folder whose name is free.
            with open_zip(file) as archive:
                names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
                if len(names) != 1:
                    raise BadFileError("it holds no data.pkl, as torch.save writes it")
                root = names[0].removesuffix("data.pkl")
                byte_order = f"{root}byteorder"
                if byte_order in archive.NameToInfo and _read_member(archive, byte_order, 16) != b"little":
                    raise BadFileError("it is of a big-endian machine")

                # The tensors: views that keep the mapping alive after the file is closed.
                pickled = _read_member(archive, names[0], MAX_BYTES if with_arrays else MAX_PICKLE_BYTES)
                others = numpy_stand_ins(len(pickled)) if with_arrays else {}
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                value = _Unpickler(pickled, archive, root, content, others).read()
                if _count_bytes(value) > MAX_SHARING * len(content):
                    raise BadFileError("its tensors share their bytes with each other")
                return value
    except BadFileError:
        raise
    except zipfile.BadZipFile:
        raise BadFileError("it is cut short, or torch.save did not write it (it is no whole zip)") from None
    except OSError as error:
        raise BadFileError(error.strerror or str(error)) from None
    except Exception as error:  # pickle, struct and zipfile share no type for what wrong bytes make them raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise BadFileError(f"it is no whole file of torch.save ({reason})") from None


def _read_member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    # One byte more than allowed is read: sizes in a zip's directory may lie.
    with archive.open(name) as member:
        content = member.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise BadFileError(f"its {name[:100]} has more than {max_bytes:,} bytes")
    return content


def read_tensor_file(path: Path) -> dict[str, Any]:
    """Returns the content of a file of tensors by name, safetensors or `torch.save`, whose first bytes tell its kind.

    Raises BadFileError where it is neither, and where it holds no dictionary.
    """
    start = read_start(path, 9)
    if not start:
        raise BadFileError("it is empty")
    if start[8:9] == b"{":  # after the length of a header in JSON
        return dict(open_safetensors(path).tensors)
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise BadFileError(f"it holds {type(content).__name__.strip('_')}, not the tensors of a model by name")
    return dict(content)
