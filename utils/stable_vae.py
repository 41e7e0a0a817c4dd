"""Codecs between images and what the model learns: one interface, so that nothing else asks which one is in use.

A codec is a pytree (its parameters, if any, are arguments of the compiled programs) with
`encode(key, images)` -> latents, `decode(latents)` -> images, and `latent_shape(image_shape)`.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8


def images_from_uint8(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Images in [-1, 1]: x / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def images_to_uint8(images: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """Images in [-1, 1] clipped and rounded to 0 .. 255, as they would be written to a file."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


class PixelCodec(flax.struct.PyTreeNode):
    """The codec of pixel models: latents are the images."""

    def encode(self, key: Key[Array, ""], images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return images

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return latents

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return image_shape
