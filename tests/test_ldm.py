"""KL autoencoders in one file of latent diffusion's own names: found, renamed, scaled, and used by the programs."""

import dataclasses
import json
import os
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert_checkpoint
import sample
from tests.conftest import GOLDEN
from tests.torch_writer import save_torch
from utils.base.external import BadFileError
from utils.base.messages import AbsentCodecError, UserError
from utils.base.torch_files import read_torch_file
from utils.codecs.codecs import CODECS
from utils.codecs.kl import KLCodec
from utils.codecs.kl_config import KLConfig
from utils.codecs.kl_files import WEIGHTS
from utils.images.pixels import images_from_uint8
from utils.images.samples import open_samples
from utils.runs.opening import load_generator

# As latent diffusion's: groups of 32, no shift, no scale.
SIZES = KLConfig(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, scaling_factor=1.0)
VAVAE = dataclasses.replace(SIZES, down_attention=(False, True), up_attention=(True, False))
MAR = dataclasses.replace(SIZES, down_attention=(False, True))  # attention in the encoder alone
LIGHTNINGDIT = GOLDEN / "checkpoints" / "lightningdit_tiny.pt"


def ldm_tensors(codec, folder) -> dict[str, np.ndarray]:
    """A codec's tensors as latent diffusion's code would save them; the names are put together here by hand."""
    codec.save(folder)
    given = load_file(folder / WEIGHTS)
    levels = len(codec.config.block_out_channels)
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for part in ("encoder", "decoder"):
        modules |= {f"{part}.{name}": f"{part}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{part}.conv_norm_out"] = f"{part}.norm_out"
        blocks = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
        attentions = {"mid_block.attentions.0": "mid.attn_1"}
        for i in range(levels):
            # The decoder's first stage is the last level: both count from the image.
            ours, theirs = (f"down_blocks.{i}", f"down.{i}")
            if part == "decoder":
                ours, theirs = (f"up_blocks.{i}", f"up.{levels - 1 - i}")
            modules[f"{part}.{ours}.downsamplers.0.conv"] = f"{part}.{theirs}.downsample.conv"
            modules[f"{part}.{ours}.upsamplers.0.conv"] = f"{part}.{theirs}.upsample.conv"
            blocks |= {f"{ours}.resnets.{j}": f"{theirs}.block.{j}" for j in range(3)}
            attentions |= {f"{ours}.attentions.{j}": f"{theirs}.attn.{j}" for j in range(3)}
        for ours, theirs in blocks.items():
            for name in ("norm1", "conv1", "norm2", "conv2"):
                modules[f"{part}.{ours}.{name}"] = f"{part}.{theirs}.{name}"
            modules[f"{part}.{ours}.conv_shortcut"] = f"{part}.{theirs}.nin_shortcut"
        for ours, theirs in attentions.items():
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
            modules |= {f"{part}.{ours}.{name}": f"{part}.{theirs}.{other}" for name, other in names.items()}
    renamed = {}
    for name, value in given.items():
        module, _, leaf = name.rpartition(".")
        is_dense = "attentions" in name and value.ndim == 2
        renamed[f"{modules[module]}.{leaf}"] = value[:, :, None, None] if is_dense else value
    return renamed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{name: (codec, its tensors under latent diffusion's names)}"""
    codecs = {"VA-VAE": KLCodec.random(0, VAVAE), "MAR": KLCodec.random(1, MAR), "SD": KLCodec.random(2, SIZES)}
    return {name: (codec, ldm_tensors(codec, tmp_path_factory.mktemp("saved"))) for name, codec in codecs.items()}


@pytest.fixture
def file(made, tmp_path):
    """VA-VAE's file, in the form in which it is published."""
    surplus = {"loss.logvar": np.zeros(1, np.float32), "linear_proj.weight": np.zeros((2, 2), np.float32)}
    surplus["foundation_model.blocks.0.attn.qkv.weight"] = np.zeros((2, 2), np.float32)
    save_torch(tmp_path / "vavae.pt", {"epoch": 3, "global_step": 7, "state_dict": made["VA-VAE"][1] | surplus})
    return tmp_path / "vavae.pt"


def test_published_files_hold_the_same_codec(made, file, tmp_path, capsys):
    def check(name, path):
        codec = made[name][0]
        loaded = CODECS["kl"].load(str(path))
        jax.tree.map(np.testing.assert_array_equal, loaded.params, codec.params)
        assert loaded.config == codec.config
        return loaded

    check("VA-VAE", file)
    assert "latents are as the autoencoder makes them, for the file has no scale" in capsys.readouterr().err
    save_torch(tmp_path / "bare.pt", made["VA-VAE"][1])
    check("VA-VAE", tmp_path / "bare.pt")
    save_torch(tmp_path / "kl16.ckpt", {"model": made["MAR"][1]})
    check("MAR", tmp_path / "kl16.ckpt")

    # A whole latent diffusion model, as a tool has merged it, and as Lightning saves it, with a class among its keys.
    whole = {f"first_stage_model.{name}": value for name, value in made["SD"][1].items()}
    whole |= {"model.diffusion_model.out.weight": np.zeros((4, 4), np.float32), "betas": np.zeros(3, np.float32)}
    save_file({name: np.ascontiguousarray(value) for name, value in whole.items()}, tmp_path / "sd.safetensors")
    check("SD", tmp_path / "sd.safetensors")
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("pytorch_lightning.callbacks"))
        patch.setitem(sys.modules, module.__name__, module)
        callbacks = {module.ModelCheckpoint: {"best_model_path": "last.ckpt"}}
        save_torch(tmp_path / "sd.ckpt", {"callbacks": callbacks, "state_dict": whole})
    assert read_torch_file(tmp_path / "sd.ckpt")["callbacks"] == {"ModelCheckpoint": {"best_model_path": "last.ckpt"}}
    check("SD", tmp_path / "sd.ckpt")

    # A class is a key at most: nothing is called by its name.
    for content in (
        b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)R.",
        b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}b.",
        b"\x80\x02cpytorch_lightning.callbacks.early_stopping\nEarlyStopping\n.",
    ):
        save_torch(tmp_path / "evil.ckpt", {}, content)
        with pytest.raises(BadFileError):
            read_torch_file(tmp_path / "evil.ckpt")


def test_statistics_and_scale_are_part_of_the_codec(made, file, tmp_path, capsys):
    rng = np.random.default_rng(0)
    mean, std = np.float32(rng.normal(size=4)), np.float32(rng.uniform(0.5, 2, 4))
    z = jnp.asarray(rng.normal(size=(1, 3, 2, 4)), jnp.float32)
    plain = KLCodec.load(str(file))
    np.testing.assert_array_equal(plain.normalise(z), z)

    # VA-VAE's form, beside the weights or named; REPA-E's; as .safetensors; a scale.
    save_torch(tmp_path / "latents_stats.pt", {"mean": mean.reshape(1, 4, 1, 1), "std": std.reshape(1, 4, 1, 1)})
    beside = KLCodec.load(str(file))
    assert f"latents are normalised by {tmp_path / 'latents_stats.pt'}" in "".join(capsys.readouterr())
    (tmp_path / "other").mkdir()
    named = tmp_path / "other" / "a,b.pt"  # a comma in a name is no option
    file.rename(named)
    save_torch(tmp_path / "e2e.pt", {"latents_scale": 1 / std, "latents_bias": mean})
    save_file({"mean": mean, "std": std}, tmp_path / "s.safetensors")
    loaded = {
        text: KLCodec.load(f"{named},{text}")
        for text in (
            f"stats={tmp_path}/latents_stats.pt",
            f"stats={tmp_path}/s.safetensors",
            f"stats={tmp_path}/e2e.pt",
        )
    }
    for codec in (beside, *loaded.values()):
        np.testing.assert_allclose(codec.normalise(z), (z - mean) / std, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(codec.denormalise(codec.normalise(z)), z, rtol=1e-5, atol=1e-6)
    scaled = KLCodec.load(f"{named},scale=0.2325")
    np.testing.assert_allclose(scaled.normalise(z), 0.2325 * z, rtol=1e-6)

    # What makes other latents has another hash, wherever it lies.
    exact = [codec for text, codec in loaded.items() if "e2e" not in text]
    assert {codec.sha256 for codec in exact} == {beside.sha256}
    others = {plain.sha256, beside.sha256, scaled.sha256, KLCodec.load(f"{named},scale=0.5").sha256}
    assert len(others) == 4

    # A copy in diffusers' layout is the same codec.
    beside.save(tmp_path / "folder")
    copy = KLCodec.load(str(tmp_path / "folder"))
    assert copy.config == beside.config
    jax.tree.map(np.testing.assert_array_equal, copy.params, beside.params)


def test_golden_numbers_of_vavae(shared, optimised):
    folder = shared / "golden" / "more" / "ldm_vavae"
    codec, golden = KLCodec.load(str(folder / "vavae_tiny.pt")), np.load(folder / "golden.npz")
    sizes = json.loads((folder / "sizes.json").read_text())
    saved = codec.config.to_dict()
    for name in ("down_block_types", "up_block_types", "norm_num_groups", "scaling_factor"):
        assert saved[name] == sizes[name]
    np.testing.assert_allclose(codec.config.latents_mean, sizes["latents_mean"], atol=1e-6)
    with jax.default_matmul_precision("highest"):
        mean, logvar = jax.jit(KLCodec.encode_moments)(codec, images_from_uint8(golden["images_uint8"]))
        decoded = jax.jit(KLCodec.decode)(codec, golden["latents"])
    for name, value in {"mean": mean, "logvar": logvar, "latents": codec.normalise(mean), "decoded": decoded}.items():
        bound = 3e-5 if name == "decoded" else 1e-5
        assert np.abs(value - golden[name]).max() < bound * np.abs(golden[name]).max()


def test_a_lightningdit_is_sampled_from_its_two_files(tmp_path, monkeypatch, read_flags, capsys):
    # Its latents have 8 channels; those of this autoencoder are half as large as the images.
    sizes = dataclasses.replace(SIZES, block_out_channels=(32, 32), latent_channels=8, mid_block_add_attention=False)
    tensors = ldm_tensors(KLCodec.random(0, sizes), tmp_path / "saved")
    save_torch(tmp_path / "vavae.pt", {"state_dict": tensors})
    rng = np.random.default_rng(0)
    statistics = {"mean": np.float32(rng.normal(size=8)), "std": np.float32(rng.uniform(0.5, 2, 8))}
    save_torch(tmp_path / "latents_stats.pt", statistics)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dit.pt").write_bytes(LIGHTNINGDIT.read_bytes())

    # One command.
    words = ["--load_dir", "dit.pt", "--codec", "kl:vavae.pt", "--num_samples", "2", "--denoise_timesteps", "1"]
    words += ["--cfg_scale", "1", "--save_samples", "s.npz"]
    sample.main(read_flags(sample, words))
    assert (tmp_path / "runs" / "dit" / "samples" / "grid.png").exists()
    assert f"--load_dir=dit.pt is in {tmp_path}/runs/dit" in "".join(capsys.readouterr())
    assert open_samples(tmp_path / "s.npz").image_shape == (8, 8, 3)

    # What the network draws is brought back to VA-VAE's latents.
    generator = load_generator("dit.pt")  # which is the run by now
    assert generator.model.latent_shape == (4, 4, 8)
    codec = generator.model.codec
    latents = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    expected = latents * statistics["std"] + statistics["mean"]
    np.testing.assert_allclose(codec.denormalise(latents), expected, rtol=1e-5, atol=1e-6)
    saved = json.loads((tmp_path / "runs" / "dit" / "config.json").read_text())["dataset"]["codec"]
    assert saved == {"name": "kl", "source": "vavae.pt", "sha256": codec.sha256}

    # Two commands make the same run.
    words = ["--source", str(LIGHTNINGDIT), "--vae", "vavae.pt", "--out", "run"]
    convert_checkpoint.main(read_flags(convert_checkpoint, words))
    other = load_generator("run")
    jax.tree.map(np.testing.assert_array_equal, other.params, generator.params)
    assert other.model.codec.sha256 == codec.sha256

    # Another autoencoder, the file after a change, and another file of the same name.
    for codec, message in (
        ("kl:vavae.pt,scale=2", "is another VAE than that with which dit.pt .*; move .*/runs/dit away, and the"),
        ("pixels", "has no effect"),
    ):
        with pytest.raises(UserError, match=message):
            load_generator("dit.pt", codec=codec)
    os.utime("dit.pt", (0, 0))
    with pytest.raises(UserError, match=r"dit.pt has changed since it was imported; move .*/runs/dit away, and"):
        load_generator("dit.pt")

    # A file that was exported here is read where it lies.
    convert_checkpoint.main(read_flags(convert_checkpoint, ["--load_dir", "run", "--out", "exported.safetensors"]))
    for _ in range(2):
        assert load_generator("exported.safetensors").model.codec.sha256 == other.model.codec.sha256
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dit.pt").write_bytes(LIGHTNINGDIT.read_bytes())
    with pytest.raises(UserError, match=r"would be kept in .*/runs/dit, another run"):
        load_generator("other/dit.pt", codec="kl:vavae.pt")
    for name, codec, message in (
        ("lightningdit_tiny.pt", None, "is a LightningDiT's: name the autoencoder .*--codec kl:FILE"),
        ("lightningdit_tiny.pt", f"kl:{GOLDEN / 'vae_tiny'}", "has latents of 4 channels, the model 8"),
        (str(tmp_path / "vavae.pt"), "kl:dit.pt", r"it is an autoencoder; name the model's file here, and this one by"),
        (
            "dit_tiny.pt",
            "kl:vavae.pt",
            "no tensor tells DiT from SiT; .*convert_checkpoint.py --source .* --family sit",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_generator(LIGHTNINGDIT.parent / name, codec=codec)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"dit"}


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def padded(name, size):
    return lambda tensors: tensors | {name: np.zeros((size, size, 1, 1), np.float32)}


BROKEN = {
    "tensor left over": (
        lambda t: t | {"encoder.extra.weight": np.zeros(3)},
        "has a tensor encoder.extra.weight that no",
    ),
    "of a DC-AE": (lambda t: {"encoder.stages.0.weight": np.zeros(3)}, "has no tensors encoder.down"),
    "tensor missing": (without("decoder.conv_in.bias"), "has no tensor decoder.conv_in.bias, which the rest"),
    "no quant_conv": (
        without("quant_conv.weight"),
        "has no quant_conv, .*FLUX's and SD3's, are read in diffusers' layout",
    ),
    "a level missing": (without("encoder.down.1.block.0.conv1.weight"), "has no tensor encoder.down.1.block.0.conv1"),
    "an attention too few": (
        without("decoder.up.1.attn.1.q.weight"),
        "no tensor decoder.up_blocks.0.attentions.1.to_q",
    ),
    "another embed_dim": (
        lambda t: t | {"quant_conv.weight": np.zeros((6, 8, 1, 1), np.float32)},
        r"latents of 3 channels \(embed_dim\) made from 4",
    ),
    "groups": (
        lambda t: t | {"encoder.down.0.block.0.conv1.weight": np.zeros((48, 32, 3, 3))},
        "width of 48, no multiple",
    ),
    "another shape": (padded("post_quant_conv.weight", 5), "post_quant_conv.weight of another shape than the rest"),
    "NaN": (lambda t: t | {"quant_conv.bias": np.full(8, np.nan, np.float32)}, "NaN or infinity in quant_conv.bias"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_other_networks_are_refused_in_one_line(case, made, tmp_path):
    change, message = BROKEN[case]
    tensors = {name: np.ascontiguousarray(value) for name, value in change(made["VA-VAE"][1]).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"^--codec=kl:{re.escape(str(tmp_path))}/a.safetensors: .*{message}") as error:
        KLCodec.load(str(tmp_path / "a.safetensors"))
    assert "\n" not in str(error.value)


OPTIONS = {
    "scale=x": "scale=x is no factor",
    "scale=0": "scale=0 is no factor",
    "scale=nan": "scale=nan is no factor",
    "stats=": "stats= names no file",
    "scale=2,stats=a.pt": "give one of stats=FILE and scale=NUMBER",
    "stats=none.pt": "statistics in none.pt cannot be read",
    "stats=five.pt": "five.pt has 5 numbers of mean, but the latents 4 channels",
    "stats=zero.pt": "zero.pt has std that are no finite numbers, or not above 0",
    "stats=nan.pt": "nan.pt has mean that are no finite numbers",
    "stats=half.pt": "half.pt holds mean, not mean and std",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_what_latents_cannot_be_scaled_by_is_refused(options, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = {"mean": np.zeros(4, np.float32), "std": np.ones(4, np.float32)}
    save_torch(tmp_path / "five.pt", {name: np.ones(5, np.float32) for name in good})
    save_torch(tmp_path / "zero.pt", good | {"std": np.float32([1, 0, 1, 1])})
    save_torch(tmp_path / "nan.pt", good | {"mean": np.float32([1, np.nan, 1, 1])})
    save_torch(tmp_path / "half.pt", {"mean": good["mean"]})
    with pytest.raises(UserError, match=f"^--codec=kl:vavae.pt,{options}: .*{OPTIONS[options]}") as error:
        KLCodec.load(f"vavae.pt,{options}")
    assert "\n" not in str(error.value)


def test_the_folder_of_a_file_is_answered_with_its_name(file):
    (file.parent / "latents_stats.pt").write_bytes(b"")
    with pytest.raises(UserError, match=rf"has no config.json; .*, or one of its files, such as --codec kl:{file}$"):
        KLCodec.load(str(file.parent))


def test_options_belong_to_files(tmp_path):
    with pytest.raises(UserError, match=r"is a folder, whose config.json has its scale; stats= and scale= belong to"):
        KLCodec.load(f"{tmp_path},scale=2")
    with pytest.raises(AbsentCodecError, match="is no file; stats= and scale= belong to"):
        KLCodec.load(f"{tmp_path}/gone.pt,scale=2")
    (tmp_path / "a.txt").write_text("no weights")
    with pytest.raises(UserError, match=r"a.txt cannot be read \("):
        KLCodec.load(str(tmp_path / "a.txt"))
