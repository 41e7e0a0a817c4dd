"""Trains a flow-matching DiT: flags -> configuration -> one loop that steps, logs, evaluates and saves.

    python train_flow.py --dataset_name digits --use_stable_vae 0 --model.patch_size 2 --model.num_classes 10

The same command again continues a run from its newest checkpoint. docs/training.md has the recipes, docs/flags.md the
flags.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from absl import flags
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from diffusion_transformer import REMAT_POLICIES
from utils.base.console import log
from utils.base.devices import (
    SHARD,
    SHARDING_MODES,
    check_batch_memory,
    check_batch_size,
    choose_num_shards,
    compile_step,
    device_memory,
    explaining_out_of_memory,
    find_devices,
    format_bytes,
    jax_settings,
    make_mesh,
    memory_needed,
    next_batch,
    out_of_memory,
    place,
    prefetch,
    replicated,
    shape_structs,
    shard_batch,
    state_sharding,
    unsplit_fraction,
)
from utils.base.errors import DataError, UserError
from utils.base.files import FolderLock, check_writable, prepare_output_folder, write_json
from utils.base.processes import EXIT_STOPPED, Interrupted, StopRequest, describe_processes, initialize_processes
from utils.codecs.registry import DEFAULT_HUB_ID, load_codec
from utils.data.batches import first_examples, training_batches
from utils.data.dataset import SPLITS, describe_data, summarize_data
from utils.data.fingerprint import write_listing
from utils.data.loaders import get_loader, load_dataset
from utils.flags import program, reading
from utils.flags.definitions import (
    define_data_flags,
    define_device_flags,
    define_flip_flag,
    define_model_flags,
    define_objective_flags,
    define_path,
    define_tracker_flags,
    define_vae_flag,
)
from utils.flags.help import topic
from utils.metrics.extractors import load_extractors
from utils.metrics.inception import CONVENTIONS
from utils.metrics.measure import measure_images
from utils.metrics.metrics import compute_fid
from utils.metrics.reference import find_convention, load_statistics, warn_of_other_shape
from utils.metrics.statistics import ImageStatistics
from utils.networks.ema import EmaSchedule
from utils.networks.lora import add_lora
from utils.networks.models import init_params, make_model
from utils.objectives.objective import has_guidance, row_period
from utils.objectives.registry import OBJECTIVES, flag_of, make_objective, objective_fields
from utils.runs.checkpoint import Checkpoints, DamagedCheckpointError, has_checkpoints
from utils.runs.resume import check_architecture, compare_with_saved
from utils.runs.trackers import Trackers, read_metrics
from utils.sampling.generator import ImageGenerator
from utils.sampling.samplers import can_guide, explain_no_guidance, guidance_scale, largest_steps
from utils.sampling.solvers import SamplerConfig
from utils.training.advice import batch_structs, commands_after_training, ema_hints, model_hints, plan_lines
from utils.training.fine_tune import Source, frozen_beside_lora, read_frozen, read_started_from, start_from
from utils.training.panels import loss_by_time, reconstruction_panel, sample_panels
from utils.training.progress import Progress, Saver, SkippedUpdates, StepTrace, Throughput, check_finite
from utils.training.state import TrainState, create_train_state, freeze_parts, make_optimizer
from utils.training.step import INIT, VALIDATION, jit_train_step, validation_step

MEMORY_FLAGS = (
    "a smaller --batch_size or --image_size, a larger --model.patch_size, --remat dots (or blocks), or --grad_accum 2 "
    "(or more)"
)


def define_flags() -> None:
    with topic("Run"):
        define_path("save_dir", None, "Folder of the run; default runs/<--wandb.name>.")
        define_path("load_dir", None, "Run, or hf:USER/NAME, whose parameters and EMA this run starts from.")
        flags.DEFINE_integer("seed", 0, "Seed of parameters, data order, noise and samples.")
        flags.DEFINE_integer("batch_size", 256, "Global batch size.")
        flags.DEFINE_integer("max_steps", 1_000_000, "Training steps.", lower_bound=0)
        flags.DEFINE_integer(
            "ema_warmup", 0, "1: the EMA's decay grows as (1 + n) / (10 + n) up to --model.target_update_rate.", 0, 1
        )
        flags.DEFINE_integer("debug_overfit", 0, "1 trains on one repeated batch.", 0, 1)
        flags.DEFINE_integer("plan", 0, "1: says what this training will take (memory, time), and ends.", 0, 1)
    define_data_flags()
    define_flip_flag()
    define_vae_flag()
    define_model_flags()
    define_objective_flags()
    with topic("Logging and evaluation"):
        flags.DEFINE_integer(
            "log_interval", 1000, "Steps between logged metrics; also at the first and last.", lower_bound=1
        )
        flags.DEFINE_integer(
            "eval_interval",
            50_000,
            "Steps between evaluations; also at step 1000 and at the end. 0: none.",
            lower_bound=0,
        )
        define_path("fid_stats", None, "Reference statistics; with them, `fid` is logged at every evaluation.")
        flags.DEFINE_integer("fid_samples", 10_000, "Samples of a training-time FID.", lower_bound=2)
        flags.DEFINE_enum(
            "convention", None, list(CONVENTIONS), "Inception preprocessing, if --fid_stats does not record it."
        )
        define_path("inception_weights", None, "Local copy of the Inception weights.")
        flags.DEFINE_float("peak_tflops", None, "Peak of one device, for the MFU of unknown kinds.", lower_bound=0)
        define_path("profile", None, "Folder for a trace of ten steps, for xprof or ui.perfetto.dev.")
    with topic("Checkpoints"):
        flags.DEFINE_integer("save_interval", 200_000, "Steps between checkpoints; also at the end.", lower_bound=1)
        flags.DEFINE_float(
            "save_minutes", 15, "Minutes between checkpoints, whatever the step; 0: never.", lower_bound=0
        )
        flags.DEFINE_integer("keep_last", 2, "Newest checkpoints to keep.", lower_bound=1)
        flags.DEFINE_integer("keep_every", 1_000_000, "Also keep checkpoints at multiples of this step.", lower_bound=1)
    with topic("Memory and devices"):
        flags.DEFINE_integer("grad_accum", 1, "Microbatches per step, to save memory.", lower_bound=1)
        flags.DEFINE_enum(
            "remat",
            "none",
            list(REMAT_POLICIES),
            "What the backward pass recomputes, to save memory: dots is everything but matmuls.",
        )
        flags.DEFINE_enum(
            "sharding",
            "dp",
            list(SHARDING_MODES),
            "dp: every device has the whole state; zero: the parameters alone; fsdp: a part of everything; hybrid: "
            "fsdp within replicas.",
        )
        flags.DEFINE_integer(
            "num_shards", None, "Devices of a replica of --sharding hybrid; default: of a slice, up to 16.", 1
        )
    define_tuning_flags()
    define_tracker_flags()
    define_device_flags()


@topic("Fine-tuning, and what differs from Adam at a constant rate")
def define_tuning_flags() -> None:
    flags.DEFINE_list("freeze", [], "Parts of --load_dir that are not trained: blocks.0-5, label_embed, ...")
    flags.DEFINE_integer("lora_rank", 0, "Above 0: of --load_dir, train low-rank factors and labels alone.", 0, 4096)
    flags.DEFINE_integer("warmup_steps", 0, "Steps in which the learning rate rises from 0.", lower_bound=0)
    flags.DEFINE_enum("lr_schedule", "constant", ["constant", "cosine"], "cosine: to 0 at --max_steps.")
    flags.DEFINE_float("weight_decay", 0.0, "AdamW's decay of matrices.", 0, 100)
    flags.DEFINE_float("grad_clip", None, "Bound of the norm of the gradients.", 1e-6)
    flags.DEFINE_integer(
        "skip_nonfinite", 0, "Above 0: leave out updates that are not finite; so many in a row end the run.", 0
    )


class Trainer:
    """Set up once, before the first step: data, model, optimizer, folder. Bad input ends here, before compiling."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.mesh = make_mesh(choose_num_shards(config.sharding, config.num_shards, find_devices()))
        if config.plan:
            of_source = ("load_dir", "freeze", "lora_rank")
            reading.refuse_ignored(of_source, "with --plan, which is of a whole network from scratch")
            reading.refuse_ignored(("profile",), "with --plan, which trains nothing")
        self._find_source()
        period = row_period(make_objective(config))
        check_batch_size(config.batch_size, self.mesh.size, config.grad_accum, period)
        refuse_ignored(config)
        if not has_checkpoints(reading.run_folder(config)):  # a run of an earlier version goes on as it began
            refuse_contradictions(config)
        if not self.started_from:
            reading.refuse_ignored(("freeze", "lora_rank"), "without --load_dir")
        if not config.plan:  # before images are looked through, which may take long
            check_writable(reading.run_folder(config), "save_dir")
            if config.profile:
                check_writable(Path(config.profile), "profile")
        self._load_data()
        self._load_model()
        self._load_reference()
        self.ema = EmaSchedule.of_run(config)
        self.flops_per_step = 3 * config.batch_size * self.model.network.count_flops(self.model.latent_shape)
        self._make_static(frozen=())

    def open_run(self) -> None:
        """Takes the run's folder, and the parameters of --load_dir."""
        self._open_folder()
        self.start, frozen = self._prepare_start()
        self.saved_config["frozen"] = list(frozen)
        self._make_static(frozen)

    def _make_static(self, frozen: tuple[str, ...]) -> None:
        """The optimizer, and what both steps are compiled with."""
        self.frozen, self.optimizer = frozen, freeze_parts(self._make_optimizer(), frozen)
        self.static = {
            "model": self.model.network,
            "objective": self.model.objective,
            "optimizer": self.optimizer,
            "grad_accum": self.config.grad_accum,
            "frozen": frozen,
        }

    def _find_source(self) -> None:
        """The run to start from; what the command line leaves open is as there. A run that goes on has it in its own
        configuration, and needs its source no more."""
        config, folder = self.config, reading.run_folder(self.config)
        is_new = not has_checkpoints(folder)
        self.source = Source.open(config.load_dir) if config.load_dir and is_new else None
        saved = self.source.saved if self.source else read_started_from(folder)
        self.started_from = config.load_dir or (saved and saved["load_dir"])
        if saved is not None:
            reading.inherit_settings(config, saved)

    def _make_optimizer(self) -> optax.GradientTransformation:
        config = self.config
        return make_optimizer(
            config.model.lr,
            config.model.beta1,
            config.model.beta2,
            warmup_steps=config.warmup_steps,
            decay_steps=config.max_steps if config.lr_schedule == "cosine" else None,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
        )

    def _load_data(self) -> None:
        config = self.config
        options = reading.read_data_options(config)
        self.datasets = {split: load_dataset(config.dataset_name, split, options) for split in SPLITS}
        dataset = self.datasets["train"]
        check_batch_memory(config.batch_size, dataset.image_shape)
        if config.debug_overfit:
            dataset = first_examples(dataset, config.batch_size)
        hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        self.batches = training_batches(dataset, config.batch_size, config.seed, **hosts)
        self.position: dict[str, Any] = {}  # of the checkpoint that the run continues from
        # Always the same validation images, so that two points of a curve differ by the model alone.
        validation_batches = training_batches(self.datasets["validation"], config.batch_size, config.seed, **hosts)
        self.validation_batch = shard_batch(next_batch(validation_batches), self.mesh)
        log(summarize_data(self.datasets, config.batch_size))

    def _load_model(self) -> None:
        config = self.config
        dataset = self.datasets["train"]
        latents = dataset.latents
        vae = config.vae or (latents.vae if latents else DEFAULT_HUB_ID)
        sha256 = latents.vae_sha256 if latents else None
        codec = load_codec(bool(config.model.use_stable_vae), vae, self.mesh, dataset.image_shape, sha256)
        if self.source and not reading.is_explicit("model.num_classes"):
            config.model.num_classes = dataset.num_classes
        self.model = make_model(
            config.model,
            make_objective(config),
            codec,
            self.mesh,
            dataset.image_shape,
            dataset.class_names,
            remat=config.remat,
            empty_classes=dataset.empty_classes,
        )
        for hint in model_hints(config.model, self.model.latent_shape, dataset, config.batch_size):
            log(f"note: {hint}")
        if not can_guide(config.model.class_dropout_prob):
            log(f"{explain_no_guidance(config.model.class_dropout_prob)}: samples are drawn without guidance")
        recorded = {"vae": vae if codec.sha256 else None, "vae_sha256": codec.sha256}
        recorded["latent_shape"] = list(self.model.latent_shape)
        data = describe_data(self.datasets) | recorded
        self.saved_config = {**config.to_dict(), "dataset": data, "load_dir": self.started_from, "jax": jax_settings()}

    def _load_reference(self) -> None:
        config = self.config
        self.reference = load_statistics(config.fid_stats) if config.fid_stats else None
        if self.reference is not None:
            convention = find_convention(self.reference, config.convention).name
            warn_of_other_shape(self.reference, self.datasets["train"].image_shape)
            self.extractors = load_extractors(
                weights=config.inception_weights, convention=convention, sharding=replicated(self.mesh)
            )
            if not config.eval_interval:
                reading.refuse_ignored(("fid_stats",), "with --eval_interval=0: FID is part of an evaluation")

    def _open_folder(self) -> None:
        config = self.config
        self.folder = reading.run_folder(config)
        prepare_output_folder(self.folder, "save_dir")
        self.lock = FolderLock(self.folder)
        if jax.process_index() == 0:
            self.lock.acquire("save_dir")
        if config.profile:
            prepare_output_folder(Path(config.profile), "profile")
        self.checkpoints = Checkpoints(self.folder, config.keep_last, config.keep_every)
        self.checkpoints.remove_unfinished()

    def init_or_restore(self) -> TrainState:
        """The newest checkpoint's state, with the data moved to its position; or step 0, perhaps of --load_dir.

        The state of step 0 is the same on every process and any number of devices.
        """

        target, steps = self.state_structs(), self.checkpoints.steps()
        if steps:
            return self._restore(steps, target)
        state = self._fresh_state(target)
        if self.start is None:
            return state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target.params)
        params, ema_params = (jax.tree.map(place, tree, shardings) for tree in self.start)
        self.start = None  # as large as the state
        return state.replace(params=params, ema_params=ema_params)

    def state_structs(self) -> TrainState:
        """The shapes of the state, and where each array lives."""
        shapes = jax.eval_shape(self._init_state, jax.random.key(self.config.seed))
        return shape_structs(shapes, state_sharding(shapes, self.mesh, self.config.sharding))

    def _fresh_state(self, target: TrainState) -> TrainState:
        """Returns the state of step 0, placed as `target` (shapes) says."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
        return jax.jit(self._init_state, out_shardings=shardings)(jax.random.key(self.config.seed))

    def _init_state(self, key: jax.Array) -> TrainState:
        return create_train_state(self._fresh_params(key), self.optimizer, key)

    def _fresh_params(self, key: jax.Array) -> PyTree:
        """The parameters of step 0 of a run that starts from no other; with LoRA's factors, if it has them."""
        params = init_params(self.model, jax.random.fold_in(key, INIT))
        return add_lora(params, self.config.lora_rank, key) if self.config.lora_rank else params

    def _prepare_start(self) -> tuple[tuple[PyTree, PyTree] | None, tuple[str, ...]]:
        """((parameters, EMA) to start from, if from another run, as NumPy arrays; the parts that are not trained)."""
        config, steps = self.config, self.checkpoints.steps()
        if steps:  # a run that is continued has its own parameters, and goes on as it began
            step, saved = self.checkpoints.restore_newest(self.checkpoints.restore_config, steps)
            self.checkpoints.refuse_imported(step)
            return None, tuple(saved.get("frozen", ()))
        if self.source is None:
            return None, ()
        is_other = config.objective.name != self.source.saved["objective"]["name"]
        check_architecture(config.model, self.source.saved["model"], config.load_dir, is_other)
        key = jax.random.key(config.seed)
        fresh = jax.tree.map(np.asarray, init_params(self.model, jax.random.fold_in(key, INIT)))
        # What is frozen has one value: that of the EMA, which samples best.
        has_one_value = bool(config.freeze or config.lora_rank)
        start = start_from(self.source, fresh, self.saved_config, replicated(self.mesh), from_ema=has_one_value)
        for remark in start.remarks:
            log(remark)
        trees = [start.params, start.ema_params]
        if config.lora_rank:
            trees = [jax.tree.map(np.asarray, add_lora(tree, config.lora_rank, key)) for tree in trees]
            frozen = frozen_beside_lora(tuple(trees[0]), start.new)
        else:
            frozen = read_frozen(config.freeze, tuple(trees[0]))
        return (trees[0], trees[1]), frozen

    def _restore(self, steps: list[int], target: TrainState) -> TrainState:
        """The state of the newest checkpoint that is whole, with the data moved to its position. What has changed since
        it was saved is reported, or refused where the run would become another."""

        def read(step):
            saved = self.checkpoints.restore_config(step)
            differences = compare_with_saved(self.saved_config, saved, self.datasets, self.folder)
            state, position = self.checkpoints.restore(step, target)
            next_index = position.get("next_index") if isinstance(position, dict) else None
            if type(next_index) is not int or next_index < 0:
                raise DamagedCheckpointError(f"checkpoint of step {step} is damaged: it has no position in the data")
            return differences, state, position

        step, (differences, state, position) = self.checkpoints.restore_newest(read, steps)
        for damaged in steps[: steps.index(step)]:
            self.checkpoints.set_aside(damaged)
        self.position = position
        self.batches.set_state({"next_index": position["next_index"]})
        log(f"resuming {self.folder} from step {step}")
        for difference in differences:
            log(f"since step {step}: {difference}")
        return state

    def write_config(self, step: int) -> None:
        """Writes config.json, a copy of it under the time and step of this start, and the listing of the data."""
        if jax.process_index() > 0:
            return
        history = self.folder / "configs"
        history.mkdir(exist_ok=True)
        for path in (history / f"{time.strftime('%Y%m%d-%H%M%S')}_step{step}.json", self.folder / "config.json"):
            write_json(path, self.saved_config)
        write_listing(self.folder, {split: dataset.fingerprint for split, dataset in self.datasets.items()})

    def is_evaluation_due(self, step: int) -> bool:
        """Whether images are drawn, and FID computed, after this step."""
        interval, is_end = self.config.eval_interval, step == self.config.max_steps
        return bool(step and interval and (step % interval == 0 or step == 1000 or is_end))

    def count_evaluations(self, step: int) -> int:
        """Returns how many evaluations are due before this step, whenever the run was to end."""
        interval = self.config.eval_interval
        return (step - 1) // interval + (step > 1000 and 1000 % interval > 0)

    def is_evaluation_missing(self, step: int) -> bool:
        """Whether the evaluation due after the step from which this run continues is not in its log: a kill or a signal
        has ended it."""
        if not self.is_evaluation_due(step):
            return False
        lines = read_metrics(self.folder / "metrics.jsonl") if jax.process_index() == 0 else []
        is_there = any(line["step"] == step and "validation_loss_t/mean" in line for line in lines)
        return not multihost_utils.broadcast_one_to_all(np.bool_(is_there)) if jax.process_count() > 1 else not is_there

    def last_batch(self) -> PyTree:
        """The batch before the one that comes next."""
        self.batches.set_state({"next_index": self.batches.get_state()["next_index"] - 1})
        return shard_batch(next_batch(self.batches), self.mesh)

    def compile_steps(self, state: TrainState) -> tuple[Callable, Callable]:
        """(train_step, validation_step), both of (state, batch, codec), compiled for this run's shapes; the first
        donates the state's memory. UserError where that takes more memory than there is."""
        arguments = (state, self.validation_batch, self.model.codec)
        log("compiling the training step ...")
        started = time.monotonic()
        with explaining_out_of_memory("the training step", MEMORY_FLAGS):
            train = self.compile_train_step(state, self.validation_batch)
            needed = memory_needed(train)
            if needed > device_memory():
                raise out_of_memory("the training step", MEMORY_FLAGS, needed)
            validation = jax.jit(partial(validation_step, **self.static))
            validate = compile_step(validation, *arguments, platform=self.mesh.devices.flat[0].platform)
        seconds, there = time.monotonic() - started, format_bytes(device_memory())
        log(f"compiled in {seconds:.1f} s; it needs {format_bytes(needed)} of {there} per device")
        return train, validate

    def compile_train_step(self, state: TrainState, batch: PyTree) -> jax.stages.Compiled:
        """Of (state, batch, codec), for arrays or shapes of a state and a batch."""
        shardings = jax.tree.map(lambda x: x.sharding, state)
        own = {"ema": self.ema, "skips_nonfinite": self.config.skip_nonfinite > 0}
        step = jit_train_step(shardings, replicated(self.mesh), **self.static, **own)
        return compile_step(step, state, batch, self.model.codec, platform=self.mesh.devices.flat[0].platform)

    def plan(self) -> Iterator[str]:
        """Yields what this training will take, in lines; nothing of it is written."""
        config, state, compiled = self.config, self.state_structs(), {}
        yield self.summary(state)

        def measure(batch_size: int) -> int:
            compiled[batch_size] = self.compile_train_step(state, batch_structs(self.validation_batch, batch_size))
            return memory_needed(compiled[batch_size])

        yield from plan_lines(
            state,
            measure,
            lambda: self._time_step(compiled[config.batch_size]),
            batch_size=config.batch_size,
            multiple=self.mesh.size * config.grad_accum * row_period(self.model.objective),
            flops_per_image=self.flops_per_step / config.batch_size,
            num_images=len(self.datasets["train"].source),
            num_steps=config.max_steps,
            devices=self.mesh.devices.flatten().tolist(),
        )

    def _time_step(self, compiled_step: jax.stages.Compiled) -> float:
        """Returns the seconds of the faster of the first two steps; the first may load code."""
        state, seconds = self._fresh_state(self.state_structs()), []
        with explaining_out_of_memory("the training step", MEMORY_FLAGS):
            for _ in range(2):
                jax.block_until_ready(state)
                started = time.monotonic()
                state, metrics = compiled_step(state, self.validation_batch, self.model.codec)
                jax.block_until_ready((state, metrics))
                seconds.append(time.monotonic() - started)
        return min(seconds)

    def summary(self, state: TrainState) -> str:
        model, shape = self.config.model, self.model.latent_shape
        counts = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in state.params.items()}
        count, trained = sum(counts.values()), sum(counts[part] for part in counts if part not in self.frozen)
        training = f" ({trained:,}, or {trained / count:.1%}, are trained)" if self.frozen else ""
        return (
            f"{model.network} {model.hidden_size} wide, {model.depth} deep, {model.num_heads} heads, patch "
            f"{model.patch_size} on {'x'.join(map(str, shape))}: {count:,} parameters{training}, "
            f"{self.flops_per_step / 1e9:,.1f} GFLOP per step of {self.config.batch_size} images, on "
            f"{self.mesh.size} x {jax.devices()[0].device_kind}{self._describe_sharding(state)}"
        )

    def _describe_sharding(self, state: TrainState) -> str:
        mode, num_shards = self.config.sharding, self.mesh.shape[SHARD]
        if mode == "dp" or self.mesh.size == 1:
            return ""
        replicas = f" ({self.mesh.size // num_shards} x {num_shards} shards)" if mode == "hybrid" else ""
        whole = unsplit_fraction(state, jax.tree.map(lambda leaf: leaf.sharding, state))
        return f", {mode}{replicas}, {whole:.1%} of the state whole on each"

    def evaluate(self, state: TrainState, batch: PyTree) -> Iterator[tuple[str, Any]]:
        """(name, number or figure) of what is looked at every --eval_interval; images and FID use the EMA, and while
        that is mostly the initial parameters, images are drawn from the parameters too."""
        config, model, key = self.config, self.model, jax.random.fold_in(state.key, VALIDATION)
        for name, data in (("training", batch), ("validation", self.validation_batch)):
            for t, loss in loss_by_time(model, state.params, data, key).items():
                yield f"{name}_loss_t/{t}", loss
        yield "reconstruction_n", reconstruction_panel(model, state.ema_params, self.validation_batch, key)
        is_guided = has_guidance(model.objective) and can_guide(config.model.class_dropout_prob)
        scale = guidance_scale(config.model.cfg_scale) if is_guided else None
        sampler = SamplerConfig(largest_steps(config.model.denoise_timesteps, model.objective), scale)
        weight = self.ema.initial_weight(int(state.step))
        note = f"EMA, {weight:.0%} of it initial parameters" if weight > 0.005 else "EMA"
        number = self.count_evaluations(int(state.step))
        yield from sample_panels(model, state.ema_params, key, sampler, number=number, note=note)
        if weight > 0.5:
            raw = {"number": number, "name": "sample_raw", "note": "parameters without EMA", "step_counts": ()}
            yield from sample_panels(model, state.params, key, sampler, scales=(1 if scale is None else scale,), **raw)
        yield "straightness", ImageGenerator(model, state.ema_params, seed=config.seed).straightness()
        if self.reference is not None:
            yield "fid", self.compute_fid(state, sampler)

    def compute_fid(self, state: TrainState, sampler: SamplerConfig) -> float:
        config = self.config
        assert self.reference is not None
        generator = ImageGenerator(self.model, state.ema_params, seed=config.seed)
        needed = -(-config.fid_samples // self.mesh.size) * self.mesh.size
        samples = generator.generate(sampler, config.fid_samples, min(config.batch_size, needed))
        statistics = ImageStatistics()
        measure_images(self.extractors, samples, statistics)
        return compute_fid(statistics, self.reference)


def refuse_ignored(config: ConfigDict) -> None:
    """UserError for flags that would have no effect on this run."""
    if not config.fid_stats:
        reading.refuse_ignored(("fid_samples", "convention", "inception_weights"), "without --fid_stats")
    if config.sharding != "hybrid":
        reading.refuse_ignored(("num_shards",), f"with --sharding={config.sharding}, only with hybrid")
    if not config.model.use_stable_vae:
        reading.refuse_ignored(("vae",), "on pixels (--use_stable_vae 0)")
    if config.lr_schedule == "cosine" and config.max_steps == 0:
        reading.refuse_ignored(("lr_schedule",), "with --max_steps=0, which trains nothing")
    if config.lr_schedule == "cosine" and config.warmup_steps >= config.max_steps:
        raise UserError(
            f"--warmup_steps={config.warmup_steps}: --lr_schedule=cosine ends at --max_steps={config.max_steps}; use "
            "fewer"
        )
    if config.lora_rank and config.freeze:
        raise UserError(
            f"--freeze={','.join(config.freeze)}: with --lora_rank the whole network is frozen but for its labels; "
            "leave one of the two out"
        )
    reading.check_data_flags(config.dataset_name)


def refuse_contradictions(config: ConfigDict) -> None:
    """UserError for settings of a new run that its objective or its data make pointless."""
    objective = OBJECTIVES[config.objective.name]
    fields = [flag_of(field) for field in dataclasses.fields(objective)]
    others = [flag for flag in map(flag_of, objective_fields()) if flag not in fields]
    reading.refuse_ignored(others, f"with --objective.name={config.objective.name}")
    needs_step = getattr(objective, "MODEL_DEFAULTS", {}).get("step_conditioning", 0)
    if reading.is_explicit("model.step_conditioning") and config.model.step_conditioning != needs_step:
        raise UserError(
            f"--model.step_conditioning={config.model.step_conditioning}: --objective.name={config.objective.name} "
            f"{'needs it' if needs_step else 'gives the network no step'}; leave the flag out"
        )
    if config.objective.distill and get_loader(config.dataset_name).holds != "pairs":
        raise UserError(
            f"--objective.distill=1 learns one step from pairs, not from --dataset_name={config.dataset_name}; make "
            "some with make_pairs.py, and give pairs:DIR"
        )
    if config.model.target_update_rate == 1:
        reading.refuse_ignored(("ema_warmup",), "with --model.target_update_rate=1, which is no EMA")
    if config.debug_overfit and config.random_flip:
        raise UserError("--random_flip=1 has no effect with --debug_overfit=1; leave it out")


def log_evaluation(trackers: Trackers, results: Iterator[tuple[str, Any]], step: int, stop: StopRequest) -> bool:
    """Whether all results were logged; a signal ends it, and the same evaluation is made when the run continues."""
    numbers: dict[str, float] = {}
    try:
        with stop.interrupting():
            for name, value in results:
                if isinstance(value, Figure):
                    trackers.log_figure(step, name, value)
                else:
                    numbers[name] = value
                if jax.process_count() > 1 and stop.is_due():
                    return False
    except Interrupted:
        return False
    trackers.log(step, numbers)
    return True


def finish_evaluation(trainer: Trainer, state: TrainState, trackers: Trackers, stop: StopRequest) -> bool:
    """Makes the evaluation that a kill or a signal left undone; False where it is interrupted again."""
    step = int(state.step)
    if not trainer.is_evaluation_missing(step):
        return True
    log(f"the evaluation of step {step} was not finished: running it now")
    return log_evaluation(trackers, trainer.evaluate(state, trainer.last_batch()), step, stop)


def train(trainer: Trainer, state: TrainState, trackers: Trackers, stop: StopRequest) -> int:
    """Trains to --max_steps or a stop request, logging, evaluating and saving on the way; returns the last step."""
    config, codec, step = trainer.config, trainer.model.codec, int(state.step)
    metrics = position = None  # of the last step

    if not finish_evaluation(trainer, state, trackers, stop) or step >= config.max_steps:
        return step

    # Compiled steps, and what saves, reports and traces.
    compiled_step, validate = trainer.compile_steps(state)
    saver = Saver(trainer.checkpoints, trainer.saved_config, config.save_interval, config.save_minutes, step)
    throughput = Throughput(config.batch_size, trainer.flops_per_step, config.peak_tflops)
    check = partial(check_finite, checkpoints=trainer.checkpoints)
    skipped = SkippedUpdates(config.skip_nonfinite, trainer.checkpoints, state.params, trainer.position)
    progress = Progress(throughput, trackers, skipped.count, check, step, config.max_steps)
    trace = StepTrace(config.profile, step)
    batches = progress.throughput.waiting(prefetch(trainer.batches, trainer.mesh), progress.is_idle)
    with progress.bar:
        while True:
            try:
                batch, position = next(batches)
            except DataError as error:
                progress.flush()
                if metrics is not None:
                    check(metrics, step)
                end_without_data(error, step, saver, state, position and skipped.extend_position(position))

            # Train; metrics are read while the next step runs.
            step += 1
            trace.before(step)
            state, metrics = compiled_step(state, batch, codec)
            trace.after(step, metrics)
            is_end = step == config.max_steps
            is_last = is_end or stop.is_due()
            is_logged = step % config.log_interval == 0 or step == 1 or is_end
            progress.add(step, metrics, validate(state, trainer.validation_batch, codec) if is_logged else None)

            # Save, then evaluate, which takes its time.
            is_evaluated = trainer.is_evaluation_due(step)
            is_saved = saver.is_due(step) or is_last
            if is_evaluated or is_saved:
                progress.flush()
                check(metrics, step, ema_params=state.ema_params)
            if is_saved:
                with progress.pausing("saving"):
                    (saver.save_last if is_last else saver.save)(state, skipped.extend_position(position))
            if is_evaluated:
                with progress.pausing("evaluating"):
                    is_whole = log_evaluation(trackers, trainer.evaluate(state, batch), step, stop)
                    if not (is_whole or is_last):
                        saver.save_last(state, skipped.extend_position(position))
                        is_last = True
            if is_last:
                trace.close(metrics)
                return step


def end_without_data(error: DataError, step: int, saver: Saver, state: TrainState, position: object) -> NoReturn:
    """Ends a run whose data cannot be read any more, after saving what it has learned."""
    # Of several processes the others cannot be notified in time: they wait for this one in the middle of a step.
    if position is None or jax.process_count() > 1:
        raise error
    saver.save_last(state, position)
    raise UserError(f"{error}; saved at step {step}: with the data back, the same command continues from there")


def main(config: ConfigDict) -> None:
    stop = StopRequest()
    initialize_processes(config.coordinator_address, config.num_processes, config.process_id, stop)
    if config.coordinator_address:
        stop.share()
    log(describe_processes())
    trainer = Trainer(config)
    if config.plan:
        for line in trainer.plan():
            log(line)
        return
    trainer.open_run()
    state = trainer.init_or_restore()
    if state.step >= config.max_steps and not trainer.is_evaluation_missing(int(state.step)):
        log(f"nothing to do: {trainer.folder} is at step {state.step} already; raise --max_steps to go on")
        return
    log(f"settings: {reading.explicit_flags() or 'the defaults'}; all are in {trainer.folder / 'config.json'}")
    log(trainer.summary(state))
    first_evaluation = min(1000, config.eval_interval) if config.eval_interval else None
    for hint in ema_hints(trainer.ema, first_evaluation, config.max_steps):
        log(f"note: {hint}")
    trainer.write_config(int(state.step))
    settings = {**config.to_dict(), "dataset": trainer.saved_config["dataset"]}
    trackers = Trackers(trainer.folder, settings, int(state.step))
    with explaining_out_of_memory("training", MEMORY_FLAGS):
        last_step = train(trainer, state, trackers, stop)
    trainer.checkpoints.wait()
    trainer.checkpoints.close()
    trackers.close()
    trainer.lock.release()
    if last_step < config.max_steps or trainer.is_evaluation_missing(last_step):
        log(f"stopped at step {last_step} and saved; the same command continues from there")
        sys.exit(EXIT_STOPPED)
    log(f"done: images, metrics.jsonl and checkpoints are in {trainer.folder}")
    params = "raw" if trainer.ema.initial_weight(last_step) > 0.5 else "ema"
    num_images = len(trainer.datasets["train"].source)
    for purpose, command in commands_after_training(trainer.folder, trainer.saved_config, num_images, params):
        log(f"{purpose}: {command}")


if __name__ == "__main__":
    program.run_program(define_flags, main)
