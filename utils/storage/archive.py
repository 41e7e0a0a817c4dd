"""Archives as they are: files in them are read at random, and nothing is unpacked.

An archive is listed once. The list is kept in the cache folder, by the archive's path, size and times.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8, UInt32

from utils.base.external import BadFileError
from utils.base.files import atomic_write, cache_folder, open_regular
from utils.base.messages import UserError, WriteError, printable
from utils.storage.parts import PartsFile
from utils.storage.tree import ListedTree

INDEX_VERSION = 1
MAX_MEMBER_BYTES = 2**30  # of a file in an archive once it is unpacked: above any image, and any table that is read
HEADER_BYTES = 30  # of the local header of a file in a zip, before its name
EXTRA_BYTES = 64
STORED, DEFLATED = 0, 8  # methods of a zip (APPNOTE.TXT, 4.4.5)


@dataclasses.dataclass(frozen=True)
class Index:
    """The files in archives, sorted by path, with where and how each is stored."""

    paths: Sequence[str]
    files: UInt8[np.ndarray, " n"] | UInt32[np.ndarray, " n"]  # which archive
    starts: Int64[np.ndarray, " n"]  # of the bytes; in a zip, of the header before them
    stored: Int64[np.ndarray, " n"]  # how many bytes are in the archive
    sizes: Int64[np.ndarray, " n"]  # how many they become
    methods: UInt8[np.ndarray, " n"]
    crcs: UInt32[np.ndarray, " n"]  # CRC-32 of a file in a zip

    @classmethod
    def of_rows(cls, rows: list[tuple[str, int, int, int, int, int, int]], files: Sequence[PartsFile]) -> "Index":
        """Makes an index of (path, file, start, stored, size, method, crc). Raises BadFileError where two have the
        same path."""
        rows.sort()
        paths = [row[0] for row in rows]
        for row, after in itertools.pairwise(rows):
            if row[0] == after[0]:
                names = dict.fromkeys(files[number].name for number in (row[1], after[1]))
                raise BadFileError(
                    f"there are two files {printable(row[0])} in {' and '.join(names)}; pack them under different names"
                )
        arrays = np.array([row[1:] for row in rows], np.int64).reshape(-1, 6).T
        kinds = (np.uint32, np.int64, np.int64, np.int64, np.uint8, np.uint32)
        return cls(paths, *(array.astype(kind) for array, kind in zip(arrays, kinds, strict=True)))

    def save(self, file: Path) -> None:
        """Keeps the index, if the system lets it; else it is made again next time."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays["paths"] = np.frombuffer("\0".join(self.paths).encode("utf-8", "surrogateescape"), np.uint8)
        with contextlib.suppress(OSError, WriteError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file, is_synced=False) as temporary, temporary.open("wb") as opened:
                np.savez(opened, **arrays)

    @classmethod
    def load(cls, file: Path) -> "Index | None":
        """Returns an index that was kept; None if there is none, or none that is whole."""
        try:
            with open_regular(file) as opened, np.load(opened, allow_pickle=False) as content:
                arrays = dict(content)
            paths = arrays.pop("paths").tobytes().decode("utf-8", "surrogateescape").split("\0")
            if any(len(array) != len(paths) for array in arrays.values()):
                return None
            return cls(paths, **arrays)
        except Exception:  # whatever a damaged file makes of it
            return None


class ArchiveTree(ListedTree):
    """The files of one archive, or of several that belong together."""

    is_archive = True

    def __init__(
        self, source: str, files: Sequence[PartsFile], kind: str, make_index: Callable[[Sequence[PartsFile]], Index]
    ):
        self.source = source
        self.root = source.partition(":")[2]
        self.title = Path(self.root).name.partition(".")[0]
        self.files = files
        self.kind = kind
        self.is_remote = any(file.is_remote for file in files)

        # The index that was kept for these files as they are, or a new one.
        self.key = f"{kind}:" + "\0".join(file.key for file in files)
        stamps = "\0".join(file.stamp for file in files)
        name = hashlib.sha256(os.fsencode(f"{INDEX_VERSION}\0{self.key}\0{stamps}")).hexdigest()[:32]
        kept = cache_folder() / f"index-{name}.npz"
        index = Index.load(kept)
        if index is None:
            index = make_index(files)
            index.save(kept)
        self.index = index
        self.paths = index.paths

    def read(self, path: str, limit: int | None = None) -> bytes:
        row = self.find_file(path)
        size = int(self.index.sizes[row])
        wanted = size if limit is None else min(size, limit)
        if wanted > MAX_MEMBER_BYTES:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes once it is unpacked, more than {MAX_MEMBER_BYTES:,}")
        return self._read(row, wanted)

    def stamp(self, path: str) -> str | None:
        row = self.find(path)
        return None if row is None else f"{self.files[self.index.files[row]].stamp} {self.index.starts[row]}"

    def show(self, path: str) -> str:
        row = self.find(path) if len(self.files) > 1 else None
        root = self.root if row is None else self.files[self.index.files[row]].name
        return f"{root}/{path}" if path else root

    def _read(self, row: int, count: int) -> bytes:
        """Returns the first `count` bytes of a file."""
        file = self.files[self.index.files[row]]
        if self.kind == "zip":
            return _read_zip(file, self.index, row, count)
        content = file.read(int(self.index.starts[row]), count)
        if len(content) < count:
            raise OSError(errno.EIO, "the archive is cut short")
        return content


def _read_zip(file: PartsFile, index: Index, row: int, count: int) -> bytes:
    """Returns the first `count` bytes of a file in a zip, which follow its local header (APPNOTE.TXT, 4.3.7)."""
    start = int(index.starts[row])
    is_stored = index.methods[row] == STORED
    needed = count if is_stored else int(index.stored[row])

    # Header and content in one read, with room for the name and an extra field of usual size.
    content = file.read(start, HEADER_BYTES + len(index.paths[row]) + EXTRA_BYTES + needed)
    if len(content) < HEADER_BYTES or content[:4] != b"PK\3\4":
        raise OSError(errno.EIO, "the archive is cut short, or its directory is wrong")
    lengths = int.from_bytes(content[26:28], "little") + int.from_bytes(content[28:30], "little")
    end = HEADER_BYTES + lengths + needed
    if len(content) < end:
        content += file.read(start + len(content), end - len(content))
    content = content[HEADER_BYTES + lengths : end]
    if not is_stored:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, count or 1)
        except zlib.error as error:
            raise OSError(errno.EIO, f"it is damaged in the archive ({error})") from None
    if len(content) < count:
        raise OSError(errno.EIO, "the archive is cut short")
    if count == index.sizes[row] and zlib.crc32(content) != index.crcs[row]:
        raise OSError(errno.EIO, "it is damaged in the archive (its CRC-32 is wrong)")
    return content


def check_member(path: str) -> str:
    """Returns the path of a file in an archive without './'. Raises BadFileError where it leads out of the archive."""
    # Written on Windows, paths have backslashes.
    path = path.replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or (len(path) > 1 and path[1] == ":"):
        raise BadFileError(f"{printable(path)} leads out of the archive; pack the images again, from their folder")
    if "\0" in path or "" in parts or "." in parts:
        raise BadFileError(f"{printable(path)!r} is no path of a file")
    return path


@contextlib.contextmanager
def explaining(source: str) -> Iterator[None]:
    """Turns what opening an archive raises into a UserError of one line, which names --dataset_name."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"--dataset_name={source}: there is no file {error.filename}; check the path") from None
    except OSError as error:
        raise UserError(f"--dataset_name={source} cannot be read ({error.strerror or error}); give a file") from None
    except BadFileError as error:
        fix = "" if "; " in str(error) else "; give a whole archive of images"  # some know a fix of their own
        raise UserError(f"--dataset_name={source}: {error}{fix}") from None
