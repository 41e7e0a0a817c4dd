"""Optimal transport between noise and data: which noise goes with which image. Mathematics, in NumPy.

Within a batch: Tong et al., arXiv:2302.00482; with conditions (C2OT): Cheng and Schwing, arXiv:2503.10636. Between all
of the noise and the points of a data set (semidiscrete): arXiv:2509.25519.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64, Shaped
from scipy.optimize import linear_sum_assignment

# Streams of random numbers under one seed.
TRAINING = 0
FITTING = 1
TESTING = 2  # of potentials

SHARE_BELOW = 0.2  # share of all pairs that may cost no more than a row's own pair: it determines the weight of C2OT


# --- Noise ---


def make_key(seed: int, stream: int) -> np.ndarray:
    """Returns the key of a stream of random numbers; a seed may be negative, as JAX's may."""
    return np.array([seed % 2**64, stream], np.uint64)


def draw_rows(seed: int, step: int, rows: Sequence[int], shape: Sequence[int]) -> Float32[np.ndarray, "n ..."]:
    """Returns standard normal noise (n, *shape) for `rows` of the global batch of a step; each is a function of
    (seed, step, row) alone."""
    # A counter-based generator (Philox; Salmon et al., doi:10.1145/2063384.2063405): each row has a place of its own
    # in the stream. The first word of the counter counts the numbers of a row.
    noise = np.empty((len(rows), *shape), np.float32)
    for place, row in enumerate(rows):
        generator = np.random.Generator(np.random.Philox(key=make_key(seed, TRAINING), counter=[0, 0, row, step]))
        generator.standard_normal(out=noise[place], dtype=np.float32)
    return noise


def draw_block(seed: int, stream: int, part: int, number: int, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Returns standard normal noise of a shape: block `number` of part `part` of a stream other than TRAINING."""
    generator = np.random.Generator(np.random.Philox(key=make_key(seed, stream), counter=[0, 0, part, number]))
    return generator.standard_normal(shape, dtype=np.float32)


# --- Within a batch ---


def squared_distances(x_1: Shaped[np.ndarray, "n ..."], x_0: Shaped[np.ndarray, "m ..."]) -> Float64[np.ndarray, "n m"]:
    """Returns |x_1[i] - x_0[j]|^2 of flattened rows, in float64."""
    data, noise = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (x_1, x_0))
    return np.square(data).sum(axis=1)[:, None] + np.square(noise).sum(axis=1) - 2 * data @ noise.T


def assign(cost: Float64[np.ndarray, "n n"]) -> Int64[np.ndarray, " n"]:
    """Returns the assignment of the lowest total cost: data row i gets noise row perm[i]."""
    return linear_sum_assignment(cost)[1]


def couple(
    x_1: Shaped[np.ndarray, "n ..."],
    x_0: Shaped[np.ndarray, "n ..."],
    labels: Int[np.ndarray, " n"] | None = None,
    conditions: Shaped[np.ndarray, "n k"] | None = None,
    weight: float | None = None,
) -> Int64[np.ndarray, " n"]:
    """Returns the permutation that gives data row i the noise row perm[i], at the lowest sum of costs.

    The cost of a pair is |x_1 - x_0|^2 and, with `conditions`, weight (1 - cosine of the two rows' conditions), where
    the noise of row j has the condition of row j (C2OT). By default, `find_weight` finds the weight anew for each call,
    so that a resumed run finds the same. With labels, rows change places within a label only: the noise stays standard
    normal given the label.

    Without conditions, a scale of the noise changes no permutation: of |x_1 - s n|^2, only -2 s <x_1, n> depends on the
    pairing.
    """
    perm = np.arange(len(x_1))
    parts = [perm.copy()] if labels is None else [np.nonzero(labels == label)[0] for label in np.unique(labels)]
    for rows in parts:
        cost = squared_distances(x_1[rows], x_0[rows])
        if conditions is not None:
            distance = cosine_distances(conditions[rows])
            cost += (find_weight(cost, distance) if weight is None else weight) * distance
        perm[rows] = rows[assign(cost)]
    return perm


def cosine_distances(conditions: Shaped[np.ndarray, "n k"]) -> Float64[np.ndarray, "n n"]:
    """Returns 1 - cosine, in [0, 2], of each pair of rows: 0 for a row and itself, 1 for a row of zeros and another."""
    rows = np.asarray(conditions, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    distance = np.maximum(1 - units @ units.T, 0)
    np.fill_diagonal(distance, 0)
    return distance


def find_weight(
    cost: Float64[np.ndarray, "n n"], distance: Float64[np.ndarray, "n n"], share: float = SHARE_BELOW
) -> float:
    """Returns the weight w >= 0 at which a `share` of the pairs (i, j) have cost_ij + w distance_ij <= cost_ii.

    It is 0 where fewer pairs than that fulfil it at w = 0. Where more of them do at any weight, as pairs of distance 0,
    one of the other pairs is left.
    """
    # A pair that costs less than row i's own pair does so up to a limit of w; the weight is one of these limits.
    gain = np.diagonal(cost)[:, None] - cost
    is_apart = distance > 0
    limits = np.sort(gain[is_apart] / distance[is_apart])[::-1]
    always = np.count_nonzero(~is_apart & (gain >= 0))
    place = max(int(np.ceil(share * cost.size)) - always, 1) - 1
    return float(max(limits[place], 0)) if place < len(limits) else 0.0


# --- Semidiscrete ---


class Cells:
    """The points y_j of one class with their potentials g_j: every noise x_0 belongs to the cell of one point.

    That point is argmin_j |x_0 - y_j|^2 / 2 - g_j, or argmax_j <x_0, y_j> + g_j - |y_j|^2 / 2. x_0 is `scale` times
    standard normal noise; the potentials depend on the scale.
    """

    def __init__(self, points: Float32[np.ndarray, "n d"], scale: float = 1.0):
        # Subtracting the mean of the points changes no winner, and keeps the last digits of float32.
        self.halves = _squared_lengths(points) / 2
        self.directions = points - points.mean(axis=0, dtype=np.float64).astype(np.float32)
        self.directions *= np.float32(scale)
        self.lengths = np.sqrt(_squared_lengths(self.directions))
        self.offsets = -self.halves

    def __len__(self) -> int:
        return len(self.halves)

    def set_potentials(self, potentials: Float64[np.ndarray, " n"]) -> None:
        # A common constant changes no winner; without it, the offsets are small.
        self.offsets = potentials - self.halves
        self.offsets -= self.offsets.mean()

    def find_winners(self, noise: Float32[np.ndarray, "b d"]) -> Int64[np.ndarray, " b"]:
        """Returns the number of the winning point of each row of standard normal noise.

        It depends neither on how rows are batched nor on the library that multiplies matrices: float32 finds the
        candidates, and float64 decides between those within the rounding errors of float32.
        """
        scores = noise @ self.directions.T
        scores += self.offsets.astype(np.float32)
        winners = scores.argmax(axis=1)
        highest = scores[np.arange(len(noise)), winners]

        # Twice the rounding error of a sum of d products and of the offsets, with a margin.
        size = np.linalg.norm(noise, axis=1) * self.lengths.max() * np.sqrt(noise.shape[1]) + np.abs(self.offsets).max()
        lowest = highest - 4 * np.finfo(np.float32).eps * size.astype(np.float32)
        (close,) = np.nonzero(np.count_nonzero(scores >= lowest[:, None], axis=1) > 1)
        for row in close:
            (candidates,) = np.nonzero(scores[row] >= lowest[row])
            products = self.directions[candidates].astype(np.float64) * noise[row].astype(np.float64)
            winners[row] = candidates[np.argmax(products.sum(axis=1) + self.offsets[candidates])]
        return winners


def _squared_lengths(rows: Float32[np.ndarray, "n d"], size: int = 4096) -> Float64[np.ndarray, " n"]:
    # In pieces, so that the copies in float64 stay small.
    pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
    return np.concatenate([np.square(piece, dtype=np.float64).sum(axis=1) for piece in pieces])


def chi_squared(counts: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> float:
    """Returns an unbiased estimate of sum_j P_j^2 / b_j - 1, where P_j is the probability that point j wins.

    `counts` are the wins of each point, `weights` the wanted shares b_j. It is 0 where all points win their share; the
    estimate may be negative.
    """
    total = counts.sum()
    counts = counts.astype(np.float64)
    return float(((counts * counts - counts) / weights).sum() / (total * (total - 1)) - 1)
