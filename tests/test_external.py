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

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save as safetensors_bytes
from safetensors.numpy import save_file

from tests.conftest import ROOT
from utils.data import images
from utils.errors import UserError
from utils.external import (
    BadFileError,
    read_json,
    read_npz,
    read_npz_headers,
    read_pickled_arrays,
    read_rows,
    read_safetensors,
    read_safetensors_shapes,
)
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
        "opcode REDUCE|no whole|which is no array": b"cbuiltins\nexec\n(Vprint(1)\ntR.",
        "EXT1": b"\x82\x01.",
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


def write_bomb(path, shape, name="a") -> None:
    """A small npz whose array `name` has that shape, all zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
        for _ in range(int(np.prod(shape)) * 8 // 2**20 + 1):
            file.write(bytes(2**20))


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


def content_of(save, *args, **arrays) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **arrays)
    return buffer.getvalue()


READERS = (
    read_json,
    read_pickled_arrays,
    read_safetensors_shapes,
    lambda path: read_npz(path, read_npz_headers(path)),
    lambda path: list(read_rows(path, "a", 8)),
    lambda path: read_safetensors(path, {"a": (3, 3)}),
    load_statistics,
    lambda path: images.read_image(path.read_bytes(), "x", 8),
)
WHOLE_FILES = (
    content_of(np.savez, a=np.arange(50.0), b=np.eye(3)),
    content_of(np.savez_compressed, mu=np.zeros(4), sigma=np.eye(4)),
    safetensors_bytes({"a": np.eye(3)}),
    *(pickle.dumps(SETS, protocol) for protocol in (0, 2, 5)),
    json.dumps({"a": [1, {"b": 2}]}).encode(),
    *(content_of(Image.new("RGB", (5, 4)).save, kind) for kind in ("png", "jpeg", "webp")),
)
EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6)


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(
    st.binary(max_size=400) | st.tuples(st.sampled_from(WHOLE_FILES), EDITS, st.none() | st.integers(0, 2**16)),
)
def test_readers_raise_nothing_but_their_own_error(tmp_path_factory, content):
    """Of random bytes, and of whole files with bytes changed and, perhaps, their end cut off."""
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
import resource, sys
from pathlib import Path
from etils import epath
from utils.codecs import vae
from utils.data import images, tfds_files
from utils.metrics import inception, reference, samples
from utils.errors import UserError

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

folder, before = Path(sys.argv[1]), memory()
read = {
    "statistics": reference.load_statistics,
    "samples": samples.open_samples,
    "vae": vae.StableVAE.load,
    "logits": inception.load_logits,
    "image": lambda path: images.read_image(path.read_bytes(), path.name, 64),
    "features": lambda path: tfds_files.check_features("--dataset_name=x", epath.Path(path)),
}
for path in sorted(folder.iterdir()):
    try:
        read[path.name.partition("_")[0]](path)
    except (UserError, images.BrokenImageError) as error:
        print(f"{path.name}: {memory() - before} MB: {error}")
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


def png_bomb(side: int) -> bytes:
    """A PNG of side x side pixels with hardly any content."""
    content = bytearray(content_of(Image.new("L", (1, 1)).save, "png"))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def test_hostile_files_take_little_memory(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name, content in {
        "statistics_shape.pkl": forged_shape(2_000_000_000),
        "statistics_nested.pkl": nested_lists(60),
        "statistics_dtype.pkl": forged_dtype(),
        "image_bomb.png": png_bomb(60_000),
        "logits_header.safetensors": struct.pack("<Q", 2**40) + b"{}",
    }.items():
        (folder / name).write_bytes(content)
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
    command = [sys.executable, "-c", HOSTILE, folder]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == sorted(os.listdir(folder)), done.stdout
    for line in lines:
        assert int(line.split(": ")[1].removesuffix(" MB")) < 500, line


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
