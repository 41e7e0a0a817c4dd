"""Makes reference statistics for FID: Inception features of a data set, exactly as eval_fid.py takes those of samples.

    python compute_fid_stats.py --dataset_name digits --out data/fid_stats_digits.npz --compact 1

--metrics fid,moments keeps moments of the pixels beside them; --metrics moments takes those alone, of images of any
shape and format.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from utils.base.devices import check_batch_memory, free_memory
from utils.base.files import check_free_space, prepare_output_file
from utils.base.hosts import is_first
from utils.base.mesh import check_batch_size, make_mesh, replicated, sum_over_processes
from utils.base.messages import UserError, configure_output, log
from utils.conditions.classes import ClassCondition
from utils.data.batches import epoch_batches
from utils.data.dataset import Batch, ImageDataset, PixelBatch, StreamSource, Subset
from utils.data.loaders import load_dataset
from utils.flags import program, reading
from utils.flags.definitions import (
    define_data_flags,
    define_extractor_flags,
    define_metrics_flag,
    define_path,
    define_process_flags,
    define_quiet_flag,
)
from utils.flags.effects import RULES, check_effects
from utils.flags.help import topic
from utils.images.pixels import ImageBatch, check_pictures
from utils.images.samples import Samples, open_samples
from utils.metrics.extractors import (
    DEFAULT_EXTRACTOR,
    ExtractorOptions,
    check_extractors,
    configure_extractors,
    load_extractors,
)
from utils.metrics.inception import CONVENTIONS
from utils.metrics.measure import measure_images, most_images, pad_and_shard, shard_shares
from utils.metrics.metrics import choose_metrics, needed_extractors, sees_pixels
from utils.metrics.pixels import PixelStatistics
from utils.metrics.reference import MAX_ROWS
from utils.metrics.statistics import ImageStatistics
from utils.metrics.statistics_files import save_statistics, statistics_bytes

BATCH_SIZE = 128  # where no network says what fits


def define_flags() -> None:
    define_data_flags()
    # The reference: a data set, or images of one's own.
    with topic("Data"):
        define_path("images", None, "Instead of a data set: npz (arr_0) or folder of images, as they are.")
        flags.DEFINE_enum("split", "train", ["train", "validation"], "Split that is the reference.")
        flags.DEFINE_integer(
            "num_images",
            None,
            "Images: so many at random, always the same; of tfrecord, which is shuffled, the first. Default: all.",
            lower_bound=2,
        )
    # What is kept of it, and how it is measured.
    with topic("Statistics"):
        define_path("out", None, "The .npz to write.")
        flags.DEFINE_integer(
            "num_features", 10_000, "Images whose features are kept, for KID, precision...", 0, MAX_ROWS
        )
        flags.DEFINE_integer(
            "compact", 0, "1: no covariance where all features are kept; smaller, and for this suite alone.", 0, 1
        )
        define_extractor_flags()
        define_metrics_flag("Scores that the file will serve")
        flags.DEFINE_enum("convention", "adm", list(CONVENTIONS), "Resize and scaling before Inception.")
        define_path("inception_weights", None, "Local copy of the Inception weights.")
        flags.DEFINE_integer(
            "batch_size", None, "Images at a time, over all devices; default: 128, of dinov2 what fits."
        )
        define_quiet_flag()
    define_process_flags()


class ReferenceImages(NamedTuple):
    """The images with which samples will be compared: a split of a data set, or --images."""

    source: str  # name of the data set, or path of --images
    split: str | None  # None: --images has none
    images: ImageDataset | Samples
    image_shape: tuple[int, ...]  # (h, w, c)
    total: int  # images that there are; --num_images may take fewer

    def __str__(self) -> str:
        return f"{self.source}, {self.split}" if self.split else self.source

    def read(self, batch_size: int, count: int, label_counts: np.ndarray | None, mesh: Mesh) -> Iterator[ImageBatch]:
        """Yields batches of images on the devices, `count` in all, and adds the labels of those that this process has
        read to `label_counts`, if that is given."""
        # Of files, every process reads all; of a data set, its share.
        if isinstance(self.images, Samples):
            return pad_and_shard(choose_images(self.images, batch_size, count), batch_size, mesh)
        images = count_labels(choose_examples(self.images, batch_size, count), label_counts)
        return shard_shares(images, batch_size, count, mesh)


def open_images(config: ConfigDict) -> ReferenceImages:
    """Returns the images that the flags name, unread. Raises UserError for latents, pairs,
    images that no feature network takes unless --metrics needs none, and too few."""
    is_any = not find_extractors(config)
    if config.images:
        samples = open_samples(config.images, "images", is_any)
        opened = ReferenceImages(config.images, None, samples, samples.image_shape, samples.num_samples)
    else:
        reading.check_data_flags(config.dataset_name)
        dataset = load_dataset(config.dataset_name, config.split, reading.read_data_options(config))
        if dataset.latents or dataset.pair_shape:
            raise UserError(f"--dataset_name={config.dataset_name} holds no images; give the data set it was made from")
        if not is_any:
            what = f"--dataset_name={config.dataset_name}: feature networks take"
            check_pictures(dataset.pixels, dataset.image_shape, what, "use --metrics moments", whose="these")
        opened = ReferenceImages(dataset.name, config.split, dataset, dataset.image_shape, len(dataset.source))

    # A covariance takes two images, and a choice of them no more than there are.
    if opened.total < 2:
        raise UserError(f"{opened} holds 1 image; statistics are of 2 or more")
    if config.num_images is not None and config.num_images > opened.total:
        raise UserError(f"--num_images={config.num_images}: {opened.source} holds {opened.total}")
    return opened


def find_extractors(config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of the feature networks that the flags ask for: none for --metrics moments."""
    names = check_extractors(config.extractor)
    return needed_extractors(choose_metrics(config.metrics)) if config.metrics else names


def make_statistics(config: ConfigDict, opened: ReferenceImages, mesh: Mesh, out: Path) -> int:
    """Writes the statistics of the images into `out`, and returns the number of images."""
    num_images = opened.total if config.num_images is None else config.num_images

    # Room first: nothing is measured for a refusal.
    num_rows = min(config.num_features, num_images)
    names = find_extractors(config)
    records = configure_extractors(names, ExtractorOptions.of(config)) if names else {}
    check_free_space(out, "out", statistics_bytes(num_rows, records, opened.image_shape))
    # No larger than the images, up to a multiple of the devices: the rest would be padding.
    requested = config.batch_size or most_images(records, mesh.size, free_memory()) or BATCH_SIZE
    batch_size = -(-min(requested, num_images) // mesh.size) * mesh.size
    check_batch_memory(batch_size, tuple(opened.image_shape))
    extractors = {}
    if names:
        check_batch_memory(batch_size, (299, 299, 3), copies=40)  # of float32, and the first layers' outputs
        # Networks are replicated; batches are split over the devices.
        extractors = load_extractors(
            records, weights=config.inception_weights, convention=config.convention, sharding=replicated(mesh)
        )
    has_pixels = sees_pixels(choose_metrics(config.metrics))
    statistics = ImageStatistics(config.num_features, pixels=PixelStatistics() if has_pixels else None)

    # Labels are counted as the images pass: `eval_fid.py --labels dataset` draws as often.
    has_labels = isinstance(opened.images, ImageDataset) and isinstance(opened.images.condition, ClassCondition)
    label_counts = np.zeros(opened.images.num_classes, np.int64) if has_labels else None
    batches = opened.read(batch_size, num_images, label_counts, mesh)
    measure_images(extractors, batches, statistics, num_images, "measuring", flag="num_images")
    if label_counts is not None:
        label_counts = sum_over_processes(label_counts)
    if not is_first():
        return num_images

    # Settings stand beside the numbers: eval_fid.py takes the convention from there.
    save_statistics(
        out,
        statistics,
        convention=config.convention if DEFAULT_EXTRACTOR in names else None,
        dataset=opened.source,
        extractors=records,
        split=opened.split,
        image_shape=opened.image_shape,
        label_counts=label_counts,
        is_compact=bool(config.compact),
        total_images=opened.total,
    )
    return num_images


def main(config: ConfigDict) -> None:
    configure_output(is_apart=True)

    # Whatever can be refused without reading an image.
    if config.out is None:
        raise UserError("--out is not given: name the file to write, such as stats.npz")
    out = Path(config.out)
    prepare_output_file(out, "out", "stats.npz", {"images": config.images})
    find_extractors(config)
    check_effects(RULES["compute_fid_stats"], config)
    program.join_processes(config)

    # Then the devices, the images, and the work.
    mesh = make_mesh()
    if config.batch_size is not None:
        check_batch_size(config.batch_size, mesh.size)
    opened = open_images(config)
    num_images = make_statistics(config, opened, mesh, out)
    of_all = f" of {opened.total}" * (num_images < opened.total)
    log(f"written: {out} ({num_images}{of_all} images of {opened})")


def choose_rows(total: int, count: int) -> list[int]:
    """Returns `count` of the rows below `total`: random, the same at every call, and ascending, as files are read."""
    return np.sort(np.random.default_rng(0).choice(total, count, replace=False)).tolist()


def choose_examples(dataset: ImageDataset, batch_size: int, count: int) -> Iterator[Batch]:
    """Yields batches of examples, `count` in all: at random, or the first of a stream. Processes take turns within a
    batch."""
    hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    # Rows of a stream cannot be looked up. Its order is shuffled already.
    if isinstance(dataset.source, StreamSource):
        return epoch_batches(dataset, batch_size, stop=count, **hosts)
    if count < len(dataset.source):
        rows = choose_rows(len(dataset.source), count)
        dataset = dataclasses.replace(dataset, source=Subset(dataset.source, rows))
    return epoch_batches(dataset, batch_size, **hosts)


def choose_images(samples: Samples, batch_size: int, count: int) -> Iterator[np.ndarray]:
    """Yields batches of `count` images, chosen at random; reads all of them in passing."""
    if count == samples.num_samples:
        yield from samples.read(batch_size)
        return
    is_chosen = np.zeros(samples.num_samples, bool)
    is_chosen[choose_rows(samples.num_samples, count)] = True

    # Chosen images wait until they fill a batch; after the last image, the rest is one.
    waiting = np.empty((0, *samples.image_shape), samples.dtype)
    start = 0
    for images in samples.read(batch_size):
        waiting = np.concatenate([waiting, images[is_chosen[start : start + len(images)]]])
        start += len(images)
        while len(waiting) >= batch_size or (start == samples.num_samples and len(waiting)):
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]


def count_labels(batches: Iterable[Batch], label_counts: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yields the images of the batches, and adds their labels to `label_counts` in passing."""
    for batch in batches:
        assert isinstance(batch, PixelBatch)
        if label_counts is not None:
            label_counts += np.bincount(batch.condition, minlength=len(label_counts))
        yield batch.image


if __name__ == "__main__":
    program.run_program(define_flags, main)
