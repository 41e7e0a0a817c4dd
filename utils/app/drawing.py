"""Draws what a request asks for: samples and their path, images between two, images of the user's own changed.

Sample i is the sample i of sample.py with the same seed: paths are followed in stages, which change no bit.
"""

import base64
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8
from PIL import Image

from utils.app.jobs import Job
from utils.app.model import Served, hide_paths
from utils.app.requests import Ask
from utils.base.devices import explaining_out_of_memory
from utils.conditions.condition import count_rows, number_rows, resize_rows
from utils.images import plotting
from utils.sampling import editing
from utils.sampling.generator import ImageGenerator

STAGE_STEPS = 4  # steps of a path at most, after which a job says how far it is, or ends


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Images that a request asked for, in the order of reading, with what is known of them."""

    pictures: UInt8[np.ndarray, "n h w c"]
    titles: list[str]
    columns: int | None  # of a table; None: as many as fit
    arrays: Mapping[str, Any]  # of its npz
    plot: Callable[[], Any]  # draws its figure
    film: UInt8[np.ndarray, "frames n h w c"] | None = None
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the images as PNGs in base64; of a film, the frames of each sample below one another."""
        found: dict[str, Any] = {
            "images": [
                {"png": encode_png(image), "title": title}
                for image, title in zip(self.pictures, self.titles, strict=True)
            ],
            "columns": self.columns,
            "remarks": list(self.remarks),
        }
        if self.film is not None:
            strips = np.swapaxes(self.film, 0, 1).reshape(len(self.pictures), -1, *self.film.shape[3:])
            found["films"] = [encode_png(strip) for strip in strips]
            found["frames"] = len(self.film)
        return found

    @property
    def num_bytes(self) -> int:
        """The memory of what its files are made of."""
        return self.pictures.nbytes + sum(np.asarray(array).nbytes for array in self.arrays.values())

    def to_npz(self) -> bytes:
        """Returns the file that sample.py --save_samples would write."""
        file = io.BytesIO()
        np.savez(file, **dict(self.arrays))
        return file.getvalue()

    def to_figure(self) -> bytes:
        """Returns the figure that sample.py or edit.py would write, as a PNG."""
        file = io.BytesIO()
        self.plot().savefig(file, format="png")
        return file.getvalue()


def encode_png(image: UInt8[np.ndarray, "h w c"]) -> str:
    """Returns an image as a PNG in base64: grey or RGB, of other channels the first."""
    file = io.BytesIO()
    Image.fromarray(image[..., :3] if image.shape[-1] >= 3 else image[..., 0]).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def draw(served: Served, ask: Ask, job: Job) -> Drawn:
    """Draws what a request asks for, and reports to its job meanwhile. Raises UserError where memory is exhausted."""
    generator = served.generator.with_seed(ask.seed)
    with explaining_out_of_memory("the request", "fewer samples"):
        drawn = TASKS[ask.task](generator, ask, job)
    remarks = list(map(hide_paths, ask.remarks))
    if ask.conditions is not None and (given := count_rows(ask.conditions)) > ask.num_samples:
        remarks.append(f"{given} conditions are given; only the first are drawn: {ask.num_samples}")
    return dataclasses.replace(drawn, remarks=tuple(remarks))


def follow_path(
    generator: ImageGenerator, noise: Float[Array, "n h w c"], conditions: PyTree, ask: Ask, job: Job
) -> Iterator[Float[Array, "n h w c"]]:
    """Yields the latents of all frames, from the noise on, or those at t = 1 alone where no film is asked for."""
    # An adaptive solver has no steps to count: its stages stand for them. Others take a few steps between two reports,
    # in a whole number of stages for each frame.
    sampler = ask.sampler
    frames = ask.frames or 1
    stages = 1 if sampler.is_adaptive else -(-sampler.num_steps // (STAGE_STEPS * frames))
    total = frames if sampler.is_adaptive else sampler.num_steps
    for stage, latents in enumerate(generator.path(noise, conditions, sampler, frames * stages)):
        # They are dispatched, not waited for: without this, the first report would come with the last.
        jax.block_until_ready(latents)
        job.report("steps", total * stage // (frames * stages), total)
        is_frame = stage % stages == 0
        if is_frame and (ask.frames or stage):
            yield latents


def choose_conditions(generator: ImageGenerator, ask: Ask) -> PyTree:
    """Returns the conditions of all samples: the given ones in turn, or drawn ones."""
    if ask.conditions is None:
        return generator.conditions(range(ask.num_samples))
    return resize_rows(ask.conditions, ask.num_samples)


def draw_samples(generator: ImageGenerator, ask: Ask, job: Job) -> Drawn:
    """Draws samples and, if frames are asked for, the stages of their path."""
    # A frame at a time is decoded: latents of a path may be many.
    conditions = choose_conditions(generator, ask)
    noise = generator.noise(range(ask.num_samples))
    frames = []
    for latents in follow_path(generator, noise, conditions, ask, job):
        images = generator.decode(latents)
        frames.append(generator.to_pictures(images))

    # As sample.py shows and saves the last of them.
    pictures = frames[-1]
    places, names = number_rows(generator.condition, conditions)
    arrays = {"arr_0": images, **generator.condition.to_columns(conditions)}
    title = f"{ask.sampler}, seed {ask.seed}"
    return Drawn(
        pictures,
        [names[place] for place in places],
        None,
        arrays,
        lambda: plotting.sample_grid(pictures, places, names, title),
        np.stack(frames) if ask.frames else None,
    )


def draw_table(
    ask: Ask,
    pictures: UInt8[np.ndarray, "n h w c"],
    columns: int,
    row_titles: Sequence[str],
    column_titles: Sequence[str],
    note: str,
    arrays: Mapping[str, Any],
) -> Drawn:
    """Returns images as a table of rows and columns, with the figure of edit.py. Each image has the title of its column
    or of its row."""
    rows = len(pictures) // columns
    table = pictures.reshape(rows, columns, *pictures.shape[1:])
    titles = list(column_titles) * rows or [row_titles[place // columns] for place in range(len(pictures))]
    return Drawn(
        pictures,
        titles,
        columns,
        {"arr_0": pictures, **arrays},
        lambda: plotting.image_table(table, row_titles, column_titles, note),
    )


def draw_between(generator: ImageGenerator, ask: Ask, job: Job) -> Drawn:
    """Draws rows of images between two samples."""
    # Two samples make a row.
    conditions = choose_conditions(generator, ask)
    between = editing.interpolate(generator, conditions, ask.columns, ask.between)
    (latents,) = follow_path(generator, between.noise, between.conditions, ask, job)
    images = generator.decode(latents)
    note = f"{ask.sampler}, seed {ask.seed}, between two {'noises' if ask.between == 'noise' else 'conditions'}"
    return draw_table(ask, generator.to_pictures(images), ask.columns, between.titles, (), note, {})


def invert_image(generator: ImageGenerator, ask: Ask, job: Job) -> Drawn:
    """Finds the noise of an image, and draws from it again: under its own class, and under others."""
    assert ask.image is not None
    assert ask.labels is not None
    total = 1 + len(ask.edits)
    # Its noise, and there and back.
    job.report("inverting", 0, total)
    found = editing.invert(generator, ask.image, ask.labels, ask.sampler)
    columns = [ask.image, generator.decode(found.noise), generator.decode(found.again)]
    titles = ["image", "its noise", "again"]

    # The same noise under other classes, with guidance.
    for done, label in enumerate(ask.edits, start=1):
        job.report("drawing as other classes", done, total)
        latents = generator.sample_latents(found.noise, np.full_like(ask.labels, label), ask.sampler)
        columns.append(generator.decode(latents))
        titles.append(generator.class_names[label])
    note = f"{ask.sampler.without_guidance()}, error {found.error:.2g} of {found.deviation:.2g}"
    pictures = np.concatenate(columns)
    return draw_table(ask, pictures, len(pictures), (), titles, note, {"noise": np.asarray(found.noise)})


def fill_hole(generator: ImageGenerator, ask: Ask, job: Job) -> Drawn:
    """Fills the hole of an image; all other pixels stay as they are."""
    assert ask.image is not None
    assert ask.is_hole is not None
    job.report("filling", 0, 1)
    filled = generator.inpaint(ask.image, ask.is_hole, ask.labels, ask.sampler, ask.repeats)

    # As given, with a grey hole, filled.
    masked = np.where(ask.is_hole[..., None], np.uint8(127), ask.image)
    pictures = np.concatenate([ask.image, masked, filled])
    title = f"{ask.sampler}, seed {ask.seed}"
    return draw_table(ask, pictures, 3, (), ("image", "hole", "filled"), title, {"mask": ask.is_hole})


TASKS = {"sample": draw_samples, "interpolate": draw_between, "invert": invert_image, "inpaint": fill_hole}
