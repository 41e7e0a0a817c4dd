"""Uses of whole paths: inversion to noise, straightness, inpainting, and interpolation between two noises."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from utils.objectives.objective import VelocityFn, scale_noise
from utils.sampling.solvers import SOLVERS, TimeGrid, full_times, take_steps, time_at


def invert(
    velocity_fn: VelocityFn,
    x_1: Float[Array, "b ..."],
    num_steps: int | Int[Array, ""],
    solver: str = "euler",
    times: TimeGrid = time_at,
) -> Float[Array, "b ..."]:
    """Returns the noise from which `sample` leads to `x_1`, up to the solver's error: its steps from t = 1 to t = 0."""

    def backwards(step, num_steps):
        return times(num_steps - step, num_steps)

    # The same times in reverse order; a step with t_next < t goes backwards.
    return take_steps(velocity_fn, x_1, 0, num_steps, num_steps, solver, backwards)


def straightness(velocity_fn: VelocityFn, x_0: Float[Array, "b ..."], num_steps: int = 100) -> Float[Array, " b"]:
    """Returns how far each path from x_0 is from a straight line (arXiv:2209.03003, eq. 8), per element.

    It is the mean over `num_steps` Euler steps of |z_1 - z_0 - v|^2, the variance of v along the path, in [0, inf).
    Zero: one step is as good as many.
    """
    # Euler's path, of which z_1 - z_0 is the mean velocity; mean and variance are kept while it is followed.
    axes = tuple(range(1, x_0.ndim))

    def body(i, carried):
        x, mean, squares = carried
        t, t_next = time_at(i, num_steps), time_at(i + 1, num_steps)
        v = velocity_fn(x, full_times(t, x), full_times(t, x))  # at t, of models of whole steps too
        new_mean = mean + (v - mean) / (i + 1)  # Welford's update, which loses no digits
        return x + (t_next - t) * v, new_mean, squares + ((v - mean) * (v - new_mean)).mean(axes)

    start = (x_0, jnp.zeros_like(x_0), jnp.zeros(len(x_0)))
    _, _, squares = jax.lax.fori_loop(0, num_steps, body, start)
    return squares / num_steps


def inpaint(
    velocity_fn: VelocityFn,
    keys: Key[Array, " b"],
    noise: Float[Array, "b ..."],
    x_known: Float[Array, "b ..."],
    is_known: Bool[Array, "..."],
    num_steps: int | Int[Array, ""],
    solver: str = "euler",
    times: TimeGrid = time_at,
    num_repeats: int | Int[Array, ""] = 1,
    noise_scale: float = 1.0,
) -> Float[Array, "b ..."]:
    """Returns samples (b, ...) that are `x_known` where `is_known`, a mask of the shape of one example.

    After every step the known elements are put on their own path, t x_known + (1 - t) x_0. So that the others fit them,
    each step is taken `num_repeats` times, as RePaint does (arXiv:2201.09865): between two, x goes back from t' to t by
    fresh noise e, x_t = (t / t') x_t' + sqrt((1 - t)^2 - (t (1 - t') / t')^2) e. `keys` draw that of each example.
    Both it and `noise` are standard normal; on the path they are multiplied by `noise_scale`.
    """
    step = SOLVERS[solver].step

    def on_path(x, x_0, t):
        return jnp.where(is_known, t * x_known + (1 - t) * x_0, x)

    def body(i, carried):
        # x_0 is the noise that the known elements' path starts from; every repeat draws it anew.
        x, x_0 = carried
        t, t_next = times(i, num_steps), times(i + 1, num_steps)

        # Back to t by fresh noise, then forward again: the unknown elements can adapt to the known ones.
        def again(repeat, carried):
            x, _ = carried
            fresh = jax.vmap(lambda key: jax.random.normal(_fold(key, i, repeat), x.shape[1:]))(keys)
            fresh = scale_noise(fresh, noise_scale)
            # The path shrinks x by the ratio; fresh noise fills its standard deviation up to 1 - t.
            ratio = t / t_next
            x = ratio * x + jnp.sqrt((1 - t) ** 2 - (ratio * (1 - t_next)) ** 2) * fresh
            return forward(on_path(x, fresh, t), fresh)

        def forward(x, x_0):
            return on_path(step(velocity_fn, x, t, t_next), x_0, t_next), x_0

        return jax.lax.fori_loop(1, num_repeats, again, forward(x, x_0))

    x_0 = scale_noise(noise, noise_scale)
    x, _ = jax.lax.fori_loop(0, num_steps, body, (x_0, x_0))
    return jnp.where(is_known, x_known, x)


def _fold(key: Key[Array, ""], *numbers: Int[Array, ""]) -> Key[Array, ""]:
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def slerp(
    x: Float[Array, "n h w c"], y: Float[Array, "n h w c"], fractions: Float[Array, " k"]
) -> Float[Array, "n k h w c"]:
    """Returns the spherical interpolation (Shoemake 1985) from each x to its y at `fractions` in [0, 1].

    Unlike a straight line, it keeps the length of noise in between.
    """
    axes = (-3, -2, -1)

    # Angles are between whole examples, not between their rows or channels.
    def norm(z):
        return jnp.sqrt(jnp.square(z).sum(axes, keepdims=True))

    # One axis for the fractions, between the examples and their elements.
    x, y, fraction = x[:, None], y[:, None], fractions[None, :, None, None, None]
    cosine = (x * y).sum(axes, keepdims=True) / (norm(x) * norm(y))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    return (jnp.sin((1 - fraction) * angle) * x + jnp.sin(fraction * angle) * y) / jnp.sin(angle)
