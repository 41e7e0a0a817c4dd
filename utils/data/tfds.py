"""Data sets that TensorFlow Datasets prepared: array_record at random and without TensorFlow, tfrecord as a stream."""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from utils.data.class_names import imagenet_class_names
from utils.data.dataset import DataOptions, Example, ImageDataset, check_own_size, num_held_out
from utils.data.fingerprint import Fingerprint
from utils.data.images import read_image
from utils.errors import UserError
from utils.files import refuse_url

PACKAGES = "tensorflow-datasets importlib_resources"  # the second is imported by the first, which does not say so
PREPARATIONS = {  # of data sets that TFDS cannot fetch by itself
    "imagenet2012": "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {root}/downloads/manual and run "
    "{command}",
    "celebahq256": "run `python data/celebahq256.py --source korexyz/celeba-hq-256x256 --data_dir {root}`",
}
FEATURE_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.[\w.]+")

SHUFFLE_BYTES = 2**30  # of still encoded images in the buffer from which a stream draws
FILES_AT_A_TIME = 16
READ_BYTES = 2**20  # of each of them


class PreparedSplit:
    """One split of a prepared data set: which images, their shape and the names of their classes."""

    def __init__(self, flag: str, data_dir: str | os.PathLike | None, builder: str, split: str, image_size: int | None):
        """`builder`: NAME, NAME/CONFIG or NAME:1.2.3; `split`: 'train' or 'validation', which is the split `test` of a
        set without one and the first 2 % of a set that has only `train`. UserError, naming `flag`, for what is missing.
        """
        folder, self.format = _find_prepared(flag, data_dir, builder)
        self.folder = folder
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(f"{flag} needs another package ({error}): `pip install {PACKAGES}`") from error
        _check_features(flag, folder)
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
        if "train" not in splits:
            raise UserError(f"{flag}: {folder} has no split train but {', '.join(splits) or 'none'}; prepare it again")
        height, width, channels = image.shape
        size = image_size or (height and width and min(height, width))
        if not size:
            raise UserError(f"{flag}: the images of {builder} are of many sizes; add --image_size 256, for example")
        self.image_shape = (size, size, 1 if channels == 1 else 3)
        self.class_names = tuple(label.names or map(str, range(label.num_classes)))

        own = next((name for name in ("validation", "test") if name in splits), None)
        self.split = own if own and split == "validation" else "train"
        count = splits[self.split].num_examples
        self.start, self.stop = 0, count
        if own is None:  # records are in an order that TFDS has shuffled
            cut = num_held_out(count)
            self.start, self.stop = (0, cut) if split == "validation" else (cut, count)
        if self.stop <= self.start or not count:
            raise UserError(f"{flag}: {folder} holds {count} images, of which none is left to train on; use more")

    def fingerprint(self) -> Fingerprint:
        """Version, shards, sizes and the start of the first file: telling enough, without reading the data set."""
        info = self.builder.info.splits[self.split]
        metadata = [self.builder.info.full_name, self.split, self.start, self.stop, info.shard_lengths, info.num_bytes]
        digest = hashlib.sha256(json.dumps([*map(str, metadata), self.class_names]).encode())
        files = self.folder.glob(f"*-{self.split}.{self.format}*")
        for file in sorted(files, key=str)[:1]:
            with file.open("rb") as content:
                digest.update(content.read(READ_BYTES))
        return Fingerprint(self.format, self.stop - self.start, digest.hexdigest())

    def open(self, flag: str) -> "Records | RecordStream":
        if self.format == "array_record":
            return Records(self)
        try:
            import_tensorflow()
        except ImportError:
            raise UserError(
                f"{flag}: {self.origin} is prepared as tfrecord, which TensorFlow reads: `pip install tensorflow`, or "
                f"add array_record to it where TensorFlow is: {_convert_command(self.builder.data_dir)}"
            ) from None
        return RecordStream(self)


def _check_features(flag: str, folder: epath.Path) -> None:
    """UserError where features.json names a class outside of TFDS's own features: it would import that module."""

    def names(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (str(value[key]) for key in ("pythonClassName", "type") if isinstance(value.get(key), str))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from names(item)

    try:
        content = json.loads((folder / "features.json").read_text())
        other = next((name for name in names(content) if "." in name and not FEATURE_CLASS.fullmatch(name)), None)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {folder}/features.json is damaged ({error}); prepare the data set again") from None
    if other is not None:
        raise UserError(
            f"{flag}: {folder}/features.json names {other[:100]}, which is no feature of TFDS; it is not read"
        )


def _find_prepared(flag: str, data_dir: str | os.PathLike | None, builder: str) -> tuple[epath.Path, str]:
    """(folder of the newest version of `builder`, 'array_record' where it is prepared as that, else 'tfrecord')."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    refuse_url(data_dir, "data_dir")
    root = epath.Path(data_dir).expanduser()
    root = root if "://" in str(root) else root.absolute()
    path, _, version = builder.partition(":")
    try:
        folders = [file.parent for file in (root / path).glob(f"{version or '[0-9]*'}/dataset_info.json")]
    except Exception as error:  # of the network's file systems, which share no type
        raise UserError(f"--data_dir={root} cannot be read: {str(error).splitlines()[0]}") from error
    if not folders:
        how = PREPARATIONS.get(path, "run {command}").format(root=root, command=_prepare_command(builder, root))
        raise UserError(
            f"{flag}: no data set {builder} under --data_dir={root}; {how}. "
            "`make demo` (--dataset_name digits) shows the suite at work now"
        )
    folder = max(folders, key=lambda folder: [int(number) for number in re.findall(r"\d+", folder.name)])
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"{flag}: {folder}/dataset_info.json is damaged ({error}); prepare the data set again"
        ) from None
    known = [name for name in ("array_record", "tfrecord") if name in formats]
    if not known:
        raise UserError(
            f"{flag}: {folder} is prepared as {formats[0]}, which is not read here; add array_record to it: "
            f"{_convert_command(folder)}"
        )
    return folder, known[0]


def _prepare_command(builder: str, root: os.PathLike[str]) -> str:
    # Not `tfds build`, which does not start without apache-beam and mlcroissant.
    return (
        f'`python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{builder}', data_dir='{root}').download_and_prepare(file_format='array_record')\"` "
        "(without the last argument: as tfrecord)"
    )


def _convert_command(folder: Any) -> str:
    return (
        f"`pip install {PACKAGES} apache-beam mlcroissant && "
        f"tfds convert_format --dataset_version_dir {folder} --out_file_format array_record`"
    )


class Records:
    """Source of array_record files, decoded as TFDS's own decoding does (see utils/data/images.py)."""

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
        return self.prepared.stop - self.prepared.start

    def __getitem__(self, index: int) -> Example:
        record = self.records[self.prepared.start + index]
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
        return self.prepared.stop - self.prepared.start

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
        bounds = [
            self.prepared.start + len(self) * host // process_count for host in (process_index, process_index + 1)
        ]
        local_size = batch_size // process_count
        if bounds[0] == bounds[1]:
            raise UserError(f"{len(self)} training images cannot be divided over {process_count} processes; use fewer")

        def start(next_index: int) -> Iterator[dict[str, np.ndarray]]:
            epoch, place = divmod(next_index * local_size, bounds[1] - bounds[0])
            examples = self._shuffled(*bounds, seed, random_flip, epoch).skip(place)
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
        files = self._files(self.prepared.start + start, self.prepared.start + stop)
        records = self.tf.data.Dataset.from_tensor_slices(files).flat_map(self._read_file)
        examples = records.shard(process_count, process_index).map(lambda record: (record, False))
        local_size = batch_size // process_count
        batches = self._decoded(examples).batch(local_size).prefetch(prefetch).as_numpy_iterator()
        empty = {"image": np.empty((0, *self.prepared.image_shape), np.uint8), "label": np.empty(0, np.int32)}
        for _ in range(start, stop, batch_size):
            yield next(batches, empty)

    def memory_bound(self, batch_size: int, prefetch: int = 2, process_count: int = 1) -> int:
        """Bytes that `training_batches` holds at most, beside TensorFlow itself."""
        split_bytes = int(self.prepared.builder.info.splits[self.prepared.split].num_bytes)
        num_decoded = (prefetch + 2) * batch_size // process_count + num_cores()
        encoded = min(SHUFFLE_BYTES, split_bytes // process_count) + FILES_AT_A_TIME * READ_BYTES
        return encoded + num_decoded * int(np.prod(self.prepared.image_shape))

    def _files(self, start: int, stop: int):
        """(paths, numbers of records to leave out, numbers of records to take) that make images start .. stop - 1."""
        parts = self.prepared.builder.info.splits[f"{self.prepared.split}[{start}:{stop}]"].file_instructions
        counts = np.array([(part.skip, part.take) for part in parts], np.int64)
        return tuple(map(self.tf.constant, ([str(part.filename) for part in parts], *counts.T)))

    def _read_file(self, path, skip, take):
        return self.tf.data.TFRecordDataset(path, buffer_size=READ_BYTES).skip(skip).take(take)

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
        """Dataset of {'image': uint8 (size, size, c), 'label': int32} from that of (serialized example, flip)."""
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
            return {"image": image, "label": tf.cast(example["label"], tf.int32)}

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
        try:
            batch = next(self._batches)
        except import_tensorflow().errors.OpError as error:  # of the decoder, or of files that are cut or gone
            reason = " ".join(str(error).partition("[Op:")[0].split())[-200:]
            raise UserError(f"an image of {self._origin} cannot be read: {reason}") from error
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._next_index, self._batches = state["next_index"], None  # opened when asked for


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
    check_own_size(name, size, options, other)
    dataset = load_tfds(name, split, dataclasses.replace(options, image_size=size), builder="imagenet2012", flip=True)
    return dataclasses.replace(dataset, class_names=imagenet_class_names())  # TFDS has WordNet ids


def load_celebahq(name: str, split: str, options: DataOptions) -> ImageDataset:
    check_own_size(name, 256, options)
    return load_tfds(name, split, options, builder="celebahq256")


def load_tfds(
    name: str, split: str, options: DataOptions, *, builder: str | None = None, flip: bool = False
) -> ImageDataset:
    """A data set that TFDS prepared, never flipped unless asked for. `builder`: default, name's NAME."""
    flag = f"--dataset_name={name}"
    prepared = PreparedSplit(flag, options.data_dir, builder or name.removeprefix("tfds:"), split, options.image_size)
    flips = flip and split == "train"
    source, fingerprint = prepared.open(flag), prepared.fingerprint()
    return ImageDataset(name, split, source, prepared.image_shape, prepared.class_names, flips, fingerprint)
