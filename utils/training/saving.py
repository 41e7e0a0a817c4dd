"""Saving of a training: when a checkpoint is due, and what happens where it cannot be written."""

import contextlib
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from utils.base.messages import log
from utils.runs.checkpoint import Checkpoints, SaveError


class Saver:
    """Saves a run every `interval` steps, and when `minutes` have passed since the last save (0: never).

    A save that fails, for example because the disk is full, is reported in one line and tried again a minute later; the
    run goes on.
    """

    RETRY_SECONDS = 60.0

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: dict[str, Any],
        interval: int,
        minutes: float,
        step: int,
        before: Callable[[], None] = lambda: None,
    ):
        """Calls `before()` before each save: what it waits for is on disk when the checkpoint is."""
        self.checkpoints = checkpoints
        self.config = config
        self.before = before
        self.interval = interval
        self.seconds = minutes * 60 or math.inf
        self._wait(step, self.seconds)

    def is_due(self, step: int, is_wanted: bool = False) -> bool:
        """Returns whether to save after this step, in any case if `is_wanted`; all processes of the run agree."""
        try:
            self.checkpoints.poll()
        except SaveError as error:
            self._note(error, step)
        return is_wanted or step % self.interval == 0 or self._is_time(step)

    def save(self, state: PyTree, position: Any) -> None:
        """Starts to save, and returns when the state may be donated to the next step."""
        step = int(state.step)
        self._wait(step, self.seconds)
        self.before()
        # Waiting may raise the failure of the save before this one, which is no reason to leave this one out.
        for act in (self.checkpoints.wait, partial(self.checkpoints.save, state, self.config, position)):
            try:
                act()
            except SaveError as error:
                self._note(error, step)

    def save_last(self, state: PyTree, position: Any) -> None:
        """Saves, and returns when everything is on disk. Raises SaveError where it cannot be written."""
        self.before()
        with contextlib.suppress(SaveError):  # of an earlier step, which this one replaces
            self.checkpoints.wait()
        try:
            self.checkpoints.save(state, self.config, position)
            self.checkpoints.wait()
        except SaveError as error:
            raise SaveError(f"{error}: make room, and the same command continues from there") from None

    def _note(self, error: SaveError, step: int) -> None:
        # Several processes would have to agree to go on, and the others may know nothing of the failure.
        if jax.process_count() > 1:
            raise error
        log(f"{error}; training goes on and saves again in a minute")
        self._wait(step, self.RETRY_SECONDS)

    def _wait(self, step: int, seconds: float) -> None:
        self.started = time.monotonic()
        self.first = step
        self.next_look = step + 1
        self.pause = seconds

    def _is_time(self, step: int) -> bool:
        elapsed = time.monotonic() - self.started
        if jax.process_count() > 1 and self.pause < math.inf:
            # The clock of the first process counts. It tells the others at steps on which all agree: halfway to where
            # it will be time, by the pace so far.
            if step < self.next_look:
                return False
            elapsed = float(multihost_utils.broadcast_one_to_all(np.float32(elapsed)))
            steps_left = (step - self.first) * (self.pause / elapsed - 1)
            self.next_look = step + max(1, int(steps_left / 2))
        return elapsed >= self.pause
