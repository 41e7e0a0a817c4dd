"""Data sets that TensorFlow Datasets prepared: array_record at random and without TensorFlow, tfrecord as a stream."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from utils.base.console import progress_bar, warn_once
from utils.base.errors import UserError
from utils.base.external import ArrayHeader, BadFileError, read_npz, read_npz_headers
from utils.base.files import atomic_write, cache_folder, check_regular
from utils.data.class_names import imagenet_class_names
from utils.data.dataset import (
    DataOptions,
    Example,
    ImageDataset,
    check_own_size,
    find_empty_classes,
    num_held_out,
    unlabelled_message,
)
from utils.data.fingerprint import Fingerprint
from utils.data.tfds_files import PACKAGES, check_features, convert_command, find_prepared, is_remote
from utils.images.decoding import describe_range, read_image

SHUFFLE_BYTES = 2**30  # of still encoded images in the buffer from which a stream draws
FILES_AT_A_TIME = 16
READ_BYTES = 2**20  # of each of them
KEY_FEATURE = re.compile(r"(^|_)(id|file_?name|path|url|key)$")  # of what stands for the image, and labels nothing
MAX_LABELLED_BYTES = 2**29  # of a split that is read through for its labels
RECORDS_AT_A_TIME = 1024  # while labels are read
NUM_SAMPLED = 64  # images of a split, or labels of a larger one, that are looked at before training


class PreparedSplit:
    """One split of a prepared data set: which images, their shape and the names of their classes."""

    def __init__(self, flag: str, data_dir: str | os.PathLike | None, builder: str, split: str, image_size: int | None):
        """`builder`: NAME, NAME/CONFIG or NAME:1.2.3; `split`: 'train' or 'validation', which is the split `test` of a
        set without one and the first 2 % of a set that has only `train`. UserError, naming `flag`, for what is missing.
        """
        folder, self.format = find_prepared(flag, data_dir, builder)
        self.folder = folder
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(f"{flag} needs another package ({error}): `pip install {PACKAGES}`") from error
        check_features(flag, folder)
        # From the folder, not by name: that needs no builder's code and finds array_record beside another format.
        try:
            self.builder = tfds.builder_from_directory(folder)
        except Exception as error:  # of its JSON, its protocol buffers and its features
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{flag}: {folder} is no prepared data set ({reason}); prepare it again") from None
        self.origin = f"{self.builder.info.full_name} in {folder}"
        features, splits = dict(self.builder.info.features.items()), self.builder.info.splits
        image, label = (features.get(key) for key in ("image", "label"))
        if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
            found = ", ".join(features)
            raise UserError(f"{flag}: {folder} has the features {found}; image and a class label are needed")
        if unread := [name for name in features if name not in ("image", "label") and not KEY_FEATURE.search(name)]:
            warn_once(f"{flag}: not read: {', '.join(unread)[:200]}")
        if "train" not in splits:
            found = f"only {', '.join(splits)}" if splits else "and no other"
            raise UserError(f"{flag}: {folder} has no split train, {found}; name a set that has one")
        height, width, channels = image.shape
        size = image_size or (height and width and min(height, width))
        if not size:
            raise UserError(f"{flag}: the images of {builder} are of many sizes; add --image_size 256, for example")
        self.image_shape = (size, size, 1 if channels == 1 else 3)
        self.class_names = tuple(label.names or map(str, range(label.num_classes)))
        if self.format == "tfrecord":
            try:
                import_tensorflow()
            except ImportError:
                raise UserError(
                    f"{flag}: {self.origin} is prepared as tfrecord, which TensorFlow reads: `pip install tensorflow`, "
                    f"or add array_record to it where TensorFlow is: {convert_command(self.builder.data_dir)}"
                ) from None

        own = None
        for name in ("validation", "test"):
            if name in splits and not own:
                if (labels := self._labels(name)).size and (labels < 0).all():
                    warn_once(f"{flag}: no image of its split {name} has a label, so others are used for validation")
                else:
                    own = name
        self.split = own if own and split == "validation" else "train"
        rows, labels = self._labelled_rows(flag)
        if own is None:  # records are in an order that TFDS has shuffled
            cut = num_held_out(len(rows))
            rows = rows[:cut] if split == "validation" else rows[cut:]
        if not len(rows):
            count = splits[self.split].num_examples
            raise UserError(f"{flag}: {folder} holds {count} images, of which none is left to train on; use more")
        self.rows = rows  # the numbers of its records
        self.start, self.stop = int(rows[0]), int(rows[-1]) + 1
        self.empty_classes = () if labels is None else find_empty_classes(labels[rows], len(self.class_names))

    def _labelled_rows(self, flag: str) -> tuple[range | Int64[np.ndarray, " n"], Int32[np.ndarray, " records"] | None]:
        """(numbers of the split's records, without those that have no label; the labels of all records).

        Of a split too large to be read through: all records, and None.
        """
        count, labels = self.builder.info.splits[self.split].num_examples, self._labels(self.split)
        if len(labels) < count or not count:
            return range(count), None
        rows = np.flatnonzero(labels >= 0)
        if not rows.size:
            raise UserError(f"{flag}: no image of its split {self.split} has a label; prepare a set that has labels")
        if labels.max() >= len(self.class_names):
            raise UserError(
                f"{flag}: {self.origin} has the label {labels.max()}, but {len(self.class_names)} classes; prepare it "
                "again"
            )
        if rows.size == count:
            return range(count), labels
        warn_once(unlabelled_message(flag, self.split, count - rows.size, count))
        return rows, labels

    @property
    def is_filtered(self) -> bool:
        """Whether records between the first and the last of the split are left out."""
        return len(self.rows) < self.stop - self.start

    def _labels(self, split: str) -> Int32[np.ndarray, " n"]:
        """Returns the labels of a split in its order, -1 for none; of a large split, the first alone.

        They are read once, without decoding an image, and kept in the cache folder.
        """
        info = self.builder.info.splits[split]
        is_large = info.num_bytes > MAX_LABELLED_BYTES
        count = min(NUM_SAMPLED, info.num_examples) if is_large else info.num_examples
        if not count:
            return np.empty(0, np.int32)

        def read() -> np.ndarray:
            labels = itertools.islice(self._read_labels(split), count)
            bar = progress_bar(labels, f"reading the labels of {split}, once", count, unit="image", delay=5)
            try:
                return np.fromiter(bar, np.int32)
            except Exception as error:  # of both libraries' readers, which share no type
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"the labels of {self.origin} cannot be read ({reason}); prepare it again") from None

        return _remember(f"labels-{self._digest(split, 0, info.num_examples)}", (count,), np.dtype(np.int32), read)

    def _read_labels(self, split: str) -> Iterator[int]:
        if self.format == "tfrecord":
            tf = import_tensorflow()
            parts = self.builder.info.splits[split].file_instructions
            records = tf.data.TFRecordDataset([str(part.filename) for part in parts])
            label = {"label": tf.io.FixedLenFeature([], tf.int64)}
            for batch in records.batch(RECORDS_AT_A_TIME).as_numpy_iterator():
                yield from tf.io.parse_example(batch, label)["label"].numpy().tolist()
            return
        from tensorflow_datasets.core.decode import DeserializeMethod
        from tensorflow_datasets.proto import tf_example_pb2

        builder: Any = self.builder  # decorators hide its type
        messages: Any = tf_example_pb2  # made when it is imported
        records = builder.as_data_source(
            split, file_format="array_record", deserialize_method=DeserializeMethod.RAW_BYTES
        )
        for start in range(0, len(records), RECORDS_AT_A_TIME):
            for record in records.__getitems__(range(start, min(start + RECORDS_AT_A_TIME, len(records)))):
                yield messages.Example.FromString(record).features.feature["label"].int64_list.value[0]

    def fingerprint(self) -> Fingerprint:
        """Version, shards, sizes and the start of the first file: telling enough, without reading the data set."""
        return Fingerprint(self.format, len(self.rows), self._digest(self.split, self.start, self.stop))

    def extremes(self, source: "Records | RecordStream") -> UInt8[np.ndarray, "n 2"]:
        """Returns the lowest and the highest value of some of the split's images."""
        count = min(NUM_SAMPLED, len(source))

        def compute() -> np.ndarray:
            if isinstance(source, Records):
                images = (source[i * len(source) // count]["image"] for i in range(count))
            else:
                hosts = {"process_index": 0, "process_count": 1}
                batches = source.epoch_batches(count, 0, count, **hosts, prefetch=1)
                images = (image for batch in batches for image in batch["image"])
            return np.array([(image.min(), image.max()) for image in images], np.uint8)

        name = f"range-{self._digest(self.split, self.start, self.stop)}"
        return _remember(name, (count, 2), np.dtype(np.uint8), compute)

    def _digest(self, split: str, start: int, stop: int) -> str:
        info = self.builder.info.splits[split]
        metadata = [self.builder.info.full_name, split, start, stop, info.shard_lengths, info.num_bytes]
        digest = hashlib.sha256(json.dumps([*map(str, metadata), self.class_names]).encode())
        files = self.folder.glob(f"*-{split}.{self.format}*")
        for file in sorted(files, key=str)[:1]:
            with file.open("rb") as content:
                digest.update(content.read(READ_BYTES))
        return digest.hexdigest()

    def open(self) -> "Records | RecordStream":
        for file in () if is_remote(self.folder) else self.folder.glob(f"*.{self.format}*"):
            try:
                check_regular(file)
            except OSError as error:
                raise UserError(
                    f"{self.origin} cannot be read ({file.name}: {error.strerror}); bring it back"
                ) from None
        return Records(self) if self.format == "array_record" else RecordStream(self)


def _remember(name: str, shape: tuple[int, ...], dtype: np.dtype, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the array that the cache folder keeps under `name`; where there is none of this shape and dtype, what
    `compute` returns, and keeps it."""
    path = cache_folder() / f"{name}.npz"
    try:
        headers = read_npz_headers(path)
        if headers["values"] == ArrayHeader(shape, False, dtype):
            return read_npz(path, headers)["values"]
    except (BadFileError, KeyError):
        pass
    values = compute()
    with contextlib.suppress(OSError):  # what cannot be kept is computed again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, values=values)
    return values


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
        _check_labels(record["label"], self.prepared.origin)
        size, _, channels = self.prepared.image_shape
        mode = "L" if channels == 1 else "RGB"
        image = read_image(record["image"], f"image {index} of {self.prepared.origin}", size, mode=mode, as_tfds=True)
        return {"image": image, "label": np.int32(record["label"])}


class RecordStream:
    """A split of tfrecord files, read in sequence through tf.data.

    Memory of `training_batches`: SHUFFLE_BYTES (1 GiB, or the host's part of the split where that is less) of encoded
    images, READ_BYTES for each of FILES_AT_A_TIME files, and decoded images for `prefetch` + 2 batches and one for each
    core; `memory_bound` adds it up. TensorFlow itself takes some 400 MiB.
    """

    def __init__(self, prepared: PreparedSplit):
        self.prepared, self.tf = prepared, import_tensorflow()

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
        """Endless batches of this host's images, `batch_size` / `process_count` at a time.

        A host reads its own part of the split, each image once an epoch: the files in a new order, FILES_AT_A_TIME
        interleaved, then drawn at random from a buffer of SHUFFLE_BYTES. Order and flips are functions of (seed, epoch,
        place), so that a stream continues exactly, on as many hosts as before, by reading again what the epoch had
        read, without decoding it.
        """
        first, end = (len(self) * host // process_count for host in (process_index, process_index + 1))
        local_size = batch_size // process_count
        if first == end:
            raise UserError(f"{len(self)} training images cannot be divided over {process_count} processes; use fewer")

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
    ) -> Iterator[dict[str, np.ndarray]]:
        """Images start .. stop - 1 of the split in its own order, every `process_count`-th of each batch."""
        if start >= stop:
            return
        files = self._files(*self._record_range(start, stop))
        records = self.tf.data.Dataset.from_tensor_slices(files).flat_map(self._read_file)
        examples = records.shard(process_count, process_index).map(lambda record: (record, False))
        local_size = batch_size // process_count
        batches = iter(self._decoded(examples).batch(local_size).prefetch(prefetch).as_numpy_iterator())
        empty = {"image": np.empty((0, *self.prepared.image_shape), np.uint8), "condition": np.empty(0, np.int32)}
        for _ in range(start, stop, batch_size):
            with _naming_broken_images(self.prepared.origin):
                batch = next(batches, empty)
            _check_labels(batch["condition"], self.prepared.origin)
            yield batch

    def memory_bound(self, batch_size: int, prefetch: int = 2, process_count: int = 1) -> int:
        """Bytes that `training_batches` holds at most, beside TensorFlow itself."""
        split_bytes = int(self.prepared.builder.info.splits[self.prepared.split].num_bytes)
        num_decoded = (prefetch + 2) * batch_size // process_count + num_cores()
        encoded = min(SHUFFLE_BYTES, split_bytes // process_count) + FILES_AT_A_TIME * READ_BYTES
        return encoded + num_decoded * int(np.prod(self.prepared.image_shape))

    def _record_range(self, start: int, stop: int) -> tuple[int, int]:
        """(first record, one after the last) of the images start .. stop - 1, among those left out."""
        return int(self.prepared.rows[start]), int(self.prepared.rows[stop - 1]) + 1

    def _files(self, start: int, stop: int):
        """(paths, numbers of records to leave out, numbers of records to take) that make records start .. stop - 1."""
        parts = self.prepared.builder.info.splits[f"{self.prepared.split}[{start}:{stop}]"].file_instructions
        counts = np.array([(part.skip, part.take) for part in parts], np.int64)
        return tuple(map(self.tf.constant, ([str(part.filename) for part in parts], *counts.T)))

    def _read_file(self, path, skip, take):
        records = self.tf.data.TFRecordDataset(path, buffer_size=READ_BYTES).skip(skip).take(take)
        if not self.prepared.is_filtered:
            return records
        label = {"label": self.tf.io.FixedLenFeature([], self.tf.int64)}
        return records.filter(lambda record: self.tf.io.parse_single_example(record, label)["label"] >= 0)

    def _shuffled(self, start: int, stop: int, seed: int, random_flip: bool, first_epoch: int):
        """Dataset of (serialized example, whether to flip it), epoch after epoch."""
        tf = self.tf
        paths, skips, takes = self._files(start, stop)
        info = self.prepared.builder.info.splits[self.prepared.split]
        average = max(1, int(info.num_bytes) // info.num_examples)
        buffer_size = max(1, min(stop - start, SHUFFLE_BYTES // average))

        def read_epoch(epoch):
            key = tf.stack([tf.constant(seed, tf.int64), epoch])
            files = tf.random.experimental.stateless_shuffle(tf.range(len(paths)), key)
            records = tf.data.Dataset.from_tensor_slices(files).interleave(
                lambda file: self._read_file(paths[file], skips[file], takes[file]),
                cycle_length=min(FILES_AT_A_TIME, len(paths)),
                num_parallel_calls=min(FILES_AT_A_TIME, len(paths)),
                deterministic=True,
            )
            draw_seed, flip_seed = tf.unstack(tf.random.stateless_uniform([2], key, None, None, tf.int64))
            records = records.shuffle(buffer_size, seed=draw_seed, reshuffle_each_iteration=False).enumerate()

            def with_flip(place, record):
                chance = tf.random.stateless_uniform([], tf.stack([flip_seed, place]))
                return record, random_flip & (chance < 0.5)

            return records.map(with_flip)

        return tf.data.Dataset.range(first_epoch, 2**53).flat_map(read_epoch)

    def _decoded(self, examples):
        """Dataset of {'image': uint8 (size, size, c), 'condition': int32} from that of (serialized example, flip)."""
        import tensorflow_datasets as tfds

        tf = self.tf
        size, _, channels = self.prepared.image_shape
        features, skip = self.prepared.builder.info.features, {"image": tfds.decode.SkipDecoding()}

        def decode(serialized, flip):
            example = features.deserialize_example(serialized, decoders=skip)
            encoded = example["image"]
            image = tf.cond(
                tf.io.is_jpeg(encoded),
                # The exact transform, as Pillow has it; TensorFlow's default is up to 5 levels off.
                lambda: tf.io.decode_jpeg(encoded, channels=channels, dct_method="INTEGER_ACCURATE"),
                lambda: tf.io.decode_image(encoded, channels=channels, expand_animations=False),
            )
            height, width = tf.shape(image)[0], tf.shape(image)[1]
            side = tf.minimum(height, width)
            image = tf.image.crop_to_bounding_box(image, (height - side) // 2, (width - side) // 2, side, side)
            if self.prepared.builder.info.features["image"].shape[:2] != (size, size):
                image = tf.image.resize(image, (size, size), antialias=True)
                image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
            image = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
            image = tf.ensure_shape(image, self.prepared.image_shape)
            return {"image": image, "condition": tf.cast(example["label"], tf.int32)}

        return examples.map(decode, num_parallel_calls=num_cores(), deterministic=True)


class StreamIterator:
    """Batches with a position, {'next_index': number of batches taken}, as Grain's iterators have it."""

    def __init__(self, start: Callable[[int], Iterator[dict[str, np.ndarray]]], origin: str):
        """`start(next_index)` -> the stream from that batch on; `origin`: what it is of, for errors."""
        self._start, self._origin = start, origin
        self.set_state({"next_index": 0})

    def __iter__(self) -> "StreamIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._batches is None:
            self._batches = self._start(self._next_index)
        with _naming_broken_images(self._origin):
            batch = next(self._batches)
        _check_labels(batch["condition"], self._origin)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._next_index, self._batches = state["next_index"], None  # opened when asked for


@contextlib.contextmanager
def _naming_broken_images(origin: str) -> Iterator[None]:
    """UserError for what TensorFlow raises where images cannot be decoded, or files are cut or gone."""
    try:
        yield
    except import_tensorflow().errors.OpError as error:
        reason = " ".join(str(error).partition("[Op:")[0].split())[-200:]
        raise UserError(f"an image of {origin} cannot be read: {reason}") from error


def _check_labels(labels: Any, origin: str) -> None:
    """UserError for an image without a label in a set too large to have been read through for them."""
    if np.min(labels, initial=0) < 0:
        raise UserError(f"an image of {origin} has no label (-1); prepare the set without such images")


def num_cores() -> int:
    return os.cpu_count() or 1


@functools.cache
def import_tensorflow():
    """TensorFlow, kept off the accelerators, which are JAX's."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # nothing here multiplies, and it announces itself
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


def load_imagenet(name: str, split: str, options: DataOptions, *, size: int) -> ImageDataset:
    other = f", or use --dataset_name tfds:imagenet2012 --image_size {options.image_size}"
    check_own_size(name, (size, size), options, other)
    dataset = load_tfds(name, split, dataclasses.replace(options, image_size=size), builder="imagenet2012")
    return dataclasses.replace(dataset, class_names=imagenet_class_names())  # TFDS has WordNet ids


def load_celebahq(name: str, split: str, options: DataOptions) -> ImageDataset:
    check_own_size(name, (256, 256), options)
    return load_tfds(name, split, options, builder="celebahq256")


def load_tfds(name: str, split: str, options: DataOptions, *, builder: str | None = None) -> ImageDataset:
    """A data set that TFDS prepared. `builder`: default, name's NAME."""
    flag = f"--dataset_name={name}"
    prepared = PreparedSplit(flag, options.data_dir, builder or name.removeprefix("tfds:"), split, options.image_size)
    source = prepared.open()
    if split == "train" and (remark := describe_range(prepared.extremes(source))):
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
