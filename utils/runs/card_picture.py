"""The picture of a model card: samples drawn from the exported folder itself, or a file that the user names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_transformer import DiT, DiTConfig
from utils.base.devices import explaining_out_of_memory
from utils.base.external import BadFileError, read_bounded
from utils.base.files import atomic_write
from utils.base.messages import UserError, log, one_line, progress_bar
from utils.codecs.codec import AbsentCodec
from utils.conditions.condition import number_rows, restore_condition
from utils.images.decoding import BrokenImageError, decode_image
from utils.images.pictures import PictureFolder
from utils.runs.model_card import EXAMPLE_SCALE, EXAMPLE_STEPS, example_fields, is_guided
from utils.runs.opening import load_generator
from utils.sampling.generator import ImageGenerator
from utils.sampling.solvers import SamplerConfig

NAME = "samples"  # and the suffix of the format
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")  # that the hub shows
MAX_BYTES = 2**25  # of a file that is named
NUM_SAMPLES = 16
NUM_STAGES = 16  # of the progress bar
MAX_CPU_OPERATIONS = 5e13  # some minutes on a few cores; more is not begun there


def check_picture(picture: str) -> Path:
    """Returns the path of the file of --picture. Raises UserError where it is no image that the hub shows."""
    path = Path(picture)
    flag = f"--picture={picture}"
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{flag}: name a file of {', '.join(SUFFIXES)}, or none")
    try:
        decode_image(read_bounded(path, MAX_BYTES))
    except (BadFileError, BrokenImageError) as error:
        raise UserError(f"{flag} is no image that can be read ({one_line(error)}); name another, or none") from None
    return path


def add_picture(out: Path, picture: str | None, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """Writes the picture of an exported folder; returns (its name, a caption), (None, '') where there is none.

    `picture` is that of --picture: a file, none, or None for samples, drawn where the configuration allows it.
    """
    if picture == "none":
        return None, ""
    if picture is None:
        return draw_samples(out, config)

    # The user's own, as it is.
    path = check_picture(picture)
    name = f"{NAME}{path.suffix.lower()}"
    content = read_bounded(path, MAX_BYTES)
    with atomic_write(out / name) as temporary:
        temporary.write_bytes(content)
    return name, ""


def draw_samples(out: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """Draws the first samples of seed 0 by the model of an exported folder, guided as in the card's examples; returns
    as `add_picture`. The reason is logged where they cannot be drawn."""
    sampler = SamplerConfig(EXAMPLE_STEPS, EXAMPLE_SCALE if is_guided(config) else None)
    generator, reason = _load(out, config, sampler)
    if generator is None:
        log(f"note: the card has no picture: {reason}; --picture FILE names one")
        return None, ""

    # Rows of the data are not published, so that a condition of another kind is the card's example.
    condition = generator.condition
    if condition.DRAWS_ROWS:
        conditions = condition.from_fields([example_fields(condition)] * NUM_SAMPLES)
    else:
        conditions = generator.conditions(range(NUM_SAMPLES))
    path = generator.path(generator.noise(range(NUM_SAMPLES)), conditions, sampler, NUM_STAGES)
    with explaining_out_of_memory("the picture of the card", "--picture none"):
        *_, latents = progress_bar(path, "samples of the card", NUM_STAGES + 1, unit="part")
        images = generator.to_pictures(np.asarray(generator.decode(latents)))

    # The caption tells all that the picture depends on.
    places, names = number_rows(condition, conditions)
    title = f"{sampler}, seed 0"
    PictureFolder(out).save_grid(f"{NAME}.png", images, places, names, title)
    return f"{NAME}.png", f"The first {NUM_SAMPLES} samples: {title}."


def _load(out: Path, config: Mapping[str, Any], sampler: SamplerConfig) -> tuple[ImageGenerator | None, str]:
    """Returns the generator of an exported folder, or None and the reason why it can draw no picture."""
    # What the configuration alone tells: nothing is loaded, or fetched, in vain.
    data = config["dataset"]
    condition = restore_condition(data)
    fields = example_fields(condition)
    if condition.DRAWS_ROWS and (not fields or "text" in fields):
        return None, "its conditions are rows of the data, which are not published"
    network = DiT(DiTConfig.from_mapping(config["model"]), condition=condition)
    passes = EXAMPLE_STEPS * (1 if sampler.cfg_scale is None else 2)
    operations = NUM_SAMPLES * passes * network.count_flops(tuple(data["latent_shape"]))
    if jax.default_backend() == "cpu" and operations > MAX_CPU_OPERATIONS:
        return None, f"{operations:.0e} operations would take long on a CPU"

    # A codec that is not here, or not that of the training, is no reason not to export.
    try:
        generator = load_generator(out)
        generator.check_sampler(sampler)
    except UserError as error:
        return None, str(error)
    codec = generator.model.codec
    return (None, codec.reason) if isinstance(codec, AbsentCodec) else (generator, "")
