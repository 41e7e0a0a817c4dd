"""Flow matching on straight paths from noise x_0 (t = 0) to data x_1 (t = 1).

Rectified flow (Liu et al., arXiv:2209.03003), flow matching (Lipman et al., arXiv:2210.02747), and networks that
predict the data instead of the velocity (JiT: Li and He, arXiv:2511.13720).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, Shaped

from utils.base.settings import setting
from utils.objectives.objective import Draws, Heads, ModelFn, VelocityFn, scale_noise

# The path stops just short of the data: x_t keeps at least this fraction of noise. The model sees the unclipped t.
MAX_PATH_TIME = 0.99
# Values of --model.t_sampler.
T_SAMPLERS = ("logit_normal", "uniform")
LEGACY_T_SAMPLERS = {"log-normal": "logit_normal"}  # jax-flow's spelling
# Predicted data become a velocity over no less than this part of the path, so that errors of the network stay bounded.
MIN_REST = 0.05


def prediction_setting() -> Any:
    """Returns the field `prediction` of an objective: all objectives that have it share this definition."""
    return setting(
        "velocity",
        "What the network predicts: velocity, or data (JiT); the loss is on the velocity either way.",
        choices=("velocity", "data"),
        flag="objective.prediction",
    )


def expand_times(t: Shaped[Array, " b"], target: Float[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """Returns t (b,) with as many axes as `target`, to broadcast over its examples."""
    return t.reshape(t.shape + (1,) * (target.ndim - 1))


def interpolate(x_0: Float[Array, "b ..."], x_1: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
    """Returns x_t = (1 - t) x_0 + t x_1, with t clipped to [0, 0.99]."""
    t = expand_times(jnp.clip(t, 0, MAX_PATH_TIME), x_0)
    return (1 - t) * x_0 + t * x_1


def velocity_to(x_1: Float[Array, "b ..."], x_t: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
    """Returns (x_1 - x_t) / max(1 - t, 0.05), the velocity that leads from x_t to the data x_1 (JiT).

    On the straight path it is x_1 - x_0 up to t = 0.95, and falls to 0 from there to t = 1.
    """
    return (x_1 - x_t) / jnp.maximum(1 - expand_times(t, x_t), MIN_REST)


def velocity_model(model_fn: ModelFn, prediction: str) -> ModelFn:
    """Returns the network as one that predicts the velocity, where it predicts `prediction`: 'velocity' or 'data'.

    A network of average velocities u, which is given a step, predicts as data where u would lead by t = 1:
    x + (1 - t) u, with 1 - t bounded as in `velocity_to`.
    """
    if prediction == "velocity":
        return model_fn
    # For each head, where there are two.
    return lambda x_t, t, *given: jax.tree.map(lambda x_1: velocity_to(x_1, x_t, t), model_fn(x_t, t, *given))


def sample_times(
    key: Key[Array, ""], num_examples: int, t_sampler: str, mean: float = 0.0, std: float = 1.0
) -> Float[Array, " b"]:
    """Draws training times in (0, 1), float32.

    `t_sampler`: 'logit_normal', the sigmoid of a normal of this mean and standard deviation (arXiv:2403.03206, section
    3.1), or 'uniform'. Raises ValueError for any other.
    """
    # Puts most times in the middle of the path, where the velocity is hardest to predict.
    if t_sampler == "logit_normal":
        normal = jax.random.normal(key, (num_examples,))
        return jax.nn.sigmoid(normal if (mean, std) == (0, 1) else mean + std * normal)
    if t_sampler == "uniform":
        return jax.random.uniform(key, (num_examples,))
    raise ValueError(f"unknown t sampler {t_sampler!r}; use one of {', '.join(T_SAMPLERS)}")


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """The network predicts the velocity x_1 - x_0 of the straight path at x_t, or the data x_1 at its end."""

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

    prediction: str = prediction_setting()
    t_mean: float = setting(
        0.0, "Training times are the sigmoid of a normal: its mean; below 0: more noise.", -10, 10,
        flag="objective.t_mean",
    )  # fmt: skip
    t_std: float = setting(1.0, "Standard deviation of that normal.", 0.01, 10, flag="objective.t_std")
    # Larger images need more noise: their neighbouring pixels agree, and average it out (arXiv:2301.11093).
    noise_scale: float = setting(
        1.0, "Standard deviation of the noise x_0; JiT: 2 at 512x512.", 0.01, 100, flag="objective.noise_scale"
    )

    @property
    def ends_with_euler(self) -> bool:
        """Whether Heun's last step is Euler's: at t = 1, where no noise is left, predicted data say little."""
        return self.prediction == "data"

    def draw(self, time_key: Key[Array, ""], noise_key: Key[Array, ""], num_examples: int) -> Draws:
        """Draws `t` (b,) in [0, 1], and `noise_key` (b,), from which x_0 is drawn."""
        # At t = 0 alone the network learns the whole path as one step.
        if self.distill:
            t = jnp.zeros(num_examples)
        else:
            t = sample_times(time_key, num_examples, self.t_sampler, self.t_mean, self.t_std)
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
        output, velocity = self.predict_velocity(model_fn, x_1, condition, draws)
        return squared_errors(output, velocity)

    def predict_velocity(
        self, model_fn: ModelFn, x_1: Float[Array, "b ..."], condition: PyTree, draws: Draws
    ) -> tuple[Float[Array, "b ..."] | Heads, Float[Array, "b ..."]]:
        """Returns (the predicted velocity at x_t, for each head where there are two; the true one, float32)."""
        x_0 = draw_noise(draws, x_1, self.noise_scale)
        t = draws["t"]
        x_t = interpolate(x_0, x_1, t)
        prediction = velocity_model(model_fn, self.prediction)(x_t, t, condition)
        # The target is constant along the path. Where data are predicted, it is formed as the prediction is: the error
        # is then that of the data over max(1 - t, 0.05).
        velocity = velocity_to(x_1, x_t, t) if self.prediction == "data" else x_1 - x_0
        return prediction, velocity.astype(jnp.float32)

    def corrupt(self, x_1: Float[Array, "b ..."], draws: Draws) -> Float[Array, "b ..."]:
        """Returns x_t at the times and with the noise of `draws`."""
        return interpolate(draw_noise(draws, x_1, self.noise_scale), x_1, draws["t"])

    def predict_data(
        self, model_fn: ModelFn, x_t: Float[Array, "b ..."], t: Float[Array, " b"], condition: PyTree
    ) -> Float[Array, "b ..."]:
        """Returns the end of one straight step from x_t along the predicted velocity, x_t + (1 - t) v; where the
        network predicts the data, its prediction."""
        if self.prediction == "data":
            return model_fn(x_t, t, condition)
        # Exact where the path is straight.
        return x_t + (1 - expand_times(t, x_t)) * model_fn(x_t, t, condition)

    def velocity(self, model_fn: ModelFn, condition: PyTree) -> VelocityFn:
        """Returns the network's own velocity: an instantaneous field, so that t_next has no effect."""
        field = velocity_model(model_fn, self.prediction)
        return lambda x, t, t_next: field(x, t, condition)


def draw_noise(draws: Draws, x_1: Float[Array, "b ..."], scale: float = 1.0) -> Float[Array, "b ..."]:
    """Returns x_0 of the shape of x_1, `scale` times standard normal noise: "x_0" of the draws where the batch brings
    it (pairs, couplings), else drawn by their "noise_key"."""
    if "x_0" in draws:
        return scale_noise(draws["x_0"], scale)
    # A key for each example: its noise is the same however a batch is split over devices and microbatches.
    return scale_noise(jax.vmap(lambda key: jax.random.normal(key, x_1.shape[1:]))(draws["noise_key"]), scale)


def squared_errors(
    output: Float[Array, "b ..."] | Heads, target: Float[Array, "b ..."]
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Returns (mean squared errors (b,) of a network's last output, further metrics (b,)).

    Of `Heads`, the metric `inner_loss` has the errors of the inner one. All are float32.
    """
    prediction, *inner = output if isinstance(output, Heads) else (output,)
    prediction = prediction.astype(jnp.float32)
    metrics = {"v_abs_mean": example_mean(jnp.abs(target)), "v_pred_abs_mean": example_mean(jnp.abs(prediction))}
    for each in inner:
        metrics["inner_loss"] = example_mean(jnp.square(each.astype(jnp.float32) - target))
    return example_mean(jnp.square(prediction - target)), metrics


def example_mean(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Returns the mean over all axes but the first."""
    return x.mean(axis=tuple(range(1, x.ndim)))
