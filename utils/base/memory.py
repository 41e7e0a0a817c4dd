"""How much memory a compiled function needs, how much there is, and what to do where it is not enough."""

import contextlib
import ctypes
import importlib.util
import os
import platform
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from utils.base.errors import UserError

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of mallopt, malloc.h


def format_bytes(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled function needs on each device, arguments included, by the compiler's own analysis."""
    sizes: Any = compiled.memory_analysis()
    arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return arguments + sizes.temp_size_in_bytes


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where CPUs alone compute; before JAX looks for devices.

    XLA's CPU allocates what a step needs anew for every step. glibc would return so large a piece to the system each
    time, and the system would clear its pages again: a fifth of a training step.
    """
    platforms = jax.config.values["jax_platforms"]
    has_plugins = importlib.util.find_spec("jax_plugins") or importlib.util.find_spec("libtpu")
    is_cpu = platforms == "cpu" if platforms else not has_plugins
    if is_cpu and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


def free_memory() -> int | None:
    """Bytes free on the fullest of the devices, the same on every process; None where devices do not report it, as
    CPUs."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats):
        return None
    free = min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return int(np.min(multihost_utils.process_allgather(np.int64(free))))


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory() -> int:
    """Bytes that there are for each device of this process; CPU devices share the machine's."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    return min(limits) or host_memory() // len(limits)


def total_memory() -> int:
    """Bytes of this machine's memory, or of all devices if those have more."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(host_memory(), sum(stat.get("bytes_limit", 0) for stat in stats) * jax.process_count())


@contextlib.contextmanager
def explaining_out_of_memory(what: str, fixes: str, needed: int | None = None) -> Iterator[None]:
    """Turns JAX's own error where memory runs out into a UserError: what `what` needs, by the compiler's analysis,
    beside what there is, and the flags `fixes` to use."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise out_of_memory(what, fixes, needed) from error


def out_of_memory(what: str, fixes: str, needed: int | None) -> UserError:
    need = format_bytes(needed) if needed else "more than there is"
    return UserError(f"out of memory: {what} needs {need}, a device has {format_bytes(device_memory())}; use {fixes}")
