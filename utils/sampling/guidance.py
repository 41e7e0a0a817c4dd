"""Guidance: fields that combine a model's predictions with and without its condition, or under two conditions.

The scale and the times of an interval are ordinary arguments of the compiled function: changing them compiles nothing
anew.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from utils.objectives.objective import ModelFn, VelocityFn


def guide(
    model_fn: ModelFn,
    null: Callable[[int], PyTree],
    cfg_scale: float | Float[Array, ""] | None,
    cfg_channels: int | None = None,
) -> ModelFn:
    """Returns model_fn with classifier-free guidance (arXiv:2207.12598): v_uncond + s (v_cond - v_uncond).

    `cfg_channels` guides the first channels alone, as DiT and SiT do; None: all. The others are conditional, and so are
    outputs beyond the channels of x, a learned variance. `null(n)` is n times "no condition". `cfg_scale` None turns
    guidance off: the conditional prediction, at half the cost (what s = 1 gives, up to rounding).
    """
    if cfg_scale is None:
        return model_fn
    scale = cfg_scale

    def guided(x, t, condition, *step):
        # Both halves go through the network in one batch of 2b.
        both = jax.tree.map(lambda *halves: jnp.concatenate(halves), null(len(x)), condition)
        v = model_fn(*(jnp.concatenate([rows, rows]) for rows in (x, t)), both, *(jnp.tile(s, 2) for s in step))
        v_uncond, v_cond = jnp.split(v, 2)
        v = v_uncond + scale * (v_cond - v_uncond)

        # Channels without guidance: the rest of x, and a learned variance behind them.
        num_guided = x.shape[-1] if cfg_channels is None else cfg_channels
        if num_guided >= v.shape[-1]:
            return v
        return jnp.concatenate([v[..., :num_guided], v_cond[..., num_guided:]], axis=-1)

    return guided


def within(
    guided: VelocityFn, plain: VelocityFn, low: float | Float[Array, ""], high: float | Float[Array, ""]
) -> VelocityFn:
    """Returns a field that is `guided` at times from `low` to `high`, and `plain`, at half the cost, before and after
    (arXiv:2404.07724). The time must be the same for all examples."""
    # Outside of vmap, a cond runs one branch alone: that saves half of the cost.
    return lambda x, t, t_next: jax.lax.cond((low <= t[0]) & (t[0] <= high), guided, plain, x, t, t_next)


def mix(first: VelocityFn, second: VelocityFn, fractions: Float[Array, " b"]) -> VelocityFn:
    """Returns (1 - fraction) of the first field and fraction of the second, one fraction for each example."""

    def velocity_fn(x, t, t_next):
        # Broadcast over the elements of each example.
        fraction = fractions.reshape(-1, *[1] * (x.ndim - 1))
        return (1 - fraction) * first(x, t, t_next) + fraction * second(x, t, t_next)

    return velocity_fn
