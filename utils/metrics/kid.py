"""Kernel Inception Distance (Binkowski et al., arXiv:1801.01401)."""

import numpy as np

from utils.metrics.prdc import check_feature_sets

SUBSET_SIZE = 1000
LEAST_FOR_ERROR = 4  # rows of each set


def kid(
    features_1: np.ndarray,
    features_2: np.ndarray,
    num_subsets: int = 100,
    subset_size: int = SUBSET_SIZE,
    seed: int = 2020,
) -> tuple[float, float | None]:
    """Returns (Kernel Inception Distance, its standard error) of two sets of features, (n, d) and (m, d).

    The squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, without bias, hence around 0 and perhaps
    below it for equal distributions (Binkowski et al., arXiv:1801.01401, eq. 4), averaged over random subsets of both
    sets. Number, size and draw of the subsets are torch-fidelity's defaults; sets smaller than a subset are taken
    whole.

    The error is the standard deviation that the distance would have if both sets were drawn anew: the variance of the
    U-statistic of all n and m rows (cf. Sutherland et al., arXiv:1611.04488, sec. 3; all terms are kept, as for equal
    distributions the first order vanishes), plus that of the mean over random subsets. None below four rows.
    ValueError below two rows or for different widths.
    """
    x, y = check_feature_sets(features_1, features_2)
    rng = np.random.RandomState(seed)
    sizes = [min(subset_size, len(rows)) for rows in (x, y)]
    has_error = min(sizes) >= LEAST_FOR_ERROR
    if sizes == [len(x), len(y)]:
        num_subsets = 1  # all would hold the same rows
    values, components = [], []
    for _ in range(num_subsets):
        a, b = (rows[rng.choice(len(rows), size, replace=False)] for rows, size in zip((x, y), sizes, strict=True))
        k_aa, k_bb, k_ab = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (k_aa, k_bb)]
        values.append(sum(within) - 2 * k_ab.mean())
        if has_error:
            components.append(_variance_components(k_aa, k_bb, k_ab))
    if not has_error:
        return float(np.mean(values)), None
    of_sets = _variance(np.mean(components, axis=0), len(x), len(y))
    of_subsets = np.var(values) / num_subsets
    return float(np.mean(values)), float(np.sqrt(of_sets + of_subsets))


def _variance(components: np.ndarray, n: int, m: int) -> float:
    """Returns the variance of the squared MMD of n and m rows: the sum of its Hoeffding components', each of which an
    estimate may put below 0."""
    weights = [4 / n, 4 / m, 2 / (n * (n - 1)), 2 / (m * (m - 1)), 4 / (n * m)]
    return float(np.dot(weights, np.maximum(components, 0)))


def _variance_components(k_xx: np.ndarray, k_yy: np.ndarray, k_xy: np.ndarray) -> tuple[float, ...]:
    """Returns unbiased estimates of the variances that the variance of the squared MMD is made of.

    With k~ the kernel centred in both arguments, in the order of `_variance`'s weights: of E k(x, x') - E k(x, y) over
    x, the same over y, and E k~(x, x')^2, E k~(y, y')^2, E k~(x, y)^2.
    """
    (sums_x, pairs_x), (sums_y, pairs_y) = _within(k_xx), _within(k_yy)
    n, m = k_xy.shape
    # The interaction of a layout with two random factors.
    rows, columns = k_xy.sum(axis=1), k_xy.sum(axis=0)
    squares = np.square(k_xy).sum() - np.square(rows).sum() / m - np.square(columns).sum() / n
    across = (squares + rows.sum() ** 2 / (n * m)) / ((n - 1) * (m - 1))
    # Estimated means of each row scatter by more than the means themselves.
    first_x = np.var(sums_x / (n - 2) - rows / m, ddof=1) - pairs_x / (n - 2) - across / m
    first_y = np.var(sums_y / (m - 2) - columns / n, ddof=1) - pairs_y / (m - 2) - across / n
    return first_x, first_y, pairs_x, pairs_y, across


def _within(kernel: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns (row sums without the diagonal, E k~(x, x')^2 of pairs without bias: Szekely and Rizzo, Annals of
    Statistics 2014, eq. 3.7)."""
    n, diagonal = len(kernel), np.diagonal(kernel)
    sums = kernel.sum(axis=1) - diagonal
    squares = np.square(kernel).sum() - np.square(diagonal).sum() - 2 / (n - 2) * np.square(sums).sum()
    return sums, (squares + sums.sum() ** 2 / ((n - 1) * (n - 2))) / (n * (n - 3))
