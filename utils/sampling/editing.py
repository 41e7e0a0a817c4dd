"""Changes given images, and draws those between two samples: what edit.py and app.py share.

Reads the images, masks and labels that inversion and inpainting take, and checks the solver for either.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from utils.base.messages import UserError, warn
from utils.conditions.condition import Mixture
from utils.images.decoding import BrokenImageError, open_image, read_image, read_image_file
from utils.images.folders import SUFFIXES, find_images
from utils.images.pixels import Images
from utils.networks.models import ImageModel
from utils.sampling.generator import ImageGenerator
from utils.sampling.paths import slerp
from utils.sampling.solvers import ADAPTIVE_SOLVERS, ODE_SOLVERS, SOLVERS, SamplerConfig

# --- Between two samples ---


class Between(NamedTuple):
    """Images between samples: what each is drawn from, row after row, and the title of each row."""

    noise: Float[Array, "n h w c"]
    conditions: PyTree | Mixture
    titles: list[str]


def interpolate(generator: ImageGenerator, conditions: PyTree, num_columns: int, between: str) -> Between:
    """Returns rows of `num_columns` images between samples 2k and 2k + 1, which have these conditions (2 rows, ...).

    They have the class of the first and noise between the two where `between` is 'noise', else the noise of the first
    and conditions between the two.
    """
    first = jax.tree.map(lambda rows: rows[0::2], conditions)
    second = jax.tree.map(lambda rows: rows[1::2], conditions)
    names = generator.condition.titles(first)
    num_rows = len(names)
    ends = generator.noise(range(2 * num_rows))
    fractions = jnp.linspace(0, 1, num_columns)

    # Every image of every row, side by side in one axis.
    if between == "noise":
        noise = slerp(ends[0::2], ends[1::2], fractions).reshape(-1, *ends.shape[1:])
        return Between(noise, _repeat(first, num_columns), names)
    noise = jnp.repeat(ends[0::2], num_columns, axis=0)
    sides = (_repeat(side, num_columns) for side in (first, second))
    mixed = generator.condition.mix(*sides, np.tile(fractions, num_rows))
    titles = [f"{a} to {b}" for a, b in zip(names, generator.condition.titles(second), strict=True)]
    return Between(noise, mixed, titles)


def _repeat(conditions: PyTree, count: int) -> PyTree:
    """Returns conditions with each row `count` times in a row."""
    return jax.tree.map(lambda rows: np.repeat(rows, count, axis=0), conditions)


# --- Images of the user's own ---


class Inversion(NamedTuple):
    """The noise of given images, the latents to which it leads, and how far these are from where it started."""

    noise: Float[Array, "n h w c"]
    again: Float[Array, "n h w c"]
    error: float  # root mean square of `again` less the images' latents
    deviation: float  # of the images' latents


def invert(
    generator: ImageGenerator, images: Images, labels: Int[np.ndarray, " n"], sampler: SamplerConfig
) -> Inversion:
    """Finds the noise of images under their labels, and draws from it again; both without guidance."""
    # There and back without guidance: the two directions are the same ODE.
    plain = sampler.without_guidance()
    latents = generator.encode(images)
    noise = generator.invert(latents, labels, plain)
    again = generator.sample_latents(noise, labels, plain)
    error = float(jnp.sqrt(jnp.square(again - latents).mean()))
    return Inversion(noise, again, error, float(latents.std()))


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


def read_mask(source: bytes | Path, image_shape: tuple[int, int, int], name: str) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels of a mask image that are white, brighter than half: the hole to fill.

    Raises UserError, which calls it `name`, where it is not an image of that size, and where it is white or black
    throughout.
    """
    # Its size is checked before it is decoded, so that a huge file costs nothing.
    height, width, _ = image_shape
    try:
        with open_image(source) as image:
            if image.size != (width, height):
                size = f"{image.height}x{image.width}"
                raise UserError(f"{name} is {size}, but the images of the run are {height}x{width}; resize it")
            levels = np.asarray(image.convert("L"))
    except BrokenImageError as error:
        raise UserError(f"{name} cannot be read as an image ({error}); give a PNG") from None

    is_hole = levels > 127
    # An inverted or empty mask is a likely mistake, and would else go unseen.
    if is_hole.all() or not is_hole.any():
        raise UserError(f"{name} is {'white' if is_hole.all() else 'black'} throughout: white is filled, black is kept")
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

    labels = default_labels(model, len(files))
    if labels is None:
        raise UserError(f"--{flag}={folder}: of which classes are the images? Give --classes")
    return labels


def default_labels(model: ImageModel, count: int) -> Int[np.ndarray, " n"] | None:
    """Returns labels for images of which nothing is known: the only class there is, or "no label"; None where the model
    knows no "no label"."""
    if len(getattr(model.condition, "class_names", ())) == 1:
        return np.zeros(count, np.int32)
    if model.network.config.class_dropout_prob == 0:
        return None
    return np.asarray(model.condition.null(count))


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


def fitting_solvers(mode: str) -> tuple[str, ...]:
    """Returns the solvers that can interpolate, invert or inpaint, whichever `mode` is."""
    # Inversion runs an ODE backwards, inpainting needs its steps fixed, and a row may vary only by noise or class.
    return {
        "interpolate": (*(name for name in SOLVERS if not SOLVERS[name].is_stochastic), *ADAPTIVE_SOLVERS),
        "invert": (*ODE_SOLVERS, *ADAPTIVE_SOLVERS),
        "inpaint": ODE_SOLVERS,
    }[mode]


def check_solver(solver: str, mode: str) -> None:
    """Raises UserError for a solver that cannot interpolate, invert or inpaint, whichever `mode` is."""
    fitting = fitting_solvers(mode)
    if solver not in fitting:
        raise UserError(f"--solver={solver} cannot {mode}; use one of {', '.join(fitting)}")
