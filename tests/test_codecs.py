"""A codec registered from outside, in training, sampling, evaluation and resuming; cached latents of it."""

import json
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
from utils.images.pixels import images_to_uint8
from utils.runs.opening import load_generator
from utils.sampling.solvers import SamplerConfig
from utils.trackers.trackers import read_metrics
from utils.training import build_run, make_config, train

SETTINGS = {
    "dataset_name": "digits",
    "codec": "blocks",
    "batch_size": 32,
    "eval_interval": 0,
    "log_interval": 1,
    "wandb.mode": "disabled",
    "model.patch_size": 2,
    "model.hidden_size": 16,
    "model.depth": 1,
    "model.num_classes": 10,
}


@pytest.fixture
def blocks():
    """The codec of docs/change_this.md, registered for one test; of digits its latents are (4, 4, 4)."""
    before = dict(CODECS)
    namespace = {}
    exec(compile(BLOCKS["codec"], "docs/change_this.md, codec", "exec"), namespace)
    yield namespace["Blocks"]
    CODECS.clear()
    CODECS.update(before)


def fit(folder, max_steps: int, **settings) -> None:
    given = {**SETTINGS, "save_dir": str(folder), "max_steps": max_steps, **settings}
    train(build_run(make_config(given)))


def test_a_codec_of_ones_own_is_trained_resumed_and_sampled(blocks, tmp_path):
    fit(tmp_path / "run", 2)
    fit(tmp_path / "run", 4)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["dataset"]["codec"] == {"name": "blocks", "source": None, "sha256": None}
    assert (saved["codec"], saved["dataset"]["latent_shape"]) == ("blocks", [4, 4, 4])

    # Samples are images: what the decoder makes of latents.
    generator = load_generator(tmp_path / "run")
    sampler = SamplerConfig(2, None)
    latents = generator.sample_latents(generator.noise([0, 1]), jnp.array([3, 7]), sampler)
    (batch,) = generator.generate(sampler, 2, 2)
    assert (latents.shape, batch.images.shape) == ((2, 4, 4, 4), (2, 8, 8, 1))
    images = generator.sample([3, 7], num_steps=2, cfg_scale=None)
    np.testing.assert_array_equal(images, images_to_uint8(blocks().decode(latents)))

    # A run keeps its codec, and needs it registered.
    with pytest.raises(UserError, match="holds a run with --codec=blocks, not pixels"):
        fit(tmp_path / "run", 5, codec="pixels")
    with pytest.raises(UserError, match="--codec=pixels has no effect on a run with --codec blocks"):
        load_generator(tmp_path / "run", codec="pixels")
    del CODECS["blocks"]
    with pytest.raises(UserError, match=r"--codec=blocks is unknown; known are pixels, kl\. Register it first"):
        load_generator(tmp_path / "run")


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
    run = build_run(
        make_config(
            {
                **{name: value for name, value in SETTINGS.items() if name != "codec"},
                "dataset_name": f"latents:{tmp_path}/latents",
                "save_dir": str(tmp_path / "run"),
                "max_steps": 1,
            }
        )
    )
    assert (run.model.latent_shape, run.record["dataset"]["codec"]["name"]) == ((4, 4, 4), "blocks")
    with pytest.raises(UserError, match="--codec=pixels, but the data set is of latents"):
        load_codec(CodecSpec("pixels"), make_mesh(), (8, 8, 1), expected_sha256="")


def test_a_source_is_what_follows_the_colon(monkeypatch):
    loaded = []
    monkeypatch.setitem(CODECS, "mine", CodecKind(loaded.append, "from a file", placeholder="PATH", default="there"))
    assert parse_codec("mine:a:b") == CodecSpec("mine", "a:b")
    for spec in (CodecSpec("mine", "here"), CodecSpec("mine")):
        with pytest.raises(AttributeError):  # of None, which is no codec
            load_codec(spec, make_mesh(), (8, 8, 1))
    assert loaded == ["here", "there"]
    assert jax.tree.leaves(CODECS["pixels"].load(None)) == []
