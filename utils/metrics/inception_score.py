"""Inception Score (Salimans et al., arXiv:1606.03498, section 4)."""

import numpy as np
import scipy.special
from jaxtyping import Float

from utils.base.errors import UserError

SPLIT_SIZE = 5000


class InceptionScore:
    """Inception Score (Salimans et al., arXiv:1606.03498, section 4) of class probabilities, in memory that does not
    grow: exp of the mean divergence of each sample's probabilities from their average, over parts of `split_size`
    samples as ADM's evaluator takes them; then mean and standard deviation over the parts."""

    def __init__(self, split_size: int = SPLIT_SIZE):
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
