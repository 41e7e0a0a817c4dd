"""--preview: panels are decoded by a tiny autoencoder; losses, scores and training are the codec's alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.base.messages import UserError
from utils.codecs.kl import KLCodec
from utils.codecs.kl_config import KLConfig
from utils.codecs.tiny import TinyCodec, TinyConfig
from utils.images import plotting
from utils.sampling.generator import ImageGenerator
from utils.sampling.solvers import SamplerConfig
from utils.training import build_run, evaluation, make_config
from utils.training.build import make_state
from utils.training.preview import PreviewCodec
from utils.training.reference import Reference
from utils.training.start import FIXED

KL = KLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False)
SMALL = TinyConfig(
    encoder_block_out_channels=(4, 4),
    decoder_block_out_channels=(4, 4),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of a small run on a KL autoencoder's latents; `black` beside it decodes everything as black."""
    folder = tmp_path_factory.mktemp("preview")
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.savez(folder / "a.npz", images=images, labels=np.arange(20) % 2)
    KLCodec.random(0, KL).save(folder / "kl")
    black = jax.tree.map(jnp.zeros_like, TinyCodec.random(0, SMALL).params)
    TinyCodec(black, SMALL, jnp.dtype("float32"), "").save(folder / "black")
    TinyCodec.random(0, dataclasses.replace(SMALL, latent_channels=5)).save(folder / "five")
    values = {"dataset_name": f"npz:{folder}/a.npz", "codec": f"kl:{folder}/kl", "batch_size": 4}
    values |= {"model.hidden_size": 16, "model.depth": 1, "model.patch_size": 2, "model.num_classes": 2}
    values |= {"model.denoise_timesteps": 1, "wandb.mode": "disabled", "save_dir": str(folder / "run")}
    return values, folder


def test_panels_are_the_viewers_and_numbers_the_codecs(settings, monkeypatch, capsys):
    values, folder = settings
    run = build_run(make_config(values | {"preview": f"tiny:{folder}/black"}))
    assert "black draws panels: " in capsys.readouterr().out
    assert run.record["preview"] == f"tiny:{folder}/black"
    assert "preview" not in FIXED
    assert isinstance(run.model.codec, KLCodec)
    state = make_state(run)

    # Which codec decodes each part of an evaluation.
    seen = {}

    def record(name, result):
        def part(model, params, *words, **more):
            seen.setdefault(name, set()).add(type(model.codec))
            return result

        return part

    reconstruction_panel = evaluation.reconstruction_panel
    monkeypatch.setattr(evaluation, "reconstruction_panel", record("reconstruction", None))
    monkeypatch.setattr(evaluation, "sample_panels", record("samples", []))
    monkeypatch.setattr(evaluation, "loss_by_time", record("losses", {}))
    monkeypatch.setattr(ImageGenerator, "straightness", lambda self: 0.0)
    for each in (run, dataclasses.replace(run, viewer=None)):
        list(evaluation.evaluate(each, state, run.validation_batch))
        panels = {PreviewCodec} if each is run else {KLCodec}
        assert seen == {"losses": {KLCodec}, "reconstruction": panels, "samples": panels}
        seen.clear()

    # Black is -1, 0 as a byte. The clean images alone are not decoded; latents are the codec's.
    tables = []
    monkeypatch.setattr(plotting, "image_table", lambda images, *words: tables.append(np.asarray(images)))
    shown = run.model._replace(codec=run.viewer)
    batch = run.validation_batch
    reconstruction_panel(shown, state.ema_params, batch, jax.random.key(0))
    np.testing.assert_array_equal(tables[0][0][: len(batch.image)], batch.image)
    assert (tables[0][1:] == 0).all()
    latents = [jax.jit(batch.to_latents)(codec, jax.random.key(0)) for codec in (run.model.codec, run.viewer)]
    np.testing.assert_array_equal(*latents)

    # Samples that are scored are decoded by the codec.
    scored = []
    monkeypatch.setattr(
        evaluation,
        "measure_images",
        lambda extractors, samples, *_, **__: scored.append(next(iter(samples)).images),
    )
    monkeypatch.setattr(evaluation, "compute_metrics", lambda *arguments: {})
    reference = object.__new__(Reference)
    for name, value in {"metrics": (), "extractors": None, "statistics": None}.items():
        object.__setattr__(reference, name, value)
    evaluation.score_samples(dataclasses.replace(run, reference=reference), state, SamplerConfig(1, None))
    assert np.asarray(scored[0]).std() > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preview": "kl:{folder}/kl"}, r"--preview=kl:.*: only tiny:PATH_OR_HUB decodes in a moment"),
        ({"preview": "taesd"}, "--preview=taesd: only tiny:PATH_OR_HUB decodes in a moment"),
        ({"preview": "tiny:{folder}/none"}, "--preview=tiny:.*/none is neither a folder nor a hub id"),
        ({"preview": "tiny:{folder}/kl"}, "--preview=tiny:.* is an AutoencoderKL's; give the folder of a tiny one, or"),
        ({"preview": "tiny:{folder}/five"}, "--preview=tiny:.*five has latents 4x4x5 of these images, .* learns 4x4x4"),
        ({"preview": "tiny:{folder}/black", "codec": "pixels"}, "--preview=tiny:.*: the latents are the images"),
        ({"preview": "tiny:{folder}/black", "eval_interval": 0}, "--preview=.*has no effect with --eval_interval=0"),
        ({"preview": "tiny:s3://a/b"}, "--preview=s3://a/b is a URL"),
    ],
)
def test_other_viewers_are_refused(settings, changes, message):
    values, folder = settings
    changes = {name: json.loads(json.dumps(value).replace("{folder}", str(folder))) for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        build_run(make_config(values | changes))
