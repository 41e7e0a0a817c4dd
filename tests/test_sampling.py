"""Guidance and solver on fields whose answer is known; noise and labels as functions of (seed, index) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.conditions.classes import ClassCondition, draw_labels
from utils.sampling import solvers as sampling
from utils.sampling.guidance import guide, mix, within
from utils.sampling.paths import inpaint, invert, slerp

KEY = jax.random.key(3)
CLASSES = ClassCondition(num_classes=10)


def model_fn(x, t, labels):
    """A velocity that tells conditional from unconditional: label 10 stands for no label."""
    return x * 0.5 + (labels / 10)[:, None] + t[:, None]


def test_euler_is_exact_on_a_constant_field():
    x = jax.random.normal(KEY, (4, 3))
    for steps in (1, 7, 32):
        np.testing.assert_allclose(
            sampling.sample(lambda x, t, t_next: jnp.full_like(x, 2), x, steps), x + 2, rtol=1e-5
        )


def test_euler_evaluates_at_the_left_ends():
    # v = t: the left Riemann sum of t over N steps is (N - 1) / 2N.
    x = jnp.zeros((2, 3))
    for steps in (1, 2, 10):
        end = sampling.sample(lambda x, t, t_next: jnp.broadcast_to(t[:, None], x.shape), x, steps)
        np.testing.assert_allclose(end, (steps - 1) / (2 * steps), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_have_their_order(solver, order):
    """On v = x + t, whose path from 1 ends at 2 e - 2."""

    def velocity_fn(x, t, t_next):
        return x + t[:, None]

    with jax.enable_x64(True):
        x, exact = jnp.ones((1, 1)), 2 * np.e - 2
        counts = (16, 32, 64) if order == 2 else (64, 128, 256)  # before float32 rounding of t shows
        errors = [abs(float(sampling.sample(velocity_fn, x, n, solver)[0, 0]) - exact) for n in counts]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, order, atol=0.1)


@pytest.mark.parametrize("solver", sampling.ODE_SOLVERS)
def test_solvers_take_the_velocities_that_they_say(solver):
    times = []

    def velocity_fn(x, t, t_next):
        jax.debug.callback(lambda t: times.append(float(t[0])), t)
        return x

    jax.block_until_ready(sampling.sample(velocity_fn, jnp.ones((2, 1)), 4, solver))
    jax.effects_barrier()
    second = {"euler": [], "midpoint": [1 / 8, 3 / 8, 5 / 8, 7 / 8], "heun": [1 / 4, 1 / 2, 3 / 4, 1]}
    second = second["heun" if solver == "heun_euler" else solver]
    assert sorted(times) == sorted([0, 1 / 4, 1 / 2, 3 / 4, *second])
    assert len(times) == sampling.SamplerConfig(4, None, solver=solver).nfe


def test_guidance_is_on_in_its_interval_alone():
    x, labels = jnp.ones((2, 3)), jnp.array([1, 2])
    passes = []

    def counting(x, t, labels):
        jax.debug.callback(lambda _: passes.append(len(x)), t)
        return model_fn(x, t, labels)

    @jax.jit
    def velocity(t, low, high):
        fields = (lambda x, t, t_next, f=f: f(x, t, labels) for f in (guide(counting, CLASSES.null, 4.0), counting))
        times = jnp.full(2, t)
        return within(*fields, low, high)(x, times, times)

    for t, on in ((0.0, False), (0.25, True), (0.5, True), (0.75, True), (0.8, False)):
        passes.clear()
        expected = guide(model_fn, CLASSES.null, 4.0 if on else None)(x, jnp.full(2, t), labels)
        np.testing.assert_allclose(velocity(t, 0.25, 0.75), expected, rtol=1e-6)
        jax.effects_barrier()
        assert passes == [4 if on else 2]  # no second pass outside
    assert velocity._cache_size() == 1


def test_a_sampler_says_what_it_does():
    assert str(sampling.SamplerConfig(1, None)) == "1 Euler step, no guidance"
    assert str(sampling.SamplerConfig(20, 1.5, (0.1, 1), "heun")) == "20 Heun steps, guidance 1.5 for t in [0.1, 1]"


def test_stages_of_a_path_make_the_whole():
    x = jax.random.normal(KEY, (4, 3))
    whole = sampling.sample(lambda x, t, t_next: jnp.sin(x) + t[:, None], x, 12)
    for first, last in ((0, 5), (5, 6), (6, 12)):
        x = sampling.take_steps(lambda x, t, t_next: jnp.sin(x) + t[:, None], x, first, last, 12)
    np.testing.assert_allclose(x, whole, rtol=1e-6)


def test_step_count_and_scale_compile_nothing_anew():
    traces = []

    @jax.jit
    def sample(x, scale, steps):
        traces.append(1)
        labels = jnp.zeros(4, jnp.int32)
        guided = guide(model_fn, CLASSES.null, scale)
        return sampling.sample(lambda x, t, t_next: guided(x, t, labels), x, steps)

    for scale, steps in ((4.0, 1), (1.5, 7), (0.0, 500)):
        sample(jnp.zeros((4, 3)), scale, steps)
    assert len(traces) == 1


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 4.0])
def test_guidance_is_the_formula(scale):
    x, t = jax.random.normal(KEY, (5, 3)), jnp.linspace(0, 1, 5)
    labels = jnp.array([0, 3, 9, 1, 2])
    v_uncond, v_cond = model_fn(x, t, jnp.full(5, 10)), model_fn(x, t, labels)
    v = guide(model_fn, CLASSES.null, scale)(x, t, labels)
    np.testing.assert_allclose(v, v_uncond + scale * (v_cond - v_uncond), rtol=1e-5)


def test_no_guidance_is_one_conditional_pass():
    x, t, labels = jnp.ones((5, 3)), jnp.zeros(5), jnp.arange(5)
    batches = []

    def counting(x, t, labels):
        batches.append(len(x))
        return model_fn(x, t, labels)

    v = guide(counting, CLASSES.null, None)(x, t, labels)
    assert batches == [5]
    np.testing.assert_array_equal(v, model_fn(x, t, labels))


@pytest.mark.parametrize("mode", ClassCondition.DRAW_MODES)
def test_noise_and_labels_depend_on_seed_and_index_alone(mode):
    whole_noise = sampling.sample_noise(KEY, jnp.arange(50), (4, 4, 1))
    whole_labels = draw_labels(KEY, jnp.arange(50), jnp.ones(10), mode)
    for indices in (jnp.arange(7, 20), jnp.array([49, 0, 3])):
        np.testing.assert_array_equal(sampling.sample_noise(KEY, indices, (4, 4, 1)), whole_noise[indices])
        np.testing.assert_array_equal(draw_labels(KEY, indices, jnp.ones(10), mode), whole_labels[indices])
    assert len(np.unique(whole_noise[:, 0, 0, 0])) == 50
    assert not np.array_equal(whole_noise, sampling.sample_noise(jax.random.key(4), jnp.arange(50), (4, 4, 1)))


@pytest.mark.parametrize(
    ("mode", "counts", "fractions"),
    [
        ("uniform", [5, 5, 90], [1 / 3, 1 / 3, 1 / 3]),
        ("uniform", [0, 5, 0, 90], [0, 1 / 2, 0, 1 / 2]),
        ("dataset", [10, 0, 30, 60], [0.1, 0, 0.3, 0.6]),
    ],
)
def test_labels_are_drawn_with_the_fractions_of_their_mode(mode, counts, fractions):
    labels = draw_labels(KEY, jnp.arange(10_000), jnp.array(counts), mode)
    found = np.bincount(labels, minlength=len(counts)) / 10_000
    np.testing.assert_allclose(found, fractions, atol=5 * 0.5 / 100)  # five standard deviations of a fair coin
    assert found[np.equal(fractions, 0)].sum() == 0


def test_balanced_labels_are_interleaved():
    labels = draw_labels(KEY, jnp.arange(7), jnp.array([5, 5, 90]), "balanced")
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    labels = draw_labels(KEY, jnp.arange(5), jnp.array([0, 5, 0, 90]), "balanced")
    assert labels.tolist() == [1, 3, 1, 3, 1]


def test_uniform_labels_of_whole_tables_are_those_of_earlier_versions():
    """Entry i is randint(fold_in(key, i), classes), so that older evaluations are found again."""
    expected = [int(jax.random.randint(jax.random.fold_in(KEY, i), (), 0, 10)) for i in range(20)]
    assert draw_labels(KEY, jnp.arange(20), jnp.ones(10)).tolist() == expected


GAUSSIAN = (jnp.array([0.7, -0.3]), 0.5)


def gaussian_field(labels):
    """The velocity of data N(m, s^2 I), whose path from x_0 ends at m + s x_0."""
    mean, std = GAUSSIAN

    def velocity_fn(x, t, t_next):
        t = t[:, None]
        variance = (1 - t) ** 2 + t**2 * std**2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity_fn


def solve_gaussian(x, tolerance, **times):
    return sampling.adaptive_sample(
        gaussian_field, x, jnp.zeros(len(x), jnp.int32), **times, rtol=tolerance, atol=tolerance
    )


def test_the_adaptive_solver_keeps_its_tolerance_and_counts_its_evaluations():
    mean, std = GAUSSIAN
    x = jax.random.normal(KEY, (5, 2))
    evaluations = []
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6):
        x_1, nfe = jax.jit(solve_gaussian, static_argnums=1)(x, tolerance)
        assert np.abs(x_1 - (mean + std * x)).max() < max(tolerance, 1e-5)  # float32
        evaluations.append(int(nfe.max()))
    assert 30 < evaluations[0] < evaluations[-1] < 100
    back, _ = solve_gaussian(x_1, 1e-5, t_start=1.0, t_end=0.0)
    np.testing.assert_allclose(back, x, atol=1e-3)


def test_adaptive_steps_are_each_samples_own():
    x = jnp.array([[0.1, 0.1], [3.0, -3.0], [0.5, 2.0]])
    together, nfe = solve_gaussian(x, 1e-4)
    for row in range(3):
        alone, its_nfe = solve_gaussian(x[row : row + 1], 1e-4)
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5)
        assert its_nfe[0] == nfe[row]


def test_adaptive_evaluations_are_those_that_are_made():
    calls = []

    def counted(labels):
        def velocity_fn(x, t, t_next):
            jax.debug.callback(lambda t: calls.append(t), t)
            return gaussian_field(labels)(x, t, t_next)

        return velocity_fn

    _, nfe = sampling.adaptive_sample(counted, jnp.ones((1, 2)), jnp.zeros(1, jnp.int32), rtol=1e-3, atol=1e-3)
    jax.effects_barrier()
    assert len(calls) == nfe[0]


def test_times_are_uniform_or_shifted_as_those_of_sd3():
    for steps in (3, 7, 32):
        uniform = [float(sampling.time_at(i, steps)) for i in range(steps + 1)]
        assert uniform == [float(np.float32(i / steps)) for i in range(steps + 1)]
        # SD3's noise level is 1 - t, which it shifts to S u / (1 + (S - 1) u).
        noise_levels = [3 * u / (1 + 2 * u) for u in (1 - i / steps for i in range(steps + 1))]
        shifted = [1 - float(sampling.time_at(i, steps, 3.0)) for i in range(steps + 1)]
        np.testing.assert_allclose(shifted, noise_levels, atol=1e-6)


def test_guidance_of_some_channels_leaves_the_others_conditional():
    x, t, labels = jax.random.normal(KEY, (4, 3)), jnp.full(4, 0.3), jnp.arange(4)
    whole = guide(model_fn, CLASSES.null, 3.0)(x, t, labels)
    part = guide(model_fn, CLASSES.null, 3.0, cfg_channels=2)(x, t, labels)
    np.testing.assert_array_equal(part[:, :2], whole[:, :2])
    np.testing.assert_array_equal(part[:, 2:], model_fn(x, t, labels)[:, 2:])


def test_spherical_interpolation_keeps_the_length_of_noise():
    x, y = jax.random.normal(KEY, (2, 3, 8, 8, 4))
    between = slerp(x, y, jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(between[:, 0], x, atol=1e-5)
    np.testing.assert_allclose(between[:, 2], y, atol=1e-5)
    np.testing.assert_allclose(between.std(axis=(2, 3, 4)), 1, atol=0.1)  # that of the mean is 0.7


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_the_error_of_a_round_trip_falls_with_the_solvers_order(solver, order):
    mean, std = GAUSSIAN
    x_0 = jax.random.normal(KEY, (6, 2))
    field, errors = gaussian_field(None), []
    for steps in (20, 40):
        noise = invert(field, mean + std * x_0, steps, solver)
        errors.append(float(np.abs(noise - x_0).max()))
    assert errors[1] < 0.1
    assert np.log2(errors[0] / errors[1]) > order - 0.25  # midpoint gains an order here, as the field is linear


@pytest.mark.parametrize("num_repeats", [1, 4])
def test_inpainting_keeps_what_is_known_and_the_law_of_the_rest(num_repeats):
    """If elements are independent, the unknown one keeps its own distribution."""
    mean, std = GAUSSIAN
    noise, count = jax.random.normal(KEY, (4000, 2)), 4000
    keys = jax.random.split(jax.random.key(1), count)
    x_known, is_known = jnp.full((count, 2), 9.0), jnp.array([True, False])
    filled = jax.jit(inpaint, static_argnums=(0, 6, 7))(
        gaussian_field(None), keys, noise, x_known, is_known, 40, "heun", sampling.time_at, num_repeats
    )
    np.testing.assert_array_equal(filled[:, 0], 9.0)
    # Four standard errors.
    assert filled[:, 1].mean() == pytest.approx(mean[1], abs=4 * std / np.sqrt(count))
    assert filled[:, 1].std() == pytest.approx(std, abs=4 * std / np.sqrt(2 * count))
    assert (np.abs(filled[:, 1] - (mean[1] + std * noise[:, 1])).max() < 0.01) == (num_repeats == 1)


def test_inpainting_sees_the_known_elements_on_their_path():
    """The field carries the known element's place to the unknown one: the left sum of t over N steps."""

    def velocity_fn(x, t, t_next):
        return jnp.stack([jnp.zeros(len(x)), x[:, 0]], axis=1)

    filled = inpaint(
        velocity_fn, jax.random.split(KEY, 1), jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.array([True, False]), 10
    )
    np.testing.assert_allclose(filled, [[1, (10 - 1) / 20]], rtol=1e-5)


def test_a_mixture_of_fields_leads_from_one_to_the_other():
    first, second = (lambda x, t, t_next, v=v: jnp.full_like(x, v) for v in (1.0, 3.0))
    mixed = mix(first, second, jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(sampling.sample(mixed, jnp.zeros((3, 2)), 4), [[1, 1], [2, 2], [3, 3]])
