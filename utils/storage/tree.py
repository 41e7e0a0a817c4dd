"""Files in folders, wherever they lie: on a disk, in an archive. Whoever reads images and tables reads them from a
`Tree`, and need not know which.

A path is a text relative to the root of its tree, names joined by '/'; '' is the root. Bytes of a name that are no
UTF-8 are surrogates, as `os.fsdecode` has them.
"""

import abc
import errno
import os
import posixpath
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.base.external import BadFileError, read_bounded, read_start
from utils.base.files import read_bytes

MAX_READERS = 32  # threads that read images; beyond these a decoder, or storage, gains nothing


class Tree(abc.ABC):
    """Files that are only read. Methods raise OSError for what cannot be read; several threads may call them."""

    source: str  # as --dataset_name gives it: folder:PATH, zip:FILE
    root: str  # where the tree lies, in messages
    title: str  # of the whole: the name of an only class
    key: str  # the same for the same files, wherever a program is started: of what is remembered about them
    default_columns: str | None = None  # --condition_columns of what lies beside the images, if nothing else is asked
    is_archive: bool = False  # whether its folders were packed into files
    is_remote: bool = False  # whether its files are waited for rather than read: they lie in object storage
    has_columns: bool = False  # whether it keeps columns of values beside its images: `read_columns`

    @abc.abstractmethod
    def scan(self, folder: str = "") -> Iterable[tuple[str, bool]]:
        """Returns (name, whether it is a folder) of what lies in a folder, in any order."""

    @abc.abstractmethod
    def is_file(self, path: str) -> bool: ...

    @abc.abstractmethod
    def read(self, path: str, limit: int | None = None) -> bytes:
        """Returns the bytes of a file, or the first `limit` of them."""

    @abc.abstractmethod
    def stamp(self, path: str) -> str | None:
        """Returns a text that changes whenever a file's content does; None where there is no file."""

    def read_columns(self, paths: Sequence[str]) -> tuple[dict[str, list[Any]], dict[str, tuple[str, ...]]]:
        """Returns ({column: its values for these images}, {column of labels: names of its classes})."""
        raise NotImplementedError

    def read_bounded(self, path: str, max_bytes: int) -> bytes:
        """Returns the bytes of a file. Raises BadFileError if there are more than `max_bytes`, or none can be read."""
        try:
            content = self.read(path, max_bytes + 1)
        except OSError as error:
            raise BadFileError(error.strerror or str(error)) from None
        if len(content) > max_bytes:
            raise BadFileError(f"it has more than {max_bytes:,} bytes")
        return content

    def local_path(self, path: str) -> Path | None:
        """Returns where a file lies on this machine; None if it is no file of its own there."""
        return None

    def identity(self, folder: str) -> Hashable:
        """Returns what is the same for two paths of one folder, as links make them."""
        return folder

    def show(self, path: str) -> str:
        """Returns a path as messages name it."""
        return f"{self.root}/{path}" if path else self.root


class LocalTree(Tree):
    """A folder on this machine; links are followed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.source = f"folder:{folder}"
        self.root = str(folder)
        self.title = folder.resolve().name
        self.key = str(folder.absolute())

    def scan(self, folder: str = "") -> list[tuple[str, bool]]:
        with os.scandir(self._full(folder)) as entries:
            return [(entry.name, entry.is_dir()) for entry in entries]

    def is_file(self, path: str) -> bool:
        return os.path.isfile(self._full(path))

    def read(self, path: str, limit: int | None = None) -> bytes:
        if limit is None:
            return read_bytes(Path(self._full(path)))
        try:
            return read_start(Path(self._full(path)), limit)
        except BadFileError as error:
            raise OSError(str(error)) from None

    def stamp(self, path: str) -> str | None:
        try:
            stat = os.stat(self._full(path))
        except OSError:
            return None
        return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"

    def read_bounded(self, path: str, max_bytes: int) -> bytes:
        return read_bounded(Path(self._full(path)), max_bytes)  # which does not read what is too large

    def local_path(self, path: str) -> Path:
        return Path(self._full(path))

    def identity(self, folder: str) -> Hashable:
        stat = os.stat(self._full(folder))
        return stat.st_dev, stat.st_ino

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root  # a Path for each of a million files would take seconds


class ListedTree(Tree):
    """Files whose paths are all known, sorted."""

    paths: Sequence[str]

    def scan(self, folder: str = "") -> Iterator[tuple[str, bool]]:
        start = f"{folder}/" if folder else ""
        row = bisect_left(self.paths, start)
        while row < len(self.paths) and self.paths[row].startswith(start):
            name, slash, _ = self.paths[row][len(start) :].partition("/")
            yield name, bool(slash)
            # The files of a folder stand together, before whatever follows its '/'.
            row = bisect_left(self.paths, f"{start}{name}{chr(ord('/') + 1)}", row) if slash else row + 1

    def is_file(self, path: str) -> bool:
        return self.find(path) is not None

    def find(self, path: str) -> int | None:
        """Returns the number of a file; None where there is none."""
        row = bisect_left(self.paths, path)
        return row if row < len(self.paths) and self.paths[row] == path else None

    def find_file(self, path: str) -> int:
        """Returns the number of a file. Raises FileNotFoundError where there is none."""
        row = self.find(path)
        if row is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return row


def count_readers(is_remote: bool) -> int:
    """Returns how many threads read images: one for each core, which decodes them, or as many as storage serves."""
    return MAX_READERS if is_remote else min(MAX_READERS, os.cpu_count() or 1)


def relative(path: str, folder: str) -> str:
    """Returns the path of a file below `folder`, relative to it."""
    return path[len(folder) + 1 :] if folder else path


def folders_of(folder: str) -> list[str]:
    """Returns a folder and those above it, up to the root."""
    return [folder, *folders_of(posixpath.dirname(folder))] if folder else [""]


def stem(path: str) -> str:
    """Returns a path without its suffix, by which captions belong to images."""
    return posixpath.splitext(path)[0]
