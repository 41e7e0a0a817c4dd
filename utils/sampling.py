"""Samples from a velocity field: guidance, ODE solvers, and the noise and label of sample i.

The number of steps and the guidance scale are ordinary arguments of the compiled function: changing them compiles
nothing anew. Nothing here knows the network.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from utils.objectives.objective import ModelFn, VelocityFn

LABELS = ("uniform", "balanced", "dataset")


def guide(
    model_fn: ModelFn,
    num_classes: int,
    cfg_scale: float | Float[Array, ""] | None,
    cfg_interval: tuple[float | Float[Array, ""], float | Float[Array, ""]] | None = None,
) -> ModelFn:
    """model_fn with classifier-free guidance (arXiv:2207.12598): v_uncond + s (v_cond - v_uncond), all channels.

    Label `num_classes` means "no label"; both halves go through the network in one batch of 2b. `cfg_scale` None turns
    guidance off: the conditional prediction, at half the cost (equal to s = 1 up to rounding). So it does outside
    `cfg_interval` (first and last time with guidance, arXiv:2404.07724), if one is given; t is then one for all.
    """

    if cfg_scale is None:
        return model_fn
    scale = cfg_scale

    def guided(x, t, labels):
        both_labels = jnp.concatenate([jnp.full_like(labels, num_classes), labels])
        v = model_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both_labels)
        v_uncond, v_cond = jnp.split(v, 2)
        return v_uncond + scale * (v_cond - v_uncond)

    if cfg_interval is None:
        return guided
    low, high = cfg_interval
    return lambda x, t, labels: jax.lax.cond((low <= t[0]) & (t[0] <= high), guided, model_fn, x, t, labels)


StepFn = Callable[[VelocityFn, Float[Array, "b ..."], Float[Array, ""], Float[Array, ""]], Float[Array, "b ..."]]


def _times(t: Float[Array, ""], x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return jnp.full((x.shape[0],), t, jnp.float32)


def euler_step(
    velocity_fn: VelocityFn, x: Float[Array, "b ..."], t: Float[Array, ""], t_next: Float[Array, ""]
) -> Float[Array, "b ..."]:
    """Order 1."""
    return x + (t_next - t) * velocity_fn(x, _times(t, x), _times(t_next, x))


def heun_step(
    velocity_fn: VelocityFn, x: Float[Array, "b ..."], t: Float[Array, ""], t_next: Float[Array, ""]
) -> Float[Array, "b ..."]:
    """Order 2: the trapezoidal rule with an Euler predictor."""
    v = velocity_fn(x, _times(t, x), _times(t_next, x))
    v_end = velocity_fn(x + (t_next - t) * v, _times(t_next, x), _times(t_next, x))
    return x + (t_next - t) * (v + v_end) / 2


def midpoint_step(
    velocity_fn: VelocityFn, x: Float[Array, "b ..."], t: Float[Array, ""], t_next: Float[Array, ""]
) -> Float[Array, "b ..."]:
    """Order 2: the velocity halfway, reached by an Euler step."""
    middle = (t + t_next) / 2
    v = velocity_fn(x, _times(t, x), _times(middle, x))
    v = velocity_fn(x + (middle - t) * v, _times(middle, x), _times(t_next, x))
    return x + (t_next - t) * v


class Solver(NamedTuple):
    """One step, and the velocities it takes (NFE: number of function evaluations)."""

    step: StepFn
    nfe: int


# One more solver is one function and one line.
SOLVERS = {"euler": Solver(euler_step, 1), "heun": Solver(heun_step, 2), "midpoint": Solver(midpoint_step, 2)}


class SamplerConfig(NamedTuple):
    """How samples are drawn from a model."""

    num_steps: int
    cfg_scale: float | None  # None: no guidance
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # times, ends included, at which guidance is on
    solver: str = "euler"

    @property
    def nfe(self) -> int:
        """Velocities that a sample takes; a guided one is two passes of the network."""
        return self.num_steps * SOLVERS[self.solver].nfe

    def __str__(self) -> str:
        guidance = "no guidance" if self.cfg_scale is None else f"guidance {self.cfg_scale:g}"
        low, high = self.cfg_interval
        if self.cfg_scale is not None and (low > 0 or high < 1):
            guidance += f" for t in [{low:g}, {high:g}]"
        return f"{self.num_steps} {self.solver.capitalize()} step{'s' * (self.num_steps > 1)}, {guidance}"


def ode_steps(
    velocity_fn: VelocityFn,
    x: Float[Array, "b ..."],
    first: int | Int[Array, ""],
    last: int | Int[Array, ""],
    num_steps: int | Int[Array, ""],
    solver: str = "euler",
) -> Float[Array, "b ..."]:
    """x after the steps i = first .. last - 1 of `num_steps`, from t = i / num_steps to t = (i + 1) / num_steps.

    `solver` is a key of SOLVERS. All three counts may be traced, so that one compiled function serves every step count
    and every stage of a path.
    """
    step = SOLVERS[solver].step

    def body(i, x):
        return step(velocity_fn, x, jnp.float32(i / num_steps), jnp.float32((i + 1) / num_steps))

    return jax.lax.fori_loop(first, last, body, x)


def ode_sample(
    velocity_fn: VelocityFn, noise: Float[Array, "b ..."], num_steps: int | Int[Array, ""], solver: str = "euler"
) -> Float[Array, "b ..."]:
    """Samples: `noise` carried from t = 0 to t = 1 by `num_steps` steps."""
    return ode_steps(velocity_fn, noise, 0, num_steps, num_steps, solver)


def sample_noise(key: Key[Array, ""], indices: Int[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise (b, *shape); row j is a function of (key, indices[j]) alone."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


def sample_labels(
    key: Key[Array, ""], indices: Int[Array, " b"], counts: Num[Array, " classes"], mode: str = "uniform"
) -> Int[Array, " b"]:
    """Labels (b,) of samples by number; entry j is a function of (key, indices[j]) alone.

    `mode`: 'uniform' draws every class with the same probability, 'balanced' interleaves them, 'dataset' draws them in
    proportion to `counts`; the first two use only how many there are.
    """
    if mode == "balanced":
        return indices % len(counts)
    if mode == "uniform":
        return jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, len(counts)))(indices)
    fractions = jnp.cumsum(counts) / jnp.sum(counts)
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(indices)
    # The last fraction is 1, up to rounding.
    return jnp.searchsorted(fractions[:-1], draws, side="right").astype(jnp.int32)
