"""The flow-matching objective: a straight path from noise x_0 (t = 0) to data x_1 (t = 1) and its velocity.

Rectified flow (Liu et al., arXiv:2209.03003) and flow matching (Lipman et al., arXiv:2210.02747). Everything here
takes a `velocity_fn(x_t, t)`, so that it can be tested with fields whose answer is known.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

# The path stops just short of the data: x_t keeps at least this share of noise. The model still sees the unclipped t.
MAX_PATH_TIME = 0.99

VelocityFn = Callable[[Float[Array, "b ..."], Float[Array, " b"]], Float[Array, "b ..."]]


def _per_example(t: Float[Array, " b"], like: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    return t.reshape(t.shape + (1,) * (like.ndim - 1))


def interpolate(x_0: Float[Array, "b ..."], x_1: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
    """x_t = (1 - t) x_0 + t x_1, with t clipped to [0, 0.99]."""
    t = _per_example(jnp.clip(t, 0, MAX_PATH_TIME), x_0)
    return (1 - t) * x_0 + t * x_1


def target_velocity(x_0: Float[Array, "b ..."], x_1: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """d x_t / d t = x_1 - x_0."""
    return x_1 - x_0


def predict_data(x_t: Float[Array, "b ..."], velocity: Float[Array, "b ..."], t: Float[Array, " b"]):
    """x_1 as one straight step from x_t along `velocity` reaches it: x_t + (1 - t) v."""
    return x_t + (1 - _per_example(t, x_t)) * velocity


def sample_times(key: Key[Array, ""], batch_size: int, sampler: str) -> Float[Array, " b"]:
    """Times in (0, 1), float32 (batch_size,).

    `sampler`: 'logit_normal', the sigmoid of a standard normal (arXiv:2403.03206, section 3.1; jax-flow's flag calls
    it 'log-normal', which is understood too), or 'uniform'. ValueError for any other.
    """
    if sampler in ("logit_normal", "log-normal"):
        return jax.nn.sigmoid(jax.random.normal(key, (batch_size,)))
    if sampler == "uniform":
        return jax.random.uniform(key, (batch_size,))
    raise ValueError(f"unknown t sampler {sampler!r}; use 'logit_normal' or 'uniform'")


def flow_matching_terms(
    velocity_fn: VelocityFn, x_0: Float[Array, "b ..."], x_1: Float[Array, "b ..."], t: Float[Array, " b"]
) -> dict[str, Float[Array, " b"]]:
    """Per example, in float32: `l2_loss` (mean squared error of the velocity), `v_abs_mean` and `v_pred_abs_mean`."""
    velocity = target_velocity(x_0, x_1).astype(jnp.float32)
    prediction = velocity_fn(interpolate(x_0, x_1, t), t).astype(jnp.float32)

    def mean(x):
        return x.mean(axis=tuple(range(1, x.ndim)))

    return {
        "l2_loss": mean(jnp.square(prediction - velocity)),
        "v_abs_mean": mean(jnp.abs(velocity)),
        "v_pred_abs_mean": mean(jnp.abs(prediction)),
    }


def flow_matching_loss(
    velocity_fn: VelocityFn, x_0: Float[Array, "b ..."], x_1: Float[Array, "b ..."], t: Float[Array, " b"]
) -> Float[Array, " b"]:
    """Mean squared error of velocity_fn(x_t, t) against x_1 - x_0, per example (b,); the caller averages."""
    return flow_matching_terms(velocity_fn, x_0, x_1, t)["l2_loss"]
