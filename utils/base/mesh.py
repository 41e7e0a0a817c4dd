"""The mesh of devices, and where each array lives on it.

The mesh has two axes over the devices of all processes: replicas, and the shards of each. Batches are split over both.
Parameters, their EMA and the optimizer state are replicated, or split over the shards, or part of them over all devices
(see `state_sharding`); XLA inserts the collectives (arXiv:2105.04663).
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from utils.base.devices import find_devices
from utils.base.messages import UserError

# Values of --sharding, see `state_sharding`.
SHARDING_MODES = ("dp", "fsdp", "hybrid", "zero")


REPLICA, SHARD = "replica", "shard"  # the axes of the mesh
MAX_SHARDS = 16  # beyond, XLA no longer gathers parameters where they are used (docs/speed_estimated.md)


def make_mesh(num_shards: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh (replicas, shards) of all devices of all processes, or of `devices`.

    A replica is `num_shards` neighbours. A batch is split over both axes.
    """
    if devices is None:
        devices = find_devices()
    return Mesh(np.array(devices).reshape(-1, num_shards), (REPLICA, SHARD))


def local_mesh() -> Mesh:
    """Returns a mesh of this process's own devices: what is computed there waits for no other process."""
    return make_mesh(devices=jax.local_devices())


def choose_num_shards(mode: str, requested: int | None, devices: Sequence[Any]) -> int:
    """Returns how many devices share one copy of the state.

    All for 'fsdp'; for 'hybrid' the `requested` number, or the largest up to MAX_SHARDS that divides the devices of a
    slice (of a host, on GPUs); else one. Raises UserError if `requested` does not divide all devices.
    """
    total = len(devices)
    if mode != "hybrid":
        return total if mode == "fsdp" else 1
    if requested is None:
        # Sums over neighbours go over their fast links. TPUs without a slice_index are all in one slice.
        groups = collections.Counter(
            getattr(device, "slice_index", 0 if device.platform == "tpu" else device.process_index)
            for device in devices
        )
        near = min(groups.values())
        # A divisor of both, so that no replica reaches over two groups.
        return max(count for count in range(1, min(near, MAX_SHARDS) + 1) if near % count == 0 == total % count)
    if total % requested:
        raise UserError(f"--num_shards={requested} does not divide the {total} devices; use a divisor of {total}")
    return requested


def compile_step(function: jax.stages.Wrapped, *arguments: Any, platform: str) -> jax.stages.Compiled:
    """Compiles a jitted function for arguments of these shapes and shardings."""
    # XLA's default order on CPUs starts all that can start. On few cores that gains no time, and it brings forward what
    # rematerialisation puts off to save memory.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    lowered = function.lower(*arguments)
    return lowered.compile(compiler_options=options if platform == "cpu" else {})


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def state_sharding(state: Any, mesh: Mesh, mode: str) -> Any:
    """Returns a sharding for each leaf of a train state (arrays or shapes).

    'dp' replicates all. 'fsdp' and 'hybrid' split every leaf over the shards of a replica (arXiv:2304.11277). 'zero'
    replicates the parameters, and splits the rest over all devices (ZeRO, arXiv:1910.02054, stage 1). A leaf is split
    along its longest axis that divides; if none does, it is replicated.
    """
    unsplit = replicated(mesh)
    axes = mesh.axis_names if mode == "zero" else (SHARD,)
    count = math.prod(mesh.shape[axis] for axis in axes)

    def split(leaf):
        divisible = [i for i, size in enumerate(leaf.shape) if size % count == 0]
        if mode == "dp" or not divisible:
            return unsplit
        # The longest axis keeps the pieces large; PartitionSpec leaves the axes after it whole.
        longest = max(divisible, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, axes))

    # Only the forward pass needs whole parameters: under ZeRO they alone stay replicated.
    shardings = jax.tree.map(split, state)
    return shardings.replace(params=jax.tree.map(lambda _: unsplit, state.params)) if mode == "zero" else shardings


def unsplit_fraction(tree: PyTree, shardings: PyTree) -> float:
    """Returns the fraction, from 0 to 1, of the elements of a tree that every device holds."""
    leaves = list(zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True))
    unsplit = sum(leaf.size for leaf, sharding in leaves if sharding.is_fully_replicated)
    return unsplit / max(1, sum(leaf.size for leaf, _ in leaves))


def shape_structs(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns the shapes and types of a tree (of arrays or shapes), with `shardings` (a tree, or one for all)."""
    # One sharding stands for all leaves.
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Returns global arrays split over all devices, from each process's own rows (numpy, first axis = batch)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def place(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """Returns the global array of `value`, which is the same on every process, placed as the sharding says."""
    # Each process slices only the parts of its own devices.
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def shard_replicated(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns the global array of `rows`, which every process has, split over all devices."""
    return place(rows, batch_sharding(mesh))


def gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns all of a global array as numpy, on every process; all processes have to call it.

    Of an array that lies on this process's devices alone, or whole on all of them, nothing is moved.
    """
    is_here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x) if is_here else multihost_utils.process_allgather(x, tiled=True)


def sum_over_processes(x: np.ndarray) -> np.ndarray:
    """Returns the sum of an array that every process has its own of; all processes have to call it."""
    return multihost_utils.process_allgather(x).sum(axis=0, dtype=x.dtype) if jax.process_count() > 1 else x


def check_batch_size(batch_size: int, num_devices: int, grad_accum: int = 1, period: int = 1) -> None:
    """Raises UserError if a global batch cannot be split evenly over the devices of all processes, in each of
    `grad_accum` microbatches, `period` rows at a time."""
    # Each device takes the same number of rows in each microbatch, whole periods of them.
    divisor = num_devices * grad_accum * period
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size}: use {divisor} or a multiple of it")
    if batch_size % divisor:
        microbatches = f" in --grad_accum={grad_accum} microbatches" if grad_accum > 1 else ""
        if period > 1:
            microbatches += f" by the {period} rows of which the objective treats one apart"
        raise UserError(
            f"--batch_size={batch_size} does not divide over {num_devices} device{'s' * (num_devices > 1)}"
            f"{microbatches}; "
            f"use a multiple of {divisor}"
        )
