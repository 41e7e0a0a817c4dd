"""MIND, a sliced Wasserstein distance of Inception features (arXiv:2605.06797), for few samples."""

import numpy as np

from utils.metrics.prdc import check_feature_sets

NUM_PROJECTIONS = 1000
BLOCK = 100  # projections at a time


def mind(
    features_1: np.ndarray, features_2: np.ndarray, num_projections: int = NUM_PROJECTIONS, seed: int = 0
) -> tuple[float, float]:
    """Returns (MIND, its standard error) of two sets of features, (n, d) and (m, d).

    3 d times the mean over random directions of the mean squared difference between the sorted projections of both
    sets, of which the larger is cut to the size of the other by a random draw. It is 3 |mu_1 - mu_2|^2 for sets that
    differ by a shift.

    The error is the standard deviation that the distance would have if both sets and the directions were drawn anew,
    to first order: the influence of a row on it is its Kantorovich potential (del Barrio and Loubes, arXiv:1705.01299),
    here averaged over the directions. It is up to 1.5 times too large for sets of one distribution, where the first
    order vanishes. ValueError below two rows or for different widths.
    """
    x, y = check_feature_sets(features_1, features_2)
    rng = np.random.default_rng(seed)
    count, width = min(len(x), len(y)), x.shape[1]
    x, y = (rows if len(rows) == count else rows[rng.choice(len(rows), count, replace=False)] for rows in (x, y))
    values, influences = [], np.zeros((2, count))
    for start in range(0, num_projections, BLOCK):
        directions = rng.standard_normal((width, min(BLOCK, num_projections - start)))
        directions /= np.linalg.norm(directions, axis=0)
        projections = np.stack([x @ directions, y @ directions])
        order = projections.argsort(axis=1)
        ordered = np.take_along_axis(projections, order, axis=1)
        difference = ordered[0] - ordered[1]
        values.append(np.square(difference).mean(axis=0))
        # The potentials' slopes are twice the difference, to one side and to the other; integrated by trapezoids.
        slopes = np.stack([difference[1:] + difference[:-1], -difference[1:] - difference[:-1]])
        potentials = np.zeros_like(ordered)
        np.cumsum(np.diff(ordered, axis=1) * slopes, axis=1, out=potentials[:, 1:])
        by_row = np.empty_like(potentials)
        np.put_along_axis(by_row, order, potentials, axis=1)
        influences += by_row.sum(axis=2)
    distances = 3 * width * np.concatenate(values)
    influences *= 3 * width / num_projections
    of_sets = influences.var(axis=1, ddof=1).sum() / count
    of_directions = distances.var(ddof=1) / num_projections
    return float(distances.mean()), float(np.sqrt(of_sets + of_directions))
