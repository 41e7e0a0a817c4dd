"""The tiny autoencoder (TAESD, github.com/madebyollin/taesd) as a codec.

TAESD, TAESDXL, TAESD3 and TAEF1 are read from the Hugging Face layout of diffusers' AutoencoderTiny. Their latents are
those of the KL autoencoder that they are distilled from, already scaled: about of unit variance.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Key, PyTree

from utils.base.files import file_sha256
from utils.base.messages import UserError
from utils.codecs.codec import latent_sides
from utils.codecs.kl_files import draw_params, find_files, read_config, read_params, write_files

# The autoencoder of --codec tiny without a source; its latents are Stable Diffusion's.
DEFAULT_HUB_ID = "madebyollin/taesd"


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """Contents of config.json; a key that a file leaves out has the default, which is TAESD's.

    Stages of the encoder go from the image to the latents, those of the decoder from the latents to the image.
    """

    # Sizes of the network: the width of each stage, and its blocks.
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    # Not used here: other programs expect them in a file that `TinyCodec.save` writes. The first two are for latents
    # that are stored as bytes; diffusers' network neither scales nor shifts.
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0
    force_upcast: bool = False

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], path: str, shown: str) -> "TinyConfig":
        """Returns the configuration in the content of a config.json.

        Raises UserError, naming the flag `shown` and `path`, where it is of another network.
        """
        # Another network first, since its other keys would mislead.
        kinds = {"_class_name": "AutoencoderTiny", "act_fn": "relu", "upsample_fn": "nearest"}
        for name, known in {**kinds, "upsampling_scaling_factor": 2}.items():
            found = content.get(name, known)
            if found != known:
                raise UserError(f"{shown}: {path} has {name} {str(found)[:100]}, but only {known} is known here")

        # Checked before any size reaches an allocation.
        names = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items() if name in names
        }
        config = cls(**values)
        config.check(path, shown)
        return config

    def check(self, path: str, shown: str) -> None:
        """Raises UserError, naming the flag `shown` and `path`, for a network that cannot be built."""

        # Tests of one value. A type must be exact: True is no integer here.
        def is_count(value, most):
            return type(value) is int and 1 <= value <= most

        def is_number(value):
            return type(value) in (int, float) and math.isfinite(value)

        def are_counts(values, most):
            return isinstance(values, tuple) and 0 < len(values) <= 8 and all(is_count(value, most) for value in values)

        # Bounds far above any autoencoder in use. No layer changes the width, so that stages have one.
        rules = {
            "in_channels": lambda value: is_count(value, 4),
            "out_channels": lambda value: is_count(value, 4) and value == self.in_channels,
            "latent_channels": lambda value: is_count(value, 256),
            "encoder_block_out_channels": lambda value: are_counts(value, 2048) and len(set(value)) == 1,
            "decoder_block_out_channels": lambda value: are_counts(value, 2048) and len(set(value)) == 1,
            "num_encoder_blocks": lambda value: are_counts(value, 64),
            "num_decoder_blocks": lambda value: are_counts(value, 64),
            "latent_magnitude": is_number,
            "latent_shift": is_number,
            "scaling_factor": is_number,
            "force_upcast": lambda value: isinstance(value, bool),
        }
        for name, is_good in rules.items():
            if not is_good(getattr(self, name)):
                value = str(getattr(self, name))[:100]
                raise UserError(f"{shown}: no AutoencoderTiny has the sizes in {path} ({name} {value}); fetch it again")

        # Every stage needs its width and its blocks, and the decoder as many stages as the encoder.
        for name in ("decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks"):
            found = len(getattr(self, name))
            if found != self.num_stages:
                raise UserError(
                    f"{shown}: {path} has {name} of {found} stages, but encoder_block_out_channels of "
                    f"{self.num_stages}; fetch it again"
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a config.json, as diffusers writes it."""
        fixed = {"_class_name": "AutoencoderTiny", "act_fn": "relu", "upsampling_scaling_factor": 2}
        return {**fixed, **dataclasses.asdict(self)}

    @property
    def num_stages(self) -> int:
        return len(self.encoder_block_out_channels)

    @property
    def downsampling(self) -> int:
        """Image side over latent side."""
        return 2 ** (self.num_stages - 1)


# The modules below are named as the tensors in the weights file are: layers by their place in a list, in which
# activations and changes of size have a number, too.


class TinyModule(nn.Module):
    """Layers that all parts have."""

    config: TinyConfig
    dtype: Any

    def conv(self, channels: int, name: str, **kwargs) -> nn.Conv:
        # Zeros on all four sides, at stride 2, too, where Flax's own padding is of two sides.
        return nn.Conv(channels, (3, 3), padding=((1, 1), (1, 1)), dtype=self.dtype, name=name, **kwargs)


class TinyBlock(TinyModule):
    """Three convolutions beside the identity, (b, h, w, c) -> (b, h, w, c)."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.conv(x.shape[-1], "conv_0")(x))
        y = nn.relu(self.conv(x.shape[-1], "conv_2")(y))
        return nn.relu(x + self.conv(x.shape[-1], "conv_4")(y))


class TinyEncoder(TinyModule):
    """Images (b, h, w, 3) in [-1, 1] -> latents (b, h/f, w/f, c)."""

    @nn.compact
    def __call__(self, x):
        names = (f"layers_{i}" for i in itertools.count())
        stages = zip(self.config.encoder_block_out_channels, self.config.num_encoder_blocks, strict=True)
        # The network knows images in [0, 1]. All stages but the first halve the sides.
        x = ((x + 1) / 2).astype(self.dtype)
        for i, (width, depth) in enumerate(stages):
            x = self.conv(width, next(names), **({"strides": 2, "use_bias": False} if i else {}))(x)
            for _ in range(depth):
                x = TinyBlock(self.config, self.dtype, name=next(names))(x)
        return self.conv(self.config.latent_channels, next(names))(x)


class TinyDecoder(TinyModule):
    """Latents (b, h, w, c) -> images (b, f h, f w, 3), about in [-1, 1]."""

    @nn.compact
    def __call__(self, z):
        names = (f"layers_{i}" for i in itertools.count())
        widths = self.config.decoder_block_out_channels
        # Latents beyond 3 are bent back, in float32, whatever the compute dtype.
        x = (3 * jnp.tanh(z / 3)).astype(self.dtype)
        x = nn.relu(self.conv(widths[0], next(names))(x))
        next(names)  # of the activation

        # All stages but the last double the sides.
        for i, depth in enumerate(self.config.num_decoder_blocks):
            for _ in range(depth):
                x = TinyBlock(self.config, self.dtype, name=next(names))(x)
            if i < len(widths) - 1:
                next(names)  # of the change of size
                x = self.conv(widths[i], next(names), use_bias=False)(x.repeat(2, axis=1).repeat(2, axis=2))
        x = self.conv(self.config.out_channels, next(names))(x)
        return 2 * x.astype(jnp.float32) - 1


class AutoencoderTiny(TinyModule):
    """The network of both directions."""

    def setup(self):
        self.encoder = TinyEncoder(self.config, self.dtype)
        self.decoder = TinyDecoder(self.config, self.dtype)

    def encode(self, images):
        return self.encoder(images)

    def decode(self, z):
        return self.decoder(z)

    # For initialisation alone: it passes through every layer once.
    def __call__(self, images):
        return self.decode(self.encode(images))


class TinyCodec(flax.struct.PyTreeNode):
    """Tiny autoencoder as a codec. Parameters are float32, `dtype` is the compute dtype, results are float32."""

    IS_DETERMINISTIC = True  # there is no posterior to draw from
    # Only the parameters are leaves; the rest is what functions are compiled for.
    params: PyTree
    config: TinyConfig = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    sha256: str = flax.struct.field(pytree_node=False)  # of the weights file; empty for random weights
    source: str = flax.struct.field(pytree_node=False, default="random weights")  # the folder or hub id it came from

    @classmethod
    def load(cls, path: str, dtype: Any = jnp.float32) -> "TinyCodec":
        """Loads the autoencoder in a folder (or in its subfolder `vae`), else of that id on the Hugging Face hub.

        Raises UserError, naming --codec=tiny:PATH and what to do, where it cannot be found, is broken, or has another
        architecture.
        """
        shown = f"--codec=tiny:{path}"
        config_file, weights_file = find_files(path, shown, "tiny", DEFAULT_HUB_ID)
        content = read_config(config_file, shown, "tiny", path)
        config = TinyConfig.from_dict(content, str(config_file), shown)
        params = read_params(weights_file, _param_shapes(config), shown)
        return cls(params, config, jnp.dtype(dtype), file_sha256(weights_file), path)

    @classmethod
    def random(cls, seed: int, config: TinyConfig | None = None, dtype: Any = jnp.float32) -> "TinyCodec":
        """Returns a codec with random weights, for tests and measurements; `config` defaults to TAESD's."""
        config = config or TinyConfig()
        return cls(draw_params(seed, _param_shapes(config)), config, jnp.dtype(dtype), "")

    def save(self, folder: Path) -> None:
        """Writes the codec in the Hugging Face layout, which `load` and diffusers read."""
        write_files(folder, self.config.to_dict(), self.params)

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        """Returns latents of images in [-1, 1]; `key` is not used."""
        return self._apply(images, "encode").astype(jnp.float32)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Returns images, about in [-1, 1]."""
        return self._apply(latents, "decode")

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns (h / f, w / f, c), where f is `downsampling`. Raises UserError for images that do not fit."""
        height, width = latent_sides(image_shape, self.config.in_channels, self.config.downsampling)
        return height, width, self.config.latent_channels

    def _apply(self, x, method):
        return AutoencoderTiny(self.config, self.dtype).apply({"params": self.params}, x, method=method)


def _param_shapes(config: TinyConfig) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    # The smallest image there is: shapes of parameters do not depend on its sides. Nothing is computed.
    image = jnp.zeros((1, config.downsampling, config.downsampling, config.in_channels))
    init = partial(AutoencoderTiny(config, jnp.float32).init, jax.random.key(0))
    return flatten_dict(jax.eval_shape(init, image)["params"])
