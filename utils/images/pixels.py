"""Images as arrays: uint8 for files, float32 in [-1, 1] for networks."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from utils.base.devices import gather


def images_from_uint8(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Returns images in [-1, 1]: x / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def images_to_uint8(images: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """Clips images in [-1, 1] and rounds them to 0 .. 255, as they would be written to a file."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def match_channels(images: UInt8[np.ndarray, "b h w c"], channels: int) -> UInt8[np.ndarray, "b h w channels"]:
    """Returns images of 1 or 3 channels: colours made grey (ITU-R 601 luma, by Pillow), grey levels repeated."""
    if images.shape[-1] == channels:
        return images
    if channels == 1:
        return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
    return np.repeat(images, 3, axis=-1)


class ImageBatch(NamedTuple):
    """Images on the devices, with labels if they are known; rows after the first `count` are padding."""

    images: UInt8[Array, "b h w c"]
    labels: Int[Array, " b"] | None
    count: int
    nfe: Int[Array, " b"] | None = None  # evaluations of the velocity that each took; adaptive solvers only

    def to_host(self) -> tuple[UInt8[np.ndarray, "count h w c"], Int[np.ndarray, " count"]]:
        """Returns (images, labels) without the padding. Raises ValueError if the labels are not known."""
        if self.labels is None:
            raise ValueError("the labels of these images are not known")
        return gather(self.images)[: self.count], gather(self.labels)[: self.count]
