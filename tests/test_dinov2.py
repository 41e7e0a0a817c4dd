"""DINOv2's features against the published code's, and against a network of NumPy in float64; its files, its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.conftest import GOLDEN
from tests.dinov2_network import (
    NUM_HEADS,
    WIDTH,
    make_tensors,
    numpy_bicubic,
    numpy_features,
    numpy_table,
    to_transformers,
)
from tests.torch_writer import save_torch
from utils.base.messages import UserError
from utils.metrics import dinov2
from utils.metrics.dinov2 import apply_block, apply_dinov2, embed_patches, position_table, read_dinov2, to_params


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Networks of 24 channels are read too."""
    monkeypatch.setitem(dinov2.HEADS, WIDTH, NUM_HEADS)


def difference(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


# --- Against the published code ---


@pytest.fixture(scope="module")
def published(shared):
    folder = shared / "golden" / "more" / "dinov2_tiny"
    with np.load(folder / "golden.npz") as file:
        return folder / "dinov2_tiny_pretrain.pth", dict(file)


@functools.cache
def load(path, preprocessing, dtype="float32"):
    return read_dinov2(path, preprocessing, dtype).load()


@pytest.mark.parametrize("preprocessing", ["edm2", "dgm_eval", "dgm_clean"])
def test_features_are_the_published_networks(published, preprocessing, optimised):
    path, golden = published
    extract = load(path, preprocessing)
    for size in ("s64", "s32", "s272", "s224"):
        name = f"{preprocessing}_{size}"
        pixels = dinov2.PREPROCESSING[preprocessing](jnp.asarray(golden[size]), 224)[:, ::13, ::17]
        if preprocessing == "dgm_eval":
            np.testing.assert_array_equal(pixels, golden[f"{name}_pixels"])
        else:
            expected = golden[f"{name}_pixels"]
            assert difference(pixels / 255 if expected.max() < 2 else pixels, expected) < 3e-6
        # One shape for the network, so that it compiles once.
        two = np.resize(golden[size], (2, *golden[size].shape[1:]))
        assert difference(extract(jnp.asarray(two))["cls"][: len(golden[size])], golden[name]) < 1e-5


def test_tokens_are_the_published_networks(published, optimised):
    path, golden = published

    @jax.jit
    def compute(params, pixels):
        normalised = (pixels / 255 - jnp.array(dinov2.MEAN)) / jnp.array(dinov2.DEVIATION)
        first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        x = embed_patches(params, normalised)
        return x, apply_block(x, first, NUM_HEADS), apply_dinov2(params, pixels, NUM_HEADS)

    embedded, after_block, last = compute(
        to_params(read_dinov2(path).tensors, "float32"), dinov2.PREPROCESSING["edm2"](golden["s64"][:1], 224)
    )
    assert difference(embedded[:, ::16], golden["tokens_in"]) < 1e-5
    assert difference(after_block[:, ::16], golden["tokens_block0"]) < 1e-5
    assert difference(last[:, 1::16], golden["all_patch_norm"]) < 1e-5


def test_positions_are_pytorchs():
    # Which rounds to float32 on the way.
    with np.load(GOLDEN / "dinov2_table.npz") as file:
        assert difference(position_table(file["pos_embed"], 16), file["pos_embed_16"]) < 3e-6
        assert difference(numpy_table(file["pos_embed"].astype(np.float64)), file["pos_embed_16"]) < 3e-6


# --- Against NumPy, and files ---


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """A checkerboard of hard edges and a photograph's worth of noise, uint8 (2, 30, 44, 3)."""
    board = np.indices((30, 44)).sum(axis=0)[..., None] // 3 % 2 * np.array([255, 255, 128])
    noise = np.random.default_rng(0).integers(0, 256, (30, 44, 3))
    return np.stack([board, noise]).astype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """The same network as each of the libraries saves it."""
    folder = tmp_path_factory.mktemp("dinov2")
    tensors = make_tensors()
    paths = {"official": folder / "official.pth"}
    save_torch(paths["official"], tensors)
    for name, content in {
        "timm": {name: tensor.astype(np.float16) for name, tensor in tensors.items() if name != "mask_token"},
        "transformers": to_transformers(tensors, is_old=True),
        "transformers5": {f"dinov2.{name}": x for name, x in to_transformers(tensors, is_old=False).items()},
    }.items():
        paths[name] = folder / f"{name}.safetensors"
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in content.items()}, paths[name])
    return paths


@pytest.mark.parametrize("preprocessing", ["edm2", "dgm_eval", "dgm_clean"])
def test_features_are_numpys(files, pictures, preprocessing):
    def by_channel(resize):
        return np.stack([np.stack([resize(image[..., i]) for i in range(3)], -1) for image in pictures])

    resized = {
        "edm2": lambda: numpy_bicubic(pictures.astype(np.float64)),
        "dgm_eval": lambda: by_channel(lambda grey: Image.fromarray(grey).resize((224, 224), Image.Resampling.BICUBIC)),
        # Pillow rounds bytes; floats of one channel it neither rounds nor clips.
        "dgm_clean": lambda: np.clip(numpy_bicubic(pictures.astype(np.float64)), 0, 255),
    }[preprocessing]()
    expected = numpy_features(make_tensors(), resized)
    assert difference(load(files["official"], preprocessing)(jnp.asarray(pictures))["cls"], expected) < 1e-5


def test_bfloat16_is_close(files, pictures):
    exact = load(files["official"], "edm2")(jnp.asarray(pictures))["cls"]
    rounded = load(files["official"], "edm2", "bfloat16")(jnp.asarray(pictures))["cls"]
    assert rounded.dtype == jnp.float32
    assert 1e-4 < difference(rounded, exact) < 3e-2


def test_every_librarys_file_is_the_same_network(files):
    networks = {name: read_dinov2(path) for name, path in files.items()}
    tensors = make_tensors()
    for name, network in networks.items():
        assert network.tensors.keys() == tensors.keys() - {"mask_token"}, name
        for key, tensor in network.tensors.items():
            np.testing.assert_array_equal(tensor, tensors[key])
        assert network.sha256 == networks["official"].sha256
    assert read_dinov2(files["official"], None, "bfloat16").sha256 == networks["official"].sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"--extractor_weights is not given: .*ViT-L/14 .*Apache 2.* https://dl.fbaipublicfiles.com/dinov2/"),
        ("missing", r"--extractor_weights=.*missing holds no weights of DINOv2 \(there is no such file\); ViT-L"),
        ({"x": np.zeros(2, np.float32)}, "its tensor x is none of DINOv2's"),
        (
            {"register_tokens": np.zeros((1, 4, 24), np.float32)},
            r"a network with registers \(register_tokens\); ViT-S,",
        ),
        ({"blocks.0.mlp.w12.weight": np.zeros((9, 24), np.float32)}, "a network with SwiGLU"),
        ({"pos_embed": np.zeros((1, 257, 24), np.float32)}, r"pos_embed has the shape \(1, 257, 24\), not \(1, 1370"),
        ({"pos_embed": np.zeros((1, 1370, 25), np.float32)}, "2 blocks and the width 25; DINOv2's are 384, 768, 1024"),
        ({"patch_embed.proj.weight": np.zeros((24, 3, 16, 16), np.float32)}, r"not \(24, 3, 14, 14\)"),
        ({"norm.bias": None}, "it has no tensor norm.bias"),
        ({"norm.bias": np.full(24, np.nan, np.float32)}, "its tensor norm.bias holds NaN or infinity"),
        ({"ema": {}}, "no plain dictionary of tensors"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    path = None if change is None else tmp_path / "missing"
    if isinstance(change, dict):
        tensors = {name: tensor for name, tensor in {**make_tensors(), **change}.items() if tensor is not None}
        path = tmp_path / "weights.pth"
        save_torch(path, tensors)
    with pytest.raises(UserError, match=message) as error:
        read_dinov2(path)
    assert "\n" not in str(error.value)


def test_images_of_another_kind_are_refused(files):
    extract = load(files["official"], "dgm_eval")
    for images in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 1), np.uint8)):
        with pytest.raises(ValueError, match="not uint8"):
            extract(jnp.asarray(images))
    with pytest.raises(UserError, match="--preprocessing=clean is unknown; use edm2 or dgm_eval or dgm_clean"):
        read_dinov2(files["official"], "clean")
