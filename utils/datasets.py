"""Image data sets: uint8 images and their labels by number, and batches of them in training or reading order.

A source has `len(source)` and `source[i] -> {"image": uint8 (h, w, c), "label": int32}`, its images all of one shape.
Whatever a data set is read from ends there: shuffling, flips, hosts and resuming are the same code for all of them.
"""

import dataclasses
import difflib
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import grain
import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageOps

from utils.errors import UserError

Example = dict[str, np.ndarray]  # "image": uint8 (h, w, c); "label": int32 ()
Batch = dict[str, np.ndarray]  # "image": uint8 (b, h, w, c); "label": int32 (b,)

HELD_OUT_SHARE = 0.02  # of a data set that brings no validation split
FOLDER_SIZE = 256
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGENET_LABELS = Path(__file__).resolve().parents[1] / "data" / "imagenet_labels.txt"
TFDS_PACKAGES = "tensorflow-datasets importlib_resources"  # the second is imported by the first, which does not say so
PREPARATIONS = {  # of data sets that TFDS cannot fetch by itself
    "imagenet2012": "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {root}/downloads/manual and run "
    "{command}",
    "celebahq256": "TFDS cannot make it: prepare one of that name there, with the features image (256, 256, 3) and "
    "label, the splits train and validation, and file_format='array_record'",
}


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """One split of a data set; its images are uint8 of one shape, its labels 0 .. num_classes - 1."""

    name: str
    split: str  # 'train' or 'validation'
    source: Source
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]  # in label order
    random_flip: bool  # whether training batches mirror half of the images left to right

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def training_batches(
    dataset: ImageDataset,
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    prefetch: int = 2,
) -> grain.DatasetIterator[Batch]:
    """Endless shuffled batches {'image': uint8 (b, h, w, c), 'label': int32 (b,)}, b = batch_size / process_count.

    Every epoch is a new order that has each image exactly once; batches run on across its end. Order and flips are
    functions of (seed, position in the endless stream) alone. Host `process_index` gets its part of each global batch,
    so that the k-th batches of all hosts, one after the other, are the k-th batch of a single host.

    `get_state()` is {'next_index': number of batches taken}, the same on every host; after `set_state` of it the
    stream goes on exactly. `num_threads` read images (default: a thread per core, 32 at most), up to `prefetch`
    batches ahead; prefetch=0 reads when asked. What a thread raises, `next` raises.
    UserError where batch_size does not divide over the hosts or the seed is negative.
    """
    _check_batch_size(batch_size, process_count)
    if seed < 0:
        raise UserError(f"--seed={seed} is negative; use 0, for example")
    num_images, local_size = len(dataset.source), batch_size // process_count

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
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    prefetch: int = 2,
) -> grain.DatasetIterator[Batch]:
    """The split once, in its own order and unflipped; batches as `training_batches` has them, the last may be short.

    Hosts see disjoint images that are together the whole split, in equally many batches, so that they can take them
    in step: of a short last batch a host may get no rows. UserError where batch_size does not divide over the hosts.
    """
    _check_batch_size(batch_size, process_count)
    num_images = len(dataset.source)
    reader = _BatchReader(dataset, num_threads)

    def read(first: int) -> Batch:
        indices = range(first + process_index, min(first + batch_size, num_images), process_count)
        return reader(indices, [False] * len(indices))

    return _in_order(grain.MapDataset.range(0, num_images, batch_size).map(read), prefetch)


def first_examples(dataset: ImageDataset, num_examples: int) -> ImageDataset:
    """The data set cut to its first `num_examples` images (all, if it has fewer), never flipped: to be overfitted."""
    rows = range(min(num_examples, len(dataset.source)))
    return dataclasses.replace(dataset, source=_Subset(dataset.source, rows), random_flip=False)


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
        images = np.empty((len(indices), *self.dataset.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)

        def fill(rows: range) -> None:
            for row in rows:
                example = self.dataset.source[int(indices[row])]
                images[row] = example["image"][:, ::-1] if flips[row] else example["image"]
                labels[row] = example["label"]

        # Some pieces for every thread evens out slow images; single rows would cost more than a small image itself.
        piece = max(1, len(indices) // (4 * self.num_threads))
        pieces = [range(row, min(row + piece, len(indices))) for row in range(0, len(indices), piece)]
        for _ in self.pool.map(fill, pieces):
            pass
        return {"image": images, "label": labels}


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


@dataclasses.dataclass(frozen=True)
class _Files:
    """Image files, turned upright and brought to RGB of `size` x `size`."""

    files: Sequence[tuple[Path, int]]  # and their labels
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path, label = self.files[index]
        return {"image": _read_image(path, str(path), "RGB", self.size, upright=True), "label": np.int32(label)}


@dataclasses.dataclass(frozen=True)
class _Records:
    """TFDS records that hold encoded images. Their EXIF orientation is left alone, as TFDS's own decoding leaves it."""

    records: Sequence[dict]
    mode: str
    size: int
    origin: str  # for errors

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        name = f"image {index} of {self.origin}"
        image = _read_image(io.BytesIO(record["image"]), name, self.mode, self.size, upright=False)
        return {"image": image, "label": np.int32(record["label"])}


def _read_image(file: Path | io.BytesIO, name: str, mode: str, size: int, *, upright: bool) -> np.ndarray:
    """uint8 (size, size, c): the middle square of an encoded image, resized. `mode` is Pillow's 'RGB' or 'L' (c = 1).

    Antialiased bilinear interpolation. UserError, naming the image, where it cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            image.load()
            image = _to_mode(ImageOps.exif_transpose(image) if upright else image, mode)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more on broken files
        raise UserError(f"{name} is not a readable image ({error}); replace or remove it") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, -1)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        levels = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.clip(np.round(levels), 0, 255).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:  # on white, as a page shows it; the colours below are arbitrary
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _held_out(keys: Sequence[str], num_held_out: int) -> tuple[list[int], list[int]]:
    """(rows left for training, rows held out), each ascending. Which ones depends on the keys alone, for ever."""
    by_hash = sorted(range(len(keys)), key=lambda row: hashlib.sha256(keys[row].encode()).digest())
    return sorted(by_hash[num_held_out:]), sorted(by_hash[:num_held_out])


def _num_held_out(num_images: int) -> int:
    return max(1, round(HELD_OUT_SHARE * num_images))


def load_dataset(
    name: str, split: str = "train", data_dir: str | Path | None = None, image_size: int | None = None
) -> ImageDataset:
    """The `split` ('train' or 'validation') of data set `name`; only 'train' ever flips.

    digits          1,797 real handwritten digits, 8x8, grey, shipped with scikit-learn
    imagenet256     ImageNet in square crops; imagenet128 likewise
    celebahq256     CelebA-HQ, 256x256
    tfds:NAME       any labelled images of TensorFlow Datasets, such as tfds:cifar10
    folder:PATH     image files, in a folder for each class or in one folder

    All but digits and folder:PATH are read from what TFDS prepared as array_record under `data_dir` (default:
    $TFDS_DATA_DIR or ~/tensorflow_datasets); TensorFlow itself is not needed. `image_size` is the side to which
    folder:PATH (default 256) and tfds:NAME (default: the images' own) are cropped and resized.
    UserError, with what to do, where the data are missing or the name is unknown.
    """
    if split not in ("train", "validation"):
        raise UserError(f"--split={split} is unknown; use train or validation")
    if name in DATASETS:
        return DATASETS[name](name, split, data_dir, image_size)
    prefix, colon, rest = name.partition(":")
    if colon and prefix in PREFIXES and rest:
        return PREFIXES[prefix](name, split, data_dir, image_size)
    raise UserError(_unknown_name(name))


def _unknown_name(name: str) -> str:
    placeholders = {"folder": "PATH", "tfds": "NAME"}
    known = [*sorted(DATASETS), *(f"{prefix}:{placeholders[prefix]}" for prefix in PREFIXES)]
    if Path(name).expanduser().is_dir():
        guess = [f"folder:{name}"]
    else:
        guess = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {guess[0]}?" if guess else "."
    return f"--dataset_name={name} is unknown{hint} Known are {', '.join(known)}"


def _check_own_size(name: str, own: int, image_size: int | None, instead: str) -> None:
    if image_size not in (None, own):
        raise UserError(f"--image_size={image_size}: the images of {name} are {own}x{own}; leave it out{instead}")


def _load_digits(name: str, split: str, data_dir: str | Path | None, image_size: int | None) -> ImageDataset:
    from sklearn.datasets import load_digits

    _check_own_size(name, 8, image_size, "")
    digits = load_digits()  # 16 levels of ink, 0 .. 16
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train, validation = _held_out([str(row) for row in range(len(images))], 297)
    rows = {"train": train, "validation": validation}[split]
    source = _Arrays(images[rows], digits.target[rows].astype(np.int32))
    return ImageDataset(name, split, source, (8, 8, 1), tuple("0123456789"), random_flip=False)


def _load_folder(name: str, split: str, data_dir: str | Path | None, image_size: int | None) -> ImageDataset:
    root = Path(name.removeprefix("folder:")).expanduser()
    if not root.is_dir():
        raise UserError(f"--dataset_name={name}: there is no folder {root}; {_layout(root)}")
    train, validation = _find_splits(root)
    class_names, files = _list_images(train, root)
    if validation is None:
        if len(files) < 2:
            raise UserError(f"--dataset_name={name}: {train} holds 1 image; 2 are needed, one of them to hold out")
        keys = [path.relative_to(train).as_posix() for path, _ in files]
        rows = _held_out(keys, _num_held_out(len(files)))[split == "validation"]
        files = [files[row] for row in rows]
    elif split == "validation":
        names, files = _list_images(validation, root)
        unknown = sorted(set(names) - set(class_names))
        if unknown:
            raise UserError(
                f"--dataset_name={name}: {validation} has a class {unknown[0]!r} that {train} lacks; remove it"
            )
        files = [(path, class_names.index(names[label])) for path, label in files]
    size = image_size or FOLDER_SIZE
    return ImageDataset(name, split, _Files(files, size), (size, size, 3), class_names, split == "train")


def _find_splits(root: Path) -> tuple[Path, Path | None]:
    """(folder of the training split, folder of the validation split or None where it is to be held out)."""
    names = [subfolder.name for subfolder in _scan(root)[1]]
    validation = next((root / name for name in ("validation", "val") if name in names), None)
    # Beside other folders and without a validation split, `train` is a class: pictures of trains.
    if "train" in names and (validation or set(names) <= {"train", "test"}):
        return root / "train", validation
    return root, None


def _layout(root: Path) -> str:
    suffixes = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    return f"expected are {root}/CLASS/IMAGE or {root}/IMAGE (or the same below {root}/train), images being {suffixes}"


def _list_images(folder: Path, root: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """(class names, images with their labels) of one split, sorted by name: a folder for each class, or one class."""
    flag = f"--dataset_name=folder:{root}"
    images, subfolders = _scan(folder)
    classes = {subfolder: _scan(subfolder)[0] for subfolder in subfolders}
    if not any(classes.values()):
        if not images:
            raise UserError(f"{flag}: {folder} holds no images; {_layout(root)}")
        return (root.resolve().name,), [(path, 0) for path in images]
    if images:
        raise UserError(f"{flag}: {folder} holds {images[0].name} beside folders of classes; move it into one of them")
    for subfolder, found in classes.items():
        if not found:
            raise UserError(f"{flag}: the folder {subfolder} of a class holds no images; {_layout(root)}")
    files = [(path, label) for label, found in enumerate(classes.values()) for path in found]
    return tuple(subfolder.name for subfolder in classes), files


def _scan(folder: Path) -> tuple[list[Path], list[Path]]:
    """(images, subfolders) directly in a folder, sorted by name, hidden ones left out."""
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    images = [Path(entry.path) for entry in visible if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()]
    return images, [Path(entry.path) for entry in visible if entry.is_dir()]


def _load_imagenet(
    name: str, split: str, data_dir: str | Path | None, image_size: int | None, *, size: int
) -> ImageDataset:
    _check_own_size(name, size, image_size, f", or use --dataset_name tfds:imagenet2012 --image_size {image_size}")
    dataset = _load_tfds(name, split, data_dir, size, builder="imagenet2012")
    class_names = tuple(IMAGENET_LABELS.read_text(encoding="utf-8").splitlines())  # TFDS has WordNet ids
    return dataclasses.replace(dataset, class_names=class_names, random_flip=split == "train")


def _load_celebahq(name: str, split: str, data_dir: str | Path | None, image_size: int | None) -> ImageDataset:
    _check_own_size(name, 256, image_size, "")
    return _load_tfds(name, split, data_dir, 256, builder="celebahq256")


def _load_tfds(
    name: str, split: str, data_dir: str | Path | None, image_size: int | None, *, builder: str | None = None
) -> ImageDataset:
    """A data set that TFDS prepared; never flipped, for all that is known of it. `builder`: default, name's NAME."""
    flag = f"--dataset_name={name}"
    builder = builder or name.removeprefix("tfds:")
    folder = _find_prepared(flag, data_dir, builder)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{flag} needs another package ({error}): `pip install {TFDS_PACKAGES}`") from error

    # From the folder, not by name: that needs no builder's code and finds array_record beside another format.
    prepared = tfds.builder_from_directory(folder)
    features, splits = dict(prepared.info.features.items()), prepared.info.splits
    image, label = (features.get(key) for key in ("image", "label"))
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(f"{flag}: {folder} has the features {', '.join(features)}; image and a class label are needed")
    if "train" not in splits:
        raise UserError(f"{flag}: {folder} has no split train but {', '.join(splits) or 'none'}; prepare it again")
    height, width, channels = image.shape
    size = image_size or (height and width and min(height, width))
    if not size:
        raise UserError(f"{flag}: the images of {builder} are of many sizes; add --image_size 256, for example")

    validation = next((own for own in ("validation", "test") if own in splits), None)
    records = prepared.as_data_source(
        (validation or "train") if split == "validation" else "train",
        decoders={"image": tfds.decode.SkipDecoding()},  # its decoder is Pillow or OpenCV, whichever is installed
        file_format="array_record",
    )
    mode = "L" if channels == 1 else "RGB"
    source = _Records(records, mode, size, f"{prepared.info.full_name} in {folder}")
    if validation is None:
        rows = _held_out([str(row) for row in range(len(source))], _num_held_out(len(source)))
        source = _Subset(source, rows[split == "validation"])
    class_names = tuple(label.names or map(str, range(label.num_classes)))
    return ImageDataset(name, split, source, (size, size, len(mode)), class_names, random_flip=False)


def _find_prepared(flag: str, data_dir: str | Path | None, builder: str) -> Path:
    """The folder of the newest version of `builder` (NAME, NAME/CONFIG, NAME:1.2.3) that TFDS can read in any order."""
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()
    path, _, version = builder.partition(":")
    folders = [file.parent for file in (root / path).glob(f"{version or '[0-9]*'}/dataset_info.json")]
    if not folders:
        how = PREPARATIONS.get(path, "run {command}").format(root=root, command=_prepare_command(builder, root))
        raise UserError(
            f"{flag}: no data set {builder} under --data_dir={root}; {how}. "
            "`make demo` (--dataset_name digits) shows the suite at work now"
        )
    folder = max(folders, key=lambda folder: [int(number) for number in re.findall(r"\d+", folder.name)])
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
    if "array_record" not in formats:
        raise UserError(
            f"{flag}: {folder} is prepared as {formats[0]} only, which has no random access; add array_record to it: "
            f"`pip install tensorflow {TFDS_PACKAGES} apache-beam mlcroissant && "
            f"tfds convert_format --dataset_version_dir {folder} --out_file_format array_record`"
        )
    return folder


def _prepare_command(builder: str, root: Path) -> str:
    # Not `tfds build`, which does not start without apache-beam and mlcroissant.
    return (
        f'`pip install tensorflow {TFDS_PACKAGES} && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{builder}', data_dir='{root}').download_and_prepare(file_format='array_record')\"`"
    )


Loader = Callable[[str, str, str | Path | None, int | None], ImageDataset]
DATASETS: dict[str, Loader] = {
    "digits": _load_digits,
    "imagenet256": functools.partial(_load_imagenet, size=256),
    "imagenet128": functools.partial(_load_imagenet, size=128),
    "celebahq256": _load_celebahq,
}
PREFIXES: dict[str, Loader] = {"folder": _load_folder, "tfds": _load_tfds}
