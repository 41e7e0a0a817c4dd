"""Estimates of what a training will take, before it starts: memory by part, the batches that fit, time."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jaxtyping import PyTree

from utils.base.memory import GIB, device_memory, format_bytes
from utils.base.sharding import shape_structs
from utils.base.throughput import PEAK_TFLOPS, format_duration
from utils.training.state import TrainState

DEVICE_GIB = (12, 16, 24, 80)
DEVICE_KINDS = ("NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "TPU v5 lite")
MFU = 0.4  # model FLOPs utilisation that the times of other devices assume


class MemoryModel:
    """Bytes a device needs as a function of the global batch: a constant and a part for each image, of two batches that
    were compiled."""

    def __init__(self, measured: Mapping[int, int]):
        (small, low), (large, high) = sorted(measured.items())
        self.per_image = max(1.0, (high - low) / (large - small))  # of tiny networks, alignment may hide it
        self.constant = low - small * self.per_image

    def bytes_of(self, batch_size: int) -> int:
        return round(self.constant + batch_size * self.per_image)

    def largest_batch(self, num_bytes: float, multiple: int) -> int:
        """The largest batch, a multiple of so many images, that fits; 0 where none does."""
        return max(0, int((num_bytes - self.constant) / self.per_image) // multiple * multiple)


def batch_structs(batch: PyTree, batch_size: int) -> PyTree:
    """The shapes of a batch (of arrays) of another size, placed as it is."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), batch)
    return shape_structs(shapes, jax.tree.leaves(batch)[0].sharding)


def bytes_on_device(structs: PyTree) -> int:
    """Of a tree of shapes with shardings, on the fullest device."""

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
    """Yields lines to print. `state` has shapes with shardings; `measure` compiles the training step of a batch size,
    and returns the bytes it needs on a device; `time_step` returns the seconds of a step of `batch_size`. Batches are
    multiples of `multiple`."""
    num_devices = len(devices)
    small = max(multiple, batch_size // 2 // multiple * multiple)
    other = small if small < batch_size else 2 * batch_size
    memory = MemoryModel({size: measure(size) for size in (other, batch_size)})
    needed = memory.bytes_of(batch_size)

    parts = {
        "parameters": bytes_on_device(state.params),
        "EMA": bytes_on_device(state.ema_params),
        "optimizer": bytes_on_device(state.opt_state),
    }
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
