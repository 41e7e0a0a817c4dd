"""The scores of the ablation: samples of a run against Fashion-MNIST, in the features of its own small classifier."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fashion_classifier
import jax
import numpy as np
from ablation_rows import ZERO_FRACTION
from jaxtyping import UInt8

from utils.base.mesh import make_mesh, replicated
from utils.base.messages import log
from utils.images.pixels import ImageBatch, images_from_uint8
from utils.metrics import memorisation
from utils.metrics.extractors import DEFAULT_EXTRACTOR, feature_widths, load_extractors
from utils.metrics.inception import DEFAULT_CONVENTION
from utils.metrics.measure import measure_images, pad_and_shard
from utils.metrics.metrics import compute_metrics
from utils.metrics.reference import load_statistics
from utils.metrics.statistics import ImageStatistics
from utils.metrics.statistics_files import save_statistics
from utils.objectives.flow_matching import interpolate
from utils.sampling.generator import ImageGenerator
from utils.sampling.solvers import SamplerConfig

BATCH_SIZE = 500
MAX_ROWS = 4000  # whose features are kept, for kernel distances
BLOCK = 4096  # rows of training images at a time
LOSS_DRAWS = 4  # times and noises of each image
NUM_INCEPTION = {"images": 5000, "samples": 1000}  # which take minutes


class Data(NamedTuple):
    """Images (n, 28, 28, 1) and labels (n,) of both splits, uint8."""

    images: UInt8[np.ndarray, "n h w 1"]
    labels: UInt8[np.ndarray, " n"]
    test_images: UInt8[np.ndarray, "m h w 1"]
    test_labels: UInt8[np.ndarray, " m"]

    @classmethod
    def read(cls, path: Path) -> "Data":
        with np.load(path) as file:
            return cls(*(file[name] for name in ("images", "labels", "validation_images", "validation_labels")))


class Setting(NamedTuple):
    """How samples of a row are drawn, whatever the number of steps."""

    sampler: tuple[tuple[str, Any], ...] = ()  # fields of SamplerConfig
    params: str = "ema"
    guide: str | None = None  # checkpoint

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Setting":
        own = {name: values[name] for name in ("params", "guide") if name in values}
        return cls(tuple(sorted((name, value) for name, value in values.items() if name not in own)), **own)

    def make_sampler(self, num_steps: int) -> SamplerConfig:
        fields = dict(self.sampler)
        scale = fields.pop("cfg_scale", 1)
        if ZERO_FRACTION in fields:
            fields["cfg_zero_steps"] = round(fields.pop(ZERO_FRACTION) * num_steps)
        return SamplerConfig(num_steps, None if scale == 1 else scale, **fields)


class Scorer:
    """Compares images with the training images; both sides pass through the same networks."""

    def __init__(self, data: Data, out: Path):
        fashion_classifier.register()
        self.data = data
        self.out = out
        self.mesh = make_mesh()
        self.networks: dict[str, Any] = {}  # {extractor: (its function, the reference)}

    def open(self, name: str) -> tuple[Callable, Any]:
        """Returns (images -> features, statistics of training images) of an extractor, the latter kept in a file."""
        if name not in self.networks:
            extractors = load_extractors([name], sharding=replicated(self.mesh))
            path = self.out / f"reference_{name}.npz"
            if not path.exists():
                count = NUM_INCEPTION["images"] if name == DEFAULT_EXTRACTOR else len(self.data.images)
                log(f"features of {count:,} training images by {name} ...")
                statistics = ImageStatistics(MAX_ROWS)
                measure_images(extractors, self._batches(self.data.images[:count]), statistics)
                convention = DEFAULT_CONVENTION if name == DEFAULT_EXTRACTOR else None
                save_statistics(path, statistics, convention=convention, dataset="fashion_mnist")
            self.networks[name] = (extractors[name], load_statistics(path, feature_widths([name])))
        return self.networks[name]

    def _batches(self, images: np.ndarray) -> Iterable[ImageBatch]:
        size = min(BATCH_SIZE, len(images))
        return pad_and_shard((images[i : i + size] for i in range(0, len(images), size)), size, self.mesh)

    def score_images(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns the scores of images with labels."""
        batches = [batch._replace(conditions=None) for batch in self._batches(images)]
        return self._score(batches, labels, fashion_classifier.NAME)

    def score(
        self, generator: ImageGenerator, sampler: SamplerConfig, count: int, name: str = fashion_classifier.NAME
    ) -> tuple[dict[str, float], np.ndarray]:
        """Returns (scores, images) of the first samples of a generator."""
        kept = list(generator.generate(sampler, count, min(BATCH_SIZE, count)))
        images, labels = (np.concatenate(rows) for rows in zip(*(batch.to_host() for batch in kept), strict=True))
        return self._score(kept, labels, name), images

    def _score(self, batches: Iterable[ImageBatch], labels: np.ndarray, name: str) -> dict[str, float]:
        extract, reference = self.open(name)
        statistics = ImageStatistics(MAX_ROWS)
        measure_images({name: extract}, batches, statistics)
        scores = compute_metrics(statistics, reference)
        if name == fashion_classifier.NAME:
            rows = statistics[fashion_classifier.KEY].rows
            scores["agreement"] = fashion_classifier.agreement(rows, labels[: len(rows)])
        return scores

    def authpct(self, images: np.ndarray) -> float:
        """Returns the percentage of images that are no copies of training images, by their pixels."""
        rows = self.data.images.reshape(len(self.data.images), 1, -1)

        def blocks():
            for start in range(0, len(rows), BLOCK):
                yield start, rows[start : start + BLOCK]

        return memorisation.measure(images.reshape(len(images), -1), None, blocks).results["authpct"]

    def velocity_loss(self, generator: ImageGenerator, count: int) -> float:
        """Returns the mean squared error of the velocity on the first `count` test images, whatever the network was
        trained to predict. Times are logit-normal; noise and times are the same for every model."""
        errors = []
        for draw, start in itertools.product(range(LOSS_DRAWS), range(0, count, BATCH_SIZE)):
            rows = slice(start, min(start + BATCH_SIZE, count))
            x_1 = images_from_uint8(self.data.test_images[rows])
            time_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(draw), start))
            t = jax.nn.sigmoid(jax.random.normal(time_key, (len(x_1),)))
            x_0 = jax.random.normal(noise_key, x_1.shape)
            labels = self.data.test_labels[rows].astype(np.int32)
            velocity = generator.model_fn(interpolate(x_0, x_1, t), t, labels)
            errors.append(np.square(np.asarray(velocity - (x_1 - x_0))).mean(axis=(1, 2, 3)))
        return float(np.concatenate(errors).mean())


def climb(
    axes: Mapping[str, Sequence[Any]], start: Mapping[str, Any], measure: Callable[[dict[str, Any]], float]
) -> tuple[dict[str, Any], float]:
    """Returns (settings, value) of a local minimum of `measure` over the grid of the axes, from the settings `start`.

    Goes along each axis in turn, to the next value as long as `measure` falls. Nothing is measured twice.
    """
    known: dict[tuple[int, ...], float] = {}
    names = list(axes)

    def value_at(place: tuple[int, ...]) -> float:
        if not all(0 <= index < len(axes[name]) for name, index in zip(names, place, strict=True)):
            return math.inf
        if place not in known:
            known[place] = measure({name: axes[name][index] for name, index in zip(names, place, strict=True)})
        return known[place]

    best = tuple(list(axes[name]).index(start[name]) for name in names)
    while True:
        before = best
        for axis, step in itertools.product(range(len(names)), (1, -1)):
            while True:
                place = tuple(index + step * (i == axis) for i, index in enumerate(best))
                if value_at(place) >= value_at(best):
                    break
                best = place
        if best == before:
            return {name: axes[name][index] for name, index in zip(names, best, strict=True)}, value_at(best)
