"""The processes of one command: which is the first, what it decides for all, and that all of them are still there.

Training has its own way to end together (`processes.StopRequest`). The other programs save as they go: they end as soon
as one of their processes has gone, and the same commands continue.
"""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # its store of keys and values, which all processes reach

from utils.base.bars import close_bars

PAUSE = 1  # seconds between two signs of life
PATIENCE = 30  # seconds without one, after which a process counts as gone
LONGEST_WAIT = 7 * 24 * 3600 * 1000  # milliseconds; whoever is waited for is watched meanwhile
LOST = "lost"  # the key of the line that all processes are to end with
_calls = itertools.count()  # of `broadcast` and `barrier`: every process makes the same ones, in the same order


def _store() -> Any:
    return distributed.global_state.client


def is_first() -> bool:
    """Returns whether this process is the one that speaks and writes what there is once."""
    return jax.process_index() == 0


def broadcast(value: Any) -> Any:
    """Returns the first process's `value`, anything that JSON holds, on every process; all have to call it."""
    if jax.process_count() == 1:
        return value
    key = f"value/{next(_calls)}"
    if is_first():
        _store().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_store().blocking_key_value_get(key, LONGEST_WAIT))


def barrier() -> None:
    """Returns once every process has come here; all have to call it."""
    if jax.process_count() > 1:
        _store().wait_at_barrier(f"barrier/{next(_calls)}", LONGEST_WAIT)


def share_files(folder: Path, names: Sequence[str]) -> set[str]:
    """Returns those of the files `names` that this process is to write: the missing ones, dealt out in turn. All
    processes have to call it, and none returns before the first has come here."""
    # One process looks: the others may be shown an older state of a folder on a network.
    missing = broadcast([number for number, name in enumerate(names) if not (folder / name).exists()])
    return {names[number] for number in missing[jax.process_index() :: jax.process_count()]}


class Watch:
    """A thread that ends this process with one line once another process of the command has gone.

    Without it, a process would wait for the others in a collective for as long as its hardware likes, or go on working
    for a command that cannot be finished. Process 0 watches all of them; the others hear of it by LOST.
    """

    def __init__(self):
        self.number = jax.process_index()
        self.others = [number for number in range(jax.process_count()) if number != self.number]
        self.ended = threading.Event()
        self.signs: dict[int, tuple[str, float]] = {}  # {process: its last sign, and when that came}
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread. Before, all processes have to be done: see `barrier`."""
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        for count in itertools.count():
            try:
                _store().key_value_set(f"alive/{self.number}", str(count), allow_overwrite=True)
                lost = self.find_lost()
            except jax.errors.JaxRuntimeError as error:  # process 0 keeps the store
                lost = f"process 0 has gone ({str(error).partition(chr(10))[0][:100]})"
            if self.ended.is_set():
                return
            if lost:
                end(lost)
            self.ended.wait(PAUSE)

    def find_lost(self) -> str | None:
        """Returns in words which process has gone, if one has."""
        reported = dict(_store().key_value_dir_get(LOST))
        if reported:
            return next(iter(reported.values()))
        if self.number > 0:
            return None
        now = time.monotonic()
        signs = dict(_store().key_value_dir_get("alive"))
        for other in self.others:
            sign = signs.get(f"alive/{other}", "")
            if other not in self.signs or self.signs[other][0] != sign:
                self.signs[other] = (sign, now)
            elif now - self.signs[other][1] > PATIENCE:
                return f"process {other} has gone"
        return None


_watch: Watch | None = None
_last_word = threading.Lock()  # never given back


def start_watch() -> None:
    """Watches the other processes of the command from now on, if there are any."""
    global _watch
    if jax.process_count() > 1:
        _watch = Watch()
        _watch.start()


def finish_together() -> None:
    """Returns once all processes of the command have finished their work."""
    if _watch is not None:
        barrier()
        _watch.stop()


def take_last_word() -> None:
    """Returns to the first thread that is about to end this process with a line; others wait here for that end."""
    if _watch is not None:
        _last_word.acquire()


def end(reason: str) -> None:
    """Ends this process with one line, and lets the others do so: `reason` says which process has gone."""
    take_last_word()
    close_bars()
    print(
        f"error: {reason}, and process {jax.process_index()} of {jax.process_count()} cannot finish without it; "
        "give the commands of all again, and they continue",
        file=sys.stderr,
        flush=True,
    )
    tell_others(reason)
    os._exit(1)


def tell_others(reason: str | None = None) -> None:
    """Lets the other processes end with a line about `reason`, by default this one's end, which is to follow."""
    if _watch is None:
        return
    _watch.ended.set()
    try:
        _store().key_value_set(f"{LOST}/{_watch.number}", reason or f"process {_watch.number} has ended")
    except jax.errors.JaxRuntimeError:
        return  # nobody is there to be told
    # The store goes with process 0, and JAX ends whoever misses it with lines of its own.
    if is_first():
        time.sleep(3 * PAUSE)
