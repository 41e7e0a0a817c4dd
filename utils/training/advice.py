"""Advice around a training: its memory and time before it starts, hints about settings that are probably mistakes, and
the commands that come next."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from utils.base.commands import PROGRAMS, write_command
from utils.base.devices import GIB, device_memory, format_bytes
from utils.base.mesh import shape_structs
from utils.base.messages import format_duration
from utils.data.dataset import Batch, DataOptions, ImageDataset
from utils.data.loaders import find_loader
from utils.images.pixels import PixelFormat, are_pictures
from utils.images.sizes import write_size
from utils.metrics.extractors import ExtractorOptions
from utils.networks.network import NetworkConfig
from utils.networks.state import YOUNG, EmaSchedule, TrainState
from utils.objectives.objective import has_guidance
from utils.objectives.objectives import make_objective
from utils.sampling.samplers import can_guide
from utils.training.progress import PEAK_TFLOPS

# --- The plan: memory and time ---

# Devices that people have: memory sizes, and kinds whose peak is known.
DEVICE_GIB = (12, 16, 24, 80)
DEVICE_KINDS = ("NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "TPU v5 lite")
MFU = 0.4  # model FLOPs utilisation that the times of other devices assume


class MemoryModel:
    """Estimates the bytes that a device needs for a global batch: a constant, and a part for each image.

    Both follow from two batch sizes that were compiled, {batch size: bytes}.
    """

    def __init__(self, measured: Mapping[int, int]):
        (small, low), (large, high) = sorted(measured.items())
        self.per_image = max(1.0, (high - low) / (large - small))  # of tiny networks, alignment may hide it
        self.constant = low - small * self.per_image

    def bytes_of(self, batch_size: int) -> int:
        """Returns the bytes that a device needs for a batch."""
        return round(self.constant + batch_size * self.per_image)

    def largest_batch(self, num_bytes: float, multiple: int) -> int:
        """Returns the largest batch that fits into `num_bytes`, a multiple of `multiple` images; 0 if none does."""
        return max(0, int((num_bytes - self.constant) / self.per_image) // multiple * multiple)


def batch_structs(batch: Batch, batch_size: int) -> Batch:
    """Returns the shapes of a batch (of arrays) of another size, placed as that batch is."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), batch)
    return shape_structs(shapes, jax.tree.leaves(batch)[0].sharding)


def bytes_on_device(structs: PyTree) -> int:
    """Returns the bytes that a tree of shapes with shardings takes on the fullest device."""

    def size(leaf):
        shape = leaf.sharding.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(structs)))


def plan_lines(
    state: TrainState,
    measure: Callable[[int], int],
    time_step: Callable[[], float],
    *,
    batch_size: int,
    multiple: int,
    flops_per_image: float,
    num_images: int,
    num_steps: int,
    devices: Sequence[jax.Device],
) -> Iterator[str]:
    """Yields lines to print about a training's memory and time.

    `state` has shapes with shardings. `measure` compiles the training step for a batch size and returns the bytes that
    it needs on a device; `time_step` returns the seconds of one of `batch_size`. Batches are multiples of `multiple`.
    """
    num_devices = len(devices)

    # Memory by part, and the batches that fit.
    small = max(multiple, batch_size // 2 // multiple * multiple)
    other = small if small < batch_size else 2 * batch_size
    memory = MemoryModel({size: measure(size) for size in (other, batch_size)})
    needed = memory.bytes_of(batch_size)
    emas = (state.ema_params, state.ema_profiles)
    parts = {"parameters": state.params, "EMA": emas, "optimizer": state.opt_state}
    parts = {part: bytes_on_device(tree) for part, tree in parts.items()}
    parts["gradients, activations and the rest"] = needed - sum(parts.values())
    where = f"each of {num_devices} devices" if num_devices > 1 else "a device"
    yield f"memory at batch {batch_size}, on {where} of this kind: {format_bytes(needed)}"
    for part, size in parts.items():
        yield f"  {part}: {format_bytes(size)} ({size / needed:.0%})"
    yield f"  each further image takes {memory.per_image / 2**20:.2f} MiB"
    yield "largest batch that fits, with a twentieth left free:"
    for gib in DEVICE_GIB:
        largest = memory.largest_batch(0.95 * gib * GIB, multiple)
        fitting = f"{largest:,}" if largest else "none: see --remat, --grad_accum and --sharding"
        yield f"  {num_devices} x {gib} GiB: {fitting}"

    # Time: here measured, elsewhere by the peak of the devices.
    images = num_steps * batch_size
    epochs = images / num_images
    yield f"{num_steps:,} steps are {epochs:,.{0 if epochs >= 100 else 2}f} epochs of {num_images:,} images"
    kind = devices[0].device_kind
    if needed > device_memory():
        yield f"  {num_devices} x {kind}, at hand: not timed, as the step needs more memory than there is"
    else:
        yield "timing two steps ..."
        seconds = time_step()
        rate = batch_size / seconds
        yield (
            f"  {num_devices} x {kind}, at hand: {rate:,.{0 if rate >= 100 else 2}f} images/s, "
            f"{format_duration(num_steps * seconds)}, without evaluations and checkpoints"
        )
    yield f"elsewhere, at an assumed MFU of {MFU:.0%}:"
    for kind in DEVICE_KINDS:
        rate = MFU * PEAK_TFLOPS[kind] * 1e12 * num_devices / flops_per_image
        yield f"  {num_devices} x {kind}: {rate:,.0f} images/s, {format_duration(images / rate)}"


# --- Hints ---


def model_hints(
    config: NetworkConfig, latent_shape: tuple[int, int, int], dataset: ImageDataset, batch_size: int
) -> list[str]:
    """Returns hints about settings of network, batch and training split that are possible but probably mistakes."""
    # A few spare labels may be intended; twice as many are not.
    hints = []
    num_images = len(dataset.source)
    num_classes = dataset.num_classes
    if num_classes and config.num_classes > max(2 * num_classes, num_classes + 10):
        hints.append(
            f"--model.num_classes={config.num_classes}, but the data has {num_classes}: the other labels are never "
            f"trained; use --model.num_classes {num_classes}"
        )
    if batch_size > num_images:
        hints.append(f"--batch_size={batch_size} is more than the {num_images} training images: some come twice a step")
    return hints + config.hints(latent_shape)


def ema_hints(ema: EmaSchedule, first_evaluation: int | None, max_steps: int) -> list[str]:
    """Returns a hint if the EMA, from which images are drawn and FID is computed, is mostly initial parameters.

    `first_evaluation` is the step of the run's first evaluation; None: it has none.
    """
    # How much of it is, at the first evaluation if there is one.
    at_last = ema.initial_weight(max_steps)
    share = f"{at_last:.0%} is initial parameters at --max_steps"
    if first_evaluation is not None:
        first = min(first_evaluation, max_steps)
        at_first = ema.initial_weight(first)
        share = (
            f"{at_first:.0%} is initial parameters at the first evaluation (step {first:,}) and {at_last:.0%} at "
            "--max_steps"
        )
    if (at_last if first_evaluation is None else at_first) < YOUNG:
        return []

    # What helps.
    fixes = ["--ema_warmup 1 follows the parameters from the start"]
    if at_last > 0.02:
        # rate^max_steps = 1 %, solved for the rate and rounded down to four digits.
        rate = 1 - math.ceil(1e4 * (1 - 0.01 ** (1 / max_steps))) / 1e4
        fixes.insert(0, f"--model.target_update_rate {rate:g} leaves 1% at the end")
    return [f"images and FID use the EMA, of which {share}; {', or '.join(fixes)}"]


# --- Commands ---

# Samples of a FID: papers report 50,000; fewer than 1,000 say little.
MOST_SAMPLES = 50_000
FEWEST_SAMPLES = 1_000


def shipped_statistics(dataset_name: str) -> Path | None:
    """Returns the reference statistics that ship for a data set, if there are any."""
    path = PROGRAMS / "data" / f"fid_stats_{dataset_name}.npz"
    return path if path.is_file() else None


def write_statistics_command(saved: dict[str, Any], out: Path, *options: str) -> str:
    """Returns the command that makes reference statistics of the images that a run was trained on.

    `saved` is its configuration. Cached latents, and pairs of noise and sample, lead back to the images behind them.
    `options` are further words of the command.
    """
    # The record names the images; the flag may name what derives from them.
    data = saved["dataset"]
    defaults = DataOptions()
    source = find_loader(str(saved.get("dataset_name")))  # None of data registered elsewhere
    loader = find_loader(data["name"])
    words = ["--dataset_name", data["name"] if loader else "NAME"]  # to be filled in, as of a model's samples
    is_derived = source is not None and source.is_derived

    # Options under which the same images are read again.
    size = write_size(data["image_shape"][:2])
    has_default_size = loader is not None and loader.default_size is not None
    if saved.get("image_size") is not None or has_default_size or is_derived:
        words += ["--image_size", saved.get("image_size") or size]
    if saved.get("data_dir"):
        words += ["--data_dir", saved["data_dir"]]
    if loader is not None and not is_derived:
        for name in (name for name in loader.options if name not in ("image_size", "data_dir", "value_range")):
            if saved.get(name, getattr(defaults, name)) != getattr(defaults, name):
                words += [f"--{name}", saved[name]]
    return write_command("compute_fid_stats.py", *words, *options, "--out", out)


def commands_after_training(
    folder: Path, saved: dict[str, Any], num_images: int, params: str
) -> Iterator[tuple[str, str]]:
    """Yields (purpose, command) for what follows a training: samples and, of pictures, their FID against the training
    images.

    `saved` is the run's configuration; there are `num_images` to train on; `params` is as --params takes it.
    """
    # Samples.
    model = saved["model"]
    data = saved["dataset"]
    words = ["--load_dir", folder, "--denoise_timesteps", model["denoise_timesteps"]]
    if has_guidance(make_objective(saved)) and can_guide(model["class_dropout_prob"]):
        words.append(f"--cfg_scale={model['cfg_scale']:g}")  # may be negative
    if params != "ema":
        words += ["--params", params]
    yield "samples", write_command("sample.py", *words)

    # FID, of as many samples as there are images, within the usual numbers. Inception takes pictures alone.
    is_fid = are_pictures(PixelFormat.from_record(data), data["image_shape"])
    names = saved.get("metrics", ["fid"]) if saved.get("fid_stats") else ["fid" if is_fid else "moments"]
    metrics = [] if names == ["fid"] else ["--metrics", ",".join(names)]
    if saved.get("extractor"):
        metrics = ["--extractor", ",".join(saved["extractor"])]
    words += metrics
    words += ["--num_samples", min(MOST_SAMPLES, max(FEWEST_SAMPLES, num_images))]
    if saved.get("fid_stats"):
        words += ["--fid_stats", saved["fid_stats"]]
        if saved.get("convention"):
            words += ["--convention", saved["convention"]]
    elif not shipped_statistics(data["name"]):
        statistics = folder / "fid_stats.npz"
        yield f"reference of {'FID' if is_fid else 'moments'}", write_statistics_command(saved, statistics, *metrics)
        words += ["--fid_stats", statistics]
    for name in ("inception_weights", *ExtractorOptions._fields):
        if saved.get(name):
            words += [f"--{name}", saved[name]]

    # Results go where the training's went.
    trackers = saved.get("trackers", ["wandb"])  # older runs had no other
    if trackers != ["wandb"]:
        words.append(f"--trackers={','.join(trackers)}")
    if "wandb" in trackers and saved["wandb"]["mode"] != "online":
        words += ["--wandb.mode", saved["wandb"]["mode"]]
    yield "FID" if is_fid else "moments", write_command("eval_fid.py", *words)
