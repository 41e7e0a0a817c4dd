"""Scores samples: of a run's averaged parameters, for all step counts and guidance scales asked for, or of a file.

    python eval_fid.py --load_dir runs/demo --denoise_timesteps 64,16,4 --cfg_scale 1,2 --num_samples 1000
    python eval_fid.py --samples samples.npz --fid_stats stats.npz

Prints a table, and writes fid.json, fid.csv, a picture of samples for every row and a plot. What fid.json holds of the
same settings is not computed again, so that the same command continues after a kill; everything that enters a number is
among its settings.
"""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import PyTree
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from utils import config as cfg
from utils import evaluation, inception, plotting
from utils.checkpoint import open_checkpoint
from utils.errors import UserError
from utils.fid import ImageStatistics, ReferenceStatistics, compare, load_statistics, save_statistics
from utils.files import atomic_write, locked, remove_temporaries, set_aside, write_json
from utils.samples import Samples, SampleWriter, check_sample_path, holds_images, open_samples
from utils.sampling import LABELS, SOLVERS, Sampler
from utils.sharding import abstract, free_memory, gather, make_mesh, replicated
from utils.tracking import Tracker

GRID_IMAGES = 64
# Flags of one way of working that the other has no use for.
OF_RUNS = (
    "cfg_scale", "cfg_interval", "use_cfg", "denoise_timesteps", "solver", "labels", "seed", "save_samples", "vae",
    "dataset_name", "use_stable_vae",
)  # fmt: skip
METRICS = {  # in the order of the table's columns
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "inception_score": "IS",
}


def define_flags() -> None:
    cfg.define_path("load_dir", None, "Folder of a run, or RUN/checkpoints/STEP for one of its checkpoints.")
    cfg.define_path("samples", None, "Instead of a run: npz (arr_0, uint8 NHWC) or folder of images to score.")
    flags.DEFINE_string("dataset_name", None, "Data set whose shipped statistics are used; default: the run's.")
    cfg.define_path("fid_stats", None, "Reference statistics, as compute_fid_stats.py writes them.")
    cfg.define_path("out", None, "Folder of what is written; default: --load_dir's run, or that of --samples.")
    cfg.define_path("save_samples", None, "Also write samples: .npz (arr_0 uint8 NHWC, arr_1 labels), else PNGs.")
    flags.DEFINE_list("cfg_scale", ["4"], "Guidance scales, separated by commas; -1 or 1: no guidance.")
    flags.DEFINE_list("cfg_interval", ["0", "1"], "First and last time t at which guidance is on.")
    flags.DEFINE_integer("use_cfg", 1, "0 turns guidance off.", 0, 1)
    flags.DEFINE_list("denoise_timesteps", ["500"], "Step counts, separated by commas.")
    flags.DEFINE_enum("solver", "euler", list(SOLVERS), "heun and midpoint take two velocities a step.")
    flags.DEFINE_enum("labels", "uniform", list(LABELS), "How labels are drawn; dataset: as often as in --fid_stats.")
    flags.DEFINE_integer("num_samples", 50_000, "Samples, exactly; of --samples the first, default all.", lower_bound=2)
    flags.DEFINE_integer("batch_size", None, "Samples at a time, over all devices; default: what fits, 128 on CPUs.")
    flags.DEFINE_integer("seed", 0, "Sample i depends on this and on i alone.")
    flags.DEFINE_enum("convention", None, list(inception.CONVENTIONS), "Of --fid_stats, where the file does not say.")
    cfg.define_path("inception_weights", None, "Local copy of the Inception weights.")
    cfg.define_path("inception_logits", None, "npz or safetensors with `fc.weight`, for the Inception Score.")
    cfg.define_vae_flag()
    cfg.define_model_flags()
    cfg.define_wandb_flags(name="eval")
    flags.adopt_module_key_flags(cfg)  # so that --help lists them


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


def read_samplers(config: ConfigDict, class_dropout_prob: float) -> list[Sampler]:
    """A sampler for every guidance scale and step count of the command line. UserError where it asks for guidance that
    a model trained with `class_dropout_prob` does not have; without asking there is none, which is said."""
    steps = cfg.read_numbers(config.denoise_timesteps, "denoise_timesteps", int, cfg.MAX_STEPS, lowest=1)
    scales = cfg.read_numbers(config.cfg_scale, "cfg_scale", float, cfg.MAX_SCALE) if config.use_cfg else [-1.0]
    if not cfg.can_guide(class_dropout_prob) and any(map(cfg.guides, scales)):
        reason = cfg.explain_no_guidance(class_dropout_prob)
        if cfg.is_explicit("cfg_scale"):
            raise UserError(f"--cfg_scale={','.join(config.cfg_scale)}: {reason}; use --cfg_scale 1")
        print(f"{reason}: samples are drawn without guidance")
        scales = [-1.0]
    interval = tuple(cfg.read_numbers(config.cfg_interval, "cfg_interval", float, 1, lowest=0))
    if len(interval) != 2 or interval[0] > interval[1]:
        raise UserError(f"--cfg_interval={','.join(config.cfg_interval)}: give first and last time, such as 0.1,0.9")
    for scale in scales:
        if scale < 0 and scale != -1:
            raise UserError(f"--cfg_scale={scale:g}: use scales of 0 or more, or -1 for no guidance")
    scales = dict.fromkeys(map(cfg.guidance_scale, scales))  # -1 and 1 are the same
    return [Sampler(n, scale, interval, config.solver) for scale in scales for n in dict.fromkeys(steps)]


class Scoring:
    """What all evaluations need: the reference, the Inception network and where results go."""

    def __init__(self, config: ConfigDict, dataset_name: str | None, default_out: Path):
        self.config, self.mesh = config, make_mesh()
        if config.batch_size is not None:
            cfg.check_batch_size(config.batch_size, self.mesh.size)
        self.batch_size = config.batch_size or -(-evaluation.RECIPE_BATCH_SIZE // self.mesh.size) * self.mesh.size
        path = find_statistics(config, config.dataset_name or dataset_name)
        images = open_samples(path, "fid_stats") if holds_images(path) else None
        self.reference = load_statistics(path, optional=images is not None)
        self.out = Path(config.out or default_out)
        cfg.check_writable(self.out, "out")
        if config.save_samples:
            check_sample_path(config.save_samples)
            cfg.check_writable(Path(config.save_samples).parent, "save_samples")
        self.convention = evaluation.find_convention(self.reference, config.convention)
        self.logits = inception.load_logits(config.inception_logits) if config.inception_logits else None
        cfg.check_batch_memory(self.batch_size, (299, 299, 3), copies=40)  # of float32, and the first layers' outputs
        self.extractor = inception.load_feature_extractor(
            config.inception_weights, self.convention, replicated(self.mesh)
        )
        if images and self.reference.features is None:
            self.reference = self.measure_reference(images)
        self.settings = {
            "fid_stats": str(self.reference.path),
            "fid_stats_sha256": self.reference.sha256,
            "convention": self.convention,
            "inception_sha256": inception.INCEPTION_SHA256,
            "inception_logits_sha256": None if self.logits is None else hash_params(self.logits),
        }

    def measure(self, batches: Iterator[evaluation.ImageBatch], total: int, statistics: ImageStatistics, title: str):
        return evaluation.measure_images(self.extractor, batches, statistics, total, title)

    def measure_samples(self, samples: Samples, statistics: ImageStatistics, title: str) -> None:
        batches = evaluation.place_images(samples.read(self.batch_size), self.batch_size, self.mesh)
        for _ in self.measure(batches, samples.num_samples, statistics, title):
            pass

    def measure_reference(self, images: Samples) -> ReferenceStatistics:
        """The reference with what its file's images add: features, and statistics where it has none. They are kept."""
        reference = self.reference
        path = self.out / f"reference_{reference.sha256[:12]}_{self.convention}.npz"
        if not path.exists():
            statistics = ImageStatistics()
            self.measure_samples(images, statistics, f"images of {reference.path.name}")
            save_statistics(path, statistics, convention=self.convention, dataset=str(reference.path))
        measured = load_statistics(path)
        if reference.mu is None:
            return dataclasses.replace(measured, sha256=reference.sha256, path=reference.path)
        return dataclasses.replace(reference, features=measured.features)

    def warn_of_few(self, num_samples: int) -> None:
        num_features = self.reference.mu.size
        if num_samples < num_features:
            print(f"{num_samples} samples are fewer than the {num_features} features: the FID comes out far too high")

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
        model = cfg.override_model(saved["model"])
        vae, sha256 = config.vae or data["vae"], data["vae_sha256"]
        codec = evaluation.load_codec(model.use_stable_vae, vae, self.mesh, data["image_shape"], sha256)
        self.context = evaluation.make_context(model, codec, self.mesh, data["image_shape"], data["class_names"])
        shapes = jax.eval_shape(partial(evaluation.init_params, self.context), jax.random.key(0))
        like = abstract(shapes, replicated(self.mesh))
        self.step, (params,) = checkpoints.restore_newest(
            lambda step: checkpoints.restore_params(step, like, ("ema_params",)), steps[steps.index(newest) :]
        )
        counts = class_counts if config.labels == "dataset" else None
        labels = {"label_mode": config.labels, "class_counts": counts}
        self.generator = evaluation.Generator(self.context, params, seed=config.seed, **labels)
        if config.batch_size is None:
            costliest = max(self.samplers, key=lambda sampler: sampler.cfg_scale is not None)
            self.batch_size = self.generator.fitting_batch_size(costliest, config.num_samples, free_memory())
            print(f"--batch_size {self.batch_size}")
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

    def evaluate(self, sampler: Sampler) -> dict[str, float]:
        """The metrics of one sampler; its picture is written on the way, and its samples, if asked for."""
        config, statistics, kept = self.config, self.statistics(), []
        batches = self.generator.generate(sampler, config.num_samples, self.batch_size)
        measured = self.measure(batches, config.num_samples, statistics, str(sampler))
        if config.save_samples:
            with SampleWriter(config.save_samples, config.num_samples) as writer:
                for batch in measured:
                    images, labels = batch.to_host()
                    writer.write(images, labels)
                    keep(kept, images, labels)
        else:
            for batch in measured:
                if sum(len(images) for images, _ in kept) < GRID_IMAGES:
                    keep(kept, *batch.to_host())
        images, labels = (np.concatenate(parts)[:GRID_IMAGES] for parts in zip(*kept, strict=True))
        title = f"{sampler}, checkpoint of step {self.step}"
        plotting.sample_grid(images, labels, self.context.class_names, title).savefig(self.out / picture_name(sampler))
        return compare(statistics, self.reference)


def hash_params(params: PyTree) -> str:
    """The sha256 of all parameters' bytes, in the tree's order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(gather(leaf)).data)
    return digest.hexdigest()


def keep(kept: list, images: np.ndarray, labels: np.ndarray) -> None:
    """Adds the batch's share of the first GRID_IMAGES samples."""
    room = GRID_IMAGES - sum(len(images) for images, _ in kept)
    if room > 0:
        kept.append((images[:room], labels[:room]))


def picture_name(sampler: Sampler) -> str:
    return f"samples_{sampler.num_steps}_{'none' if sampler.cfg_scale is None else f'{sampler.cfg_scale:g}'}.png"


class Results:
    """fid.json: a list of cells, each its settings and its metrics, written after every one.

    Several processes may add to one file; one that cannot be understood is set aside.
    """

    def __init__(self, out: Path):
        self.path = out / "fid.json"
        remove_temporaries(out)
        with locked(self.path):
            self._read()

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The finished cell of these settings; files are told by their hash, wherever they lie. One that also has an
        Inception Score will do where none is asked for."""
        wanted = {name: value for name, value in settings.items() if name not in ("fid_stats", "checkpoint")}
        if wanted["inception_logits_sha256"] is None:
            del wanted["inception_logits_sha256"]
        return next((cell for cell in self.cells if wanted.items() <= cell.items()), None)

    def add(self, settings: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
        """The cell, which takes the place of an earlier one of the same settings."""
        with locked(self.path):
            self._read()  # another process may have added some
            self.cells = [cell for cell in self.cells if not settings.items() <= cell.items()]
            self.cells.append(settings | metrics)
            write_json(self.path, {"cells": self.cells})
        return self.cells[-1]

    def _read(self) -> None:
        self.cells = []
        if not self.path.exists():
            return
        try:
            cells = json.loads(self.path.read_bytes())["cells"]
            if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
                raise TypeError("no list of cells")
            self.cells = cells
        except (ValueError, KeyError, TypeError):
            print(f"{self.path} cannot be understood (damaged?); it is kept as {set_aside(self.path)}")


def to_markdown(cells: list[dict[str, Any]]) -> str:
    """A table of the cells: step count, guidance and every metric that one of them has."""
    columns = {"num_steps": "steps", "cfg_scale": "guidance", "num_samples": "samples"} | METRICS
    columns = {name: title for name, title in columns.items() if any(name in cell for cell in cells)}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---:|" * len(columns)]
    for cell in cells:
        lines.append("| " + " | ".join(to_text(name, cell) for name in columns) + " |")
    return "\n".join(lines)


def to_text(name: str, cell: dict[str, Any]) -> str:
    if name not in cell:
        return ""
    value = cell[name]
    if name == "kid":
        return f"{value:.5f} ± {cell['kid_error']:.5f}"
    if name in METRICS:
        return f"{value:.3f}"
    return "none" if value is None else f"{value:g}"


def write_csv(path: Path, cells: list[dict[str, Any]]) -> None:
    columns = dict.fromkeys(name for cell in cells for name in cell)
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(cells)


def plot_fid(cells: list[dict[str, Any]]) -> Figure:
    """FID against steps, a curve for each guidance scale."""
    curves = {}
    for cell in cells:
        name = "no guidance" if cell["cfg_scale"] is None else f"guidance {cell['cfg_scale']:g}"
        curves.setdefault(name, []).append((cell["num_steps"], cell["fid"]))
    return plotting.curves(curves, "steps", "FID")


def evaluate_run(config: ConfigDict) -> None:
    run = RunEvaluation(config)
    run.warn_of_few(config.num_samples)
    results, cells = Results(run.out), []
    tracker = Tracker(run.out / "evaluation", config, 0) if config.wandb.mode != "disabled" else None
    for number, sampler in enumerate(run.samplers):
        settings = {"num_steps": sampler.num_steps, "cfg_scale": sampler.cfg_scale, **run.settings}
        cell = None if config.save_samples else results.find(settings)
        if cell is None:
            cell = results.add(settings, run.evaluate(sampler))
        cells.append(cell)
        if tracker:
            name = f"guidance_{'none' if sampler.cfg_scale is None else f'{sampler.cfg_scale:g}'}"
            tracker.log({f"{key}/{name}": cell[key] for key in METRICS if key in cell}, number)
    write_csv(run.out / "fid.csv", cells)
    if len(cells) > 1:
        figure = plot_fid(cells)
        figure.savefig(run.out / "fid.png")
        if tracker:
            tracker.log_figure("fid", figure, len(cells))
    if tracker:
        tracker.close()
    print(f"step {run.step} of {config.load_dir}, labels {config.labels}, against {run.reference.path}")
    print(to_markdown(cells))
    print(f"written: {run.out / 'fid.json'}, fid.csv, {', '.join(map(picture_name, run.samplers))}")


def evaluate_samples(config: ConfigDict) -> None:
    samples = open_samples(config.samples)
    if cfg.is_explicit("num_samples"):
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
    cell = Results(scoring.out).add(settings, compare(statistics, scoring.reference))
    write_csv(scoring.out / "fid.csv", [cell])
    print(to_markdown([cell]))
    print(f"written: {scoring.out / 'fid.json'}, fid.csv")


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
        cfg.refuse_ignored((*OF_RUNS, *cfg.model_flags()), "on --samples, which are scored as they are")
    for name in ("cfg_scale", "denoise_timesteps"):
        cfg.refuse_ignored((f"model.{name}",), f"here, where --{name} says it")
    if config.fid_stats:
        cfg.refuse_ignored(("dataset_name",), "beside --fid_stats")


if __name__ == "__main__":
    cfg.run_program(define_flags, main)
