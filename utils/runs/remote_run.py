"""A run in object storage: a local folder under the cache that is brought up to date first, and uploaded as it grows.

Below the URL lie the files of the run's folder, and of each checkpoint, last of all, an object
checkpoints/STEP/commit_success.txt, as Orbax itself names it there: without it, a checkpoint is not whole. A checkpoint
is removed in the opposite order. `storage.json` identifies the run, so that a local copy is never taken for another
one's. Of a folder that was copied there by hand, which has no such object, every checkpoint counts.
"""

import contextlib
import functools
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from utils.base.background import in_background
from utils.base.bars import Bar
from utils.base.files import locked, read_bytes, temporary_path
from utils.base.hosts import broadcast, is_first
from utils.base.messages import UserError, log
from utils.runs.names import CHECKPOINTS, DAMAGED, SNAPSHOTS
from utils.storage import remote
from utils.storage.lease import NAME as LEASE
from utils.storage.lease import Lease
from utils.storage.remote import RemoteError, RemoteFile
from utils.storage.staging import StagedFolder, in_parallel, not_uploaded

MARKER = "commit_success.txt"
IDENTITY = "storage.json"
METRICS = "metrics.jsonl"
# What a program needs of a run beside a checkpoint.
RUN_FILES = (
    "config.json", METRICS, "fid.json", "examples.tsv.gz", "conditions.npz", "coupling.npz", "wandb_id.txt",
)  # fmt: skip
STEP = re.compile(rf"{CHECKPOINTS}/(\d+)/(.+)")


def is_run_file(name: str) -> bool:
    """Returns whether a file of a run's folder is uploaded by itself, rather than with a checkpoint."""
    return name.partition("/")[0] not in (CHECKPOINTS, DAMAGED, LEASE, IDENTITY)


def split_run_url(url: str) -> tuple[str, int | None]:
    """Returns (URL of the run, step or None) for RUN, RUN/checkpoints and RUN/checkpoints/STEP."""
    match = re.fullmatch(rf"(.+?)(?:/{CHECKPOINTS}(?:/(\d+))?)?/*", url)
    assert match is not None
    return match[1], int(match[2]) if match[2] else None


@functools.cache
def find_remote_run(url: str) -> "RemoteRun":
    """Returns the run at a URL, nothing of which is fetched yet."""
    return RemoteRun(split_run_url(url)[0])


class RemoteRun(StagedFolder):
    """A run at a URL, and its local folder."""

    def __init__(self, url: str):
        super().__init__(url, remote.cache_path(url, "runs"))
        self.listing: dict[str, RemoteFile] = {}  # {name: object}, as `pull_run` has found them
        self.lease: Lease | None = None
        self.keep: Callable[[Iterable[int]], set[int]] = set  # which of these steps the run keeps
        self._finish: Callable[[], None] | None = None  # waits for the upload in the background

    @property
    def steps(self) -> set[int]:
        """The steps of checkpoints that are whole in storage."""
        found = [match for name in list(self.listing) if (match := STEP.fullmatch(name))]  # a thread may add some
        return {int(match[1]) for match in found if match[2] == MARKER or IDENTITY not in self.listing}

    def local_steps(self) -> set[int]:
        """Returns the steps of checkpoints that are whole in the local folder."""
        return {int(path.name) for path in (self.folder / CHECKPOINTS).glob("*") if path.name.isdigit()}

    # --- From storage ---

    def pull_run(
        self, flag: str, step: int | None = None, *, needs_checkpoint: bool = True, needs_images: bool = False
    ) -> None:
        """Fetches what the local folder lacks of the run's files and, if it `needs_checkpoint`, of the newest or of
        that of `step`; if it `needs_images`, those of its evaluations. Raises RemoteError, naming --`flag`, where
        storage does not answer."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):  # of several processes on this machine, one fetches
            self.listing = {self.relative(file): file for file in remote.list_files(self.url, flag)}
            self._check_identity()
            folders = (f"{SNAPSHOTS}/", *["images/"] * needs_images)
            names = [name for name in self.listing if name in RUN_FILES or name.startswith(folders)]
            self.pull(self.listing[name] for name in names)
            self._drop_superseded()
            newest = max(self.steps, default=-1)
            if step is None and max(self.local_steps(), default=-1) > newest:
                return  # the run was killed before this was uploaded
            wanted = newest if step is None else step
            if needs_checkpoint and wanted in self.steps:
                self._fetch_step(wanted)

    def _drop_superseded(self) -> None:
        """Removes local checkpoints that are not in storage, and that the run has passed on another machine."""
        # Ahead of storage are those that follow what this machine has uploaded or fetched last.
        newest = max(self.steps, default=-1)
        is_ours = newest < 0 or self._has(newest)
        for step in self.local_steps() - self.steps:
            if step < newest or not is_ours:
                shutil.rmtree(self.folder / CHECKPOINTS / str(step))

    def _has(self, step: int) -> bool:
        """Returns whether a checkpoint in storage is one that this machine has uploaded or fetched."""
        marker = f"{CHECKPOINTS}/{step}/{MARKER}"
        version = self.listing[marker].version if marker in self.listing else ""
        return self.read_record()["files"].get(marker, [None])[-1] == version

    def fetch_step(self, step: int) -> None:
        """Fetches a checkpoint that the local folder lacks."""
        if step in self.steps:
            with locked(self.folder):
                self._fetch_step(step)

    def fetch_file(self, name: str) -> Path | None:
        """Fetches a file of the folder as it is now; returns its local path, or None where there is none."""
        if name not in self.listing:
            return None
        with locked(self.folder):
            self.pull([self.listing[name]])
        return self.folder / name

    def _fetch_step(self, step: int) -> None:
        path = self.folder / CHECKPOINTS / str(step)
        if path.is_dir() and self._has(step):
            return

        # Into place once it is complete.
        start = f"{CHECKPOINTS}/{step}/"
        files = [file for name, file in self.listing.items() if name.startswith(start)]
        log(f"fetching checkpoint {step} of {self.url}")
        temporary = temporary_path(self.folder / f"checkpoint{step}")
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(file.size for file in files)
        with remote.transfer_bar(f"fetching checkpoint {step}", size) as bar:
            places = {file.url: temporary / self.relative(file)[len(start) :] for file in files}
            list(in_parallel(lambda file: self._download(file, places[file.url], bar), files))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        marker = self.listing.get(start + MARKER)
        self.write_record({start + MARKER: [marker.version if marker else ""]})

    def _download(self, file: RemoteFile, path: Path, bar: Bar) -> None:
        remote.download(file.url, path, bar=bar)
        if path.stat().st_size != file.size:
            raise RemoteError(file.url, "it came cut short; try again")

    def _check_identity(self) -> None:
        """Moves a local folder aside that is of another run, which was at this URL before."""
        ours = self.read_record().get("id")
        theirs = None
        if IDENTITY in self.listing:
            url = self.listing[IDENTITY].url
            try:
                theirs = json.loads(remote.read_bytes(url))["id"]
            except (ValueError, KeyError, TypeError):
                raise RemoteError(url, "it is not what was written; restore it from a copy") from None
        if ours == theirs:
            return
        if ours is not None:
            log(f"{self.url} is not the run of which this machine has a copy: that is in {self.move_away()} now")
        self.write_record({}, id=theirs)

    # --- A training ---

    @contextlib.contextmanager
    def in_use(self, flag: str) -> Iterator[None]:
        """Has the block train in the local folder: it is brought up to date first, and process 0 uploads it, what is
        left when the block ends. Raises UserError where another process holds the run, and where that upload fails."""
        try:
            if is_first():
                self.begin(flag)
            self.check_shared(flag)
            if not is_first():
                self.pull_run(flag)
            yield
            self.finish()
        finally:
            try:
                self.wait()
            finally:
                if self.lease is not None:
                    self.lease.release()

    def begin(self, flag: str) -> None:
        """Takes the lease on the run, and brings the local folder up to date. Raises UserError where another process
        holds it."""
        self.lease = Lease(self.url)
        self.lease.acquire(flag)
        self.pull_run(flag)  # again: another machine may have gone on meanwhile

        # A new run, or a folder that was copied by hand, of which all checkpoints become whole ones.
        if IDENTITY not in self.listing:
            for step in self.steps:
                self._mark(step)
            identity = {"id": uuid.uuid4().hex}
            remote.write_bytes(remote.join(self.url, IDENTITY), json.dumps(identity).encode(), flag)
            self.write_record({}, **identity)
            self.listing = {self.relative(file): file for file in remote.list_files(self.url, flag)}

    def check_shared(self, flag: str) -> None:
        """Raises UserError where the processes of a run do not share the local folder; all have to call it."""
        if jax.process_count() == 1:
            return
        file = self.folder / ".shared"
        nonce = broadcast(uuid.uuid4().hex)
        if is_first():
            file.write_text(nonce, encoding="utf-8")
        broadcast(None)
        is_shared = file.is_file() and read_bytes(file) == nonce.encode()
        if not np.all(multihost_utils.process_allgather(np.bool_(is_shared))):
            raise UserError(
                f"--{flag}={self.url}: the hosts of a run write it to their cache first, {self.folder.parents[2]}, "
                "which they do not share; set XDG_CACHE_HOME to a folder that they do, or save there"
            )

    def check(self) -> None:
        """Raises UserError once another process has taken the run over."""
        if self.lease is not None and self.lease.problem:
            raise UserError(f"{self.lease.problem}; this process stops, and uploads nothing more")

    def push_soon(self) -> None:
        """Starts to upload in the background. Process 0 does for all."""
        if is_first():
            self.wait()
            self._finish = in_background(self.push_run)

    def wait(self) -> None:
        """Returns when the upload in the background has ended. One that failed is reported: the next tries again."""
        finish, self._finish = self._finish, None
        try:
            if finish is not None:
                finish()
        except (RemoteError, OSError) as error:
            log(f"{error}; the run goes on, and the next save uploads what is missing")

    def push_run(self) -> None:
        """Uploads what storage lacks, checkpoints last, and removes checkpoints there that the run does not keep."""
        self.check()
        # In this order: whoever continues from a checkpoint finds what was logged up to there.
        local = self.local_steps()
        with locked(self.folder):  # against programs on this machine that bring the folder up to date
            self.push(self.changed(is_run_file))
        for step in sorted(self.keep(local | self.steps) & local - self.steps):
            self._push_step(step)
        self._clean()

    def _push_step(self, step: int) -> None:
        """Uploads a checkpoint, its marker last."""
        start = f"{CHECKPOINTS}/{step}/"
        marker = start + MARKER
        files = [path for path in (self.folder / CHECKPOINTS / str(step)).rglob("*") if path.is_file()]
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}
        sizes.pop(marker, None)

        def find_sizes() -> dict[str, int]:
            return {self.relative(file): file.size for file in remote.list_files(remote.join(self.url, start))}

        # What an earlier attempt has left there stays where it is the same, and goes where it is nothing of this one.
        found = find_sizes()
        self.drop(found.keys() - sizes.keys())
        changed = set(self.changed(lambda name: name.startswith(start)))
        missing = [name for name in sizes if name in changed or found.get(name) != sizes[name]]
        self.push(missing, has_versions=False)
        # The marker, if all is there as it is here.
        if sizes and find_sizes() == sizes:
            self.check()
            with locked(self.folder):
                self._mark(step)

    def _mark(self, step: int) -> None:
        name = f"{CHECKPOINTS}/{step}/{MARKER}"
        url = remote.join(self.url, name)
        remote.write_bytes(url, f"Checkpoint commit was successful to {url.rpartition('/')[0]}".encode())
        marker = remote.find_file(url)
        assert marker is not None
        self.listing[name] = marker
        self.write_record({name: [marker.version]})

    def unmark(self, step: int) -> None:
        """Has a damaged checkpoint count as one that is not whole."""
        name = f"{CHECKPOINTS}/{step}/{MARKER}"
        self.drop([name])
        self.listing.pop(name, None)

    def _clean(self) -> None:
        # Checkpoints that the run does not keep, and remains of uploads that were killed.
        newest = max(self.steps, default=-1)
        kept = self.keep(self.steps)
        files = [self.relative(file) for file in remote.list_files(remote.join(self.url, CHECKPOINTS))]
        found = [match for name in files if (match := STEP.fullmatch(name))]
        gone = [match for match in found if int(match[1]) < newest and int(match[1]) not in kept]
        for is_marker in (True, False):  # markers first
            names = [match[0] for match in gone if (match[2] == MARKER) == is_marker]
            self.drop(names)
            for name in names:
                self.listing.pop(name, None)

        # Snapshots that the run has dropped.
        known = [name for name in self.read_record()["files"] if name.startswith(f"{SNAPSHOTS}/")]
        self.drop(name for name in known if not (self.folder / name).exists())

    def finish(self) -> None:
        """Uploads what is left. Raises UserError, which says where the local copy is, where that fails."""
        if not is_first():
            return
        self.wait()
        try:
            self.push_run()
        except RemoteError as error:
            raise not_uploaded(self.url, self.folder, error, "the same command uploads it") from error
