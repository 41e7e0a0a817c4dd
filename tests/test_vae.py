"""The VAE: the published implementation's numbers, fresh noise, every family's configuration, one-line errors."""

import dataclasses
import hashlib
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file as save_jax_file
from safetensors.numpy import load_file, save_file

from tests.conftest import GOLDEN
from utils.base.messages import UserError
from utils.codecs import kl
from utils.codecs.codec import PixelCodec
from utils.codecs.kl import KLCodec, KLConfig
from utils.codecs.kl_files import CONFIG, WEIGHTS
from utils.data.dataset import PixelBatch
from utils.data.latents import LatentBatch
from utils.images.pixels import images_from_uint8

pytestmark = pytest.mark.usefixtures("optimised")

TINY = KLConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "vae_tiny" / "golden.npz"))


@pytest.fixture(scope="module")
def published():
    """The small VAE whose outputs under the published implementation are the golden numbers."""
    return KLCodec.load(str(GOLDEN / "vae_tiny"))


@pytest.fixture(scope="module")
def tiny():
    return KLCodec.random(0, TINY)


encode_moments, decode = jax.jit(KLCodec.encode_moments), jax.jit(KLCodec.decode)


def images(*shape: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(5), shape, minval=-1, maxval=1)


def test_golden_numbers(published, golden):
    with jax.default_matmul_precision("highest"):
        mean, logvar = encode_moments(published, golden["images"])
        decoded = decode(published, golden["latents_scaled"])
    np.testing.assert_allclose(mean, golden["mean"], atol=1e-4)
    np.testing.assert_allclose(logvar, golden["logvar"], atol=1e-4)
    np.testing.assert_allclose(decoded, golden["decoded"], atol=1e-4)
    certain = published.sample_latents(jax.random.key(0), mean, jnp.full_like(mean, -jnp.inf))
    np.testing.assert_allclose(certain, golden["latents_scaled"], atol=1e-4)
    assert published.latent_shape((64, 64, 3)) == golden["mean"].shape[1:]


def test_bfloat16_is_close(published, golden):
    half = published.replace(dtype=jnp.dtype("bfloat16"))
    mean, _ = encode_moments(half, golden["images"][:1])
    decoded = decode(half, golden["latents_scaled"][:1])
    assert mean.dtype == decoded.dtype == jnp.float32
    for ours, exact in ((mean, golden["mean"][:1]), (decoded, golden["decoded"][:1])):
        assert 0 < np.abs(ours - exact).mean() < 0.02 * np.abs(exact).mean() + 0.01


def test_posterior_noise_is_fresh_for_every_example_and_key(tiny):
    mean, logvar = jnp.full((64, 8, 8, 4), 3.0), jnp.full((64, 8, 8, 4), np.log(0.25))
    first, second = (tiny.sample_latents(jax.random.key(i), mean, logvar) for i in range(2))
    assert len({row.tobytes() for row in np.concatenate([first, second])}) == 128
    np.testing.assert_array_equal(first, tiny.sample_latents(jax.random.key(0), mean, logvar))
    values = np.array(first) / TINY.scaling_factor
    assert abs(values.mean() - 3) < 5 * 0.5 / values.size**0.5
    assert abs(values.std() - 0.5) < 5 * 0.5 / (2 * values.size) ** 0.5


def test_log_variance_is_clipped(tiny):
    bias = jnp.array([0.0, 0, 0, 0, -1000, 1000, -1000, 1000])
    quant = tiny.params["quant_conv"] | {"bias": bias}
    mean, logvar = tiny.replace(params=tiny.params | {"quant_conv": quant}).encode_moments(images(1, 4, 4, 3))
    np.testing.assert_array_equal(logvar, np.broadcast_to(np.float32([-30, 20, -30, 20]), (1, 2, 2, 4)))
    assert np.abs(mean).max() < 100


def test_float16_moments_are_sampled_in_float32(tiny):
    mean, logvar = (jnp.full((1, 8, 8, 4), value, jnp.float16) for value in (1.0, 20.0))  # exp(20) is no float16
    latents = tiny.sample_latents(jax.random.key(0), mean, logvar)
    expected = tiny.sample_latents(jax.random.key(0), mean.astype(jnp.float32), logvar.astype(jnp.float32))
    assert latents.dtype == jnp.float32
    np.testing.assert_array_equal(latents, expected)


def test_cached_moments_and_images_give_the_same_latents(tiny):
    pixels = jax.random.randint(jax.random.key(0), (2, 16, 16, 3), 0, 256).astype(jnp.uint8)
    moments = jnp.stack(tiny.encode_moments(images_from_uint8(pixels)), axis=1)
    key = jax.random.key(1)
    labels = jnp.zeros(2, jnp.int32)
    images = PixelBatch(condition=labels, image=pixels)
    encoded = images.to_latents(tiny, key)
    assert encoded.shape == (2, *tiny.latent_shape((16, 16, 3)))
    cached = LatentBatch(condition=labels, moments=moments)
    np.testing.assert_allclose(cached.to_latents(tiny, key), encoded, rtol=1e-6)
    halved = cached.replace(moments=moments.astype(jnp.float16))
    np.testing.assert_allclose(halved.to_latents(tiny, key), encoded, atol=2e-3 * TINY.scaling_factor)
    np.testing.assert_array_equal(images.to_latents(PixelCodec(), key), images_from_uint8(pixels))


def test_cached_moments_do_not_run_the_encoder(tiny):
    batch = LatentBatch(condition=None, moments=jax.ShapeDtypeStruct((3, 2, 8, 8, 4), jnp.float16))
    program = jax.jit(lambda batch, *args: batch.to_latents(*args)).lower(batch, tiny, jax.random.key(0)).as_text()
    assert "convolution" not in program


def test_parameters_are_arguments_of_the_compiled_program(tiny):
    program = jax.jit(lambda codec, x: codec.decode(x)).lower(tiny, images(1, 8, 8, 4)).as_text()
    sizes = [
        int(np.prod([int(n) for n in shape.split("x")[:-1]]))
        for shape in re.findall(r"stablehlo.constant dense<[^>]*> : tensor<([\dx]+x)?f32>", program)
        if shape
    ]
    assert max(sizes, default=0) < 100
    signature = program.split("@main(")[1].split("->")[0]
    assert signature.count("tensor<") > 50


FAMILIES = {  # SDXL is as Stable Diffusion, with another scale
    "SDXL": {"scaling_factor": 0.13025},
    "SD3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "FLUX": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    "no attention": {"mid_block_add_attention": False},
    "mean and deviation": {"latents_mean": (1.0, 2.0, 3.0, 4.0), "latents_std": (0.5, 1.0, 2.0, 4.0)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_load_as_saved_and_scale_as_their_configuration_says(family, tmp_path):
    changes = FAMILIES[family]
    if family in ("SD3", "FLUX"):
        changes = changes | {"use_quant_conv": False, "use_post_quant_conv": False}
    config = dataclasses.replace(TINY, **changes)
    made = KLCodec.random(0, config)
    made.save(tmp_path / "vae")  # as in a pipeline's folder
    loaded = KLCodec.load(str(tmp_path))
    assert loaded.config == config
    assert loaded.sha256 == hashlib.sha256((tmp_path / "vae" / WEIGHTS).read_bytes()).hexdigest()
    assert loaded.source == str(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, made.params)
    assert ("quant_conv" in loaded.params) == (family not in ("SD3", "FLUX"))

    x = images(2, 16, 16, 3)
    mean, logvar = loaded.encode_moments(x)
    assert mean.shape == (2, 8, 8, config.latent_channels)
    shift = np.array(config.latents_mean or config.shift_factor or 0)
    expected = (np.array(mean) - shift) * config.scaling_factor / np.array(config.latents_std or 1)
    latents = loaded.sample_latents(jax.random.key(0), mean, jnp.full_like(logvar, -jnp.inf))
    np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-6)
    raw = kl.AutoencoderKL(config, jnp.float32).apply({"params": loaded.params}, mean, method="decode")
    np.testing.assert_allclose(loaded.decode(latents), raw, atol=1e-4)


def test_stable_diffusions_size():
    vae = KLCodec.random(0)
    assert sum(leaf.size for leaf in jax.tree.leaves(vae.params)) == 83_653_863
    assert vae.latent_shape((256, 256, 3)) == (32, 32, 4)


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save(tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: np.ascontiguousarray(value) for name, value in change(tensors).items()}, folder / WEIGHTS)


def reconfigure(folder, **changes) -> None:
    content = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))


def test_old_names_of_attention_load_the_same(tiny, folder):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        renamed = {}
        for name, value in tensors.items():
            for new, old in older.items():
                name = name.replace(f".{new}.", f".{old}.")
            is_attention = "attentions" in name and value.ndim == 2
            renamed[name] = value[:, :, None, None] if is_attention else value  # some files have convolutions there
        assert any("proj_attn" in name for name in renamed)
        return renamed

    rewrite(folder, rename)
    jax.tree.map(np.testing.assert_array_equal, KLCodec.load(str(folder)).params, tiny.params)


def test_keys_that_old_configurations_lack_have_stable_diffusions_values(folder):
    absent = ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    reconfigure(folder, **dict.fromkeys(absent, "absent"), _diffusers_version="0.4", sample_size=256, force_upcast=True)
    assert KLCodec.load(str(folder)).config == dataclasses.replace(TINY, sample_size=256)


@pytest.mark.parametrize(("kind", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision_files_load_as_float32(kind, digits, tiny, folder):
    tensors = load_file(folder / WEIGHTS)
    save_jax_file({name: jnp.asarray(value, kind) for name, value in tensors.items()}, folder / WEIGHTS)
    params = KLCodec.load(str(folder)).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.0**-digits, atol=1e-6), params, tiny.params)


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def drop(name):
    return lambda folder: rewrite(folder, lambda tensors: {n: v for n, v in tensors.items() if n != name})


BROKEN = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no config.json"),
    "config of something else": (lambda f: reconfigure(f, _class_name="UNet2DModel"), "UNet2DModel.*AutoencoderKL"),
    "unknown blocks": (lambda f: reconfigure(f, down_block_types=["AttnDown"]), "AttnDown.*DownEncoderBlock2D"),
    "config is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "no JSON"),
    "config is a list": (lambda folder: (folder / CONFIG).write_text("[1]"), "no JSON object"),
    "groups do not divide channels": (lambda f: reconfigure(f, norm_num_groups=3), "no VAE has the sizes in"),
    "mean of too few channels": (lambda f: reconfigure(f, latents_mean=[1.0, 2.0]), "no VAE has the sizes in"),
    "no weights": (lambda folder: (folder / WEIGHTS).rename(folder / "x.bin"), "has no .*safetensors.*fetch it"),
    "truncated weights": (cut, "cannot be read.*fetch it again"),
    "missing tensor": (drop("decoder.conv_in.bias"), "no tensor decoder.conv_in.bias"),
    "tensor left over": (
        lambda f: rewrite(f, lambda t: t | {"extra.weight": np.zeros(3)}),
        "extra.weight that its config.json does not know",
    ),
    "old and new names": (
        lambda f: rewrite(f, lambda t: t | {n.replace("to_q", "query"): v for n, v in t.items() if "to_q" in n}),
        "query.bias that its config.json does not know",
    ),
    "wrong shape": (lambda f: reconfigure(f, latent_channels=8), "decoder.conv_in.weight of another shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_line(case, folder):
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(UserError, match=f"--codec=kl:.*{re.escape(str(folder))}.*{message}") as error:
        KLCodec.load(str(folder))
    assert "\n" not in str(error.value)


def test_what_is_neither_folder_nor_hub_id_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for path in ("no/such/folder", "/nowhere", "word"):
        with pytest.raises(UserError, match=f"--codec=kl:{path} is neither a file, a folder nor a hub id"):
            KLCodec.load(path)


UNREACHABLE = "http://127.0.0.1:9"  # nobody listens there


@pytest.mark.parametrize("place", ["", "vae/"])
def test_hub_ids_are_fetched_once(place, hub, tiny, folder):
    """A VAE's own repository or a whole pipeline's; nothing but the two files, and nothing at all the second time."""
    names = (CONFIG, WEIGHTS, "diffusion_pytorch_model.bin")
    asked = hub({place + name: (folder / name).read_bytes() if name != names[2] else b"pickle" for name in names})
    first = KLCodec.load("owner/name")
    jax.tree.map(np.testing.assert_array_equal, first.params, tiny.params)
    assert first.source == "owner/name"
    fetched = [path for method, path in asked if method == "GET" and path.startswith("/owner/name/")]
    assert fetched == [f"/owner/name/resolve/main/{place}{name}" for name in (CONFIG, WEIGHTS)]
    assert not any(path.endswith(".bin") for _, path in asked)

    hub.redirect(UNREACHABLE)
    assert KLCodec.load("owner/name").sha256 == first.sha256


def test_repositories_without_the_files_are_refused(hub, folder):
    ways_on = (
        "fetch config.json and .* name their folder with --codec kl:FOLDER, or train on pixels with --codec pixels"
    )
    hub({CONFIG: (folder / CONFIG).read_bytes(), "diffusion_pytorch_model.bin": b"pickle"})
    with pytest.raises(UserError, match=rf"--codec=kl:owner/name .*it has no {WEIGHTS} beside .*\.bin.*{ways_on}"):
        KLCodec.load("owner/name")
    hub({"model.ckpt": b"pickle"})
    with pytest.raises(
        UserError, match=rf"--codec=kl:owner/other .*neither it nor its folder vae has a {CONFIG}.*{ways_on}"
    ):
        KLCodec.load("owner/other")


def test_an_unreachable_hub_is_told_soon_with_ways_on(hub):
    hub.redirect(UNREACHABLE)
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"--codec=kl:owner/name is no folder .*refused.*folder.*--codec pixels"
    ) as error:
        KLCodec.load("owner/name")
    assert time.monotonic() - start < 10  # the client's own repeats take 23 s
    assert "\n" not in str(error.value)


def test_images_that_the_vae_cannot_take_are_refused(tiny):
    with pytest.raises(UserError, match=r"multiples of 2, not 15x16; use --image_size 14"):
        tiny.latent_shape((15, 16, 3))
    with pytest.raises(UserError, match=r"3 channels, not 1; .*--codec pixels"):
        tiny.latent_shape((16, 16, 1))
