"""Images and masks from files, as inversion and inpainting take them."""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from utils.data.images import BrokenImageError, check_size, read_image
from utils.errors import UserError
from utils.files import read_bytes
from utils.metrics.samples import SUFFIXES, find_images


def read_images(
    folder: str | Path, image_shape: tuple[int, int, int], limit: int, flag: str
) -> tuple[UInt8[np.ndarray, "n h w c"], list[Path]]:
    """(images, their files) of a folder, sorted by path, `limit` at most; the middle square of each is resized, as in
    training. UserError, naming --`flag`, where there are none or one cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--{flag}={folder} is no folder; give a folder of images")
    height, width, channels = image_shape
    if height != width:
        raise UserError(f"--{flag}: images are read as squares, but those of the run are {height}x{width}")
    files = find_images(folder)[:limit]
    if not files:
        raise UserError(f"--{flag}={folder} holds no images ({', '.join(SUFFIXES)})")
    mode = "L" if channels == 1 else "RGB"
    return np.stack([read_image(read_bytes(file), str(file), height, mode=mode) for file in files]), files


def read_mask(path: str | Path, image_shape: tuple[int, int, int]) -> Bool[np.ndarray, "h w"]:
    """Where a mask image is white, more than half: the hole to fill. UserError where it is no image of that size, or
    is all hole or none."""
    height, width, _ = image_shape
    try:
        with Image.open(path) as image:
            check_size(image)
            levels = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, BrokenImageError) as error:
        raise UserError(f"--mask={path} cannot be read as an image ({error}); give a PNG") from None
    if levels.shape != (height, width):
        size = "x".join(map(str, levels.shape))
        raise UserError(f"--mask={path} is {size}, but the images of the run are {height}x{width}; resize it")
    is_hole = levels > 127
    if is_hole.all() or not is_hole.any():
        raise UserError(
            f"--mask={path} is {'white' if is_hole.all() else 'black'} throughout: white is filled, black is kept"
        )
    return is_hole


def labels_from_folders(folder: str | Path, files: list[Path], class_names: tuple[str, ...]) -> list[int] | None:
    """The classes after which the subfolders of the files are named; None where one is no class."""
    names = [file.relative_to(folder).parts[0] for file in files]
    if not set(names) <= set(class_names):
        return None
    return [class_names.index(name) for name in names]
