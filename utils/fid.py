"""Statistics of Inception features and what is made of them: FID, KID, precision and recall, density and coverage,
Inception Score. NumPy and SciPy only."""

import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import scipy.special
from jaxtyping import Float, Int

from utils.errors import UserError
from utils.external import BadFileError, read_npz, read_npz_headers, read_pickled_arrays

# Share of a matrix's largest entry (or eigenvalue) that may be rounding: covariances are often stored in float32.
ROUNDING = 1e-5

# Of the network in utils/inception.py: pool3, and seven channels at 17x17 places.
POOL_FEATURES, SPATIAL_FEATURES = 2048, 2023
MAX_FEATURES = 50_000  # rows that a statistics file may hold: 0.4 GB

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # k of precision and recall, and of density and coverage


class FeatureStatistics:
    """Mean and covariance of feature rows seen so far, in float64, at a memory cost that does not grow with them.

    Each batch is centred on its own mean before it is merged (Chan, Golub and LeVeque 1983, eq. 2.1), so that a mean
    far larger than the spread costs no precision.
    """

    def __init__(self):
        self.num_samples = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))  # sum of (x - mean)(x - mean)^T

    def update(self, features: Float[np.ndarray, "n d"]) -> None:
        """Adds n >= 0 rows. UserError where they are NaN or infinite, ValueError where the shape does not fit."""
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or (self.num_samples and features.shape[1] != self._mean.size):
            expected = f"(n, {self._mean.size or 'd'})"
            raise ValueError(f"features have shape {features.shape}, expected {expected}")
        broken = np.count_nonzero(~np.isfinite(features).all(axis=1))
        if broken:
            raise UserError(
                f"{broken} of {len(features)} feature rows after sample {self.num_samples} are NaN or infinite; "
                "check --inception_weights and the images"
            )
        if not len(features):
            return
        if not self.num_samples:
            self._mean = np.zeros(features.shape[1])
            self._scatter = np.zeros((features.shape[1],) * 2)
        mean = features.mean(axis=0)
        centred, shift = features - mean, mean - self._mean
        total = self.num_samples + len(features)
        self._scatter += centred.T @ centred
        self._scatter += np.outer(shift, shift) * (self.num_samples * len(features) / total)
        self._mean += shift * (len(features) / total)
        self.num_samples = total

    @property
    def mu(self) -> Float[np.ndarray, " d"]:
        """Mean of the rows. UserError before the first."""
        if self.num_samples < 1:
            raise UserError("the mean of no samples is not defined; --num_samples must be 2 or more")
        return self._mean.copy()

    @property
    def sigma(self) -> Float[np.ndarray, "d d"]:
        """Unbiased covariance (divisor n - 1), as numpy.cov(rowvar=False). UserError below two samples."""
        if self.num_samples < 2:
            raise UserError(
                f"the covariance of {self.num_samples} samples is not defined; --num_samples must be 2 or more"
            )
        return self._scatter / (self.num_samples - 1)


def _check_gaussian(mu: np.ndarray, sigma: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The two in float64, sigma exactly symmetric."""
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise ValueError(f"{name}: mean {mu.shape} and covariance {sigma.shape} must have shapes (d,) and (d, d)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name}: mean or covariance is NaN or infinite")
    if np.abs(sigma - sigma.T).max() > ROUNDING * np.abs(sigma).max():
        raise ValueError(f"{name}: the covariance is not symmetric")
    return mu, (sigma + sigma.T) / 2


def _check_eigenvalues(values: np.ndarray, name: str) -> np.ndarray:
    """The eigenvalues of a covariance, those that rounding made negative raised to 0."""
    if values.min() < -ROUNDING * values.max():
        raise ValueError(f"{name}: the covariance has the negative eigenvalue {values.min():.3g}")
    return values.clip(min=0)


def check_covariance(mu: np.ndarray, sigma: np.ndarray, name: str) -> None:
    """ValueError where `frechet_distance` would refuse the Gaussian, found in a tenth of the time."""
    _, sigma = _check_gaussian(mu, sigma, name)
    if len(sigma) < 32:
        _check_eigenvalues(scipy.linalg.eigvalsh(sigma), name)
        return
    try:
        largest = scipy.sparse.linalg.eigsh(sigma, 1, which="LA", return_eigenvectors=False, tol=1e-3)[0]
        # Which succeeds where no eigenvalue is below the lowest that rounding may leave.
        scipy.linalg.cholesky(sigma + 0.99 * ROUNDING * largest * np.eye(len(sigma)))
    except (scipy.linalg.LinAlgError, scipy.sparse.linalg.ArpackError):
        _check_eigenvalues(scipy.linalg.eigvalsh(sigma), name)


def covariance_root(sigma: Float[np.ndarray, "d d"], name: str = "covariance") -> Float[np.ndarray, "d d"]:
    """L with L L^T = sigma; ValueError, saying `name`, where sigma is not positive semi-definite."""
    values, vectors = scipy.linalg.eigh(sigma)
    return vectors * np.sqrt(_check_eigenvalues(values, name))


def frechet_distance(
    mu_1: Float[np.ndarray, " d"],
    sigma_1: Float[np.ndarray, "d d"],
    mu_2: Float[np.ndarray, " d"],
    sigma_2: Float[np.ndarray, "d d"],
    root_2: Float[np.ndarray, "d d"] | None = None,
) -> float:
    """Squared Fréchet distance of two Gaussians, in [0, inf); of Inception features, the FID.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al., arXiv:1706.08500, eq. 6), in float64. With
    S_2 = L L^T the product S_1 S_2 has the eigenvalues of the symmetric L^T S_1 L, so that no square root of an
    unsymmetric matrix is taken and covariances of any rank will do. `root_2` is L where it is known, from
    `covariance_root`. ValueError where shapes differ or a covariance is not symmetric or not positive semi-definite
    (beyond rounding in float32).
    """
    mu_1, sigma_1 = _check_gaussian(mu_1, sigma_1, "first Gaussian")
    mu_2, sigma_2 = _check_gaussian(mu_2, sigma_2, "second Gaussian")
    if mu_1.shape != mu_2.shape:
        raise ValueError(f"Gaussians over {mu_1.size} and {mu_2.size} features cannot be compared")
    check_covariance(mu_1, sigma_1, "first Gaussian")
    root = covariance_root(sigma_2, "second Gaussian") if root_2 is None else root_2
    cross = np.sqrt(scipy.linalg.eigvalsh(root.T @ sigma_1 @ root).clip(min=0)).sum()
    distance = np.sum((mu_1 - mu_2) ** 2) + np.trace(sigma_1) + np.trace(sigma_2) - 2 * cross
    return max(0.0, float(distance))  # equal Gaussians come out within rounding of 0, on either side


def kernel_distance(
    features_1: Float[np.ndarray, "n d"],
    features_2: Float[np.ndarray, "m d"],
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """(Kernel Inception Distance, its standard error) of two sets of features.

    The squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, without bias, hence around 0 and perhaps
    below it for equal distributions (Binkowski et al., arXiv:1801.01401, eq. 4), averaged over random subsets of both
    sets. Number, size and draw of the subsets are torch-fidelity's defaults; sets smaller than a subset are taken
    whole. ValueError below two rows or for different widths.
    """
    x, y = _check_sets(features_1, features_2)
    rng = np.random.RandomState(seed)
    sizes = [min(subset_size, len(rows)) for rows in (x, y)]
    values = []
    for _ in range(num_subsets):
        a, b = (rows[rng.choice(len(rows), size, replace=False)] for rows, size in zip((x, y), sizes, strict=True))
        k_aa, k_bb, k_ab = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (k_aa, k_bb)]
        values.append(sum(within) - 2 * k_ab.mean())
    return float(np.mean(values)), float(np.std(values) / np.sqrt(num_subsets))


def manifold_metrics(
    reference: Float[np.ndarray, "n d"],
    samples: Float[np.ndarray, "m d"],
    precision_k: int = PRECISION_NEIGHBOURS,
    density_k: int = DENSITY_NEIGHBOURS,
) -> dict[str, float]:
    """`precision`, `recall`, `density` and `coverage` of samples against reference features, from nearest neighbours.

    Around each point of a set lies a ball out to its k-th nearest neighbour in the set. Precision: share of samples in
    a ball of the reference; recall: share of the reference in a ball of the samples (Kynkaanniemi et al.,
    arXiv:1904.06991, k = 3, as ADM's evaluator). Density: number of the reference's balls that a sample is in, over k;
    coverage: share of the reference's balls with a sample inside (Naeem et al., arXiv:2002.09797, k = 5). Time grows
    with the square of the numbers, memory with the numbers. ValueError where a set has no more than k rows.
    """
    reference, samples = _check_sets(reference, samples, more_than=max(precision_k, density_k))
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


def _check_sets(x: np.ndarray, y: np.ndarray, more_than: int = 1) -> tuple[np.ndarray, np.ndarray]:
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


class InceptionScore:
    """Inception Score (Salimans et al., arXiv:1606.03498, section 4) of class probabilities, in memory that does not
    grow: exp of the mean divergence of each sample's probabilities from their average, over parts of `split_size`
    samples as ADM's evaluator takes them; then mean and standard deviation over the parts."""

    def __init__(self, split_size: int = 5000):
        self.split_size = split_size
        self._counts, self._sums, self._negative_entropies = [], [], []

    def update(self, probabilities: Float[np.ndarray, "n c"]) -> None:
        """Adds rows that sum to 1."""
        rows = np.asarray(probabilities, np.float64)
        while len(rows):
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
        """UserError before the first row."""
        if not self._counts:
            raise UserError("the Inception Score of no samples is not defined; --num_samples must be 2 or more")
        scores = []
        for count, total, negative_entropy in zip(self._counts, self._sums, self._negative_entropies, strict=True):
            average = total / count
            scores.append(np.exp(negative_entropy / count - scipy.special.xlogy(average, average).sum()))
        return float(np.mean(scores)), float(np.std(scores))


class ImageStatistics:
    """What is kept of the features of a set of images: mean and covariance of all of them, pool3's and the spatial
    ones, and the pool3 features themselves of the first `max_features` (80 MB for 10,000). With `logits`, the matrix
    from pool3 features to class logits, also the Inception Score."""

    def __init__(self, max_features: int = 10_000, logits: Float[np.ndarray, "d classes"] | None = None):
        self.pool, self.spatial, self.max_features = FeatureStatistics(), FeatureStatistics(), max_features
        self.logits, self.inception_score = logits, InceptionScore()
        self._features = []

    def update(self, pool: Float[np.ndarray, "n d"], spatial: Float[np.ndarray, "n s"]) -> None:
        """Adds rows, one for each image. Raises what `FeatureStatistics.update` does."""
        room = max(0, self.max_features - self.pool.num_samples)
        if room:
            self._features.append(np.asarray(pool[:room], np.float32))
        self.pool.update(pool)
        self.spatial.update(spatial)
        if self.logits is not None:
            self.inception_score.update(scipy.special.softmax(np.asarray(pool, np.float64) @ self.logits, axis=1))

    @property
    def num_samples(self) -> int:
        return self.pool.num_samples

    @property
    def features(self) -> Float[np.ndarray, "n d"]:
        return np.concatenate(self._features)


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of the images that samples are compared with; None where the file does not have them."""

    mu: Float[np.ndarray, " d"] | None
    sigma: Float[np.ndarray, "d d"] | None
    sha256: str
    path: Path
    num_images: int | None = None
    convention: str | None = None
    dataset: str | None = None
    spatial_mu: Float[np.ndarray, " s"] | None = None
    spatial_sigma: Float[np.ndarray, "s s"] | None = None
    features: Float[np.ndarray, "n d"] | None = None  # pool3, of the first images
    label_counts: Int[np.ndarray, " classes"] | None = None

    @functools.cached_property
    def root(self) -> Float[np.ndarray, "d d"]:
        """Of the covariance, for any number of distances from it."""
        return covariance_root(self.sigma)

    @functools.cached_property
    def spatial_root(self) -> Float[np.ndarray, "s s"]:
        return covariance_root(self.spatial_sigma)


def compare(samples: ImageStatistics, reference: ReferenceStatistics) -> dict[str, float]:
    """Every metric that the reference allows: `fid`; `sfid` where it has spatial statistics; `kid`, `kid_error`,
    `precision`, `recall`, `density` and `coverage` where it has features, the first of which and of the samples are
    compared (without the last four where either has no more than 5); `inception_score` and its deviation over parts
    where the samples' logits were taken."""
    pool, spatial = samples.pool, samples.spatial
    metrics = {"fid": frechet_distance(pool.mu, pool.sigma, reference.mu, reference.sigma, reference.root)}
    if reference.spatial_sigma is not None:
        of_reference = (reference.spatial_mu, reference.spatial_sigma, reference.spatial_root)
        metrics["sfid"] = frechet_distance(spatial.mu, spatial.sigma, *of_reference)
    if reference.features is not None:
        metrics["kid"], metrics["kid_error"] = kernel_distance(samples.features, reference.features)
        if min(len(reference.features), len(samples.features)) > DENSITY_NEIGHBOURS:
            metrics |= manifold_metrics(reference.features, samples.features)
    if samples.logits is not None:
        metrics["inception_score"], metrics["inception_score_std"] = samples.inception_score.mean_and_std
    return metrics


# Names in a statistics file of what it may hold beside `mu` and `sigma`, by field of ReferenceStatistics.
_FACTS = ("num_images", "convention", "dataset")
_ARRAYS = {"spatial_mu": "mu_s", "spatial_sigma": "sigma_s", "features": "features", "label_counts": "label_counts"}


def load_statistics(path: str | Path, num_features: int = POOL_FEATURES, optional: bool = False) -> ReferenceStatistics:
    """Reference statistics, in float64, from an npz with `mu` (d,) and `sigma` (d, d): those of TTUR, pytorch-fid,
    jax-flow and EDM, ADM's VIRTUAL_*.npz (with `mu_s` and `sigma_s`), and what `save_statistics` writes; or from EDM2's
    pickle of {"fid": {"mu", "sigma"}}.

    Everything else is read where the file has it; with `optional`, mean and covariance too are None where they are not
    there. UserError for a file that is missing, broken, incomplete, of another
    network or not finite.
    """
    path = Path(path)
    fix = "make it: compute_fid_stats.py --dataset_name NAME --out FILE.npz"
    if not path.is_file():
        raise UserError(f"--fid_stats={path} is not a file; {fix}")
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        content = _read_statistics(path, num_features, optional)
        if content is None:
            return ReferenceStatistics(None, None, sha256, path)
        mu, sigma = (content[key].astype(np.float64) for key in ("mu", "sigma"))
        facts = {key: content[key].item() for key in _FACTS if key in content}
        arrays = {field: content[key] for field, key in _ARRAYS.items() if key in content}
        kinds = {field: np.float32 if field == "features" else np.float64 for field in arrays}
        arrays = {field: array.astype(kinds[field], copy=False) for field, array in arrays.items()}
    except KeyError:
        fix = fix.replace("--dataset_name NAME", f"--images {path} (if it holds images)")
        raise UserError(f"--fid_stats={path} holds no `mu` and `sigma`; {fix}") from None
    except (BadFileError, OSError, TypeError) as error:
        raise UserError(f"--fid_stats={path} is not a whole npz (or pickle) of numbers ({error}); {fix}") from error
    except ValueError as error:
        raise UserError(f"--fid_stats={path}{error}; {fix}") from None
    if not all(np.isfinite(array).all() for array in (mu, sigma, *arrays.values())):
        raise UserError(f"--fid_stats={path} holds NaN or infinity; {fix}")
    try:
        check_covariance(mu, sigma, "`sigma`")
        _check_extras(arrays)
    except ValueError as error:
        hint = " (covariances need float32 at least)" if "eigenvalue" in str(error) else ""
        raise UserError(f"--fid_stats={path}: {error}{hint}; {fix}") from None
    return ReferenceStatistics(mu, sigma, sha256, path, **facts, **arrays)


def _read_statistics(path: Path, num_features: int, optional: bool) -> dict[str, np.ndarray] | None:
    """The arrays of a statistics file by their names in it, their shapes found good before any is read; None where an
    `optional` mean is not there. KeyError without mean and covariance, BadFileError, or ValueError for other shapes."""
    if path.suffix == ".pkl":
        content = read_pickled_arrays(path)
        content = content.get("fid") if isinstance(content, dict) else None
        content = content if isinstance(content, dict) else {}
        shapes = {name: array.shape for name, array in content.items() if isinstance(array, np.ndarray)}
    else:
        headers = read_npz_headers(path)
        shapes = {name: header.shape for name, header in headers.items()}
    if optional and "mu" not in shapes:
        return None
    found = f"mu {shapes['mu']}, sigma {shapes['sigma']}"
    if shapes["mu"] != (num_features,) or shapes["sigma"] != (num_features, num_features):
        raise ValueError(f" is not of {num_features} features ({found})")
    _check_sizes(shapes, num_features)
    if path.suffix == ".pkl":
        return content
    wanted = {"mu", "sigma", *_FACTS, *_ARRAYS.values()}
    content = read_npz(path, {name: header for name, header in headers.items() if name in wanted})
    texts = [key for key in wanted - set(_FACTS) if key in content and content[key].dtype.kind == "U"]
    if texts:
        raise BadFileError(f"`{texts[0]}` is a text")
    return content


def _check_sizes(shapes: dict[str, tuple[int, ...]], num_features: int) -> None:
    """ValueError for shapes, as a file states them, of which no metric could be made, or that no memory holds."""
    for name in _FACTS:
        if shapes.get(name, ()) != ():
            raise ValueError(f": `{name}` has the shape {shapes[name]}, not ()")
    if num_features == POOL_FEATURES and {"mu_s", "sigma_s"} <= shapes.keys():
        for name, shape in {"mu_s": (SPATIAL_FEATURES,), "sigma_s": (SPATIAL_FEATURES,) * 2}.items():
            if shapes[name] != shape:
                raise ValueError(f": `{name}` has the shape {shapes[name]}, not {shape}")
    features, counts = shapes.get("features"), shapes.get("label_counts")
    if features is not None and (features[1:] != (num_features,) or not 2 <= features[0] <= MAX_FEATURES):
        raise ValueError(f": `features` has the shape {features}, not (2 to {MAX_FEATURES:,}, {num_features})")
    if counts is not None and (len(counts) != 1 or not 1 <= counts[0] <= 10**6):
        raise ValueError(f": `label_counts` has the shape {counts}, not (classes,)")


def _check_extras(arrays: dict[str, np.ndarray]) -> None:
    """ValueError for spatial statistics or label counts that metrics could not be made of."""
    if {"spatial_mu", "spatial_sigma"} <= arrays.keys():
        check_covariance(arrays["spatial_mu"], arrays["spatial_sigma"], "`sigma_s`")
    counts = arrays.get("label_counts")
    if counts is not None and ((counts < 0).any() or counts.sum() < 1 or (counts % 1).any()):
        raise ValueError("`label_counts` are not numbers of images")


def save_statistics(
    path: str | Path,
    statistics: ImageStatistics,
    *,
    convention: str,
    dataset: str,
    split: str | None = None,
    label_counts: Int[np.ndarray, " classes"] | None = None,
    inception_sha256: str | None = None,
) -> None:
    """Writes statistics and where they come from as a compressed npz; the file appears whole or not at all.

    Means are float64. Covariances are float32, half the size: that moves an FID by less than 1e-6 of itself where there
    are more samples than features; with fewer, where an FID says little anyway, rounding fills the null space and moves
    it by up to 1e-3. UserError below two samples.
    """
    path, pool, spatial = Path(path), statistics.pool, statistics.spatial
    content = {"mu": pool.mu, "sigma": pool.sigma.astype(np.float32)}
    if spatial.num_samples and spatial.mu.size:
        content |= {"mu_s": spatial.mu, "sigma_s": spatial.sigma.astype(np.float32)}
    if statistics.max_features:
        content["features"] = statistics.features
    if label_counts is not None:
        content["label_counts"] = label_counts
    content |= {"num_images": statistics.num_samples, "convention": convention, "dataset": dataset}
    content |= {"split": split or "", "inception_sha256": inception_sha256 or ""}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / "statistics.npz"
        np.savez_compressed(partial, **content)
        os.replace(partial, path)
