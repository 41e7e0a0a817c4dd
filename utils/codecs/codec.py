"""The interface of codecs, between images and what the model learns. Only likelihoods ask for the codec of pixels."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Key


@runtime_checkable
class Codec(Protocol):
    """A pytree: its parameters, if any, are arguments of the compiled functions."""

    @property
    def sha256(self) -> str | None:
        """Of the weights; None of a codec without."""

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Latents of images in [-1, 1]. `key` is one for each example, or one to be split among them."""

    def decode(self, latents: Float[Array, "b h2 w2 c2"]) -> Float[Array, "b h w c"]:
        """Images, about in [-1, 1]."""

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(h2, w2, c2) of images (h, w, c); UserError where the codec does not take them."""


@runtime_checkable
class MomentCodec(Codec, Protocol):
    """A codec of which the mean and log-variance of the latents can be cached."""

    def sample_latents(
        self, key: Key[Array, "*b"], mean: Float[Array, "b h w c"], logvar: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        """Latents drawn from the posterior, scaled as those of `encode`."""
