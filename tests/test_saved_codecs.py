"""A saved codec is the same network to diffusers: every field of the class's configuration, and every tensor."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from safetensors.flax import load_file as load_jax_file
from safetensors.numpy import load_file

from tests.conftest import GOLDEN
from utils.codecs.codecs import CODECS
from utils.codecs.kl import KLCodec
from utils.codecs.kl_config import Flux2Config, KLConfig
from utils.codecs.kl_files import CONFIG, WEIGHTS
from utils.codecs.tiny import TinyCodec, TinyConfig

# Of each class in diffusers, as its documentation has them: what it takes where a config.json leaves a field out.
KL = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64], "layers_per_block": 1, "act_fn": "silu",
    "latent_channels": 4, "norm_num_groups": 32, "sample_size": 32, "scaling_factor": 0.18215, "shift_factor": None,
    "latents_mean": None, "latents_std": None, "force_upcast": True, "use_quant_conv": True,
    "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
FLUX2 = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512],
    "decoder_block_out_channels": None, "layers_per_block": 2, "act_fn": "silu", "latent_channels": 32,
    "norm_num_groups": 32, "sample_size": 1024, "use_quant_conv": True, "use_post_quant_conv": True,
    "mid_block_add_attention": True, "batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1, "patch_size": [2, 2],
}  # fmt: skip
TINY = {
    "in_channels": 3, "out_channels": 3, "encoder_block_out_channels": [64] * 4, "decoder_block_out_channels": [64] * 4,
    "act_fn": "relu", "upsample_fn": "nearest", "latent_channels": 4, "upsampling_scaling_factor": 2,
    "num_encoder_blocks": [1, 3, 3, 3], "num_decoder_blocks": [3, 3, 3, 1], "latent_magnitude": 3, "latent_shift": 0.5,
    "force_upcast": False, "scaling_factor": 1.0,
}  # fmt: skip
DIFFUSERS = {"AutoencoderKL": KL, "AutoencoderKLFlux2": FLUX2, "AutoencoderTiny": TINY}

# Another value for every field, and how diffusers says what has other names there.
KL_OTHERS = {
    "in_channels": 1, "out_channels": 2, "block_out_channels": (4, 4, 8), "layers_per_block": 2, "latent_channels": 5,
    "norm_num_groups": 2, "mid_block_add_attention": False, "down_attention": (False, False, True),
    "up_attention": (True, False, False), "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 256,
    "scaling_factor": 0.5, "shift_factor": 0.25, "latents_mean": (1.0,) * 5, "latents_std": (2.0,) * 5,
    "force_upcast": False,
}  # fmt: skip
TYPES = {
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
}
OTHERS = {
    "AutoencoderKL": (KLCodec, KLConfig, KL_OTHERS, TYPES),
    "AutoencoderKLFlux2": (
        KLCodec,
        Flux2Config,
        {name: value for name, value in KL_OTHERS.items() if name in FLUX2 or name.endswith("attention")}
        | {"decoder_block_out_channels": (8, 4, 4), "batch_norm_eps": 1e-3, "batch_norm_momentum": 0.2},
        TYPES,
    ),
    "AutoencoderTiny": (
        TinyCodec,
        TinyConfig,
        {
            "in_channels": 1, "out_channels": 1, "latent_channels": 16, "encoder_block_out_channels": (4, 4),
            "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (2, 1), "num_decoder_blocks": (1, 2),
            "latent_magnitude": 4, "latent_shift": 0.25, "scaling_factor": 2.0, "force_upcast": True,
        },
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["vae_tiny", "kl_attn", "kl_flux2", "tiny_small"])
def test_what_diffusers_wrote_comes_back(name, tmp_path):
    given = json.loads((GOLDEN / name / CONFIG).read_text())
    del given["_diffusers_version"]
    assert given.keys() == {"_class_name", *DIFFUSERS[given["_class_name"]]} - (
        {"upsample_fn"} if "upsample_fn" not in given else set()
    )
    kind = CODECS["tiny" if name == "tiny_small" else "kl"]
    kind.load(str(GOLDEN / name)).save(tmp_path / "vae")  # as in a pipeline's folder
    assert json.loads((tmp_path / "vae" / CONFIG).read_text()) == given
    tensors, expected = load_file(tmp_path / "vae" / WEIGHTS), load_jax_file(GOLDEN / name / WEIGHTS)
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert tensors[key].dtype == (np.int64 if key.endswith("num_batches_tracked") else np.float32)
        if tensors[key].dtype == np.float32:
            exact = np.asarray(value).astype(np.float32)
            np.testing.assert_array_equal(tensors[key].reshape(value.shape), exact, key)
    assert kind.load(str(tmp_path)).sha256 == hashlib.sha256((tmp_path / "vae" / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_is_saved(name, tmp_path):
    codec, kind, others, types = OTHERS[name]
    known = {field.name for field in dataclasses.fields(kind)} - getattr(kind, "ABSENT", set()) - {"patch_size"}
    assert others.keys() == known
    made = codec.random(0, kind(**others))
    made.save(tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text())
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in others.items()}
    expected = {key: value for key, value in lists.items() if not key.endswith("attention") or key in saved} | types
    assert DIFFUSERS[name] | saved == {"_class_name": name, **DIFFUSERS[name], **expected}
    assert codec.load(str(tmp_path)).config == made.config
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {tmp_path.joinpath(CONFIG).stat().st_mode}
