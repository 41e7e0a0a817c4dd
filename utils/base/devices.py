"""The devices: JAX's settings, the memory that there is and that is needed, and the mesh on which arrays live.

The mesh has two axes over the devices of all processes: replicas, and the shards of each. Batches are split over both.
Parameters, their EMA and the optimizer state are replicated, or split over the shards, or part of them over all devices
(see `state_sharding`); XLA inserts the collectives (arXiv:2105.04663).
"""

import collections
import contextlib
import ctypes
import importlib.util
import math
import os
import platform
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from utils.base.errors import DataError, UserError
from utils.base.files import cache_folder

# Settings that change shapes, types or random numbers, with JAX's defaults, which runs that recorded none had.
RECORDED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_default_matmul_precision": None,
}
RANDOM = tuple(name for name in RECORDED if name != "jax_default_matmul_precision")  # of the draws
# Nothing here runs under these: arrays of two types or ranks are added everywhere, and steps are compiled in advance.
UNSUPPORTED = {
    "jax_numpy_dtype_promotion": ("strict",),
    "jax_numpy_rank_promotion": ("raise",),
    "jax_disable_jit": (True,),
}
GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of mallopt, malloc.h
# Values of --sharding, see `state_sharding`.
SHARDING_MODES = ("dp", "fsdp", "hybrid", "zero")
REPLICA, SHARD = "replica", "shard"  # the axes of the mesh
MAX_SHARDS = 16  # beyond, XLA no longer gathers parameters where they are used (docs/speed_estimated.md)


# --- settings ---


def _value(name: str) -> Any:
    """Returns a setting of JAX as a value of JSON."""
    value = jax.config.values.get(name, RECORDED.get(name))  # another JAX may lack one
    value = getattr(value, "value", value)  # an enumeration's
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def jax_settings() -> dict[str, Any]:
    """Returns the settings to record with a run."""
    return {name: _value(name) for name in RECORDED}


def changed_variables(names: Collection[str] = RECORDED) -> list[str]:
    """Lists those of `names` that differ from JAX's defaults, as variables: ["JAX_RANDOM_SEED_OFFSET=3"]."""
    return [f"{name.upper()}={_show(_value(name))}" for name in names if _value(name) != RECORDED[name]]


def compare_jax_settings(found: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Lists the differences between the settings of two runs, as environment variables.

    A setting that was not recorded had JAX's default.
    """
    pairs = {name: (saved.get(name, default), found.get(name, default)) for name, default in RECORDED.items()}
    return [
        f"{name.upper()}={_show(new)}, was {_show(old)}: the numbers are others from here on"
        for name, (old, new) in pairs.items()
        if old != new
    ]


def _show(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def check_jax_settings() -> None:
    """Raises UserError for a setting of JAX under which the programs cannot run."""
    for name, values in UNSUPPORTED.items():
        if _value(name) in values:
            raise UserError(f"{name.upper()}={_show(_value(name))}: the programs do not run so; unset it")


def find_devices() -> list[jax.Device]:
    """Returns all devices of all processes. Raises UserError, naming JAX_PLATFORMS, if that asks for a missing one."""
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:
        # JAX's reason, without its advice, which is for other programs.
        first_line = str(error).partition("\n")[0]
        reason = re.sub(r" \((set JAX_PLATFORMS|you may need).*", "", first_line)[:200]
        reason = f" ({reason})" if reason else ""
        # The older of the two variables counts if the newer one is not set.
        name = "jax_platform_name" if first_line.startswith("Unknown backend") else "jax_platforms"
        if platform := _value(name):
            raise UserError(
                f"{name.upper()}={platform}: there is no such device here{reason}; unset it, or set JAX_PLATFORMS=cpu"
            ) from None
        raise UserError(f"JAX finds no device{reason}; JAX_PLATFORMS=cpu computes on the CPU") from None


def start_devices() -> None:
    """Finds the devices as a program starts, and caches on disk what is compiled for accelerators.

    A folder that the environment names for the cache is kept. Raises UserError as `find_devices`.
    """
    devices = find_devices()
    # Not by default on CPUs, where a home shared by unlike machines would hand one the instructions of another.
    if jax.config.values["jax_compilation_cache_dir"] is None and devices[0].platform != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


# --- memory ---


def format_bytes(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that a compiled function needs on each device, with arguments, by the compiler's analysis."""
    sizes: Any = compiled.memory_analysis()
    # Donated arguments share their memory with outputs: these bytes are in both sizes.
    arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return arguments + sizes.temp_size_in_bytes


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, if only CPUs compute; call it before JAX looks for devices.

    XLA's CPU allocates what a step needs anew for every step. glibc would return so large a piece to the system each
    time, and the system would clear its pages again: a fifth of a training step.
    """
    # Without JAX_PLATFORMS, JAX takes an accelerator if there is a plugin for one.
    platforms = jax.config.values["jax_platforms"]
    has_plugins = importlib.util.find_spec("jax_plugins") or importlib.util.find_spec("libtpu")
    is_cpu = platforms == "cpu" if platforms else not has_plugins
    # One arena, no pieces by mmap, nothing trimmed: what is freed is used again.
    if is_cpu and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


def free_memory() -> int | None:
    """Returns the free bytes of the fullest device, the same on every process; None if devices report none (CPUs)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats):  # every process sees the same kind of device
        return None
    # The least over devices, then over processes: a decision by it has to be the same on all.
    free = min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return int(np.min(multihost_utils.process_allgather(np.int64(free))))


def host_memory() -> int:
    """Returns the bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory() -> int:
    """Returns the bytes of each device of this process; CPU devices share the machine's."""
    # CPU devices report nothing: each counts as an equal part of the machine.
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    return min(limits) or host_memory() // len(limits)


def total_memory() -> int:
    """Returns the bytes of this machine's memory, or of all devices if they have more."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(host_memory(), sum(stat.get("bytes_limit", 0) for stat in stats) * jax.process_count())


@contextlib.contextmanager
def explaining_out_of_memory(what: str, fixes: str, needed: int | None = None) -> Iterator[None]:
    """Turns JAX's error for exhausted memory into a UserError.

    It says that `what` needs `needed` bytes (None: unknown), how many there are, and which flags (`fixes`) to use.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise out_of_memory(what, fixes, needed) from error


def out_of_memory(what: str, fixes: str, needed: int | None) -> UserError:
    need = format_bytes(needed) if needed else "more than there is"
    return UserError(f"out of memory: {what} needs {need}, a device has {format_bytes(device_memory())}; use {fixes}")


def check_batch_memory(batch_size: int, image_shape: tuple[int, ...], copies: int = 6) -> None:
    """Raises UserError if the machine cannot hold `copies` batches of 8-bit images (h, w, c).

    `copies` allows for the batch in work, those prefetched and what is computed from them.
    """
    # A byte per value; each process holds only its own part of the global batch.
    needed = copies * batch_size * math.prod(image_shape) // jax.process_count()
    limit = total_memory()
    if needed > limit:
        raise UserError(
            f"--batch_size={batch_size} of {'x'.join(map(str, image_shape))} images needs {needed / 2**30:,.0f} GiB, "
            f"but there are {limit / 2**30:,.0f}; use a smaller one"
        )


# --- the mesh and its arrays ---


def make_mesh(num_shards: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh (replicas, shards) of all devices of all processes, or of `devices`.

    A replica is `num_shards` neighbours. A batch is split over both axes.
    """
    if devices is None:
        devices = find_devices()
    return Mesh(np.array(devices).reshape(-1, num_shards), (REPLICA, SHARD))


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


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns the global array of `value`, which is the same on every process, placed as the sharding says."""
    # Each process slices only the parts of its own devices.
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def shard_replicated(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns the global array of `rows`, which every process has, split over all devices."""
    return place(rows, batch_sharding(mesh))


def gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns all of a global array as numpy, on every process; all processes have to call it."""
    return multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else np.asarray(x)


def prefetch(batches: Any, mesh: Mesh, buffer_size: int = 2) -> Iterator[tuple[PyTree, Any]]:
    """Yields (batch on the devices, position of `batches` just after it), with `buffer_size` more on their way.

    `batches` has `get_state()`. Pairing each batch with its position keeps a checkpoint exact although the iterator is
    already further on. If a batch cannot be read, those before it are yielded first; then DataError is raised.
    """
    queue = collections.deque()
    failure = None
    while True:
        # Fill the queue first: the devices work on one batch while the next are copied.
        while len(queue) <= buffer_size and failure is None:
            try:
                batch = next_batch(batches)
            except DataError as error:
                failure = error
            else:
                queue.append((shard_batch(batch, mesh), batches.get_state()))
        # The error waits until every batch that could be read has been used.
        if not queue:
            assert failure is not None
            raise failure
        yield queue.popleft()


def next_batch(batches: Any) -> PyTree:
    """Returns the next batch. Raises DataError, in one line, for whatever keeps its source from reading it."""
    try:
        return next(batches)
    except UserError as error:
        raise DataError(str(error)) from error
    except Exception as error:  # each source's library has its own
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the data cannot be read: {type(error).__name__}: {reason}") from error


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
