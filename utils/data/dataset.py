"""The contract that every data set meets, whatever its source.

Arrays and iterables become data sets by `array_dataset` and `iterable_dataset`. Any other random-access source has
`len(source)` and `source[i] -> {"image": uint8 (h, w, c), "label": int32}`, all images of one shape, of any size and
number of channels, or of float32 where the data set's `pixels` give their range. Shuffling, flips, hosts and resuming
are shared code. A stream (TFDS's tfrecord files) makes its batches itself. A batch knows how it becomes latents;
sources of something else than images bring a `Batch` of their own (`LatentBatch`, `PairBatch`).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, Int32, Key, PyTree, UInt8

from utils.base.messages import UserError, warn_once
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import Condition, empty_rows, read_example
from utils.data.fingerprint import Fingerprint
from utils.images.decoding import MAX_MEGAPIXELS
from utils.images.pixels import UINT8, Images, PixelFormat, describe_range, images_to_uint8
from utils.images.sizes import Size, read_size, write_size

# "image": uint8 or float32 (h, w, c), and what the condition of the data reads: the class reads "label", int32 ().
# Sources with a `Batch` of their own have other arrays in place of "image".
Example = dict[str, Any]

SPLITS = ("train", "validation")
HELD_OUT_FRACTION = 0.02  # part of a data set without a validation split that becomes one
NUM_SAMPLED = 256  # images whose range is looked at


class Batch(flax.struct.PyTreeNode):
    """Examples of a data set, and how they become latents; a pytree whose arrays have the batch as first axis.

    `codec` is a codec of utils/codecs, `keys` are one for each example or one to be split among them.
    """

    condition: PyTree  # of its kind: of classes, labels int32 (b,)

    @classmethod
    def empty(cls, count: int, dataset: "ImageDataset", condition: PyTree) -> "Batch":
        """Returns `count` examples of a data set as NumPy arrays to be filled, as those of `condition` are."""
        raise NotImplementedError

    @classmethod
    def select(cls, example: Example, flip: bool) -> Example:
        """Returns one row of every field but the condition from an example, mirrored left to right if `flip`."""
        raise NotImplementedError

    @property
    def num_examples(self) -> int:
        return len(jax.tree.leaves(self.condition)[0])

    def to_latents(self, codec: Any, keys: Key[Array, "*b"]) -> Float[Array, "b h w c"]:
        """Returns x_1, what the model learns."""
        raise NotImplementedError

    def to_images(self, codec: Any, x_1: Float[Array, "b h w c"]) -> UInt8[Array | np.ndarray, "b h2 w2 c2"]:
        """Returns the images of which `x_1` are the latents, as they are shown."""
        return images_to_uint8(codec.decode(x_1))

    def draws(self) -> dict[str, Array]:
        """Returns values known for these examples, such as noise, that replace an objective's random draws by name."""
        return {}


class PixelBatch(Batch):
    """Images with their conditions."""

    image: PyTree  # uint8 or float32 (b, h, w, c)
    pixels: PixelFormat = flax.struct.field(pytree_node=False, default=UINT8)

    @classmethod
    def empty(cls, count: int, dataset: "ImageDataset", condition: PyTree) -> "PixelBatch":
        images = np.empty((count, *dataset.image_shape), dataset.pixels.dtype)
        return cls(condition=condition, image=images, pixels=dataset.pixels)

    @classmethod
    def select(cls, example: Example, flip: bool) -> Example:
        image = example["image"]
        return {"image": image[:, ::-1] if flip else image}

    def to_latents(
        self, codec: Any, keys: Key[Array, "*b"], change: Callable[[Array], Array] = lambda images: images
    ) -> Float[Array, "b h w c"]:
        """Returns x_1, of images in [-1, 1] after a `change`."""
        return codec.encode(keys, change(self.pixels.to_unit(self.image)))

    def to_images(self, codec: Any, x_1: Float[Array, "b h w c"]) -> UInt8[Array | np.ndarray, "b h2 w2 c2"]:
        return self.pixels.to_uint8(self.image)


@runtime_checkable
class RandomAccess(Protocol):
    """A source whose examples can be read in any order, by several threads."""

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
    """Facts about cached latents (utils/data/latents.py)."""

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    @property
    def vae(self) -> str: ...

    @property
    def vae_sha256(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """One split of a data set; its images are of one shape and format.

    Its condition is the class, by labels 0 .. num_classes - 1, unless `own_condition` is another.
    """

    name: str  # of the images, also where it is their latents that are read
    split: str  # 'train' or 'validation'
    source: RandomAccess | StreamSource
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]  # in label order
    random_flip: bool  # whether training batches mirror half of the images left to right
    fingerprint: Fingerprint  # of the examples, all of them
    latents: LatentMetadata | None = None  # what the moments are of, where they stand in for the images
    pair_shape: tuple[int, int, int] | None = None  # of samples that come with their noise (utils/data/pairs.py)
    empty_classes: tuple[int, ...] = ()  # labels of which the split has no image, as far as that is known
    batch_type: type[Batch] = PixelBatch
    pixels: PixelFormat = UINT8  # how the images hold their values
    own_condition: Condition | None = None  # of examples without classes, whose class_names are ()
    is_remote: bool = False  # whether images are waited for rather than decoded: they lie in object storage

    @property
    def condition(self) -> Condition:
        """The kind of condition that the examples have, with what it knows about them."""
        return self.own_condition or ClassCondition(self.class_names, self.empty_classes)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def empty_batch(self, count: int) -> Batch:
        """Returns a batch to be filled with `row`s."""
        return self.batch_type.empty(count, self, empty_rows(self.condition, count))

    def row(self, index: int, flip: bool) -> Example:
        """Returns example `index`, mirrored left to right if `flip`, by the fields of a batch."""
        example = cast(RandomAccess, self.source)[index]  # a stream has no rows
        if self.batch_type is PixelBatch:
            self._check_image(index, example["image"])
        condition = read_example(self.condition, example)
        if flip:
            condition = self.condition.mirror(condition)
        return {**self.batch_type.select(example, flip), "condition": condition}

    def _check_image(self, index: int, image: np.ndarray) -> None:
        """Raises UserError for an image that would be cut to other numbers, or that is not finite."""
        what = f"--dataset_name={self.name}: image {index} of {self.split}"
        if not np.can_cast(image.dtype, self.pixels.dtype, "same_kind"):
            raise UserError(
                f"{what} is {image.dtype}, not {self.pixels.dtype}; convert it, or give its ImageDataset a PixelFormat"
            )
        if self.pixels != UINT8 and not np.isfinite(image).all():
            raise UserError(f"{what} holds NaN or infinity; mend it, or leave it out")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How images are found and prepared. Each loader says which of these it uses (utils/data/loaders.py)."""

    data_dir: str | Path | None = None  # of prepared data sets; None: $TFDS_DATA_DIR or ~/tensorflow_datasets
    # Side of the square, or (height, width), to which images are cropped and resized; None: the loader decides.
    image_size: int | str | tuple[int, int] | None = None
    broken_images: str = "refuse"  # or 'skip'
    max_megapixels: float = MAX_MEGAPIXELS  # of the largest image that is decoded
    random_flip: bool | None = None  # whether half of the training images are mirrored; None: the loader decides
    image_mode: str | None = None  # one of decoding.MODES; None: the loader decides
    text_encoder: str | None = None  # of captions, see utils/conditions/text_encoders.py; None: words
    condition_columns: str | None = None  # of a table beside images, which are their conditions; None: classes alone
    value_range: tuple[float, float] | None = None  # of float images, which becomes -1 .. 1; None: it is measured
    check_images: bool = True  # whether every image is decoded once before training
    dataset_weights: tuple[float, ...] | None = None  # shares of joined data sets in an epoch; None: their sizes

    @property
    def size(self) -> Size | None:
        """(height, width) of the images, where `image_size` gives it."""
        return None if self.image_size is None else read_size(self.image_size)


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images and labels in memory."""

    images: Images
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}

    def fingerprint(self) -> Fingerprint:
        """Returns what identifies the arrays: a hash of all of their bytes."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return Fingerprint("arrays", len(self), digest.hexdigest())


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some rows of a source."""

    source: RandomAccess
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.rows[index]]


@runtime_checkable
class ArrayLike(Protocol):
    """An array, or what a file says of one."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_arrays(name: str, images: ArrayLike, labels: ArrayLike | None) -> None:
    """Raises UserError unless images are uint8 (n, h, w, c) or (n, h, w), and labels integers (n,)."""
    if images.dtype != np.uint8 or len(images.shape) not in (3, 4) or 0 in images.shape:
        instead = "; for floats there is column_dataset" if images.dtype.kind == "f" else ""
        raise UserError(
            f"{name}: images must be uint8 (n, h, w, c) or (n, h, w), not {images.dtype} {images.shape}{instead}"
        )
    if labels is not None:
        check_label_array(name, images, labels)


def check_label_array(name: str, images: ArrayLike, labels: ArrayLike) -> None:
    """Raises UserError unless labels are integers (n,), one for each image."""
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise UserError(
            f"{name}: labels must be integers ({images.shape[0]},), one for each image, not {labels.dtype} "
            f"{labels.shape}"
        )


def check_labels(name: str, labels: np.ndarray, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names of the classes (default: "0", "1", ... up to the largest label).

    Raises UserError for labels without a name, and for classes that are all of one name.
    """
    lowest = int(labels.min())
    highest = int(labels.max())
    names = tuple(map(str, range(highest + 1))) if class_names is None else tuple(class_names)
    if len(names) > 1 and len(set(names)) == 1:
        raise UserError(f"{name}: all {len(names)} class names are {names[0]!r}; give each class a name of its own")
    if lowest < 0 or highest >= len(names):
        raise UserError(f"{name}: labels are {lowest} to {highest}, but must be 0 to {len(names) - 1}, one for a class")
    return names


def warn_of_levels(name: str, images: np.ndarray, rows: Sequence[int] | np.ndarray) -> None:
    """Warns where uint8 images use little of 0 .. 255, after a look at some of the `rows`."""
    chosen = images[np.asarray(rows)[:: -(-len(rows) // NUM_SAMPLED)]]
    sampled = chosen.reshape(len(chosen), -1)
    if remark := describe_range(np.stack([sampled.min(axis=1), sampled.max(axis=1)], axis=1)):
        warn_once(f"{name}: {remark}")


def array_dataset(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str] | None = None,
    split: str = "train",
    random_flip: bool = False,
) -> ImageDataset:
    """Returns a split in memory of images uint8 (n, h, w, c) or, of one channel, (n, h, w), and labels (n,).

    `class_names` (default: "0", "1", ... up to the largest label) must be the same for both splits; `split_rows` holds
    out a part of data without a validation split. Only 'train' flips. Raises UserError for any other arrays: of floats,
    `column_dataset` (utils/data/columns.py) makes a data set.
    """
    # Labels and classes.
    check_arrays(name, images, labels)
    names = check_labels(name, labels, class_names)
    if images.ndim == 3:
        images = images[..., None]

    # A source, and the classes of which it has no image.
    source = ArraySource(np.ascontiguousarray(images), np.ascontiguousarray(labels, np.int32))
    _, height, width, channels = images.shape
    is_flipped = random_flip and split == "train"
    empty = find_empty_classes(source.labels, len(names))
    if split == "train":  # a data set is warned of once
        warn_of_levels(name, images, range(len(images)))

    shape = (height, width, channels)
    return ImageDataset(name, split, source, shape, names, is_flipped, source.fingerprint(), empty_classes=empty)


def warn_of_range(dataset: ImageDataset, has_flag: bool = False) -> None:
    """Warns where some of the images, which are floats, leave the range of their format, as no sample does.

    `has_flag`: --value_range sets the range.
    """
    pixels = dataset.pixels
    count = len(dataset.source)
    if pixels == UINT8 or dataset.batch_type is not PixelBatch or isinstance(dataset.source, StreamSource) or not count:
        return
    images = (dataset.row(index, False)["image"] for index in range(0, count, -(-count // NUM_SAMPLED)))
    lows, highs = zip(*((float(image.min()), float(image.max())) for image in images), strict=True)
    lowest = min(lows)
    highest = max(highs)

    # A float32 at the end of the range may lie a rounding beyond it.
    margin = 1e-3 * (pixels.high - pixels.low)
    its_format = "its ImageDataset a PixelFormat of their range"
    if lowest < pixels.low - margin or highest > pixels.high + margin:
        warn_once(
            f"--dataset_name={dataset.name}: values are {lowest:g} to {highest:g}, but their format is {pixels}, "
            f"to which samples are clipped; give {f'--value_range={lowest:g},{highest:g}' if has_flag else its_format}"
        )


def iterable_dataset(
    name: str,
    examples: Iterable[Mapping[str, Any]],
    class_names: Sequence[str] | None = None,
    split: str = "train",
    random_flip: bool = False,
) -> ImageDataset:
    """Returns the `array_dataset` of examples {"image": uint8 (h, w, c), "label": int}, all read into memory here.

    Raises UserError if their images are of several shapes, and where `array_dataset` does.
    """
    # All of them, to be shuffled: an iterable can be read once, in its own order.
    rows = [(np.asarray(example["image"]), example["label"]) for example in examples]
    shapes = {image.shape for image, _ in rows}
    if len(shapes) != 1:
        found = ", ".join(map(str, sorted(shapes)[:3])) or "none"
        raise UserError(f"{name}: images of one shape are needed; there are {found}")
    images, labels = zip(*rows, strict=True)
    return array_dataset(name, np.stack(images), np.asarray(labels), class_names, split, random_flip)


def find_empty_classes(labels: Sequence[int] | Int32[np.ndarray, " n"], num_classes: int) -> tuple[int, ...]:
    """Returns the labels below `num_classes` that do not occur in `labels`."""
    counts = np.bincount(np.asarray(labels, np.int64), minlength=num_classes)
    return tuple(np.flatnonzero(counts[:num_classes] == 0).tolist())


def unlabelled_message(name: str, split: str, num_unlabelled: int, num_images: int) -> str:
    """Returns the message that images without a label are left out, the same for every source."""
    return f"{name}: {num_unlabelled:,} of {num_images:,} images of {split} have no label (-1); they are left out"


def num_held_out(num_images: int) -> int:
    """Returns how many images are held out of a data set without a validation split: one at least."""
    return max(1, round(HELD_OUT_FRACTION * num_images))


def hold_out(keys: Sequence[str], num_held_out: int) -> tuple[list[int], list[int]]:
    """Returns (rows left for training, rows held out), each ascending, chosen by a hash of the keys alone."""
    # Never by a generator, whose numbers may change with its version: a resumed run would train on what was held out.
    digests = b"".join([hashlib.sha256(key.encode()).digest() for key in keys])
    # Sorted as bytes are, by four numbers of 64 bits, the first of which counts most.
    by_hash = np.lexsort(np.frombuffer(digests, ">u8").reshape(-1, 4).T[::-1])
    return sorted(by_hash[num_held_out:].tolist()), sorted(by_hash[:num_held_out].tolist())


def split_rows(num_examples: int, split: str, count: int | None = None) -> list[int]:
    """Returns the rows of `split` in data without a validation split: `count` (default: 2 %) are held out.

    The choice depends on `num_examples` and `count` alone.
    """
    count = num_held_out(num_examples) if count is None else count
    return hold_out([str(row) for row in range(num_examples)], count)[SPLITS.index(split)]


def check_own_size(name: str, image_shape: Sequence[int], options: DataOptions, instead: str = "") -> None:
    """Raises UserError if --image_size is another size than that of the images, (h, w) or (h, w, c).

    `instead` ends the message with another way to get that size.
    """
    height, width = image_shape[:2]
    if options.size is not None and (height, width) != options.size:
        raise UserError(
            f"--image_size={write_size(options.size)}: the images of {name} are {height}x{width}; leave it out{instead}"
        )
