"""Fingerprints of data sets: their examples, identified by their content rather than by a name or a path.

Runs and cached latents keep the fingerprints of their data and compare them when they are continued: with other labels,
or in another order, they would go on silently on other data.
"""

import dataclasses
import gzip
import hashlib
import io
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.base.files import atomic_write, open_regular
from utils.base.messages import UserError

# A listing of examples, kept beside a run or latents; its limits stop a file that would expand without end.
LISTING = "examples.tsv.gz"
MAX_EXPANSION = 64  # of a listing over its compressed size
MAX_LINE_BYTES = 2**16
BLOCK = 2**12  # rows that are written at a time
UNKNOWN = "saved before runs kept track of their images: whether some were added or replaced is not known"


class Row(NamedTuple):
    """One example of a listing."""

    key: str  # a name that stays the same wherever the data are
    label: int
    digest: str  # of the content

    def __str__(self) -> str:
        return f"{self.label}\t{self.digest}\t{self.key}"


@dataclasses.dataclass(frozen=True)
class Rows(Sequence[Row]):
    """A listing in columns, of which a `Row` is made when it is asked for: a million take little memory."""

    keys: Sequence[str]
    labels: Sequence[int] | np.ndarray
    digests: Sequence[str] | np.ndarray  # texts, or an array of their bytes

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index):
        digest = self.digests[index]
        return Row(self.keys[index], int(self.labels[index]), digest if isinstance(digest, str) else digest.decode())

    def __iter__(self) -> Iterator[Row]:
        digests = self.digests if isinstance(self.digests, Sequence) else map(bytes.decode, self.digests.tolist())
        yield from map(Row, self.keys, np.asarray(self.labels).tolist(), digests)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The examples of one split, in their order.

    `format` is how they are read, which settles the order of training: 'files', 'arrays', 'array_record', 'tfrecord' or
    'latents'. `rows` are the examples one by one, from sources that can tell them apart cheaply.
    """

    format: str
    num_examples: int
    sha256: str
    rows: Sequence[Row] | None = dataclasses.field(default=None, compare=False)  # which the hash stands for

    @classmethod
    def of_rows(cls, format: str, rows: Sequence[Row]) -> "Fingerprint":
        # Over labels, contents, names and their order: each of them would change a run.
        digest = hashlib.sha256()
        for part in _write_rows(rows):
            digest.update(part.encode())
        return cls(format, len(rows), digest.hexdigest(), rows)

    def to_json(self) -> dict[str, Any]:
        return {"format": self.format, "num_examples": self.num_examples, "sha256": self.sha256}


def _write_rows(rows: Iterable[Row], start: str = "") -> Iterator[str]:
    """Yields rows as they are hashed and kept, a line for each that begins with `start`, some thousand at a time."""
    rows = iter(rows)
    while some := list(itertools.islice(rows, BLOCK)):
        yield "".join([f"{start}{label}\t{digest}\t{key}\n" for key, label, digest in some])


def write_listing(folder: Path, fingerprints: Mapping[str, Fingerprint]) -> None:
    """Writes FOLDER/examples.tsv.gz, a line for each row: split, label, digest, key. No rows, no file."""
    if not any(fingerprint.rows for fingerprint in fingerprints.values()):
        return
    with (
        atomic_write(folder / LISTING) as temporary,
        temporary.open("wb") as raw,
        # Without name and time: the same rows are the same bytes.
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as compressed,
        io.TextIOWrapper(compressed, encoding="utf-8") as file,
    ):
        for split, fingerprint in fingerprints.items():
            for part in _write_rows(fingerprint.rows or (), f"{split}\t"):
                file.write(part)


def read_listing(folder: Path, num_examples: Mapping[str, int]) -> dict[str, list[Row]]:
    """Returns {split: rows} of FOLDER/examples.tsv.gz; {} if it is missing or cannot be trusted.

    It is not trusted with more rows of a split than `num_examples`, {split: count}, or with more text than a file of
    its size can hold: digests do not compress.
    """
    rows: dict[str, list[Row]] = {split: [] for split in num_examples}
    try:
        with open_regular(folder / LISTING) as compressed, gzip.open(compressed, "rb") as file:
            # Counted while it is read: nothing is expanded beyond the limits.
            left = MAX_EXPANSION * os.fstat(compressed.fileno()).st_size + MAX_LINE_BYTES
            while line := file.readline(MAX_LINE_BYTES):
                left -= len(line)
                split, label, digest, key = line.decode().rstrip("\n").split("\t", 3)
                rows[split].append(Row(key, int(label), digest))
                if left < 0 or len(rows[split]) > num_examples[split]:
                    return {}
    except (OSError, EOFError, ValueError, KeyError, zlib.error):
        return {}
    return {split: found for split, found in rows.items() if found}


def compare_data(
    saved: Mapping[str, Any], saved_rows: Mapping[str, Sequence[Row]], found: Mapping[str, Any],
    fingerprints: Mapping[str, Fingerprint],
) -> list[str]:  # fmt: skip
    """Describes in words the differences of two data sets that do a run no harm.

    Raises UserError with the first difference that would change labels or the order of training. `saved` and `found`
    are {'image_shape', 'class_names', 'splits': {split: Fingerprint.to_json()}} and, if the images are not uint8,
    'pixels'; in older runs `saved` has no 'splits'. `saved_rows` is the listing kept with it.
    """
    # Images of another shape or range do not fit the model.
    if list(saved["image_shape"]) != list(found["image_shape"]):
        raise UserError(f"its images were {_size(saved['image_shape'])}, not {_size(found['image_shape'])}")
    if saved.get("pixels") != found.get("pixels"):
        raise UserError(f"its images were {_pixels(saved)}, not {_pixels(found)}")

    # Classes: labels must mean the same.
    remarks = []
    old_names, new_names = (data.get("class_names", ()) for data in (saved, found))
    if difference := _first_class_difference(old_names, new_names):
        if len(old_names) != 1 or len(new_names) != 1:
            raise UserError(difference)
        remarks.append(difference)  # nothing but the name of the only class, which may be its folder's
    if "splits" not in saved:
        return [*remarks, UNKNOWN]

    # Examples: another order of training does harm, another validation set only breaks its curve.
    for split, fingerprint in fingerprints.items():
        harm, remark = _first_difference(saved["splits"].get(split), saved_rows.get(split), fingerprint)
        if split == "train" and harm:
            raise UserError(harm)
        if harm or remark:
            what = "" if split == "train" else "validation, whose curve is another from here on: "
            remarks.append(f"{what}{harm or remark}")
    return remarks


def _first_class_difference(saved: Sequence[str], found: Sequence[str]) -> str:
    # The first label whose class is another.
    pairs = itertools.zip_longest(saved, found)
    differing = ((label, old, new) for label, (old, new) in enumerate(pairs) if old != new)
    label, old, new = next(differing, (None, None, None))
    if label is None:
        return ""

    # The usual causes have messages of their own: a class was added, removed or renamed.
    if new not in saved and old in found:
        return f"class {new!r} is new, so that labels shift: {label} was {old!r}"
    if old not in found and new in saved:
        return f"class {old!r} (label {label}) is gone, so that labels shift"
    if old is None or new is None:
        return f"class {new or old!r} (label {label}) is {'new' if old is None else 'gone'}"
    return f"label {label} is class {new!r}, which was {old!r}"


def _first_difference(
    saved: Mapping[str, Any] | None, saved_rows: Sequence[Row] | None, found: Fingerprint
) -> tuple[str, str]:
    """Returns (a harmful difference, a harmless one) in words; at most one of the two is not empty."""
    if saved is None or saved == found.to_json():
        return "", ""
    # Each format has an order of its own.
    if saved["format"] != found.format:
        return f"its images were read from {saved['format']}, now from {found.format}, in another order", ""
    # Row by row where both listings are there; else all that is known is that the hashes differ.
    if saved_rows is not None and found.rows is not None:
        harm, remark = _compare_rows(saved_rows, found.rows)
        are_trusted = not (all(row.digest for row in saved_rows) and all(row.digest for row in found.rows))
        if harm or remark or are_trusted:
            return harm, remark
    if saved["num_examples"] != found.num_examples:
        return f"there were {saved['num_examples']} images, now {found.num_examples}", ""
    return "there are as many images, but others or in another order", ""


def _compare_rows(saved: Sequence[Row], found: Sequence[Row]) -> tuple[str, str]:
    """`_first_difference` of examples that can be told apart one by one."""
    old = {row.key: row for row in saved}
    new = {row.key: row for row in found}
    for keys, what in (
        ([key for key in new if key not in old], "new"),
        ([key for key in old if key not in new], "gone"),
    ):
        if keys:
            return f"{_count(keys)} {what}: {_list(keys)}", ""

    # The same keys, with other labels, in another order, or with other contents.
    relabelled = [key for key in new if new[key].label != old[key].label]
    if relabelled:
        return f"{_count(relabelled)} of another class or condition: {_list(relabelled)}", ""
    if list(old) != list(new):
        return "the images are in another order", ""
    # Images that were not read (--check_images 0) have no digest.
    replaced = [key for key in new if new[key].digest and old[key].digest not in ("", new[key].digest)]
    return "", f"{_count(replaced)} not the same as before: {_list(replaced)}" if replaced else ""


def _count(keys: Sequence[str]) -> str:
    return f"{len(keys)} image{'s are' if len(keys) > 1 else ' is'}"


def _list(keys: Sequence[str], limit: int = 3) -> str:
    return ", ".join(keys[:limit]) + ", ..." * (len(keys) > limit)


def _size(image_shape: Sequence[int]) -> str:
    return "x".join(map(str, image_shape))


def _pixels(data: Mapping[str, Any]) -> str:
    """Returns the format of images in words; without a record they are uint8."""
    pixels = data.get("pixels")
    return f"{pixels['dtype']} in {pixels['range'][0]:g} .. {pixels['range'][1]:g}" if pixels else "uint8"
