"""What a data set is: one contract over every source.

A random-access source has `len(source)` and `source[i] -> {"image": uint8 (h, w, c), "label": int32}`, all images of
one shape; shuffling, flips, hosts and resuming are shared code. Cached latents have `"moments"` in place of `"image"`.
A stream (TFDS's tfrecord files) makes its batches itself.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8

from utils.data.fingerprint import Fingerprint
from utils.data.images import MAX_MEGAPIXELS
from utils.errors import UserError

# "image": uint8 (h, w, c), or "moments": float16 (views, 2, h, w, c); "label": int32 ()
Example = dict[str, Any]
# "image": uint8 (b, h, w, c), or "moments": float16 (b, 2, h, w, c); "label": int32 (b,)
Batch = dict[str, np.ndarray]

SPLITS = ("train", "validation")
HELD_OUT_FRACTION = 0.02  # of a data set that brings no validation split


@runtime_checkable
class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class Batches(Protocol):
    """Endless batches with a position that JSON can hold."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class StreamSource(Protocol):
    """A source that can only be read in sequence."""

    def __len__(self) -> int: ...

    def training_batches(
        self, batch_size: int, seed: int, random_flip: bool, *, process_index: int, process_count: int, prefetch: int
    ) -> Batches: ...

    def epoch_batches(
        self, batch_size: int, start: int, stop: int, *, process_index: int, process_count: int, prefetch: int
    ) -> Iterator[Batch]: ...


@runtime_checkable
class LatentMetadata(Protocol):
    """What is known of cached latents (utils/data/latents.py)."""

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    @property
    def vae(self) -> str: ...

    @property
    def vae_sha256(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """One split of a data set; its images are uint8 of one shape, its labels 0 .. num_classes - 1."""

    name: str  # of the images, also where it is their latents that are read
    split: str  # 'train' or 'validation'
    source: Source | StreamSource
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]  # in label order
    random_flip: bool  # whether training batches mirror half of the images left to right
    fingerprint: Fingerprint  # of the examples, all of them
    latents: LatentMetadata | None = None  # what the moments are of, where they stand in for the images

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def empty_rows(self, count: int) -> Batch:
        """A batch to be filled."""
        labels = np.empty(count, np.int32)
        if self.latents:
            return {"moments": np.empty((count, 2, *self.latents.latent_shape), np.float16), "label": labels}
        return {"image": np.empty((count, *self.image_shape), np.uint8), "label": labels}

    def row(self, index: int, flip: bool) -> Example:
        """Example `index`, mirrored left to right if `flip`, as a batch holds it."""
        example = cast(Source, self.source)[index]  # a stream has no rows
        if self.latents:
            return {"moments": example["moments"][int(flip)], "label": example["label"]}
        return {"image": example["image"][:, ::-1] if flip else example["image"], "label": example["label"]}


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How images are found and prepared.

    `data_dir` is where TFDS keeps prepared data sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets). `image_size`
    is the side to which images are cropped and resized. `broken_images` ('refuse' or 'skip') and `max_megapixels`, the
    largest image decoded, are of folder:PATH. `random_flip` mirrors half of the training images left to right (None: as
    usual for the data set).
    """

    data_dir: str | Path | None = None
    image_size: int | None = None
    broken_images: str = "refuse"
    max_megapixels: float = MAX_MEGAPIXELS
    random_flip: bool | None = None


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images and labels in memory."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}


def describe_data(datasets: Mapping[str, ImageDataset]) -> dict[str, Any]:
    """What is kept with a run of its data ({split: data set}): enough to sample without them, and to tell whether they
    are the same when the run is continued (see utils/data/fingerprint.py)."""
    dataset = datasets["train"]
    return {
        "name": dataset.name,
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
        "splits": {split: dataset.fingerprint.to_json() for split, dataset in datasets.items()},
    }


def summarize_data(datasets: Mapping[str, ImageDataset], batch_size: int) -> str:
    """What was found, in a line, to see at once whether it is what was meant."""
    train, validation = (datasets[split] for split in SPLITS)
    num_images, num_classes = len(train.source), train.num_classes
    return (
        f"data: {train.name}, {num_images:,} images to train on and {len(validation.source):,} held out, "
        f"{'x'.join(map(str, train.image_shape))}, {num_classes} class{'es' * (num_classes != 1)}, "
        f"{num_images / batch_size:,.1f} steps per epoch, {'half of them' if train.random_flip else 'none'} mirrored"
    )


def num_held_out(num_images: int) -> int:
    """How many images of a data set without a validation split make one."""
    return max(1, round(HELD_OUT_FRACTION * num_images))


def hold_out(keys: Sequence[str], num_held_out: int) -> tuple[list[int], list[int]]:
    """(rows left for training, rows held out), each ascending. Which ones depends on the keys alone, for ever."""
    by_hash = sorted(range(len(keys)), key=lambda row: hashlib.sha256(keys[row].encode()).digest())
    return sorted(by_hash[num_held_out:]), sorted(by_hash[:num_held_out])


def check_own_size(name: str, own: int, options: DataOptions, instead: str = "") -> None:
    if options.image_size not in (None, own):
        raise UserError(
            f"--image_size={options.image_size}: the images of {name} are {own}x{own}; leave it out{instead}"
        )
