"""From batches of images to statistics of their Inception features."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from tqdm import tqdm

from utils.console import log
from utils.errors import UserError
from utils.generate import ImageBatch
from utils.metrics.inception import Features
from utils.metrics.statistics import ImageStatistics
from utils.sharding import gather, shard_replicated


def pad_and_shard(batches: Iterable[UInt8[np.ndarray, "b h w c"]], batch_size: int, mesh: Mesh) -> Iterator[ImageBatch]:
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
) -> None:
    """Updates `statistics` with the Inception features of all images; grey counts as three equal channels.

    While the host waits for the features of one batch, the devices already have the next one's work. With `total`, the
    number of images, a progress bar is shown. `on_batch` gets every batch once it is measured.
    """
    bar = tqdm(total=total, unit="image", desc=title, disable=total is None)

    def finish(batch: ImageBatch, features: Features) -> None:
        statistics.update(*(gather(rows)[: batch.count] for rows in features))
        bar.update(batch.count)
        if on_batch:
            on_batch(batch)

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


def find_convention(path: Path, recorded: str | None, requested: str | None) -> str:
    """The convention `recorded` in the statistics of `path`; 'adm', saying so, where neither they nor the user tell."""
    if recorded and requested and recorded != requested:
        raise UserError(f"--convention={requested}, but {path} was made under {recorded}; leave the flag out")
    if not (recorded or requested):
        log(f"{path} does not say its convention: taking adm (--convention pytorch_fid for the other)")
    return recorded or requested or "adm"
