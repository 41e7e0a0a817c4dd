"""Losses of predictors without training on the digits, by t: how low l2_loss can be, and what a model has to beat.

python benchmarks/loss_floor.py
"""

import common  # noqa: F401 (puts the project on the path)
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from utils.data.arrays import load_digits
from utils.data.dataset import DataOptions
from utils.flags import program
from utils.images.decoding import MAX_MEGAPIXELS
from utils.objectives.flow_matching import MAX_PATH_TIME
from utils.training.evaluation import LOSS_TIMES

SHRINKAGE = 0.1  # of a class's covariance towards that within all classes


def define_flags() -> None:
    flags.DEFINE_integer("draws", 16, "Draws of noise for every image.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.")


def read_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images in [-1, 1] as rows, labels)."""
    source = load_digits("digits", split, DataOptions(None, None, "refuse", MAX_MEGAPIXELS)).source
    return source.images.reshape(len(source), -1) / 127.5 - 1, source.labels


def linear_estimate(x_t: np.ndarray, t: float, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """The best linear estimate of x_1 from x_t; if the data were Gaussian, no estimate would be better."""
    of_x_t = t**2 * covariance + (1 - t) ** 2 * np.eye(len(mean))
    return mean + (x_t - t * mean) @ np.linalg.solve(of_x_t, t * covariance)


def memorised_estimate(x_t: np.ndarray, t: float, images: np.ndarray) -> np.ndarray:
    """The mean of `images`, weighted by how likely each has become x_t: the exact E[x_1 | x_t] of this finite set."""
    squares = (x_t**2).sum(1)[:, None] - 2 * t * x_t @ images.T + t**2 * (images**2).sum(1)
    log_weights = -squares / (2 * (1 - t) ** 2)
    weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
    return weights @ images / weights.sum(1, keepdims=True)


def velocity_loss(estimate: np.ndarray, x_1: np.ndarray, t: float) -> float:
    """Mean squared error of the velocity that an estimate of x_1 stands for: v = (x_1 - x_t) / (1 - t)."""
    return float(((estimate - x_1) ** 2).mean() / (1 - t) ** 2)


def measure(times: tuple[float, ...], draws: int, seed: int) -> dict[str, list[float]]:
    """{predictor: loss at every time}. All are fitted to the training images; all but the last are scored on others."""
    (train, train_labels), (held_out, held_out_labels) = (read_digits(split) for split in ("train", "validation"))
    classes = range(10)
    means = np.stack([train[train_labels == label].mean(0) for label in classes])
    within = np.cov((train - means[train_labels]).T)
    of_class = [(1 - SHRINKAGE) * np.cov(train[train_labels == label].T) + SHRINKAGE * within for label in classes]
    rng = np.random.default_rng(seed)
    losses: dict[str, list[float]] = {}
    for t in times:
        a = min(t, MAX_PATH_TIME)

        def corrupt(images, a=a):
            x_1 = np.repeat(images, draws, axis=0)
            return x_1, a * x_1 + (1 - a) * rng.normal(size=x_1.shape)

        x_1, x_t = corrupt(held_out)
        labels = np.repeat(held_out_labels, draws)
        by_class = np.empty_like(x_1)
        zero = 1 + (held_out**2).mean()
        for label in classes:
            rows = labels == label
            by_class[rows] = linear_estimate(x_t[rows], a, means[label], of_class[label])
        linear = linear_estimate(x_t, a, train.mean(0), np.cov(train.T))
        seen, seen_t = corrupt(train)
        labels = np.repeat(train_labels, draws)
        memorised = np.empty_like(seen)
        for label in classes:
            rows = labels == label
            memorised[rows] = memorised_estimate(seen_t[rows], a, train[train_labels == label])
        found = {
            "zero": zero,
            "best linear": velocity_loss(linear, x_1, a),
            "best linear per class": velocity_loss(by_class, x_1, a),
            "memorising, on training images": velocity_loss(memorised, seen, a),
        }
        for name, loss in found.items():
            losses.setdefault(name, []).append(loss)
    return losses


def main(config: ConfigDict) -> None:
    t = 1 / (1 + np.exp(-np.random.default_rng(config.seed).normal(size=100_000)))  # as training draws it
    print("| predictor | " + " | ".join(f"{time:.1f}" for time in LOSS_TIMES) + " | `l2_loss` |")
    print("|---|" + "---:|" * (len(LOSS_TIMES) + 1))
    for name, losses in measure(LOSS_TIMES, config.draws, config.seed).items():
        row = [*losses, np.interp(t, LOSS_TIMES, losses).mean()]
        print(f"| {name} | " + " | ".join(f"{loss:.3f}" for loss in row) + " |")


if __name__ == "__main__":
    program.run_program(define_flags, main)
