"""Decodes images: encoded bytes -> pixels of one of MODES, their middle resized.

Decoding follows one of two rules. Image files are decoded as a page shows them: upright by their EXIF orientation,
transparency on white unless the mode keeps it, 16 bits a channel rounded to 8 but in the mode of 16 bits. Images
stored by TFDS are decoded as TFDS itself does, so that array_record and tfrecord give the same pixels: as stored,
alpha dropped, 16 bits cut to their upper 8.
"""

import contextlib
import functools
import os
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

from utils.base.files import LimitedReads, open_regular, read_bytes
from utils.base.messages import UserError
from utils.images.pixels import UINT8, PixelFormat
from utils.images.sizes import Size

# The largest image to decode: above any photograph (200 megapixels from a phone, 400 by sensor shift). It bounds
# memory: a megapixel is a million pixels of three bytes each. Of pixels of four bytes, such as RGBA, fewer are allowed.
MAX_MEGAPIXELS = 500.0
PIXEL_BYTES = 3

# Memory is bounded further by decoding large images one at a time, whatever the number of threads, and by converting
# them in strips.
LARGE_BYTES = 2**27
STRIP_PIXELS = 2**20
_large = threading.Lock()

# Image files up to this size are read at once; of larger ones the header is checked first.
SMALL_BYTES = 2**26
# How many times its size may be read from a file. Hostile metadata make Pillow read the same bytes again and again.
REREAD = 4

# Accepted under any of the usual suffixes. One of Pillow's other formats (EPS) runs a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")

# Modes that images are decoded into: uint8 grey, RGB or RGBA, and grey as float32 in [0, 1], which keeps 16 bits.
MODES = ("L", "RGB", "RGBA", "I;16")
CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4, "I;16": 1}
SIXTEEN_BITS = PixelFormat("float32", 0.0, 1.0)
# Pillow's modes of files in shades of grey; all others have colours, or a palette.
GREY = ("1", "L", "LA", "La", "I", "F")

# {type of a TIFF tag: bytes of a value}: TIFF 6.0, section 2.
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
# {EXIF orientation: transposition that turns the image upright}.
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
SIDEWAYS = (5, 6, 7, 8)  # height and width change places


@functools.cache  # once a process
def configure_pillow() -> None:
    """Lets Pillow open images of any size, silently; `open_image` calls it, and has a limit of its own."""
    Image.MAX_IMAGE_PIXELS = None
    # Metadata are not needed. If they are malformed, Pillow would write a line for each of a million files.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class BrokenImageError(Exception):
    """Bytes that are not an image, or only part of one; the message says why."""


def read_image(
    content: bytes, name: str, size: Size, *, mode: str = "RGB", as_tfds: bool = False, max_megapixels=MAX_MEGAPIXELS
) -> UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w 1"]:
    """Decodes the largest centred part of an image that has the proportions of `size`, (height, width), and resizes it
    to that size by antialiased bilinear interpolation.

    `mode` is one of MODES, of which TFDS has 'RGB' and 'L' alone. Raises UserError, which names the image `name`, if it
    cannot be decoded.
    """
    try:
        with open_image(content, max_megapixels) as image:
            image.load()  # metadata may follow the pixels
            convert = _to_mode_as_tfds if as_tfds else _to_mode
            middle = _resize_middle(image if as_tfds else _turn_upright(image), size, mode, convert)
    except BrokenImageError as error:
        raise UserError(f"{name} is not a readable image ({error}); put a good copy in its place") from error
    return np.asarray(middle).reshape(*size, -1)


def decode_image(content: bytes, *, mode: str = "RGB", max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Decodes an image file at its own size into `mode`. Raises BrokenImageError if it cannot be decoded."""
    with open_image(content, max_megapixels) as image:
        image.load()
        return _to_mode(_turn_upright(image), mode)


def check_image(content: bytes, *, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[int, int, str, int, int]:
    """Returns (height, width, mode, lowest value, highest value) of an image file, turned upright; the mode is the one
    of 'L', 'RGB' and 'I;16' that keeps what the file has, and the values are those in RGB.

    Raises BrokenImageError if it cannot be decoded.
    """
    with open_image(content, max_megapixels) as image:
        image.load()
        ranges = [(pixels.min(), pixels.max()) for pixels in map(np.asarray, _strips(image, "RGB", _to_mode))]
        lows, highs = zip(*ranges, strict=True)
        width, height = image.size[::-1] if read_orientation(image) in SIDEWAYS else image.size
        return height, width, _mode_of(image), int(min(lows)), int(max(highs))


def _mode_of(image: Image.Image) -> str:
    """Returns the mode of 'L', 'RGB' and 'I;16' that keeps what an image has, but for its transparency."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # Pillow's modes of 16 bits
        return "I;16"
    return "L" if image.mode in GREY else "RGB"


def find_mode(image_shape: Sequence[int], pixels: PixelFormat) -> str | None:
    """Returns the mode that gives images of such a shape, (h, w, c), and format; None if none does."""
    if pixels == UINT8:
        return next((mode for mode in MODES[:3] if CHANNELS[mode] == image_shape[-1]), None)
    return "I;16" if pixels == SIXTEEN_BITS and image_shape[-1] == 1 else None


def read_image_file(path: Path, max_megapixels: float = MAX_MEGAPIXELS) -> bytes:
    """Returns the bytes of an image file; of a large one only after its header has passed the checks of `open_image`.

    Raises OSError if they cannot be read, and the BrokenImageError of `open_image`.
    """
    if path.stat().st_size > SMALL_BYTES:
        with open_image(path, max_megapixels):
            pass
    return read_bytes(path)


@contextlib.contextmanager
def open_image(source: bytes | Path, max_megapixels: float = MAX_MEGAPIXELS) -> Iterator[Image.Image]:
    """Opens an encoded image, in memory or in a regular file. It has an acceptable size, but is not decoded yet.

    Raises BrokenImageError for an image above the limit, for a large file that holds much more than its pixels, and
    instead of anything that the block raises, except UserError.
    """
    configure_pillow()
    try:
        with BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
            # The header may ask for little of a large file; the whole of it is allowed once the size is accepted.
            size = file.seek(0, os.SEEK_END)
            limited: Any = LimitedReads(file, REREAD * min(size, SMALL_BYTES) + 2**16)
            with Image.open(limited, formats=FORMATS) as image:
                check_size(image, max_megapixels)
                if size > 2 * decoded_bytes(image) + SMALL_BYTES:  # twice, for 16 bits a channel
                    raise BrokenImageError(f"it has {size:,} bytes for {image.width}x{image.height} pixels")
                limited.left = REREAD * size
                # The lock is held while the caller decodes: large images come one at a time.
                with _large if decoded_bytes(image) > LARGE_BYTES else contextlib.nullcontext():
                    yield image
    except (BrokenImageError, UserError):
        raise
    except UnidentifiedImageError:
        raise BrokenImageError("it is no image of a known format") from None
    except OSError as error:  # from the system, or from Pillow
        raise BrokenImageError(error.strerror or str(error) or type(error).__name__) from error
    except Exception as error:  # on broken files Pillow raises SyntaxError, ValueError, struct.error and more
        raise BrokenImageError(str(error) or type(error).__name__) from error


def check_size(image: Image.Image, max_megapixels: float = MAX_MEGAPIXELS) -> None:
    """Raises BrokenImageError for an image, opened but not yet decoded, that is above the limit."""
    num_pixels = image.width * image.height
    size = decoded_bytes(image)
    if size > max_megapixels * 1e6 * PIXEL_BYTES:
        depth = size // num_pixels
        deeper = f" of {depth} bytes each" if depth > PIXEL_BYTES else ""
        megapixels = f"{num_pixels / 1e6:,.0f} megapixels{deeper}"
        raise BrokenImageError(f"{megapixels} are above --max_megapixels={max_megapixels:g}")


def decoded_bytes(image: Image.Image) -> int:
    """Returns the bytes that an image takes once it is decoded. Smaller pixels count as the three bytes of RGB, into
    which they are converted."""
    depth = {"I": 4, "F": 4}.get(image.mode, 2 if image.mode.startswith("I;16") else 1)
    return image.width * image.height * max(PIXEL_BYTES, depth * len(image.getbands()))


def read_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 .. 8; 1 if there is none, or if the metadata cannot be read."""
    try:
        exif = image.info.get("exif")
        profile = image.info.get("Raw profile type exif", "")  # ImageMagick's, in PNG: lines of hexadecimal digits
        if _are_tags_too_large(exif or bytes.fromhex("".join(profile.split("\n")[3:]))):
            return 1
        value = image.getexif().get(EXIF_ORIENTATION, 1)
        # Malformed values that are still clear: a tuple, or digits with padding.
        value = value[0] if isinstance(value, tuple) else value
        return int(value.strip("\0 ") if isinstance(value, str) else value)
    except Exception:  # malformed metadata do not make the pixels bad
        return 1


def _are_tags_too_large(exif: bytes) -> bool:
    """Returns whether the tags of an EXIF block (TIFF 6.0, section 2) claim far more bytes than the block has. They may
    all point at the same bytes, and Pillow reads all tags to find one."""
    exif = exif.removeprefix(b"Exif\0\0")
    # Header and first directory are read by hand, with bounds: a block that is cut has no tags here.
    order = ">" if exif[:2] == b"MM" else "<"
    (start,) = struct.unpack_from(f"{order}I", exif, 4) if len(exif) >= 8 else (0,)
    (count,) = struct.unpack_from(f"{order}H", exif, start) if 8 <= start <= len(exif) - 2 else (0,)
    entries = exif[start + 2 : start + 2 + 12 * count]
    tags = struct.iter_unpack(f"{order}HHII", entries[: len(entries) // 12 * 12])
    return sum(TYPE_BYTES.get(kind, 0) * number for _, kind, number, _ in tags) > REREAD * len(exif)


def copy_pixels(image: Image.Image, pixels: UInt8[np.ndarray, "h w c"]) -> None:
    """Fills an array with the pixels of an image, converted to grey or RGB by the array's number of channels."""
    mode = "L" if pixels.shape[-1] == 1 else "RGB"
    start = 0
    for strip in _strips(image, mode, Image.Image.convert):
        pixels[start : start + strip.height] = np.asarray(strip).reshape(strip.height, *pixels.shape[1:])
        start += strip.height


def _strips(
    image: Image.Image,
    mode: str,
    convert: Callable[[Image.Image, str], Image.Image],
    box: tuple[int, int, int, int] | None = None,
) -> Iterator[Image.Image]:
    """Yields an image, or the part of it in a box, from top to bottom in converted strips, so that there is never a
    second copy of a large one."""
    left, top, right, bottom = box or (0, 0, *image.size)
    num_rows = max(1, STRIP_PIXELS // (right - left))
    for start in range(top, bottom, num_rows):
        yield convert(image.crop((left, start, right, min(start + num_rows, bottom))), mode)


def _turn_upright(image: Image.Image) -> Image.Image:
    orientation = read_orientation(image)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def find_middle(size: Size, target: Size) -> tuple[int, int, int, int]:
    """Returns the box (left, top, right, bottom) of the largest centred part of an image of `size` that has the
    proportions of `target`; both are (height, width)."""
    # One side is kept, the other cut down to a whole number of pixels; of a square target both are the shorter one.
    height = min(size[0], max(1, size[1] * target[0] // target[1]))
    width = min(size[1], max(1, size[0] * target[1] // target[0]))
    left = (size[1] - width) // 2
    top = (size[0] - height) // 2
    return left, top, left + width, top + height


def _resize_middle(
    image: Image.Image, size: Size, mode: str, convert: Callable[[Image.Image, str], Image.Image]
) -> Image.Image:
    """Returns the middle of an image in the proportions of `size`, converted to `mode` and resized.

    A large one is first resized to the columns of `size` strip by strip, then to its rows. Pillow resizes in the
    same order, so the result is the same (tests compare them), without a second copy of all pixels.
    """
    rows, columns = size
    box = find_middle((image.height, image.width), size)
    height = box[3] - box[1]
    narrow = None
    start = 0

    # A single strip is the whole part; else all strips are narrowed and put together first.
    for strip in _strips(image, mode, convert, box):
        if strip.height == height:
            return strip.resize((columns, rows), Image.Resampling.BILINEAR)
        # Colours are weighted by their opacity from the first pass to the last, as Pillow does for a whole image.
        if strip.mode == "RGBA" and (columns, rows) != (strip.width, height):
            strip = strip.convert("RGBa")
        narrow = narrow or Image.new(strip.mode, (columns, height))
        narrow.paste(strip.resize((columns, strip.height), Image.Resampling.BILINEAR), (0, start))
        start += strip.height
    assert narrow is not None
    resized = narrow.resize((columns, rows), Image.Resampling.BILINEAR)
    return resized.convert("RGBA") if resized.mode == "RGBa" else resized


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converts the pixels of an image file to one of MODES; of 16 bits they are floats in [0, 1] from here on."""
    if mode == "I;16":
        is_deep = image.mode.startswith("I")
        levels = np.asarray(image if is_deep else _to_mode(image, "L")).astype(np.float32)
        return Image.fromarray(np.clip(levels / np.float32(65535 if is_deep else 255), 0, 1))
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        levels = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.clip(np.round(levels), 0, 255).astype(np.uint8)).convert(mode)
    if (
        image.has_transparency_data and mode != "RGBA"
    ):  # on white, as a page shows it; the colours of transparent pixels are arbitrary
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _to_mode_as_tfds(image: Image.Image, mode: str) -> Image.Image:
    """Converts pixels that TFDS stored, to the values that TFDS gives."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert(mode)
    image.info.pop("transparency", None)  # `convert` would turn it into a colour of its own
    return image.convert(mode)
