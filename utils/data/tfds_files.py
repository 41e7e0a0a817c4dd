"""Data sets that TensorFlow Datasets prepared: where they are, in which format, and which images a split has."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int32, Int64

from utils.base.external import ArrayHeader, BadFileError, parse_json, read_json, read_npz, read_npz_headers
from utils.base.files import atomic_write, cache_folder
from utils.base.messages import UserError, progress_bar, warn_once
from utils.data.dataset import find_empty_classes, num_held_out, unlabelled_message
from utils.data.fingerprint import Fingerprint
from utils.images.sizes import Size
from utils.storage.urls import refuse_url

PACKAGES = "tensorflow-datasets importlib_resources"  # the second is imported by the first, which does not say so
PREPARATIONS = {  # of data sets that TFDS cannot fetch by itself
    "imagenet2012": "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {root}/downloads/manual and run "
    "{command}",
    "celebahq256": "run `python data/celebahq256.py --source korexyz/celeba-hq-256x256 --data_dir {root}`",
}
KEY_FEATURE = re.compile(r"(^|_)(id|file_?name|path|url|key)$")  # of what stands for the image, and labels nothing
# How much of a split is looked at before training.
MAX_LABELLED_BYTES = 2**29  # of a split that is read through for its labels
RECORDS_AT_A_TIME = 1024  # while labels are read
NUM_SAMPLED = 64  # images of a split, or labels of a larger one, that are looked at before training
FINGERPRINT_BYTES = 2**20  # of a split's first file
FEATURE_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.[\w.]+")


def is_remote(path: os.PathLike | str) -> bool:
    return "://" in os.fspath(path)


def _read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object, from a bucket too. Raises BadFileError or OSError if it is none."""
    return parse_json(path.read_bytes()) if is_remote(path) else read_json(Path(path))


def check_features(flag: str, folder: epath.Path) -> None:
    """Raises UserError if features.json names a class that is not one of TFDS's features: its module would be
    imported."""

    def names(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (str(value[key]) for key in ("pythonClassName", "type") if isinstance(value.get(key), str))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from names(item)

    try:
        content = _read_json(folder / "features.json")
        other = next((name for name in names(content) if "." in name and not FEATURE_CLASS.fullmatch(name)), None)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {folder}/features.json is damaged ({error}); prepare the data set again") from None
    if other is not None:
        raise UserError(
            f"{flag}: {folder}/features.json names {other[:100]}, which is no feature of TFDS; it is not read"
        )


def find_prepared(flag: str, data_dir: str | os.PathLike | None, builder: str) -> tuple[epath.Path, str]:
    """Returns (folder of the newest version of `builder`, 'array_record' if it is prepared as that, else 'tfrecord').

    Raises UserError, naming `flag`, if it is not prepared, or in no format that is read here.
    """
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    refuse_url(data_dir, "data_dir")
    root = epath.Path(data_dir).expanduser()
    root = root if "://" in str(root) else root.absolute()

    # Its versions.
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

    # The newest of them, and in which formats it is.
    folder = max(folders, key=lambda folder: [int(number) for number in re.findall(r"\d+", folder.name)])
    try:
        info = _read_json(folder / "dataset_info.json")
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"{flag}: {folder}/dataset_info.json is damaged ({error}); prepare the data set again"
        ) from None
    known = [name for name in ("array_record", "tfrecord") if name in formats]
    if not known:
        raise UserError(
            f"{flag}: {folder} is prepared as {formats[0]}, which is not read here; add array_record to it: "
            f"{convert_command(folder)}"
        )
    return folder, known[0]


def _prepare_command(builder: str, root: os.PathLike[str]) -> str:
    # Not `tfds build`, which does not start without apache-beam and mlcroissant.
    return (
        f'`python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{builder}', data_dir='{root}').download_and_prepare(file_format='array_record')\"` "
        "(without the last argument: as tfrecord)"
    )


def convert_command(folder: Any) -> str:
    return (
        f"`pip install {PACKAGES} apache-beam mlcroissant && "
        f"tfds convert_format --dataset_version_dir {folder} --out_file_format array_record`"
    )


@functools.cache
def import_tensorflow():
    """Returns TensorFlow, kept off the accelerators, which are JAX's."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # nothing here multiplies, and it announces itself
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


def open_builder(flag: str, folder: epath.Path) -> Any:
    """Opens a prepared data set of labelled images with a training split; warns of its features that are not read.

    Raises UserError, naming `flag`, for any other data set.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{flag} needs another package ({error}): `pip install {PACKAGES}`") from error
    check_features(flag, folder)

    # From the folder, not by name: that needs no builder's code and finds array_record beside another format.
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # of its JSON, its protocol buffers and its features
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{flag}: {folder} is no prepared data set ({reason}); prepare it again") from None

    # An image and its class, and images to train on.
    features = dict(builder.info.features.items())
    splits = builder.info.splits
    image, label = (features.get(key) for key in ("image", "label"))
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        found = ", ".join(features)
        raise UserError(f"{flag}: {folder} has the features {found}; image and a class label are needed")
    if unread := [name for name in features if name not in ("image", "label") and not KEY_FEATURE.search(name)]:
        warn_once(f"{flag}: not read: {', '.join(unread)[:200]}")
    if "train" not in splits:
        found = f"only {', '.join(splits)}" if splits else "and no other"
        raise UserError(f"{flag}: {folder} has no split train, {found}; name a set that has one")
    return builder


class PreparedSplit:
    """One split of a prepared data set: which records are its images, their shape and the names of their classes."""

    def __init__(self, flag: str, data_dir: str | os.PathLike | None, builder: str, split: str, size: Size | None):
        """Finds `split` ('train' or 'validation') of `builder` (NAME, NAME/CONFIG or NAME:1.2.3).

        Of a set without the split 'validation' it is 'test', and of a set that has only 'train' the first 2 % of that.
        Raises UserError, naming `flag`, for what is missing.
        """
        self.folder, self.format = find_prepared(flag, data_dir, builder)
        self.builder = open_builder(flag, self.folder)
        self.origin = f"{self.builder.info.full_name} in {self.folder}"

        # Images and classes.
        features = self.builder.info.features
        height, width, channels = features["image"].shape
        if size is None and height and width:
            size = (min(height, width), min(height, width))
        if not size:
            raise UserError(f"{flag}: the images of {builder} are of many sizes; add --image_size 256, for example")
        self.image_shape = (*size, 1 if channels == 1 else 3)
        self.class_names = tuple(features["label"].names or map(str, range(features["label"].num_classes)))
        if self.format == "tfrecord":
            try:
                import_tensorflow()
            except ImportError:
                raise UserError(
                    f"{flag}: {self.origin} is prepared as tfrecord, which TensorFlow reads: `pip install tensorflow`, "
                    f"or add array_record to it where TensorFlow is: {convert_command(self.builder.data_dir)}"
                ) from None

        # Records of the split.
        own = self._find_validation_split(flag)
        self.split = own if own and split == "validation" else "train"
        rows, labels = self._labelled_rows(flag)
        if own is None:  # records are in an order that TFDS has shuffled
            cut = num_held_out(len(rows))
            rows = rows[:cut] if split == "validation" else rows[cut:]
        if not len(rows):
            count = self.builder.info.splits[self.split].num_examples
            raise UserError(f"{flag}: {self.folder} holds {count} images, of which none is left to train on; use more")
        self.rows = rows  # the numbers of its records
        self.start = int(rows[0])
        self.stop = int(rows[-1]) + 1
        self.empty_classes = () if labels is None else find_empty_classes(labels[rows], len(self.class_names))

    def _find_validation_split(self, flag: str) -> str | None:
        """Returns the set's own split for validation; None if a part of 'train' is to be held out."""
        own = None
        for name in ("validation", "test"):
            if name in self.builder.info.splits and not own:
                # Test images are often published without their labels, as -1.
                if (labels := self._labels(name)).size and (labels < 0).all():
                    warn_once(f"{flag}: no image of its split {name} has a label, so others are used for validation")
                else:
                    own = name
        return own

    def _labelled_rows(self, flag: str) -> tuple[range | Int64[np.ndarray, " n"], Int32[np.ndarray, " records"] | None]:
        """Returns (numbers of the split's records, without those that have no label; the labels of all records).

        Of a split too large to be read through: all records, and None.
        """
        count = self.builder.info.splits[self.split].num_examples
        labels = self._labels(self.split)
        if len(labels) < count or not count:
            return range(count), None

        # With all labels known, bad ones are refused now rather than in an epoch.
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

        return remember(f"labels-{self.digest(split, 0, info.num_examples)}", (count,), np.dtype(np.int32), read)

    def _read_labels(self, split: str) -> Iterator[int]:
        # TensorFlow parses a batch of tfrecord; without it, records are protocol buffers to be parsed one by one.
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
        """Returns what identifies the split: version, shards, sizes and the start of its first file."""
        return Fingerprint(self.format, len(self.rows), self.digest(self.split, self.start, self.stop))

    def digest(self, split: str, start: int, stop: int) -> str:
        # Metadata first, then bytes: the same sizes with other images differ in them.
        info = self.builder.info.splits[split]
        metadata = [self.builder.info.full_name, split, start, stop, info.shard_lengths, info.num_bytes]
        digest = hashlib.sha256(json.dumps([*map(str, metadata), self.class_names]).encode())
        files = self.folder.glob(f"*-{split}.{self.format}*")
        for file in sorted(files, key=str)[:1]:
            with file.open("rb") as content:
                digest.update(content.read(FINGERPRINT_BYTES))
        return digest.hexdigest()


def remember(name: str, shape: tuple[int, ...], dtype: np.dtype, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the array that the cache folder keeps under `name`, or else computes and keeps it.

    A kept array of another shape or dtype is replaced.
    """
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
