"""Runs batches of images through feature networks and collects the statistics of their features."""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from utils.base.mesh import shard_batch, shard_replicated
from utils.base.messages import format_duration, log, progress_bar
from utils.images.pixels import ImageBatch
from utils.metrics.extractors import Extract, Extractor
from utils.metrics.statistics import ImageStatistics

DEVICE_BATCH = 256  # images at a time beyond which a device is no faster
CPU_BATCH = 32  # half a minute's work of two cores
TIMED_BATCHES = 3  # from whose ends the time of a batch is taken
LONG = 600  # seconds that are worth a line
TITLES = {"dinov2": "DINOv2"}  # of networks whose names are no words
FEWER = (50_000, 10_000, 5_000, 2_000, 1_000)  # numbers of images to use instead
_announced: weakref.WeakSet[Extract] = weakref.WeakSet()  # networks of which a line has said that they compile


def most_images(extractors: Mapping[str, Extractor], num_devices: int, free_memory: int | None) -> int | None:
    """Returns how many images at a time these networks allow on all devices, each with `free_memory` bytes; None: any.

    It is a power of two for each device, of CPUs, whose memory is not known, CPU_BATCH in all.
    """
    needed = sum(extractor.image_bytes for extractor in extractors.values())
    if not needed:
        return None
    if free_memory is None:
        return max(1, CPU_BATCH // num_devices) * num_devices

    # Half is left for their weights, for what makes the images, and for fragmentation.
    fitting = min(DEVICE_BATCH, free_memory / 2 / needed)
    return 2 ** int(np.log2(max(1, fitting))) * num_devices


def pad_and_shard(batches: Iterable[np.ndarray], batch_size: int, mesh: Mesh) -> Iterator[ImageBatch]:
    """Yields batches of up to `batch_size` images on the devices, padded to that size."""
    for images in batches:
        # The last batch has the shape of the others, or it would compile anew; `count` says how many rows are real.
        padded = np.resize(images, (batch_size, *images.shape[1:]))
        yield ImageBatch(shard_replicated(padded, mesh), None, len(images))


def shard_shares(batches: Iterable[np.ndarray], batch_size: int, total: int, mesh: Mesh) -> Iterator[ImageBatch]:
    """Yields the batches of `total` images as `pad_and_shard` does, of which each process has read its share, as
    `epoch_batches` deals rows out: process p of P has p, p + P, ... of every batch."""
    num_processes = jax.process_count()
    places = np.arange(jax.process_index(), batch_size, num_processes, dtype=np.int32)
    for start, images in zip(range(0, total, batch_size), batches, strict=True):
        padded = np.resize(images, (len(places), *images.shape[1:]))
        # Only several processes have rows that lie in another order on the devices.
        placed = shard_batch(places, mesh) if num_processes > 1 else None
        yield ImageBatch(shard_batch(padded, mesh), None, min(batch_size, total - start), places=placed)


def measure_images(
    extractors: Mapping[str, Extract],
    batches: Iterable[ImageBatch],
    statistics: ImageStatistics,
    total: int | None = None,
    title: str | None = None,
    on_batch: Callable[[ImageBatch], None] | None = None,
    flag: str | None = None,
    is_announced: bool = True,
) -> None:
    """Updates `statistics` with the features of all images under each of `extractors`, as `load_extractors` returns
    them, for which grey counts as three equal channels; and its pixels, where it has some, with the images themselves.

    With `total`, the number of images, a progress bar of this `title` is shown and, if `is_announced`, lines say what
    compiles and whether it takes long; these name `flag`, that of the number of images. `on_batch` gets every batch
    once it is measured.
    """
    # The first batch compiles: the line comes before the silence, and once.
    is_announced = is_announced and total is not None
    if is_announced and not _announced.issuperset(extractors.values()):
        _announced.update(extractors.values())
        names = " and ".join(TITLES.get(name, name.capitalize()) for name in extractors)
        whether = "networks, unless they are" if len(extractors) > 1 else "network, unless it is"
        log(f"compiling the {names} {whether} cached ...")
    bar = progress_bar(total=total or 0, unit="image", desc=title)
    times_finished: list[float] = []  # of the first batches

    def finish(batch: ImageBatch, features: Mapping[str, Mapping]) -> None:
        # Every process gathers all rows; those of the padding are cut off.
        for name, by_feature in features.items():
            rows = {feature: batch.rows(array) for feature, array in by_feature.items()}
            statistics.update(rows, name)
        if statistics.pixels is not None:
            statistics.pixels.update(batch.rows(batch.images))
        bar.update(batch.count)
        if on_batch:
            on_batch(batch)

        # A line about a long time, from the batches after the first, which compiles.
        if not is_announced or len(times_finished) == TIMED_BATCHES:
            return
        times_finished.append(time.monotonic())
        if len(times_finished) == TIMED_BATCHES:
            per_image = (times_finished[-1] - times_finished[0]) / (TIMED_BATCHES - 1) / batch.count
            if total is not None and (estimate := describe_time(per_image, total, flag)) is not None:
                log(estimate)

    # While the host waits for the features of one batch, the devices already have the next one's work.
    in_flight = None
    with bar:
        for batch in batches:
            images = batch.images
            if extractors and images.shape[-1] == 1:
                images = jnp.repeat(images, 3, axis=-1)
            features = {name: extract(images) for name, extract in extractors.items()}
            if in_flight:
                finish(*in_flight)
            in_flight = (batch, features)
        if in_flight:
            finish(*in_flight)


def describe_time(per_image: float, total: int, flag: str | None) -> str | None:
    """Returns a line about the time that `total` images take, and that fewer by --`flag` would take; None below LONG.

    `per_image` is in seconds. `flag` is the name of the flag that sets the number of images, None where there is none.
    """
    if per_image * total < LONG:
        return None
    line = f"about {format_duration(per_image * total)} for {total:,} images"
    fewer = [count for count in FEWER if count < total]
    if flag is None or not fewer:
        return line

    # The most images that take no long time; else the fewest of all.
    count = next((count for count in fewer if count * per_image < LONG), fewer[-1])
    return f"{line}; --{flag} {count} takes {format_duration(per_image * count)}"
