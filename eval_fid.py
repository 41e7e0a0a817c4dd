"""Scores samples: of a run, for all step counts and guidance scales requested, or of a file.

    python eval_fid.py --load_dir runs/demo --denoise_timesteps 64,16,4 --cfg_scale 1,2 --num_samples 1000
    python eval_fid.py --samples samples.npz --fid_stats stats.npz

Prints a table, and writes fid.json, fid.csv, an image of samples for every row and a plot. Rows of the same settings
that fid.json has are not computed again, so that the same command continues after a kill; everything that enters a
number is among its settings.
"""

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import PyTree
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from utils.base.console import configure_output, log, show_result, warn
from utils.base.devices import (
    changed_variables,
    check_batch_memory,
    check_batch_size,
    explaining_out_of_memory,
    free_memory,
    gather,
    make_mesh,
    replicated,
)
from utils.base.errors import UserError, WriteError
from utils.base.files import atomic_write, check_writable, prepare_output_folder
from utils.conditions.classes import ClassCondition
from utils.flags import program, reading
from utils.flags.definitions import (
    define_path,
    define_sampler_flags,
    define_saved_model_flags,
    define_tracker_flags,
    define_vae_flag,
)
from utils.flags.help import topic
from utils.images import plotting
from utils.images.pixels import ImageBatch
from utils.images.samples import (
    Samples,
    SampleWriter,
    check_sample_path,
    content_sha256,
    holds_images,
    open_samples,
)
from utils.metrics.extractors import load_extractors
from utils.metrics.inception import CONVENTIONS, INCEPTION_SHA256, load_logits
from utils.metrics.measure import measure_images, pad_and_shard
from utils.metrics.metrics import caveats, compute_metrics, metric_columns
from utils.metrics.reference import (
    Convention,
    ReferenceStatistics,
    find_convention,
    has_statistics,
    load_statistics,
    save_statistics,
    warn_of_other_shape,
)
from utils.metrics.statistics import MAX_SAMPLE_ROWS, ImageStatistics
from utils.objectives.registry import make_objective
from utils.runs.opening import load_model, open_checkpoint, restore_params
from utils.runs.results import Results, check_json_path, plot_fid, to_markdown, write_csv, write_json_rows
from utils.runs.trackers import Trackers, choose_trackers
from utils.sampling.generator import RECIPE_BATCH_SIZE, ImageGenerator, hash_params
from utils.sampling.solvers import SOLVERS, SamplerConfig
from utils.training.advice import shipped_statistics, write_statistics_command

GRID_IMAGES = 64
FILES = ("fid.json", "fid.csv", "fid.png")  # beside grids of samples
LARGE_IMAGE_BYTES = 2**22  # of an image above which a batch, but for --batch_size, takes LARGE_BATCH_BYTES at most
LARGE_BATCH_BYTES = 2**28
STRAIGHTNESS_SAMPLES = 64  # at most
# Flags without effect on --samples.
OF_RUNS = (
    "cfg_scale", "cfg_interval", "cfg_channels", "use_cfg", "denoise_timesteps", "time_grid", "solver", "rtol", "atol",
    "labels", "params", "seed", "save_samples", "vae", "dataset_name", "use_stable_vae",
)  # fmt: skip
# Flags of training, without effect on any evaluation.
OF_TRAINING = ("model.preset", "model.lr", "model.beta1", "model.beta2", "model.target_update_rate")


def define_flags() -> None:
    with topic("What is scored"):
        define_path("load_dir", None, "Folder of a run, or RUN/checkpoints/STEP for one of its checkpoints.")
        define_path("samples", None, "Instead of a run: npz or .npy (uint8 NHWC) or folder of images to score.")
        flags.DEFINE_integer(
            "num_samples", 50_000, "Samples, exactly; of --samples the first, default all.", lower_bound=2
        )
        flags.DEFINE_enum("params", "ema", ["ema", "raw"], "The EMA of the parameters, or the parameters themselves.")
        flags.DEFINE_integer("seed", 0, "Sample i depends on this and on i alone.")
        flags.DEFINE_enum(
            "labels",
            "uniform",
            list(ClassCondition.DRAW_MODES),
            "How labels are drawn; dataset: as often as in --fid_stats.",
        )
        flags.DEFINE_integer(
            "batch_size", None, "Samples at a time, over all devices; default: what fits, 128 on CPUs."
        )
    with topic("Reference"):
        define_path("fid_stats", None, "Reference: statistics, as compute_fid_stats.py writes them, or images.")
        flags.DEFINE_string("dataset_name", None, "Data set whose shipped statistics are used; default: the run's.")
        flags.DEFINE_enum(
            "convention", None, list(CONVENTIONS), "Inception preprocessing, if --fid_stats does not record it."
        )
        define_path("inception_weights", None, "Local copy of the Inception weights.")
        define_path("inception_logits", None, "npz or safetensors with `fc.weight`, for the Inception Score.")
    with topic("Output"):
        define_path("out", None, "Output folder; default: that of --load_dir's run, or next to --samples.")
        define_path("save_samples", None, "Also write samples: .npz (arr_0 uint8 NHWC, arr_1 labels), else PNGs.")
        define_path("json", None, "Write the rows as JSON here; - is the standard output, instead of the table.")
        flags.DEFINE_bool("quiet", False, "Results and errors alone.")
    define_sampler_flags(cfg_scale="4", denoise_timesteps="500", takes_several=True)
    with topic("Sampling"):
        flags.DEFINE_integer("use_cfg", 1, "0 turns guidance off.", 0, 1)
    define_vae_flag()
    define_saved_model_flags()
    define_tracker_flags(name="eval")


def find_statistics(config: ConfigDict, dataset_name: str | None, saved: dict[str, Any] | None = None) -> Path:
    """Returns the file of --fid_stats, or that which ships for the data set; UserError where there is none, with the
    command that makes it from the images of the run whose configuration is `saved`."""
    if config.fid_stats is not None:
        return Path(config.fid_stats)
    if dataset_name is None:
        raise UserError("--fid_stats is not given: name the statistics or images with which --samples are compared")
    path = shipped_statistics(dataset_name)
    if path is None:
        assert saved is not None
        saved = saved | {"dataset": saved["dataset"] | {"name": dataset_name}}
        raise UserError(
            f"--fid_stats is not given and no statistics ship for {dataset_name}; make them: "
            f"{write_statistics_command(saved, Path('stats.npz'))}"
        )
    return path


class Scoring:
    """What all evaluations need: the reference, the Inception network and where results go."""

    def __init__(
        self,
        config: ConfigDict,
        reference: Path,
        image_shape: tuple[int, ...],
        num_samples: int,
        default_out: Path,
    ):
        self.config, self.mesh = config, make_mesh()
        self.out = Path(config.out or default_out)
        self.failure: WriteError | None = None
        prepare_output_folder(self.out, "out", names=FILES)
        if config.json and Path(config.json).resolve() in [(self.out / name).resolve() for name in FILES]:
            raise UserError(f"--json={config.json} is the evaluation's own record of its rows; name another file")
        self.batch_size = self._choose_batch_size(num_samples, image_shape)
        self.logits = load_logits(config.inception_logits) if config.inception_logits else None
        self._load_reference(reference)
        warn_of_other_shape(self.reference, image_shape)
        for caveat in caveats(num_samples, self.reference, self.logits is not None):
            log(f"note: {caveat}")
        self.settings: dict[str, Any] = {
            "fid_stats": str(self.reference.path),
            "fid_stats_sha256": self.reference.sha256,
            "convention": self.convention.name,
            "convention_source": self.convention.source,
            "inception_sha256": INCEPTION_SHA256,
            "inception_logits_sha256": None if self.logits is None else hash_params(self.logits),
        }

    def _choose_batch_size(self, num_samples: int, image_shape: tuple[int, ...]) -> int:
        """--batch_size or the recipe's, but no more than the samples need, and fewer of large images."""
        num_devices = self.mesh.size
        requested = RECIPE_BATCH_SIZE if self.config.batch_size is None else self.config.batch_size
        if self.config.batch_size is not None:
            check_batch_size(requested, num_devices)
        elif math.prod(image_shape) > LARGE_IMAGE_BYTES:
            requested = max(1, LARGE_BATCH_BYTES // math.prod(image_shape))
        batch_size = -(-min(requested, num_samples) // num_devices) * num_devices
        check_batch_memory(batch_size, tuple(image_shape))
        # Images in float32, and the outputs of the first layers.
        check_batch_memory(batch_size, (299, 299, 3), copies=40)
        return batch_size

    def _load_reference(self, path: Path) -> None:
        """Statistics from a file; of images, those that the file does not have are measured."""
        images = open_samples(path, "fid_stats") if holds_images(path) else None
        stated = None if images and not has_statistics(path) else load_statistics(path)
        requested = self.config.convention
        if stated is not None:
            self.convention = find_convention(stated, requested)
        else:  # both sides are measured here
            self.convention = Convention(requested or "adm", "flag" if requested else "default")
        self.extractors = load_extractors(
            weights=self.config.inception_weights, convention=self.convention.name, sharding=replicated(self.mesh)
        )
        if images and (stated is None or not stated.has_rows):
            self.reference = self.measure_reference(path, images, stated)
        else:
            assert stated is not None
            self.reference = stated

    def measure_samples(
        self, samples: Samples, statistics: ImageStatistics, title: str, flag: str | None = None
    ) -> None:
        batches = pad_and_shard(samples.read(self.batch_size), self.batch_size, self.mesh)
        measure_images(self.extractors, batches, statistics, samples.num_samples, title, flag=flag)

    def measure_reference(self, path: Path, images: Samples, stated: ReferenceStatistics | None) -> ReferenceStatistics:
        """The statistics `stated` in the file of the images with the images' features, or all of the images' own. What
        is measured is kept in --out."""
        sha256 = content_sha256(path)
        measured_path = self.out / f"reference_{sha256[:12]}_{self.convention.name}.npz"
        if measured_path.exists():
            measured = load_statistics(measured_path)
        else:
            measured = self._measure_images(path, images, measured_path)
        if stated is None:
            return dataclasses.replace(measured, sha256=sha256, path=path)
        return stated.with_rows(measured)

    def _measure_images(self, path: Path, images: Samples, measured_path: Path) -> ReferenceStatistics:
        statistics = ImageStatistics()
        self.measure_samples(images, statistics, f"images of {path.name}")
        save = functools.partial(
            save_statistics,
            statistics=statistics,
            convention=self.convention.name,
            dataset=str(path),
            image_shape=images.image_shape,
        )
        with self.going_on():
            save(measured_path)
            return load_statistics(measured_path)
        with tempfile.TemporaryDirectory() as folder:  # where --out has no room: for this once
            save(Path(folder) / measured_path.name)
            return load_statistics(Path(folder) / measured_path.name)

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Keeps a WriteError for `finish`: the result is printed first."""
        try:
            yield
        except WriteError as error:
            self.failure = self.failure or error
            warn(f"{error.path} could not be written ({error.strerror}); the scores come nevertheless")

    def finish(self) -> None:
        """Raises the first WriteError, if there was one, after the scores are printed."""
        if self.failure:
            raise WriteError(self.failure.path, self.failure.error, "the scores are above")

    def compute(self, statistics: ImageStatistics) -> dict[str, float]:
        log("computing the distances ...")
        return compute_metrics(statistics, self.reference)

    def save_figure(self, figure: Figure, name: str) -> None:
        with self.going_on(), atomic_write(self.out / name) as temporary:
            figure.savefig(temporary, format="png")

    def new_statistics(self) -> ImageStatistics:
        return ImageStatistics(MAX_SAMPLE_ROWS if self.reference.has_rows else 0, self.logits)


class RunEvaluation(Scoring):
    """The samples of a run. Wrong input ends here, uncompiled."""

    def __init__(self, config: ConfigDict):
        checkpoints, steps = open_checkpoint(config.load_dir)
        newest, saved = checkpoints.restore_newest(checkpoints.restore_config, steps)
        data, run_dir = saved["dataset"], checkpoints.folder.parent
        channels = (data["latent_shape"] or [None])[-1]  # older runs did not save it
        dropout, objective = saved["model"]["class_dropout_prob"], make_objective(saved)
        self.samplers = reading.read_samplers(config, dropout, objective, channels)
        check_save_samples(config, self.samplers)
        overridden = reading.override_model(saved["model"])
        reading.refuse_other_objective(saved["objective"])
        reference = find_statistics(config, config.dataset_name or data["name"], saved)
        super().__init__(config, reference, data["image_shape"], config.num_samples, run_dir)
        self.model = load_model(saved, self.mesh, dtype=overridden.dtype, vae=config.vae)
        remaining = steps[steps.index(newest) :]
        self.step, params = restore_params(checkpoints, remaining, self.model, saved, config.params)
        counts = self._class_counts() if config.labels == "dataset" else None
        self.generator = ImageGenerator(
            self.model, params, seed=config.seed, label_mode=config.labels, class_counts=counts
        )
        if config.batch_size is None:
            costliest = max(self.samplers, key=lambda sampler: sampler.cfg_scale is not None)
            self.batch_size = self.generator.fitting_batch_size(costliest, config.num_samples, free_memory())
            log(f"--batch_size {self.batch_size}")
        self.straightness = functools.cache(self.generator.straightness)  # the same for every number of steps
        self._describe(params, overridden, data)
        # Of what was added later, only what is not the default: rows of older versions are found again.
        if saved["objective"]["name"] != "flow_matching":
            self.settings["objective"] = saved["objective"]["name"]
        if config.params != "ema":
            self.settings["params"] = config.params
        if self.model.condition.empty_classes and config.labels != "dataset":
            self.settings["empty_classes"] = list(self.model.condition.empty_classes)
        if variables := changed_variables():
            self.settings["jax_variables"] = variables

    def _class_counts(self) -> np.ndarray:
        counts = self.reference.label_counts
        if counts is None or len(counts) != len(self.model.condition.class_names):
            raise UserError(
                f"--labels=dataset: {self.reference.path} does not say how often each of the run's classes is; "
                "make it with compute_fid_stats.py from the run's data set"
            )
        return counts

    def _describe(self, params: PyTree, model: ConfigDict, data: dict[str, Any]) -> None:
        """Adds to the settings all that enters the numbers of a run."""
        config = self.config
        self.settings |= {
            "checkpoint": str(Path(config.load_dir).absolute()),
            "image_shape": list(data["image_shape"]),
            "num_classes": len(data["class_names"]),
            "num_heads": model.num_heads,
            "checkpoint_step": self.step,
            "params_sha256": hash_params(params),
            "vae_sha256": data["vae_sha256"],
            "dtype": model.dtype,
            "t_conditioning": model.t_conditioning,
            "num_samples": config.num_samples,
            "seed": config.seed,
            "labels": config.labels,
        }

    def evaluate(self, sampler: SamplerConfig) -> dict[str, float | None]:
        """The metrics of one sampler; its grid is written on the way, and its samples, if asked for."""
        config, statistics = self.config, self.new_statistics()
        grid_images: list[tuple[np.ndarray, np.ndarray]] = []
        evaluations: list[np.ndarray] = []  # of an adaptive solver
        batches = self.generator.generate(sampler, config.num_samples, self.batch_size)

        saving = SampleWriter(config.save_samples, config.num_samples) if config.save_samples else nullcontext()
        with self.going_on(), saving as writer:

            def collect(batch: ImageBatch) -> None:
                if batch.nfe is not None:
                    evaluations.append(gather(batch.nfe)[: batch.count])
                if writer is None and count_images(grid_images) == GRID_IMAGES:
                    return
                images, labels = batch.to_host()
                collect_grid(grid_images, images, labels)
                if writer is not None and writer.failure is None:
                    with self.going_on():
                        writer.write(images, labels)

            measure_images(
                self.extractors, batches, statistics, config.num_samples, str(sampler), collect, "num_samples"
            )
        images, labels = (np.concatenate(parts) for parts in zip(*grid_images, strict=True))
        title = f"{sampler}, checkpoint of step {self.step}"
        self.save_figure(
            plotting.sample_grid(images, labels, self.model.condition.class_names, title), grid_name(sampler)
        )
        nfe = float(np.concatenate(evaluations).mean()) if evaluations else sampler.nfe
        straightness = self.straightness(min(STRAIGHTNESS_SAMPLES, config.num_samples), sampler.cfg_scale)
        return {"nfe": nfe, "straightness": straightness, **self.compute(statistics)}


def check_save_samples(config: ConfigDict, samplers: list[SamplerConfig]) -> None:
    """UserError where --save_samples cannot be written, or is of several samplers."""
    if not config.save_samples:
        return
    if len(samplers) > 1:
        raise UserError(f"--save_samples={config.save_samples} is of one step count and guidance scale; give one")
    check_sample_path(config.save_samples, {"fid_stats": config.fid_stats, "json": config.json})


def count_images(grid_images: Iterable[tuple[np.ndarray, np.ndarray]]) -> int:
    return sum(len(images) for images, _ in grid_images)


def collect_grid(grid_images: list[tuple[np.ndarray, np.ndarray]], images: np.ndarray, labels: np.ndarray) -> None:
    """Adds what the first GRID_IMAGES samples still lack of a batch."""
    missing = GRID_IMAGES - count_images(grid_images)
    if missing > 0:
        grid_images.append((images[:missing], labels[:missing]))


def grid_name(sampler: SamplerConfig) -> str:
    steps = sampler.solver if sampler.is_adaptive else sampler.num_steps
    return f"samples_{steps}_{guidance_name(sampler)}.png"


def guidance_name(sampler: SamplerConfig) -> str:
    return "none" if sampler.cfg_scale is None else f"{sampler.cfg_scale:g}"


def sampler_settings(sampler: SamplerConfig) -> dict[str, Any]:
    """What enters a row of a sampler: of what was added later, only what is not the default."""
    settings = {
        "num_steps": None if sampler.is_adaptive else sampler.num_steps,
        "cfg_scale": sampler.cfg_scale,
        "solver": sampler.solver,
        "cfg_interval": [float(end) for end in sampler.cfg_interval],
    }
    if sampler.is_adaptive:
        settings |= {"rtol": sampler.rtol, "atol": sampler.atol}
    if sampler.time_shift != 1:
        settings["time_shift"] = sampler.time_shift
    if SOLVERS.get(sampler.solver, SOLVERS["euler"]).grid == "diffusion":
        settings["spacing"] = sampler.spacing
    if sampler.cfg_channels is not None:
        settings["cfg_channels"] = sampler.cfg_channels
    return settings


def evaluate_run(config: ConfigDict) -> None:
    run = RunEvaluation(config)
    results, rows = Results(run.out), []
    trackers = None
    if choose_trackers(config.to_dict()):
        trackers = Trackers(run.out / "evaluation", config.to_dict(), first_step=-1, axis="num_steps")
    for number, sampler in enumerate(run.samplers):
        settings = {**sampler_settings(sampler), **run.settings}
        row = None if config.save_samples else results.find(settings)
        if row is None:
            with explaining_out_of_memory("sampling", "a smaller --batch_size"):
                metrics = run.evaluate(sampler)
            row: dict[str, Any] = {**settings, **metrics}
            with run.going_on():
                results.add(settings, metrics)
        rows.append(row)
        if trackers:
            scores = {f"{key}/guidance_{guidance_name(sampler)}": row[key] for key in metric_columns() if key in row}
            trackers.log(number, scores | {"num_steps": row["num_steps"] or row["nfe"]})
        if run.failure:
            break  # the others would be lost as well
    with run.going_on():
        write_csv(run.out / "fid.csv", results.rows)
    if len(rows) > 1:
        figure = plot_fid(rows)
        run.save_figure(figure, "fid.png")
        if trackers:
            trackers.log_figure(len(rows), "fid", figure)
    if trackers:
        trackers.log_table("scores", rows)
        trackers.close()
    of_params = "" if config.params == "ema" else f", {config.params} parameters"
    log(f"step {run.step} of {config.load_dir}{of_params}, labels {config.labels}, against {run.reference.path}")
    with run.going_on():
        show_rows(config, rows)
    run.finish()
    log(f"written in {run.out}: fid.json, fid.csv, {', '.join(map(grid_name, run.samplers))}")


def show_rows(config: ConfigDict, rows: list[dict[str, Any]]) -> None:
    if config.json != "-":
        show_result(to_markdown(rows))
    if config.json:
        write_json_rows(config.json, rows)


def evaluate_samples(config: ConfigDict) -> None:
    samples = open_samples(config.samples)
    if reading.is_explicit("num_samples"):
        if config.num_samples > samples.num_samples:
            raise UserError(
                f"--num_samples={config.num_samples}: --samples={config.samples} holds {samples.num_samples}"
            )
        samples = samples.first(config.num_samples)
    path = Path(config.samples)
    # A folder of its own: others' files may lie beside the samples.
    default_out = path.with_name(f"{path.stem if path.is_file() else path.name}_fid")
    reference = find_statistics(config, None)
    scoring = Scoring(config, reference, samples.image_shape, samples.num_samples, default_out)
    settings = {
        "samples": str(config.samples),
        "samples_sha256": content_sha256(path),
        "num_samples": samples.num_samples,
        **scoring.settings,
    }
    results = Results(scoring.out)
    statistics = scoring.new_statistics()
    with explaining_out_of_memory("Inception", "a smaller --batch_size"):
        scoring.measure_samples(samples, statistics, "scoring", "num_samples")
    metrics = scoring.compute(statistics)
    row: dict[str, Any] = {**settings, **metrics}
    with scoring.going_on():
        results.add(settings, metrics)
        write_csv(scoring.out / "fid.csv", results.rows)
    with scoring.going_on():
        show_rows(config, [row])
    scoring.finish()
    log(f"written in {scoring.out}: fid.json, fid.csv")


def main(config: ConfigDict) -> None:
    configure_output(is_apart=True, is_quiet=config.quiet)
    if bool(config.load_dir) == bool(config.samples):
        raise UserError(
            "give one of --load_dir (the folder of a run, such as runs/demo) and --samples (images to score)"
        )
    refuse_ignored(config)
    if config.out:
        check_writable(Path(config.out), "out", names=FILES)
    check_json_path(config.json, {"samples": config.samples, "fid_stats": config.fid_stats})
    (evaluate_run if config.load_dir else evaluate_samples)(config)


def refuse_ignored(config: ConfigDict) -> None:
    """UserError for flags that would have no effect on this evaluation."""
    if config.samples:
        reading.refuse_ignored((*OF_RUNS, *reading.model_flags()), "on --samples, which are scored as they are")
    reading.refuse_ignored(OF_TRAINING, "in an evaluation")
    for name in ("cfg_scale", "denoise_timesteps"):
        reading.refuse_ignored((f"model.{name}",), f"here, where --{name} says it")
    if config.fid_stats:
        reading.refuse_ignored(("dataset_name",), "beside --fid_stats")


if __name__ == "__main__":
    program.run_program(define_flags, main)
