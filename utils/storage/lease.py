"""A lease on a folder of object storage, which has no locks: an object that its holder writes again and again.

It keeps a second start of a run away as long as the first is alive. Two starts within the same moment may both get it;
the one whose lease is overwritten notices within RENEWAL seconds, and stops.
"""

import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from utils.base.files import is_gone, machine_id
from utils.base.messages import UserError, log
from utils.storage import remote
from utils.storage.remote import RemoteError

NAME = "running.json"
RENEWAL = 20.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one, after which a holder counts as gone
STALE = 3600.0  # seconds after which it does at once, however the clocks of two machines differ


class Lease:
    """The lease on the objects below a URL. `problem` says who has taken it over, once somebody has."""

    def __init__(self, url: str):
        self.url = remote.join(url, NAME)
        self.id = uuid.uuid4().hex
        self.problem: str | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self, flag: str) -> None:
        """Takes the lease until `release`. Waits for up to PATIENCE seconds for a holder that may have been killed.

        Raises UserError, naming --`flag` and the holder, where that is alive.
        """
        self._wait_for_holder(flag)
        self._write(flag)
        # Somebody else may have started in the same moment: the last to write holds it.
        holder = self._read()
        if holder is None or holder.get("id") != self.id:
            raise self._in_use(flag, holder)
        self.thread.start()

    def _wait_for_holder(self, flag: str) -> None:
        first = self._read()
        if first is None or is_gone(first.get("machine"), str(first.get("pid"))):
            return
        written = first.get("time")
        if not isinstance(written, float) or time.time() - written > STALE:
            return
        # Signs of life are compared with each other, not with the clock, which other machines may have set otherwise.
        deadline = time.monotonic() + PATIENCE
        log(f"waiting for {_describe(first)}, which may be at work in {self.url.removesuffix('/' + NAME)}")
        while time.monotonic() < deadline:
            time.sleep(min(RENEWAL, PATIENCE) / 10)
            now = self._read()
            if now is None:
                return
            if now != first:
                raise self._in_use(flag, now)

    def _in_use(self, flag: str, holder: dict[str, Any] | None) -> UserError:
        return UserError(
            f"--{flag}={self.url.removesuffix('/' + NAME)} is in use by {_describe(holder or {})}; wait for it or stop "
            "it, or choose another folder"
        )

    def _read(self) -> dict[str, Any] | None:
        """Returns what the object says; None where there is none."""
        try:
            content = json.loads(remote.read_bytes(self.url))
            return content if isinstance(content, dict) else {}
        except RemoteError as error:
            if error.is_absent:
                return None
            raise
        except ValueError:
            return {}

    def _write(self, flag: str | None = None) -> None:
        own = {"id": self.id, "host": socket.gethostname(), "machine": machine_id(), "pid": os.getpid()}
        remote.write_bytes(self.url, json.dumps({**own, "time": time.time()}).encode(), flag)

    def _renew(self) -> None:
        while not self.ended.wait(RENEWAL):
            try:
                holder = self._read()
                if holder is not None and holder.get("id") != self.id:
                    self.problem = f"{self.url.removesuffix('/' + NAME)} has been taken over by {_describe(holder)}"
                    return
                self._write()
            except RemoteError:
                pass  # the network may be back the next time; others wait for PATIENCE seconds

    def release(self) -> None:
        """Gives the lease back, unless it has been taken over."""
        if not self.thread.is_alive() or self.ended.is_set():
            return
        self.ended.set()
        self.thread.join()
        try:
            if (holder := self._read()) and holder.get("id") == self.id:
                remote.remove(self.url)
        except RemoteError:
            pass  # it runs out by itself


def _describe(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder.get('host', 'another machine')}"
