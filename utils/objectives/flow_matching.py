"""Flow matching on straight paths from noise x_0 (t = 0) to data x_1 (t = 1).

Rectified flow (Liu et al., arXiv:2209.03003), flow matching (Lipman et al., arXiv:2210.02747).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, Shaped

from utils.base.settings import setting
from utils.objectives.objective import Draws, Heads, ModelFn, VelocityFn

# The path stops just short of the data: x_t keeps at least this fraction of noise. The model sees the unclipped t.
MAX_PATH_TIME = 0.99
# Values of --model.t_sampler.
T_SAMPLERS = ("logit_normal", "uniform")
LEGACY_T_SAMPLERS = {"log-normal": "logit_normal"}  # jax-flow's spelling


def expand_times(t: Shaped[Array, " b"], target: Float[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """Returns t (b,) with as many axes as `target`, to broadcast over its examples."""
    return t.reshape(t.shape + (1,) * (target.ndim - 1))


def interpolate(x_0: Float[Array, "b ..."], x_1: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
    """Returns x_t = (1 - t) x_0 + t x_1, with t clipped to [0, 0.99]."""
    t = expand_times(jnp.clip(t, 0, MAX_PATH_TIME), x_0)
    return (1 - t) * x_0 + t * x_1


def sample_times(key: Key[Array, ""], num_examples: int, t_sampler: str) -> Float[Array, " b"]:
    """Draws training times in (0, 1), float32.

    `t_sampler`: 'logit_normal', the sigmoid of a standard normal (arXiv:2403.03206, section 3.1), or 'uniform'.
    Raises ValueError for any other.
    """
    # Puts most times in the middle of the path, where the velocity is hardest to predict.
    if t_sampler == "logit_normal":
        return jax.nn.sigmoid(jax.random.normal(key, (num_examples,)))
    if t_sampler == "uniform":
        return jax.random.uniform(key, (num_examples,))
    raise ValueError(f"unknown t sampler {t_sampler!r}; use one of {', '.join(T_SAMPLERS)}")


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """The network predicts the velocity x_1 - x_0 of the straight path at x_t."""

    HAS_INNER_LOSS: ClassVar = True

    t_sampler: str = setting(
        "logit_normal",
        "Training times: sigmoid of a normal (log-normal means the same), or uniform.",
        choices=(*T_SAMPLERS, *LEGACY_T_SAMPLERS),
        flag="model.t_sampler",
    )

    # Meant for pairs (make_pairs.py): with independent noise, one step learns no more than the mean.
    distill: int = setting(
        0, "1: every training time is 0, to learn one step from pairs:DIR.", 0, 1, flag="objective.distill"
    )

    def draw(self, time_key: Key[Array, ""], noise_key: Key[Array, ""], num_examples: int) -> Draws:
        """Draws `t` (b,) in [0, 1], and `noise_key` (b,), from which x_0 is drawn."""
        # At t = 0 alone the network learns the whole path as one step.
        t = jnp.zeros(num_examples) if self.distill else sample_times(time_key, num_examples, self.t_sampler)
        return {
            "t": t,
            "noise_key": jax.random.split(noise_key, num_examples),
        }

    def loss(
        self,
        model_fn: ModelFn,
        ema_model_fn: ModelFn,
        x_1: Float[Array, "b ..."],
        condition: PyTree,
        draws: Draws,
    ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
        """Returns the mean squared error of the velocity at x_t.

        Metrics: `v_abs_mean` and `v_pred_abs_mean` of the true and the predicted velocity.
        """
        x_0 = draw_noise(draws, x_1)
        t = draws["t"]
        # The target is constant along the path. Errors are in float32, whatever the compute dtype.
        velocity = (x_1 - x_0).astype(jnp.float32)
        output = model_fn(interpolate(x_0, x_1, t), t, condition)

        return squared_errors(output, velocity)

    def corrupt(self, x_1: Float[Array, "b ..."], draws: Draws) -> Float[Array, "b ..."]:
        """Returns x_t at the times and with the noise of `draws`."""
        return interpolate(draw_noise(draws, x_1), x_1, draws["t"])

    def predict_data(
        self, model_fn: ModelFn, x_t: Float[Array, "b ..."], t: Float[Array, " b"], condition: PyTree
    ) -> Float[Array, "b ..."]:
        """Returns the end of one straight step from x_t along the predicted velocity: x_t + (1 - t) v."""
        # Exact where the path is straight.
        return x_t + (1 - expand_times(t, x_t)) * model_fn(x_t, t, condition)

    def velocity(self, model_fn: ModelFn, condition: PyTree) -> VelocityFn:
        """Returns the network itself: an instantaneous field, so that t_next has no effect."""
        return lambda x, t, t_next: model_fn(x, t, condition)


def draw_noise(draws: Draws, x_1: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Returns x_0 of the shape of x_1: that of `draws` if the data are pairs, else standard normal by `noise_key`."""
    if "x_0" in draws:
        return draws["x_0"]
    # A key for each example: its noise is the same however a batch is split over devices and microbatches.
    return jax.vmap(lambda key: jax.random.normal(key, x_1.shape[1:]))(draws["noise_key"])


def squared_errors(
    output: Float[Array, "b ..."] | Heads, target: Float[Array, "b ..."]
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Returns (mean squared errors (b,) of a network's output, further metrics (b,)); `inner_loss` is that of an inner
    head."""
    prediction, *inner = output if isinstance(output, Heads) else (output,)
    prediction = prediction.astype(jnp.float32)
    metrics = {"v_abs_mean": example_mean(jnp.abs(target)), "v_pred_abs_mean": example_mean(jnp.abs(prediction))}
    for each in inner:
        metrics["inner_loss"] = example_mean(jnp.square(each.astype(jnp.float32) - target))
    return example_mean(jnp.square(prediction - target)), metrics


def example_mean(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Returns the mean over all axes but the first."""
    return x.mean(axis=tuple(range(1, x.ndim)))
