"""Data sets that TensorFlow Datasets prepared: array_record at random and without TensorFlow, tfrecord as a stream."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from utils.base.files import check_regular
from utils.base.messages import UserError, warn_once
from utils.conditions.classes import imagenet_class_names
from utils.data.dataset import DataOptions, Example, ImageDataset, PixelBatch, check_own_size
from utils.data.tfds_files import NUM_SAMPLED, PreparedSplit, import_tensorflow, is_remote, remember
from utils.images.decoding import read_image
from utils.images.pixels import describe_range
from utils.images.sizes import write_size

# Memory of a stream; RecordStream says what they add up to.
SHUFFLE_BYTES = 2**30  # of still encoded images in the buffer from which a stream draws
FILES_AT_A_TIME = 16
READ_BYTES = 2**20  # buffered for each of them


def load_imagenet(name: str, split: str, options: DataOptions, *, size: int) -> ImageDataset:
    """Returns ImageNet as TFDS prepared it, in crops of `size` x `size`, with the English names of its classes."""
    asked = write_size(options.size or (size, size))
    other = f", or use --dataset_name tfds:imagenet2012 --image_size {asked}"
    check_own_size(name, (size, size), options, other)
    dataset = load_tfds(name, split, dataclasses.replace(options, image_size=size), builder="imagenet2012")
    return dataclasses.replace(dataset, class_names=imagenet_class_names())  # TFDS has WordNet ids


def load_celebahq(name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns CelebA-HQ at 256x256, as data/celebahq256.py prepares it."""
    check_own_size(name, (256, 256), options)
    return load_tfds(name, split, options, builder="celebahq256")


def load_tfds(name: str, split: str, options: DataOptions, *, builder: str | None = None) -> ImageDataset:
    """Returns a data set that TFDS prepared. `builder` is its name there; default: what follows the colon of `name`."""
    flag = f"--dataset_name={name}"
    prepared = PreparedSplit(flag, options.data_dir, builder or name.partition(":")[2], split, options.size)
    source = open_split(prepared)
    if split == "train" and (remark := describe_range(find_extremes(prepared, source))):
        warn_once(f"{flag}: {remark}")
    return ImageDataset(
        name=name,
        split=split,
        source=source,
        image_shape=prepared.image_shape,
        class_names=prepared.class_names,
        random_flip=False,
        fingerprint=prepared.fingerprint(),
        empty_classes=prepared.empty_classes,
    )


def open_split(prepared: PreparedSplit) -> "Records | RecordStream":
    """Opens the files of a prepared split. Raises UserError if one of them cannot be read."""
    # Before the libraries open them, which might wait for ever at a named pipe.
    for file in () if is_remote(prepared.folder) else prepared.folder.glob(f"*.{prepared.format}*"):
        try:
            check_regular(file)
        except OSError as error:
            raise UserError(
                f"{prepared.origin} cannot be read ({file.name}: {error.strerror}); bring it back"
            ) from None
    return Records(prepared) if prepared.format == "array_record" else RecordStream(prepared)


def find_extremes(prepared: PreparedSplit, source: "Records | RecordStream") -> UInt8[np.ndarray, "n 2"]:
    """Returns the lowest and the highest value of some of the split's images; kept in the cache folder."""
    count = min(NUM_SAMPLED, len(source))

    def compute() -> np.ndarray:
        # Spread over the split where it can be read at random; the first of a stream.
        if isinstance(source, Records):
            images = (source[i * len(source) // count]["image"] for i in range(count))
        else:
            hosts = {"process_index": 0, "process_count": 1}
            batches = source.epoch_batches(count, 0, count, **hosts, prefetch=1)
            images = (image for batch in batches for image in batch.image)
        return np.array([(image.min(), image.max()) for image in images], np.uint8)

    name = f"range-{prepared.digest(prepared.split, prepared.start, prepared.stop)}"
    return remember(name, (count, 2), np.dtype(np.uint8), compute)


class Records:
    """Source of array_record files, decoded as TFDS's own decoding does (see utils/images/decoding.py)."""

    def __init__(self, prepared: PreparedSplit):
        import tensorflow_datasets as tfds

        self.prepared = prepared
        builder: Any = prepared.builder  # decorators hide its type
        self.records = builder.as_data_source(
            prepared.split,
            decoders={"image": tfds.decode.SkipDecoding()},  # its decoder is Pillow or OpenCV, whichever is installed
            file_format="array_record",
        )

    def __len__(self) -> int:
        return len(self.prepared.rows)

    def __getitem__(self, index: int) -> Example:
        record = self.records[self.prepared.rows[index]]
        # Labels first: nothing is decoded for a refusal.
        _check_labels(record["label"], self.prepared.origin)
        height, width, channels = self.prepared.image_shape
        mode = "L" if channels == 1 else "RGB"
        name = f"image {index} of {self.prepared.origin}"
        image = read_image(record["image"], name, (height, width), mode=mode, as_tfds=True)
        return {"image": image, "label": np.int32(record["label"])}


class RecordStream:
    """A split of tfrecord files, read in sequence through tf.data.

    Memory of `training_batches`: SHUFFLE_BYTES (1 GiB, or the host's part of the split where that is less) of encoded
    images, READ_BYTES for each of FILES_AT_A_TIME files, and decoded images for `prefetch` + 2 batches and one for each
    core; `memory_bound` adds it up. TensorFlow itself takes some 400 MiB.
    """

    def __init__(self, prepared: PreparedSplit):
        self.prepared = prepared
        self.tf = import_tensorflow()

    def __len__(self) -> int:
        return len(self.prepared.rows)

    def training_batches(
        self,
        batch_size: int,
        seed: int,
        random_flip: bool,
        *,
        process_index: int,
        process_count: int,
        prefetch: int,
    ) -> "StreamIterator":
        """Returns endless batches of this host's images, `batch_size` / `process_count` at a time.

        A host reads its own part of the split, each image once an epoch: the files in a new order, FILES_AT_A_TIME
        interleaved, then drawn at random from a buffer of SHUFFLE_BYTES. Order and flips are functions of (seed, epoch,
        place), so that a stream continues exactly, on as many hosts as before, by reading again what the epoch had
        read, without decoding it.
        """
        # This host's part of the split.
        first = len(self) * process_index // process_count
        end = len(self) * (process_index + 1) // process_count
        local_size = batch_size // process_count
        if first == end:
            raise UserError(f"{len(self)} training images cannot be divided over {process_count} processes; use fewer")

        # A position is found by skipping records of its epoch, before they are decoded.
        def start(next_index: int) -> Iterator[dict[str, np.ndarray]]:
            epoch, place = divmod(next_index * local_size, end - first)
            examples = self._shuffled(*self._record_range(first, end), seed, random_flip, epoch).skip(place)
            batches = self._decoded(examples).batch(local_size, drop_remainder=True).prefetch(prefetch)
            return batches.as_numpy_iterator()

        return StreamIterator(start, self.prepared.origin)

    def epoch_batches(
        self,
        batch_size: int,
        start: int,
        stop: int,
        *,
        process_index: int,
        process_count: int,
        prefetch: int,
    ) -> Iterator[PixelBatch]:
        """Yields images start .. stop - 1 of the split in its own order, every `process_count`-th of each batch."""
        if start >= stop:
            return
        files = self._files(*self._record_range(start, stop))
        records = self.tf.data.Dataset.from_tensor_slices(files).flat_map(self._read_file)
        examples = records.shard(process_count, process_index).map(lambda record: (record, False))
        local_size = batch_size // process_count
        batches = iter(self._decoded(examples).batch(local_size).prefetch(prefetch).as_numpy_iterator())
        empty = {"image": np.empty((0, *self.prepared.image_shape), np.uint8), "condition": np.empty(0, np.int32)}

        # As many batches as the other hosts get, the last of which may be empty here.
        for _ in range(start, stop, batch_size):
            with _naming_broken_images(self.prepared.origin):
                batch = next(batches, empty)
            yield _to_batch(batch, self.prepared.origin)

    def memory_bound(self, batch_size: int, prefetch: int = 2, process_count: int = 1) -> int:
        """Returns the bytes that `training_batches` holds at most, beside TensorFlow itself."""
        split_bytes = int(self.prepared.builder.info.splits[self.prepared.split].num_bytes)
        num_decoded = (prefetch + 2) * batch_size // process_count + num_cores()
        encoded = min(SHUFFLE_BYTES, split_bytes // process_count) + FILES_AT_A_TIME * READ_BYTES
        return encoded + num_decoded * int(np.prod(self.prepared.image_shape))

    def _record_range(self, start: int, stop: int) -> tuple[int, int]:
        """Returns (first record, one after the last) of the images start .. stop - 1; records left out count."""
        return int(self.prepared.rows[start]), int(self.prepared.rows[stop - 1]) + 1

    def _files(self, start: int, stop: int):
        """Returns records start .. stop - 1 by file: (paths, how many records to skip, how many to take)."""
        # Files begin and end anywhere in a split: TFDS knows which part of each is meant.
        parts = self.prepared.builder.info.splits[f"{self.prepared.split}[{start}:{stop}]"].file_instructions
        counts = np.array([(part.skip, part.take) for part in parts], np.int64)
        return tuple(map(self.tf.constant, ([str(part.filename) for part in parts], *counts.T)))

    def _read_file(self, path, skip, take):
        records = self.tf.data.TFRecordDataset(path, buffer_size=READ_BYTES).skip(skip).take(take)
        if not self.prepared.is_filtered:
            return records
        # The label alone is parsed: records that are left out are never decoded.
        label = {"label": self.tf.io.FixedLenFeature([], self.tf.int64)}
        return records.filter(lambda record: self.tf.io.parse_single_example(record, label)["label"] >= 0)

    def _shuffled(self, start: int, stop: int, seed: int, random_flip: bool, first_epoch: int):
        """Returns a tf.data Dataset of (serialized example, whether to flip it), epoch after epoch."""
        tf = self.tf
        paths, skips, takes = self._files(start, stop)
        info = self.prepared.builder.info.splits[self.prepared.split]

        # As many encoded images as fit the buffer.
        average = max(1, int(info.num_bytes) // info.num_examples)
        buffer_size = max(1, min(stop - start, SHUFFLE_BYTES // average))

        def read_epoch(epoch):
            # Files in a new order, some of them interleaved. All draws are functions of seed and epoch, and the order
            # does not depend on which file is read faster: an epoch can be read again.
            key = tf.stack([tf.constant(seed, tf.int64), epoch])
            files = tf.random.experimental.stateless_shuffle(tf.range(len(paths)), key)
            records = tf.data.Dataset.from_tensor_slices(files).interleave(
                lambda file: self._read_file(paths[file], skips[file], takes[file]),
                cycle_length=min(FILES_AT_A_TIME, len(paths)),
                num_parallel_calls=min(FILES_AT_A_TIME, len(paths)),
                deterministic=True,
            )

            # Records drawn from the buffer; a flip depends on the place alone.
            draw_seed, flip_seed = tf.unstack(tf.random.stateless_uniform([2], key, None, None, tf.int64))
            records = records.shuffle(buffer_size, seed=draw_seed, reshuffle_each_iteration=False).enumerate()

            def with_flip(place, record):
                chance = tf.random.stateless_uniform([], tf.stack([flip_seed, place]))
                return record, random_flip & (chance < 0.5)

            return records.map(with_flip)

        return tf.data.Dataset.range(first_epoch, 2**53).flat_map(read_epoch)

    def _decoded(self, examples):
        """Returns a Dataset of {'image': uint8 (h, w, c), 'condition': int32} from (serialized example, flip)."""
        import tensorflow_datasets as tfds

        tf = self.tf
        rows, columns, channels = self.prepared.image_shape
        # TFDS gives the bytes of an image: its own decoding would use a less exact transform.
        features = self.prepared.builder.info.features
        skip = {"image": tfds.decode.SkipDecoding()}

        def decode(serialized, flip):
            example = features.deserialize_example(serialized, decoders=skip)
            encoded = example["image"]
            image = tf.cond(
                tf.io.is_jpeg(encoded),
                # The exact transform, like Pillow; TensorFlow's default is up to 5 levels off.
                lambda: tf.io.decode_jpeg(encoded, channels=channels, dct_method="INTEGER_ACCURATE"),
                lambda: tf.io.decode_image(encoded, channels=channels, expand_animations=False),
            )

            # The middle, resized with antialiasing as in `read_image`; TensorFlow returns floats.
            height, width = tf.shape(image)[0], tf.shape(image)[1]
            inner_height = tf.minimum(height, tf.maximum(1, width * rows // columns))
            inner_width = tf.minimum(width, tf.maximum(1, height * columns // rows))
            image = tf.image.crop_to_bounding_box(
                image, (height - inner_height) // 2, (width - inner_width) // 2, inner_height, inner_width
            )
            if self.prepared.builder.info.features["image"].shape[:2] != (rows, columns):
                image = tf.image.resize(image, (rows, columns), antialias=True)
                image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

            # Mirrored last, so that a flipped image is exactly the mirror image of the other.
            image = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
            image = tf.ensure_shape(image, self.prepared.image_shape)
            return {"image": image, "condition": tf.cast(example["label"], tf.int32)}

        return examples.map(decode, num_parallel_calls=num_cores(), deterministic=True)


class StreamIterator:
    """Batches with a position, {'next_index': number of batches taken}, like Grain's iterators."""

    def __init__(self, start: Callable[[int], Iterator[dict[str, np.ndarray]]], origin: str):
        """`start(next_index)` opens the stream at that batch; `origin` names the data in errors."""
        self._start = start
        self._origin = origin
        self.set_state({"next_index": 0})

    def __iter__(self) -> "StreamIterator":
        return self

    def __next__(self) -> PixelBatch:
        if self._batches is None:
            self._batches = self._start(self._next_index)
        with _naming_broken_images(self._origin):
            batch = next(self._batches)
        self._next_index += 1
        return _to_batch(batch, self._origin)

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._next_index = state["next_index"]
        # Opened when asked for: skipping to a position takes time.
        self._batches = None


@contextlib.contextmanager
def _naming_broken_images(origin: str) -> Iterator[None]:
    """Raises UserError for TensorFlow's errors: images that cannot be decoded, files that are cut or gone."""
    try:
        yield
    except import_tensorflow().errors.OpError as error:
        # TensorFlow appends the name of the operation; what is wrong stands before it.
        reason = " ".join(str(error).partition("[Op:")[0].split())[-200:]
        raise UserError(f"an image of {origin} cannot be read: {reason}") from error


def _to_batch(rows: dict[str, Any], origin: str) -> PixelBatch:
    """Returns the batch of what tf.data has batched. Raises the UserError of `_check_labels`."""
    _check_labels(rows["condition"], origin)
    return PixelBatch(**rows)


def _check_labels(labels: Any, origin: str) -> None:
    """Raises UserError for an image without a label, in a set too large to be read through for labels first."""
    if np.min(labels, initial=0) < 0:
        raise UserError(f"an image of {origin} has no label (-1); prepare the set without such images")


def num_cores() -> int:
    return os.cpu_count() or 1
