"""Draws images from a trained model: of classes by name or number, as a grid, as files, as a film of their path; and
changes given ones: to another class, or within a mask.

    python sample.py --load_dir runs/demo --classes 3,7 --num_samples 16 --cfg_scale 2 --denoise_timesteps 64
    python sample.py --load_dir runs/demo --film --cfg_scale 2 --out images
    python sample.py --load_dir runs/demo --interpolate 8 --classes 3
    python sample.py --load_dir runs/demo --invert photos --edit 3 --solver heun
    python sample.py --load_dir runs/demo --inpaint photos --mask mask.png

No statistics, no Inception network. Sample i is the sample i of eval_fid.py with the same seed and labels.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from utils.base.console import configure_output, log, progress_bar, show_result, warn
from utils.base.devices import explaining_out_of_memory, gather
from utils.base.errors import UserError, WriteError
from utils.base.files import atomic_write, check_free_space, check_writable
from utils.data.class_names import read_classes
from utils.flags import program, reading
from utils.flags.definitions import define_path, define_sampler_flags, define_vae_flag, define_wandb_flags
from utils.flags.help import topic
from utils.images import plotting
from utils.images.samples import SampleWriter, check_sample_path
from utils.networks.models import ImageModel
from utils.runs.opening import load_generator, split_load_dir
from utils.runs.trackers import Tracker
from utils.sampling.editing import labels_from_folders, read_images, read_mask
from utils.sampling.generator import RECIPE_BATCH_SIZE, ClassMix
from utils.sampling.solvers import ADAPTIVE_SOLVERS, ODE_SOLVERS, SOLVERS, SamplerConfig, slerp

FILES = (
    "grid.png", "film.webp", "film.gif", "strip.png", "interpolation.png", "inversion.png", "noise.npz",
    "inpainting.png",
)  # fmt: skip
NUM_STAGES = 8
MAX_FILM_SAMPLES = 64
MAX_SHOWN = 400  # samples in the grid
FILM_SECONDS = 3.0


def define_flags() -> None:
    with topic("What is drawn"):
        define_path("load_dir", None, "Folder of a run, or RUN/checkpoints/STEP for one of its checkpoints.")
        flags.DEFINE_string("classes", None, "Names or numbers of classes, separated by commas, in turn; or all.")
        flags.DEFINE_enum("labels", "uniform", ["uniform", "balanced"], "How labels are drawn without --classes.")
        flags.DEFINE_integer("num_samples", 16, "Samples.", 1, 10**7)
        flags.DEFINE_integer("seed", 0, "Sample i depends on this, on i and on its class alone.")
        flags.DEFINE_enum("params", "ema", ["ema", "raw"], "The EMA of the parameters, or the parameters themselves.")
    with topic("Output"):
        define_path("out", None, "Folder for what is drawn; default: samples/ in the folder of the run.")
        define_path("save_samples", None, "Also write each sample: .npz (arr_0 uint8 NHWC, arr_1 labels), or PNGs.")
        flags.DEFINE_bool("quiet", False, "Paths of what is written and errors alone.")
    with topic("Films and interpolations"):
        flags.DEFINE_bool("film", False, "Also an animation from noise to image, and a strip of eight stages.")
        flags.DEFINE_integer("film_frames", 32, "Frames of the film beside the noise; no more than steps.", 1, 1000)
        flags.DEFINE_enum("film_format", "webp", ["webp", "gif"], "Format of the film.")
        flags.DEFINE_integer("interpolate", None, "Instead: rows of so many images between two samples.", 2, 100)
        flags.DEFINE_enum(
            "between", "noise", ["noise", "classes"], "What --interpolate varies: noise, on the sphere, or the class."
        )
    with topic("Images of your own"):
        define_path("invert", None, "Instead: folder of images whose noise is found; they are resized as needed.")
        flags.DEFINE_string("edit", None, "With --invert: classes under which the images are made again.")
        define_path("inpaint", None, "Instead: folder of images in which the hole of --mask is filled.")
        define_path("mask", None, "With --inpaint: image of the run's size; white is filled, black is kept.")
        flags.DEFINE_integer(
            "inpaint_repeats", 5, "How often each step of --inpaint is taken (RePaint); more fit better.", 1, 1000
        )
    define_sampler_flags(cfg_scale="4", denoise_timesteps="64")
    define_compute_flags()
    define_wandb_flags(name="sample", mode="disabled")


@topic("Compute")
def define_compute_flags() -> None:
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Compute dtype; default: the run's.")
    flags.DEFINE_integer("batch_size", None, "Samples at a time, over all devices; default: 128 at most.")
    define_vae_flag()


def choose_classes(text: str | None, model: ImageModel, flag: str = "classes") -> list[int] | None:
    """The labels that --classes names, in its order; None without it. UserError for what is no class."""
    names = model.class_names
    if text is None:
        return None
    if text.strip() == "all" and "all" not in names:
        return np.flatnonzero(model.drawn_classes).tolist()
    try:
        labels = read_classes(text, names)
    except UserError as error:
        raise UserError(f"--{flag}={text}: {error}") from None
    if empty := [names[label] for label in dict.fromkeys(labels) if label in model.empty_classes]:
        warn(f"--{flag}={text}: the run had no training images of {', '.join(empty[:5])}; expect noise")
    return labels


def read_sampler(config: ConfigDict, model: ImageModel) -> SamplerConfig:
    """The one sampler of the command line."""
    dropout = model.network.config.class_dropout_prob
    samplers = reading.read_samplers(config, dropout, model.objective, model.latent_shape[-1])
    if len(samplers) > 1:
        raise UserError("--cfg_scale and --denoise_timesteps: give one of each; eval_fid.py compares several")
    return samplers[0]


def short_names(files: list[Path]) -> list[str]:
    """FOLDER/NAME of each, as much as fits beside an image."""
    return ["/".join(file.with_suffix("").parts[-2:])[-24:] for file in files]


class Drawing:
    """The samples of one command: which they are, and what is made of them."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.generator = load_generator(
            config.load_dir,
            params=config.params,
            seed=config.seed,
            label_mode=config.labels,
            dtype=config.dtype,
            vae=config.vae,
            needs_images=True,
        )
        model = self.generator.model
        self.sampler = read_sampler(config, model)
        classes = choose_classes(config.classes, model)
        if classes is None:
            self.labels = self.generator.labels(range(config.num_samples))
        else:
            if len(classes) > config.num_samples:
                warn(
                    f"--classes={config.classes} names {len(classes)} classes; only the first are drawn with "
                    f"--num_samples={config.num_samples}"
                )
            if config.interpolate is not None and config.between == "classes" and len(set(classes)) == 1:
                raise UserError(f"--classes={config.classes}: --between=classes needs two classes; give another")
            self.labels = np.resize(np.array(classes, np.int32), config.num_samples)
        self.out = Path(config.out or split_load_dir(config.load_dir)[0] / "samples")
        check_writable(self.out, "out", names=FILES)
        self.written: list[Path] = []

    @property
    def title(self) -> str:
        return f"{self.sampler}, seed {self.config.seed}"

    def run(self) -> None:
        """Draws what the command line asks for."""
        if self.config.interpolate is not None:
            self.interpolate()
        elif self.config.invert is not None:
            self.invert()
        elif self.config.inpaint is not None:
            self.inpaint()
        else:
            self.draw()
            if self.config.film:
                self.film()

    def show_written(self) -> None:
        for path in self.written:
            show_result(str(path))

    def save_figure(self, name: str, figure) -> None:
        with atomic_write(self.out / name) as temporary:
            figure.savefig(temporary, format="png")
        self.written.append(self.out / name)

    def draw(self) -> None:
        """The grid, and each sample by itself on demand."""
        config, num_devices = self.config, self.generator.model.mesh.size
        if config.save_samples and config.save_samples.endswith(".npz"):
            size = config.num_samples * math.prod(self.generator.model.image_shape)
            check_free_space(Path(config.save_samples), "save_samples", size)
        requested = min(config.batch_size or RECIPE_BATCH_SIZE, config.num_samples)
        batch_size = -(-requested // num_devices) * num_devices
        shown: list[UInt8[np.ndarray, "b h w c"]] = []
        batches = self.generator.generate(self.sampler, config.num_samples, batch_size, self.labels)
        bar = progress_bar(total=config.num_samples, unit="image", desc=str(self.sampler))
        saving = SampleWriter(config.save_samples, config.num_samples) if config.save_samples else nullcontext()
        with bar, saving as writer:
            for batch in batches:
                images, labels = batch.to_host()
                if sum(map(len, shown)) < MAX_SHOWN:
                    shown.append(images)
                if writer is not None:
                    writer.write(images, labels)
                bar.update(len(images))
        images = np.concatenate(shown)[:MAX_SHOWN]
        names = self.generator.class_names
        try:
            self.save_figure("grid.png", plotting.sample_grid(images, self.labels[: len(images)], names, self.title))
        finally:
            if config.save_samples:
                self.written.append(Path(config.save_samples))

    def film(self) -> None:
        """The path of the first samples: an animation of all of them, and a strip of eight stages of eight."""
        config, count = self.config, min(self.config.num_samples, MAX_FILM_SAMPLES)
        num_frames = config.film_frames if self.sampler.is_adaptive else min(config.film_frames, self.sampler.num_steps)
        noise, labels = self.generator.noise(range(count)), self.labels[:count]
        path = self.generator.path(noise, labels, self.sampler, num_frames)
        bar = progress_bar(path, "film", num_frames + 1, unit="frame")
        frames = np.stack([self.generator.decode(latents) for latents in bar])
        names = self.generator.class_names
        with atomic_write(self.out / f"film.{config.film_format}") as temporary:
            plotting.save_film(temporary, frames, config.film_format, FILM_SECONDS, labels, names, self.title)
        self.written.append(self.out / f"film.{config.film_format}")
        stages = np.linspace(0, num_frames, min(NUM_STAGES, num_frames) + 1).round().astype(int)
        rows = np.swapaxes(frames[stages, :NUM_STAGES], 0, 1)
        classes = [names[label] for label in labels[:NUM_STAGES]]
        titles = [f"{stage / num_frames:.0%}" for stage in stages]
        title = f"{self.title}, by fraction of the path"
        self.save_figure("strip.png", plotting.image_table(rows, classes, titles, title))

    def interpolate(self) -> None:
        """Rows of images between samples 2k and 2k + 1: of the class of the first, from noise between; or from the
        noise of the first, of classes between."""
        config, rows = self.config, max(1, self.config.num_samples // 2)
        columns, names = config.interpolate, self.generator.class_names
        first, second = self.labels[0::2][:rows], np.resize(self.labels, 2 * rows)[1::2]
        ends, fractions = self.generator.noise(range(2 * rows)), jnp.linspace(0, 1, columns)
        if config.between == "noise":
            noise = slerp(ends[0::2], ends[1::2], fractions).reshape(-1, *ends.shape[1:])
            labels = np.repeat(first, columns)
            titles = [names[label] for label in first]
        else:
            noise = jnp.repeat(ends[0::2], columns, axis=0)
            labels = ClassMix(*(np.repeat(side, columns) for side in (first, second)), np.tile(fractions, rows))
            titles = [f"{names[a]} to {names[b]}" for a, b in zip(first, second, strict=True)]
        images = np.concatenate(list(self._solve(noise, labels)))
        table = images.reshape(rows, columns, *images.shape[1:])
        what = "two noises" if config.between == "noise" else "two classes"
        self.save_figure("interpolation.png", plotting.image_table(table, titles, (), f"{self.title}, between {what}"))

    def invert(self) -> None:
        """The noise of given images, what it leads back to, and what to under other classes."""
        config, generator = self.config, self.generator
        edits = choose_classes(config.edit, generator.model, "edit") or []
        images, files, labels = self._read_own(config.invert, "invert")
        plain = self.sampler._replace(cfg_scale=None)
        latents = generator.encode(images)
        noise = generator.invert(latents, labels, plain)
        again = generator.sample_latents(noise, labels, plain)
        columns = [images, generator.decode(noise), generator.decode(again)]
        titles = ["image", "its noise", "again"]
        for label in edits:
            columns.append(generator.decode(generator.sample_latents(noise, np.full_like(labels, label), self.sampler)))
            titles.append(generator.class_names[label])
        error = float(jnp.sqrt(jnp.square(again - latents).mean()))
        log(f"round trip: root mean square error {error:.2g} of latents whose own is {float(latents.std()):.2g}")
        guidance = f", to other classes with {self.title}" if edits else ""
        table = np.stack(columns, axis=1)
        self.save_figure("inversion.png", plotting.image_table(table, short_names(files), titles, f"{plain}{guidance}"))
        with atomic_write(self.out / "noise.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, noise=gather(noise), labels=labels, files=[str(path) for path in files])
        self.written.append(self.out / "noise.npz")
        if config.save_samples:
            edited = np.stack(columns[3:], axis=1).reshape(-1, *images.shape[1:])
            self._save_samples(edited, np.tile(edits, len(images)))

    def inpaint(self) -> None:
        """Given images with the hole of a mask filled."""
        config, generator = self.config, self.generator
        is_hole = read_mask(config.mask, generator.model.image_shape)
        images, files, labels = self._read_own(config.inpaint, "inpaint")
        filled = generator.inpaint(images, is_hole, labels, self.sampler, config.inpaint_repeats)
        masked = np.where(is_hole[..., None], np.uint8(127), images)
        table, titles = np.stack([images, masked, filled], axis=1), ("image", "hole", "filled")
        self.save_figure("inpainting.png", plotting.image_table(table, short_names(files), titles, self.title))
        if config.save_samples:
            self._save_samples(filled, labels)

    def _read_own(
        self, folder: str, flag: str
    ) -> tuple[UInt8[np.ndarray, "n h w c"], list[Path], Int[np.ndarray, " n"]]:
        """(images, files, labels) of a folder: of --classes, of the classes that its subfolders are named after, or of
        none."""
        model = self.generator.model
        images, files = read_images(folder, model.image_shape, self.config.num_samples, flag)
        if self.config.classes is not None:
            return images, files, self.labels[: len(files)]
        labels = labels_from_folders(folder, files, model.class_names)
        unknown = [file.parent for file in files if file.parent != Path(folder)]
        if labels is None and unknown:
            warn(f"--{flag}={folder}: not all of its folders are named after classes, so its images have no label")
        if labels is None and len(model.class_names) == 1:
            labels = [0] * len(files)
        if labels is None and model.network.config.class_dropout_prob == 0:
            raise UserError(f"--{flag}={folder}: of which classes are the images? Give --classes")
        no_label = model.network.config.num_classes
        return images, files, np.array([no_label] * len(files) if labels is None else labels, np.int32)

    def _save_samples(self, images: UInt8[np.ndarray, "n h w c"], labels: np.ndarray) -> None:
        with SampleWriter(self.config.save_samples, len(images)) as writer:
            writer.write(images, labels)
        self.written.append(Path(self.config.save_samples))

    def _solve(
        self, noise: Float[Array, "n h w c"], labels: Int[np.ndarray, " n"] | ClassMix
    ) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        size = self.config.batch_size or RECIPE_BATCH_SIZE
        for start in progress_bar(range(0, len(noise), size), "interpolation", unit="batch"):
            rows = slice(start, start + size)
            batch = jax.tree.map(lambda values, rows=rows: values[rows], labels)
            yield self.generator.decode(self.generator.sample_latents(noise[rows], batch, self.sampler))


def refuse_ignored(config: ConfigDict) -> None:
    """UserError for flags that would have no effect, and for what cannot be had at once."""
    modes = [name for name in ("interpolate", "invert", "inpaint") if config[name] is not None]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]}: give one of them")
    if modes:
        reading.refuse_ignored(("film",), f"with --{modes[0]}")
    if config.classes is not None:
        reading.refuse_ignored(("labels",), "beside --classes")
    if not config.film:
        reading.refuse_ignored(("film_frames", "film_format"), "without --film")
    if config.interpolate is None:
        reading.refuse_ignored(("between",), "without --interpolate")
    else:
        reading.refuse_ignored(("save_samples",), "with --interpolate, which draws rows of images alone")
    if config.invert is None:
        reading.refuse_ignored(("edit",), "without --invert")
    elif config.edit is None:
        guidance = ("cfg_scale", "cfg_interval", "cfg_channels")
        reading.refuse_ignored((*guidance, "save_samples"), "with --invert but without --edit: it is without guidance")
    if config.invert is not None:
        reading.refuse_ignored(("seed",), "with --invert, which draws no noise")
    if config.invert is not None or config.inpaint is not None:
        reading.refuse_ignored(("labels",), "on images of your own; --classes names theirs")
        reading.refuse_ignored(("batch_size",), "on images of your own, which are one batch; --num_samples limits them")
    if config.inpaint is None:
        reading.refuse_ignored(("mask", "inpaint_repeats"), "without --inpaint")
    elif config.mask is None:
        raise UserError(
            "--inpaint: --mask is not given; name an image of the run's size, white where it is to be filled"
        )
    if modes:
        check_solver(config.solver, modes[0])


def check_solver(solver: str, mode: str) -> None:
    """UserError for a solver that cannot do what --interpolate, --invert or --inpaint asks for."""
    fitting = {
        "interpolate": [name for name in SOLVERS if not SOLVERS[name].is_stochastic] + list(ADAPTIVE_SOLVERS),
        "invert": [*ODE_SOLVERS, *ADAPTIVE_SOLVERS],
        "inpaint": ODE_SOLVERS,
    }[mode]
    if solver not in fitting:
        raise UserError(f"--solver={solver} cannot {mode}; use one of {', '.join(fitting)}")


def main(config: ConfigDict) -> None:
    configure_output(is_apart=True, is_quiet=config.quiet)
    if not config.load_dir:
        raise UserError("--load_dir is not given: name the folder of a run, such as runs/demo")
    refuse_ignored(config)
    if config.batch_size is not None and config.batch_size < 1:
        raise UserError(f"--batch_size={config.batch_size}: use 1 or more")
    if config.out:
        check_writable(Path(config.out), "out", creates=False, names=FILES)
    if config.save_samples:
        check_sample_path(config.save_samples)
    drawing = Drawing(config)
    if config.invert is None and config.inpaint is None:
        several = "s" * (config.num_samples > 1)
        log(f"{config.num_samples:,} sample{several} of {config.load_dir}, {drawing.title}")
    try:
        with explaining_out_of_memory("sampling", "a smaller --batch_size"):
            drawing.run()
    except WriteError as error:
        drawing.show_written()
        whole = "the files above are" if drawing.written else "no file is"
        raise WriteError(error.path, error.error, error.whole or f"{whole} whole") from error
    if config.wandb.mode != "disabled":
        tracker = Tracker(drawing.out, config, 0)
        tracker.log_image_files(drawing.written)
        tracker.close()
    drawing.show_written()


if __name__ == "__main__":
    program.run_program(define_flags, main)
