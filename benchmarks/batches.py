"""How fast batches come: ours, the jax-flow baseline's, PyTorch's DataLoader; interleaved in one run.

    python benchmarks/batches.py --dataset_name imagenet256 --data_dir DIR --batch 64 --step_ms 200

"jax-flow baseline" is measured on tfrecord, which is what it reads, and "PyTorch's DataLoader" on folder:PATH where
PyTorch is installed; it hands out uint8, as ours does. A unit of work is a batch on the devices; --repeats of them are
taken, uncounted, before each measurement too. "wait" is the fraction of its time that a loop waits for data which is
busy for --step_ms after each batch, without needing the host's cores.
"""

import dataclasses
import functools
import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator

import common
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict
from PIL import Image

from utils.base.devices import make_mesh, prefetch, shard_batch
from utils.base.errors import UserError
from utils.data.batches import training_batches
from utils.data.dataset import Batch, ImageDataset
from utils.data.image_folder import ImageFiles
from utils.data.loaders import load_dataset
from utils.data.tfds import RecordStream
from utils.data.tfds_files import import_tensorflow
from utils.flags import program, reading
from utils.flags.definitions import define_data_flags
from utils.training.progress import Throughput

OURS, BASELINE, TORCH = "ours", "jax-flow baseline", "PyTorch's DataLoader"


def define_flags() -> None:
    define_data_flags()
    common.define_measurement_flags(batch=64, repeats=16)
    flags.DEFINE_integer("baseline_buffer", 1000, "Decoded images to shuffle; published: 10,000.", lower_bound=1)
    flags.DEFINE_float("step_ms", 0, "Simulated step, to measure the wait for data; 0: none.", lower_bound=0)


def baseline_batches(dataset: ImageDataset, batch_size: int, buffer_size: int) -> Iterator[Batch]:
    """Written from the recipe's description: decoded and scaled to float32 first, then shuffled."""
    import tensorflow_datasets as tfds

    tf, prepared, size = import_tensorflow(), dataset.source.prepared, dataset.image_shape[0]

    def prepare(example):
        side = tf.reduce_min(tf.shape(example["image"])[:2])
        image = tf.image.resize_with_crop_or_pad(example["image"], side, side)
        image = tf.image.resize(image, (size, size), antialias=True)
        image = tf.image.random_flip_left_right(image) if dataset.random_flip else image
        return {"image": image / 127.5 - 1, "label": example["label"]}

    # TFDS keeps small sets in memory, decoded; this is to measure what a large one costs.
    options = tfds.ReadConfig(try_autocache=False)
    split = f"{prepared.split}[{prepared.start}:{prepared.stop}]"
    examples = prepared.builder.as_dataset(split=split, read_config=options)
    # Repeated before it is shuffled, not after: where the buffer holds a small split whole, the rest of an epoch would
    # else cost nothing. Of a large one the published order decodes an image for each that is drawn, as here.
    images = examples.map(prepare, num_parallel_calls=tf.data.AUTOTUNE).repeat().shuffle(buffer_size, seed=0)
    return images.batch(batch_size, drop_remainder=True).prefetch(2).as_numpy_iterator()  # as far ahead as ours


@dataclasses.dataclass(frozen=True)
class TorchImages:
    """The images of a folder for a DataLoader, whose workers index it."""

    images: ImageFiles
    random_flip: bool

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        path, label = self.images.files[index]
        image, size = Image.open(path).convert("RGB"), self.images.size
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=None)
        if self.random_flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"image": np.array(image), "label": np.int32(label)}


def torch_batches(dataset: ImageDataset, batch_size: int) -> Iterator[Batch]:
    from torch.utils.data import DataLoader, RandomSampler

    images = TorchImages(dataset.source, dataset.random_flip)
    # Epoch after epoch in one go, since the pause between two epochs would weigh too much where they are short. Workers
    # are spawned because forks of a process with JAX's threads may hang.
    endless = RandomSampler(images, num_samples=2**40)
    options = {"num_workers": os.cpu_count(), "multiprocessing_context": "spawn"}
    loader = DataLoader(images, batch_size, sampler=endless, **options)
    return ({name: rows.numpy() for name, rows in batch.items()} for batch in loader)


def make_pipelines(config: ConfigDict, dataset: ImageDataset, mesh: Mesh) -> dict[str, Callable[[], Iterator[PyTree]]]:
    """What opens each pipeline that this data set has; reports which it has not."""
    pipelines = {OURS: lambda: (batch for batch, _ in prefetch(training_batches(dataset, config.batch, seed=0), mesh))}

    def add(name: str, open_batches: Callable[[], Iterator[Batch]]) -> None:
        pipelines[name] = lambda: (shard_batch(batch, mesh) for batch in open_batches())

    if isinstance(dataset.source, RecordStream):
        add(BASELINE, lambda: baseline_batches(dataset, config.batch, config.baseline_buffer))
    else:
        print(f"{BASELINE}: left out, {config.dataset_name} is not read from tfrecord", file=sys.stderr)
    if not isinstance(dataset.source, ImageFiles):
        print(f"{TORCH}: left out, {config.dataset_name} is not folder:PATH", file=sys.stderr)
    elif common.has_torch():
        add(TORCH, lambda: torch_batches(dataset, config.batch))
    return pipelines


def wait_fraction(batches: Iterator[PyTree], count: int, step_ms: float) -> float:
    """Fraction of the time of `count` batches, each followed by a step, that goes into waiting for them."""
    rates = Throughput(1, 0.0)
    started = time.monotonic()
    for _ in itertools.islice(rates.waiting(map(jax.block_until_ready, batches), lambda: True), count):
        time.sleep(step_ms / 1e3)  # leaves the cores to whoever reads, as a step on an accelerator does
    return rates.waited / (time.monotonic() - started)


def main(config: ConfigDict) -> None:
    mesh = make_mesh()
    if config.batch % mesh.size:
        raise UserError(f"--batch={config.batch} does not divide over the devices; use a multiple of {mesh.size}")
    dataset = load_dataset(config.dataset_name, "train", reading.read_data_options(config))
    makers, works = make_pipelines(config, dataset, mesh), {}
    pipelines = {name: makers[name]() for name in common.choose(makers, config.rows)}
    for name, batches in pipelines.items():
        # What a pipeline prefetched while others were measured is taken before it is measured itself.
        work = functools.partial(next, batches)
        works |= {f"{name}, uncounted": work, name: work}
    seconds = common.measure_interleaved(works, config.rounds, config.repeats)
    slowest, rows = max(seconds[name] for name in pipelines), []
    for name, batches in pipelines.items():
        bytes_each = sum(leaf.nbytes for leaf in jax.tree.leaves(next(batches))) / config.batch
        row = {"pipeline": name, "ms a batch": 1e3 * seconds[name], "images/s": config.batch / seconds[name]}
        row |= {"MB to the device an image": bytes_each / 1e6, "ratio": slowest / seconds[name]}
        if config.step_ms:
            wait_fraction(batches, config.repeats, config.step_ms)  # uncounted, as above
            row["wait"] = f"{wait_fraction(batches, config.repeats, config.step_ms):.0%}"
        rows.append(row)
    shape = "x".join(map(str, dataset.image_shape))
    step = f", wait for steps of {config.step_ms:g} ms" if config.step_ms else ""
    title = f"{config.dataset_name}, {shape}, batch {config.batch}{step}, {os.cpu_count()} cores"
    common.report(title, rows, config.json)


if __name__ == "__main__":
    program.run_program(define_flags, main)
