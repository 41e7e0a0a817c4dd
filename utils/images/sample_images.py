"""Single images of a folder of samples: opened, and their headers read."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from utils.base.messages import UserError
from utils.images.decoding import BrokenImageError, open_image

# Pillow's names for pixels of 8 bits.
GREY_MODES = ("L", "LA", "1")
ALPHA_MODES = ("RGBA", "LA")
MODES = ("RGB", "RGBA", "P", *GREY_MODES)


def read_header(file: Path, flag: str) -> tuple[tuple[int, int], str]:
    """Returns ((width, height), Pillow's mode of the pixels). Raises UserError for pixels that samples do not have."""
    with open_sample(file, flag) as image:
        size = image.size
        mode = image.mode
    if mode not in MODES:
        raise UserError(f"{flag}: {file.name} has the pixels {mode}; samples are RGB or grey of 8 bits")
    return size, mode


@contextlib.contextmanager
def open_sample(file: Path, flag: str) -> Iterator[Image.Image]:
    """Opens an image, not decoded yet. Raises UserError instead of what opening or decoding it raises."""
    try:
        with open_image(file) as image:
            yield image
    except BrokenImageError as error:
        raise UserError(f"{flag}: {file.name} is not a readable image ({error})") from None
