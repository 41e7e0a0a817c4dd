"""Data sets by name, and batches of them in training or reading order: one contract over every source.

A source of images at random has `len(source)` and `source[i] -> {"image": uint8 (h, w, c), "label": int32}`, its images
all of one shape; shuffling, flips, hosts and resuming are the same code for all of these. Cached latents have
`"moments"` in the place of `"image"`. Only TFDS's tfrecord files are read in sequence instead, through tf.data.
"""

import dataclasses
import difflib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Int32, UInt8

from utils.errors import UserError
from utils.fingerprint import Fingerprint, Row
from utils.image_folder import FolderSplit, ImageFiles, Reading, list_folder
from utils.images import MAX_MEGAPIXELS
from utils.latents import LatentRecords, Manifest, load_manifest
from utils.tfds_data import PreparedSplit, RecordStream, num_held_out

Example = dict[
    str, np.ndarray
]  # "image": uint8 (h, w, c), or "moments": float16 (views, 2, h, w, c); "label": int32 ()
Batch = dict[str, np.ndarray]  # "image": uint8 (b, h, w, c), or "moments": float16 (b, 2, h, w, c); "label": int32 (b,)

SPLITS = ("train", "validation")
FOLDER_SIZE = 256
IMAGENET_LABELS = Path(__file__).resolve().parents[1] / "data" / "imagenet_labels.txt"


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Batches(Protocol):
    """Endless batches with a position that JSON can hold."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """One split of a data set; its images are uint8 of one shape, its labels 0 .. num_classes - 1."""

    name: str  # of the images, also where it is their latents that are read
    split: str  # 'train' or 'validation'
    source: Source | RecordStream
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]  # in label order
    random_flip: bool  # whether training batches mirror half of the images left to right
    fingerprint: Fingerprint  # of the examples, all of them
    latents: Manifest | None = None  # what the moments are of, where they stand in for the images

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
        example = self.source[index]
        if self.latents:
            return {"moments": example["moments"][int(flip)], "label": example["label"]}
        return {"image": example["image"][:, ::-1] if flip else example["image"], "label": example["label"]}


def training_batches(
    dataset: ImageDataset,
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    prefetch: int = 2,
) -> Batches:
    """Endless shuffled batches {'image': uint8 (b, h, w, c), 'label': int32 (b,)}, b = batch_size / process_count.

    Every epoch is a new order that has each image exactly once; batches run on across its end. Order and flips are
    functions of (seed, position in the endless stream) alone. Host `process_index` gets its part of each global batch,
    so that the k-th batches of all hosts, one after the other, are the k-th batch of a single host. (What is read as a
    stream promises less: see `RecordStream.training_batches`.)

    `get_state()` is {'next_index': number of batches taken}, the same on every host; after `set_state` of it the
    stream goes on exactly. `num_threads` read images (default: a thread per core, 32 at most), up to `prefetch`
    batches ahead; prefetch=0 reads when asked. What a thread raises, `next` raises.
    UserError where batch_size does not divide over the hosts or the seed is negative.
    """
    _check_batch_size(batch_size, process_count)
    if seed < 0:
        raise UserError(f"--seed={seed} is negative; use 0, for example")
    num_images, local_size = len(dataset.source), batch_size // process_count
    if isinstance(dataset.source, RecordStream):
        hosts = {"process_index": process_index, "process_count": process_count}
        return dataset.source.training_batches(batch_size, seed, dataset.random_flip, **hosts, prefetch=prefetch)

    # Not Grain's shuffle: it orders epoch e of seed s as epoch 0 of seed s + e, so that runs under neighbouring seeds
    # see the same orders, and it takes a millisecond an image where there are few.
    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, epoch])
        order, flips = rng.permutation(num_images), rng.random(num_images) < 0.5
        return order, flips & dataset.random_flip

    reader = _BatchReader(dataset, num_threads)

    def read(batch: int) -> Batch:
        indices, flips = [], []
        first = batch * batch_size + process_index * local_size
        for position in range(first, first + local_size):
            epoch, place = divmod(position, num_images)
            order, is_flipped = epoch_order(epoch)
            indices.append(order[place])
            flips.append(is_flipped[place])
        return reader(indices, flips)

    # As many batches as a float64, such as JSON's numbers, can count: endless.
    return _in_order(grain.MapDataset.range(2**53).map(read), prefetch)


def epoch_batches(
    dataset: ImageDataset,
    batch_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """The images start .. stop - 1 (default: all) once, in the split's own order and unflipped; batches as
    `training_batches` has them, the last may be short.

    Hosts see disjoint images that are together the whole split, in equally many batches, so that they can take them
    in step: of a short last batch a host may get no rows. UserError where batch_size does not divide over the hosts.
    """
    _check_batch_size(batch_size, process_count)
    stop = len(dataset.source) if stop is None else stop
    if isinstance(dataset.source, RecordStream):
        hosts = {"process_index": process_index, "process_count": process_count}
        return dataset.source.epoch_batches(batch_size, start, stop, **hosts, prefetch=prefetch)
    reader = _BatchReader(dataset, num_threads)

    def read(first: int) -> Batch:
        indices = range(first + process_index, min(first + batch_size, stop), process_count)
        return reader(indices, [False] * len(indices))

    return _in_order(grain.MapDataset.range(start, stop, batch_size).map(read), prefetch)


def first_examples(dataset: ImageDataset, num_examples: int) -> ImageDataset:
    """The data set cut to its first `num_examples` images (all, if it has fewer), never flipped: to be overfitted."""
    num_examples = min(num_examples, len(dataset.source))
    source = _Subset(dataset.source, range(num_examples))
    if isinstance(dataset.source, RecordStream):
        (batch,) = epoch_batches(dataset, num_examples, stop=num_examples)
        source = _Arrays(batch["image"], batch["label"])
    return dataclasses.replace(dataset, source=source, random_flip=False)


def _check_batch_size(batch_size: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"--batch_size={batch_size} does not divide over {process_count} process{'es' * (process_count > 1)}; "
            f"use a multiple of {process_count}"
        )


def _in_order(batches: grain.MapDataset, prefetch: int) -> grain.DatasetIterator[Batch]:
    # Two batches in work at a time, so that the reading threads have the next one's images while one is finished.
    options = grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


class _BatchReader:
    """reader(indices, flips) -> batch, its images read on threads straight into the batch's memory."""

    def __init__(self, dataset: ImageDataset, num_threads: int | None):
        self.dataset = dataset
        self.num_threads = num_threads or min(32, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="read-images")

    def __call__(self, indices: Sequence[int], flips: Sequence[bool]) -> Batch:
        batch = self.dataset.empty_rows(len(indices))

        def fill(rows: range) -> None:
            for row in rows:
                for name, value in self.dataset.row(int(indices[row]), bool(flips[row])).items():
                    batch[name][row] = value

        # Some pieces for every thread evens out slow images; single rows would cost more than a small image itself.
        piece = max(1, len(indices) // (4 * self.num_threads))
        pieces = [range(row, min(row + piece, len(indices))) for row in range(0, len(indices), piece)]
        for _ in self.pool.map(fill, pieces):
            pass
        return batch


@dataclasses.dataclass(frozen=True)
class _Arrays:
    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class _Subset:
    source: Source
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.rows[index]]


def describe_data(datasets: Mapping[str, ImageDataset]) -> dict[str, Any]:
    """What is kept with a run of its data ({split: data set}): enough to sample without them, and to tell whether they
    are the same when the run is continued (see utils/fingerprint.py)."""
    dataset = datasets["train"]
    return {
        "name": dataset.name,
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
        "splits": {split: dataset.fingerprint.to_json() for split, dataset in datasets.items()},
    }


def _held_out(keys: Sequence[str], num_held_out: int) -> tuple[list[int], list[int]]:
    """(rows left for training, rows held out), each ascending. Which ones depends on the keys alone, for ever."""
    by_hash = sorted(range(len(keys)), key=lambda row: hashlib.sha256(keys[row].encode()).digest())
    return sorted(by_hash[num_held_out:]), sorted(by_hash[:num_held_out])


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What `load_dataset` was told beside name and split."""

    data_dir: str | Path | None
    image_size: int | None
    broken_images: str
    max_megapixels: float


def load_dataset(
    name: str,
    split: str = "train",
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    broken_images: str = "refuse",
    max_megapixels: float = MAX_MEGAPIXELS,
) -> ImageDataset:
    """The `split` ('train' or 'validation') of data set `name`; only 'train' ever flips.

    digits          1,797 real handwritten digits, 8x8, grey, shipped with scikit-learn
    imagenet256     ImageNet in square crops; imagenet128 likewise
    celebahq256     CelebA-HQ, 256x256
    cifar10         CIFAR-10, 32x32
    tfds:NAME       any labelled images of TensorFlow Datasets, such as tfds:oxford_flowers102
    folder:PATH     image files, in a folder for each class or in one folder
    latents:DIR     what encode_latents.py made of one of these

    The middle four are read from what TFDS prepared under `data_dir` (default: $TFDS_DATA_DIR or
    ~/tensorflow_datasets), in any version: array_record at random and without TensorFlow, else tfrecord as a stream.
    `image_size` is the side to which folder:PATH (default 256), cifar10 and tfds:NAME (default: the images' own) are
    cropped and resized; `broken_images` is 'refuse' or 'skip', and `max_megapixels` the largest image decoded, for
    folder:PATH.
    UserError, with what to do, where the data are missing or the name is unknown.
    """
    if split not in SPLITS:
        raise UserError(f"--split={split} is unknown; use train or validation")
    prefix, colon, rest = name.partition(":")
    load = DATASETS.get(name) or (PREFIXES.get(prefix) if colon and rest else None)
    if load is None:
        raise UserError(_unknown_name(name))
    return load(name, split, DataOptions(data_dir, image_size, broken_images, max_megapixels))


def _unknown_name(name: str) -> str:
    known = [*sorted(DATASETS), *(f"{prefix}:{word}" for prefix, word in PLACEHOLDERS.items())]
    guess = [f"folder:{name}"] if Path(name).is_dir() else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {guess[0]}?" if guess else "."
    return f"--dataset_name={name} is unknown{hint} Known are {', '.join(known)}"


def _check_own_size(name: str, own: int, options: DataOptions, instead: str = "") -> None:
    if options.image_size not in (None, own):
        raise UserError(
            f"--image_size={options.image_size}: the images of {name} are {own}x{own}; leave it out{instead}"
        )


def _load_digits(name: str, split: str, options: DataOptions) -> ImageDataset:
    from sklearn.datasets import load_digits

    _check_own_size(name, 8, options)
    digits = load_digits()  # 16 levels of ink, 0 .. 16
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    rows = _held_out([str(row) for row in range(len(images))], 297)[SPLITS.index(split)]
    source = _Arrays(images[rows], digits.target[rows].astype(np.int32))
    digest = hashlib.sha256(source.images.tobytes() + source.labels.tobytes()).hexdigest()
    fingerprint = Fingerprint("arrays", len(source), digest)
    return ImageDataset(name, split, source, (8, 8, 1), tuple("0123456789"), False, fingerprint)


def _load_folder(name: str, split: str, options: DataOptions) -> ImageDataset:
    size = options.image_size or FOLDER_SIZE
    root = Path(name.removeprefix("folder:"))
    reading = Reading(options.broken_images, options.max_megapixels, size)
    listed, is_whole = list_folder(root, split, reading)
    if is_whole:
        if len(listed.files) < 2:
            raise UserError(f"--dataset_name={name}: {root} holds 1 image; 2 are needed, one of them to hold out")
        listed = listed.take(_held_out(listed.keys, num_held_out(len(listed.files)))[SPLITS.index(split)])
    names = listed.class_names
    if len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        names = imagenet_class_names()
    source = ImageFiles(listed.files, size, options.max_megapixels)
    return ImageDataset(name, split, source, (size, size, 3), names, split == "train", _fingerprint_files(listed))


def _fingerprint_files(listed: FolderSplit) -> Fingerprint:
    labels = (label for _, label in listed.files)
    rows = [Row(*values) for values in zip(listed.keys, labels, listed.digests, strict=True)]
    return Fingerprint.of_rows("files", rows)


def imagenet_class_names() -> tuple[str, ...]:
    """English names of the 1,000 classes in the order of their WordNet ids, which is that of the labels."""
    return tuple(IMAGENET_LABELS.read_text(encoding="utf-8").splitlines())


def _load_imagenet(name: str, split: str, options: DataOptions, *, size: int) -> ImageDataset:
    other = f", or use --dataset_name tfds:imagenet2012 --image_size {options.image_size}"
    _check_own_size(name, size, options, other)
    dataset = _load_tfds(name, split, dataclasses.replace(options, image_size=size), builder="imagenet2012", flip=True)
    return dataclasses.replace(dataset, class_names=imagenet_class_names())  # TFDS has WordNet ids


def _load_celebahq(name: str, split: str, options: DataOptions) -> ImageDataset:
    _check_own_size(name, 256, options)
    return _load_tfds(name, split, options, builder="celebahq256")


def _load_tfds(
    name: str, split: str, options: DataOptions, *, builder: str | None = None, flip: bool = False
) -> ImageDataset:
    """A data set that TFDS prepared, never flipped unless told. `builder`: default, name's NAME."""
    flag = f"--dataset_name={name}"
    prepared = PreparedSplit(flag, options.data_dir, builder or name.removeprefix("tfds:"), split, options.image_size)
    flips = flip and split == "train"
    source, fingerprint = prepared.open(flag), prepared.fingerprint()
    return ImageDataset(name, split, source, prepared.image_shape, prepared.class_names, flips, fingerprint)


def _load_latents(name: str, split: str, options: DataOptions) -> ImageDataset:
    folder = Path(name.removeprefix("latents:"))
    manifest = load_manifest(folder)
    if manifest is None:
        raise UserError(
            f"--dataset_name={name}: {folder} holds no cached latents; make them: "
            f"python encode_latents.py --dataset_name imagenet256 --out {folder}"
        )
    _check_own_size(name, manifest.image_shape[0], options)
    source = LatentRecords(folder, manifest, split)
    flips = split == "train" and manifest.num_views[split] == 2
    shape, names = manifest.image_shape, manifest.class_names
    fingerprint = manifest.fingerprint(folder, split)
    return ImageDataset(manifest.dataset_name, split, source, shape, names, flips, fingerprint, manifest)


Loader = Callable[[str, str, DataOptions], ImageDataset]
DATASETS: dict[str, Loader] = {
    "digits": _load_digits,
    "imagenet256": functools.partial(_load_imagenet, size=256),
    "imagenet128": functools.partial(_load_imagenet, size=128),
    "celebahq256": _load_celebahq,
    "cifar10": functools.partial(_load_tfds, builder="cifar10", flip=True),
}
PREFIXES: dict[str, Loader] = {"folder": _load_folder, "tfds": _load_tfds, "latents": _load_latents}
PLACEHOLDERS = {"folder": "PATH", "tfds": "NAME", "latents": "DIR"}
