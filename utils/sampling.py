"""Samples from a velocity field: guidance, ODE solvers, and the noise and label of sample i.

The number of steps and the guidance scale are ordinary arguments of the compiled program: changing them compiles
nothing anew. Nothing here knows the model; `velocity_fn(x, t)` and `model_fn(x, t, labels)` do.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from utils.flow import VelocityFn

# Velocities that a step takes.
SOLVERS = {"euler": 1, "heun": 2, "midpoint": 2}
LABELS = ("uniform", "balanced", "dataset")

ModelFn = Callable[[Float[Array, "b ..."], Float[Array, " b"], Int[Array, " b"]], Float[Array, "b ..."]]


class Sampler(NamedTuple):
    """How samples are drawn from a model."""

    num_steps: int
    cfg_scale: float | None  # None: no guidance
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # times, ends included, at which guidance is on
    solver: str = "euler"

    @property
    def num_evaluations(self) -> int:
        """Velocities that a sample takes; a guided one is two passes of the model."""
        return self.num_steps * SOLVERS[self.solver]

    def __str__(self) -> str:
        guidance = "no guidance" if self.cfg_scale is None else f"guidance {self.cfg_scale:g}"
        low, high = self.cfg_interval
        if self.cfg_scale is not None and (low > 0 or high < 1):
            guidance += f" for t in [{low:g}, {high:g}]"
        return f"{self.num_steps} {self.solver.capitalize()} step{'s' * (self.num_steps > 1)}, {guidance}"


def guided_velocity(
    model_fn: ModelFn,
    labels: Int[Array, " b"],
    num_classes: int,
    cfg_scale: float | Float[Array, ""] | None,
    cfg_interval: tuple[float, float] | None = None,
) -> VelocityFn:
    """velocity_fn with classifier-free guidance (arXiv:2207.12598): v_uncond + s (v_cond - v_uncond), all channels.

    Label `num_classes` stands for "no label"; both halves go through the model in one batch of 2b. `cfg_scale` None
    turns guidance off: the conditional velocity, at half the cost (equal to s = 1 up to rounding). So it does outside
    `cfg_interval` (first and last time with guidance, arXiv:2404.07724), if one is given; t is then one for all.
    """

    def conditional(x, t):
        return model_fn(x, t, labels)

    def guided(x, t):
        both_labels = jnp.concatenate([jnp.full_like(labels, num_classes), labels])
        v = model_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both_labels)
        v_uncond, v_cond = jnp.split(v, 2)
        return v_uncond + cfg_scale * (v_cond - v_uncond)

    if cfg_scale is None:
        return conditional
    if cfg_interval is None:
        return guided
    low, high = cfg_interval
    return lambda x, t: jax.lax.cond((low <= t[0]) & (t[0] <= high), guided, conditional, x, t)


def ode_steps(
    velocity_fn: VelocityFn,
    x: Float[Array, "b ..."],
    first: int | Int[Array, ""],
    last: int | Int[Array, ""],
    num_steps: int | Int[Array, ""],
    solver: str = "euler",
) -> Float[Array, "b ..."]:
    """x after the steps i = first .. last - 1 of `num_steps`, from t = i / num_steps to t = (i + 1) / num_steps.

    `solver`: 'euler' (order 1), or of order 2 and two velocities a step, 'midpoint' and 'heun' (the trapezoidal rule
    with an Euler predictor). All three counts may be traced, so that one compiled program serves every step count and
    every stage of a path.
    """

    def step(i, x):
        v = velocity_fn(x, jnp.full((x.shape[0],), i / num_steps, jnp.float32))
        if solver == "midpoint":
            v = velocity_fn(x + v / (2 * num_steps), jnp.full((x.shape[0],), (i + 0.5) / num_steps, jnp.float32))
        elif solver == "heun":
            end = velocity_fn(x + v / num_steps, jnp.full((x.shape[0],), (i + 1) / num_steps, jnp.float32))
            v = (v + end) / 2
        return x + v / num_steps

    return jax.lax.fori_loop(first, last, step, x)


def ode_sample(
    velocity_fn: VelocityFn, noise: Float[Array, "b ..."], num_steps: int | Int[Array, ""], solver: str = "euler"
) -> Float[Array, "b ..."]:
    """Samples: `noise` carried from t = 0 to t = 1 by `num_steps` steps."""
    return ode_steps(velocity_fn, noise, 0, num_steps, num_steps, solver)


def sample_noise(key: Key[Array, ""], indices: Int[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise (b, *shape); row j is a function of (key, indices[j]) alone."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


def sample_labels(
    key: Key[Array, ""], indices: Int[Array, " b"], counts: Int[Array, " classes"], mode: str = "uniform"
) -> Int[Array, " b"]:
    """Labels (b,) of samples by number; entry j is a function of (key, indices[j]) alone.

    `mode`: 'uniform' draws each of the classes with the same probability, 'balanced' takes them by turns, 'dataset'
    draws them as often as `counts` says; in the first two, `counts` says how many there are.
    """
    if mode == "balanced":
        return indices % len(counts)
    if mode == "uniform":
        return jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, len(counts)))(indices)
    shares = jnp.cumsum(counts) / jnp.sum(counts)
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(indices)
    return jnp.searchsorted(shares[:-1], draws, side="right").astype(jnp.int32)  # the last share is 1, if rounded
