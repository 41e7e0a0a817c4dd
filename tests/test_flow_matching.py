"""The objective as mathematics: endpoints, derivative, distribution of times, a field that is exactly right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from utils.objectives.flow_matching import FlowMatching, draw_noise, interpolate, sample_times

KEY = jax.random.key(0)
X_1 = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4, 4, 3), np.float32))
LABELS = jnp.asarray(np.arange(5))
OBJECTIVE = FlowMatching()


# Nothing is compiled until a test runs: every worker of the suite imports all of its files.
@functools.cache
def draw():
    return OBJECTIVE.draw(jax.random.key(1), jax.random.key(2), 5)


@functools.cache
def x_0():
    return draw_noise(draw(), X_1)


def losses(model_fn, t):
    return OBJECTIVE.loss(model_fn, model_fn, X_1, LABELS, draw() | {"t": t})


def test_noise_is_standard_normal_and_drawn_per_example():
    draws = OBJECTIVE.draw(jax.random.key(1), jax.random.key(2), 200)
    noise = draw_noise(draws, jnp.zeros((200, 8, 8)))
    assert stats.kstest(np.ravel(noise), "norm").pvalue > 0.01
    half = {name: values[100:] for name, values in draws.items()}
    np.testing.assert_array_equal(draw_noise(half, jnp.zeros((100, 8, 8))), noise[100:])


def test_path_starts_at_noise_and_ends_just_short_of_data():
    np.testing.assert_array_equal(interpolate(x_0(), X_1, jnp.zeros(5)), x_0())
    end = interpolate(x_0(), X_1, jnp.ones(5))
    np.testing.assert_allclose(end, 0.01 * x_0() + 0.99 * X_1, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(end, interpolate(x_0(), X_1, jnp.full(5, 0.995)))
    np.testing.assert_array_equal(OBJECTIVE.corrupt(X_1, draw() | {"t": jnp.ones(5)}), end)


def test_the_loss_is_zero_for_the_derivative_of_the_path():
    t = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])
    _, derivative = jax.jvp(lambda t: interpolate(x_0(), X_1, t), (t,), (jnp.ones(5),))
    loss, metrics = losses(lambda x, t, labels: derivative, t)
    np.testing.assert_allclose(loss, 0, atol=1e-10)
    np.testing.assert_allclose(metrics["v_abs_mean"], jnp.abs(X_1 - x_0()).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(metrics["v_pred_abs_mean"], metrics["v_abs_mean"], rtol=1e-5)


def test_one_step_along_the_true_velocity_is_the_data():
    t = jnp.linspace(0, 0.9, 5)
    x_t = interpolate(x_0(), X_1, t)
    predicted = OBJECTIVE.predict_data(lambda x, t, labels: X_1 - x_0(), x_t, t, LABELS)
    np.testing.assert_allclose(predicted, X_1, atol=1e-5)


def test_loss_is_per_example():
    offsets = jnp.arange(5.0)[:, None, None, None]
    loss, _ = losses(lambda x, t, labels: X_1 - x_0() + offsets, jnp.linspace(0, 1, 5))
    np.testing.assert_allclose(loss, np.arange(5.0) ** 2, rtol=1e-5, atol=1e-10)


def test_the_network_sees_unclipped_times_and_its_labels():
    seen = []
    times = jnp.array([0, 0.5, 0.99, 0.995, 1.0])
    losses(lambda x, t, labels: seen.append((t, labels)) or x, times)
    np.testing.assert_array_equal(np.asarray(seen[0][0]), np.asarray(times))
    np.testing.assert_array_equal(seen[0][1], LABELS)
    velocity_fn = OBJECTIVE.velocity(lambda x, t, labels: x + t[0] + labels[2], LABELS)
    np.testing.assert_allclose(velocity_fn(x_0(), jnp.full(5, 0.5), jnp.full(5, 0.75)), x_0() + 2.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "distribution"),
    [("uniform", stats.uniform), ("logit_normal", None)],
)
def test_times_follow_their_distribution(sampler, distribution):
    t = np.asarray(sample_times(KEY, 20_000, sampler), np.float64)
    assert ((t > 0) & (t < 1)).all()
    # Logit-normal: the logit of t is a standard normal.
    sample, cdf = (t, distribution.cdf) if distribution else (np.log(t / (1 - t)), stats.norm.cdf)
    assert stats.kstest(sample, cdf).pvalue > 0.01


def test_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="cosine"):
        sample_times(KEY, 4, "cosine")
