"""Memory that the process keeps for its next step."""

import platform

import pytest

from tests.conftest import run_program

FAULTS = """
import resource
import numpy as np
from utils.base.devices import keep_freed_memory
if {is_kept}:
    keep_freed_memory()
for number in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(10**8, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
DISPATCH = """
import jax
from utils.base.devices import keep_freed_memory
keep_freed_memory()
print(jax.config.values["jax_cpu_enable_async_dispatch"])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of its own")
def test_freed_memory_is_used_again():
    faults = {is_kept: int(run_program("-c", FAULTS.format(is_kept=is_kept)).stdout) for is_kept in (False, True)}
    assert faults[True] < 100 < faults[False]  # of some 24,000 pages, or fewer large ones


def test_the_main_thread_computes_as_its_arena_keeps_memory():
    assert run_program("-c", DISPATCH).stdout.split() == ["False"]
