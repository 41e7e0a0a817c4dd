"""Changes images with a trained model: finds the noise of given ones and makes them again as other classes, fills a
hole in them, or draws the images between two samples.

    python edit.py --load_dir runs/demo --invert photos --edit 3 --solver heun
    python edit.py --load_dir runs/demo --inpaint photos --mask mask.png
    python edit.py --load_dir runs/demo --interpolate 8 --classes 3

Images of your own come from a folder, and are cropped and resized as for training. Samples are those of sample.py with
the same seed and classes.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int, PyTree, UInt8
from ml_collections import ConfigDict

from utils.base.mesh import gather
from utils.base.messages import UserError, log, progress_bar
from utils.codecs.codec import pixel_format
from utils.conditions.classes import check_classes
from utils.conditions.condition import Mixture, number_rows, resize_rows
from utils.flags import program
from utils.flags.conditions import choose_conditions
from utils.flags.definitions import define_path
from utils.flags.drawing import (
    Request,
    check_request,
    define_drawing_flags,
    define_film_flags,
    define_generator_flags,
    drawing,
    load_request,
)
from utils.flags.effects import RULES, check_effects
from utils.flags.help import topic
from utils.images import films
from utils.images.pixels import check_pictures
from utils.sampling import editing
from utils.sampling.editing import check_solver, choose_labels, read_images, read_mask, shorten_names
from utils.sampling.generator import RECIPE_BATCH_SIZE

# All that may be written into --out: a folder of such a name is refused before the work.
FILES = (
    *(f"interpolation.{suffix}" for suffix in ("png", *films.FORMATS)),
    *("inversion.png", "noise.npz", "inpainting.png"),
)


def define_flags() -> None:
    # One of three things, each with flags of its own.
    with topic("What is done"):
        define_path("invert", None, "Folder of images whose noise is found; they are resized as needed.")
        flags.DEFINE_string("edit", None, "With --invert: classes under which the images are made again.")
        define_path("inpaint", None, "Folder of images in which the hole of --mask is filled.")
        define_path("mask", None, "With --inpaint: image of the run's size; white is filled, black is kept.")
        flags.DEFINE_integer(
            "inpaint_repeats", 5, "How often each step of --inpaint is taken (RePaint); more fit better.", 1, 1000
        )
        flags.DEFINE_integer("interpolate", None, "Rows of so many images between two samples.", 2, 100)
        flags.DEFINE_enum(
            "between",
            "noise",
            ["noise", "classes", "conditions"],
            "What --interpolate varies: noise, on the sphere, or the class or other condition.",
        )
    define_drawing_flags(num_samples="Samples to interpolate, or images of your own: the first so many.")
    define_film_flags("With --interpolate: also a film, from the images on the left to those on the right.")
    define_generator_flags(wandb_name="edit")


# --- Between two samples ---


def interpolate(request: Request) -> None:
    """Draws rows of images between samples 2k and 2k + 1."""
    config = request.config
    generator = request.generator

    if config.between == "classes" and not generator.class_names:
        raise UserError("--between=classes: the run's conditions are no classes; use --between conditions")

    # A row has two ends. An odd number of conditions begins again for the last of them.
    num_rows = max(1, config.num_samples // 2)
    num_columns = config.interpolate
    num_filmed = min(num_rows, films.MAX_SAMPLES)
    request.check_table("interpolation.png", num_rows, num_columns)
    film = request.check_film("interpolation", num_filmed) if config.film else None
    both = resize_rows(request.conditions, 2 * num_rows)
    noise, conditions, titles = editing.interpolate(generator, both, num_columns, config.between)

    # From one axis to rows and columns.
    images = np.concatenate(list(_decode_in_batches(request, noise, conditions)))
    table = images.reshape(num_rows, num_columns, *images.shape[1:])
    between = "noises" if config.between == "noise" else config.between
    title = f"{request.title}, between two {between}"
    request.pictures.save_table("interpolation.png", table, titles, (), title)

    # A column is a frame of the film.
    if film:
        frames = table[:num_filmed].swapaxes(0, 1)
        title = request.choose_film_title(title)
        request.pictures.save_film(film, frames, np.arange(num_filmed), titles, title, config.film_seconds)


def _decode_in_batches(
    request: Request, noise: Float[Array, "n h w c"], conditions: PyTree | Mixture
) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
    """Yields the images that are drawn from the noise, as many at a time as --batch_size says."""
    size = request.config.batch_size or RECIPE_BATCH_SIZE
    for start in progress_bar(range(0, len(noise), size), "interpolation", unit="batch"):
        rows = slice(start, start + size)
        batch = jax.tree.map(lambda values, rows=rows: values[rows], conditions)
        latents = request.generator.sample_latents(noise[rows], batch, request.sampler)
        yield request.generator.to_pictures(request.generator.decode(latents))


# --- Images of your own ---


def invert(request: Request) -> None:
    """Finds the noise of given images, and draws from it under their own class and under those of --edit.

    Logs the error of the round trip. Also writes the noise, and the edited images with --save_samples.
    """
    config = request.config
    generator = request.generator
    chosen = choose_conditions(config.edit, generator.model, "edit")
    edits = [] if chosen is None else chosen.tolist()
    images, files, labels = _read_own_images(request, "invert")
    request.check_table("inversion.png", len(images), 3 + len(edits))

    # There and back.
    found = editing.invert(generator, images, labels, request.sampler)
    noise = found.noise
    log(f"round trip: root mean square error {found.error:.2g} of latents whose own is {found.deviation:.2g}")

    # The same noise under other classes.
    columns = [images, generator.decode(noise), generator.decode(found.again)]
    titles = ["image", "its noise", "again"]
    for label in edits:
        latents = generator.sample_latents(noise, np.full_like(labels, label), request.sampler)
        columns.append(generator.decode(latents))
        titles.append(generator.class_names[label])

    # What is written: a row for each image, the noise, and the edited images by themselves.
    guidance = f", to other classes with {request.title}" if edits else ""
    table = np.stack(columns, axis=1)
    title = f"{request.sampler.without_guidance()}{guidance}"
    request.pictures.save_table("inversion.png", table, shorten_names(files), titles, title)
    names = [str(file) for file in files]
    request.pictures.save_arrays("noise.npz", noise=gather(noise), labels=labels, files=names)
    if config.save_samples:
        edited = np.stack(columns[3:], axis=1).reshape(-1, *images.shape[1:])
        request.pictures.save_samples(config.save_samples, edited, np.tile(edits, len(images)))


def inpaint(request: Request) -> None:
    """Fills the hole of a mask in given images; all other pixels stay as they are."""
    config = request.config

    # The mask first: it is refused sooner than a folder is read.
    is_hole = read_mask(Path(config.mask), request.generator.model.image_shape, f"--mask={config.mask}")
    images, files, labels = _read_own_images(request, "inpaint")
    request.check_table("inpainting.png", len(images), 3)
    filled = request.generator.inpaint(images, is_hole, labels, request.sampler, config.inpaint_repeats)

    # Three columns: as given, with a grey hole, filled.
    masked = np.where(is_hole[..., None], np.uint8(127), images)
    table = np.stack([images, masked, filled], axis=1)
    titles = ("image", "hole", "filled")
    request.pictures.save_table("inpainting.png", table, shorten_names(files), titles, request.title)
    if config.save_samples:
        request.pictures.save_samples(config.save_samples, request.generator.to_pictures(filled), labels)


def _read_own_images(
    request: Request, flag: str
) -> tuple[UInt8[np.ndarray, "n h w c"], list[Path], Int[np.ndarray, " n"]]:
    """Returns (images, their files, their labels) of the folder of --`flag`, --num_samples at most.

    Labels are those of --classes, in turn, or those that `choose_labels` finds.
    """
    config = request.config
    model = request.generator.model
    what = f"--{flag}={config[flag]}: files hold"
    fix = f"use ImageGenerator.{flag} in Python (docs/sampling.md)"
    check_pictures(pixel_format(model.codec), model.image_shape, what, fix)
    try:
        images, files = read_images(config[flag], model.image_shape, config.num_samples)
    except UserError as error:
        raise UserError(f"--{flag}={config[flag]}: {error}") from None
    if config.classes is not None:
        return images, files, request.conditions[: len(files)]
    return images, files, choose_labels(config[flag], files, model, flag)


# --- The program ---

# {flag: what it does}.
MODES = {"interpolate": interpolate, "invert": invert, "inpaint": inpaint}


def choose_mode(config: ConfigDict) -> str:
    """Returns the one of --interpolate, --invert and --inpaint that is given.

    Raises UserError for none, for several, and if the mask is missing or the solver does not suit.
    """
    # One of the three.
    modes = [name for name in MODES if config[name] is not None]
    if not modes:
        raise UserError("--interpolate, --invert and --inpaint: give one of them; sample.py draws new images")
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]}: give one of them")
    check_effects(RULES["edit"], config)
    (mode,) = modes

    # Needs of its own.
    if mode == "inpaint" and config.mask is None:
        raise UserError(
            "--inpaint: --mask is not given; name an image of the run's size, white where it is to be filled"
        )
    check_solver(config.solver, mode)
    return mode


def main(config: ConfigDict) -> None:
    mode = choose_mode(config)
    check_request(config, FILES)
    request = load_request(config)
    kind = request.generator.condition
    if mode != "interpolate":
        check_classes(kind, f"--{mode}", config.load_dir)
    if config.interpolate is not None:
        chosen = request.chosen
        # Between a class and itself, all images of a row would be equal.
        if config.between != "noise" and chosen is not None and len(number_rows(kind, chosen)[1]) == 1:
            raise UserError(f"--between={config.between} needs two of them, but one alone is given; give another")
        several = "s" * (config.num_samples > 1)
        log(f"{config.num_samples:,} sample{several} of {config.load_dir}, {request.title}")
    with drawing(request, FILES):
        MODES[mode](request)


if __name__ == "__main__":
    program.run_program(define_flags, main)
