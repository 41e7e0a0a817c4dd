"""Kernel Inception Distance (Binkowski et al., arXiv:1801.01401)."""

import numpy as np

from utils.metrics.prdc import check_feature_sets

SUBSET_SIZE = 1000


def kid(
    features_1: np.ndarray,
    features_2: np.ndarray,
    num_subsets: int = 100,
    subset_size: int = SUBSET_SIZE,
    seed: int = 2020,
) -> tuple[float, float | None]:
    """(Kernel Inception Distance, its standard error) of two sets of features, (n, d) and (m, d).

    The squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, without bias, hence around 0 and perhaps
    below it for equal distributions (Binkowski et al., arXiv:1801.01401, eq. 4), averaged over random subsets of both
    sets. Number, size and draw of the subsets are torch-fidelity's defaults; sets smaller than a subset are taken
    whole, and where both are, there is nothing to vary and no error: None. ValueError below two rows or for different
    widths.
    """
    x, y = check_feature_sets(features_1, features_2)
    rng = np.random.RandomState(seed)
    sizes = [min(subset_size, len(rows)) for rows in (x, y)]
    values = []
    for _ in range(num_subsets):
        a, b = (rows[rng.choice(len(rows), size, replace=False)] for rows, size in zip((x, y), sizes, strict=True))
        k_aa, k_bb, k_ab = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (k_aa, k_bb)]
        values.append(sum(within) - 2 * k_ab.mean())
        if sizes == [len(x), len(y)]:
            return float(values[0]), None
    return float(np.mean(values)), float(np.std(values) / np.sqrt(num_subsets))
