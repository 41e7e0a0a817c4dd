"""What a run shows of its steps."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from tqdm import tqdm

from utils.base.console import TolerantStream
from utils.base.throughput import Throughput
from utils.runs.trackers import Tracker


class Progress:
    """A progress bar, and metrics at the steps that are logged.

    A step is reported once the next one is dispatched, so that its numbers are read without leaving the devices idle
    (and, as that waits for it, no more than two are ever in flight). `flush` reports what is left.
    """

    def __init__(
        self,
        throughput: Throughput,
        tracker: Tracker,
        count_skipped: Callable,
        check: Callable,
        step: int,
        max_steps: int,
    ):
        """`count_skipped(metrics, step)` is called for every step, and returns the metrics as they are logged;
        `check(metrics, step)` before they are."""
        self.throughput = throughput
        self.tracker = tracker
        self.count_skipped = count_skipped
        self.check = check
        self.pending = None
        self.bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file wants a line now and then
            disable=jax.process_index() > 0,
            file=TolerantStream(),
        )

    def add(self, step: int, metrics: dict[str, Any], validation: dict[str, Any] | None) -> None:
        """Reports the step before; then step `step` is the one to be reported, and logged if it has `validation`."""
        self.flush()
        self.pending = (step, metrics, validation)

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, metrics, validation), self.pending = self.pending, None
        loss = float(metrics["l2_loss"])
        self.throughput.finish_step()
        self.bar.set_postfix_str(f"loss {loss:.4f}, {self.throughput}", refresh=False)
        self.bar.update()
        logged = self.count_skipped(metrics, step)
        if validation is not None:
            self.check(metrics, step)
            groups = {"training": logged | self.throughput.read_window(), "validation": validation}
            named = {f"{group}/{name}": x for group, values in groups.items() for name, x in values.items()}
            self.tracker.log(named, step)
            self.throughput.pause()

    @contextlib.contextmanager
    def pausing(self, what: str) -> Iterator[None]:
        """Between two training steps: neither the rates nor the bar's estimate count the time of the block."""
        started = time.monotonic()
        self.bar.set_description_str(what, refresh=sys.stderr.isatty())
        yield
        self.bar.set_description_str("", refresh=False)
        self.throughput.pause()
        if not self.bar.disable:
            seconds = time.monotonic() - started
            self.bar.start_t += seconds
            self.bar.last_print_t += seconds

    def is_idle(self) -> bool:
        """Whether the devices have finished all that was dispatched."""
        return self.pending is None or self.pending[1]["l2_loss"].is_ready()
