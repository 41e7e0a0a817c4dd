"""KL autoencoders with attention in their stages, and FLUX.2's: diffusers' numbers, latents by hand, refusals."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from encode_latents import encode_views
from tests.conftest import GOLDEN
from utils.base.files import write_json
from utils.base.messages import UserError
from utils.codecs.codec import num_cached_arrays
from utils.codecs.kl import Flux2Codec, KLCodec
from utils.codecs.kl_config import Flux2Config, KLConfig
from utils.codecs.kl_files import CONFIG, WEIGHTS
from utils.images.pixels import images_from_uint8

TINY = KLConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4)
FLUX2 = Flux2Config(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, latent_channels=3)

encode_moments, decode = jax.jit(KLCodec.encode_moments), jax.jit(lambda codec, latents: codec.decode(latents))


def distance(found, expected) -> float:
    """Largest difference, over the largest number expected."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


SHARED = [pytest.param(f"shared {name}", marks=pytest.mark.slow) for name in ("kl_attn", "kl_flux2", "kl_plain_odd")]


@pytest.mark.parametrize("name", ["kl_attn", "kl_flux2", *SHARED])
def test_golden_numbers(name, request, optimised):
    # Those beside the checkout are of photographs, too, and of images that are no squares.
    place, _, name = name.rpartition(" ")
    folder = (request.getfixturevalue("shared") / "golden" / "more" if place else GOLDEN) / name
    codec, golden = KLCodec.load(str(folder)), np.load(folder / "golden.npz")
    images = images_from_uint8(golden["images_uint8"])
    with jax.default_matmul_precision("highest"):
        mean, logvar = encode_moments(codec, images)
        latents = codec.normalise(mean)
        # An epsilon of 1e-5 in the normalisation of groups moves these by 1e-5.
        assert max(distance(mean, golden["mean"]), distance(logvar, golden["logvar"])) < 3e-6
        assert distance(latents, golden["latents"]) < 3e-6
        assert distance(decode(codec, golden["latents"]), golden["decoded"]) < 1e-5
        if place:
            mean, logvar = encode_moments(codec, images_from_uint8(golden["wide_uint8"]))
            assert max(distance(mean, golden["wide_mean"]), distance(logvar, golden["wide_logvar"])) < 1e-5
            assert distance(codec.normalise(mean), golden["wide_latents"]) < 1e-5
            assert distance(decode(codec, golden["wide_latents"]), golden["wide_decoded"]) < 3e-5
    assert codec.latent_shape(images.shape[1:]) == golden["latents"].shape[1:]


@pytest.mark.parametrize(("down", "up"), [((), (True, True)), ((True, False), ()), ((False, True), (True, False))])
def test_every_stage_may_have_attention(down, up):
    config = dataclasses.replace(TINY, down_attention=down, up_attention=up)
    params = KLCodec.random(0, config).params
    for part, blocks, attention, depth in (("encoder", "down_blocks", down, 1), ("decoder", "up_blocks", up, 2)):
        for i, expected in enumerate(attention or (False, False)):
            found = {name for name in params[part][f"{blocks}_{i}"] if name.startswith("attentions")}
            assert found == {f"attentions_{j}" for j in range(depth * expected)}


def test_latents_of_flux2_are_patches_of_the_mean():
    made = Flux2Codec.random(0, FLUX2)
    rng = np.random.default_rng(0)
    statistics = {"running_mean": rng.normal(size=12), "running_var": rng.uniform(1e-4, 4, 12)}
    codec = made.replace(params=made.params | {"bn": jax.tree.map(jnp.float32, statistics)})
    z = jnp.asarray(rng.normal(size=(2, 4, 6, 3)), jnp.float32)
    expected = np.empty((2, 2, 3, 12))
    for channel, row, column in np.ndindex(3, 2, 2):
        place = 4 * channel + 2 * row + column
        expected[..., place] = z[:, row::2, column::2, channel] - statistics["running_mean"][place]
        expected[..., place] /= np.sqrt(statistics["running_var"][place] + 1e-4)
    latents = codec.normalise(z)
    np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(codec.denormalise(latents), z, atol=1e-5)

    # The mean alone, whatever the key: it is cached as one array, patches and all.
    images = jnp.asarray(rng.integers(0, 256, (1, 8, 12, 3), np.uint8))
    encode = jax.jit(lambda codec, x: (codec.encode_moments(x)[0], codec.encode(jax.random.key(5), x)))
    mean, encoded = encode(codec, images_from_uint8(images))
    np.testing.assert_allclose(encoded, codec.normalise(mean), rtol=1e-5, atol=1e-5)
    assert num_cached_arrays(codec) == 1
    assert encoded.shape[1:] == codec.latent_shape((8, 12, 3)) == (2, 3, 12)
    views = jax.eval_shape(lambda codec, images: encode_views(codec, images, num_views=2), codec, images)
    assert views.shape == (1, 2, 1, 2, 3, 12)
    with pytest.raises(UserError, match=r"multiples of 4, not 10x12; use --image_size 8x12"):
        codec.latent_shape((10, 12, 3))


BROKEN = {
    "unknown stage": (
        {"down_block_types": ["SkipDownBlock2D"] * 2},
        "SkipDownBlock2D, but only DownEncoderBlock2D and",
    ),
    "direction": ({"up_block_types": ["AttnDownEncoderBlock2D"] * 2}, "up_block_types AttnDown.*UpDecoderBlock2D"),
    "no name": ({"down_block_types": [3, 4]}, "down_block_types 3, but only"),
    "too few stages": ({"up_block_types": ["AttnUpDecoderBlock2D"]}, "up_block_types of 1 stages, but .* of 2"),
    "too many stages": ({"down_block_types": ["DownEncoderBlock2D"] * 3}, "down_block_types of 3 stages, but .* of 2"),
    "attention that the file lacks": (
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
        "no tensor encoder.down_blocks.1.attentions.0",
    ),
    "class": ({"_class_name": ["AutoencoderKL"]}, "_class_name .*but only AutoencoderKL and AutoencoderKLFlux2"),
    "activation": ({"act_fn": "relu"}, "act_fn relu, but only silu is known here"),
}
FLUX2_BROKEN = {
    "patches": ({"patch_size": [1, 1]}, r"patch_size \(1, 1\), but only \[2, 2\]"),
    "decoder's stages": ({"decoder_block_out_channels": [4]}, "decoder_block_out_channels of 1 stages, but .* of 2"),
    "decoder's widths": ({"decoder_block_out_channels": [4, 0]}, "sizes in .*decoder_block_out_channels"),
    "other widths": ({"decoder_block_out_channels": [8, 8]}, "decoder.conv_norm_out.* of another shape"),
    "epsilon": ({"batch_norm_eps": 0}, "sizes in .*batch_norm_eps 0"),
    "no statistics": ({"_class_name": "AutoencoderKL"}, "a tensor bn.* that its config.json does not know"),
    "negative variance": (("bn.running_var", -np.ones(12, np.float32)), "negative variance in bn.running_var"),
}


@pytest.mark.parametrize("case", [*BROKEN, *FLUX2_BROKEN])
def test_other_networks_are_refused_in_one_line(case, tmp_path):
    is_flux = case in FLUX2_BROKEN
    KLCodec.random(0, FLUX2 if is_flux else TINY).save(tmp_path)
    change, message = (BROKEN | FLUX2_BROKEN)[case]
    if isinstance(change, tuple):
        save_file({**load_file(tmp_path / WEIGHTS), change[0]: change[1]}, tmp_path / WEIGHTS)
    else:
        write_json(tmp_path / CONFIG, json.loads((tmp_path / CONFIG).read_text()) | change)
    with pytest.raises(UserError, match=f"--codec=kl:{re.escape(str(tmp_path))}.*{message}") as error:
        KLCodec.load(str(tmp_path))
    assert "\n" not in str(error.value)
