"""The objective as mathematics: endpoints, derivative, distribution of times, a field that is exactly right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from utils import flow

KEY = jax.random.key(0)
X_0, X_1 = jax.random.normal(KEY, (2, 5, 4, 4, 3))


def test_path_starts_at_noise_and_ends_just_short_of_data():
    np.testing.assert_array_equal(flow.interpolate(X_0, X_1, jnp.zeros(5)), X_0)
    end = flow.interpolate(X_0, X_1, jnp.ones(5))
    np.testing.assert_allclose(end, 0.01 * X_0 + 0.99 * X_1, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(end, flow.interpolate(X_0, X_1, jnp.full(5, 0.995)))


def test_target_is_the_derivative_of_the_path():
    t = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])
    _, derivative = jax.jvp(lambda t: flow.interpolate(X_0, X_1, t), (t,), (jnp.ones(5),))
    np.testing.assert_allclose(derivative, flow.target_velocity(X_0, X_1), rtol=1e-5, atol=1e-5)


def test_one_step_along_the_true_velocity_is_the_data():
    t = jnp.linspace(0, 0.9, 5)
    x_t = flow.interpolate(X_0, X_1, t)
    np.testing.assert_allclose(flow.predict_data(x_t, flow.target_velocity(X_0, X_1), t), X_1, atol=1e-5)


def test_loss_is_per_example_and_zero_for_the_true_field():
    t = jnp.linspace(0, 1, 5)
    assert np.all(flow.flow_matching_loss(lambda x, t: X_1 - X_0, X_0, X_1, t) == 0)
    offsets = jnp.arange(5.0)[:, None, None, None]
    losses = flow.flow_matching_loss(lambda x, t: X_1 - X_0 + offsets, X_0, X_1, t)
    np.testing.assert_allclose(losses, np.arange(5.0) ** 2, rtol=1e-5)


def test_model_sees_unclipped_times():
    seen = []
    flow.flow_matching_loss(lambda x, t: seen.append(t) or x, X_0, X_1, jnp.array([0, 0.5, 0.99, 0.995, 1.0]))
    np.testing.assert_array_equal(seen[0], np.array([0, 0.5, 0.99, 0.995, 1.0], np.float32))


@pytest.mark.parametrize(
    ("sampler", "distribution"),
    [("uniform", stats.uniform), ("logit_normal", None), ("log-normal", None)],
)
def test_times_follow_their_distribution(sampler, distribution):
    t = np.asarray(flow.sample_times(KEY, 20_000, sampler), np.float64)
    assert ((t > 0) & (t < 1)).all()
    # Logit-normal: the logit of t is a standard normal.
    sample, cdf = (t, distribution.cdf) if distribution else (np.log(t / (1 - t)), stats.norm.cdf)
    assert stats.kstest(sample, cdf).pvalue > 0.01


def test_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="cosine"):
        flow.sample_times(KEY, 4, "cosine")
