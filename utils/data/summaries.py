"""One pass over all rows of a data set's arrays: their range, values that are not finite, and a hash. What it finds in
files is kept until they change."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from utils.base.files import cache_folder, read_bytes, write_text
from utils.base.messages import WriteError, progress_bar

CHUNK_BYTES = 2**24  # of an array, looked at together


class Summary(NamedTuple):
    """The finding of one pass over all rows."""

    ranges: dict[str, list[float]]  # [lowest, highest] finite value of float images, by column; [inf, -inf] without any
    num_bad: dict[str, int]  # values that are NaN or infinite, by column, where there are any
    first_bad: dict[str, int]  # the first row with one
    sha256: str  # of all columns


def summarize(arrays: Mapping[str, np.ndarray], rows: Int[np.ndarray, " m"], order: Iterable[str]) -> Summary:
    """Returns what one pass over `rows` of arrays (n, ...) finds; of files that have not changed, it is kept.

    The hash is over one array after the other, those named in `order`.
    """
    arrays = {key: arrays[key] for key in order if key in arrays}  # in this order, whoever made the mapping
    if not any(map(_file_of, arrays.values())):
        return _look(arrays, rows)

    # What is in memory is small beside the files: its hash is a part of the stamp.
    files = [f"{key} {_file_of(array)}" for key, array in arrays.items()]
    kept = cache_folder() / f"columns-{_digest(*files, rows.tobytes())[:32]}.json"
    stamp = _digest(*(f"{key} {_stamp(array)}" for key, array in arrays.items()))
    found = _read_kept(kept, stamp)
    if found is None:
        found = _look(arrays, rows)
        _keep(kept, stamp, found)
    return found


def _look(arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> Summary:
    digest = hashlib.sha256()
    ranges: dict[str, list[float]] = {}
    num_bad: dict[str, int] = {}
    first_bad: dict[str, int] = {}
    for key, array in arrays.items():
        if key not in ("image", "label"):  # without which the hash is that of older runs
            digest.update(f"{key} {array.dtype.kind} {array.shape[1:]}\n".encode())
        for start, chunk in _read_chunks(array, rows):
            digest.update(_bytes_of(chunk))
            if chunk.dtype.kind != "f":
                continue
            # The range of what is finite; the rest is counted.
            is_bad = ~np.isfinite(chunk)
            if is_bad.any():
                has_bad = is_bad.reshape(len(chunk), -1).any(axis=1)
                first_bad.setdefault(key, start + int(has_bad.argmax()))
                num_bad[key] = num_bad.get(key, 0) + int(is_bad.sum())
            if key in ("image", "condition_image"):
                low, high = ranges.get(key, (np.inf, -np.inf))
                low = min(low, float(chunk.min(where=~is_bad, initial=np.inf)))
                high = max(high, float(chunk.max(where=~is_bad, initial=-np.inf)))
                ranges[key] = [low, high]
    return Summary(ranges, num_bad, first_bad, digest.hexdigest())


def _read_chunks(array: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (place of the first, some rows) until all are read; from files, with a bar where it takes long."""
    size = max(1, CHUNK_BYTES // max(1, array.nbytes // len(array)))
    starts: Iterable[int] = range(0, len(rows), size)
    if file := _file_of(array):
        starts = progress_bar(starts, f"looking at every row of {Path(file).name}, once", delay=5)
    for start in starts:
        yield start, np.asarray(array[rows[start : start + size]])


def _bytes_of(chunk: np.ndarray) -> Any:
    """Returns the bytes of rows, in an object that a hash takes."""
    # The width of a text array is that of its longest text, which is no part of the others.
    if chunk.dtype.kind == "U":
        return "".join(f"{text}\0" for text in chunk).encode("utf-8", "surrogatepass")
    return np.ascontiguousarray(chunk).data


def _file_of(array: np.ndarray) -> str:
    """Returns the path of the file from which an array is mapped; '' for one in memory."""
    return os.fspath(array.filename or "") if isinstance(array, np.memmap) else ""


def _stamp(array: np.ndarray) -> str:
    """Returns a text that changes whenever the array does."""
    file = _file_of(array)
    if not file:
        return hashlib.sha256(_bytes_of(array)).hexdigest()
    stat = os.stat(file)
    return f"{array.dtype} {array.shape} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part) + b"\0")
    return digest.hexdigest()


def _read_kept(file: Path, stamp: str) -> Summary | None:
    """Returns an earlier finding about the same content; None if there is none that can be understood."""
    try:
        content = json.loads(read_bytes(file))
        found = Summary(**content["summary"])
        is_good = [type(value) for value in found] == [dict, dict, dict, str] and content["stamp"] == stamp
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if is_good else None


def _keep(file: Path, stamp: str, summary: Summary) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"stamp": stamp, "summary": summary._asdict()}))
    except (OSError, WriteError):
        pass  # what cannot be kept is found again next time
