"""Work on a thread of its own, while the program goes on."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from utils.base.bars import hide_bars

T = TypeVar("T")


def in_background(function: Callable[[], T]) -> Callable[[], T]:
    """Starts function() on a thread, without progress bars, and returns what waits for its result; what it raises is
    raised there."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="background", initializer=hide_bars)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future.result
