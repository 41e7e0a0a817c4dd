"""Local copies of what lies at URLs: inputs are fetched, folders are brought up to date and uploaded again.

Programs read and write local files alone. A URL has a folder of its own under the cache, and `.storage.json` in it says
which of its files are those of the objects. Messages show the URL instead of the local path.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax

from utils.base.files import count_bytes, locked, read_bytes, write_json
from utils.base.hosts import barrier
from utils.base.messages import UserError, log, show_path_as
from utils.storage import remote
from utils.storage.remote import RemoteError, RemoteFile
from utils.storage.urls import is_url

RECORD = ".storage.json"
NUM_THREADS = 8  # transfers at a time
RECORD_EVERY = 100  # transfers after which the record is written

T = TypeVar("T")


def local_copy(path: str | os.PathLike, flag: str) -> Path:
    """Returns the path of an input, of which a URL is fetched. Raises RemoteError, naming --`flag`, where it cannot
    be."""
    if not is_url(path):
        return Path(path)
    copy = remote.fetch(os.fspath(path), flag)
    show_path_as(copy, os.fspath(path))
    return copy


class StagedFolder:
    """A local folder and the objects below a URL, of which it holds some."""

    def __init__(self, url: str, folder: Path):
        self.url = url.rstrip("/")
        self.folder = folder
        show_path_as(folder, self.url)

    # --- What is the same on both sides ---

    def read_record(self) -> dict[str, Any]:
        """Returns {"files": {name: [size, time, version]}, ...}: local files as they were when they were those of
        objects of these versions."""
        try:
            content = json.loads(read_bytes(self.folder / RECORD))
            return content if isinstance(content.get("files"), dict) else {"files": {}}
        except (OSError, ValueError, AttributeError):
            return {"files": {}}

    def write_record(self, files: Mapping[str, list | None], **others: Any) -> None:
        """Adds entries to the record, and takes out those that are None."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / RECORD):
            record = {**self.read_record(), **others}
            entries = {**record["files"], **files}
            record["files"] = {name: entry for name, entry in entries.items() if entry is not None}
            write_json(self.folder / RECORD, record)

    def relative(self, file: RemoteFile) -> str:
        """Returns the name of an object below the URL."""
        return file.url.removeprefix(f"{self.url}/")

    # --- From the objects to the folder ---

    def pull(self, files: Iterable[RemoteFile]) -> None:
        """Fetches those of the objects that are not what the folder has; a local file that has changed since it was
        uploaded stays where the object has not."""
        # An object is known by its version, not by its time, which uploads change.
        known = self.read_record()["files"]
        missing = []
        for file in files:
            name = self.relative(file)
            if not ((self.folder / name).exists() and known.get(name, [None])[-1] == file.version):
                missing.append(file)

        def pull_one(file: RemoteFile) -> tuple[str, list]:
            name = self.relative(file)
            remote.download(file.url, self.folder / name, bar=bar)
            return name, [*_stat(self.folder / name), file.version]

        with remote.transfer_bar(f"fetching {self.url}", sum(file.size for file in missing)) as bar:
            self._transfer(pull_one, missing)

    def _transfer(self, act: Callable[[T], tuple[str, list | None]], items: Iterable[T]) -> None:
        """Calls act(item) -> (name, entry of the record) on several threads, and records what has succeeded."""
        entries: dict[str, list | None] = {}
        try:
            for name, entry in in_parallel(act, items):
                entries[name] = entry
                if len(entries) == RECORD_EVERY:
                    self.write_record(entries)
                    entries = {}
        finally:
            if entries:
                self.write_record(entries)

    # --- From the folder to the objects ---

    def changed(self, is_wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
        """Returns the names of the local files that are not those of objects, in order; hidden and temporary ones are
        left out."""
        # What programs hide or are still writing is nobody else's.
        known = self.read_record()["files"]
        names = []
        for folder, subfolders, files in os.walk(self.folder):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and ".orbax-" not in name)
            for file in sorted(files):
                path = Path(folder, file)
                name = path.relative_to(self.folder).as_posix()
                if file.startswith(".") or not is_wanted(name) or not path.is_file():
                    continue
                if known.get(name, [None])[:-1] != _stat(path):
                    names.append(name)
        return names

    def push(self, names: Iterable[str], *, has_versions: bool = True) -> None:
        """Uploads local files; one that has gone meanwhile is left out.

        Without `has_versions`, a request less for each, `pull` would fetch them again.
        """

        def push_one(name: str) -> tuple[str, list | None]:
            path = self.folder / name
            url = remote.join(self.url, name)
            try:
                before = _stat(path)  # a file that changes meanwhile is uploaded again the next time
                remote.upload(path, url, bar=bar)
            except FileNotFoundError:
                return name, None
            file = remote.find_file(url) if has_versions else None
            return name, [*before, file.version if file else ""]

        # Their bytes, as far as they are known: a log grows.
        names = list(names)
        size = sum(count_bytes(self.folder / name) for name in names)
        with remote.transfer_bar(f"uploading to {self.url}", size) as bar:
            self._transfer(push_one, names)

    def drop(self, names: Iterable[str]) -> None:
        """Removes objects, and forgets them."""

        def drop_one(name: str) -> tuple[str, None]:
            remote.remove(remote.join(self.url, name))
            return name, None

        self._transfer(drop_one, names)

    def move_away(self) -> Path:
        """Moves the folder to a free name beside it, and returns that."""
        number = 1
        while (target := self.folder.with_name(f"{self.folder.name}.old{number}")).exists():
            number += 1
        self.folder.rename(target)
        return target


def in_parallel(act: Callable[[T], Any], items: Iterable[T]) -> Iterator[Any]:
    """Yields act(item) of each item, in order; after the first that fails, no other begins."""
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="storage")
    try:
        yield from pool.map(act, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


# --- Outputs of programs ---

_outputs: dict[str, tuple[StagedFolder, Path | None]] = {}  # {URL: (its folder, what is to go once it is uploaded)}


def stage_output(url: str, flag: str) -> Path:
    """Returns the local path at which a program writes the file or folder of --`flag`, a URL; `upload_outputs` uploads
    it. The results of an evaluation there, to which it adds, are fetched.

    Raises RemoteError where nothing can be written there.
    """
    # The place, before any work: a bucket itself has no name to write to.
    parent, _, name = url.rstrip("/").rpartition("/")
    if parent.endswith(":/"):
        raise UserError(f"--{flag}={url}: name an object or a folder in the bucket, such as {url.rstrip('/')}/results")
    remote.check_writable(url, flag)

    # A local folder of its own, called by the URL in all messages.
    folder = remote.cache_path(url, "outputs")
    folder.mkdir(parents=True, exist_ok=True)
    staged = StagedFolder(parent, folder)
    show_path_as(folder / name, url.rstrip("/"))
    results = remote.find_file(remote.join(url, "fid.json"), flag)
    staged.pull([results] if results else [])
    _outputs[url] = staged, folder
    return folder / name


def upload_with_outputs(staged: StagedFolder) -> None:
    """Has `upload_outputs` upload what changes in a folder, too, which then stays."""
    _outputs.setdefault(staged.url, (staged, None))


def upload_outputs(is_wanted: Callable[[str], bool]) -> None:
    """Uploads all outputs of a program; `is_wanted` says which files of a folder that stays are among them.

    Raises UserError where that fails: it says where the local copy is. Several processes do so in turn, as those of one
    machine share the local copy; all have to call it.
    """
    for url, (staged, folder) in list(_outputs.items()):
        for number in range(jax.process_count()):
            if number == jax.process_index():
                _upload_output(url, staged, folder, is_wanted)
            barrier()
        del _outputs[url]
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _upload_output(url: str, staged: StagedFolder, folder: Path | None, is_wanted: Callable[[str], bool]) -> None:
    names = staged.changed() if folder else staged.changed(is_wanted)
    try:
        staged.push(names)
    except RemoteError as error:
        raise not_uploaded(url, folder or staged.folder, error, "copy it there") from error
    if names:
        log(f"uploaded {len(names)} file{'s' * (len(names) != 1)} to {url}")


def not_uploaded(url: str, folder: Path, error: RemoteError, fix: str) -> UserError:
    """Returns the error of an upload that failed after the work was done, with the place of the local copy."""
    show_path_as(folder, None)
    return UserError(
        f"{url} could not be written ({error.reason}); the local copy is whole and lies in {folder}; {fix}"
    )
