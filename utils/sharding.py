"""The device mesh, where each array lives on it, and the way of batches from host to devices.

One axis, `data`, over every device of every process. Batches are sharded over it. Parameters, their EMA and the
optimizer state are replicated (`dp`) or sharded as well (`fsdp`); XLA inserts the collectives (arXiv:2105.04663).
"""

import collections
import socket
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from utils.data.dataset import Batches
from utils.errors import DataError, UserError
from utils.files import cache_folder


def initialize_processes(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run, before any device is touched; does nothing for a run of one process."""
    flag = f"--coordinator_address={coordinator_address}"
    if coordinator_address is None:
        if num_processes is not None or process_id is not None:
            raise UserError("--num_processes and --process_id need --coordinator_address host:port")
        return
    if coordinator_address == "auto":
        arguments = ()
    else:
        if num_processes is None or process_id is None:
            raise UserError(f"{flag} needs --num_processes and --process_id")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id={process_id} is not one of the numbers 0 to --num_processes={num_processes} - 1"
            )
        host, _, port = coordinator_address.rpartition(":")
        try:
            if not 1 <= int(port) < 2**16:
                raise ValueError(port)
            socket.getaddrinfo(host.strip("[]"), int(port))
        except (ValueError, OSError):
            raise UserError(f"{flag} is no host:port that can be found; give that of process 0") from None
        arguments = (coordinator_address, num_processes, process_id)
    try:
        jax.distributed.initialize(*arguments)
    except Exception as error:  # JAX's, its cluster detection's and its RPC library's
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{flag}: the processes of the run could not find each other ({reason})") from error


def make_mesh() -> Mesh:
    """A mesh with one axis, `data`, over all devices of all processes. What is compiled for it is cached on disk."""
    devices = jax.devices()
    # Not by default on CPUs, where a home shared by unlike machines would hand one the instructions of another.
    if jax.config.values["jax_compilation_cache_dir"] is None and devices[0].platform != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    return Mesh(np.array(devices), ("data",))


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
    return NamedSharding(mesh, PartitionSpec("data"))


def state_sharding(state: PyTree, mesh: Mesh, mode: str) -> PyTree:
    """A sharding for each leaf of a train state (arrays or shapes): all replicated for `mode` 'dp'; for 'fsdp' each
    leaf is split along its longest axis that the device count divides, and replicated where there is none."""

    def split(leaf):
        axes = [i for i, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if mode == "dp" or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(split, state)


def shape_structs(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes and types of a tree (of arrays or shapes), to be placed as `shardings` (a tree, or one for all) says."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Global arrays split over `data`, from each process's own rows (numpy, first axis = batch)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The global array whose value, the same on every process, is `value`, placed as the sharding says."""
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def shard_replicated(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """The global array whose value, the same on every process, is `rows`, split over `data`."""
    return place(rows, batch_sharding(mesh))


def gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of a global array as numpy, on every process."""
    return multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else np.asarray(x)


def prefetch(batches: Batches, mesh: Mesh, buffer_size: int = 2) -> Iterator[tuple[PyTree, Any]]:
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


def next_batch(batches: Batches) -> PyTree:
    """The next batch; DataError, in one line, for whatever keeps its source from reading it."""
    try:
        return next(batches)
    except UserError as error:
        raise DataError(str(error)) from error
    except Exception as error:  # of any source's library
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the data cannot be read: {type(error).__name__}: {reason}") from error
