"""MIND, a sliced Wasserstein distance of Inception features (arXiv:2605.06797), for few samples."""

import numpy as np

from utils.metrics.prdc import check_feature_sets

NUM_PROJECTIONS = 1000
BLOCK = 100  # projections at a time


def mind(
    features_1: np.ndarray, features_2: np.ndarray, num_projections: int = NUM_PROJECTIONS, seed: int = 0
) -> tuple[float, float]:
    """(MIND, its standard error over projections) of two sets of features, (n, d) and (m, d).

    3 d times the mean over random directions of the mean squared difference between the sorted projections of both
    sets, of which the larger is cut to the size of the other by a random draw. It is 3 |mu_1 - mu_2|^2 for sets that
    differ by a shift. ValueError below two rows or for different widths.
    """
    x, y = check_feature_sets(features_1, features_2)
    rng = np.random.default_rng(seed)
    count, width = min(len(x), len(y)), x.shape[1]
    x, y = (rows if len(rows) == count else rows[rng.choice(len(rows), count, replace=False)] for rows in (x, y))
    values = []
    for start in range(0, num_projections, BLOCK):
        directions = rng.standard_normal((width, min(BLOCK, num_projections - start)))
        directions /= np.linalg.norm(directions, axis=0)
        difference = np.sort(x @ directions, axis=0) - np.sort(y @ directions, axis=0)
        values.append(np.square(difference).mean(axis=0))
    distances = 3 * width * np.concatenate(values)
    return float(distances.mean()), float(distances.std(ddof=1) / np.sqrt(num_projections))
