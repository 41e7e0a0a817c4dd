"""Images as arrays: uint8 for files, float32 in [-1, 1] for networks."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from utils.base.devices import gather


def images_from_uint8(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Images in [-1, 1]: x / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def images_to_uint8(images: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """Images in [-1, 1] clipped and rounded to 0 .. 255, as they would be written to a file."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


class ImageBatch(NamedTuple):
    """Images on the devices, with labels if they are known; only the first `count` rows are meant."""

    images: UInt8[Array, "b h w c"]
    labels: Int[Array, " b"] | None
    count: int
    nfe: Int[Array, " b"] | None = None  # velocities that each took, of an adaptive solver

    def to_host(self) -> tuple[UInt8[np.ndarray, "count h w c"], Int[np.ndarray, " count"]]:
        """(images, labels) of generated samples."""
        if self.labels is None:
            raise ValueError("the labels of these images are not known")
        return gather(self.images)[: self.count], gather(self.labels)[: self.count]
