"""Images as arrays: uint8 for files, float32 in [-1, 1] for networks, and the formats of data between them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Integer, PyTree, UInt8
from PIL import Image

from utils.base.mesh import gather
from utils.base.messages import UserError

# Batches in either format of files and data sets.
Images = UInt8[Array | np.ndarray, "*b h w c"] | Float32[Array | np.ndarray, "*b h w c"]

# Limits of `describe_range`: the values of all images together, and of one image by itself.
MIN_RANGE = 128
MIN_TYPICAL_RANGE = 64
MIN_SHARE = 0.1  # of images below MIN_TYPICAL_RANGE


def images_from_uint8(images: UInt8[Array | np.ndarray, "b h w c"]) -> Float[Array, "b h w c"]:
    """Returns images in [-1, 1]: x / 127.5 - 1."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1


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
    # Wider integers: differences of uint8 would wrap around.
    lows, highs = extremes.astype(int).T
    lowest = lows.min()
    highest = highs.max()

    # The advice depends on where the values lie.
    is_near_black = lowest < 8
    question = "were they in [0, 1], or of 12 bits in files of 16? " if is_near_black else ""
    advice = f"{question}{'Rescale' if question else 'rescale'} them to 0 .. 255 first"

    # From the worst finding to the mildest: constants, all images together, some of them.
    if lowest == highest:
        return f"all values of all images are {lowest}"
    if (lows == highs).all():
        return "each image is of one value"
    if highest - lowest < MIN_RANGE:
        return f"the images' values are {lowest} to {highest} of 0 to 255: {advice}"
    # A few flat images are normal; a tenth of them points at a source that was not rescaled.
    share = (highs - lows < MIN_TYPICAL_RANGE).mean()
    if share >= MIN_SHARE:
        return f"{share:.0%} of the images span fewer than {MIN_TYPICAL_RANGE} of 256 levels: {advice}"
    return ""


class PixelFormat(NamedTuple):
    """How a data set's images hold their values: uint8, or float32 of which low .. high become [-1, 1]."""

    dtype: str = "uint8"
    low: float = 0.0
    high: float = 255.0

    def to_unit(self, images: Images) -> Float[Array, "b h w c"]:
        """Returns images in [-1, 1], as far as their values are in the range."""
        if self == UINT8:
            return images_from_uint8(images)
        return (jnp.asarray(images) - self.low) * (2 / (self.high - self.low)) - 1

    def to_unit_on_host(self, images: Images) -> Float32[np.ndarray, "b h w c"]:
        """Returns images in [-1, 1] as `to_unit` does, without a device."""
        width = np.float32(self.high - self.low)
        return (np.asarray(images, np.float32) - np.float32(self.low)) * (np.float32(2) / width) - np.float32(1)

    def from_unit(self, images: Float[Array, "b h w c"]) -> Images:
        """Clips images in [-1, 1] and returns them in this format."""
        if self == UINT8:
            return images_to_uint8(images)
        restored = self.low + (jnp.clip(images, -1, 1) + 1) * ((self.high - self.low) / 2)
        return jnp.clip(restored, self.low, self.high)  # from which it may differ by a rounding

    def to_uint8(self, images: Images) -> UInt8[Array | np.ndarray, "*b h w c"]:
        """Returns images that can be shown: the range becomes 0 .. 255."""
        return images if self == UINT8 else images_to_uint8(self.to_unit(images))

    def to_json(self) -> dict[str, Any]:
        """Returns the format as a run's configuration records it."""
        return {"dtype": self.dtype, "range": [self.low, self.high]}

    @classmethod
    def from_record(cls, data: Mapping[str, Any]) -> "PixelFormat":
        """Returns the format in a run's record of its data, which names no uint8. Raises ValueError if it is none."""
        return cls.from_json(data["pixels"]) if "pixels" in data else UINT8

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "PixelFormat":
        """Returns a recorded format. Raises ValueError if it is none."""
        # A run's configuration is a file that anybody may have edited.
        low, high = content["range"]
        found = cls(content["dtype"], float(low), float(high))
        if found != UINT8 and not (found.dtype == "float32" and math.isfinite(high - low) and low < high):
            raise ValueError(f"pixels are uint8 in 0 .. 255 or float32 in LOW .. HIGH, not {content}")
        return found

    def __str__(self) -> str:
        return f"{self.dtype} in {self.low:g} .. {self.high:g}"


UINT8 = PixelFormat()


def are_pictures(pixels: PixelFormat, image_shape: Sequence[int]) -> bool:
    """Whether files and feature networks take such images: uint8 with 1 or 3 channels."""
    return pixels == UINT8 and image_shape[-1] in (1, 3)


def check_pictures(
    pixels: PixelFormat, image_shape: Sequence[int], what: str, fix: str, whose: str = "the model's"
) -> None:
    """Raises UserError unless images `are_pictures`.

    The message begins with `what`, which names the flag and ends in a verb, and ends with `fix`.
    """
    if not are_pictures(pixels, image_shape):
        raise UserError(
            f"{what} uint8 images of 1 or 3 channels, but {whose} are {pixels} with {image_shape[-1]}; {fix}"
        )


def parse_range(text: str) -> tuple[float, float]:
    """Returns the numbers of --value_range LOW,HIGH. Raises UserError unless the first is the lower one."""
    try:
        low, high = map(float, text.split(","))
        is_good = low < high and math.isfinite(high - low)
    except ValueError:
        is_good = False
    if not is_good:
        raise UserError(f"--value_range={text}: give LOW,HIGH, two numbers, the lower one first")
    return low, high


def write_range(pixels: PixelFormat) -> str:
    """Returns the range of float images as `parse_range` reads it, without rounding."""
    return f"{pixels.low!r},{pixels.high!r}"


class ImageBatch(NamedTuple):
    """Images on the devices, with their conditions if these are known; rows after the first `count` are padding."""

    images: UInt8[Array, "b h w c"] | Float32[Array, "b h w c"]
    conditions: PyTree | None
    count: int
    nfe: Int[Array, " b"] | None = None  # evaluations of the velocity that each took; adaptive solvers only
    places: Int[Array, " b"] | None = None  # of the rows in the batch, where they do not come in order

    def rows(self, array: Array | np.ndarray) -> np.ndarray:
        """Returns an array (b, ...) of these images on the host: in order, without the padding. All processes have to
        call it."""
        # Hosts gather their rows first: padding is at the end of the global batch.
        whole = gather(array)
        if self.places is not None:
            whole = whole[np.argsort(gather(self.places))]
        return whole[: self.count]

    def to_host(self) -> tuple[Images, PyTree]:
        """Returns (images, conditions) without the padding. Raises ValueError if the conditions are not known."""
        if self.conditions is None:
            raise ValueError("the conditions of these images are not known")
        images, conditions = jax.tree.map(self.rows, (self.images, self.conditions))
        return images, conditions
