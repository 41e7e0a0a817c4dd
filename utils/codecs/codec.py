"""Codecs, which turn images into the arrays that a model learns, and back.

A new codec is a class that implements `Codec`, and an entry of CODECS (utils/codecs/codecs.py); the programs then take
it as `--codec NAME`, or `--codec NAME:SOURCE`. A codec whose latents can be cached (`num_cached_arrays`) also works
with encode_latents.py.
"""

from typing import NoReturn, Protocol, runtime_checkable

import flax.struct
from jaxtyping import Array, Float, Key

from utils.base.messages import UserError
from utils.images.pixels import UINT8, PixelFormat
from utils.images.sizes import write_size


@runtime_checkable
class Codec(Protocol):
    """A way from images to latents and back. A pytree: its parameters, if any, are arguments of compiled functions.

    `IS_IDENTITY = True` says that latents are the images themselves, so that a density of latents is one of images.
    `IS_DETERMINISTIC = True` says that `encode` draws nothing, so that its latents can be cached.
    """

    @property
    def sha256(self) -> str | None:
        """Hash of the weights; None for a codec without weights."""

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Returns latents of images in [-1, 1]. `key` is one for each example, or one to be split among them."""

    def decode(self, latents: Float[Array, "b h2 w2 c2"]) -> Float[Array, "b h w c"]:
        """Returns images, about in [-1, 1]."""

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns (h2, w2, c2) for images (h, w, c). Raises UserError where the codec does not take them."""


@runtime_checkable
class MomentCodec(Codec, Protocol):
    """A codec whose latents have a mean and log-variance that can be cached."""

    def encode_moments(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h2 w2 c2"], Float[Array, "b h2 w2 c2"]]:
        """Returns (mean, log-variance) of the posterior of images in [-1, 1]."""

    def sample_latents(
        self, key: Key[Array, "*b"], mean: Float[Array, "b h w c"], logvar: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        """Returns latents drawn from the posterior, scaled as those of `encode`."""


class PixelCodec(flax.struct.PyTreeNode):
    """The codec of models of pixels: latents are the images."""

    IS_IDENTITY = True
    pixels: PixelFormat = flax.struct.field(pytree_node=False, default=UINT8)  # of the data

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return images

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return latents

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return image_shape

    @property
    def sha256(self) -> None:
        return None


class AbsentCodec(flax.struct.PyTreeNode):
    """The codec of a run whose weights cannot be loaded: latents can be drawn, images cannot.

    Raises UserError with `reason` where it is asked for images or for their latents.
    """

    # Not arrays, hence static: the pytree has no leaves.
    reason: str = flax.struct.field(pytree_node=False)
    shape: tuple[int, int, int] = flax.struct.field(pytree_node=False)  # of the latents

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w c"]) -> NoReturn:
        raise UserError(self.reason)

    def decode(self, latents: Float[Array, "b h w c"]) -> NoReturn:
        raise UserError(self.reason)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return self.shape

    @property
    def sha256(self) -> None:
        return None


def is_identity(codec: Codec) -> bool:
    """Whether latents are the images themselves."""
    return getattr(codec, "IS_IDENTITY", False)


def num_cached_arrays(codec: Codec) -> int | None:
    """Returns how many arrays encode_latents.py keeps of an image: 1, its latents, of a deterministic codec; 2, their
    mean and log-variance, where there are moments; None where nothing can be kept."""
    # First: a codec that has moments may still take the mean alone.
    if getattr(codec, "IS_DETERMINISTIC", False):
        return 1
    return 2 if isinstance(codec, MomentCodec) else None


def latent_sides(image_shape: tuple[int, int, int], num_channels: int, factor: int) -> tuple[int, int]:
    """Returns the sides (h / factor, w / factor) of the latents of images (h, w, c) under an autoencoder.

    Raises UserError where the images have other than `num_channels` channels, or sides that are no multiples of
    `factor`.
    """
    # The size that an error proposes is the next smaller multiple.
    height, width, channels = image_shape
    if channels != num_channels:
        raise UserError(
            f"the VAE takes images of {num_channels} channels, not {channels}; train on pixels with --codec pixels"
        )
    if height % factor or width % factor:
        fitting = write_size([max(1, side // factor) * factor for side in (height, width)])
        raise UserError(
            f"the VAE takes images whose sides are multiples of {factor}, not {height}x{width}; "
            f"use --image_size {fitting}, or pixels with --codec pixels"
        )
    return height // factor, width // factor


def pixel_format(codec: Codec) -> PixelFormat:
    """Returns the format of the images that a codec encodes and decodes: uint8, except for pixels."""
    return codec.pixels if isinstance(codec, PixelCodec) else UINT8


def set_pixel_format(codec: Codec, pixels: PixelFormat) -> Codec:
    """Returns the codec for images of this format. Raises UserError where it takes uint8 alone."""
    # Only pixels can be of other formats; what other codecs decode becomes uint8.
    if isinstance(codec, PixelCodec):
        return codec.replace(pixels=pixels)
    if pixels != UINT8:
        raise UserError(f"--codec: the images are {pixels}, which pixels alone takes; use --codec pixels")
    return codec
