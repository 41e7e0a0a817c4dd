"""Shortcut models (Frans et al., arXiv:2410.12557): one network for steps of 1, 1/2, 1/4, ... of the path.

The network is told the level d of a step of size 2^-d and learns its average velocity: at the finest level by flow
matching, at every other one as the average of two steps of the next finer level, by the EMA of the network itself. A
sample can then be drawn in any power of two of steps, down to one.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from utils.base.settings import setting
from utils.objectives.flow_matching import draw_noise, example_mean, expand_times
from utils.objectives.objective import Draws, ModelFn, VelocityFn

MIN_NOISE = 1e-5  # fraction of the noise that is left at t = 1
MAX_LATENT = 4.0  # bootstrapped targets, and the points between their two steps, are clipped to +-4


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """The network predicts the average velocity of a step of size 2^-d at x_t, for d = 0 .. log2 of the finest steps.

    Every `bootstrap_every`-th row of a batch learns from the EMA, the levels taking turns; the others learn the
    velocity of the straight path. All rows are used once, and conditions are dropped at every level.
    """

    # Defaults of --model.* that differ for this objective: the EMA makes targets, and must not lag.
    MODEL_DEFAULTS: ClassVar = {"timestep_scale": 1.0, "step_conditioning": 1, "target_update_rate": 0.999}
    # Average velocities of steps of known sizes: other solvers and uneven times would ask for what is not learned.
    SOLVERS: ClassVar = ("euler",)
    NEEDS_UNIFORM_STEPS: ClassVar = True

    finest_steps: int = setting(
        128, "Steps of the finest level of a shortcut model, a power of two.", 2, 4096, flag="objective.finest_steps"
    )
    bootstrap_every: int = setting(
        8,
        "One row of so many bootstraps a shortcut model; the others learn the flow.",
        2,
        4096,
        flag="objective.bootstrap_every",
    )
    bootstrap_guidance: float = setting(
        1.0,
        "Guidance scale baked into a shortcut model's coarser levels; 1: none.",
        0,
        1000,
        flag="objective.bootstrap_guidance",
    )

    def __post_init__(self):
        # A power of two has one bit.
        if self.finest_steps & (self.finest_steps - 1):
            raise ValueError(f"--objective.finest_steps={self.finest_steps} is no power of two; use 128, for example")

    @property
    def num_levels(self) -> int:
        """The finest level L: levels 0 .. L - 1 are bootstrapped, level L is flow matching."""
        return int(math.log2(self.finest_steps))

    @property
    def row_period(self) -> int:
        """The number of rows after which their roles in a batch repeat."""
        return self.bootstrap_every

    def draw(self, time_key: Key[Array, ""], noise_key: Key[Array, ""], num_examples: int) -> Draws:
        """Draws `t` (b,), multiples of the step, `level` (b,), float, and `noise_key` (b,), from which x_0 is drawn."""
        # The levels take turns by row number, the finest of the bootstrapped ones first.
        rows = jnp.arange(num_examples)
        turn = (rows // self.bootstrap_every) % self.num_levels
        level = jnp.where(rows % self.bootstrap_every == 0, self.num_levels - 1 - turn, self.num_levels)
        # A step starts where sampling in steps of this size would start it.
        steps = 2.0**level
        t = jnp.floor(jax.random.uniform(time_key, (num_examples,)) * steps) / steps
        noise_keys = jax.random.split(noise_key, num_examples)
        return {"t": t, "level": level.astype(jnp.float32), "noise_key": noise_keys}

    def loss(
        self,
        model_fn: ModelFn,
        ema_model_fn: ModelFn,
        x_1: Float[Array, "b ..."],
        condition: PyTree,
        draws: Draws,
    ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
        """Returns the mean squared error of the average velocity.

        Metrics: `v_abs_mean` and `v_pred_abs_mean` of the targets and the predictions.
        """
        # All rows on the path at their times, and the velocity of the path.
        x_0 = draw_noise(draws, x_1)
        t = draws["t"]
        level = draws["level"]
        x_t = self._interpolate(x_0, x_1, t)
        velocity = x_1 - (1 - MIN_NOISE) * x_0

        # Targets: the velocity of the straight path, but for the rows that learn from the EMA.
        every = self.bootstrap_every
        rows = jax.tree.map(lambda rows: rows[::every], (x_t, t, condition, draws["null"], level))
        bootstrapped = self.bootstrap_targets(ema_model_fn, *rows)
        targets = velocity.at[::every].set(bootstrapped)
        prediction = model_fn(x_t, t, condition, level).astype(x_t.dtype)

        loss = example_mean(jnp.square(prediction - targets))
        return loss, {
            "v_abs_mean": example_mean(jnp.abs(targets)),
            "v_pred_abs_mean": example_mean(jnp.abs(prediction)),
        }

    def bootstrap_targets(
        self,
        ema_model_fn: ModelFn,
        x_t: Float[Array, "n ..."],
        t: Float[Array, " n"],
        condition: PyTree,
        null: PyTree,
        level: Float[Array, " n"],
    ) -> Float[Array, "n ..."]:
        """Returns the average velocity of two steps of the next finer level, guided where that is the finest."""
        half = 2.0 ** -(level + 1)

        def velocity(x, t):
            # Coarser levels inherit guidance from their targets, so that it is added at the finest alone.
            conditional = ema_model_fn(x, t, condition, level + 1)
            if self.bootstrap_guidance == 1:
                return conditional
            unconditional = ema_model_fn(x, t, null, level + 1)
            guided = unconditional + self.bootstrap_guidance * (conditional - unconditional)
            return jnp.where(expand_times(level == self.num_levels - 1, x), guided, conditional)

        # Two steps, by the EMA. Clipping keeps an early network from targets that run away.
        first = velocity(x_t, t)
        halfway = jnp.clip(x_t + expand_times(half, x_t) * first, -MAX_LATENT, MAX_LATENT)
        second = velocity(halfway, t + half)
        average = jnp.clip((first + second) / 2, -MAX_LATENT, MAX_LATENT)
        return jax.lax.stop_gradient(average.astype(x_t.dtype))

    def _interpolate(
        self, x_0: Float[Array, "b ..."], x_1: Float[Array, "b ..."], t: Float[Array, " b"]
    ) -> Float[Array, "b ..."]:
        t = expand_times(t, x_1)
        return (1 - (1 - MIN_NOISE) * t) * x_0 + t * x_1

    def corrupt(self, x_1: Float[Array, "b ..."], draws: Draws) -> Float[Array, "b ..."]:
        """Returns x_t at the times and with the noise of `draws`."""
        return self._interpolate(draw_noise(draws, x_1), x_1, draws["t"])

    def predict_data(
        self, model_fn: ModelFn, x_t: Float[Array, "b ..."], t: Float[Array, " b"], condition: PyTree
    ) -> Float[Array, "b ..."]:
        """Returns the end of one straight step from x_t along the velocity of the finest level."""
        velocity = model_fn(x_t, t, condition, jnp.full_like(t, self.num_levels))
        return x_t + (1 - expand_times(t, x_t)) * velocity

    def velocity(self, model_fn: ModelFn, condition: PyTree) -> VelocityFn:
        """Returns the average velocity from t to t_next, whose distance is the step of a level; at most the finest."""

        def velocity_fn(x, t, t_next):
            # A step of no length, and any below the finest, is of the finest level.
            size = jnp.abs(t_next - t)
            level = jnp.round(-jnp.log2(jnp.maximum(size, 1 / self.finest_steps)))
            return model_fn(x, t, condition, level)

        return velocity_fn

    def check_steps(self, num_steps: int) -> str:
        """Returns why a number of sampling steps cannot be taken; empty where it can."""
        # Only steps of a level, which all have the same size.
        if num_steps > self.finest_steps or num_steps & (num_steps - 1):
            return f"a shortcut model takes a power of two up to {self.finest_steps} steps"
        return ""
