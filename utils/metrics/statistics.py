"""Statistics of the features of a set of images, kept batch by batch while the images pass."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy  # whose parts are imported when they are used
from jaxtyping import Float

from utils.base.messages import UserError
from utils.metrics.extractors import DEFAULT_EXTRACTOR, PIXELS, POOL, FeatureKey
from utils.metrics.pixels import PixelStatistics
from utils.metrics.scores import InceptionScore

MAX_SAMPLE_ROWS = 10_000  # samples whose features are kept, for the metrics that compare rows


class FeatureStatistics:
    """Statistics of the rows of one feature seen so far.

    Mean and covariance of all rows are kept in float64, in memory that does not grow with their number. Each batch is
    centred on its own mean before it is merged (Chan, Golub and LeVeque 1983, eq. 2.1), so that a mean far larger than
    the spread costs no precision. The first `max_rows` rows are kept too, in float32. With `logits`, the matrix from
    features to class logits, class probabilities enter `inception_score`.
    """

    def __init__(self, max_rows: int = 0, logits: Float[np.ndarray, "d classes"] | None = None):
        self.num_samples = 0
        self.max_rows = max_rows
        self.logits = logits
        self.inception_score = InceptionScore()
        # The width is known with the first rows.
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))  # sum of (x - mean)(x - mean)^T
        self._rows = []

    def update(self, features: np.ndarray) -> None:
        """Adds n >= 0 rows (n, d).

        Raises UserError where they are NaN or infinite, ValueError for another shape; nothing is added then.
        """
        # Everything is checked first: a batch is added whole or not at all.
        rows = np.asarray(features, np.float64)
        if rows.ndim != 2 or (self.num_samples and rows.shape[1] != self._mean.size):
            expected = f"(n, {self._mean.size or 'd'})"
            raise ValueError(f"features have shape {rows.shape}, expected {expected}")
        broken = np.count_nonzero(~np.isfinite(rows).all(axis=1))
        if broken:
            raise UserError(
                f"{broken} of {len(rows)} feature rows after sample {self.num_samples} are NaN or infinite; "
                "check --inception_weights and the images"
            )
        if not len(rows):
            return

        # The first rows themselves, in float32 to halve their memory, and all rows' class probabilities.
        room = max(0, self.max_rows - self.num_samples)
        if room:
            self._rows.append(np.asarray(features[:room], np.float32))
        if self.logits is not None:
            self.inception_score.update(scipy.special.softmax(rows @ self.logits, axis=1))

        # Moments of both parts merged: each about its own mean, plus the distance between the means.
        if not self.num_samples:
            self._mean = np.zeros(rows.shape[1])
            self._scatter = np.zeros((rows.shape[1],) * 2)
        mean = rows.mean(axis=0)
        centred = rows - mean
        shift = mean - self._mean
        total = self.num_samples + len(rows)
        self._scatter += centred.T @ centred
        self._scatter += np.outer(shift, shift) * (self.num_samples * len(rows) / total)
        self._mean += shift * (len(rows) / total)
        self.num_samples = total

    @property
    def mu(self) -> Float[np.ndarray, " d"]:
        """Mean of the rows. Raises UserError before the first."""
        if self.num_samples < 1:
            raise UserError("the mean of no samples is not defined; --num_samples must be 2 or more")
        return self._mean.copy()

    @property
    def sigma(self) -> Float[np.ndarray, "d d"]:
        """Unbiased covariance (divisor n - 1), as numpy.cov(rowvar=False). Raises UserError below two samples."""
        if self.num_samples < 2:
            raise UserError(
                f"the covariance of {self.num_samples} samples is not defined; --num_samples must be 2 or more"
            )
        return self._scatter / (self.num_samples - 1)

    @property
    def rows(self) -> Float[np.ndarray, "n d"] | None:
        """The first rows, as float32; None where none are kept."""
        # Kept batch by batch, and joined only when asked for.
        return np.concatenate(self._rows) if self._rows else None


class ImageStatistics:
    """Statistics of a set of images: `statistics[key]` are those of one feature of one extractor.

    For each extractor's main feature, the rows of the first `max_rows` images are kept (Inception: 80 MB for 10,000).
    With `logits`, the matrix from Inception's pool features to class logits, the Inception Score is computed too.
    `pixels`, if given, are the moments of the images themselves, `statistics[PIXELS]`.
    """

    def __init__(
        self,
        max_rows: int = MAX_SAMPLE_ROWS,
        logits: Float[np.ndarray, "d classes"] | None = None,
        pixels: PixelStatistics | None = None,
    ):
        self.max_rows = max_rows
        self.pixels = pixels
        self.logits = logits
        self.by_feature: dict[FeatureKey, FeatureStatistics] = {}  # filled by the first update

    def update(self, features: Mapping[str, np.ndarray], extractor: str = DEFAULT_EXTRACTOR) -> None:
        """Adds rows {feature: (n, d)} of an extractor, one for each image. Raises as `FeatureStatistics.update`."""
        for feature, rows in features.items():
            key = FeatureKey(extractor, feature)
            if key not in self.by_feature:
                # Only main features have metrics of rows; Inception's logits belong to `pool`.
                max_rows = self.max_rows if key.is_main else 0
                self.by_feature[key] = FeatureStatistics(max_rows, self.logits if key == POOL else None)
            self.by_feature[key].update(rows)

    def __getitem__(self, key: FeatureKey) -> Any:  # FeatureStatistics, of PIXELS PixelStatistics
        return self.pixels if key == PIXELS else self.by_feature[key]

    def __contains__(self, key: FeatureKey) -> bool:
        return self.pixels is not None if key == PIXELS else key in self.by_feature

    @property
    def num_samples(self) -> int:
        counts = [statistics.num_samples for statistics in self.by_feature.values()]
        return max(counts, default=0 if self.pixels is None else self.pixels.num_images)
