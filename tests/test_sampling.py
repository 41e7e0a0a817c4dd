"""Guidance and solver on fields whose answer is known; noise and labels as functions of (seed, index) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils import sampling

KEY = jax.random.key(3)


def model_fn(x, t, labels):
    """A velocity that tells conditional from unconditional: label 10 stands for no label."""
    return x * 0.5 + (labels / 10)[:, None] + t[:, None]


def test_euler_is_exact_on_a_constant_field():
    x = jax.random.normal(KEY, (4, 3))
    for steps in (1, 7, 32):
        np.testing.assert_allclose(sampling.euler_sample(lambda x, t: jnp.full_like(x, 2), x, steps), x + 2, rtol=1e-5)


def test_euler_evaluates_at_the_left_ends():
    # v = t: the left Riemann sum of t over N steps is (N - 1) / 2N.
    x = jnp.zeros((2, 3))
    for steps in (1, 2, 10):
        end = sampling.euler_sample(lambda x, t: jnp.broadcast_to(t[:, None], x.shape), x, steps)
        np.testing.assert_allclose(end, (steps - 1) / (2 * steps), rtol=1e-6, atol=1e-7)


def test_euler_has_order_one():
    x = jnp.ones((1, 1))
    errors = [abs(float(sampling.euler_sample(lambda x, t: x, x, n)[0, 0]) - np.e) for n in (32, 64, 128, 256)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, 1, atol=0.05)


def test_stages_of_a_path_make_the_whole():
    x = jax.random.normal(KEY, (4, 3))
    whole = sampling.euler_sample(lambda x, t: jnp.sin(x) + t[:, None], x, 12)
    for first, last in ((0, 5), (5, 6), (6, 12)):
        x = sampling.euler_steps(lambda x, t: jnp.sin(x) + t[:, None], x, first, last, 12)
    np.testing.assert_allclose(x, whole, rtol=1e-6)


def test_step_count_and_scale_compile_nothing_anew():
    traces = []

    @jax.jit
    def sample(x, scale, steps):
        traces.append(1)
        labels = jnp.zeros(4, jnp.int32)
        return sampling.euler_sample(sampling.guided_velocity(model_fn, labels, 10, scale), x, steps)

    for scale, steps in ((4.0, 1), (1.5, 7), (0.0, 500)):
        sample(jnp.zeros((4, 3)), scale, steps)
    assert len(traces) == 1


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 4.0])
def test_guidance_is_the_formula(scale):
    x, t = jax.random.normal(KEY, (5, 3)), jnp.linspace(0, 1, 5)
    labels = jnp.array([0, 3, 9, 1, 2])
    v_uncond, v_cond = model_fn(x, t, jnp.full(5, 10)), model_fn(x, t, labels)
    v = sampling.guided_velocity(model_fn, labels, 10, scale)(x, t)
    np.testing.assert_allclose(v, v_uncond + scale * (v_cond - v_uncond), rtol=1e-5)


def test_no_guidance_is_one_conditional_pass():
    x, t, labels = jnp.ones((5, 3)), jnp.zeros(5), jnp.arange(5)
    batches = []

    def counting(x, t, labels):
        batches.append(len(x))
        return model_fn(x, t, labels)

    v = sampling.guided_velocity(counting, labels, 10, None)(x, t)
    assert batches == [5]
    np.testing.assert_array_equal(v, model_fn(x, t, labels))


def test_noise_and_labels_depend_on_seed_and_index_alone():
    whole_noise = sampling.sample_noise(KEY, jnp.arange(50), (4, 4, 1))
    whole_labels = sampling.sample_labels(KEY, jnp.arange(50), 10)
    for indices in (jnp.arange(7, 20), jnp.array([49, 0, 3])):
        np.testing.assert_array_equal(sampling.sample_noise(KEY, indices, (4, 4, 1)), whole_noise[indices])
        np.testing.assert_array_equal(sampling.sample_labels(KEY, indices, 10), whole_labels[indices])
    assert len(np.unique(whole_noise[:, 0, 0, 0])) == 50
    assert not np.array_equal(whole_noise, sampling.sample_noise(jax.random.key(4), jnp.arange(50), (4, 4, 1)))


def test_labels_are_uniform():
    counts = np.bincount(sampling.sample_labels(KEY, jnp.arange(10_000), 10), minlength=10)
    assert counts.min() > 850
    assert counts.max() < 1150
