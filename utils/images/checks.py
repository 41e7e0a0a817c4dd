"""Every image decoded once before training, so that no file ends an epoch halfway.

What was found is remembered in a database of the cache folder, chunk by chunk: a check that was killed goes on, and a
second one looks only at sizes and times. Nothing here grows by more than a few bytes an image.
"""

import contextlib
import functools
import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from jaxtyping import Int32, UInt8

from utils.base.files import cache_folder
from utils.base.messages import progress_bar
from utils.images.decoding import MODES, BrokenImageError, check_image, read_image_file
from utils.storage.tree import Tree, count_readers

CHECK_VERSION = 4  # of what is decoded how; raise it when utils/images/decoding.py takes other files for broken
CHUNK = 512  # images between two writes of what was found; SQLite takes 999 values in a question
NUM_TRUSTED = 64  # images that are decoded where the others are trusted
DIGEST = "S16"
MODE_NUMBERS = {"": 0} | {mode: number for number, mode in enumerate(MODES)}


class CheckedImage(NamedTuple):
    """Result of the check of one file."""

    height: int  # in pixels, upright; 0 if it cannot be read
    width: int
    mode: str  # that keeps what it has, one of decoding.MODES; '' if it cannot be read
    digest: str  # the first 16 hex digits of its content's sha256
    reason: str  # why it cannot be read, or ''
    lowest: int = 0  # of its values, 0 .. 255
    highest: int = 0


class CheckedImages:
    """Results for n files, as arrays."""

    heights: Int32[np.ndarray, " n"]  # in pixels, upright; 0: not known
    widths: Int32[np.ndarray, " n"]
    modes: UInt8[np.ndarray, " n"]  # numbers of decoding.MODES
    digests: np.ndarray  # (n,), the first 16 hex digits of their sha256; b'': not known
    lowest: UInt8[np.ndarray, " n"]  # of the values
    highest: UInt8[np.ndarray, " n"]
    reasons: dict[int, str]  # why an image cannot be read, by its number

    def __init__(self, count: int):
        self.heights, self.widths = np.zeros((2, count), np.int32)
        self.modes, self.lowest, self.highest = np.zeros((3, count), np.uint8)
        self.digests = np.zeros(count, DIGEST)
        self.reasons = {}

    def fill(self, start: int, images: Mapping[int, CheckedImage]) -> None:
        """Sets the results of several files, by their numbers after `start`, at once."""
        if not images:
            return
        rows = start + np.fromiter(images, np.int64, len(images))
        heights, widths, modes, digests, reasons, lows, highs = zip(*images.values(), strict=True)
        self.heights[rows], self.widths[rows], self.lowest[rows], self.highest[rows] = heights, widths, lows, highs
        self.modes[rows] = [MODE_NUMBERS[mode] for mode in modes]
        self.digests[rows] = digests
        if any(reasons):
            self.reasons |= {row: reason for row, reason in zip(rows.tolist(), reasons, strict=True) if reason}


def check_images(tree: Tree, paths: Sequence[str], max_megapixels: float) -> CheckedImages:
    """Returns what decoding each file found, now or when it was last checked with the same size and times.

    Only what a file's bytes have shown is remembered, never that the system could not read it.
    """
    checked = CheckedImages(len(paths))
    check = functools.partial(_check_file, tree, max_megapixels=max_megapixels)
    version = f"{CHECK_VERSION}, Pillow {PIL.__version__}, up to {max_megapixels:g} megapixels"
    # Pillow releases the interpreter while it decodes. A bar only where it takes more than a moment.
    bar = progress_bar(None, "checking every image, once", len(paths), unit="image", delay=5)
    with Memory.open(tree.key, version) as memory, ThreadPoolExecutor(count_readers(tree.is_remote)) as pool, bar:
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]

            # Files that have not changed since an earlier check.
            stamps = [tree.stamp(path) for path in chunk]
            known = memory.find(zip(chunk, stamps, strict=True))
            checked.fill(start, known)
            unknown = [row for row in range(len(chunk)) if row not in known]
            bar.update(len(known))

            # All others are decoded.
            found = []
            for result in pool.map(check, [chunk[row] for row in unknown]):
                found.append(result)
                bar.update()
            checked.fill(start, {row: image for row, (image, _) in zip(unknown, found, strict=True)})
            memory.keep(
                (chunk[row], stamps[row], image)
                for row, (image, is_lasting) in zip(unknown, found, strict=True)
                if is_lasting and stamps[row]
            )
    return checked


def trust_images(tree: Tree, paths: Sequence[str], max_megapixels: float) -> CheckedImages:
    """Returns what decoding a few files found, and their mode for all: digests and the other sizes are not known."""
    checked = CheckedImages(len(paths))
    rows = range(0, len(paths), -(-len(paths) // NUM_TRUSTED))
    checked.fill(0, {row: _check_file(tree, paths[row], max_megapixels)[0] for row in rows})
    # Their digests would tell them apart from the others, of which none is known.
    checked.digests[:] = b""
    seen = [row for row in rows if row not in checked.reasons]
    if seen:
        colour = MODES.index("RGB")
        modes = checked.modes[seen]
        # One image in colour makes all of them so; 16 bits are kept where all have them.
        checked.modes[:] = colour if colour in modes else modes.min()
    return checked


def _check_file(tree: Tree, path: str, max_megapixels: float) -> tuple[CheckedImage, bool]:
    """Returns (the finding, whether the file's bytes have shown it, so that it lasts until they change)."""
    try:
        local = tree.local_path(path)
        if local is not None and not local.is_file():
            what = "a link to nothing" if local.is_symlink() and not local.exists() else "no regular file"
            return CheckedImage(0, 0, "", "", what), False
        content = read_image_of(tree, path, max_megapixels)
    except OSError as error:
        return CheckedImage(0, 0, "", "", error.strerror or str(error)), False
    except BrokenImageError as error:
        return CheckedImage(0, 0, "", "", str(error)), False

    # From here on the finding depends on the bytes alone.
    digest = hashlib.sha256(content).hexdigest()[:16]
    try:
        height, width, mode, lowest, highest = check_image(content, max_megapixels=max_megapixels)
        return CheckedImage(height, width, mode, digest, "", lowest, highest), True
    except BrokenImageError as error:
        return CheckedImage(0, 0, "", digest, str(error)), True


def read_image_of(tree: Tree, path: str, max_megapixels: float) -> bytes:
    """Returns the bytes of an image. Raises OSError and the BrokenImageError of `read_image_file`."""
    local = tree.local_path(path)
    return tree.read(path) if local is None else read_image_file(local, max_megapixels)


class Memory:
    """Findings of the checks of a tree's files, kept in a database. Where it cannot be, nothing is remembered."""

    def __init__(self, connection: sqlite3.Connection | None):
        self.connection = connection

    @classmethod
    @contextlib.contextmanager
    def open(cls, key: str, version: str) -> Iterator["Memory"]:
        """Opens the memory of a tree of this `key` while its block runs; it is empty if `version` is another."""
        file = cache_folder() / f"checked-{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.sqlite"
        memory = cls(_connect(file, version))
        try:
            yield memory
        finally:
            if memory.connection:
                memory.connection.close()

    def find(self, files: Iterable[tuple[str, str | None]]) -> dict[int, CheckedImage]:
        """Returns what is known of at most CHUNK files, (path, stamp), by their numbers."""
        if self.connection is None:
            return {}
        rows = {os.fsencode(path): (row, stamp) for row, (path, stamp) in enumerate(files)}
        question = f"SELECT * FROM images WHERE path IN ({','.join('?' * len(rows))})"
        found = {}
        with self._forgiving():
            for path, stamp, *values in self.connection.execute(question, list(rows)):
                row, now = rows[path]
                if stamp == now:
                    found[row] = CheckedImage(*values)
        return found

    def keep(self, images: Iterable[tuple[str, str | None, CheckedImage]]) -> None:
        """Writes findings, (path, stamp, result)."""
        rows = [(os.fsencode(path), stamp, *image) for path, stamp, image in images]
        if self.connection is not None and rows:
            with self._forgiving(), self.connection:
                self.connection.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Goes on without the database where it fails: what is not kept is checked again next time."""
        try:
            yield
        except sqlite3.Error:
            self.connection = None


def _connect(file: Path, version: str) -> sqlite3.Connection | None:
    """Opens the database of a memory, made anew if it is damaged or of another version; None if there can be none."""
    for _ in range(2):
        connection = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(file, timeout=10)
            connection.execute("PRAGMA synchronous=OFF")  # a power cut may cost what is only remembered
            connection.execute("CREATE TABLE IF NOT EXISTS about (version TEXT)")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS images (path BLOB PRIMARY KEY, stamp TEXT, height INTEGER, width INTEGER, "
                "mode TEXT, digest TEXT, reason TEXT, lowest INTEGER, highest INTEGER) WITHOUT ROWID"
            )
            if [(version,)] != connection.execute("SELECT version FROM about").fetchall():
                with connection:
                    connection.execute("DELETE FROM images")
                    connection.execute("DELETE FROM about")
                    connection.execute("INSERT INTO about VALUES (?)", (version,))
            return connection
        except sqlite3.OperationalError:  # no room, no permission, locked for long
            return None
        except (sqlite3.Error, OSError):
            if connection:
                connection.close()
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
    return None
