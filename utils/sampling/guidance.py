"""Guidance: fields that lead away from a worse prediction, and fields between two conditions.

The worse prediction is that without the condition (`guide`), of an early block (`guide_by_inner`) or of another model
(`guide_by_model`); all are v_worse + w (v - v_worse). The scale and the times of an interval are ordinary arguments of
the compiled function: changing them compiles nothing anew.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from utils.objectives.flow_matching import expand_times
from utils.objectives.objective import ModelFn, VelocityFn


def guide(
    model_fn: ModelFn,
    null: Callable[[int], PyTree],
    cfg_scale: float | Float[Array, ""] | None,
    cfg_channels: int | None = None,
    is_zero_star: bool = False,
) -> ModelFn:
    """Returns model_fn with classifier-free guidance (arXiv:2207.12598): v_uncond + s (v_cond - v_uncond).

    `cfg_channels` guides the first channels alone, as DiT and SiT do; None: all. The others are conditional, and so are
    outputs beyond the channels of x, a learned variance. `null(n)` is n times "no condition". `cfg_scale` None turns
    guidance off: the conditional prediction, at half the cost (what s = 1 gives, up to rounding).

    With `is_zero_star`, the unconditional velocity is first scaled to fit the conditional one, separately for each
    example (CFG-Zero*, arXiv:2503.18886); `model_fn` must then return velocities. The first steps, whose velocity
    CFG-Zero* sets to zero, are skipped by the solver (`first` of `solvers.sample`).
    """
    if cfg_scale is None:
        return model_fn
    scale = cfg_scale

    def guided(x, t, condition, *step):
        # Both halves go through the network in one batch of 2b.
        both = jax.tree.map(lambda *halves: jnp.concatenate(halves), null(len(x)), condition)
        v = model_fn(*(jnp.concatenate([rows, rows]) for rows in (x, t)), both, *(jnp.tile(s, 2) for s in step))
        v_uncond, v_cond = jnp.split(v, 2)
        num_guided = x.shape[-1] if cfg_channels is None else cfg_channels
        if is_zero_star:
            v_uncond = project(v_cond[..., :num_guided], v_uncond[..., :num_guided]) * v_uncond
        return _keep_rest(v_uncond + scale * (v_cond - v_uncond), v_cond, num_guided)

    return guided


def project(v: Float[Array, "b ..."], direction: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Returns the factor s of each example, (b, 1, ...), for which s d is nearest to v, d the `direction`:
    <v, d> / |d|^2."""
    axes = tuple(range(1, v.ndim))
    inner_product = (v * direction).sum(axes, keepdims=True)
    return inner_product / (jnp.square(direction).sum(axes, keepdims=True) + 1e-8)


def guide_by_inner(heads_fn: ModelFn, scales: Float[Array, " b"]) -> ModelFn:
    """Returns inner + w (final - inner) of a network with two heads (internal guidance, arXiv:2512.24176); `scales`
    (b,) has the w of each example.

    `heads_fn` returns `Heads`: one pass of the network gives both.
    """

    def guided(x, t, condition, *step):
        final, inner = heads_fn(x, t, condition, *step)
        change = expand_times(scales - 1, final) * (final - inner)
        return _keep_rest(final + change, final, x.shape[-1])

    return guided


def guide_by_model(field: ModelFn, weak: ModelFn, scale: float | Float[Array, ""]) -> ModelFn:
    """Returns v_weak + w (v - v_weak) of two fields (x, t, condition, t_next) -> velocity: that of a model, and that of
    a smaller or less trained one (autoguidance, arXiv:2406.02507)."""

    def guided(x, t, condition, t_next):
        v = field(x, t, condition, t_next)
        v_weak = weak(x, t, condition, t_next)
        num_channels = x.shape[-1]
        change = (scale - 1) * (v[..., :num_channels] - v_weak[..., :num_channels])
        return _keep_rest(v[..., :num_channels] + change, v, num_channels)

    return guided


def _keep_rest(
    guided: Float[Array, "b ... _"], plain: Float[Array, "b ... c"], num_channels: int
) -> Float[Array, "b ... c"]:
    """Returns the first channels of `guided`, then those of `plain`: the rest of x, and a learned variance."""
    if num_channels >= plain.shape[-1]:
        return guided
    return jnp.concatenate([guided[..., :num_channels], plain[..., num_channels:]], axis=-1)


def within(
    guided: Callable, plain: Callable, low: float | Float[Array, ""], high: float | Float[Array, ""]
) -> Callable:
    """Returns a field that is `guided` at times from `low` to `high`, and `plain`, at half the cost, before and after
    (arXiv:2404.07724). The time must be the same for all examples."""
    # Outside of vmap, a cond runs one branch alone: that saves half of the cost.
    return lambda x, t, *rest: jax.lax.cond((low <= t[0]) & (t[0] <= high), guided, plain, x, t, *rest)


def mix(first: VelocityFn, second: VelocityFn, fractions: Float[Array, " b"]) -> VelocityFn:
    """Returns (1 - fraction) of the first field and fraction of the second, one fraction for each example."""

    def velocity_fn(x, t, t_next):
        # Broadcast over the elements of each example.
        fraction = fractions.reshape(-1, *[1] * (x.ndim - 1))
        return (1 - fraction) * first(x, t, t_next) + fraction * second(x, t, t_next)

    return velocity_fn
