"""Ctrl-C and SIGTERM as a request to stop, on which all processes of a run agree."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """What a signal raises where it may."""


class StopRequest:
    """Whether Ctrl-C or SIGTERM asked for an end; a second Ctrl-C interrupts at once.

    To be made before the processes of a run join: JAX then takes SIGTERM over, and tells all of them of one that
    reaches any. Ctrl-C, which often reaches a single process, is passed on to it.
    """

    def __init__(self):
        self.signal, self.is_interruptible = None, False
        self.num_asked, self.is_agreed = 0, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT and jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
        if self.is_interruptible:
            raise Interrupted

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Lets a signal raise Interrupted in the block. Not in a run of several processes, which have to agree."""
        self.is_interruptible = jax.process_count() == 1
        if self.is_interruptible and self.signal is not None:
            raise Interrupted
        try:
            yield
        finally:
            self.is_interruptible = False

    def is_due(self) -> bool:
        """The answer on which all processes of the run agree; each has to ask as often as the others."""
        if jax.process_count() == 1:
            return self.signal is not None
        self.num_asked += 1
        self.is_agreed = self.is_agreed or multihost_utils.reached_preemption_sync_point(self.num_asked)
        return self.is_agreed
