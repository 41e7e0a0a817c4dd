"""Precision, recall, density and coverage of samples, from nearest neighbours in feature space."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

PRECISION_NEIGHBOURS = 3  # k of precision and recall
DENSITY_NEIGHBOURS = 5  # k of density and coverage


def prdc(
    reference: Float[np.ndarray, "n d"],
    samples: Float[np.ndarray, "m d"],
    precision_k: int = PRECISION_NEIGHBOURS,
    density_k: int = DENSITY_NEIGHBOURS,
) -> dict[str, float]:
    """`precision`, `recall`, `density` and `coverage` of samples against reference features, from nearest neighbours.

    Around each point of a set lies a ball out to its k-th nearest neighbour in the set. Precision: fraction of samples
    in a ball of the reference; recall: fraction of the reference in a ball of the samples (Kynkaanniemi et al.,
    arXiv:1904.06991, k = 3, as ADM's evaluator). Density: number of the reference's balls that a sample is in, over k;
    coverage: fraction of the reference's balls with a sample inside (Naeem et al., arXiv:2002.09797, k = 5). Time grows
    with the square of the numbers, memory with the numbers. ValueError where a set has no more than k rows.
    """
    reference, samples = check_feature_sets(reference, samples, more_than=max(precision_k, density_k))
    ks = (precision_k, density_k)
    reference_radii, sample_radii = _neighbour_radii(reference, ks), _neighbour_radii(samples, ks[:1])
    precise, balls = np.zeros(len(samples), bool), np.zeros(len(samples), int)
    recalled, covered = np.zeros(len(reference), bool), np.zeros(len(reference), bool)
    for rows, distances in _squared_distances(reference, samples):
        precise |= (distances <= reference_radii[rows, :1]).any(axis=0)
        recalled[rows] = (distances <= sample_radii[:, 0]).any(axis=1)
        inside = distances <= reference_radii[rows, 1:]
        balls += inside.sum(axis=0)
        covered[rows] = inside.any(axis=1)
    return {
        "precision": float(precise.mean()),
        "recall": float(recalled.mean()),
        "density": float(balls.mean() / density_k),
        "coverage": float(covered.mean()),
    }


def check_feature_sets(x: np.ndarray, y: np.ndarray, more_than: int = 1) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features of shapes {x.shape} and {y.shape} cannot be compared")
    if min(len(x), len(y)) <= more_than:
        raise ValueError(f"sets of {len(x)} and {len(y)} features: more than {more_than} are needed in each")
    return x, y


def _squared_distances(x: np.ndarray, y: np.ndarray, block: int = 1024) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of x, their squared distances (block, m) to all of y), block by block."""
    y_norms = np.square(y).sum(axis=1)
    for start in range(0, len(x), block):
        part = x[start : start + block]
        distances = np.square(part).sum(axis=1)[:, None] + y_norms - 2 * part @ y.T
        yield slice(start, start + block), distances.clip(min=0)


def _neighbour_radii(x: np.ndarray, ks: tuple[int, ...]) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row, (n, len(ks))."""
    radii = np.empty((len(x), len(ks)))
    for rows, distances in _squared_distances(x, x):
        distances[np.arange(len(distances)), np.arange(rows.start, rows.start + len(distances))] = 0  # itself, exactly
        radii[rows] = np.partition(distances, ks, axis=1)[:, list(ks)]  # place 0 is the row itself
    return radii
