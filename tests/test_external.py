"""Files of others: read as what they should be, and refused, in one line and little memory, where they are not."""

import contextlib
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

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


def write_bomb(path, shape, dtype="<f8") -> None:
    """A small npz whose array has that shape, all zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
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


def test_random_bytes_are_refused_by_every_reader(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x"
    np.savez(tmp_path / "good.npz", a=np.arange(50.0), b=np.eye(3))
    save_file({"a": np.eye(3)}, tmp_path / "good.safetensors")
    seeds = [(tmp_path / "good.npz").read_bytes(), (tmp_path / "good.safetensors").read_bytes()]
    seeds += [pickle.dumps(SETS, protocol) for protocol in (0, 2, 5)] + [json.dumps({"a": [1, {"b": 2}]}).encode()]
    readers = (
        read_json,
        read_pickled_arrays,
        read_safetensors_shapes,
        lambda path: read_npz(path, read_npz_headers(path)),
        lambda path: read_safetensors(path, {"a": (3, 3)}),
    )
    for _ in range(300):
        content = bytearray(seeds[rng.integers(len(seeds))])
        for _ in range(rng.integers(1, 6)):
            content[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(content[: rng.integers(len(content) + 1)] if rng.random() < 0.3 else content)
        for read in readers:
            with contextlib.suppress(BadFileError):  # nothing else may come of them
                read(path)


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
