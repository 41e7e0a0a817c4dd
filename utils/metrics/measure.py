"""From batches of images to statistics of their Inception features."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from utils.base.console import format_duration, is_quiet, log, progress_bar
from utils.base.errors import UserError
from utils.base.sharding import gather, shard_replicated
from utils.images.pixels import ImageBatch
from utils.metrics.inception import Features
from utils.metrics.reference import ReferenceStatistics
from utils.metrics.statistics import ImageStatistics

TIMED_BATCHES = 3
LONG = 600  # seconds that are worth a line
FEWER = (50_000, 10_000, 5_000, 2_000, 1_000)  # numbers of images to use instead


def pad_and_shard(batches: Iterable[UInt8[np.ndarray, "_ h w c"]], batch_size: int, mesh: Mesh) -> Iterator[ImageBatch]:
    """Batches of up to `batch_size` images on the devices, padded to that size."""
    for images in batches:
        padded = np.resize(images, (batch_size, *images.shape[1:]))
        yield ImageBatch(shard_replicated(padded, mesh), None, len(images))


def measure_images(
    extractor: Callable[..., Features],
    batches: Iterable[ImageBatch],
    statistics: ImageStatistics,
    total: int | None = None,
    title: str | None = None,
    on_batch: Callable[[ImageBatch], None] | None = None,
    flag: str | None = None,
) -> None:
    """Updates `statistics` with the Inception features of all images; grey counts as three equal channels.

    While the host waits for the features of one batch, the devices already have the next one's work. With `total`, the
    number of images, a progress bar is shown. `on_batch` gets every batch once it is measured. `flag` is that of the
    number of images, which a line about a long time names.
    """
    if total is not None:
        log("compiling the Inception network, unless it is cached ...")
    bar = progress_bar(total=total, unit="image", desc=title, disable=total is None or is_quiet())
    finished: list[float] = []  # times of the first batches

    def finish(batch: ImageBatch, features: Features) -> None:
        statistics.update(*(gather(rows)[: batch.count] for rows in features))
        bar.update(batch.count)
        if on_batch:
            on_batch(batch)
        if total is None or len(finished) == TIMED_BATCHES:
            return
        finished.append(time.monotonic())
        if len(finished) == TIMED_BATCHES:  # between the first and the last, without compilation
            per_image = (finished[-1] - finished[0]) / (TIMED_BATCHES - 1) / batch.count
            if (estimate := describe_time(per_image, total, flag)) is not None:
                bar.clear()
                log(estimate)

    in_flight = None
    for batch in batches:
        images = batch.images if batch.images.shape[-1] == 3 else jnp.repeat(batch.images, 3, axis=-1)
        features = extractor(images)
        if in_flight:
            finish(*in_flight)
        in_flight = (batch, features)
    if in_flight:
        finish(*in_flight)
    bar.close()


def describe_time(per_image: float, total: int, flag: str | None) -> str | None:
    """Returns a line about the time that `total` images take, and of fewer by --`flag`; None below a few minutes."""
    if per_image * total < LONG:
        return None
    line = f"about {format_duration(per_image * total)} for {total:,} images"
    fewer = [count for count in FEWER if count < total]
    if flag is None or not fewer:
        return line
    count = next((count for count in fewer if count * per_image < LONG), fewer[-1])
    return f"{line}; --{flag} {count} takes {format_duration(per_image * count)}"


class Convention(NamedTuple):
    """How images enter Inception (see inception.CONVENTIONS), and how that is known."""

    name: str
    source: str  # 'file', 'known file', 'flag' or 'default'


# Statistics in use that do not record their convention, by the SHA-256 of the file.
KNOWN_FILES = {
    # CIFAR-10's 50,000 training images, by pytorch-fid.
    "e804fcd35bc1333c1b25fdcc048ad3a96cf1b9f795a97d46cab9f4830ff7b57e": "pytorch_fid",
}


def find_convention(reference: ReferenceStatistics, requested: str | None) -> Convention:
    """The convention under which statistics were made. UserError where neither they nor the user tell, or both do and
    differ: under another one, the FID would be wrong without a sign of it."""
    known = KNOWN_FILES.get(reference.sha256)
    recorded = reference.convention or known
    if recorded and requested and recorded != requested:
        raise UserError(f"--convention={requested}, but {reference.path} was made under {recorded}; leave the flag out")
    if requested and not recorded:
        return Convention(requested, "flag")
    if not recorded:
        raise UserError(
            f"--fid_stats={reference.path} does not record how its images entered Inception: give --convention "
            "pytorch_fid for files that pytorch-fid made, adm for those of TTUR, ADM, DiT, EDM and jax-flow"
        )
    return Convention(recorded, "file" if reference.convention else "known file")
