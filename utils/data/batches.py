"""Batches of a data set, in training order or in reading order, and their way to the devices."""

import collections
import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from utils.base.background import in_background
from utils.base.mesh import shard_batch
from utils.base.messages import DataError, UserError
from utils.data.coupled import Coupling, Select
from utils.data.dataset import ArraySource, Batch, Batches, ImageDataset, PixelBatch, StreamSource, Subset
from utils.storage.tree import count_readers


def training_batches(
    dataset: ImageDataset,
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    prefetch: int = 2,
    coupling: Coupling | None = None,
) -> Batches:
    """Returns endless shuffled batches of batch_size / process_count examples, of the data set's `batch_type`.

    Every epoch is a new order that has each image exactly once; batches run on across its end. Order and flips are
    functions of (seed, position in the endless stream) alone. Host `process_index` gets its part of each global batch,
    so that the k-th batches of all hosts, one after the other, are the k-th batch of a single host. (What is read as a
    stream promises less: see `RecordStream.training_batches`.)

    `get_state()` is {'next_index': number of batches taken}, the same on every host; after `set_state` of it the
    stream goes on exactly. `num_threads` read images (default: `count_readers`), up to `prefetch`
    batches ahead; prefetch=0 reads when asked. What a thread raises, `next` raises. With a `coupling`, which streams do
    not take, batches bring their noise, and may be of other examples.

    Raises UserError if batch_size does not divide over the hosts or the seed is negative.
    """
    _check_batch_size(batch_size, process_count)
    if seed < 0:
        raise UserError(f"--seed={seed} is negative; use 0, for example")
    local_size = batch_size // process_count
    # A stream shuffles and divides itself.
    if isinstance(dataset.source, StreamSource):
        hosts = {"process_index": process_index, "process_count": process_count}
        return dataset.source.training_batches(batch_size, seed, dataset.random_flip, **hosts, prefetch=prefetch)

    # A batch by its number, with its noise where there is a coupling.
    rows = range(process_index * local_size, (process_index + 1) * local_size)
    select = _training_order(dataset, batch_size, seed, rows)
    reader = BatchReader(dataset, num_threads)

    def read(batch: int) -> Batch:
        return reader(*select(batch))

    read_batch = read if coupling is None else coupling.reader(rows, select, reader)

    # As many batches as a float64, such as JSON's numbers, can count: endless.
    return _in_order(grain.MapDataset.range(2**53).map(read_batch), prefetch)


def _training_order(dataset: ImageDataset, batch_size: int, seed: int, rows: range) -> Select:
    """Returns a function from the number of a batch to (the examples at its `rows`, which of them are mirrored)."""
    num_images = len(dataset.source)

    # The order of an epoch. Not Grain's shuffle: it orders epoch e of seed s as epoch 0 of seed s + e, so that runs
    # under neighbouring seeds see the same orders, and it takes a millisecond an image where there are few.
    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(num_images)
        flips = rng.random(num_images) < 0.5
        return order, flips & dataset.random_flip

    # Positions in the endless stream run on across epochs.
    def select(batch: int) -> tuple[list[int], list[bool]]:
        indices = []
        flips = []
        for row in rows:
            epoch, place = divmod(batch * batch_size + row, num_images)
            order, is_flipped = epoch_order(epoch)
            indices.append(int(order[place]))
            flips.append(bool(is_flipped[place]))
        return indices, flips

    return select


def epoch_batches(
    dataset: ImageDataset,
    batch_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Yields the images start .. stop - 1 (default: all) once, in the split's own order and unflipped.

    Batches are those of `training_batches`, but the last may be short. Hosts see disjoint images, all of the split
    together, in equally many batches, so that they stay in step: a host may get no rows of a short last batch.

    Raises UserError if batch_size does not divide over the hosts.
    """
    _check_batch_size(batch_size, process_count)
    stop = len(dataset.source) if stop is None else stop
    if isinstance(dataset.source, StreamSource):
        hosts = {"process_index": process_index, "process_count": process_count}
        return dataset.source.epoch_batches(batch_size, start, stop, **hosts, prefetch=prefetch)

    # A batch by its first image; hosts take turns within it.
    reader = BatchReader(dataset, num_threads)

    def read(first: int) -> Batch:
        indices = range(first + process_index, min(first + batch_size, stop), process_count)
        return reader(indices, [False] * len(indices))

    return _in_order(grain.MapDataset.range(start, stop, batch_size).map(read), prefetch)


def to_devices(batches: Any, mesh: Mesh, buffer_size: int = 2) -> Iterator[tuple[PyTree, Any]]:
    """Yields (batch on the devices, position of `batches` just after it), with `buffer_size` more on their way.

    `batches` has `get_state()`. Pairing each batch with its position keeps a checkpoint exact although the iterator is
    already further on. If a batch cannot be read, those before it are yielded first; then DataError is raised.
    """
    queue = collections.deque()
    failure = None
    while True:
        # Fill the queue first: the devices work on one batch while the next are copied.
        while len(queue) <= buffer_size and failure is None:
            try:
                batch = next_batch(batches)
            except DataError as error:
                failure = error
            else:
                queue.append((shard_batch(batch, mesh), batches.get_state()))
        # The error waits until every batch that could be read has been used.
        if not queue:
            assert failure is not None
            raise failure
        yield queue.popleft()


def read_ahead(items: Iterator[tuple[PyTree, Any]]) -> Iterator[tuple[PyTree, Any]]:
    """Returns the same items, of which the first is being read when this returns, on a thread of its own."""
    first = in_background(lambda: next(items))

    def all_items() -> Iterator[tuple[PyTree, Any]]:
        yield first()
        yield from items

    return all_items()


def next_batch(batches: Any) -> PyTree:
    """Returns the next batch. Raises DataError, in one line, for whatever keeps its source from reading it."""
    try:
        return next(batches)
    except UserError as error:
        raise DataError(str(error)) from error
    except Exception as error:  # each source's library has its own
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the data cannot be read: {type(error).__name__}: {reason}") from error


def first_examples(dataset: ImageDataset, num_examples: int) -> ImageDataset:
    """Returns the data set cut to its first `num_examples` images (all, if fewer) and never flipped, to overfit it."""
    num_examples = min(num_examples, len(dataset.source))
    # A stream has no rows: its first images are read into memory.
    if isinstance(dataset.source, StreamSource):
        (batch,) = epoch_batches(dataset, num_examples, stop=num_examples)
        assert isinstance(batch, PixelBatch)
        source = ArraySource(batch.image, batch.condition)
    else:
        source = Subset(dataset.source, range(num_examples))
    return dataclasses.replace(dataset, source=source, random_flip=False)


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


class BatchReader:
    """Callable (indices, flips) -> batch, whose examples threads read straight into the batch's memory."""

    def __init__(self, dataset: ImageDataset, num_threads: int | None):
        self.dataset = dataset
        self.num_threads = num_threads or count_readers(dataset.is_remote)
        self.pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="read-images")

    def __call__(self, indices: Sequence[int], flips: Sequence[bool]) -> Batch:
        # Rows are written in place: stacking examples afterwards would copy every image once more.
        batch = self.dataset.empty_batch(len(indices))

        def fill(rows: range) -> None:
            for row in rows:
                for name, value in self.dataset.row(indices[row], flips[row]).items():
                    jax.tree.map(
                        lambda rows, leaf, row=row: operator.setitem(rows, row, leaf), getattr(batch, name), value
                    )

        # Some pieces for every thread evens out slow images; single rows would cost more than a small image itself.
        piece = max(1, len(indices) // (4 * self.num_threads))
        pieces = [range(row, min(row + piece, len(indices))) for row in range(0, len(indices), piece)]
        # Waits for all pieces, and raises what a thread has raised.
        for _ in self.pool.map(fill, pieces):
            pass
        return batch
