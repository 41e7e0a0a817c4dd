"""Codecs by name, and cached latents of one from outside. tests/test_extension_points.py trains with such a codec."""

import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import encode_latents
from tests.test_change_this import BLOCKS
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.codecs.codecs import CODECS, CodecKind, CodecSpec, load_codec, parse_codec
from utils.data.loaders import load_dataset
from utils.training import build_run, make_config


@pytest.fixture
def blocks():
    """The codec of docs/change_this.md, registered for one test; of digits its latents are (4, 4, 4)."""
    before = dict(CODECS)
    namespace = {}
    exec(compile(BLOCKS["codec"], "docs/change_this.md, codec", "exec"), namespace)
    yield namespace["Blocks"]
    CODECS.clear()
    CODECS.update(before)


def test_latents_are_cached_where_a_codec_has_moments(blocks, read_flags, tmp_path):
    class Moments(blocks):
        def encode_moments(self, images):
            mean = self.encode(None, images)
            return mean, jnp.full_like(mean, -30)

        def sample_latents(self, key, mean, logvar):
            return mean.astype(jnp.float32)

    words = shlex.split(f"--dataset_name digits --codec blocks --batch_size 64 --out {tmp_path}/latents")
    with pytest.raises(UserError, match="--codec=blocks has no moments to cache"):
        encode_latents.main(read_flags(encode_latents, words))
    CODECS["blocks"] = CodecKind(lambda source: Moments(), "with moments")
    encode_latents.main(read_flags(encode_latents, words))

    # They are what encoding gives, and training on them needs no --codec.
    cached = load_dataset(f"latents:{tmp_path}/latents").source[5]
    image = load_dataset("digits").source[5]["image"]
    expected = blocks().encode(None, image[None] / 127.5 - 1)[0]
    np.testing.assert_allclose(cached["moments"][0, 0], expected, atol=1e-3)
    settings = {"batch_size": 32, "max_steps": 1, "wandb.mode": "disabled", "model.num_classes": 10}
    settings |= {"model.hidden_size": 16, "model.depth": 1, "model.patch_size": 2, "save_dir": str(tmp_path / "run")}
    run = build_run(make_config({"dataset_name": f"latents:{tmp_path}/latents", **settings}))
    assert (run.model.latent_shape, run.record["dataset"]["codec"]["name"]) == ((4, 4, 4), "blocks")
    with pytest.raises(UserError, match="--codec=pixels, but the data set is of latents"):
        load_codec(CodecSpec("pixels"), make_mesh(), (8, 8, 1), expected_sha256="")


def test_a_source_is_what_follows_the_colon(monkeypatch):
    loaded = []
    monkeypatch.setitem(CODECS, "mine", CodecKind(loaded.append, "from a file", placeholder="PATH", default="there"))
    assert parse_codec("mine:a:b") == CodecSpec("mine", "a:b")
    for spec in (CodecSpec("mine", "here"), CodecSpec("mine")):
        with pytest.raises(UserError, match=f"the loader of --codec={spec} returned no Codec"):
            load_codec(spec, make_mesh(), (8, 8, 1))
    assert loaded == ["here", "there"]
    assert jax.tree.leaves(CODECS["pixels"].load(None)) == []
