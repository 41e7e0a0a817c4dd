"""Draws images from a trained model: of classes by name or number, as a grid, as files, as a film of their path.

    python sample.py --load_dir runs/demo --classes 3,7 --num_samples 16 --cfg_scale 2 --denoise_timesteps 64
    python sample.py --load_dir runs/demo --film --cfg_scale 2 --out images

No statistics, no Inception network. Sample i is the sample i of eval_fid.py with the same seed and labels. Images of
your own, and images between two samples, are drawn by edit.py.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import UInt8
from ml_collections import ConfigDict

from utils.base.files import check_free_space
from utils.base.hosts import is_first
from utils.base.messages import log, progress_bar
from utils.codecs.codec import pixel_format
from utils.conditions.condition import count_rows, number_rows, take_rows
from utils.flags import program
from utils.flags.conditions import read_sweep
from utils.flags.definitions import define_process_flags
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
from utils.flags.help import define_moved_flags, refuse_moved_flags, topic
from utils.images import films, plotting
from utils.images.samples import SampleWriter
from utils.sampling.generator import RECIPE_BATCH_SIZE

# All that may be written into --out: a folder of such a name is refused before the work.
FILES = ("grid.png", "pairs.png", "sweep.png", "strip.png", *(f"film.{name}" for name in films.FORMATS))
NUM_STAGES = 8  # columns of the strip beside the noise; rows at most
MAX_SHOWN = 400  # samples in the grid
MAX_PAIRS = (16, 8)  # condition images in a table, and samples below each

# Flags that sample.py had before edit.py took them over: {flag: what it needs beside it, with a word for the value}.
EDIT_FLAGS = {
    "interpolate": {},
    "between": {"interpolate": "8"},
    "invert": {},
    "edit": {"invert": "FOLDER"},
    "inpaint": {"mask": "IMAGE"},
    "mask": {"inpaint": "FOLDER"},
    "inpaint_repeats": {"inpaint": "FOLDER"},
}
# Those of sample.py that edit.py does not have, or takes with --interpolate alone.
OWN_FLAGS = (
    *("sweep", "film", "film_frames", "film_format", "film_seconds", "film_title"),
    *("coordinator_address", "num_processes", "process_id"),
)


def define_flags() -> None:
    define_drawing_flags(num_samples="Samples.")
    with topic("What is drawn"):
        flags.DEFINE_string("sweep", None, "Also a row of images of one noise: NAME=FIRST:LAST:COUNT, angle=0:1:9.")
    define_film_flags("Also an animation from noise to image, and a strip of eight stages.")
    # Frames are points of the path: no film has more of them than the sampler has steps.
    with topic("Films"):
        flags.DEFINE_integer("film_frames", 32, "Frames of the film beside the noise; no more than steps.", 1, 1000)
    define_generator_flags(wandb_name="sample")
    define_process_flags()
    define_moved_flags(EDIT_FLAGS)


def draw(request: Request) -> None:
    """Draws the samples and writes a grid of the first; with --save_samples, each by itself, too."""
    config = request.config
    generator = request.generator

    # Room first: the samples of a large file take hours. Of several processes, one writes.
    is_saving = bool(config.save_samples) and is_first()
    if is_saving and config.save_samples.endswith(".npz"):
        item_size = np.dtype(pixel_format(generator.model.codec).dtype).itemsize
        size = config.num_samples * math.prod(generator.model.image_shape) * item_size
        check_free_space(Path(config.save_samples), "save_samples", size)

    # One batch after another. Only those that the grid shows stay in memory.
    num_devices = generator.model.mesh.size
    requested = min(config.batch_size or RECIPE_BATCH_SIZE, config.num_samples)
    batch_size = -(-requested // num_devices) * num_devices
    shown: list[UInt8[np.ndarray, "b h w c"]] = []
    bar = progress_bar(total=config.num_samples, unit="image", desc=str(request.sampler))
    batches = generator.generate(request.sampler, config.num_samples, batch_size, request.conditions, bar)
    saving: Any = nullcontext()
    if is_saving:
        saving = SampleWriter(config.save_samples, config.num_samples, generator.condition.to_columns)
    with bar, saving as writer:
        for batch in batches:
            images, conditions = batch.to_host()
            if sum(map(len, shown)) < MAX_SHOWN:
                shown.append(generator.to_pictures(images))
            if writer is not None:
                writer.write(images, conditions)  # in the format of the data: floats in their range

    # The grid comes last, but its path first. The samples are complete even if the grid does not fit on the disk.
    images = np.concatenate(shown)[:MAX_SHOWN]
    conditions = jax.tree.map(lambda rows: rows[: len(images)], request.conditions)
    places, names = number_rows(generator.condition, conditions)
    try:
        request.pictures.save_grid("grid.png", images, places, names, request.title)
        save_pairs(request, images)
    finally:
        if is_saving:
            request.pictures.written.append(Path(config.save_samples))


def save_pairs(request: Request, images: UInt8[np.ndarray, "n h w c"]) -> None:
    """Writes the images that samples were given, side by side, and the first samples of each below it.

    Where conditions are no images, it writes nothing.
    """
    # Conditions come in turn: sample i + period has that of sample i.
    period = len(images) if request.chosen is None else min(count_rows(request.chosen), len(images))
    count = min(period, MAX_PAIRS[0])
    given = request.generator.condition.pictures(take_rows(request.conditions, slice(count)))
    if given is None:
        return
    rows = [images[start:][:count] for start in range(0, len(images) - count + 1, period)][: MAX_PAIRS[1]]
    table = plotting.put_before(given, np.stack(rows, axis=1)).swapaxes(0, 1)
    request.pictures.save_table("pairs.png", table, ("given", *["sample"] * len(rows)), (), request.title)


def sweep(request: Request) -> None:
    """Draws sample 0 under equally spaced values of one number of its condition, side by side."""
    config = request.config
    generator = request.generator
    found = read_sweep(config.sweep, config.condition, generator.condition)

    # The same noise everywhere: what differs is the condition alone.
    noise = jnp.repeat(generator.noise(range(1)), len(found.titles), axis=0)
    latents = generator.sample_latents(noise, found.conditions, request.sampler)
    images = generator.to_pictures(generator.decode(latents))
    title = f"{request.title}{', ' * bool(found.others)}{found.others}"
    request.pictures.save_table("sweep.png", images[None], (), found.titles, title)


def film(request: Request) -> None:
    """Films the path of the first samples, all of them at once, and writes a strip of eight stages of eight of them."""
    config = request.config
    sampler = request.sampler
    generator = request.generator
    count = min(config.num_samples, films.MAX_SAMPLES)
    num_frames = config.film_frames if sampler.is_adaptive else min(config.film_frames, sampler.num_steps)

    # The animation.
    conditions = jax.tree.map(lambda rows: rows[:count], request.conditions)
    path = generator.path(generator.noise(range(count)), conditions, sampler, num_frames)
    bar = progress_bar(path, "film", num_frames + 1, unit="frame")
    frames = np.stack([generator.to_pictures(generator.decode(latents)) for latents in bar])
    places, names = number_rows(generator.condition, conditions)
    title = request.choose_film_title(request.title)
    request.pictures.save_film(f"film.{config.film_format}", frames, places, names, title, config.film_seconds)

    # The strip.
    stages = np.linspace(0, num_frames, min(NUM_STAGES, num_frames) + 1).round().astype(int)
    rows = np.swapaxes(frames[stages, :NUM_STAGES], 0, 1)
    classes = [names[place] for place in places[:NUM_STAGES]]
    titles = [f"{stage / num_frames:.0%}" for stage in stages]
    title = f"{request.title}, by fraction of the path"
    request.pictures.save_table("strip.png", rows, classes, titles, title)


def check_sizes(request: Request) -> None:
    """Raises UserError if --scale makes a picture too large, before any is drawn."""
    config = request.config
    request.check_table("grid.png", *plotting.shape_grid(min(config.num_samples, MAX_SHOWN)))
    if config.sweep:
        found = read_sweep(config.sweep, config.condition, request.generator.condition)
        request.check_table("sweep.png", 1, len(found.titles))
    if config.film:
        count = min(config.num_samples, films.MAX_SAMPLES)
        request.check_film("film", count)
        request.check_table("strip.png", min(count, NUM_STAGES), NUM_STAGES + 1)


def main(config: ConfigDict) -> None:
    refuse_moved_flags(EDIT_FLAGS, "edit.py", but=OWN_FLAGS)
    check_effects(RULES["sample"], config)
    program.join_processes(config)
    check_request(config, FILES)
    request = load_request(config)
    check_sizes(request)
    several = "s" * (config.num_samples > 1)
    log(f"{config.num_samples:,} sample{several} of {config.load_dir}, {request.title}")
    with drawing(request, FILES):
        draw(request)
        if config.sweep:
            sweep(request)
        if config.film:
            film(request)


if __name__ == "__main__":
    program.run_program(define_flags, main)
