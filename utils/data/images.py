"""One encoded image -> uint8 pixels: decoded, brought to RGB or grey, its middle square resized.

Decoding follows one of two rules. Image files are decoded as a page shows them: upright by their EXIF orientation,
transparency on white, 16 bits a channel rounded to 8. What TFDS stored is decoded as TFDS itself does, so that
array_record and tfrecord give the same pixels: as stored, alpha dropped, 16 bits cut to their upper 8.
"""

import warnings
from io import BytesIO

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from utils.errors import UserError

# Above any photograph's (a 200-megapixel phone, 400 by sensor shift); three bytes each while it is decoded.
MAX_MEGAPIXELS = 500.0

# Larger images are refused here, by the limit in force, rather than by Pillow's own.
Image.MAX_IMAGE_PIXELS = None
# Malformed metadata, which nothing here needs, is no reason to write a line for each of a million files.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Below these, a data set is told that its images use little of 0 .. 255: all of them together, or half of them each.
MIN_RANGE, MIN_TYPICAL_RANGE = 128, 64

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(Exception):
    """Bytes that are no image, or not all of one; the message says why."""


def read_image(
    content: bytes, name: str, size: int, *, mode: str = "RGB", as_tfds: bool = False, max_megapixels=MAX_MEGAPIXELS
) -> UInt8[np.ndarray, "size size c"]:
    """The middle square of an encoded image, resized by antialiased bilinear interpolation.

    `mode` is Pillow's 'RGB' or 'L' (c = 1). UserError, saying `name`, where the image cannot be decoded.
    """
    try:
        image = decode_image(content, mode=mode, as_tfds=as_tfds, max_megapixels=max_megapixels)
    except BrokenImageError as error:
        raise UserError(f"{name} is not a readable image ({error}); put a good copy in its place") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, -1)


def decode_image(
    content: bytes, *, mode: str = "RGB", as_tfds: bool = False, max_megapixels: float = MAX_MEGAPIXELS
) -> Image.Image:
    """The whole image in `mode`, by one of the two rules; BrokenImageError where it cannot be decoded."""
    try:
        with Image.open(BytesIO(content)) as image:
            check_size(image, max_megapixels)
            image.load()
            if as_tfds:
                return _to_mode_as_tfds(image, mode)
            orientation = read_orientation(image)
            shown = _to_mode(image, mode)
            return shown.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else shown
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more on broken files
        raise BrokenImageError(str(error) or type(error).__name__) from error


def check_size(image: Image.Image, max_megapixels: float = MAX_MEGAPIXELS) -> None:
    """BrokenImageError for an image, opened but not yet decoded, above the limit."""
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise BrokenImageError(f"{megapixels:,.0f} megapixels are above --max_megapixels={max_megapixels:g}")


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 .. 8; 1 where there is none, or the metadata cannot be read."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
        value = value[0] if isinstance(value, tuple) else value
        return int(value.strip("\0 ") if isinstance(value, str) else value)
    except Exception:  # the metadata is malformed; the pixels are not
        return 1


def describe_range(extremes: Integer[np.ndarray, "n 2"]) -> str:
    """Says in words where images, of the lowest and highest values `extremes`, use little of 0 .. 255; '' where not.

    Images of 12 bits in files of 16 do, or of [0, 1] that became uint8.
    """
    lows, highs = extremes.astype(int).T
    lowest, highest = lows.min(), highs.max()
    advice = "were they in [0, 1], or of 12 bits in files of 16? Rescale them to 0 .. 255 first"
    if lowest == highest:
        return f"all values of all images are {lowest}"
    if (lows == highs).all():
        return "each image is of one value"
    if highest - lowest < MIN_RANGE:
        return f"the images' values are {lowest} to {highest} of 0 to 255: {advice}"
    typical = int(np.median(highs - lows))
    if typical < MIN_TYPICAL_RANGE:
        return f"half of the images span {typical} or fewer of 255 levels: {advice}"
    return ""


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        levels = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.clip(np.round(levels), 0, 255).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:  # on white, as a page shows it; the colours below are arbitrary
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _to_mode_as_tfds(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert(mode)
    image.info.pop("transparency", None)  # which `convert` would make into a colour of its own
    return image.convert(mode)
