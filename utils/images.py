"""One encoded image -> uint8 pixels: decoded, brought to RGB or grey, its middle square resized."""

from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from utils.errors import UserError


class BrokenImageError(Exception):
    """Bytes that are no image, or not all of one; the message says why."""


def read_image(
    file: Path | BytesIO, name: str, size: int, *, mode: str = "RGB", upright: bool = False
) -> UInt8[np.ndarray, "size size c"]:
    """The middle square of an encoded image, resized by antialiased bilinear interpolation.

    `mode` is Pillow's 'RGB' or 'L' (c = 1); `upright` follows the EXIF orientation. UserError, saying `name`, where the
    image cannot be decoded.
    """
    try:
        image = decode_image(file, mode=mode, upright=upright)
    except BrokenImageError as error:
        raise UserError(f"{name} is not a readable image ({error}); replace or remove it") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, -1)


def decode_image(file: Path | BytesIO, *, mode: str = "RGB", upright: bool = False) -> Image.Image:
    """The whole image in `mode`; BrokenImageError where it cannot be decoded."""
    try:
        with Image.open(file) as image:
            image.load()
            return _to_mode(ImageOps.exif_transpose(image) if upright else image, mode)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more on broken files
        raise BrokenImageError(str(error) or type(error).__name__) from error


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        levels = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.clip(np.round(levels), 0, 255).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:  # on white, as a page shows it; the colours below are arbitrary
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
