"""The device mesh, where each array lives on it, and the way of batches from host to devices.

Two axes over the devices of all processes: replicas, and the shards of each. Batches are split over both. Parameters,
their EMA and the optimizer state are replicated, or split over the shards, or part of them over all devices (see
`state_sharding`); XLA inserts the collectives (arXiv:2105.04663).
"""

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from utils.base.environment import find_devices
from utils.base.errors import DataError, UserError
from utils.base.files import cache_folder

SHARDING_MODES = ("dp", "fsdp", "hybrid", "zero")
REPLICA, SHARD = "replica", "shard"  # the axes of the mesh
MAX_SHARDS = 16  # beyond, XLA no longer gathers parameters where they are used (docs/speed.md)


def make_mesh(num_shards: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes (or of `devices`), replicas of `num_shards` neighbours each. A batch is
    split over both axes. What is compiled for real devices is cached on disk."""
    if devices is None:
        devices = find_devices()
        # Not by default on CPUs, where a home shared by unlike machines would hand one the instructions of another.
        if jax.config.values["jax_compilation_cache_dir"] is None and devices[0].platform != "cpu":
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    return Mesh(np.array(devices).reshape(-1, num_shards), (REPLICA, SHARD))


def choose_num_shards(mode: str, requested: int | None, devices: Sequence[Any]) -> int:
    """The devices that share one copy of the state: all for 'fsdp'; for 'hybrid' as many as requested, or the most up
    to MAX_SHARDS that divide the devices of a slice (of a host, on GPUs). UserError where they do not divide all."""
    total = len(devices)
    if mode != "hybrid":
        return total if mode == "fsdp" else 1
    if requested is None:
        # TPUs without a slice_index are all of one slice.
        groups = collections.Counter(
            getattr(device, "slice_index", 0 if device.platform == "tpu" else device.process_index)
            for device in devices
        )
        near = min(groups.values())
        return max(count for count in range(1, min(near, MAX_SHARDS) + 1) if near % count == 0 == total % count)
    if total % requested:
        raise UserError(f"--num_shards={requested} does not divide the {total} devices; use a divisor of {total}")
    return requested


def compile_step(function: jax.stages.Wrapped, *arguments: Any, platform: str) -> jax.stages.Compiled:
    """A jitted function compiled for arguments of these shapes and shardings."""
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
    """A sharding for each leaf of a train state (arrays or shapes).

    'dp' replicates it. 'fsdp' and 'hybrid' split every leaf over the shards of a replica (arXiv:2304.11277); 'zero'
    keeps the parameters whole, and splits the rest of the state over all devices (ZeRO, arXiv:1910.02054, stage 1). A
    leaf is split along its longest axis that divides, and stays whole where there is none.
    """
    whole = replicated(mesh)
    axes = mesh.axis_names if mode == "zero" else (SHARD,)
    count = math.prod(mesh.shape[axis] for axis in axes)

    def split(leaf):
        divisible = [i for i, size in enumerate(leaf.shape) if size % count == 0]
        if mode == "dp" or not divisible:
            return whole
        longest = max(divisible, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, axes))

    shardings = jax.tree.map(split, state)
    return shardings.replace(params=jax.tree.map(lambda _: whole, state.params)) if mode == "zero" else shardings


def unsplit_fraction(tree: PyTree, shardings: PyTree) -> float:
    """The fraction of a tree's elements that every device holds whole."""
    leaves = list(zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True))
    whole = sum(leaf.size for leaf, sharding in leaves if sharding.is_fully_replicated)
    return whole / max(1, sum(leaf.size for leaf, _ in leaves))


def shape_structs(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes and types of a tree (of arrays or shapes), to be placed as `shardings` (a tree, or one for all) says."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Returns global arrays split over all devices, from each process's own rows (numpy, first axis = batch)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The global array whose value, the same on every process, is `value`, placed as the sharding says."""
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def shard_replicated(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns the global array of `rows`, which every process has, split over all devices."""
    return place(rows, batch_sharding(mesh))


def gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of a global array as numpy, on every process."""
    return multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else np.asarray(x)


def prefetch(batches: Any, mesh: Mesh, buffer_size: int = 2) -> Iterator[tuple[PyTree, Any]]:
    """(batch on the devices, position of `batches` just after it), with `buffer_size` batches more on their way.

    `batches` has `get_state()`; pairing each batch with its position keeps a checkpoint exact although the iterator
    itself is already further on. Where the next batch cannot be read, the ones before it are yielded first; then
    DataError.
    """
    queue, failure = collections.deque(), None
    while True:
        while len(queue) <= buffer_size and failure is None:
            try:
                batch = next_batch(batches)
            except DataError as error:
                failure = error
            else:
                queue.append((shard_batch(batch, mesh), batches.get_state()))
        if not queue:
            assert failure is not None
            raise failure
        yield queue.popleft()


def next_batch(batches: Any) -> PyTree:
    """The next batch; DataError, in one line, for whatever keeps its source from reading it."""
    try:
        return next(batches)
    except UserError as error:
        raise DataError(str(error)) from error
    except Exception as error:  # of any source's library
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the data cannot be read: {type(error).__name__}: {reason}") from error
