"""Reads the images, masks and labels that inversion and inpainting take, and checks the solver for either."""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8

from utils.base.messages import UserError, warn
from utils.images.decoding import BrokenImageError, open_image, read_image, read_image_file
from utils.images.folders import SUFFIXES, find_images
from utils.networks.models import ImageModel
from utils.sampling.solvers import ADAPTIVE_SOLVERS, ODE_SOLVERS, SOLVERS


def read_images(
    folder: str | Path, image_shape: tuple[int, int, int], limit: int
) -> tuple[UInt8[np.ndarray, "n h w c"], list[Path]]:
    """Returns (images, their files) of a folder, sorted by path, `limit` at most.

    The middle of each is resized to `image_shape` (height, width, channels), as in training. Raises UserError, which
    does not name the flag, where the folder has no images, or one cannot be read.
    """
    # What cannot work is refused before anything is decoded.
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("there is no such folder; give a folder of images")
    height, width, channels = image_shape
    files = find_images(folder)[:limit]
    if not files:
        raise UserError(f"the folder holds no images ({', '.join(SUFFIXES)})")

    # One after another into a single array: originals may be large.
    mode = "L" if channels == 1 else "RGB"
    images = np.empty((len(files), *image_shape), np.uint8)
    for file, image in zip(files, images, strict=True):
        try:
            image[:] = read_image(read_image_file(file), str(file), (height, width), mode=mode)
        except (OSError, BrokenImageError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{file} cannot be read ({reason}); put a good copy in its place") from None
    return images, files


def read_mask(path: str | Path, image_shape: tuple[int, int, int]) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels of a mask image that are white, brighter than half: the hole to fill.

    Raises UserError where it is not an image of that size, and where it is white or black throughout.
    """
    # Its size is checked before it is decoded, so that a huge file costs nothing.
    height, width, _ = image_shape
    try:
        with open_image(Path(path)) as image:
            if image.size != (width, height):
                size = f"{image.height}x{image.width}"
                raise UserError(f"--mask={path} is {size}, but the images of the run are {height}x{width}; resize it")
            levels = np.asarray(image.convert("L"))
    except BrokenImageError as error:
        raise UserError(f"--mask={path} cannot be read as an image ({error}); give a PNG") from None

    is_hole = levels > 127
    # An inverted or empty mask is a likely mistake, and would else go unseen.
    if is_hole.all() or not is_hole.any():
        raise UserError(
            f"--mask={path} is {'white' if is_hole.all() else 'black'} throughout: white is filled, black is kept"
        )
    return is_hole


def choose_labels(folder: str | Path, files: list[Path], model: ImageModel, flag: str) -> Int[np.ndarray, " n"]:
    """Returns the labels of images: the classes that their subfolders are named after, if all are classes; else the
    model's only class, or "no label". Raises UserError, naming --`flag`, if the model knows no "no label"."""
    # Folders named after classes tell the labels.
    folder = Path(folder)
    class_names = getattr(model.condition, "class_names", ())
    labels = labels_from_folders(folder, files, class_names)
    if labels is not None:
        return np.array(labels, np.int32)
    if any(file.parent != folder for file in files):
        warn(f"--{flag}={folder}: not all of its folders are named after classes, so its images have no label")

    # The only class there is, or no label.
    if len(class_names) == 1:
        return np.zeros(len(files), np.int32)
    if model.network.config.class_dropout_prob == 0:
        raise UserError(f"--{flag}={folder}: of which classes are the images? Give --classes")
    return np.asarray(model.condition.null(len(files)))


def labels_from_folders(folder: str | Path, files: list[Path], class_names: tuple[str, ...]) -> list[int] | None:
    """Returns the classes that the subfolders of the files are named after; None if one of the names is no class."""
    # All or none: a folder that is no class may hold images of any.
    names = [file.relative_to(folder).parts[0] for file in files]
    if not set(names) <= set(class_names):
        return None
    return [class_names.index(name) for name in names]


def shorten_names(files: list[Path]) -> list[str]:
    """Returns FOLDER/NAME of each file, or the end of it that fits beside an image."""
    return ["/".join(file.with_suffix("").parts[-2:])[-24:] for file in files]


def check_solver(solver: str, mode: str) -> None:
    """Raises UserError for a solver that cannot interpolate, invert or inpaint, whichever `mode` is."""
    # Inversion runs an ODE backwards, inpainting needs its steps fixed, and a row may vary only by noise or class.
    fitting = {
        "interpolate": [name for name in SOLVERS if not SOLVERS[name].is_stochastic] + list(ADAPTIVE_SOLVERS),
        "invert": [*ODE_SOLVERS, *ADAPTIVE_SOLVERS],
        "inpaint": ODE_SOLVERS,
    }[mode]
    if solver not in fitting:
        raise UserError(f"--solver={solver} cannot {mode}; use one of {', '.join(fitting)}")
