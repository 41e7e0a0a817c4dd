"""MeanFlow (Geng et al., arXiv:2505.13447): the network gives the average velocity of any step; one step is enough.

u(x, t, r) = (x(r) - x) / (r - t) along the path through x at t satisfies u = v + (r - t) du/dt, where du/dt is the
derivative along the path with r fixed: one Jacobian-vector product. That is the target, with v of the straight path.

The identity holds for the function u, however the network expresses it. A network may predict y instead (pixel mean
flow, arXiv:2601.22158): u = (y - x) / max(1 - t, 0.05) is then differentiated as a whole (`velocity_model`). Up to
t = 0.95, y is where u would lead by t = 1: the data, for a step to r = 1. Beyond, the divisor stays at 0.05, so that
y = x + u / 20. As v is still that of the straight path, a step to t = 1 ends at the data from there, too.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from utils.base.settings import setting
from utils.objectives.flow_matching import draw_noise, expand_times, prediction_setting, velocity_model
from utils.objectives.objective import Draws, ModelFn, VelocityFn

TIME_MEAN = 0.4  # of the normal whose sigmoid the times are


@dataclasses.dataclass(frozen=True)
class MeanFlow:
    """The network predicts the average velocity from t to r = t + h at x_t, given t and h, or where it would lead."""

    # Defaults of --model.* that differ for this objective: a time embedding that is not smooth has huge derivatives.
    MODEL_DEFAULTS: ClassVar = {"timestep_scale": 1.0, "step_conditioning": 1}
    # Euler takes the average velocity of each step, dopri5 the instantaneous one.
    SOLVERS: ClassVar = ("euler", "dopri5")
    HAS_GUIDANCE: ClassVar = False  # it is in the targets

    # Rows that learn a step cost a Jacobian-vector product; the others are flow matching.
    step_every: int = setting(4, "One row of so many learns a step of MeanFlow, the others r = t.", 2, 4096)
    # Guidance, which is part of the targets.
    omega: float = setting(1.0, "MeanFlow's guidance: weight of the path's velocity.", 0, 1000)
    kappa: float = setting(
        0.5, "MeanFlow's guidance: weight of the network's own; the scale is omega / (1 - kappa).", 0, 0.99
    )
    guidance_start: float = setting(0.0, "First time t with MeanFlow's guidance.", 0, 1)
    guidance_end: float = setting(1.0, "Last time t with MeanFlow's guidance.", 0, 1)
    # The weight of an example, (squared error + norm_eps)^-norm_p.
    norm_p: float = setting(1.0, "Power of MeanFlow's adaptive weight; 0: squared error.", 0, 2)
    norm_eps: float = setting(0.01, "What MeanFlow's adaptive weight adds to the squared error.", 1e-8, 1e3)
    prediction: str = prediction_setting()

    def __post_init__(self):
        if self.guidance_start > self.guidance_end:
            raise ValueError(
                f"--objective.guidance_start={self.guidance_start:g} is after --objective.guidance_end="
                f"{self.guidance_end:g}; swap them"
            )

    @property
    def row_period(self) -> int:
        """The number of rows after which their roles in a batch repeat."""
        return self.step_every

    def draw(self, time_key: Key[Array, ""], noise_key: Key[Array, ""], num_examples: int) -> Draws:
        """Draws `t` and `h` (b,), the start and length of a step, h = 0 in most rows; `noise_key` (b,)."""
        times = jax.nn.sigmoid(TIME_MEAN + jax.random.normal(time_key, (num_examples, 2)))
        t = times.min(axis=1)
        # By row number: which rows need a derivative is known when the loss is traced.
        is_step = jnp.arange(num_examples) % self.step_every == 0
        return {
            "t": t,
            "h": jnp.where(is_step, times.max(axis=1) - t, 0.0),
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
        """Returns the squared error over its own power, the paper's adaptive weight, so that outliers do not dominate.

        Metrics: `v_abs_mean` and `v_pred_abs_mean` of the targets and the predictions, `sum_of_squares` of the error,
        and `du_dt_abs_mean`, which is zero where h is. The loss itself is nearly constant with norm_p 1.
        """
        # The point on the path, and the velocity there.
        model_fn = velocity_model(model_fn, self.prediction)
        x_0 = draw_noise(draws, x_1)
        is_dropped = draws.get("is_dropped", jnp.zeros(len(x_1), bool))
        t = draws["t"]
        h = jnp.where(is_dropped, 0, jnp.clip(draws["h"], 0, 1 - t))  # "no condition" is learned at r = t
        x_t = expand_times(1 - t, x_1) * x_0 + expand_times(t, x_1) * x_1
        velocity = self.guided_velocity(model_fn, x_t, t, condition, draws, x_1 - x_0)

        # Rows that learn a step have a derivative along the path; the others are plain evaluations.
        stepping = jax.tree.map(lambda rows: rows[:: self.step_every], (x_t, t, h, condition, velocity))
        u_step, du_dt = self.derivative(model_fn, *stepping)
        u_rest = model_fn(*jax.tree.map(self._others, (x_t, t, condition, h))).astype(x_t.dtype)
        prediction = self._interleave(u_step, u_rest)
        derivative = self._interleave(du_dt, jnp.zeros_like(u_rest))
        target = jax.lax.stop_gradient(velocity + expand_times(h, x_t) * derivative)

        # The weight is without gradient: it scales an example, and is no part of what is minimised.
        axes = tuple(range(1, x_1.ndim))
        squares = jnp.square(prediction - target).sum(axis=axes)
        weight = jax.lax.stop_gradient((squares + self.norm_eps) ** self.norm_p)
        return squares / weight, {
            "v_abs_mean": jnp.abs(target).mean(axis=axes),
            "v_pred_abs_mean": jnp.abs(prediction).mean(axis=axes),
            "sum_of_squares": squares,
            "du_dt_abs_mean": jnp.abs(derivative).mean(axis=axes),
        }

    def guided_velocity(
        self,
        model_fn: ModelFn,
        x_t: Float[Array, "b ..."],
        t: Float[Array, " b"],
        condition: PyTree,
        draws: Draws,
        velocity: Float[Array, "b ..."],
    ) -> Float[Array, "b ..."]:
        """Returns omega v + (1 - omega - kappa) u(no condition) + kappa u(condition).

        Both u are at r = t, and without gradient. Where the condition is dropped, and outside of the guidance's times,
        it is v itself.
        """
        # Without guidance no pass of the network is spent on it.
        if (self.omega, self.kappa) == (1, 0):
            return velocity
        still = jnp.zeros_like(t)
        parts = self.omega * velocity + (1 - self.omega - self.kappa) * model_fn(x_t, t, draws["null"], still)
        if self.kappa:
            parts += self.kappa * model_fn(x_t, t, condition, still)
        is_guided = (self.guidance_start <= t) & (t <= self.guidance_end)
        if "is_dropped" in draws:
            is_guided &= ~draws["is_dropped"]
        return jax.lax.stop_gradient(jnp.where(expand_times(is_guided, x_t), parts, velocity))

    def derivative(
        self,
        model_fn: ModelFn,
        x_t: Float[Array, "n ..."],
        t: Float[Array, " n"],
        h: Float[Array, " n"],
        condition: PyTree,
        velocity: Float[Array, "n ..."],
    ) -> tuple[Float[Array, "n ..."], Float[Array, "n ..."]]:
        """Returns (u, du/dt along the path with r = t + h fixed; the latter without gradient)."""
        # Along the path dx/dt = v and, as r stays where it is, dh/dt = -1. One pass gives u as well.
        u, du_dt = jax.jvp(
            lambda x, t, h: model_fn(x, t, condition, h), (x_t, t, h), (velocity, jnp.ones_like(t), -jnp.ones_like(h))
        )
        return u.astype(x_t.dtype), jax.lax.stop_gradient(du_dt.astype(x_t.dtype))

    def _others(self, rows: Array) -> Array:
        """Returns the rows of a batch that learn no step."""
        return rows.reshape(-1, self.step_every, *rows.shape[1:])[:, 1:].reshape(-1, *rows.shape[1:])

    def _interleave(self, first: Float[Array, "n ..."], rest: Float[Array, "m ..."]) -> Float[Array, "b ..."]:
        """Returns the rows of a batch in order, from those that learn a step and the others."""
        shape = first.shape[1:]
        blocks = [first.reshape(-1, 1, *shape), rest.reshape(-1, self.step_every - 1, *shape)]
        return jnp.concatenate(blocks, axis=1).reshape(-1, *shape)

    def corrupt(self, x_1: Float[Array, "b ..."], draws: Draws) -> Float[Array, "b ..."]:
        """Returns x_t at the times and with the noise of `draws`."""
        t = expand_times(draws["t"], x_1)
        return (1 - t) * draw_noise(draws, x_1) + t * x_1

    def predict_data(
        self, model_fn: ModelFn, x_t: Float[Array, "b ..."], t: Float[Array, " b"], condition: PyTree
    ) -> Float[Array, "b ..."]:
        """Returns the end of one step from x_t to t = 1: x_t + (1 - t) u(x_t, t, 1)."""
        velocity = velocity_model(model_fn, self.prediction)(x_t, t, condition, 1 - t)
        return x_t + expand_times(1 - t, x_t) * velocity

    def velocity(self, model_fn: ModelFn, condition: PyTree) -> VelocityFn:
        """Returns the average velocity from t to t_next, the instantaneous one where they are equal."""
        field = velocity_model(model_fn, self.prediction)
        return lambda x, t, t_next: field(x, t, condition, t_next - t)
