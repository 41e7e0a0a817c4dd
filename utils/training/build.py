"""Builds a run that is ready to train from its configuration: data, model, optimizer. Bad input is refused here."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from utils.base.devices import (
    device_memory,
    explaining_out_of_memory,
    find_devices,
    format_bytes,
    jax_settings,
    memory_needed,
    out_of_memory,
)
from utils.base.files import check_writable
from utils.base.mesh import (
    SHARD,
    check_batch_size,
    choose_num_shards,
    compile_step,
    make_mesh,
    place,
    replicated,
    shape_structs,
    state_sharding,
    unsplit_fraction,
)
from utils.base.messages import UserError, log
from utils.codecs.codec import Codec, set_pixel_format
from utils.codecs.codecs import CODECS, DEFAULT_HUB_ID, CodecSpec, describe_codec, load_codec, read_manifest_name
from utils.data.batches import training_batches
from utils.data.coupled import Coupling
from utils.data.dataset import ImageDataset
from utils.data.loaders import describe_data
from utils.kernels.random import unroll
from utils.metrics.extractors import PIXELS
from utils.networks.lora import KEY as LORA
from utils.networks.lora import add_lora
from utils.networks.models import ImageModel, init_params, make_model, takes_step
from utils.networks.optimizers import freeze_parts
from utils.networks.state import EmaSchedule, TrainState, create_train_state
from utils.objectives.objective import row_period
from utils.runs.checkpoint import Checkpoints, has_checkpoints
from utils.runs.config import RunConfig
from utils.runs.memorising import Memorising, read_splits
from utils.runs.pool import choose_pool
from utils.sampling.samplers import can_guide, explain_no_guidance
from utils.storage.remote import check_writable as check_remote
from utils.training.advice import model_hints
from utils.training.configure import with_classes
from utils.training.data import (
    inherit_condition,
    load_data,
    make_coupling,
    this_host,
    training_examples,
    with_independent_noise,
)
from utils.training.preview import load_preview
from utils.training.progress import Stages
from utils.training.reference import Reference, load_reference
from utils.training.start import (
    SourceRun,
    check_architecture,
    frozen_beside_lora,
    read_frozen,
    read_started_from,
    start_from,
)
from utils.training.step import INIT, INTERNAL, jit_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready to train: everything that is settled before its first step."""

    config: RunConfig
    record: dict[str, Any]  # what is saved with the run: its settings, and facts about its data
    mesh: Mesh
    datasets: Mapping[str, ImageDataset]  # by split
    validation_batch: PyTree  # on the devices
    coupling: Coupling | None  # of noise and data, where they are not independent
    model: ImageModel
    optimizer: optax.GradientTransformation
    ema: EmaSchedule
    frozen: tuple[str, ...]  # top-level parts of the parameters that are not trained
    start: list[PyTree]  # [parameters, EMA] of another run, as NumPy arrays; `make_state` empties it, to free memory
    reference: Reference | None
    viewer: Codec | None  # by which panels are decoded, where it is not the model's codec
    stages: Stages  # of its start

    @property
    def folder(self) -> Path:
        return self.config.folder

    @functools.cached_property
    def state_structs(self) -> TrainState:
        """The shapes of the state, and where each array lives."""
        # Shapes alone: nothing is computed, and no device holds anything yet.
        shapes = jax.eval_shape(lambda key: init_state(self, key, key), jax.random.key(self.config.training.seed))
        return shape_structs(shapes, state_sharding(shapes, self.mesh, self.config.devices.sharding))

    @functools.cached_property
    def memorising(self) -> Memorising:
        """The training images, with which samples are compared by their pixels."""
        has_mirrors = self.datasets["train"].random_flip or "flip" in self.config.augmentation.augment
        training = read_splits(self.datasets["train"], self.datasets["validation"], has_mirrors)
        return Memorising(training, PIXELS, self.config.training.batch_size, self.mesh, self.folder)

    @property
    def static(self) -> dict[str, Any]:
        """The static arguments of a step: another value compiles it anew."""
        return {
            "model": self.model.network,
            "objective": self.model.objective,
            "optimizer": self.optimizer,
            "grad_accum": self.config.devices.grad_accum,
            "ema": self.ema,
            "frozen": self.frozen,
            "skips_nonfinite": self.config.optimizer.skip_nonfinite > 0,
            "is_elementwise": self.config.optimizer.name == "adam",
        }

    @property
    def flops_per_step(self) -> int:
        """Floating-point operations of a step, matmuls only: a backward pass counts as two forward passes."""
        return 3 * self.config.training.batch_size * self.model.network.count_flops(self.model.latent_shape)

    def training_batches(self) -> Any:
        """Returns the endless batches of this process, from the first; they can be moved to any position."""
        training = self.config.training
        dataset = training_examples(self.config, self.datasets["train"])
        return training_batches(dataset, training.batch_size, training.seed, **this_host(), coupling=self.coupling)


def build_run(config: RunConfig, stages: Stages | None = None) -> Run:
    """Returns the run of a configuration, without writing anything. `stages` go on measuring a program's start.

    Raises UserError for whatever keeps it from training: data that are missing, sizes that do not fit, devices that do
    not divide the batch, a folder that cannot be written, a run to start from that has another architecture.
    """
    stages = stages or Stages()
    # Processes, which the program joins before it asks for devices; alone, each would train all of the run.
    address = config.processes.coordinator_address
    if address and not jax.distributed.is_initialized():
        raise UserError(f"--coordinator_address={address}: call initialize_processes before build_run")
    # Devices, and a batch that divides over them.
    devices = config.devices
    mesh = make_mesh(choose_num_shards(devices.sharding, devices.num_shards, find_devices()))
    check_batch_size(config.training.batch_size, mesh.size, devices.grad_accum, row_period(config.objective))
    if not config.training.plan:  # before images are looked through, which may take long
        check_writable(config.folder, "save_dir")
        if config.remote is not None:
            check_remote(config.remote.url, "save_dir")
        if config.logging.profile:
            check_writable(Path(config.logging.profile), "profile")

    # Data.
    datasets, validation_batch = load_data(config, mesh)
    stages.end("data")

    # Model. A run that starts from another has as many labels as its own data, and the other's scale of conditions.
    is_new = not has_checkpoints(config.folder)
    source = SourceRun.open(config.start.load_dir) if config.start.load_dir and is_new else None
    if source:
        config = with_classes(config, datasets["train"].num_classes)
    datasets = inherit_condition(datasets, source.saved if source else read_started_from(config.folder))
    dataset = datasets["train"]
    model, spec = build_model(config, dataset, mesh)
    report_hints(config, model, dataset)
    coupling = make_coupling(config, dataset, model)
    if coupling is not None:
        validation_batch = with_independent_noise(validation_batch, config, model)

    # Record, and the parameters to start from.
    record = make_record(config, model, spec, datasets)
    start, frozen = prepare_start(config, source, model, record)
    record["frozen"] = list(frozen)
    return Run(
        config=config,
        record=record,
        mesh=mesh,
        datasets=datasets,
        validation_batch=validation_batch,
        coupling=coupling,
        model=model,
        optimizer=freeze_parts(config.optimizer.make(config.training.max_steps, config.model, mesh), frozen),
        ema=EmaSchedule.of_run(record),
        frozen=frozen,
        start=start,
        reference=load_reference(config, mesh, dataset),
        viewer=load_preview(config, model, validation_batch),
        stages=stages,
    )


def build_model(config: RunConfig, dataset: ImageDataset, mesh: Mesh) -> tuple[ImageModel, CodecSpec]:
    """Returns (model, its codec) for a data set; the codec is the one that made cached latents, unless given."""
    # Which codec: for a bare name, as for none at all, the one that made the latents, or the default.
    latents = dataset.latents
    spec = config.codec.spec
    made_by = read_manifest_name(latents.vae) if latents else CodecSpec("kl", DEFAULT_HUB_ID)
    if config.codec.text is None or spec == CodecSpec(made_by.name):
        spec = made_by
    if spec.source is None:
        spec = spec._replace(source=CODECS[spec.name].default)

    # Its weights, which must be those that made the latents; then the network for its latents.
    codec = load_codec(spec, mesh, dataset.image_shape, latents.vae_sha256 if latents else None)
    codec = set_pixel_format(codec, dataset.pixels)
    model = make_model(
        config.model,
        config.objective,
        codec,
        mesh,
        dataset.image_shape,
        dataset.condition,
        remat=config.devices.remat,
        augment=config.augmentation.augment,
        augment_prob=config.augmentation.augment_prob,
    )
    if config.model.step_conditioning and not takes_step(model.network):
        raise UserError(
            f"--objective.name={config.objective_name} needs a network that takes a step; "
            f"--model.network={config.model.network} does not (docs/change_this.md, Network)"
        )
    return model._replace(pool=choose_pool(dataset)), spec


def report_hints(config: RunConfig, model: ImageModel, dataset: ImageDataset) -> None:
    """Logs settings that are possible but probably mistakes."""
    for hint in model_hints(config.model, model.latent_shape, dataset, config.training.batch_size):
        log(f"note: {hint}")
    dropout = config.model.class_dropout_prob
    if not can_guide(dropout):
        log(f"{explain_no_guidance(dropout)}: samples are drawn without guidance")


def make_record(
    config: RunConfig, model: ImageModel, spec: CodecSpec, datasets: Mapping[str, ImageDataset]
) -> dict[str, Any]:
    """Returns what is saved with a run: its settings, and what identifies data, VAE and JAX's settings."""
    # A run that is continued has its source in its own configuration.
    saved = read_started_from(config.folder)
    recorded = {**describe_codec(spec, model.codec.sha256), "latent_shape": list(model.latent_shape)}
    return {
        **config.to_json(),
        "dataset": describe_data(datasets) | recorded,
        "load_dir": config.start.load_dir or (saved and saved["load_dir"]),
        "jax": jax_settings(),
    }


def prepare_start(
    config: RunConfig, source: SourceRun | None, model: ImageModel, record: dict[str, Any]
) -> tuple[list[PyTree], tuple[str, ...]]:
    """Returns ([parameters, EMA] to start from, nothing if from scratch; the parts that are not trained)."""
    if has_checkpoints(config.folder):  # a run that is continued has its own parameters, and goes on as it began
        checkpoints = Checkpoints(config.folder)
        step, saved = checkpoints.restore_newest(checkpoints.restore_config, checkpoints.steps())
        checkpoints.refuse_imported(step)
        checkpoints.close()
        return [], tuple(saved.get("frozen", ()))
    if source is None:
        return [], ()

    # What fits of the source's parameters stands in place of fresh ones. What is frozen has one value: that of the
    # EMA, which samples best.
    settings = config.start
    is_other = config.objective_name != source.saved["objective"]["name"]
    check_architecture(record, source.saved, source.load_dir, is_other)
    key = jax.random.key(config.training.seed)
    fresh = jax.tree.map(np.asarray, init_params(model, jax.random.fold_in(key, INIT)))
    has_one_value = bool(settings.freeze or settings.lora_rank)
    start = start_from(source, fresh, record, replicated(model.mesh), from_ema=has_one_value)
    for remark in start.remarks:
        log(remark)

    # Which parts are trained.
    trees = [start.params, start.ema_params]
    if settings.lora_rank:
        trees = [jax.tree.map(np.asarray, add_lora(tree, settings.lora_rank, key)) for tree in trees]
        if not trees[0][LORA]:
            raise UserError(
                f"--lora_rank={settings.lora_rank} is for kernels of attention and MLP, of which --model.network="
                f"{config.model.network} has none; leave it out, or use --freeze"
            )
        frozen = frozen_beside_lora(tuple(trees[0]), start.new)
    else:
        frozen = read_frozen(settings.freeze, tuple(trees[0]))
    return trees, frozen


# --- The state of step 0 ---


def make_state(run: Run) -> TrainState:
    """Returns the state of step 0, the same on every process and any number of devices.

    Its parameters are fresh, or another run's where the run starts from one.
    """
    # Each device computes its own part: the state is never whole on one that is to hold a shard.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state_structs)
    key = jax.random.key(run.config.training.seed)
    is_cpu = run.mesh.devices.flat[0].platform == "cpu"
    init = jax.jit(lambda key: init_state(run, key, unroll(key) if is_cpu else key), out_shardings=shardings)
    state = init(key)
    # Another run's parameters take the place of fresh ones.
    if not run.start:
        return state
    params, ema_params = (jax.tree.map(place, tree, shardings.params) for tree in run.start)
    run.start.clear()  # copies on the host, as large as the model
    return state.replace(params=params, ema_params=ema_params)


def init_state(run: Run, key: jax.Array, draw_key: jax.Array) -> TrainState:
    """Returns fresh parameters, with LoRA's factors if the run has them, and the optimizer's state. `draw_key` is the
    key, in the form by which parameters are drawn."""
    params = init_params(run.model, jax.random.fold_in(draw_key, INIT))
    if rank := run.config.start.lora_rank:
        params = add_lora(params, rank, key)
    return create_train_state(params, run.optimizer, key, run.config.optimizer.ema_profiles, run.frozen)


def summarize_run(run: Run, state: TrainState) -> str:
    """Returns sizes and devices of a run in one line. `state` may have shapes instead of arrays."""
    # By top-level part, as that is what is frozen.
    training = run.config.training
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in state.params.items()}
    count = sum(counts.values())
    trained = sum(counts[part] for part in counts if part not in run.frozen)
    share = f" ({trained:,}, or {trained / count:.1%}, are trained)" if run.frozen else ""
    return (
        f"{run.config.model.describe()} on {'x'.join(map(str, run.model.latent_shape))}: {count:,} parameters{share}, "
        f"{run.flops_per_step / 1e9:,.1f} GFLOP per step of {training.batch_size} images, on {run.mesh.size} x "
        f"{jax.devices()[0].device_kind}{describe_sharding(run, state)}"
    )


def describe_sharding(run: Run, state: TrainState) -> str:
    """Returns how the state is split over the devices, in words; nothing where every device has all of it."""
    # Arrays that no axis divides stay whole: their share says what sharding has left over.
    mode = run.config.devices.sharding
    if mode == "dp" or run.mesh.size == 1:
        return ""
    num_shards = run.mesh.shape[SHARD]
    replicas = f" ({run.mesh.size // num_shards} x {num_shards} shards)" if mode == "hybrid" else ""
    whole = unsplit_fraction(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    return f", {mode}{replicas}, {whole:.1%} of the state whole on each"


MEMORY_FLAGS = (
    "a smaller --batch_size or --image_size, a larger --model.patch_size, --remat dots (or blocks), or --grad_accum 2 "
    "(or more)"
)


def compile_steps(run: Run, state: TrainState) -> tuple[Callable, Callable]:
    """Returns train(state, batch) -> (next state, metrics) and validate(state) -> (the same state, metrics).

    Both are one compiled function for this run's shapes, which takes the memory of the state that it is given. Raises
    UserError where that needs more memory than there is.
    """
    # Memory is known before the first step: the compiler says what the step needs.
    run.stages.end("model")
    log("compiling the training step ...")
    started = time.monotonic()
    with explaining_out_of_memory("the training step", MEMORY_FLAGS):
        step = compile_train_step(run, state, run.validation_batch)
        needed = memory_needed(step)
        if needed > device_memory():
            raise out_of_memory("the training step", MEMORY_FLAGS, needed)
    seconds = time.monotonic() - started
    log(f"compiled in {seconds:.1f} s; it needs {format_bytes(needed)} of {format_bytes(device_memory())} per device")

    run.stages.end("compilation")

    # On the devices already, as the state is.
    no, yes = (place(np.asarray(value), replicated(run.mesh)) for value in (False, True))

    def train(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        return step(state, batch, run.model.codec, no)

    def validate(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        state, metrics = step(state, run.validation_batch, run.model.codec, yes)
        return state, {name: value for name, value in metrics.items() if name not in INTERNAL}

    return train, validate


def compile_train_step(run: Run, state: TrainState, batch: PyTree) -> jax.stages.Compiled:
    """Returns the step of (state, batch, codec, is_validation), for arrays or shapes of a state and a batch."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jit_train_step(shardings, replicated(run.mesh), **run.static)
    flag = jax.ShapeDtypeStruct((), bool, sharding=replicated(run.mesh))
    return compile_step(step, state, batch, run.model.codec, flag, platform=run.mesh.devices.flat[0].platform)
