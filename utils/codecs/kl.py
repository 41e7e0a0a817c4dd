"""The KL autoencoder of latent diffusion (Rombach et al., arXiv:2112.10752) as a codec.

Stable Diffusion's, SDXL's, SD3's and FLUX's are read from the Hugging Face layout: config.json and
diffusion_pytorch_model.safetensors.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Key, PyTree

from utils.base.files import file_sha256
from utils.base.messages import UserError
from utils.codecs.codec import latent_sides
from utils.codecs.kl_files import draw_params, find_files, read_config, read_params, write_files
from utils.kernels.ops import attention

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


# The modules below are named as the tensors in the weights file are, so that one rule converts all of them.


class KLModule(nn.Module):
    """Layers that all parts have. Normalisation takes its statistics in float32, whatever the compute dtype."""

    config: KLConfig
    dtype: Any

    def conv(self, channels: int, name: str, side: int = 3, **kwargs) -> nn.Conv:
        return nn.Conv(channels, (side, side), dtype=self.dtype, name=name, **kwargs)

    def norm(self, name: str) -> nn.GroupNorm:
        return nn.GroupNorm(self.config.norm_num_groups, epsilon=1e-6, dtype=self.dtype, name=name)


class ResnetBlock(KLModule):
    """Two convolutions beside a shortcut, (b, h, w, c) -> (b, h, w, channels)."""

    channels: int

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.channels, "conv1")(nn.silu(self.norm("norm1")(x)))
        y = self.conv(self.channels, "conv2")(nn.silu(self.norm("norm2")(y)))
        return y + (x if x.shape[-1] == self.channels else self.conv(self.channels, "conv_shortcut", side=1)(x))


class AttentionBlock(KLModule):
    """Self-attention with one head over all positions."""

    @nn.compact
    def __call__(self, x):
        # One head as wide as the channels: positions are the sequence.
        b, h, w, c = x.shape
        y = self.norm("group_norm")(x).reshape(b, h * w, 1, c)
        query, key, value = (nn.Dense(c, dtype=self.dtype, name=f"to_{name}")(y) for name in "qkv")
        y = attention(query, key, value)
        return x + nn.Dense(c, dtype=self.dtype, name="to_out_0")(y).reshape(x.shape)


class MidBlock(KLModule):
    @nn.compact
    def __call__(self, x):
        x = ResnetBlock(self.config, self.dtype, x.shape[-1], name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = AttentionBlock(self.config, self.dtype, name="attentions_0")(x)
        return ResnetBlock(self.config, self.dtype, x.shape[-1], name="resnets_1")(x)


class Downsampler(KLModule):
    @nn.compact
    def __call__(self, x):
        return self.conv(x.shape[-1], "conv", strides=2, padding=((0, 1), (0, 1)))(x)  # right and bottom only


class Upsampler(KLModule):
    @nn.compact
    def __call__(self, x):
        return self.conv(x.shape[-1], "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class Stage(KLModule):
    """A stage of `depth` residual blocks of one width, then, if `resample` names one, a change of size."""

    channels: int
    depth: int
    resample: str | None  # 'downsamplers_0' or 'upsamplers_0'

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = ResnetBlock(self.config, self.dtype, self.channels, name=f"resnets_{i}")(x)
        if self.resample is None:
            return x
        kind = Downsampler if self.resample.startswith("down") else Upsampler
        return kind(self.config, self.dtype, name=self.resample)(x)


class Encoder(KLModule):
    """Images (b, h, w, 3) in [-1, 1] -> (b, h/f, w/f, 2 c): mean and log-variance before the last 1x1 convolution."""

    @nn.compact
    def __call__(self, x):
        widths = self.config.block_out_channels
        depth = self.config.layers_per_block
        x = self.conv(widths[0], "conv_in")(x.astype(self.dtype))
        # All stages but the last halve the sides.
        for i, width in enumerate(widths):
            resample = "downsamplers_0" if i < len(widths) - 1 else None
            x = Stage(self.config, self.dtype, width, depth, resample, name=f"down_blocks_{i}")(x)
        x = MidBlock(self.config, self.dtype, name="mid_block")(x)
        return self.conv(2 * self.config.latent_channels, "conv_out")(nn.silu(self.norm("conv_norm_out")(x)))


class Decoder(KLModule):
    """Latents (b, h, w, c) -> images (b, f h, f w, 3)."""

    @nn.compact
    def __call__(self, x):
        widths = self.config.block_out_channels[::-1]
        # One block more in each stage than in the encoder, as in the reference network.
        depth = self.config.layers_per_block + 1
        x = self.conv(widths[0], "conv_in")(x.astype(self.dtype))
        x = MidBlock(self.config, self.dtype, name="mid_block")(x)
        # All stages but the last double the sides.
        for i, width in enumerate(widths):
            resample = "upsamplers_0" if i < len(widths) - 1 else None
            x = Stage(self.config, self.dtype, width, depth, resample, name=f"up_blocks_{i}")(x)
        return self.conv(self.config.out_channels, "conv_out")(nn.silu(self.norm("conv_norm_out")(x)))


class AutoencoderKL(KLModule):
    """The network; `encode` and `decode` neither scale nor shift latents."""

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        channels = self.config.latent_channels
        self.quant_conv = self.pointwise_conv(2 * channels) if self.config.use_quant_conv else None
        self.post_quant_conv = self.pointwise_conv(channels) if self.config.use_post_quant_conv else None

    def pointwise_conv(self, channels: int) -> nn.Conv:
        return nn.Conv(channels, kernel_size=(1, 1), dtype=self.dtype)

    def encode(self, images):
        x = self.encoder(images)
        return self.quant_conv(x) if self.quant_conv else x

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z.astype(self.dtype)) if self.post_quant_conv else z)

    # For initialisation alone: it passes through every layer once.
    def __call__(self, images):
        return self.decode(jnp.split(self.encode(images), 2, axis=-1)[0])


class KLCodec(flax.struct.PyTreeNode):
    """KL autoencoder as a codec. Parameters are float32, `dtype` is the compute dtype, results are float32."""

    # Only the parameters are leaves; the rest is what functions are compiled for.
    params: PyTree
    config: KLConfig = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    sha256: str = flax.struct.field(pytree_node=False)  # of the weights file; empty for random weights
    source: str = flax.struct.field(pytree_node=False, default="random weights")  # the folder or hub id it came from

    @classmethod
    def load(cls, path: str, dtype: Any = jnp.float32) -> "KLCodec":
        """Loads the VAE in a folder (or in its subfolder `vae`), else of that id on the Hugging Face hub.

        Raises UserError, naming --codec=kl:PATH and what to do, where it cannot be found, is broken, or has another
        architecture.
        """
        shown = f"--codec=kl:{path}"
        # The configuration first: a small file, which says what the weights must be.
        config_file, weights_file = find_files(path, shown)
        content = read_config(config_file, shown, "kl", path)
        config = KLConfig.from_dict(content, str(config_file), shown)

        # Sizes that contradict each other are reported before weights are read.
        try:
            shapes = _param_shapes(config)
            np.broadcast_to(config.scale * config.shift, config.latent_channels)
        except (TypeError, ValueError, ArithmeticError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{shown}: no VAE has the sizes in {config_file} ({reason}); fetch it again") from None
        params = read_params(weights_file, shapes, shown)
        return cls(params, config, jnp.dtype(dtype), file_sha256(weights_file), path)

    @classmethod
    def random(cls, seed: int, config: KLConfig | None = None, dtype: Any = jnp.float32) -> "KLCodec":
        """Returns a codec with random weights that keep the variance of their inputs, for tests and measurements.

        `config` defaults to the sizes of Stable Diffusion's VAE.
        """
        config = config or KLConfig()
        return cls(draw_params(seed, _param_shapes(config)), config, jnp.dtype(dtype), "")

    def save(self, folder: Path) -> None:
        """Writes the codec in the Hugging Face layout, which `load` and diffusers read."""
        write_files(folder, self.config.to_dict(), self.params)

    def encode_moments(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b h2 w2 c"], Float[Array, "b h2 w2 c"]]:
        """Returns (mean, log-variance) of the posterior of images in [-1, 1], neither scaled nor shifted."""
        moments = self._apply(images, "encode").astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        # The bounds of the reference implementation, so that the deviation is finite.
        return mean, jnp.clip(logvar, -30, 20)

    def sample_latents(
        self, key: Key[Array, "*b"], mean: Float[Array, "b h w c"], logvar: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        """Returns a sample of the posterior, scaled to about unit variance.

        `key` is one for each example, or one to be split among them.
        """
        # Moments from a cache are float16.
        mean = mean.astype(jnp.float32)
        logvar = logvar.astype(jnp.float32)

        # Noise by example, whatever the batch that it is encoded in.
        keys = key if key.ndim else jax.random.split(key, len(mean))
        z = mean + jnp.exp(logvar / 2) * jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return (z - self.config.shift) * self.config.scale

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        """Returns scaled latents of images in [-1, 1]; `key` as `sample_latents` takes it."""
        return self.sample_latents(key, *self.encode_moments(images))

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Returns images, about in [-1, 1], of scaled latents."""
        return self._apply(latents / self.config.scale + self.config.shift, "decode").astype(jnp.float32)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns (h / f, w / f, c), where f is `downsampling`. Raises UserError for images that do not fit."""
        height, width = latent_sides(image_shape, self.config.in_channels, self.config.downsampling)
        return height, width, self.config.latent_channels

    def _apply(self, x, method):
        return AutoencoderKL(self.config, self.dtype).apply({"params": self.params}, x, method=method)


def _param_shapes(config: KLConfig) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    # The smallest image there is: shapes of parameters do not depend on its sides. Nothing is computed.
    image = jnp.zeros((1, config.downsampling, config.downsampling, config.in_channels))
    init = partial(AutoencoderKL(config, jnp.float32).init, jax.random.key(0))
    return flatten_dict(jax.eval_shape(init, image)["params"])
