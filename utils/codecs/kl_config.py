"""Sizes of KL autoencoders, as diffusers' config.json has them."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np

from utils.base.messages import UserError

# Far above any VAE in use, whose latents have 4 to 32 channels.
MAX_LATENT_CHANNELS = 256

# Types of stages, in the order from the image to the latents and back, and whether they have attention.
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """Contents of config.json; a key that a file leaves out has the default, which is Stable Diffusion's."""

    CLASS_NAME: ClassVar[str] = "AutoencoderKL"
    ABSENT: ClassVar[frozenset[str]] = frozenset()  # fields that this class's config.json does not have

    # Sizes of the network.
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    # Whether each stage has attention after each of its blocks, in the order of the network; empty: none has.
    down_attention: tuple[bool, ...] = ()
    up_attention: tuple[bool, ...] = ()
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
        _refuse_other(content.get("act_fn") or "silu", ["silu"], "act_fn", path, shown)
        down = _read_types(content, "down_block_types", DOWN_BLOCKS, path, shown)
        up = _read_types(content, "up_block_types", UP_BLOCKS, path, shown)

        # Some files have null for their scaling factor, or odd values for what is not used here.
        names = {field.name for field in dataclasses.fields(cls)} - cls.ABSENT
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
            if name in names and not (value is None and name == "scaling_factor")
        }
        for name, kind in {"sample_size": int, "force_upcast": bool}.items():
            if type(values.get(name)) is not kind:
                values.pop(name, None)
        # The same network has the same configuration, however its lack of attention is said.
        values["down_attention"] = down if any(down) else ()
        values["up_attention"] = up if any(up) else ()

        # Checked before any size reaches an allocation.
        config = cls(**values)
        config.check(path, shown)
        for name, types in {"down_block_types": down, "up_block_types": up}.items():
            config.check_stages(name, types, path, shown)
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

    def check_stages(self, name: str, values: tuple, path: str, shown: str) -> None:
        """Raises UserError, naming `shown` and `path`, where there are `values`, but not one for each stage."""
        found, known = len(values), len(self.block_out_channels)
        if values and found != known:
            raise UserError(
                f"{shown}: {path} has {name} of {found} stages, but block_out_channels of {known}; fetch it again"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a config.json: everything where this network may differ from diffusers' defaults."""
        none = (False,) * len(self.block_out_channels)
        down, up = ({has: name for name, has in blocks.items()} for blocks in (DOWN_BLOCKS, UP_BLOCKS))
        left_out = {"down_attention", "up_attention", *self.ABSENT}
        return {
            "_class_name": self.CLASS_NAME,
            "act_fn": "silu",
            "down_block_types": [down[has] for has in self.down_attention or none],
            "up_block_types": [up[has] for has in self.up_attention or none],
            **{name: value for name, value in dataclasses.asdict(self).items() if name not in left_out},
        }

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Widths of the decoder's stages, in the order of `block_out_channels`."""
        return self.block_out_channels

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


@dataclasses.dataclass(frozen=True)
class Flux2Config(KLConfig):
    """Contents of FLUX.2's config.json. Its latents are patches of the network's, normalised by running statistics."""

    CLASS_NAME: ClassVar[str] = "AutoencoderKLFlux2"
    ABSENT: ClassVar[frozenset[str]] = frozenset(
        ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
    )

    latent_channels: int = 32
    sample_size: int = 1024
    decoder_block_out_channels: tuple[int, ...] | None = None  # widths of the decoder, where they are its own
    patch_size: tuple[int, ...] = (2, 2)
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1  # not used here, as `sample_size`

    def check(self, path: str, shown: str) -> None:
        super().check(path, shown)
        if self.patch_size != (2, 2):
            raise UserError(f"{shown}: {path} has patch_size {self.patch_size}, but only [2, 2] is known here")

        # The decoder's widths are bounded as the encoder's; the constants of its normalisation are numbers.
        widths = self.decoder_block_out_channels
        is_good = {
            "decoder_block_out_channels": widths is None or _are_widths(widths),
            "batch_norm_eps": type(self.batch_norm_eps) in (int, float) and 0 < self.batch_norm_eps <= 1,
            "batch_norm_momentum": type(self.batch_norm_momentum) in (int, float, type(None)),
        }
        for name, good in is_good.items():
            if not good:
                value = str(getattr(self, name))[:100]
                raise UserError(f"{shown}: no VAE has the sizes in {path} ({name} {value}); fetch it again")
        self.check_stages("decoder_block_out_channels", widths or (), path, shown)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def downsampling(self) -> int:
        return 2 * super().downsampling  # patches of 2x2


def _are_widths(values: Any) -> bool:
    return isinstance(values, tuple) and values != () and all(type(x) is int and 1 <= x <= 2048 for x in values)


def read_kl_config(content: Mapping[str, Any], path: str, shown: str) -> KLConfig:
    """Returns the configuration of the class that a config.json names; without a name, it is AutoencoderKL's.

    Raises UserError, naming the flag `shown` and `path`, where it is of another network.
    """
    kinds = {kind.CLASS_NAME: kind for kind in (KLConfig, Flux2Config)}
    name = content.get("_class_name") or KLConfig.CLASS_NAME
    _refuse_other(name, kinds, "_class_name", path, shown)
    return kinds[name].from_dict(content, path, shown)


def _refuse_other(value: Any, known: Collection[str], name: str, path: str, shown: str) -> None:
    """Raises UserError, naming the flag `shown` and `path`, where the value under `name` is not a known one."""
    if not (isinstance(value, str) and value in known):
        are = "are" if len(known) > 1 else "is"
        known_names = " and ".join(known)
        raise UserError(f"{shown}: {path} has {name} {str(value)[:100]}, but only {known_names} {are} known here")


def _read_types(
    content: Mapping[str, Any], name: str, known: Mapping[str, bool], path: str, shown: str
) -> tuple[bool, ...]:
    """Returns whether each stage has attention; empty where the types of stages are not said."""
    found = content.get(name) or []
    types = found if isinstance(found, list) else [found]
    for kind in types:
        _refuse_other(kind, known, name, path, shown)
    return tuple(known[kind] for kind in types)
