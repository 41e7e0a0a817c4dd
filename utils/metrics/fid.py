"""Fréchet distance of two Gaussians; of Inception features, the FID (Heusel et al., arXiv:1706.08500)."""

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float

# Fraction of a matrix's largest entry (or eigenvalue) that may be rounding: covariances are often stored in float32.
ROUNDING = 1e-5


def _check_gaussian(mu: np.ndarray, sigma: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The two in float64, sigma exactly symmetric."""
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise ValueError(f"{name}: mean {mu.shape} and covariance {sigma.shape} must have shapes (d,) and (d, d)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name}: mean or covariance is NaN or infinite")
    difference = sigma - sigma.T
    if np.abs(difference, out=difference).max() > ROUNDING * max(sigma.max(), -sigma.min()):
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
    _check_semidefinite(sigma, name)


def _check_semidefinite(sigma: np.ndarray, name: str) -> None:
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
    mu_1: np.ndarray,
    sigma_1: np.ndarray,
    mu_2: np.ndarray,
    sigma_2: np.ndarray,
    root_2: Float[np.ndarray, "d d"] | None = None,
) -> float:
    """Squared Fréchet distance of two Gaussians, means (d,) and covariances (d, d), in [0, inf); of Inception features,
    the FID.

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
    _check_semidefinite(sigma_1, "first Gaussian")
    root = covariance_root(sigma_2, "second Gaussian") if root_2 is None else root_2
    cross = np.sqrt(scipy.linalg.eigvalsh(root.T @ sigma_1 @ root).clip(min=0)).sum()
    distance = np.sum((mu_1 - mu_2) ** 2) + np.trace(sigma_1) + np.trace(sigma_2) - 2 * cross
    return max(0.0, float(distance))  # equal Gaussians come out within rounding of 0, on either side
