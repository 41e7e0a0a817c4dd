"""Writes the files of `torch.save` without PyTorch: a pickle of tensors by reference, and their bytes beside it."""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


class Tensor:
    """An array that is pickled as a tensor, a whole contiguous storage of its own."""

    def __init__(self, array):
        self.array = np.ascontiguousarray(array)

    def __reduce__(self):
        strides = tuple(stride // self.array.itemsize for stride in self.array.strides)
        module = sys.modules["torch._utils"]
        arguments = (self, 0, self.array.shape, strides, False, collections.OrderedDict())
        return module._rebuild_tensor_v2, (Storage(arguments[0].array), *arguments[1:])


class Storage:
    def __init__(self, array):
        self.array = array


class Pickler(pickle.Pickler):
    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.arrays = []

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        self.arrays.append(value.array)
        kind = getattr(sys.modules["torch"], STORAGES[value.array.dtype.name])
        return "storage", kind, str(len(self.arrays) - 1), "cpu", value.array.size


def fake_torch():
    """The names that the pickle refers to."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    exec("def _rebuild_tensor_v2(): pass", utils.__dict__)
    utils._rebuild_tensor_v2.__module__ = "torch._utils"
    return {"torch": torch, "torch._utils": utils}


def to_tensors(value):
    if isinstance(value, dict):
        return type(value)((key, to_tensors(item)) for key, item in value.items())
    return Tensor(value) if isinstance(value, np.ndarray) else value


def save_torch(path, content, pickled: bytes | None = None) -> None:
    """Writes arrays in nested dictionaries as `torch.save` does; `pickled` stands in for the pickle of it."""
    modules = fake_torch()
    sys.modules.update(modules)
    try:
        file = io.BytesIO()
        pickler = Pickler(file)
        pickler.dump(to_tensors(content))
    finally:
        for name in modules:
            del sys.modules[name]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(f"{path.stem}/data.pkl", file.getvalue() if pickled is None else pickled)
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, array in enumerate(pickler.arrays):
            with archive.open(f"{path.stem}/data/{key}", "w", force_zip64=array.nbytes > 2**30) as member:
                member.write(array.view(np.uint8).data if array.size else b"")
