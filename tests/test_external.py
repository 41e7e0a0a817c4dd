"""Files of others: read as what they should be, and refused, in one line and little memory, where they are not."""

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save as safetensors_bytes
from safetensors.numpy import save_file

from tests.conftest import ROOT
from tests.torch_writer import save_torch
from utils.base.external import (
    BadFileError,
    open_safetensors,
    read_json,
    read_npz,
    read_npz_headers,
    read_rows,
    read_safetensors,
    read_safetensors_shapes,
)
from utils.base.messages import UserError
from utils.base.pickles import read_pickled_arrays
from utils.convert.jax_flow_files import read_jax_flow
from utils.images import decoding as images
from utils.metrics.reference import load_statistics

SETS = {
    "fid": {"mu": np.arange(5.0), "sigma": np.eye(5, dtype=np.float32)},
    "fd": {"mu": np.arange(3, dtype=">f4"), "sigma": np.asfortranarray(np.arange(9.0).reshape(3, 3))},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_arrays_of_every_protocol_are_read(tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({**SETS, "n": 3, "name": "x"}, protocol))
    found = read_pickled_arrays(tmp_path / "a.pkl")
    assert (found["n"], found["name"]) == (3, "x")
    for name, arrays in SETS.items():
        for key, array in arrays.items():
            np.testing.assert_array_equal(found[name][key], array)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def forged_dtype() -> bytes:
    """An array of one float64 whose dtype's state is not that of a float64, which NumPy's own unpickling believed."""
    content = pickle.dumps(np.arange(1.0), 2)
    return content.replace(b"K\x03U\x01<NNN", b"K\x03U\x01|NN}").replace(
        b"K\x03X\x01\x00\x00\x00<", b"K\x03X\x01\x00\x00\x00|"
    )


def test_pickles_that_are_no_arrays_are_refused_by_name(tmp_path):
    ran = tmp_path / "ran"
    wide = ["x"] * 900
    for _ in range(12):
        wide = [wide, wide]  # 2^12 x 900 values in a kilobyte
    cases = {
        "os|posix": pickle.dumps({"fid": Runs(ran)}),
        "numpy.*scalar": pickle.dumps(np.float64(3)),
        "no array|array whose state": pickle.dumps(np.array([None])),
        "dtype <i8": pickle.dumps(np.zeros(3, np.int64)),
        "more than 10,000 values": pickle.dumps(wide),
        "tuple": pickle.dumps((1, 2)),
        "key": pickle.dumps({3: 4}),
        "whole pickle": pickle.dumps(SETS)[:99],
        "opcode|whole": b"x" * 50,
        "in 8 bytes": pickle.dumps(np.arange(1.0), 2).replace(b"K\x01\x85", b"J\x00\x00\x00\x7f\x85"),
        "asks for builtins.exec, which no array needs": b"cbuiltins\nexec\n(Vprint(1)\ntR.",
        "EXT1": b"\x82\x01.",
        "changes a value that is complete": b"cnumpy\ndtype\nN}X\x0c\0\0\0__defaults__)s\x86b.",
        "description of arrays": b"\x80\x02}r" + struct.pack("<I", 2**28) + b".",
        "100 levels": b"\x80\x02" + b"(" * 101 + b".",
        "PERSID": b"Px\n.",
        "OBJ|INST": b"(ios\nsystem\n.",
    }
    for message, content in cases.items():
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(BadFileError, match=message) as error:
            read_pickled_arrays(tmp_path / "a.pkl")
        assert "\n" not in str(error.value)
    (tmp_path / "a.pkl").write_bytes(forged_dtype())
    with pytest.raises(BadFileError, match="dtype"):
        read_pickled_arrays(tmp_path / "a.pkl")
    assert not ran.exists()


def deflate_bomb(start: bytes, fill: bytes, num_bytes: int, wbits: int = -15) -> tuple[bytes, int]:
    """(deflated, number of bytes) of `start` and then some MiB of one byte, which takes no time: a full flush leaves
    blocks that may be repeated (RFC 1951)."""
    compressor, count = zlib.compressobj(9, zlib.DEFLATED, wbits), -(-num_bytes // 2**20)
    head = compressor.compress(start) + compressor.flush(zlib.Z_FULL_FLUSH)
    block = compressor.compress(fill * 2**20) + compressor.flush(zlib.Z_FULL_FLUSH)
    return head + block * count + compressor.flush(), len(start) + count * 2**20


def zip_bomb(name: str, start: bytes, fill: bytes, num_bytes: int) -> bytes:
    """A zip of one such member, by the format's specification (APPNOTE 4.3); its checksum is not right."""
    content, size = deflate_bomb(start, fill, num_bytes)
    common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0x21, 0, len(content), size, len(name), 0)
    local = b"PK\3\4" + common + name.encode() + content
    directory = b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name.encode()
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(directory), len(local), 0)
    return local + directory + end


def npy_header(shape, dtype: str) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()


def write_bomb(path, shape, name="a") -> None:
    """A small npz whose array `name` has that shape, all zeros."""
    path.write_bytes(zip_bomb(f"{name}.npy", npy_header(shape, "<f8"), b"\0", int(np.prod(shape)) * 8))


def test_headers_are_read_before_arrays(tmp_path):
    write_bomb(tmp_path / "bomb.npz", (40_000_000,))  # 320 MB of zeros
    assert (tmp_path / "bomb.npz").stat().st_size < 2**20
    header = read_npz_headers(tmp_path / "bomb.npz")["a"]
    assert (header.shape, header.num_bytes) == ((40_000_000,), 320_000_000)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_an_npz(tmp_path, save):
    arrays = {"a": np.arange(24).reshape(2, 3, 4), "f": np.asfortranarray(np.eye(3)), "t": np.array("text")}
    save(tmp_path / "a.npz", **arrays)
    found = read_npz(tmp_path / "a.npz", read_npz_headers(tmp_path / "a.npz"))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    rows = list(read_rows(tmp_path / "a.npz", "a", 1))
    np.testing.assert_array_equal(np.concatenate(rows), arrays["a"])


def test_an_npz_that_is_none_is_refused(tmp_path):
    np.savez(tmp_path / "good.npz", a=np.arange(1000))
    content = (tmp_path / "good.npz").read_bytes()
    np.savez(tmp_path / "objects.npz", a=np.array([{}, None], dtype=object))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("a.txt", "no array")
    header = content.replace(b"(1000,)", b"(9000,)")
    for name, changed in {
        "cut": content[:500],
        "empty": b"",
        "text": b"mu",
        "header": header,
        "zeros": bytes(99),
    }.items():
        (tmp_path / f"{name}.npz").write_bytes(changed)
    for name in ("cut", "empty", "text", "header", "zeros", "other"):
        with pytest.raises(BadFileError) as error:
            read_npz(tmp_path / f"{name}.npz", read_npz_headers(tmp_path / f"{name}.npz"))
        assert "\n" not in str(error.value)
    with pytest.raises(BadFileError, match="holds object, no numbers"):
        read_npz(tmp_path / "objects.npz", read_npz_headers(tmp_path / "objects.npz"))


def test_a_zip_of_members_without_end_is_refused(tmp_path):
    name = b"a.npy"
    entry = b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0x21, 0, 0, 0, len(name), *[0] * 6) + name
    directory = entry * 90_000
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, len(directory), 0, 0)
    (tmp_path / "a.npz").write_bytes(directory + end)
    with pytest.raises(BadFileError, match="it asks for more bytes"):
        read_npz_headers(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", content_of(np.save, np.zeros(3)))
    with pytest.raises(BadFileError, match="compressed in an unusual way"):
        read_npz_headers(tmp_path / "b.npz")


def test_safetensors_that_share_bytes_or_lie_about_them_are_refused(tmp_path):
    def entry(shape, start, stop, dtype="F32"):
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}

    for tensors, message in (
        ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, "its tensor b shares bytes"),
        ({"a": entry([4], 0, 16), "b": entry([2], 12, 20)}, "its tensor b shares bytes"),
        ({"a": entry([2**40], 0, 16)}, "its header says"),
        ({"a": entry([4], 16, 32)}, "its header says"),
        ({"a": entry([-4], 0, 16)}, "its header says"),
        ({"a": entry([4], 0, 16, "X9")}, "its header says"),
        ({"a": entry([True] * 4 + [4], 0, 16)}, "its header says"),
        ({"a": [4]}, "its header says"),
    ):
        header = json.dumps(tensors).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(20))
        with pytest.raises(BadFileError, match=message):
            open_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "float8_e5m2", "int64", "uint16", "bool"])
def test_safetensors_are_read_as_the_library_writes_them(tmp_path, dtype):
    tensors = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.zeros((0, 5), dtype), "c": np.ones((), dtype)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"key": "text"})
    found = open_safetensors(tmp_path / "a.safetensors")
    assert found.metadata == {"key": "text"}
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found.tensors[name], tensor)


def content_of(save, *args, **arrays) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **arrays)
    return buffer.getvalue()


READERS = (
    read_json,
    read_pickled_arrays,
    read_jax_flow,
    read_safetensors_shapes,
    lambda path: read_npz(path, read_npz_headers(path)),
    lambda path: list(read_rows(path, "a", 8)),
    lambda path: read_safetensors(path, {"a": (3, 3)}),
    load_statistics,
    lambda path: images.read_image(path.read_bytes(), "x", (8, 8)),
)
WHOLE_FILES = (
    content_of(np.savez, a=np.arange(50.0), b=np.eye(3)),
    content_of(np.savez_compressed, mu=np.zeros(4), sigma=np.eye(4)),
    safetensors_bytes({"a": np.eye(3)}),
    *(pickle.dumps(SETS, protocol) for protocol in (0, 2, 5)),
    *(
        pickle.dumps({name: freeze({"a": jnp.eye(3)}) for name in ("model", "model_eps")}, protocol)
        for protocol in (2, 4)
    ),
    json.dumps({"a": [1, {"b": 2}]}).encode(),
    *(content_of(Image.new("RGB", (5, 4)).save, kind) for kind in ("png", "jpeg", "webp")),
)
EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6)


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(
    st.binary(max_size=400) | st.tuples(st.sampled_from(WHOLE_FILES), EDITS, st.none() | st.integers(0, 2**16)),
)
def test_readers_raise_nothing_but_their_own_error(tmp_path_factory, content):
    """Random bytes, and good files with bytes changed and, perhaps, their end cut off."""
    if not isinstance(content, bytes):
        whole, edits, end = content
        content = bytearray(whole)
        for place, byte in edits:
            content[place % len(content)] = byte
        content = content[: end and end % len(content)]
    path = tmp_path_factory.getbasetemp() / "content"
    path.write_bytes(content)
    for read in READERS:
        with contextlib.suppress(BadFileError, UserError):
            read(path)


HOSTILE = """
import sys
from pathlib import Path
from etils import epath
from utils.codecs import kl
from utils.convert import sources
from utils.data import arrays, tfds_files
from utils.images import decoding as images
from utils.data.dataset import DataOptions
from utils.sampling.editing import read_images, read_mask
from utils.base.external import BadFileError, read_json
from utils.metrics import inception, reference
from utils.images import samples
from utils.base.messages import UserError

def memory(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) // 1024

def read_samples(path):
    for _ in samples.open_samples(path).read(1):
        pass

folder, before = Path(sys.argv[1]), memory("VmRSS")
read = {
    "statistics": reference.load_statistics,
    "samples": samples.open_samples,
    "vae": kl.KLCodec.load,
    "logits": inception.load_logits,
    "image": lambda path: images.read_image(images.read_image_file(path), path.name, (64, 64)),
    "checked": lambda path: images.check_image(images.read_image_file(path)),
    "mask": lambda path: read_mask(path, (8, 8, 3), "mask"),
    "invert": lambda path: read_images(path, (8, 8, 3), 4),
    "batches": read_samples,
    "checkpoint": lambda path: sources.read_source(str(path)),
    "json": read_json,
    "dataset": lambda path: arrays.load_array_file(f"npz:{path}", "train", DataOptions()),
    "weights": inception.load_inception,
    "features": lambda path: tfds_files.check_features("--dataset_name=x", epath.Path(path)),
}
for path in sorted(folder.iterdir()):
    refusal = "read"
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew (proc(5))
    try:
        read[path.name.partition("_")[0]](path)
    except (BadFileError, UserError, images.BrokenImageError) as error:
        refusal = error
    print(f"{path.name}: {memory('VmHWM') - before} MB: {refusal}")
"""


def forged_shape(number: int) -> bytes:
    """Statistics whose first array says that it has `number` values."""
    content = pickle.dumps({"fid": {"mu": np.arange(1.0), "sigma": np.eye(1)}}, 2)
    return content.replace(b"K\x01\x85", b"J" + struct.pack("<i", number) + b"\x85", 1)


def nested_lists(depth: int) -> bytes:
    """2^depth lists in some five bytes each level."""
    return (
        b"\x80\x02]q\x00"
        + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(depth))
        + b"."
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side: int, depth: int = 8, colour: int = 0, rows: int = 0, extra: bytes = b"") -> bytes:
    """A PNG (RFC 2083) that says that it has side x side pixels, of which so many rows are there, all zero."""
    num_bytes = rows * (1 + side * depth * {0: 1, 2: 3}[colour] // 8)
    pixels, size = deflate_bomb(b"", b"\0", num_bytes, wbits=15)
    pixels = pixels[:-4] + struct.pack(">HH", size % 65521, 1)  # Adler-32 of zeros
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tags_bomb(count: int) -> bytes:
    """A TIFF of so many tags, each of which is all of its bytes."""
    size = 8 + 2 + 12 * count + 4
    tags = [(256, 4, 1, 8), (257, 4, 1, 8), *((1000 + i, 7, size - 8, 8) for i in range(count - 2))]
    return b"II*\0" + struct.pack("<IH", 8, count) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)


def write_torch_bombs(folder) -> None:
    numbers = folder.parent / "a.pt"
    save_torch(numbers, {"a": np.arange(4, dtype=np.float32)})
    with zipfile.ZipFile(numbers) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = members["a/data.pkl"]
    wide = pickled.replace(b"K\x04\x85", b"\x8a\x05" + struct.pack("<q", 2**38)[:5] + b"\x85")
    assert wide != pickled
    for name, changed in {
        "memo": b"\x80\x02}r" + struct.pack("<I", 2**28) + b".",
        "length": b"\x80\x04\x8e" + struct.pack("<Q", 2**32) + b".",
        "opcodes": b"\x80\x02(" + b"}" * 8_000_000 + b".",
        "stride": wide.replace(b"K\x01\x85", b"K\x00\x85"),
    }.items():
        with zipfile.ZipFile(folder / f"checkpoint_{name}.pt", "w") as archive:
            for member, content in (members | {"a/data.pkl": changed}).items():
                archive.writestr(member, content)
    # A zip may have other bytes before it: the last list of members counts.
    order = zip_bomb("a/byteorder", b"little", b"\0", 600_000_000)
    (folder / "checkpoint_byteorder.pt").write_bytes(order)
    with zipfile.ZipFile(folder / "checkpoint_byteorder.pt", "a") as archive:
        archive.writestr("a/data.pkl", pickled)


def safetensors_header(num_tensors: int) -> bytes:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"{i}": entry for i in range(num_tensors)}).encode()
    return struct.pack("<Q", len(header)) + header


def test_hostile_files_take_little_memory(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name, content in {
        "statistics_shape.pkl": forged_shape(2_000_000_000),
        "statistics_nested.pkl": nested_lists(60),
        "statistics_dtype.pkl": forged_dtype(),
        "image_bomb.png": png_bomb(60_000),
        "image_bits.png": png_bomb(16_000, 1, rows=16_000),
        "image_tags.tif": tags_bomb(50_000),
        "image_exif.png": png_bomb(8, rows=8, extra=chunk(b"eXIf", tags_bomb(50_000))),
        "checked_bits.png": png_bomb(16_000, 1, rows=16_000),
        "mask_bits.png": png_bomb(22_000, 1, rows=22_000),
        "json_lists.json": b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
        "checkpoint_names.safetensors": safetensors_header(200_000),
        "statistics_memo.pkl": b"\x80\x02}r" + struct.pack("<I", 2**28) + b".",
        "statistics_stack.pkl": b"\x80\x02" + b"]" * 5_000_000 + b".",
        "logits_header.safetensors": struct.pack("<Q", 2**40) + b"{}",
    }.items():
        (folder / name).write_bytes(content)
    write_torch_bombs(folder)
    header = b"\x93NUMPY\2\0" + struct.pack("<I", 2**30)
    (folder / "statistics_header.npz").write_bytes(zip_bomb("mu.npy", header, b" ", 2**30))
    (folder / "dataset_labels.npz").write_bytes(zip_bomb("labels.npy", npy_header((90_000_000,), "<f8"), b"\0", 2**30))
    with zipfile.ZipFile(folder / "dataset_labels.npz", "a") as archive:
        archive.writestr("images.npy", content_of(np.save, np.zeros((4, 8, 8, 3), np.uint8)))
    for name, start in (
        ("samples_header.npy", header),
        ("image_sparse.png", png_bomb(8, rows=8)),
        ("weights_large.pt", b"PK"),
    ):
        (folder / name).write_bytes(start)
        os.truncate(folder / name, 2**31)  # of zeros that take no place on the disk
    (folder / "batches_large").mkdir()
    for number in range(2):
        whole = png_bomb(8192, 8, 2, rows=8192)
        (folder / "batches_large" / f"{number}.png").write_bytes(whole if number == 0 else whole[:-20_000])
    write_bomb(folder / "statistics_bomb.npz", (90_000_000,), "mu")
    write_bomb(folder / "statistics_features.npz", (45_000, 2048), "features")
    write_bomb(folder / "samples_bomb.npz", (90_000_000,), "arr_0")
    write_bomb(folder / "logits_bomb.npz", (90_000, 1008), "fc.weight")
    config = {"block_out_channels": [2048] * 15, "down_block_types": ["DownEncoderBlock2D"] * 15}
    for name, written in {
        "vae_stages": config,
        "vae_channels": {"block_out_channels": [10**7, 10**7]},
        "features_module": {"pythonClassName": "os.path.Feature"},
    }.items():
        (folder / name).mkdir()
        (folder / name / ("features.json" if "features" in name else "config.json")).write_text(json.dumps(written))
        (folder / name / "diffusion_pytorch_model.safetensors").touch()
    command = [sys.executable, "-c", HOSTILE, folder]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == sorted(os.listdir(folder)), done.stdout
    for line in lines:
        assert int(line.split(": ")[1].removesuffix(" MB")) < 500, line
        assert line.endswith("MB: read") == line.startswith(("image_bits", "image_exif", "checked_bits")), line


def test_json_is_an_object_of_finite_numbers(tmp_path):
    path = tmp_path / "a.json"
    for content, message in {
        b"[1]": "no JSON object",
        b'{"a": NaN}': "holds NaN",
        b'{"a": -Infinity}': "holds -Infinity",
        b'{"a"': "no JSON",
        b"\xff\xfe": "no JSON",
        b"[" * 100_000: "no JSON",
    }.items():
        path.write_bytes(content)
        with pytest.raises(BadFileError, match=message):
            read_json(path)
    path.unlink()
    with pytest.raises(BadFileError, match="no such file"):
        read_json(path)
    os.mkfifo(path)
    with pytest.raises(BadFileError, match="no regular file"):
        read_json(path)


def test_safetensors_are_told_by_their_shapes_before_they_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.eye(3, dtype=np.float32), "n": np.array([np.nan])}, path)
    assert read_safetensors_shapes(path) == {"a": (3, 3), "n": (1,)}
    np.testing.assert_array_equal(read_safetensors(path, {"a": (3, 3)})["a"], np.eye(3))
    for shapes, message in (
        ({"b": (1,)}, "no tensor b"),
        ({"a": (9,)}, "not \\(9,\\)"),
        ({"n": (1,)}, "NaN or infinity"),
    ):
        with pytest.raises(BadFileError, match=message):
            read_safetensors(path, shapes)
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(BadFileError, match="no whole safetensors"):
        read_safetensors_shapes(path)
