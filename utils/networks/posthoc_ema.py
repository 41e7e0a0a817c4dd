"""Power-function EMAs of the parameters, and EMAs of other widths made from their snapshots afterwards.

Section 3 of EDM2 (Karras et al., arXiv:2312.02696). Update n = 1, 2, ... of a profile is e <- b e + (1 - b) theta,
b = (1 - 1 / n)^(g + 1): at step t, theta(tau) has the weight (g + 1) tau^g / t^(g + 1). It needs no warm-up and forgets
the start of the run. Its width is the standard deviation of these weights over t; g (here: gamma) follows from it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, PyTree

MAX_WIDTH = 12**-0.5  # that of gamma 0: the mean over all steps
GRID = 4096  # times over which `expected_error` averages


def gamma_of(width: float) -> float:
    """Returns gamma >= 0 of the profile of a relative width in (0, 12^-0.5]; raises ValueError for any other.

    It is the largest root of a cubic equation, width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"{width:g} is no width of an EMA; use one above 0 and up to {MAX_WIDTH:.3f}, such as 0.1")
    square = width**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def parse_width(text: str) -> str:
    """Returns a width in its one spelling, 0.1 for 0.10; raises ValueError for a text that is no width."""
    try:
        width = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no width of an EMA; use a number such as 0.1") from None
    gamma_of(width)
    return f"{width:g}"


def parse_profiles(value: Any) -> tuple[str, ...]:
    """Returns the widths of --ema_profiles as texts, ascending and each once; raises ValueError for other values."""
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError("use widths of EMAs, such as 0.05,0.1")
    return tuple(sorted({parse_width(word) for word in words if word.strip()}, key=float))


def parse_params(text: str) -> str:
    """Returns --params in its one spelling: ema, raw, or ema:WIDTH; raises ValueError for anything else."""
    kind, colon, width = text.partition(":")
    if colon and kind == "ema":
        return f"ema:{parse_width(width)}"
    if text not in ("ema", "raw"):
        raise ValueError("use ema, raw, or ema:WIDTH, such as ema:0.1")
    return text


def width_of(params: str) -> float | None:
    """Returns the width of --params=ema:WIDTH; None for ema, which is the recipe's EMA, and for raw."""
    _, _, width = params.partition(":")
    return float(width) if width else None


# --- In training ---


def update_profiles(profiles: dict[str, PyTree], params: PyTree, step: int | Int[Array, ""]) -> dict[str, PyTree]:
    """Returns {width: EMA} after step number `step` (1, 2, ...), whose result is `params`."""

    def update(width: str, ema: PyTree) -> PyTree:
        # 1 - b, not b, which float32 would round to a multiple of 6e-8: at step 1e6, 1 - b is 2e-5. At step 1 it is 1.
        rate = -jnp.expm1((gamma_of(float(width)) + 1) * jnp.log1p(-1 / step))
        return jax.tree.map(lambda old, new: old + rate.astype(old.dtype) * (new - old), ema, params)

    return {width: update(width, ema) for width, ema in profiles.items()}


# --- Afterwards ---


Numbers = float | np.ndarray


def inner_product(t_a: Numbers, g_a: Numbers, t_b: Numbers, g_b: Numbers) -> Numbers:
    """Returns the integral of the product of two profiles that end at steps t and have gammas g; arrays broadcast."""
    first = np.minimum(t_a, t_b)
    ratio = (g_a + 1) * (g_b + 1) / (g_a + g_b + 1)
    return ratio * (first / t_a) ** g_a * (first / t_b) ** g_b * first / (t_a * t_b)


def fit_weights(
    steps: Float64[np.ndarray, " n"], gammas: Float64[np.ndarray, " n"], step: float, gamma: float
) -> Float64[np.ndarray, " n"]:
    """Returns the weights with which the profiles of n snapshots (steps, gammas) add up to the profile (step, gamma),
    by least squares."""
    gram = inner_product(steps[:, None], gammas[:, None], steps, gammas)
    return np.linalg.solve(gram, inner_product(steps, gammas, step, gamma))


def fit_average(
    steps: Float64[np.ndarray, " n"], gammas: Float64[np.ndarray, " n"], step: float, gamma: float
) -> Float64[np.ndarray, " n"]:
    """Returns the weights of `fit_weights` under the constraint that they sum to 1.

    Without it, a parameter that does not change would be scaled: by 0.997 at width 0.2 with 16 snapshots.
    """
    weights = fit_weights(steps, gammas, step, gamma)
    gram = inner_product(steps[:, None], gammas[:, None], steps, gammas)
    direction = np.linalg.solve(gram, np.ones(len(steps)))  # of the constraint's Lagrange multiplier
    return weights + direction * (1 - weights.sum()) / direction.sum()


def expected_error(
    steps: Float64[np.ndarray, " n"],
    gammas: Float64[np.ndarray, " n"],
    weights: Float64[np.ndarray, " n"],
    step: float,
    gamma: float,
) -> float:
    """Returns the relative error of a reconstruction, for parameters that walk at random: its distance from the EMA of
    (step, gamma), over that EMA's distance from the last parameters.

    A step of the walk at time tau moves the last parameters away from an EMA by the part of its profile before tau.
    """
    times = (np.arange(GRID) + 0.5) / GRID * step

    def before(end: float, gamma: float) -> np.ndarray:  # the part of a profile up to each time
        return np.minimum(times / end, 1) ** (gamma + 1)

    wanted = before(step, gamma)
    found = sum(weight * before(*profile) for weight, *profile in zip(weights, steps, gammas, strict=True))
    return math.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
