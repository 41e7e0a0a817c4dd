"""Images as arrays: uint8 for files, float32 in [-1, 1] for networks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PyTree, UInt8
from PIL import Image

from utils.base.devices import gather

# Limits of `describe_range`: the values of all images together, and of one image by itself.
MIN_RANGE = 128
MIN_TYPICAL_RANGE = 64
MIN_SHARE = 0.1  # of images below MIN_TYPICAL_RANGE


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


def describe_range(extremes: Integer[np.ndarray, "n 2"]) -> str:
    """Returns a remark on images that use little of 0 .. 255, given the (lowest, highest) value of each; else ''.

    Images of 12 bits in files of 16 do, and images of [0, 1] that became uint8; perhaps only some of them.
    """
    lows, highs = extremes.astype(int).T
    lowest = lows.min()
    highest = highs.max()

    # The advice depends on where the values lie.
    is_near_black = lowest < 8
    question = "were they in [0, 1], or of 12 bits in files of 16? " if is_near_black else ""
    advice = f"{question}{'Rescale' if question else 'rescale'} them to 0 .. 255 first"
    if lowest == highest:
        return f"all values of all images are {lowest}"
    if (lows == highs).all():
        return "each image is of one value"
    if highest - lowest < MIN_RANGE:
        return f"the images' values are {lowest} to {highest} of 0 to 255: {advice}"
    share = (highs - lows < MIN_TYPICAL_RANGE).mean()
    if share >= MIN_SHARE:
        return f"{share:.0%} of the images span fewer than {MIN_TYPICAL_RANGE} of 256 levels: {advice}"
    return ""


class ImageBatch(NamedTuple):
    """Images on the devices, with their conditions if these are known; rows after the first `count` are padding."""

    images: UInt8[Array, "b h w c"]
    conditions: PyTree | None
    count: int
    nfe: Int[Array, " b"] | None = None  # evaluations of the velocity that each took; adaptive solvers only

    def to_host(self) -> tuple[UInt8[np.ndarray, "count h w c"], PyTree]:
        """Returns (images, conditions) without the padding. Raises ValueError if the conditions are not known."""
        if self.conditions is None:
            raise ValueError("the conditions of these images are not known")
        images, conditions = jax.tree.map(lambda rows: gather(rows)[: self.count], (self.images, self.conditions))
        return images, conditions
