"""The mathematics of the scores: FID, KID, MIND, precision and recall, density and coverage, Inception Score.

Plain functions of features (n, d) or of their moments; utils/metrics/metrics.py says which metric takes which.
"""

from collections.abc import Iterator

import numpy as np
import scipy  # whose parts are imported when they are used
from jaxtyping import Float

from utils.base.bars import Bar
from utils.base.messages import UserError, progress_bar

# Fraction of a matrix's largest entry (or eigenvalue) that may be rounding: covariances are often stored in float32.
ROUNDING = 1e-5
ROUNDING_IN_FLOAT64 = 1e-11
KID_SUBSET = 1000  # rows of each set
MAX_KID_ROWS = 4000  # of a set whose kernel is held as a whole, 128 MB
MIN_ROWS_FOR_KID_ERROR = 4  # of each set
MIND_PROJECTIONS = 1000
MIND_BLOCK = 100  # projections at a time
PRECISION_NEIGHBOURS = 3  # k of precision and recall
DENSITY_NEIGHBOURS = 5  # k of density and coverage
INCEPTION_SCORE_PART = 5000  # samples


def check_gaussian(mu: np.ndarray, sigma: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and covariance in float64, the latter exactly symmetric; ValueError where they are no Gaussian."""
    mu = np.asarray(mu, np.float64)
    sigma = np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise ValueError(f"{name}: mean {mu.shape} and covariance {sigma.shape} must have shapes (d,) and (d, d)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name}: mean or covariance is NaN or infinite")
    difference = sigma - sigma.T
    if np.abs(difference, out=difference).max() > ROUNDING * max(sigma.max(), -sigma.min()):
        raise ValueError(f"{name}: the covariance is not symmetric")
    return mu, (sigma + sigma.T) / 2


def _check_eigenvalues(values: np.ndarray, name: str) -> np.ndarray:
    """Returns the eigenvalues of a covariance, those that rounding made negative raised to 0."""
    if values.min() < -ROUNDING * values.max():
        raise ValueError(f"{name}: the covariance has the negative eigenvalue {values.min():.3g}")
    return values.clip(min=0)


def covariance_root(sigma: Float[np.ndarray, "d d"], name: str = "covariance") -> Float[np.ndarray, "d r"]:
    """Returns L with L L^T = sigma, of as many columns as the rank of sigma, or more where rounding hides that.

    Raises ValueError, naming `name`, where sigma is not positive semi-definite.
    """
    # Cholesky's decomposition with pivots, which ends at the rank, in a tenth of the time of an eigendecomposition.
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=True)
    root = np.zeros((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    largest = sigma.diagonal().max()
    if np.abs(sigma - root @ root.T).max() <= ROUNDING_IN_FLOAT64 * max(largest, 0):
        return root

    # Rounded in float32, a matrix of low rank has small negative eigenvalues.
    values, vectors = scipy.linalg.eigh(sigma)
    return vectors * np.sqrt(_check_eigenvalues(values, name))


def frechet_distance(
    mu_1: np.ndarray,
    sigma_1: np.ndarray,
    mu_2: np.ndarray,
    sigma_2: np.ndarray,
    root_2: Float[np.ndarray, "d r"] | None = None,
) -> float:
    """Returns the squared Fréchet distance of two Gaussians, means (d,) and covariances (d, d), in [0, inf).

    For Inception's features it is the FID.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al., arXiv:1706.08500, eq. 6), in float64. With
    S_1 = K K^T and S_2 = L L^T the product S_1 S_2 has the eigenvalues of the symmetric (K^T L)(K^T L)^T, so that no
    square root of an unsymmetric matrix is taken and covariances of any rank will do. `root_2` is L where it is known,
    from `covariance_root`. Raises ValueError where shapes differ, and where a covariance is not symmetric or not
    positive semi-definite (beyond rounding in float32).
    """
    mu_1, sigma_1 = check_gaussian(mu_1, sigma_1, "first Gaussian")
    mu_2, sigma_2 = check_gaussian(mu_2, sigma_2, "second Gaussian")
    if mu_1.shape != mu_2.shape:
        raise ValueError(f"Gaussians over {mu_1.size} and {mu_2.size} features cannot be compared")
    root_1 = covariance_root(sigma_1, "first Gaussian")
    root_2 = covariance_root(sigma_2, "second Gaussian") if root_2 is None else root_2

    # tr (S_1 S_2)^(1/2) as the sum of the roots of its eigenvalues: as many as the lower of the ranks.
    product = root_1.T @ root_2 if root_1.shape[1] <= root_2.shape[1] else root_2.T @ root_1
    cross = np.sqrt(scipy.linalg.eigvalsh(product @ product.T).clip(min=0)).sum()
    distance = np.sum((mu_1 - mu_2) ** 2) + np.trace(sigma_1) + np.trace(sigma_2) - 2 * cross
    return max(0.0, float(distance))  # equal Gaussians come out within rounding of 0, on either side


def check_feature_sets(x: np.ndarray, y: np.ndarray, more_than: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns two sets of features, (n, d) and (m, d), in float64. Raises ValueError where they are too small or of
    different widths."""
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features of shapes {x.shape} and {y.shape} cannot be compared")
    if min(len(x), len(y)) <= more_than:
        raise ValueError(f"sets of {len(x)} and {len(y)} features: more than {more_than} are needed in each")
    return x, y


def kid(
    features_1: np.ndarray,
    features_2: np.ndarray,
    num_subsets: int = 100,
    subset_size: int = KID_SUBSET,
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
    Raises ValueError below two rows and for different widths.
    """
    x, y = check_feature_sets(features_1, features_2)
    rng = np.random.RandomState(seed)
    sizes = [min(subset_size, len(rows)) for rows in (x, y)]
    has_error = min(sizes) >= MIN_ROWS_FOR_KID_ERROR
    if sizes == [len(x), len(y)]:
        num_subsets = 1  # all would hold the same rows

    # Of small sets, the kernel of all rows is less work than those of all subsets.
    is_small = max(len(x), len(y)) <= MAX_KID_ROWS
    whole = [_kid_kernel(p, q) for p, q in ((x, x), (y, y), (x, y))] if is_small else None

    # The distance of each pair of subsets.
    values = []
    components = []
    for _ in progress_bar(range(num_subsets), "subsets", unit="subset", delay=2):
        a, b = (rng.choice(len(rows), size, replace=False) for rows, size in zip((x, y), sizes, strict=True))
        if whole is not None:
            k_aa, k_bb, k_ab = (k[np.ix_(i, j)] for k, (i, j) in zip(whole, ((a, a), (b, b), (a, b)), strict=True))
        else:
            k_aa, k_bb, k_ab = (_kid_kernel(p, q) for p, q in ((x[a], x[a]), (y[b], y[b]), (x[a], y[b])))
        within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (k_aa, k_bb)]
        values.append(sum(within) - 2 * k_ab.mean())
        if has_error:
            components.append(_variance_components(k_aa, k_bb, k_ab))

    # The error: of the sets, and of the choice of subsets.
    if not has_error:
        return float(np.mean(values)), None
    of_sets = _variance(np.mean(components, axis=0), len(x), len(y))
    of_subsets = np.var(values) / num_subsets
    return float(np.mean(values)), float(np.sqrt(of_sets + of_subsets))


def _kid_kernel(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    kernel = x @ y.T / x.shape[1] + 1
    return kernel * kernel * kernel  # NumPy's power of 3 takes far longer


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
    sums_x, pairs_x = _within(k_xx)
    sums_y, pairs_y = _within(k_yy)
    n, m = k_xy.shape
    # The interaction of a layout with two random factors.
    rows = k_xy.sum(axis=1)
    columns = k_xy.sum(axis=0)
    squares = np.square(k_xy).sum() - np.square(rows).sum() / m - np.square(columns).sum() / n
    across = (squares + rows.sum() ** 2 / (n * m)) / ((n - 1) * (m - 1))
    # Estimated means of each row scatter by more than the means themselves.
    first_x = np.var(sums_x / (n - 2) - rows / m, ddof=1) - pairs_x / (n - 2) - across / m
    first_y = np.var(sums_y / (m - 2) - columns / n, ddof=1) - pairs_y / (m - 2) - across / n
    return first_x, first_y, pairs_x, pairs_y, across


def _within(kernel: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns (row sums without the diagonal, E k~(x, x')^2 of pairs without bias: Szekely and Rizzo, Annals of
    Statistics 2014, eq. 3.7)."""
    n = len(kernel)
    diagonal = np.diagonal(kernel)
    sums = kernel.sum(axis=1) - diagonal
    squares = np.square(kernel).sum() - np.square(diagonal).sum() - 2 / (n - 2) * np.square(sums).sum()
    return sums, (squares + sums.sum() ** 2 / ((n - 1) * (n - 2))) / (n * (n - 3))


def mind(
    features_1: np.ndarray, features_2: np.ndarray, num_projections: int = MIND_PROJECTIONS, seed: int = 0
) -> tuple[float, float]:
    """Returns (MIND, its standard error) of two sets of features, (n, d) and (m, d).

    3 d times the mean over random directions of the mean squared difference between the sorted projections of both
    sets, of which the larger is cut to the size of the other by a random draw. It is 3 |mu_1 - mu_2|^2 for sets that
    differ by a shift.

    The error is the standard deviation that the distance would have if both sets and the directions were drawn anew,
    to first order: the influence of a row on it is its Kantorovich potential (del Barrio and Loubes, arXiv:1705.01299),
    here averaged over the directions. It is up to 1.5 times too large for sets of one distribution, where the first
    order vanishes. Raises ValueError below two rows and for different widths.
    """
    x, y = check_feature_sets(features_1, features_2)
    rng = np.random.default_rng(seed)
    count = min(len(x), len(y))
    width = x.shape[1]
    x, y = (rows if len(rows) == count else rows[rng.choice(len(rows), count, replace=False)] for rows in (x, y))

    values = []  # of each direction
    influences = np.zeros((2, count))  # of each row
    for start in progress_bar(range(0, num_projections, MIND_BLOCK), "projections", unit="block", delay=2):
        # In one dimension the optimal transport pairs the sorted values.
        directions = rng.standard_normal((width, min(MIND_BLOCK, num_projections - start)))
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

    # The error: of the sets, and of the choice of directions.
    distances = 3 * width * np.concatenate(values)
    influences *= 3 * width / num_projections
    of_sets = influences.var(axis=1, ddof=1).sum() / count
    of_directions = distances.var(ddof=1) / num_projections
    return float(distances.mean()), float(np.sqrt(of_sets + of_directions))


def prdc(
    reference: Float[np.ndarray, "n d"],
    samples: Float[np.ndarray, "m d"],
    precision_k: int = PRECISION_NEIGHBOURS,
    density_k: int = DENSITY_NEIGHBOURS,
) -> dict[str, float]:
    """Returns `precision`, `recall`, `density` and `coverage` of samples against a reference, each in [0, 1] but for
    the density, which is in [0, inf).

    Around each point of a set lies a ball out to its k-th nearest neighbour in the set. Precision: fraction of samples
    in a ball of the reference; recall: fraction of the reference in a ball of the samples (Kynkaanniemi et al.,
    arXiv:1904.06991, k = 3, as ADM's evaluator). Density: number of the reference's balls that a sample is in, over k;
    coverage: fraction of the reference's balls with a sample inside (Naeem et al., arXiv:2002.09797, k = 5). Time grows
    with the square of the numbers, memory with the numbers. Raises ValueError where a set has no more than k rows.
    """
    reference, samples = check_feature_sets(reference, samples, more_than=max(precision_k, density_k))
    ks = (precision_k, density_k)
    # Distances within both sets, then between them.
    total = 2 * len(reference) + len(samples)
    bar = progress_bar(total=total, desc="neighbours", unit="row", delay=2)
    reference_radii = _neighbour_radii(reference, ks, bar)
    sample_radii = _neighbour_radii(samples, ks[:1], bar)

    # Of each sample: whether it lies in a ball, and in how many. Of each image: whether it does, and whether its own
    # ball holds a sample.
    precise = np.zeros(len(samples), bool)
    balls = np.zeros(len(samples), int)
    recalled = np.zeros(len(reference), bool)
    covered = np.zeros(len(reference), bool)
    for rows, distances in _squared_distances(reference, samples):
        precise |= (distances <= reference_radii[rows, :1]).any(axis=0)
        recalled[rows] = (distances <= sample_radii[:, 0]).any(axis=1)
        inside = distances <= reference_radii[rows, 1:]
        balls += inside.sum(axis=0)
        covered[rows] = inside.any(axis=1)
        bar.update(len(inside))
    bar.close()
    return {
        "precision": float(precise.mean()),
        "recall": float(recalled.mean()),
        "density": float(balls.mean() / density_k),
        "coverage": float(covered.mean()),
    }


def _squared_distances(x: np.ndarray, y: np.ndarray, block: int = 1024) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows of x, their squared distances (block, m) to all of y)."""
    # |x - y|^2 = |x|^2 + |y|^2 - 2 x.y: one matmul. Rounding can leave it just below 0.
    y_norms = np.square(y).sum(axis=1)
    for start in range(0, len(x), block):
        part = x[start : start + block]
        distances = np.square(part).sum(axis=1)[:, None] + y_norms - 2 * part @ y.T
        yield slice(start, start + block), distances.clip(min=0)


def _neighbour_radii(x: np.ndarray, ks: tuple[int, ...], bar: Bar) -> np.ndarray:
    """Returns the squared distance of each row to its k-th nearest other row, (n, len(ks))."""
    radii = np.empty((len(x), len(ks)))
    for rows, distances in _squared_distances(x, x):
        distances[np.arange(len(distances)), np.arange(rows.start, rows.start + len(distances))] = 0  # itself, exactly
        radii[rows] = np.partition(distances, ks, axis=1)[:, list(ks)]  # place 0 is the row itself
        bar.update(len(distances))
    return radii


class InceptionScore:
    """Inception Score (Salimans et al., arXiv:1606.03498, section 4) of class probabilities, in memory that does not
    grow.

    It is exp of the mean divergence of each sample's probabilities from their average, over parts of `split_size`
    samples as ADM's evaluator takes them; then mean and standard deviation over the parts.
    """

    def __init__(self, split_size: int = INCEPTION_SCORE_PART):
        self.split_size = split_size
        self._counts = []  # of samples in each part
        self._sums = []  # of their probabilities
        self._negative_entropies = []  # of each sample, summed

    def update(self, probabilities: Float[np.ndarray, "n c"]) -> None:
        """Adds rows that sum to 1."""
        rows = np.asarray(probabilities, np.float64)
        while len(rows):
            # A row may be the first of a part, and a batch may reach over several parts.
            if not self._counts or self._counts[-1] == self.split_size:
                self._counts.append(0)
                self._sums.append(np.zeros(rows.shape[1]))
                self._negative_entropies.append(0.0)
            part, rows = np.split(rows, [self.split_size - self._counts[-1]])
            self._counts[-1] += len(part)
            self._sums[-1] += part.sum(axis=0)
            self._negative_entropies[-1] += scipy.special.xlogy(part, part).sum()

    @property
    def mean_and_std(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts. Raises UserError before the first row."""
        if not self._counts:
            raise UserError("the Inception Score of no samples is not defined; --num_samples must be 2 or more")
        scores = []
        for count, total, negative_entropy in zip(self._counts, self._sums, self._negative_entropies, strict=True):
            # Mean divergence = entropy of the average less the average entropy.
            average = total / count
            scores.append(np.exp(negative_entropy / count - scipy.special.xlogy(average, average).sum()))
        return float(np.mean(scores)), float(np.std(scores))
