"""Flags, loading and reporting of the programs that draw, sample.py and edit.py."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from jaxtyping import PyTree
from ml_collections import ConfigDict

from utils.base.devices import explaining_out_of_memory
from utils.base.files import check_writable, prepare_output_folder
from utils.base.hosts import is_first
from utils.base.messages import UserError, WriteError, configure_output, warn
from utils.codecs.codec import pixel_format
from utils.conditions.condition import count_rows, resize_rows
from utils.flags import reading
from utils.flags.conditions import define_condition_flags, read_conditions
from utils.flags.definitions import (
    define_codec_flags,
    define_params_flag,
    define_path,
    define_quiet_flag,
    define_sampler_flags,
    define_tracker_flags,
)
from utils.flags.help import topic
from utils.images import films, plotting
from utils.images.pictures import PictureFolder
from utils.images.pixels import check_pictures
from utils.images.plotting import MAX_SCALE, MIN_SCALE
from utils.images.samples import check_sample_path
from utils.networks.models import ImageModel
from utils.runs.opening import load_generator, split_load_dir
from utils.sampling.generator import ImageGenerator
from utils.sampling.solvers import SamplerConfig
from utils.trackers.trackers import Trackers, choose_trackers


def define_drawing_flags(num_samples: str) -> None:
    """Registers the flags of the run, the samples and the output. `num_samples` is the help of that flag."""
    with topic("What is drawn"):
        define_path("load_dir", None, "Folder of a run, RUN/checkpoints/STEP, or an exported folder or file.")
        define_condition_flags()
        flags.DEFINE_enum("labels", "uniform", ["uniform", "balanced"], "How labels are drawn where none are given.")
        flags.DEFINE_integer("num_samples", 16, num_samples, 1, 10**7)
        flags.DEFINE_integer("seed", 0, "Sample i depends on this, on i and on its condition alone.")
        define_params_flag()
    with topic("Output"):
        define_path("out", None, "Folder for what is drawn; default: samples/ in the folder of the run.")
        define_path(
            "save_samples", None, "Also write each sample: X.npz with its condition, as npz:X.npz reads it, or PNGs."
        )
        flags.DEFINE_float(
            "scale",
            1.0,
            "Factor of the size at which images are drawn; above 1 texts grow with them.",
            MIN_SCALE,
            MAX_SCALE,
        )
        define_quiet_flag()


def define_film_flags(film: str) -> None:
    """Registers the flags of films. `film` is the help of --film."""
    with topic("Films"):
        flags.DEFINE_bool("film", False, film)
        flags.DEFINE_enum(
            "film_format", "webp", list(films.FORMATS), "Format of the film; mp4 needs make setup EXTRAS=film."
        )
        flags.DEFINE_float(
            "film_seconds",
            films.SECONDS,
            "Seconds of the film, before its first frame is held for 0.5 and its last for 2.",
            films.MIN_SECONDS,
            films.MAX_SECONDS,
        )
        flags.DEFINE_string("film_title", None, "Title of the film, or none; default: that of the grid.")


def define_generator_flags(wandb_name: str) -> None:
    """Registers the flags of how samples are computed, and of the trackers, with wandb off by default."""
    define_sampler_flags(cfg_scale="4", denoise_timesteps="64")
    with topic("Compute"):
        flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Compute dtype; default: the run's.")
        flags.DEFINE_integer("batch_size", None, "Samples at a time, over all devices; default: 128 at most.")
        define_codec_flags()
    define_tracker_flags(name=wandb_name, mode="disabled")


@dataclasses.dataclass(frozen=True)
class Request:
    """A command that draws, with everything loaded that it names."""

    config: ConfigDict
    generator: ImageGenerator
    sampler: SamplerConfig
    chosen: PyTree | None  # the given conditions, in their order
    conditions: PyTree  # (num_samples, ...) of samples 0, 1, 2, ...; of classes, labels
    pictures: PictureFolder

    @property
    def title(self) -> str:
        return f"{self.sampler}, seed {self.config.seed}"

    def choose_film_title(self, default: str) -> str:
        """Returns the title of the film, in one line: that of --film_title, if it is given."""
        title = self.config.film_title
        if title is None:
            return default
        return "" if title == "none" else " ".join(title.split())

    @property
    def image_size(self) -> tuple[int, int]:
        """The (height, width) of the images."""
        return self.generator.model.image_shape[:2]

    def check_table(self, name: str, rows: int, columns: int) -> None:
        """Raises UserError, before any work, if --scale makes a table of so many images too large."""
        plotting.check_table(name, (rows, columns), self.image_size, self.config.scale)

    def check_film(self, name: str, num_samples: int) -> str:
        """Returns the file of the film, in the format of --film_format. Raises UserError if --scale makes it too large
        to play."""
        file = f"{name}.{self.config.film_format}"
        films.check_film(file, num_samples, self.image_size, self.config.scale)
        return file


def check_request(config: ConfigDict, names: tuple[str, ...]) -> None:
    """Raises UserError if no run is named or an output cannot be written, before anything is loaded.

    `names` are the files that may be written into --out.
    """
    # Before the first message, as the standard output is for the paths of what is written.
    configure_output(is_apart=True)
    if not config.load_dir:
        raise UserError("--load_dir is not given: name the folder of a run, such as runs/demo")
    if config.batch_size is not None and config.batch_size < 1:
        raise UserError(f"--batch_size={config.batch_size}: use 1 or more")

    # Outputs, which would otherwise fail only after the sampling.
    if config.out:
        check_writable(Path(config.out), "out", names=names)
    if config.save_samples and is_first():
        check_sample_path(config.save_samples)
    if config.film and is_first():
        films.check_format(config.film_format)


def load_request(config: ConfigDict) -> Request:
    """Restores the run, and settles the sampler and the conditions.

    Raises UserError if the run cannot be loaded, or a value does not suit it.
    """
    # The run, with its codec: latents alone are no pictures.
    generator = load_generator(
        config.load_dir,
        params=config.params,
        seed=config.seed,
        label_mode=config.labels,
        dtype=config.dtype,
        codec=reading.read_codec(config),
        needs_images=True,
        guide=config.guide,
        guide_params=config.guide_params,
    )
    model = generator.model
    sampler = read_sampler(config, model)
    if config.save_samples and not config.save_samples.endswith(".npz"):
        what = f"--save_samples={config.save_samples}: PNGs hold"
        fix = "name a file .npz, which holds any array"
        check_pictures(pixel_format(model.codec), model.image_shape, what, fix)

    # A condition for each sample: the chosen ones in turn, or drawn ones, which depend on the seed.
    chosen = read_conditions(config, model)
    if chosen is None:
        conditions = generator.conditions(range(config.num_samples))
    else:
        if count_rows(chosen) > config.num_samples:
            warn(
                f"{count_rows(chosen)} conditions are given; only the first are drawn with "
                f"--num_samples={config.num_samples}"
            )
        conditions = resize_rows(chosen, config.num_samples)

    # Of RUN/checkpoints/STEP, too, the folder is that of the run.
    folder = Path(config.out or split_load_dir(config.load_dir)[0] / "samples")
    return Request(config, generator, sampler, chosen, conditions, PictureFolder(folder, config.scale))


def read_sampler(config: ConfigDict, model: ImageModel) -> SamplerConfig:
    """Returns the one sampler of the command line. Raises UserError for several, and for one that the model lacks."""
    network = model.network.config
    samplers = reading.read_samplers(
        config, network.class_dropout_prob, model.objective, model.latent_shape[-1], network.inner_head
    )
    # Files are named after what they show, not after a sampler: a second one would overwrite them.
    if len(samplers) > 1:
        raise UserError(
            "--denoise_timesteps and the scales of guidance: give one of each; eval_fid.py compares several"
        )
    return samplers[0]


@contextlib.contextmanager
def drawing(request: Request, names: tuple[str, ...]) -> Iterator[None]:
    """Prints the paths of what the block has written, also if it fails on a full disk, and logs the images.

    Before the block it creates the folder; UserError if files of these `names` cannot be written there.
    """
    config = request.config
    pictures = request.pictures
    # Again, and in earnest: `check_request` has only looked at --out.
    prepare_output_folder(pictures.folder, "out", names=names)
    try:
        with explaining_out_of_memory("sampling", "a smaller --batch_size"):
            yield
    except WriteError as error:
        pictures.show_written()  # finished files are not lost with the others
        finished = "the files above are" if pictures.written else "no file is"
        raise WriteError(error.path, error.error, error.whole or f"{finished} whole") from error

    # Trackers last: by now everything is on disk.
    settings = config.to_dict()
    if choose_trackers(settings):
        trackers = Trackers(pictures.folder, settings, first_step=0)
        trackers.log_image_files(0, pictures.written)
        trackers.close()
    pictures.show_written()
