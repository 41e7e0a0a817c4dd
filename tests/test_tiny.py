"""The tiny autoencoder: diffusers' numbers and configuration, latents cached as one array, one-line errors."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import encode_latents
from tests.conftest import GOLDEN
from tests.data_sets import load
from utils.base.files import write_json
from utils.base.messages import UserError
from utils.codecs.codec import num_cached_arrays
from utils.codecs.codecs import CODECS
from utils.codecs.kl import KLCodec, KLConfig
from utils.codecs.kl_files import CONFIG, WEIGHTS
from utils.codecs.tiny import TinyCodec, TinyConfig
from utils.data.batches import epoch_batches, training_batches
from utils.data.latents import MANIFEST
from utils.images.pixels import images_from_uint8
from utils.training import build_run, make_config

pytestmark = pytest.mark.usefixtures("optimised")

SMALL = TinyConfig(
    encoder_block_out_channels=(4, 4),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)

encode, decode = jax.jit(TinyCodec.encode), jax.jit(TinyCodec.decode)


def distance(found, expected) -> float:
    """Largest difference, over the largest number expected."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


SHARED = pytest.param("shared tiny_small", marks=pytest.mark.slow)  # more images of the same network


@pytest.fixture(scope="module", params=["tiny_small", SHARED, "shared taesd"])
def published(request):
    """(codec, {name: array that diffusers computes with it}); those beside the checkout are of photographs, too."""
    place, _, name = request.param.rpartition(" ")
    folder = (request.getfixturevalue("shared") / "golden" / "more" if place else GOLDEN) / name
    return TinyCodec.load(str(folder)), dict(np.load(folder / "golden.npz"))


def test_golden_numbers(published):
    codec, golden = published
    key = jax.random.key(0)
    with jax.default_matmul_precision("highest"):
        for images, latents, decoded in (
            ("images_uint8", "latents", "decoded"),
            ("wide_uint8", "wide_latents", "wide_decoded"),
            (None, "big_latents", "big_decoded"),  # so large that bending them back matters
        ):
            if latents not in golden:
                continue
            if images:
                assert distance(encode(codec, key, images_from_uint8(golden[images])), golden[latents]) < 1e-5
                assert codec.latent_shape(golden[images].shape[1:]) == golden[latents].shape[1:]
            assert distance(decode(codec, golden[latents]), golden[decoded]) < 3e-5

        # Latents that were stored as bytes, of which one may round the other way.
        levels = np.round(255 * np.clip(golden["latents"] / 6 + 0.5, 0, 1))
        stored = np.float32((levels / 255 - 0.5) * 6)
        assert distance(decode(codec, stored), golden["forward_bytes"]) < 1e-2


def test_bfloat16_is_close_and_results_are_float32():
    codec = TinyCodec.load(str(GOLDEN / "tiny_small"), jnp.bfloat16)
    golden = np.load(GOLDEN / "tiny_small" / "golden.npz")
    latents = encode(codec, jax.random.key(0), images_from_uint8(golden["images_uint8"]))
    assert latents.dtype == jnp.float32
    assert 1e-4 < distance(latents, golden["latents"]) < 0.05
    assert jax.eval_shape(decode, codec, golden["latents"]).dtype == jnp.float32


def test_taesds_size():
    assert sum(leaf.size for leaf in jax.tree.leaves(TinyCodec.random(0).params)) == 2_445_063
    assert TinyConfig.from_dict({}, "", "") == TinyConfig()


def test_a_hub_folder_is_fetched(hub, tmp_path):
    made = TinyCodec.random(0, SMALL)
    made.save(tmp_path)
    hub({name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    loaded = CODECS["tiny"].load("owner/name")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, made.params)
    assert (loaded.source, loaded.config) == ("owner/name", SMALL)
    hub({})
    with pytest.raises(UserError, match=r"--codec=tiny:owner/other .*--codec tiny:FOLDER"):
        TinyCodec.load("owner/other")


@pytest.fixture
def folder(tmp_path):
    TinyCodec.random(0, SMALL).save(tmp_path / "vae")
    return tmp_path / "vae"


def test_latents_are_cached_as_one_array(folder, read_flags, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20) % 2)
    out = tmp_path / "latents"
    words = f"--dataset_name npz:{tmp_path}/a.npz --codec tiny:{folder} --random_flip 1 --batch_size 8 --shard_size 8"
    program = [*words.split(), "--out", str(out)]
    encode_latents.main(read_flags(encode_latents, program))
    manifest = json.loads((out / MANIFEST).read_text())
    assert (manifest["num_arrays"], manifest["vae"]) == (1, f"tiny:{folder}")
    assert manifest["latent_shape"] == [4, 6, 4]

    # Every image and its mirror image, in half of the bytes that moments would take.
    codec = TinyCodec.load(str(folder))
    cached, pixels = load(f"latents:{out}"), load(f"npz:{tmp_path}/a.npz", random_flip=True)
    rows = list(range(len(cached.source)))
    stored = np.stack([cached.source[row]["moments"] for row in rows])
    given = np.stack([pixels.source[row]["image"] for row in rows])
    assert stored.dtype == np.float16
    for view, seen in enumerate((given, given[:, :, ::-1])):
        exact = encode(codec, jax.random.key(view), images_from_uint8(seen))  # whatever the key
        np.testing.assert_allclose(stored[:, view, 0], exact, rtol=1e-3, atol=1e-3)
    assert stored.shape == (len(rows), 2, 1, 4, 6, 4)

    # Training sees what it would see of the images, in the same order and with the same flips; validation, too.
    for batches in (
        (training_batches(dataset, 5, 0) for dataset in (cached, pixels)),
        (epoch_batches(load(name, "validation"), 2) for name in (f"latents:{out}", f"npz:{tmp_path}/a.npz")),
    ):
        for ours, theirs in itertools.islice(zip(*batches, strict=False), 6):
            latents, expected = (batch.to_latents(codec, jax.random.key(0)) for batch in (ours, theirs))
            assert latents.dtype == jnp.float32
            np.testing.assert_allclose(latents, expected, rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(ours.condition, theirs.condition)

    # The same command finishes what was stopped; a run on them decodes by the same codec, and no other.
    (shard, *_) = sorted(out.glob("train-*"))
    before = shard.read_bytes()
    shard.unlink()
    encode_latents.main(read_flags(encode_latents, program))
    assert shard.read_bytes() == before
    settings = {"dataset_name": f"latents:{out}", "batch_size": 4, "wandb.mode": "disabled", "model.num_classes": 2}
    settings |= {"model.hidden_size": 16, "model.depth": 1, "model.patch_size": 2, "save_dir": str(tmp_path / "run")}
    run = build_run(make_config(settings))
    assert isinstance(run.model.codec, TinyCodec)
    assert run.record["dataset"]["codec"] == {"name": "tiny", "source": str(folder), "sha256": codec.sha256}
    TinyCodec.random(1, SMALL).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"--codec=tiny:.*other is another VAE"):
        build_run(make_config(settings | {"codec": f"tiny:{tmp_path / 'other'}"}))
    words = [word.replace(f"tiny:{folder}", f"tiny:{tmp_path / 'other'}") for word in program]
    with pytest.raises(UserError, match="holds latents with vae_sha256"):
        encode_latents.main(read_flags(encode_latents, words))
    write_json(out / MANIFEST, manifest | {"num_arrays": 3})
    with pytest.raises(UserError, match=r"not a valid latents manifest \(num_arrays 3\)"):
        load(f"latents:{out}")


def test_determinism_goes_before_moments():
    class Mean(KLCodec):
        IS_DETERMINISTIC = True

    config = KLConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=8)
    codecs = [kind.random(0, config) for kind in (KLCodec, Mean)] + [TinyCodec.random(0, SMALL)]
    assert [num_cached_arrays(codec) for codec in codecs] == [2, 1, 1]


BROKEN = {
    "activation": ({"act_fn": "silu"}, "has act_fn silu, but only relu"),
    "upsampling": ({"upsample_fn": "bilinear"}, "has upsample_fn bilinear, but only nearest"),
    "factor": ({"upsampling_scaling_factor": 4}, "has upsampling_scaling_factor 4, but only 2"),
    "DC-AE": ({"_class_name": "AutoencoderDC"}, "has _class_name AutoencoderDC, but only AutoencoderTiny"),
    "KL": ({"_class_name": "AutoencoderKL"}, "is an AutoencoderKL's; use --codec kl:"),
    "stages": ({"num_decoder_blocks": [1, 1, 1]}, "num_decoder_blocks of 3 stages, but .* of 2"),
    "widths": ({"encoder_block_out_channels": [4, 8]}, r"sizes in .* \(encoder_block_out_channels \(4, 8\)\)"),
    "no number": ({"latent_channels": True}, r"sizes in .* \(latent_channels True\)"),
    "too wide": ({"decoder_block_out_channels": [10**9] * 2}, "sizes in .*decoder_block_out_channels"),
    "other channels": ({"latent_channels": 16}, "decoder.layers.0.weight of another shape"),
    "tensor missing": ({"num_encoder_blocks": [1, 2]}, "has no tensor encoder.layers.4.conv.0"),
    "tensor left over": ("extra.weight", "a tensor extra.weight that its config.json does not know"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_other_networks_are_refused_in_one_line(case, folder):
    change, message = BROKEN[case]
    if isinstance(change, str):
        save_file({**load_file(folder / WEIGHTS), change: np.zeros(3)}, folder / WEIGHTS)
    else:
        write_json(folder / CONFIG, json.loads((folder / CONFIG).read_text()) | change)
    with pytest.raises(UserError, match=f"--codec=tiny:{re.escape(str(folder))}.*{message}") as error:
        CODECS["tiny"].load(str(folder))
    assert "\n" not in str(error.value)


def test_what_it_does_not_take_is_refused(folder):
    with pytest.raises(UserError, match=rf"--codec=tiny:.*{WEIGHTS} is neither a folder nor a hub id, .*taesd"):
        TinyCodec.load(str(folder / WEIGHTS))
    with pytest.raises(UserError, match=r"is an AutoencoderTiny's; use --codec tiny:"):
        CODECS["kl"].load(str(folder))
    codec = TinyCodec.random(0, SMALL)
    with pytest.raises(UserError, match=r"multiples of 2, not 15x16; use --image_size 14x16"):
        codec.latent_shape((15, 16, 3))
    with pytest.raises(UserError, match=r"3 channels, not 1; .*--codec pixels"):
        codec.latent_shape((16, 16, 1))
