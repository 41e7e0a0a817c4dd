"""Files of which parts are read, on this machine or in object storage: archives and parquet."""

import abc
import fnmatch
import glob
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from utils.base.files import open_regular
from utils.base.messages import UserError
from utils.storage import remote
from utils.storage.urls import is_url

# Names of files that tell a split: train-00000-of-00002.parquet, val-000.tar.
SPLIT = re.compile(r"(?:partial-)?(train|validation|valid|val|test|dev|eval)(?=[-_.\d]|$)", re.IGNORECASE)
BLOCK = 2**22  # bytes that a library's small reads in object storage fetch at once


class PartsFile(abc.ABC):
    """A file as it was when it was opened. Several threads may read it at once."""

    is_remote = False
    name: str  # in messages
    key: str  # the same for the same file, wherever a program is started
    size: int
    stamp: str  # changes whenever the content does

    @abc.abstractmethod
    def read(self, start: int, count: int) -> bytes:
        """Returns the bytes at `start`, fewer than `count` at the end of the file."""

    @abc.abstractmethod
    def open(self) -> io.BufferedIOBase:
        """Returns the file from its beginning, for a library."""


class LocalFile(PartsFile):
    """A regular file. It stays open: another in its place is not mixed in. Raises OSError where there is none."""

    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)
        self.key = str(path.absolute())
        self._file = open_regular(path)
        stat = os.fstat(self._file.fileno())
        self.size = stat.st_size
        self.stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"

    def read(self, start: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, start)

    def open(self) -> io.BufferedReader:
        return open_regular(self.path)


class RemoteFile(PartsFile):
    """An object in storage, as it was listed."""

    is_remote = True

    def __init__(self, file: remote.RemoteFile):
        self.name = self.key = file.url
        self.size = file.size
        self.stamp = f"{file.size} {file.version}"

    def read(self, start: int, count: int) -> bytes:
        stop = min(start + count, self.size)
        return remote.read_bytes(self.name, start, stop) if start < stop else b""

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(_Stream(self), BLOCK)


class _Stream(io.RawIOBase):
    """An object as a file for libraries, which seek."""

    def __init__(self, file: RemoteFile):
        self.file = file
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.file.size}[whence]
        self.place = max(0, start + offset)
        return self.place

    def readinto(self, buffer) -> int:
        content = self.file.read(self.place, len(buffer))
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


def open_file(path: str) -> PartsFile:
    """Opens a file or an object. Raises OSError or RemoteError where there is none."""
    # What is listed has size and version; what is not there has neither.
    if not is_url(path):
        return LocalFile(Path(path))
    found = remote.find_file(path)
    if found is None:
        raise FileNotFoundError(2, "there is no such object", path)
    return RemoteFile(found)


def split_of(path: str) -> str:
    """Returns the split that the name of a file, or of its folder, tells: train-00000-of-00002.parquet; '' for none."""
    folder, _, name = path.rpartition("/")
    match = SPLIT.match(name) or SPLIT.fullmatch(folder.rpartition("/")[2])
    return match[1].lower() if match else ""


def find_files(source: str) -> Sequence[PartsFile]:
    """Opens the files that the pattern of KIND:PATTERN matches, sorted by name. Raises UserError if there are none."""
    pattern = source.partition(":")[2]
    if is_url(pattern):
        # What stands before the first sign of a pattern is listed.
        start = re.split(r"[*?\[]", pattern)[0]
        if start == pattern:
            file = remote.find_file(pattern, "dataset_name")
            listed = [file] if file else []
        else:
            listed = remote.list_files(start.rpartition("/")[0], "dataset_name")
            listed = [file for file in listed if fnmatch.fnmatchcase(file.url, pattern)]
        found: Sequence[PartsFile] = [RemoteFile(file) for file in listed]
    elif Path(pattern).is_dir():
        example = f"{source.rstrip('/')}/*.{source.partition(':')[0]}"
        raise UserError(f"--dataset_name={source}: it is a folder; give its files, '{example}'")
    elif Path(pattern).exists():
        found = [LocalFile(Path(pattern))]
    else:
        found = [LocalFile(path) for path in sorted(map(Path, glob.glob(pattern, recursive=True)))]
    if not found:
        fix = "give a file, or a pattern in quotes"
        if "{" in pattern:
            fix = f"braces are no pattern, write '{re.sub(r'{[^}]*}', '*', source)}'"
        raise UserError(f"--dataset_name={source}: there is no file {pattern}; {fix}")
    return found
