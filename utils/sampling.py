"""Samples from a velocity field: guidance, the Euler solver, and the noise and label of sample i.

The number of steps and the guidance scale are ordinary arguments of the compiled program: changing them compiles
nothing anew. Nothing here knows the model; `velocity_fn(x, t)` and `model_fn(x, t, labels)` do.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from utils.flow import VelocityFn

ModelFn = Callable[[Float[Array, "b ..."], Float[Array, " b"], Int[Array, " b"]], Float[Array, "b ..."]]


def guided_velocity(
    model_fn: ModelFn, labels: Int[Array, " b"], num_classes: int, cfg_scale: float | Float[Array, ""] | None
) -> VelocityFn:
    """velocity_fn with classifier-free guidance (arXiv:2207.12598): v_uncond + s (v_cond - v_uncond), all channels.

    Label `num_classes` stands for "no label"; both halves go through the model in one batch of 2b. `cfg_scale` None
    turns guidance off: the conditional velocity, at half the cost (equal to s = 1 up to rounding).
    """
    if cfg_scale is None:
        return lambda x, t: model_fn(x, t, labels)
    both_labels = jnp.concatenate([jnp.full_like(labels, num_classes), labels])

    def velocity_fn(x, t):
        v = model_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both_labels)
        v_uncond, v_cond = jnp.split(v, 2)
        return v_uncond + cfg_scale * (v_cond - v_uncond)

    return velocity_fn


def euler_steps(
    velocity_fn: VelocityFn,
    x: Float[Array, "b ..."],
    first: int | Int[Array, ""],
    last: int | Int[Array, ""],
    num_steps: int | Int[Array, ""],
) -> Float[Array, "b ..."]:
    """x after the Euler steps i = first .. last - 1 of `num_steps`: x += v(x, i / num_steps) / num_steps.

    All three counts may be traced, so that one compiled program serves every step count and every stage of a path.
    """

    def step(i, x):
        t = jnp.full((x.shape[0],), i / num_steps, jnp.float32)
        return x + velocity_fn(x, t) / num_steps

    return jax.lax.fori_loop(first, last, step, x)


def euler_sample(
    velocity_fn: VelocityFn, noise: Float[Array, "b ..."], num_steps: int | Int[Array, ""]
) -> Float[Array, "b ..."]:
    """Samples: `noise` carried from t = 0 to t = 1 by `num_steps` Euler steps at t = i / num_steps."""
    return euler_steps(velocity_fn, noise, 0, num_steps, num_steps)


def sample_noise(key: Key[Array, ""], indices: Int[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise (b, *shape); row j is a function of (key, indices[j]) alone."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


def sample_labels(key: Key[Array, ""], indices: Int[Array, " b"], num_classes: int) -> Int[Array, " b"]:
    """Labels drawn uniformly from 0 .. num_classes - 1 (b,); entry j is a function of (key, indices[j]) alone."""
    return jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, num_classes))(indices)
