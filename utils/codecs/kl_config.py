"""Sizes of KL autoencoders, as diffusers' config.json has them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from utils.base.messages import UserError

# Far above any VAE in use, whose latents have 4 to 32 channels.
MAX_LATENT_CHANNELS = 256


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """Contents of config.json; a key that a file leaves out has the default, which is Stable Diffusion's."""

    # Sizes of the network.
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    # 1x1 convolutions on either side of the latents; SD3 and FLUX have none.
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    # What brings latents to about unit variance: for all channels, or for each.
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    # Not used here: other programs expect them in a file that `KLCodec.save` writes.
    sample_size: int = 32
    force_upcast: bool = True

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], path: str, shown: str) -> "KLConfig":
        """Returns the configuration in the content of a config.json.

        Raises UserError, naming the flag `shown` and `path`, where it is of another network.
        """
        # Another kind of network first, since its other keys would mislead.
        kinds = {
            "_class_name": {"AutoencoderKL"},
            "down_block_types": {"DownEncoderBlock2D"},
            "up_block_types": {"UpDecoderBlock2D"},
            "act_fn": {"silu"},
        }
        for name, known in kinds.items():
            found = content.get(name) or []
            unknown = set([found] if isinstance(found, str) else found) - known
            if unknown:
                raise UserError(f"{shown}: {path} has {name} {min(unknown)}, but only {min(known)} is known here")

        # Some files have null for their scaling factor, or odd values for what is not used here.
        names = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
            if name in names and not (value is None and name == "scaling_factor")
        }
        for name, kind in {"sample_size": int, "force_upcast": bool}.items():
            if type(values.get(name)) is not kind:
                values.pop(name, None)

        # Checked before any size reaches an allocation.
        config = cls(**values)
        config.check(path, shown)
        return config

    def check(self, path: str, shown: str) -> None:
        """Raises UserError, naming the flag `shown` and `path`, for values that no VAE in use comes near."""

        # Tests of one value. A type must be exact: True is no integer here.
        def is_number(value, low, high):
            return type(value) in (int, float) and math.isfinite(value) and low <= value <= high

        def are(values, test):
            return isinstance(values, tuple) and 0 < len(values) <= MAX_LATENT_CHANNELS and all(map(test, values))

        def is_count(most):
            return lambda value: type(value) is int and 1 <= value <= most

        # Bounds far above any VAE in use, but far below what fills a memory.
        rules = {
            "in_channels": is_count(4),
            "out_channels": is_count(4),
            "block_out_channels": lambda value: are(value, is_count(2048)) and len(value) <= 8,
            "layers_per_block": is_count(16),
            "latent_channels": is_count(MAX_LATENT_CHANNELS),
            "norm_num_groups": is_count(2048),
            "mid_block_add_attention": lambda value: isinstance(value, bool),
            "use_quant_conv": lambda value: isinstance(value, bool),
            "use_post_quant_conv": lambda value: isinstance(value, bool),
            # Factors of latents: finite, and divided by when decoding.
            "scaling_factor": lambda value: is_number(value, 1e-6, 1e6),
            "shift_factor": lambda value: value is None or is_number(value, -1e6, 1e6),
            "latents_mean": lambda value: value is None or are(value, lambda x: is_number(x, -1e6, 1e6)),
            "latents_std": lambda value: value is None or are(value, lambda x: is_number(x, 1e-6, 1e6)),
        }
        for name, is_good in rules.items():
            if not is_good(getattr(self, name)):
                value = str(getattr(self, name))[:100]
                raise UserError(f"{shown}: no VAE has the sizes in {path} ({name} {value}); fetch it again")

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a config.json: everything where this network may differ from diffusers' defaults."""
        depth = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * depth,
            "up_block_types": ["UpDecoderBlock2D"] * depth,
            **dataclasses.asdict(self),
        }

    @property
    def downsampling(self) -> int:
        """Image side over latent side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def shift(self) -> np.ndarray:
        """Shift that is subtracted from latents before `scale` multiplies them: one number, or one for each channel."""
        return np.array((self.shift_factor or 0) if self.latents_mean is None else self.latents_mean, np.float32)

    @property
    def scale(self) -> np.ndarray:
        """Factor that brings shifted latents to about unit variance: one number, or one for each channel."""
        return np.asarray(np.float32(self.scaling_factor) / np.array(self.latents_std or 1, np.float32))
