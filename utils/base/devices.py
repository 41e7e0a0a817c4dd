"""The devices: JAX's settings, the cache of what is compiled for them, and the memory that there is and is needed."""

import contextlib
import ctypes
import hashlib
import importlib.util
import math
import os
import platform
import re
import resource
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from utils.base.files import cache_folder
from utils.base.messages import UserError

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
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, malloc.h


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


# --- What is compiled is kept for later starts ---

CACHE_BYTES = 2 * GIB  # of a machine's folder; what was not used for longest goes first


def start_devices() -> None:
    """Finds the devices as a program starts, and caches on disk what is compiled for them.

    A folder that the environment names for the cache is kept. Raises UserError as `find_devices`.
    """
    devices = find_devices()
    # An entry that is damaged, or that cannot be written, costs its compilation alone.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    if devices[0].platform != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        return

    # On a CPU, a start compiles hundreds of small functions, too. A home that unlike machines share must not hand one
    # of them the instructions of another.
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / f"compiled-{machine_key(describe_cpu())}"))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def describe_cpu() -> str:
    """Returns everything that the system says of the kind of its CPU: its model, and the instructions that it has."""
    parts = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # there is no such file elsewhere than on Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        kinds = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
        parts += sorted({line for line in lines if line.partition(":")[0].strip() in kinds})
    return "\n".join(parts)


def machine_key(cpu: str) -> str:
    """Returns a short name for a kind of CPU and the compiler: programs compiled under one name may be exchanged."""
    versions = [jax.__version__, jax.lib.__version__]
    return hashlib.sha256("\n".join([cpu, *versions]).encode()).hexdigest()[:16]


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
    if not is_cpu:
        return
    # No pieces by mmap, nothing trimmed: what is freed is used again.
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)
    # All of that holds for the arena of the main thread, which therefore computes. Another way would be one arena for
    # all threads, but those that compile would then wait for each other.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


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


def peak_memory() -> int:
    """Returns the most bytes that one device of this process has held; on CPUs, those of the process itself."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024  # of the system's figure
    return max(peaks) or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_machine() -> dict[str, Any]:
    """Returns what a run records of the machine on which it starts: no names, and nothing that is a secret."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        names = [line for line in describe_cpu().splitlines() if line.startswith("model name")]
        kind = names[0].partition(":")[2].strip() if names else "CPU"
    return {
        "devices": len(devices),
        "kind": kind,
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "memory": host_memory(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


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
