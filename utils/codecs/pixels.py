"""The codec of pixel models."""

import flax.struct
from jaxtyping import Array, Float, Key


class PixelCodec(flax.struct.PyTreeNode):
    """Latents are the images."""

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return images

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return latents

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return image_shape

    @property
    def sha256(self) -> None:
        """A codec without weights has no hash of them."""
        return None
