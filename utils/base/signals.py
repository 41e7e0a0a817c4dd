"""Signals that ask a program to end: training saves first, the other programs remove their temporary files."""

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STOPPED = 75  # by a signal, and saved: EX_TEMPFAIL of sysexits.h, "try again"
# A closed terminal, a scheduler's notice (SLURM's --signal=USR1@90), `ulimit -t`, kill.
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# A shell without job control starts `command &` with these two ignored, whatever the program is; they are taken anyway,
# as nobody sends one to a program that is meant to go on.
KEYBOARD_SIGNALS = (signal.SIGINT, signal.SIGQUIT)


class Interrupted(Exception):
    """Raised by a signal where StopRequest allows it."""


class Terminated(BaseException):
    """Raised by a signal in a program that has nothing to save, so that its `finally` clauses run."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number


def raise_on_signals() -> None:
    """Makes END_SIGNALS raise Terminated, as Ctrl-C raises KeyboardInterrupt; a second one ends the program at once."""

    def end(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise Terminated(signal.Signals(number))

    handle_signals(END_SIGNALS, end)


def handle_signals(numbers: tuple[signal.Signals, ...], handler: Any) -> None:
    """Calls `handler` on each signal that is not ignored: nohup and `trap '' HUP` keep their meaning."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave_time_to_save() -> None:
    """Has SIGXCPU come before the kill of `ulimit -t`, which sets both limits of CPU time to one value: the kernel then
    kills without any signal. A tenth of the limit is kept for saving, at most a minute of all cores."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY:
        latest = hard - min(max(1, hard // 10), 60 * (os.cpu_count() or 1))
        if soft == resource.RLIM_INFINITY or soft > latest:
            resource.setrlimit(resource.RLIMIT_CPU, (latest, hard))


class StopRequest:
    """Whether a signal asked for an end; a second Ctrl-C interrupts at once.

    To be made before the processes of a run join: JAX then takes SIGTERM over, and tells all of them of one that
    reaches any. The other signals, which often reach a single process, are passed on to it.
    """

    def __init__(self):
        self.signal, self.is_interruptible, self.is_shared = None, False, False
        self.num_asked, self.is_agreed = 0, False
        handle_signals(END_SIGNALS, self._note)
        for number in KEYBOARD_SIGNALS:
            signal.signal(number, self._note)
        leave_time_to_save()

    def _note(self, number, frame):
        is_first, self.signal = self.signal is None, signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if is_first and self.is_shared:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.is_interruptible:
            self.is_interruptible = False  # SIGXCPU comes once a second
            raise Interrupted

    def share(self) -> None:
        """Begins to pass signals on to the other processes, once they have joined; one that came before, too."""
        self.is_shared = jax.process_count() > 1
        if not self.is_shared:
            signal.signal(signal.SIGTERM, self._note)  # which JAX has taken, if this one process has joined itself
        elif self.signal is not None:
            os.kill(os.getpid(), signal.SIGTERM)

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
