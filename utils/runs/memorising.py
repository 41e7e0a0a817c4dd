"""Whether samples copy the images of a training: whose images they are, what of them is compared, and the figure."""

import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from utils.base.hosts import is_first
from utils.base.mesh import gather
from utils.base.messages import UserError, log, progress_bar, warn
from utils.base.settings import unknown_name
from utils.data.batches import epoch_batches
from utils.data.dataset import ImageDataset, RandomAccess, Subset
from utils.data.loaders import find_loader, load_splits
from utils.images.decoding import find_mode
from utils.images.pixels import UINT8, Images, PixelFormat
from utils.images.samples import Samples, content_sha256, open_samples
from utils.images.sizes import write_size
from utils.metrics.extractors import EXTRACTORS, PIXELS, Extract, Extractor, FeatureKey
from utils.metrics.measure import pad_and_shard
from utils.metrics.memorisation import CELL_ROWS, Blocks, Memorisation, measure, take_rows
from utils.metrics.statistics import MAX_SAMPLE_ROWS
from utils.runs.settings import DataConfig

MAX_PIXEL_SIDE = 64  # pixels: images of this side and more are compared by an extractor's features
MAX_KEPT_BYTES = 2**30  # of training images in memory; others are read again for each pass
BLOCK = 4096  # rows of features or pixels at a time
MAX_BLOCK_BYTES = 2**24  # of the pixels of a block, where each takes a byte
NUM_PAIRS = 16  # in the figure
PIXELS_NAME = "pixels"  # among the names of extractors


@dataclasses.dataclass(frozen=True)
class TrainingImages:
    """The images that may have been copied, and those that were held out, where there are some.

    `take(indices)` returns some of them, (k, h, w, c), in that order. With `has_mirrors` the training saw their mirror
    images too. `sha256` identifies them.
    """

    name: str
    images: Samples
    held_out: ImageDataset | None
    take: Callable[[Sequence[int]], np.ndarray]
    has_mirrors: bool
    sha256: str
    pixels: PixelFormat = UINT8


def open_training(
    text: str | None, saved: Mapping[str, Any] | None, image_shape: tuple[int, ...], dtype: str
) -> TrainingImages:
    """Returns the images of --train_images, a data set or samples, or those of a run's own training.

    `saved` is the run's configuration, None where samples are scored that are there already, of `image_shape` and
    `dtype`. Raises UserError where there are no images, or others than the samples.
    """
    if text is None:
        if saved is None:
            raise UserError("--memorisation: --samples do not say what they were trained on; name it by --train_images")
        name = str(saved.get("dataset_name"))
        loader = find_loader(name)
        if loader is None or loader.is_derived:
            what = "is not a known data set" if loader is None else f"holds {loader.holds}"
            raise UserError(f"--memorisation: the run's {name} {what}; name the images by --train_images")
        found = _open_dataset(name, saved, image_shape, dtype, is_own=True)
    elif find_loader(text) is not None:
        found = _open_dataset(text, saved, image_shape, dtype, is_own=False)
    else:
        found = _open_file(text, saved)

    # The distance of images of other shapes is not defined.
    flag = f"--train_images={found.name}"
    if found.images.image_shape != tuple(image_shape) or found.images.dtype != dtype:
        theirs, ours = (
            f"{kind} {'x'.join(map(str, shape))}"
            for kind, shape in ((found.images.dtype, found.images.image_shape), (dtype, image_shape))
        )
        raise UserError(f"{flag} holds {theirs} images, the samples are {ours}; name images of the samples' shape")
    if found.images.num_samples < 2:
        raise UserError(f"{flag} holds one image; memorisation compares the two nearest, so give more")
    return found


def _open_file(path: str, saved: Mapping[str, Any] | None) -> TrainingImages:
    """Opens samples as a training set: all of them, with none held out."""
    if not Path(path).exists():
        raise UserError(
            f"--train_images={path} is no data set (docs/data.md lists them), and no file or folder; correct it"
        )
    images = open_samples(path, "train_images", is_any=True)

    def take(indices: Sequence[int]) -> np.ndarray:
        return _pick(images, indices)

    return TrainingImages(path, images, None, take, _sees_mirrors(saved, False), content_sha256(path))


def _open_dataset(
    name: str, saved: Mapping[str, Any] | None, image_shape: tuple[int, ...], dtype: str, is_own: bool
) -> TrainingImages:
    """Opens both splits of a data set, with the run's options where it is the run's own."""
    loader = find_loader(name)
    assert loader is not None
    if loader.is_derived:
        raise UserError(f"--train_images={name} holds {loader.holds}; name the images that they were made of")
    settings: dict[str, Any] = {"dataset_name": name}
    if is_own and saved is not None:
        settings |= {field.name: saved[field.name] for field in dataclasses.fields(DataConfig) if field.name in saved}
    elif loader.is_resizable:
        settings["image_size"] = write_size(image_shape[:2])
    if settings.get("image_mode") is None and "image_mode" in loader.options:
        settings["image_mode"] = find_mode(image_shape, UINT8 if dtype == "uint8" else _format(saved))
    options = DataConfig(**settings).options
    try:
        train, validation = load_splits(name, options).values()
    except UserError as error:
        # The loaders' messages are of --dataset_name, which is another flag here.
        raise UserError(str(error).replace("--dataset_name", "--train_images")) from None

    # Images that were added or replaced since then may be copied, too, but nobody could tell.
    if is_own and saved is not None:
        recorded = saved["dataset"].get("splits", {}).get("train")
        if recorded is not None and recorded["sha256"] != train.fingerprint.sha256:
            warn(f"--memorisation: {name} is not what it was when the run was trained; copies of other images are lost")
    return read_splits(train, validation, _sees_mirrors(saved, train.random_flip))


def read_splits(train: ImageDataset, validation: ImageDataset, has_mirrors: bool) -> TrainingImages:
    """Returns the images of both splits of a data set."""
    return TrainingImages(
        train.name,
        _read_split(train),
        validation if len(validation.source) else None,
        functools.partial(_take_rows_of_split, train),
        has_mirrors,
        train.fingerprint.sha256,
        train.pixels,
    )


def _format(saved: Mapping[str, Any] | None) -> PixelFormat:
    return UINT8 if saved is None else PixelFormat.from_record(saved["dataset"])


def _sees_mirrors(saved: Mapping[str, Any] | None, is_usual: bool) -> bool:
    """Returns whether a training sees mirror images: the run's, if there is one, else as usual for the data."""
    if saved is None:
        return is_usual
    flips = saved.get("random_flip")
    return (is_usual if flips is None else bool(flips)) or "flip" in (saved.get("augment") or ())


def _read_split(dataset: ImageDataset) -> Samples:
    def read(batch_size: int) -> Iterator[np.ndarray]:
        for batch in epoch_batches(dataset, batch_size):
            yield np.asarray(batch.image)  # ty: ignore[missing-attribute]

    return Samples(len(dataset.source), dataset.image_shape, read, dataset.pixels.dtype)


def _read_evenly(dataset: ImageDataset, count: int) -> Samples:
    """Returns the images of a split, at most `count`: of all its classes, which a folder has one after the other."""
    images = _read_split(dataset)
    if images.num_samples <= count:
        return images
    if not isinstance(dataset.source, RandomAccess):  # a stream, whose files are shuffled
        return images.first(count)
    rows = np.linspace(0, images.num_samples - 1, count).astype(int).tolist()
    return _read_split(dataclasses.replace(dataset, source=Subset(dataset.source, rows)))


def _take_rows_of_split(dataset: ImageDataset, indices: Sequence[int]) -> np.ndarray:
    if not isinstance(dataset.source, RandomAccess):
        return _pick(_read_split(dataset), indices)
    chosen = dataclasses.replace(dataset, source=Subset(dataset.source, list(indices)))
    return np.concatenate(list(_read_split(chosen).read(len(indices))))


def _pick(images: Samples, indices: Sequence[int]) -> np.ndarray:
    """Returns some of the images, in the order of `indices`, in one pass."""
    distinct, places = np.unique(indices, return_inverse=True)

    def read() -> Iterator[tuple[int, np.ndarray]]:
        start = 0
        for batch in images.read(256):
            yield start, batch.reshape(len(batch), 1, -1)
            start += len(batch)

    return take_rows(read, distinct)[places].reshape(-1, *images.image_shape)


def choose_features(name: str | None, image_shape: Sequence[int], extractors: Sequence[str]) -> FeatureKey:
    """Returns what is compared: pixels, by default below 64 pixels a side, or the main feature of an extractor.

    Raises UserError for an extractor that is not among those of the evaluation.
    """
    if name is None:
        is_small = max(image_shape[:2]) < MAX_PIXEL_SIDE or not extractors
        name = PIXELS_NAME if is_small else extractors[0]
    if name == PIXELS_NAME:
        return PIXELS
    known = [PIXELS_NAME, *EXTRACTORS]
    if name not in known:
        raise unknown_name(f"--memorisation_features={name}", name, known)
    if name not in extractors:
        raise UserError(
            f"--memorisation_features={name}: no metric of these images needs that network; add it by --extractor, "
            "and to --metrics where that is given, or use pixels"
        )
    return FeatureKey(name, EXTRACTORS[name].main_feature)


class SampleImages:
    """The first images of an evaluation, in a file without a name, so that thousands take no memory. Of several
    processes, the first keeps them."""

    def __init__(self, num_samples: int, image_shape: Sequence[int], dtype: str, folder: Path):
        self.num_samples = 0
        self.room = min(num_samples, MAX_SAMPLE_ROWS)
        self.images = _new_array((self.room, *image_shape), dtype, folder) if is_first() else None

    @property
    def is_full(self) -> bool:
        return self.num_samples == self.room

    def add(self, images: Images) -> None:
        kept = images[: self.room - self.num_samples]
        if self.images is not None:
            self.images[self.num_samples : self.num_samples + len(kept)] = kept
        self.num_samples += len(kept)


def _new_array(shape: tuple[int, ...], dtype: str, folder: Path) -> np.ndarray:
    """Returns an array on the disk of `folder`, which ends with the program. Raises UserError for want of room."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # All of it now: a page without a place on the disk would end the program when it is written.
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise UserError(
                f"--memorisation: {folder} has no room for {size / 1e9:.2g} GB of images or features "
                f"({error.strerror}); name a folder of another disk by --out"
            ) from None
        return np.memmap(file, dtype, "w+", shape=shape)


class Memorising:
    """Compares samples with training images, of which each pass reads those that memory does not hold."""

    def __init__(
        self,
        training: TrainingImages,
        key: FeatureKey,
        batch_size: int,
        mesh: Mesh,
        folder: Path,
        extractors: Mapping[str, Extractor] = EXTRACTORS,
    ):
        self.training = training
        self.key = key
        self.batch_size = batch_size
        self.mesh = mesh
        self.blocks: Blocks | None = None  # of the first evaluation, as are the next
        self.held_out: np.ndarray | None = None
        # Room for all features, before anything is sampled.
        self.features = None
        if key != PIXELS and is_first():
            width = extractors[key.extractor].features[key.feature]
            shape = (training.images.num_samples, 1 + training.has_mirrors, width)
            self.features = _new_array(shape, "float32", folder)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of rows that have these results."""
        return {
            "memorisation_features": self.key.extractor,
            "train_images": self.training.name,
            "train_sha256": self.training.sha256,
            "train_mirrors": self.training.has_mirrors,
            "num_train_images": self.training.images.num_samples,
        }

    def compute(
        self,
        images: np.ndarray,
        rows: np.ndarray | None = None,
        extractors: Mapping[str, Extract] | None = None,
        is_announced: bool = True,
    ) -> tuple[dict[str, float], Any]:
        """Returns the results of samples (n, h, w, c), and the Figure of those that are most like copies.

        Of another key than pixels, `rows` are their features (n, d), by one of the `extractors`. `is_announced`: a line
        says what was compared.
        """
        training = self.training
        extract = None if extractors is None or self.key == PIXELS else extractors[self.key.extractor]
        queries = images.reshape(len(images), -1) if rows is None else rows[: len(images)]
        if self.blocks is None:
            self.blocks = self._keep_rows(extract)
            if training.held_out is not None:
                images_held_out = _read_evenly(training.held_out, len(queries))
                parts = [views[:, 0] for views in self._rows(images_held_out, extract, has_mirrors=False)]
                self.held_out = np.concatenate(parts)

        # Passes: neighbours, their rows and their neighbours; a fit and about three cells where images are held out.
        num_images = training.images.num_samples
        passes = 3 if self.held_out is None else 7
        with progress_bar(total=passes * num_images, unit="image", desc="memorisation") as bar:

            def blocks() -> Iterator[tuple[int, np.ndarray]]:
                assert self.blocks is not None
                for start, block in self.blocks():
                    yield start, block
                    bar.update(len(block))

            cell_rows = None
            if self.held_out is not None:
                cell_rows = take_rows(blocks, np.unique(np.linspace(0, num_images - 1, CELL_ROWS).astype(int)))
            found = measure(queries, self.held_out, blocks, cell_rows)
        if is_announced:
            mirrors = " and their mirror images" if training.has_mirrors else ""
            what = f"{num_images:,} images of {training.name}{mirrors}, by {self.key.extractor}"
            log(f"memorisation: {len(queries)} samples, {what}")
        return found.results, self._draw(found, images)

    def help(self, num_samples: int, extractors: Mapping[str, Extract]) -> None:
        """Takes part in the extraction of features that process 0 computes, once, for the samples; pixels need none."""
        if self.key == PIXELS or self.blocks is not None:
            return
        training = self.training
        extract = extractors[self.key.extractor]
        self.blocks = lambda: iter(())  # process 0 keeps its rows from now on
        for _ in self._rows(training.images, extract, training.has_mirrors):
            pass
        if training.held_out is not None:
            for _ in self._rows(_read_evenly(training.held_out, num_samples), extract, has_mirrors=False):
                pass

    def _rows(self, images: Samples, extract: Extract | None, has_mirrors: bool) -> Iterator[np.ndarray]:
        """Yields the rows of images, (b, views, d): pixels or features of them and of their mirror images."""
        size = self.batch_size
        if extract is None:  # large blocks make large matmuls
            most = max(1, min(BLOCK, MAX_BLOCK_BYTES // math.prod(images.image_shape)))
            size = 1 << (most.bit_length() - 1)  # a power of two, as `nearest` divides them
        for batch in images.read(size):
            views = [batch, batch[:, :, ::-1]] if has_mirrors else [batch]
            if extract is not None:
                views = [self._extract(extract, view) for view in views]
            yield np.stack([view.reshape(len(batch), -1) for view in views], axis=1)

    def _extract(self, extract: Extract, images: np.ndarray) -> np.ndarray:
        (batch,) = pad_and_shard([images], self.batch_size, self.mesh)
        shown = jnp.repeat(batch.images, 3, axis=-1) if images.shape[-1] == 1 else batch.images
        return gather(extract(shown)[self.key.feature])[: batch.count]

    def _keep_rows(self, extract: Extract | None) -> Blocks:
        """Returns the blocks of all training rows. Features, which cost most, are computed once and kept on disk;
        pixels are kept in memory if they fit."""
        training = self.training
        count = training.images.num_samples
        num_views = 1 + training.has_mirrors
        read = functools.partial(self._rows, training.images, extract, training.has_mirrors)

        def again() -> Iterator[tuple[int, np.ndarray]]:
            start = 0
            for rows in read():
                yield start, rows
                start += len(rows)

        size = num_views * math.prod(training.images.image_shape) * np.dtype(training.images.dtype).itemsize
        if extract is None and count * size > MAX_KEPT_BYTES:
            return again
        if extract is None:
            kept = np.concatenate([rows for _, rows in again()])
        else:
            assert self.features is not None
            kept = self.features
            with progress_bar(total=count, unit="image", desc="features of the training images") as bar:
                for start, rows in again():
                    kept[start : start + len(rows)] = rows
                    bar.update(len(rows))

        def from_memory() -> Iterator[tuple[int, np.ndarray]]:
            for start in range(0, count, BLOCK):
                yield start, np.asarray(kept[start : start + BLOCK])

        return from_memory

    def _draw(self, found: Memorisation, samples: np.ndarray) -> Any:
        """Returns a Figure of the samples with the least ratio of their two distances, beside both images."""
        from utils.images import plotting  # slow to import: matplotlib

        first, second = found.neighbours.distances.T
        ratios = np.where(first == 0, 0, first / np.where(second == 0, 1, second))
        chosen = np.lexsort((first, ratios))[:NUM_PAIRS]
        nearest = self.training.take(found.neighbours.indices[chosen].reshape(-1).tolist())
        images = np.concatenate([samples[chosen][:, None], nearest.reshape(len(chosen), 2, *samples.shape[1:])], axis=1)
        titles = [f"sample {index}: {ratios[index]:.2f}" for index in chosen]
        pixels = self.training.pixels
        if images.dtype != np.uint8 and pixels == UINT8:  # of a file of floats, which does not say its range
            pixels = PixelFormat("float32", float(images.min()), float(images.max()) + 1e-30)
        shown = np.asarray(pixels.to_uint8(images.reshape(-1, *samples.shape[1:])))
        title = f"nearest of {self.training.images.num_samples:,} training images"
        return plotting.image_table(shown.reshape(images.shape), titles, ("sample", "nearest", "second"), title)
