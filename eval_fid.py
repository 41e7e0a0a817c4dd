"""Scores samples: of a run's EMA parameters, for all step counts and guidance scales requested, or of a file.

    python eval_fid.py --load_dir runs/demo --denoise_timesteps 64,16,4 --cfg_scale 1,2 --num_samples 1000
    python eval_fid.py --samples samples.npz --fid_stats stats.npz

Prints a table, and writes fid.json, fid.csv, an image of samples for every row and a plot. Rows of the same settings
that fid.json has are not computed again, so that the same command continues after a kill; everything that enters a
number is among its settings.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import PyTree
from ml_collections import ConfigDict

from utils import checks, cli, plotting
from utils.checkpoint import open_checkpoint
from utils.codecs.registry import load_codec
from utils.console import log
from utils.errors import UserError
from utils.files import file_sha256
from utils.generate import RECIPE_BATCH_SIZE, ImageBatch, ImageGenerator
from utils.memory import free_memory
from utils.metrics.inception import CONVENTIONS, INCEPTION_SHA256, load_feature_extractor, load_logits
from utils.metrics.measure import find_convention, measure_images, pad_and_shard
from utils.metrics.reference import ReferenceStatistics, has_statistics, load_statistics, save_statistics
from utils.metrics.registry import COLUMNS, compute_metrics
from utils.metrics.samples import Samples, SampleWriter, check_sample_path, holds_images, open_samples
from utils.metrics.statistics import ImageStatistics
from utils.models import init_params, make_model
from utils.objectives.registry import make_objective
from utils.results import Results, plot_fid, to_markdown, write_csv
from utils.sampling import LABELS, SOLVERS, SamplerConfig
from utils.sharding import gather, make_mesh, replicated, shape_structs
from utils.tracking import Tracker

GRID_IMAGES = 64
# Flags without effect on --samples.
OF_RUNS = (
    "cfg_scale", "cfg_interval", "use_cfg", "denoise_timesteps", "solver", "labels", "seed", "save_samples", "vae",
    "dataset_name", "use_stable_vae",
)  # fmt: skip


def define_flags() -> None:
    cli.define_path("load_dir", None, "Folder of a run, or RUN/checkpoints/STEP for one of its checkpoints.")
    cli.define_path("samples", None, "Instead of a run: npz (arr_0, uint8 NHWC) or folder of images to score.")
    flags.DEFINE_string("dataset_name", None, "Data set whose shipped statistics are used; default: the run's.")
    cli.define_path("fid_stats", None, "Reference statistics, as compute_fid_stats.py writes them.")
    cli.define_path("out", None, "Output folder; default: that of --load_dir's run, or next to --samples.")
    cli.define_path("save_samples", None, "Also write samples: .npz (arr_0 uint8 NHWC, arr_1 labels), else PNGs.")
    flags.DEFINE_list("cfg_scale", ["4"], "Guidance scales, separated by commas; -1 or 1: no guidance.")
    flags.DEFINE_list("cfg_interval", ["0", "1"], "First and last time t at which guidance is on.")
    flags.DEFINE_integer("use_cfg", 1, "0 turns guidance off.", 0, 1)
    flags.DEFINE_list("denoise_timesteps", ["500"], "Step counts, separated by commas.")
    flags.DEFINE_enum("solver", "euler", list(SOLVERS), "heun and midpoint evaluate the model twice per step.")
    flags.DEFINE_enum("labels", "uniform", list(LABELS), "How labels are drawn; dataset: as often as in --fid_stats.")
    flags.DEFINE_integer("num_samples", 50_000, "Samples, exactly; of --samples the first, default all.", lower_bound=2)
    flags.DEFINE_integer("batch_size", None, "Samples at a time, over all devices; default: what fits, 128 on CPUs.")
    flags.DEFINE_integer("seed", 0, "Sample i depends on this and on i alone.")
    flags.DEFINE_enum(
        "convention", None, list(CONVENTIONS), "Inception preprocessing, if --fid_stats does not record it."
    )
    cli.define_path("inception_weights", None, "Local copy of the Inception weights.")
    cli.define_path("inception_logits", None, "npz or safetensors with `fc.weight`, for the Inception Score.")
    cli.define_vae_flag()
    cli.define_model_flags()
    cli.define_objective_flags()
    cli.define_wandb_flags(name="eval")


def find_statistics(config: ConfigDict, dataset_name: str | None) -> Path:
    """The file of --fid_stats, or that which ships for the data set; UserError where there is none."""
    if config.fid_stats is not None:
        return Path(config.fid_stats)
    if dataset_name is None:
        raise UserError("--fid_stats is not given: name the statistics with which --samples are compared")
    path = Path(__file__).parent / "data" / f"fid_stats_{dataset_name}.npz"
    if not path.exists():
        raise UserError(
            f"--fid_stats is not given and no statistics ship for {dataset_name}; make them: "
            f"python compute_fid_stats.py --dataset_name {dataset_name} --out stats.npz"
        )
    return path


def read_samplers(config: ConfigDict, class_dropout_prob: float) -> list[SamplerConfig]:
    """A sampler for every guidance scale and step count of the command line. UserError where it asks for guidance that
    a model trained with `class_dropout_prob` does not have; without asking there is none, which is logged."""
    steps = cli.read_numbers(config.denoise_timesteps, "denoise_timesteps", int, cli.MAX_STEPS, lowest=1)
    scales = cli.read_numbers(config.cfg_scale, "cfg_scale", float, cli.MAX_SCALE) if config.use_cfg else [-1.0]
    if not checks.can_guide(class_dropout_prob) and any(map(cli.guides, scales)):
        reason = checks.explain_no_guidance(class_dropout_prob)
        if cli.is_explicit("cfg_scale"):
            raise UserError(f"--cfg_scale={','.join(config.cfg_scale)}: {reason}; use --cfg_scale 1")
        log(f"{reason}: samples are drawn without guidance")
        scales = [-1.0]
    interval = tuple(cli.read_numbers(config.cfg_interval, "cfg_interval", float, 1, lowest=0))
    if len(interval) != 2 or interval[0] > interval[1]:
        raise UserError(f"--cfg_interval={','.join(config.cfg_interval)}: give first and last time, such as 0.1,0.9")
    for scale in scales:
        if scale < 0 and scale != -1:
            raise UserError(f"--cfg_scale={scale:g}: use scales of 0 or more, or -1 for no guidance")
    scales = dict.fromkeys(map(cli.guidance_scale, scales))  # -1 and 1 are the same
    return [SamplerConfig(n, scale, interval, config.solver) for scale in scales for n in dict.fromkeys(steps)]


class Scoring:
    """What all evaluations need: the reference, the Inception network and where results go."""

    def __init__(self, config: ConfigDict, dataset_name: str | None, default_out: Path):
        self.config, self.mesh = config, make_mesh()
        if config.batch_size is not None:
            checks.check_batch_size(config.batch_size, self.mesh.size)
        self.batch_size = config.batch_size or -(-RECIPE_BATCH_SIZE // self.mesh.size) * self.mesh.size
        path = find_statistics(config, config.dataset_name or dataset_name)
        images = open_samples(path, "fid_stats") if holds_images(path) else None
        stated = None if images and not has_statistics(path) else load_statistics(path)
        self.out = Path(config.out or default_out)
        checks.check_writable(self.out, "out")
        if config.save_samples:
            check_sample_path(config.save_samples)
            checks.check_writable(Path(config.save_samples).parent, "save_samples")
        self.convention = find_convention(path, stated.convention if stated else None, config.convention)
        self.logits = load_logits(config.inception_logits) if config.inception_logits else None
        # Images in float32, and the outputs of the first layers.
        checks.check_batch_memory(self.batch_size, (299, 299, 3), copies=40)
        self.extractor = load_feature_extractor(config.inception_weights, self.convention, replicated(self.mesh))
        if images and (stated is None or stated.features is None):
            self.reference = self.measure_reference(path, images, stated)
        else:
            assert stated is not None
            self.reference = stated
        self.settings: dict[str, Any] = {
            "fid_stats": str(self.reference.path),
            "fid_stats_sha256": self.reference.sha256,
            "convention": self.convention,
            "inception_sha256": INCEPTION_SHA256,
            "inception_logits_sha256": None if self.logits is None else hash_params(self.logits),
        }

    def measure_samples(self, samples: Samples, statistics: ImageStatistics, title: str) -> None:
        batches = pad_and_shard(samples.read(self.batch_size), self.batch_size, self.mesh)
        measure_images(self.extractor, batches, statistics, samples.num_samples, title)

    def measure_reference(self, path: Path, images: Samples, stated: ReferenceStatistics | None) -> ReferenceStatistics:
        """The statistics `stated` in the file of the images with the images' features, or all of the images' own. What
        is measured is kept in --out."""
        sha256 = file_sha256(path)
        measured_path = self.out / f"reference_{sha256[:12]}_{self.convention}.npz"
        if not measured_path.exists():
            statistics = ImageStatistics()
            self.measure_samples(images, statistics, f"images of {path.name}")
            save_statistics(measured_path, statistics, convention=self.convention, dataset=str(path))
        measured = load_statistics(measured_path)
        if stated is None:
            return dataclasses.replace(measured, sha256=sha256, path=path)
        return dataclasses.replace(stated, features=measured.features)

    def warn_of_few(self, num_samples: int) -> None:
        num_features = self.reference.mu.size
        if num_samples < num_features:
            log(f"{num_samples} samples are fewer than the {num_features} features: the FID comes out far too high")

    def statistics(self) -> ImageStatistics:
        return ImageStatistics(0 if self.reference.features is None else 10_000, self.logits)


class RunEvaluation(Scoring):
    """The samples of a run. Wrong input ends here, uncompiled."""

    def __init__(self, config: ConfigDict):
        checkpoints, steps = open_checkpoint(config.load_dir)
        newest, saved = checkpoints.restore_newest(checkpoints.restore_config, steps)
        data = saved["dataset"]
        self.samplers = read_samplers(config, saved["model"]["class_dropout_prob"])
        super().__init__(config, data["name"], checkpoints.folder.parent)
        class_counts = self.reference.label_counts
        if config.labels == "dataset" and (class_counts is None or len(class_counts) != len(data["class_names"])):
            raise UserError(
                f"--labels=dataset: {self.reference.path} does not say how often each of the run's classes is; "
                "make it with compute_fid_stats.py from the run's data set"
            )
        if config.save_samples and len(self.samplers) > 1:
            raise UserError(f"--save_samples={config.save_samples} is of one step count and guidance scale; give one")
        model = cli.override_model(saved["model"])
        cli.refuse_other_objective(saved["objective"])
        vae, sha256 = config.vae or data["vae"], data["vae_sha256"]
        codec = load_codec(bool(model.use_stable_vae), vae, self.mesh, data["image_shape"], sha256)
        self.model = make_model(
            model, make_objective(saved), codec, self.mesh, data["image_shape"], data["class_names"]
        )
        shapes = jax.eval_shape(partial(init_params, self.model), jax.random.key(0))
        target = shape_structs(shapes, replicated(self.mesh))
        self.step, (params,) = checkpoints.restore_newest(
            lambda step: checkpoints.restore_params(step, target, ("ema_params",)), steps[steps.index(newest) :]
        )
        counts = class_counts if config.labels == "dataset" else None
        self.generator = ImageGenerator(
            self.model, params, seed=config.seed, label_mode=config.labels, class_counts=counts
        )
        if config.batch_size is None:
            costliest = max(self.samplers, key=lambda sampler: sampler.cfg_scale is not None)
            self.batch_size = self.generator.fitting_batch_size(costliest, config.num_samples, free_memory())
            log(f"--batch_size {self.batch_size}")
        self.settings |= {
            "checkpoint": str(Path(config.load_dir).absolute()),
            "image_shape": list(data["image_shape"]),
            "num_classes": len(data["class_names"]),
            "num_heads": model.num_heads,
            "checkpoint_step": self.step,
            "params_sha256": hash_params(params),
            "vae_sha256": sha256,
            "dtype": model.dtype,
            "t_conditioning": model.t_conditioning,
            "num_samples": config.num_samples,
            "seed": config.seed,
            "labels": config.labels,
            "solver": config.solver,
            "cfg_interval": [float(end) for end in self.samplers[0].cfg_interval],
        }

    def evaluate(self, sampler: SamplerConfig) -> dict[str, float]:
        """The metrics of one sampler; its grid is written on the way, and its samples, if asked for."""
        config, statistics = self.config, self.statistics()
        grid_images: list[tuple[np.ndarray, np.ndarray]] = []
        batches = self.generator.generate(sampler, config.num_samples, self.batch_size)

        saving = SampleWriter(config.save_samples, config.num_samples) if config.save_samples else nullcontext()
        with saving as writer:

            def collect(batch: ImageBatch) -> None:
                if writer is None and count_images(grid_images) == GRID_IMAGES:
                    return
                images, labels = batch.to_host()
                collect_grid(grid_images, images, labels)
                if writer is not None:
                    writer.write(images, labels)

            measure_images(self.extractor, batches, statistics, config.num_samples, str(sampler), collect)
        images, labels = (np.concatenate(parts) for parts in zip(*grid_images, strict=True))
        title = f"{sampler}, checkpoint of step {self.step}"
        plotting.sample_grid(images, labels, self.model.class_names, title).savefig(self.out / grid_name(sampler))
        return compute_metrics(statistics, self.reference)


def count_images(grid_images: Iterable[tuple[np.ndarray, np.ndarray]]) -> int:
    return sum(len(images) for images, _ in grid_images)


def collect_grid(grid_images: list[tuple[np.ndarray, np.ndarray]], images: np.ndarray, labels: np.ndarray) -> None:
    """Adds what the first GRID_IMAGES samples still lack of a batch."""
    missing = GRID_IMAGES - count_images(grid_images)
    if missing > 0:
        grid_images.append((images[:missing], labels[:missing]))


def hash_params(params: PyTree) -> str:
    """The sha256 of all parameters' bytes, in the tree's order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(gather(leaf)).data)
    return digest.hexdigest()


def grid_name(sampler: SamplerConfig) -> str:
    return f"samples_{sampler.num_steps}_{'none' if sampler.cfg_scale is None else f'{sampler.cfg_scale:g}'}.png"


def evaluate_run(config: ConfigDict) -> None:
    run = RunEvaluation(config)
    run.warn_of_few(config.num_samples)
    results, rows = Results(run.out), []
    tracker = Tracker(run.out / "evaluation", config, 0) if config.wandb.mode != "disabled" else None
    for number, sampler in enumerate(run.samplers):
        settings = {"num_steps": sampler.num_steps, "cfg_scale": sampler.cfg_scale, **run.settings}
        row = None if config.save_samples else results.find(settings)
        if row is None:
            row = results.add(settings, run.evaluate(sampler))
        rows.append(row)
        if tracker:
            name = f"guidance_{'none' if sampler.cfg_scale is None else f'{sampler.cfg_scale:g}'}"
            tracker.log({f"{key}/{name}": row[key] for key in COLUMNS if key in row}, number)
    write_csv(run.out / "fid.csv", rows)
    if len(rows) > 1:
        figure = plot_fid(rows)
        figure.savefig(run.out / "fid.png")
        if tracker:
            tracker.log_figure("fid", figure, len(rows))
    if tracker:
        tracker.close()
    log(f"step {run.step} of {config.load_dir}, labels {config.labels}, against {run.reference.path}")
    log(to_markdown(rows))
    log(f"written: {run.out / 'fid.json'}, fid.csv, {', '.join(map(grid_name, run.samplers))}")


def evaluate_samples(config: ConfigDict) -> None:
    samples = open_samples(config.samples)
    if cli.is_explicit("num_samples"):
        if config.num_samples > samples.num_samples:
            raise UserError(
                f"--num_samples={config.num_samples}: --samples={config.samples} holds {samples.num_samples}"
            )
        samples = samples.first(config.num_samples)
    path = Path(config.samples)
    scoring = Scoring(config, None, path.parent if path.is_file() else path.with_name(f"{path.name}_fid"))
    scoring.warn_of_few(samples.num_samples)
    statistics = scoring.statistics()
    scoring.measure_samples(samples, statistics, "scoring")
    settings = {"samples": str(config.samples), "num_samples": samples.num_samples, **scoring.settings}
    row = Results(scoring.out).add(settings, compute_metrics(statistics, scoring.reference))
    write_csv(scoring.out / "fid.csv", [row])
    log(to_markdown([row]))
    log(f"written: {scoring.out / 'fid.json'}, fid.csv")


def main(config: ConfigDict) -> None:
    if bool(config.load_dir) == bool(config.samples):
        raise UserError(
            "give one of --load_dir (the folder of a run, such as runs/demo) and --samples (images to score)"
        )
    refuse_ignored(config)
    (evaluate_run if config.load_dir else evaluate_samples)(config)


def refuse_ignored(config: ConfigDict) -> None:
    """UserError for flags that would have no effect on this evaluation."""
    if config.samples:
        cli.refuse_ignored((*OF_RUNS, *cli.model_flags()), "on --samples, which are scored as they are")
    for name in ("cfg_scale", "denoise_timesteps"):
        cli.refuse_ignored((f"model.{name}",), f"here, where --{name} says it")
    if config.fid_stats:
        cli.refuse_ignored(("dataset_name",), "beside --fid_stats")


if __name__ == "__main__":
    cli.run_program(define_flags, main)
