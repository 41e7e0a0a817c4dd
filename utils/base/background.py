"""Work on a thread of its own, while the program goes on."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_background(function: Callable[[], T]) -> Callable[[], T]:
    """Starts function() on a thread, and returns what waits for its result; what it raises is raised there."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="background")
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future.result
