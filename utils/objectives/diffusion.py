"""Diffusion with discrete noise levels (DDPM, Ho et al., arXiv:2006.11239), on the same network and the same paths.

Level k = 0 .. T - 1 is x_k = a_k x_1 + s_k x_0 with a_k^2 + s_k^2 = 1; k = 0 is the least noise. x_k / (a_k + s_k) lies
on the straight path from noise to data at the time t_k = a_k / (a_k + s_k), so that every ODE solver serves a network
that predicts noise, and DDIM is Euler's method over the times t_k.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from utils.base.settings import setting
from utils.objectives.flow_matching import draw_noise, expand_times, squared_errors
from utils.objectives.objective import Draws, ModelFn, VelocityFn


@functools.cache
def path_times(num_levels: int) -> np.ndarray:
    """Returns t_k for k = 0 .. T - 1, float64, descending, for betas that rise linearly from 0.1 / T to 20 / T.

    With T = 1000 these are DDPM's and DiT's betas 1e-4 to 0.02.
    """
    # In logarithms: the least noise, 1 minus a product close to 1, would lose its digits.
    betas = np.linspace(0.1 / num_levels, 20 / num_levels, num_levels)
    log_abar = np.cumsum(np.log1p(-betas))
    a = np.exp(log_abar / 2)
    s = np.sqrt(-np.expm1(log_abar))
    return a / (a + s)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """The network predicts the noise x_0 in x_k; it is given the level k as its time."""

    # Defaults of --model.* that differ for this objective: the network's times are levels, up to T - 1.
    MODEL_DEFAULTS: ClassVar = {"timestep_scale": 1.0}
    HAS_INNER_LOSS: ClassVar = True
    # Its own two, and all others by way of the straight path.
    SOLVERS: ClassVar = ("euler", "heun", "heun_euler", "midpoint", "sde", "ddim", "ddpm", "dopri5")
    TAKES_COUPLING: ClassVar = False  # its loss assumes noise that is independent of the images

    num_levels: int = setting(
        500, "T, the noise levels of a diffusion; DiT's is 1000.", 21, 10_000, flag="objective.diffusion_timesteps"
    )

    def draw(self, time_key: Key[Array, ""], noise_key: Key[Array, ""], num_examples: int) -> Draws:
        """Draws `t` (b,), the times of levels drawn uniformly, and `noise_key` (b,), from which x_0 is drawn."""
        levels = jax.random.randint(time_key, (num_examples,), 0, self.num_levels)
        return {"t": self.time_of(levels), "noise_key": jax.random.split(noise_key, num_examples)}

    def time_of(self, levels: Int[Array, "..."]) -> Float[Array, "..."]:
        """Returns t_k of each level k in 0 .. T - 1."""
        return jnp.asarray(path_times(self.num_levels), jnp.float32)[levels]

    def level_at(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns k of each time, exact at every t_k and linear in between; 0 and T - 1 beyond the first and last."""
        # Ascending, as interpolation needs them: t_k falls as k rises.
        times = jnp.asarray(path_times(self.num_levels)[::-1], jnp.float32)
        return jnp.interp(t, times, jnp.arange(self.num_levels - 1, -1, -1, dtype=jnp.float32))

    @property
    def max_grid_steps(self) -> int:
        return self.num_levels

    def time_grid(self, spacing: str) -> Callable[..., Float[Array, ""]]:
        """Returns the times of ddim and ddpm, see `time_at`."""
        return functools.partial(self.time_at, spacing=spacing)

    def time_at(
        self, step: int | Int[Array, ""], num_steps: int | Int[Array, ""], spacing: str = "linspace"
    ) -> Float[Array, ""]:
        """Returns the time before step `step` of `num_steps` no more than T, and 1 after the last, for ddim and ddpm.

        `spacing` 'linspace' takes the levels round(i (T - 1) / (N - 1)), both ends included, as DiT's DDPM does;
        'leading' the multiples of T // N, as DiT's DDIM and diffusers do.
        """
        place = jnp.clip(num_steps - 1 - step, 0)  # among the levels in ascending order
        if spacing == "leading":
            level = place * (self.num_levels // num_steps)
        else:
            intervals = jnp.maximum(num_steps - 1, 1)
            # In integers: a rounded level is a whole network input, and float32 would miss some halves.
            level, rest = jnp.divmod(place * (self.num_levels - 1), intervals)
            # Halves are rounded to even, as NumPy does. One step starts from the noisiest level.
            level += (2 * rest > intervals) | ((2 * rest == intervals) & (level % 2 == 1))
            level = jnp.where(num_steps == 1, self.num_levels - 1, level)
        return jnp.where(step < num_steps, self.time_of(level), 1)

    def _clip(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        # In float32 as the times of the levels are, so that the ends are exactly theirs.
        times = path_times(self.num_levels).astype(np.float32)
        return jnp.clip(t, times[-1], times[0])

    def loss(
        self,
        model_fn: ModelFn,
        ema_model_fn: ModelFn,
        x_1: Float[Array, "b ..."],
        condition: PyTree,
        draws: Draws,
    ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
        """Returns the mean squared error of the noise, every level weighing the same.

        Metrics: `v_abs_mean` and `v_pred_abs_mean` of the true and the predicted noise, under flow matching's names.
        """
        x_0 = draw_noise(draws, x_1)
        x_k, level = self._diffuse(x_0, x_1, draws["t"])
        # A network that also predicts a variance has twice the channels.
        output = jax.tree.map(lambda out: out[..., : x_k.shape[-1]], model_fn(x_k, level, condition))

        return squared_errors(output, x_0)

    def _diffuse(
        self, x_0: Float[Array, "b ..."], x_1: Float[Array, "b ..."], t: Float[Array, " b"]
    ) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
        """Returns (x_k, k) at the times t, clipped to those of the levels."""
        t = self._clip(t)
        level = self.level_at(t)
        # From the straight path to a_k^2 + s_k^2 = 1.
        t = expand_times(t, x_1)
        return (t * x_1 + (1 - t) * x_0) / jnp.hypot(t, 1 - t), level

    def _predict_noise(
        self, model_fn: ModelFn, x_k: Float[Array, "b ..."], level: Float[Array, " b"], condition: PyTree
    ) -> Float[Array, "b ..."]:
        # A network that also predicts a variance has twice the channels.
        return model_fn(x_k, level, condition)[..., : x_k.shape[-1]].astype(jnp.float32)

    def corrupt(self, x_1: Float[Array, "b ..."], draws: Draws) -> Float[Array, "b ..."]:
        """Returns x_k at the times and with the noise of `draws`."""
        return self._diffuse(draw_noise(draws, x_1), x_1, draws["t"])[0]

    def predict_data(
        self, model_fn: ModelFn, x_t: Float[Array, "b ..."], t: Float[Array, " b"], condition: PyTree
    ) -> Float[Array, "b ..."]:
        """Returns the data that the predicted noise eps implies, (x_k - s_k eps) / a_k."""
        t = self._clip(t)
        noise = self._predict_noise(model_fn, x_t, self.level_at(t), condition)
        t = expand_times(t, x_t)
        return (x_t * jnp.hypot(t, 1 - t) - (1 - t) * noise) / t

    def velocity(self, model_fn: ModelFn, condition: PyTree) -> VelocityFn:
        """Returns (x - eps) / t at x on the straight path, the field of the probability-flow ODE (arXiv:2011.13456).

        Before t_(T-1) and after t_0 the network sees x as noisy as there, which is all it knows.
        """

        with_variance = self.velocity_with_variance(model_fn, condition)
        return lambda x, t, t_next: with_variance(x, t, t_next)[..., : x.shape[-1]]

    def velocity_with_variance(self, model_fn: ModelFn, condition: PyTree) -> VelocityFn:
        """Returns `velocity` and, in further channels, the variance of an ancestral step where the network has one."""

        def velocity_fn(x, t, t_next):
            # Times beyond the levels, such as 0 and 1, are those of the nearest level to the network.
            inside = self._clip(t)
            level = self.level_at(inside)
            t = expand_times(t, x)
            inside = expand_times(inside, x)
            # The network takes x_k, of unit variance, in place of x on the straight path.
            x_k = x / jnp.hypot(t, 1 - t)
            noise, variance = jnp.split(model_fn(x_k, level, condition).astype(jnp.float32), [x.shape[-1]], axis=-1)
            velocity = (x_k * jnp.hypot(inside, 1 - inside) - noise) / inside
            return jnp.concatenate([velocity, variance], axis=-1)

        return velocity_fn
