"""Several data sets as one: --dataset_name given several times, and the share of each, --dataset_weights.

The names are joined by ' + ' in a run's configuration. An epoch has every image at least once: the sources of greater
weight have theirs several times, evenly.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import cast

import numpy as np
from jaxtyping import Int

from utils.base.messages import UserError
from utils.data.dataset import Example, ImageDataset, PixelBatch, RandomAccess, StreamSource
from utils.data.fingerprint import Fingerprint, Row

SEPARATOR = " + "
MAX_REPEATS = 1000  # of the images of one source in an epoch


def parse_weights(text: str) -> tuple[float, ...]:
    """Returns the positive numbers of --dataset_weights, separated by commas. Raises UserError for any other text."""
    try:
        weights = tuple(map(float, text.split(",")))
    except ValueError:
        weights = ()
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"--dataset_weights={text}: use a positive number for each --dataset_name, such as 1,2")
    return weights


@dataclasses.dataclass(frozen=True)
class Joined:
    """Rows of several sources, one source after the other."""

    sources: Sequence[RandomAccess]
    places: Int[np.ndarray, "n 2"]  # (source, row in it) of each example

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        source, row = self.places[index]
        return self.sources[source][int(row)]

    def read_condition(self, index: int) -> Example:
        """Returns an example without its image, where its source can leave that out."""
        source, row = self.places[index]
        read = getattr(self.sources[source], "read_condition", self.sources[source].__getitem__)
        return read(int(row))


def join(name: str, parts: Sequence[ImageDataset], weights: Sequence[float] | None) -> ImageDataset:
    """Returns a split of several data sets as one, of which `weights` say the shares (default: their sizes).

    Raises UserError, which names the first that differs, unless all hold images of one shape, with the same classes or
    other conditions; and for weights that would repeat images more than MAX_REPEATS times.
    """
    # Everything that a network is made for must be the same.
    first = parts[0]
    for part in parts:
        for what, ours, theirs in (
            ("the images", first.image_shape, part.image_shape),
            ("the values", first.pixels, part.pixels),
            ("the classes", _names(first), _names(part)),
            ("the conditions", type(first.condition), type(part.condition)),
        ):
            if ours != theirs:
                raise UserError(
                    f"--dataset_name={name}: {what} of {part.name} are {_describe(theirs)}, those of {first.name} "
                    f"{_describe(ours)}; join data of one kind"
                )
        if isinstance(part.source, StreamSource) or part.batch_type is not PixelBatch:
            raise UserError(
                f"--dataset_name={name}: {part.name} cannot be joined; join images that are read by their rows"
            )

    # How often each row is in an epoch.
    sizes = [len(part.source) for part in parts]
    counts = count_rows(sizes, weights)
    if any(count > MAX_REPEATS * size for count, size in zip(counts, sizes, strict=True)):
        raise UserError(
            f"--dataset_weights={','.join(f'{weight:g}' for weight in weights or ())}: an epoch of {sum(counts):,} "
            f"images would repeat some more than {MAX_REPEATS} times; use weights that are closer to the sizes, "
            f"{', '.join(f'{size:,}' for size in sizes)}"
        )
    places = [
        np.stack([np.full(count, number), np.arange(count) * size // count], axis=1)
        for number, (count, size) in enumerate(zip(counts, sizes, strict=True))
    ]
    return dataclasses.replace(
        first,
        name=name,
        source=Joined([cast(RandomAccess, part.source) for part in parts], np.concatenate(places)),
        random_flip=all(part.random_flip for part in parts),
        fingerprint=_join_fingerprints([part.fingerprint for part in parts], counts),
        empty_classes=tuple(sorted(set.intersection(*(set(part.empty_classes) for part in parts)))),
        own_condition=first.own_condition,
        is_remote=any(part.is_remote for part in parts),
    )


def _names(part: ImageDataset) -> tuple[str, ...] | int:
    """Returns what must be the same of the classes: all names, or, of the only class, that it is the only one."""
    return 1 if len(part.class_names) == 1 else part.class_names


def count_rows(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Returns how many rows of each source an epoch has: in proportion to the weights, and no fewer than it holds."""
    # The source that is scarcest for its weight has each row once.
    if weights is None:
        return list(sizes)
    scale = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [max(size, round(scale * weight)) for size, weight in zip(sizes, weights, strict=True)]


def _join_fingerprints(parts: Sequence[Fingerprint], counts: Sequence[int]) -> Fingerprint:
    """Returns what identifies the examples of all sources, in their order and number."""
    # Row by row, where all sources tell theirs apart.
    if all(part.rows is not None for part in parts):
        # Names of files may be the same in two sources.
        rows = [Row(f"{number}/{row.key}", *row[1:]) for number, part in enumerate(parts) for row in part.rows or ()]
        whole = Fingerprint.of_rows("joined", rows)
    else:
        digest = hashlib.sha256("\n".join(part.sha256 for part in parts).encode()).hexdigest()
        whole = Fingerprint("joined", sum(part.num_examples for part in parts), digest)
    # Shares change an epoch as other images would.
    if list(counts) == [part.num_examples for part in parts]:
        return whole
    digest = hashlib.sha256(f"{whole.sha256} {counts}".encode()).hexdigest()
    return dataclasses.replace(whole, num_examples=sum(counts), sha256=digest, rows=None)


def _describe(value: object) -> str:
    """Returns a shape, a format, names of classes or a kind of condition in words."""
    if isinstance(value, type):
        return value.__name__.removesuffix("Condition").lower()
    if isinstance(value, tuple) and all(isinstance(each, int) for each in value):
        return "x".join(map(str, value))
    if isinstance(value, tuple):
        return f"{', '.join(map(str, value[:3]))}{', ...' * (len(value) > 3)} ({len(value)})"
    return str(value)
