"""Requests that wait for one another: one is computed at a time, on a thread of its own, and few may wait."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from typing import Any

HEARTBEAT = 0.5  # seconds between two reports on a job at most: a client that has left is noticed


class QueueFullError(Exception):
    """As many requests wait as may."""


class JobCancelledError(Exception):
    """Nobody waits for the job any more."""


class ServerEndsError(Exception):
    """The server ends before the job has."""


class Job:
    """A request in the queue: what it has reported, and whether anybody still waits for it.

    The thread that computes it calls `report`; all else happens on the event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._is_cancelled = threading.Event()
        self.changed = asyncio.Event()
        self.future: Future[Any] | None = None
        self.progress: dict[str, Any] = {"state": "working", "doing": "compiling", "done": 0, "total": 0}
        self._first: tuple[float, int] | None = None  # when the first steps were done, compiled by then, and how many

    def report(self, doing: str, done: int, total: int) -> None:
        """Says how far the job is. Raises JobCancelledError where nobody waits for it."""
        if self._is_cancelled.is_set():
            raise JobCancelledError
        # What was compiled for the first steps does not count for those that are left.
        seconds_left = None
        if self._first is None:
            self._first = (monotonic(), done) if done else None
        elif done > self._first[1]:
            start, before = self._first
            seconds_left = round((total - done) * (monotonic() - start) / (done - before), 1)
        self.progress = {"state": "working", "doing": doing, "done": done, "total": total, "seconds_left": seconds_left}
        self.wake()

    def wake(self) -> None:
        """Lets the event loop look at the job again, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.changed.set)

    def cancel(self) -> None:
        """Ends the job at its next report, or before it begins."""
        self._is_cancelled.set()
        if self.future is not None:
            self.future.cancel()


class JobQueue:
    """Computes jobs one after another in the order in which they came; `limit` of them may wait."""

    def __init__(self, limit: int):
        self.limit = limit
        self.should_end: Callable[[], bool] = lambda: False  # whether the server is about to end
        self.jobs: list[Job] = []  # the first is computed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="drawing")

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Puts work(job) at the end of the queue. Raises QueueFullError."""
        if len(self.jobs) > self.limit:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        job = Job(loop)
        self.jobs.append(job)
        job.future = self._pool.submit(work, job)

        # A job that was cancelled keeps its place until the thread has really left it.
        def leave(_: Future) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._remove, job)

        job.future.add_done_callback(leave)
        return job

    def _remove(self, job: Job) -> None:
        self.jobs.remove(job)
        for other in [job, *self.jobs]:
            other.changed.set()

    async def follow(self, job: Job) -> AsyncGenerator[dict[str, Any], None]:
        """Yields how far a job is, and at last {"state": "finished", "result": ...}. Whoever stops reading cancels it.

        Raises what the work has raised.
        """
        assert job.future is not None
        try:
            # Also where nothing has changed: only what is written tells that a client has left.
            while not job.future.done():
                if self.should_end():
                    raise ServerEndsError
                place = self.jobs.index(job) if job in self.jobs else 0
                yield {"state": "waiting", "place": place} if place else job.progress
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(job.changed.wait(), HEARTBEAT)
                job.changed.clear()
            if job.future.cancelled():  # the server ends
                raise JobCancelledError
            yield {"state": "finished", "result": job.future.result()}
        finally:
            job.cancel()

    def close(self) -> None:
        """Cancels all jobs: the server ends."""
        for job in self.jobs:
            job.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
