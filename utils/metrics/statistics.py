"""What is kept of the Inception features of a set of images, batch by batch."""

import numpy as np
import scipy.special
from jaxtyping import Float

from utils.base.errors import UserError
from utils.metrics.inception_score import InceptionScore

MAX_SAMPLE_FEATURES = 10_000  # rows of which the features themselves are kept


class FeatureStatistics:
    """Mean and covariance of feature rows seen so far, in float64, at a memory cost that does not grow with them.

    Each batch is centred on its own mean before it is merged (Chan, Golub and LeVeque 1983, eq. 2.1), so that a mean
    far larger than the spread costs no precision.
    """

    def __init__(self):
        self.num_samples = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))  # sum of (x - mean)(x - mean)^T

    def update(self, features: np.ndarray) -> None:
        """Adds n >= 0 rows (n, d). UserError where they are NaN or infinite, ValueError for another shape."""
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


class ImageStatistics:
    """What is kept of the features of a set of images: mean and covariance of all of them, pool3's and the spatial
    ones, and the pool3 features themselves of the first `max_features` (80 MB for 10,000). With `logits`, the matrix
    from pool3 features to class logits, also the Inception Score."""

    def __init__(self, max_features: int = MAX_SAMPLE_FEATURES, logits: Float[np.ndarray, "d classes"] | None = None):
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
