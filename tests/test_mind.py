"""MIND against theory."""

import numpy as np
import pytest

from utils.metrics.scores import mind

RNG = np.random.default_rng(0)


def test_a_shift_counts_three_times_its_square():
    x = RNG.standard_normal((300, 64))
    shift = RNG.standard_normal(64)
    value, _ = mind(x, x + shift)
    assert value == pytest.approx(3 * np.square(shift).sum(), rel=0.15)  # of 1,000 directions
    assert mind(x, x) == (0, 0)


@pytest.mark.parametrize(("shift", "most"), [(0.5, 1.2), (0, 1.6)])
def test_the_error_is_the_deviation_over_draws_of_both_sets_and_at_most_half_as_large_again(shift, most):
    draws = [(RNG.normal(shift, 1, size=(60, 8)), RNG.standard_normal((60, 8))) for _ in range(200)]
    results = [mind(*draw, num_projections=50, seed=seed) for seed, draw in enumerate(draws)]
    values, errors = np.transpose(results)
    assert 0.8 < errors.mean() / values.std() < most


def test_a_scale_counts_by_the_wasserstein_distance_of_its_projections():
    """Between normal laws of deviations 1 and 2, the squared distance is (2 - 1)^2 in every direction: 3 d."""
    x = RNG.standard_normal((2000, 16))
    assert mind(x, 2 * x)[0] == pytest.approx(3 * 16, rel=0.05)


def test_sets_of_other_sizes_are_cut_and_other_widths_refused():
    x = RNG.standard_normal((500, 8))
    y = RNG.standard_normal((200, 8))
    assert mind(x, y) == mind(x, y)
    assert mind(x, y)[0] < 3
    with pytest.raises(ValueError, match="cannot be compared"):
        mind(x, y[:, :4])
