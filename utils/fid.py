"""Statistics of Inception features and the distance between two sets of them (FID); NumPy and SciPy only."""

import dataclasses
import hashlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import scipy.linalg
from jaxtyping import Float

from utils.errors import UserError

# Share of a matrix's largest entry (or eigenvalue) that may be rounding: covariances are often stored in float32.
ROUNDING = 1e-5

# Optional entries of a statistics file that ReferenceStatistics carries.
_FACTS = ("num_images", "convention", "dataset")


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


def frechet_distance(
    mu_1: Float[np.ndarray, " d"],
    sigma_1: Float[np.ndarray, "d d"],
    mu_2: Float[np.ndarray, " d"],
    sigma_2: Float[np.ndarray, "d d"],
) -> float:
    """Squared Fréchet distance of two Gaussians, in [0, inf); of Inception features, the FID.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al., arXiv:1706.08500, eq. 6), in float64. With
    S_1 = L L^T the product S_1 S_2 has the eigenvalues of the symmetric L^T S_2 L, so that no square root of an
    unsymmetric matrix is taken and covariances of any rank will do. ValueError where shapes differ or a covariance is
    not symmetric or not positive semi-definite (beyond rounding in float32).
    """
    mu_1, sigma_1 = _check_gaussian(mu_1, sigma_1, "first Gaussian")
    mu_2, sigma_2 = _check_gaussian(mu_2, sigma_2, "second Gaussian")
    if mu_1.shape != mu_2.shape:
        raise ValueError(f"Gaussians over {mu_1.size} and {mu_2.size} features cannot be compared")
    values, vectors = scipy.linalg.eigh(sigma_1)
    root = vectors * np.sqrt(_check_eigenvalues(values, "first Gaussian"))
    _check_eigenvalues(scipy.linalg.eigvalsh(sigma_2), "second Gaussian")
    cross = np.sqrt(scipy.linalg.eigvalsh(root.T @ sigma_2 @ root).clip(min=0)).sum()
    distance = np.sum((mu_1 - mu_2) ** 2) + np.trace(sigma_1) + np.trace(sigma_2) - 2 * cross
    return max(0.0, float(distance))  # equal Gaussians come out within rounding of 0, on either side


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of the images that samples are compared with; None where the file does not say."""

    mu: Float[np.ndarray, " d"]
    sigma: Float[np.ndarray, "d d"]
    num_images: int | None
    convention: str | None
    dataset: str | None
    sha256: str
    path: Path


def load_statistics(path: str | Path, num_features: int = 2048) -> ReferenceStatistics:
    """Reference statistics, in float64, from an npz with `mu` (d,) and `sigma` (d, d).

    `num_images`, `convention` and `dataset` are read where the file has them: those of other tools do not. UserError
    for a file that is missing, broken, incomplete, of another network or not finite.
    """
    path = Path(path)
    fix = "make it: compute_fid_stats.py --dataset_name NAME --out FILE.npz"
    if not path.is_file():
        raise UserError(f"--fid_stats={path} is not a file; {fix}")
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content)) as archive:
            mu, sigma = (archive[key].astype(np.float64) for key in ("mu", "sigma"))
            facts = {key: archive[key].item() if key in archive else None for key in _FACTS}
    except KeyError as error:
        raise UserError(f"--fid_stats={path} holds no `mu` and `sigma`; {fix}") from error
    except Exception as error:  # whatever NumPy and zipfile raise for what is not an npz, or only the head of one
        raise UserError(f"--fid_stats={path} is not a whole npz of numbers; {fix}") from error
    if mu.shape != (num_features,) or sigma.shape != (num_features, num_features):
        shapes = f"mu {mu.shape}, sigma {sigma.shape}"
        raise UserError(f"--fid_stats={path} is not of {num_features} features ({shapes}); {fix}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"--fid_stats={path} holds NaN or infinity; {fix}")
    return ReferenceStatistics(mu, sigma, **facts, sha256=hashlib.sha256(content).hexdigest(), path=path)


def save_statistics(
    path: str | Path,
    statistics: FeatureStatistics,
    *,
    convention: str,
    dataset: str,
    split: str | None = None,
    inception_sha256: str | None = None,
) -> None:
    """Writes statistics and where they come from as a compressed npz; the file appears whole or not at all.

    `mu` is float64. `sigma` is float32, half the size: that moves an FID by less than 1e-6 of itself where there are
    more samples than features; with fewer, where an FID says little anyway, rounding fills the null space and moves it
    by up to 1e-3. UserError below two samples.
    """
    path, mu, sigma = Path(path), statistics.mu, statistics.sigma
    facts = {"num_images": statistics.num_samples, "convention": convention, "dataset": dataset}
    facts |= {"split": split or "", "inception_sha256": inception_sha256 or ""}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / "statistics.npz"
        np.savez_compressed(partial, mu=mu, sigma=sigma.astype(np.float32), **facts)
        os.replace(partial, path)
