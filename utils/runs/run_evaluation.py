"""Evaluations of a run: its checkpoints' parameters, from which samples are drawn that are scored; each is a row of
fid.json."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from utils.base.devices import changed_variables, free_memory
from utils.base.hosts import is_first
from utils.base.messages import UserError, log, warn
from utils.conditions.condition import number_rows
from utils.images import plotting
from utils.images.pixels import ImageBatch, PixelFormat, check_pictures
from utils.images.samples import SampleWriter, check_sample_path
from utils.metrics.measure import measure_images, most_images
from utils.runs.checkpoint import Checkpoints, DamagedCheckpointError
from utils.runs.opening import load_guide, load_model, name_run, restore_params, warn_of_same_guide
from utils.runs.scoring import Scoring
from utils.sampling.generator import ImageGenerator, hash_params
from utils.sampling.solvers import GUIDANCE, SamplerConfig

GRID_IMAGES = 64  # in each sampler's picture
STRAIGHTNESS_SAMPLES = 64  # at most


class Snapshot(NamedTuple):
    """Parameters whose samples are scored: `params`, as --params has them, of the first of `steps` that is intact."""

    steps: list[int]
    params: str
    is_optional: bool = False  # left out where its checkpoint is damaged


class RunEvaluation(Scoring):
    """Scores the samples of a run's `snapshots`, drawn by `samplers` from `model`, the configuration of its network.

    `checkpoints` are the run's, and `saved` is its configuration. One snapshot at a time is in memory; all are sampled
    by the functions that are compiled for the first.
    """

    def __init__(
        self,
        config: ConfigDict,
        reference: Path | None,
        checkpoints: Checkpoints,
        snapshots: list[Snapshot],
        saved: dict[str, Any],
        model: ConfigDict,
        samplers: list[SamplerConfig],
    ):
        data = saved["dataset"]
        self.samplers = samplers
        check_save_samples(config, len(samplers) * len(snapshots))
        image_shape = tuple(data["image_shape"])
        if config.save_samples and not config.save_samples.endswith(".npz"):
            what = f"--save_samples={config.save_samples}: PNGs hold"
            check_pictures(PixelFormat.from_record(data), image_shape, what, "name an .npz, which holds any array")
        self.image_shape = image_shape
        self.dtype = dtype = PixelFormat.from_record(data).dtype
        super().__init__(config, reference, image_shape, config.num_samples, checkpoints.folder.parent, dtype, saved)

        # The model, the parameters of the first snapshot, and how its samples are drawn.
        self.checkpoints = checkpoints
        self.saved = saved
        self.model_config = model
        self.model = load_model(
            saved, self.mesh, dtype=model.dtype, codec=config.codec, folder=checkpoints.folder.parent
        )
        counts = self._class_counts() if config.labels == "dataset" else None
        guide = load_guide(config.guide, config.guide_params, self.model, config.codec)
        self.generator = ImageGenerator(
            self.model, None, seed=config.seed, label_mode=config.labels, class_counts=counts, guide=guide
        )
        self.guide_settings = {}
        if guide is not None:
            self.guide_settings = {"guide": str(config.guide), "guide_sha256": hash_params(guide.params)}
        self.has_several = len(snapshots) > 1
        self.has_several_steps = len({snapshot.steps[0] for snapshot in snapshots}) > 1
        self.snapshots = list(itertools.dropwhile(lambda snapshot: not self.use(snapshot), snapshots))
        if not self.snapshots:
            raise UserError(f"--checkpoints={config.checkpoints}: all of them are damaged; restore one from a copy")
        if config.batch_size is None:
            # Two passes a step with guidance, and those of a guide.
            costliest = max(samplers, key=lambda sampler: (sampler.cfg_scale is not None, sampler.is_model_guided))
            fitting = self.generator.fitting_batch_size(costliest, config.num_samples, free_memory())
            self.batch_size = min(fitting, most_images(self.records, self.mesh.size, free_memory()) or fitting)
            log(f"--batch_size {self.batch_size}")

    def use(self, snapshot: Snapshot) -> bool:
        """Loads the parameters of a snapshot, to be sampled from now on; returns False, and says so, where it is
        damaged and optional."""
        self.generator.params = None  # those before: both together may not fit
        try:
            step, params = restore_params(self.checkpoints, snapshot.steps, self.model, self.saved, snapshot.params)
        except DamagedCheckpointError as error:
            if not snapshot.is_optional:
                raise
            path = self.checkpoints.folder / str(snapshot.steps[0])
            what = str(error) if path.exists() else f"checkpoint {path} has been removed meanwhile"
            warn(f"{what}; it is left out")
            return False
        self.snapshot = snapshot
        self.step = step
        self.generator.params = params
        warn_of_same_guide(self.generator, self.config.guide)
        self.straightness = functools.cache(self.generator.straightness)  # the same for every number of steps
        self.settings = self._describe_reference() | self._describe_run(params)
        return True

    def each_row(self) -> Iterator[SamplerConfig]:
        """Yields the sampler of each row, once the parameters of its snapshot are in memory."""
        for snapshot in self.snapshots:
            if snapshot is self.snapshot or self.use(snapshot):
                yield from self.samplers

    def _class_counts(self) -> np.ndarray:
        if self.reference is None:
            raise UserError("--labels=dataset needs --fid_stats, which say how often each class is; give both")
        counts = self.reference.label_counts
        if counts is None or len(counts) != len(getattr(self.model.condition, "class_names", ())):
            raise UserError(
                f"--labels=dataset: {self.reference.path} does not say how often each of the run's classes is; "
                "make it with compute_fid_stats.py from the run's data set"
            )
        return counts

    def _describe_run(self, params: PyTree) -> dict[str, Any]:
        """Returns the settings that a snapshot's numbers depend on."""
        # Weights by their hash, so that a run that was moved is known again.
        config = self.config
        model = self.model_config
        saved = self.saved
        data = saved["dataset"]
        settings: dict[str, Any] = {
            "checkpoint": name_run(config.load_dir),
            "image_shape": list(data["image_shape"]),
            "num_classes": len(self.generator.class_names),
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
        # Of what was added later, only what is not the default: rows of older versions are found again.
        if saved["objective"]["name"] != "flow_matching":
            settings["objective"] = saved["objective"]["name"]
        if self.snapshot.params != "ema":
            settings["params"] = self.snapshot.params
        empty_classes = getattr(self.model.condition, "empty_classes", ())
        if empty_classes and config.labels != "dataset":
            settings["empty_classes"] = list(empty_classes)
        if variables := changed_variables():
            settings["jax_variables"] = variables
        return settings

    def evaluate(self, sampler: SamplerConfig) -> dict[str, float | None]:
        """Returns the metrics of one sampler; writes its grid, and its samples for --save_samples."""
        config = self.config
        statistics = self.new_statistics()
        shown: list[tuple[np.ndarray, PyTree]] = []  # images and conditions for the grid
        evaluations: list[np.ndarray] = []  # of the network, by an adaptive solver, for each sample
        batches = self.generator.generate(sampler, config.num_samples, self.batch_size)
        compared = self.new_images(config.num_samples, self.image_shape, self.dtype)

        saving = None
        if config.save_samples and is_first():
            saving = SampleWriter(config.save_samples, config.num_samples, self.generator.condition.to_columns)
        with self.going_on(), saving or contextlib.nullcontext() as writer:

            def collect(batch: ImageBatch) -> None:
                if batch.nfe is not None:
                    evaluations.append(batch.rows(batch.nfe))
                missing = GRID_IMAGES - sum(len(images) for images, _ in shown)
                if not config.save_samples and not missing and (compared is None or compared.is_full):
                    return  # the images stay on the devices
                drawn, conditions = batch.to_host()
                if compared is not None:
                    compared.add(drawn)
                images = self.generator.to_pictures(drawn)
                if missing:
                    shown.append(jax.tree.map(lambda rows: rows[:missing], (images, conditions)))
                if writer is not None and writer.failure is None:
                    with self.going_on():  # scoring goes on without the file
                        writer.write(drawn, conditions)

            measure_images(
                self.extractors, batches, statistics, config.num_samples, str(sampler), collect, "num_samples"
            )

        # The grid, and what is measured of the sampler itself.
        images, conditions = jax.tree.map(lambda *parts: np.concatenate(parts), *shown)
        places, names = number_rows(self.generator.condition, conditions)
        figure = plotting.sample_grid(images, places, names, f"{sampler}, checkpoint of step {self.step}")
        self.save_figure(figure, self.picture_name("samples", sampler))
        nfe = float(np.concatenate(evaluations).mean()) if evaluations else sampler.nfe
        passes = self.generator.count_passes(sampler, nfe if sampler.is_adaptive else None)
        guidance = {name: getattr(sampler, name) for name in GUIDANCE}
        straightness = self.straightness(min(STRAIGHTNESS_SAMPLES, config.num_samples), **guidance)
        scores = self.compute(statistics, compared, self.picture_name("memorised", sampler))
        return {"nfe": nfe, "passes": passes, "straightness": straightness, **scores}

    def picture_name(self, what: str, sampler: SamplerConfig) -> str:
        """Returns the name of a sampler's picture, `what`; where there are several snapshots, with this one's step."""
        steps = sampler.solver if sampler.is_adaptive else sampler.num_steps
        name = f"{what}_{steps}_{_guidance_name(sampler)}"
        if self.has_several:
            name += f"_step{self.step}{self._params_suffix()}"
        return f"{name}.png"

    def curve_name(self, sampler: SamplerConfig) -> str:
        """Returns the name of a sampler's curve among those of a metric, over its steps or those of the training."""
        name = f"guidance_{_guidance_name(sampler)}"
        if self.has_several_steps and len({each.num_steps for each in self.samplers}) > 1:
            name += f"_{sampler.num_steps}_steps"
        return name + self._params_suffix() * self.has_several

    def _params_suffix(self) -> str:
        params = self.snapshot.params
        return "" if params == "ema" else f"_{params.replace(':', '')}"


def check_save_samples(config: ConfigDict, num_sets: int) -> None:
    """Raises UserError where --save_samples cannot be written, or would have to hold several sets of images."""
    if not config.save_samples:
        return
    if num_sets > 1:
        raise UserError(
            f"--save_samples={config.save_samples} is of one step count, guidance scale and checkpoint; give one"
        )
    if is_first():
        check_sample_path(config.save_samples, {"fid_stats": config.fid_stats, "json": config.json})


def _guidance_name(sampler: SamplerConfig) -> str:
    name = "none" if sampler.cfg_scale is None else f"{sampler.cfg_scale:g}"
    if sampler.cfg_zero_star:
        name += f"_zero{sampler.cfg_zero_steps}"
    if sampler.is_inner_guided:
        name += f"_inner_{sampler.inner_scale:g}"
    return name + f"_guide_{sampler.guide_scale:g}" * sampler.is_model_guided
