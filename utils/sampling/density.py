"""Log-densities of a velocity field, by the instantaneous change of variables (arXiv:1810.01367, arXiv:2210.02747).

log p_1(x) = log N(x_0; 0, s^2 I) - integral over t in [0, 1] of div v(x_t, t), where dx/dt = v leads backwards from x
at t = 1 to x_0 at t = 0, and s is the objective's `noise_scale`, 1 by default.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from utils.base.messages import UserError
from utils.codecs.codec import Codec
from utils.data.dataset import Batch, PixelBatch
from utils.networks.models import Network, model_fn
from utils.objectives.objective import Objective, VelocityFn, noise_scale, scale_noise
from utils.sampling.solvers import solve_adaptively

# Turns a density of x in [-1, 1] into one of grey levels, 127.5 to a unit of x.
BITS_OFFSET = math.log2(127.5)
MAX_EXACT = 3 * 32 * 32  # elements: the exact trace takes a backward pass for each


class LikelihoodConfig(NamedTuple):
    """Method and accuracy of a likelihood."""

    num_probes: int = 1  # of Hutchinson's estimate; 0: the exact trace
    num_steps: int | None = None  # of the midpoint rule; None: Dopri5
    rtol: float = 1e-5
    atol: float = 1e-5


def check_probes(num_probes: int, num_elements: int) -> None:
    """Raises UserError if the exact trace, num_probes = 0, is asked for with more elements than it is feasible for."""
    if num_probes == 0 and num_elements > MAX_EXACT:
        raise UserError(
            f"--num_probes=0: the exact trace takes a backward pass for each of {num_elements:,} elements; "
            "use --num_probes 1 or more"
        )


def describe_probes(num_probes: int) -> str:
    """Returns how the trace is found, in words."""
    return f"{num_probes} probe{'s' * (num_probes > 1)} an image" if num_probes else "the exact trace"


class LogLikelihood(NamedTuple):
    log_p: Float[Array, " b"]  # nats
    x_0: Float[Array, "b ..."]  # the noise arrived at
    nfe: Int[Array, " b"]


def divergence(
    velocity_fn: VelocityFn, x: Float[Array, "b ..."], t: Float[Array, " b"], probes: Float[Array, "p b ..."] | None
) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    """Returns (v, div v) at x, where div v is Hutchinson's estimate, the mean of e . (J^T e) over `probes` e of
    independent signs, or, without probes, the exact trace, one reverse pass for each element. The field of an example
    must not depend on the others."""
    # One forward pass serves all probes. They run one after another: memory does not grow with their number.
    v, pull = jax.vjp(lambda x: velocity_fn(x, t, t), x)
    axes = tuple(range(1, x.ndim))
    if probes is not None:
        estimates = jax.lax.map(lambda e: (pull(e)[0] * e).sum(axes), probes)
        return v, estimates.mean(axis=0)

    # Row i of J for the whole batch at once, of which the diagonal entry is taken.
    size = math.prod(x.shape[1:])

    def diagonal(i):
        basis = jnp.zeros(size).at[i].set(1).reshape(x.shape[1:])
        return pull(jnp.broadcast_to(basis, x.shape).astype(v.dtype))[0].reshape(len(x), -1)[:, i]

    return v, jax.lax.map(diagonal, jnp.arange(size)).sum(axis=0)


def log_normal(x: Float[Array, "b ..."], scale: float = 1.0) -> Float[Array, " b"]:
    """Returns log N(x; 0, scale^2 I) of each example, in nats."""
    z = scale_noise(x.reshape(len(x), -1), 1 / scale)
    return -0.5 * (z.shape[1] * math.log(2 * math.pi * scale**2) + jnp.square(z).sum(axis=1))


def midpoint_log_likelihood(
    velocity_fn: VelocityFn,
    x_1: Float[Array, "b ..."],
    probes: Float[Array, "p b ..."] | None,
    num_steps: int,
    noise_scale: float = 1.0,
) -> LogLikelihood:
    """Returns log-likelihoods by the midpoint rule in `num_steps` steps: velocity and divergence are taken halfway.

    The result is in nats; each example costs 2 `num_steps` evaluations, the divergence's passes not counted.
    """
    h = 1 / num_steps

    def at(t):
        return jnp.full(len(x_1), t, jnp.float32)

    def step(i, state):
        # From t = 1 down: `total` grows to the integral of the divergence over [0, 1].
        x, total = state
        # An Euler step of half the length reaches the middle; a whole step is taken by what is found there.
        t = 1 - i * h
        middle = x - h / 2 * velocity_fn(x, at(t), at(t))
        v, div = divergence(velocity_fn, middle, at(t - h / 2), probes)
        return x - h * v, total + h * div

    x_0, total = jax.lax.fori_loop(0, num_steps, step, (x_1, jnp.zeros(len(x_1))))
    return LogLikelihood(log_normal(x_0, noise_scale) - total, x_0, jnp.full(len(x_1), 2 * num_steps))


def adaptive_log_likelihood(
    velocity_of: Callable[[PyTree], VelocityFn],
    x_1: Float[Array, "b ..."],
    condition: PyTree,
    probes: Float[Array, "p b ..."] | None,
    *,
    rtol: float | Float[Array, ""] = 1e-5,
    atol: float | Float[Array, ""] = 1e-5,
    noise_scale: float = 1.0,
) -> LogLikelihood:
    """Returns log-likelihoods, in nats, by Dopri5: x and the integral of the divergence are under one error control,
    and each example has steps of its own."""

    def field(t, state, args):
        # A batch of one: the solver is mapped over the examples.
        condition, probes = args
        times = jnp.full((1,), t, jnp.float32)
        velocity_fn = velocity_of(jax.tree.map(lambda leaf: leaf[None], condition))
        v, div = divergence(velocity_fn, state[0][None], times, probes)
        return v[0], div[0]

    # The examples go first, as `solve_adaptively` maps over the first axis, each with a batch axis of 1.
    start = (x_1, jnp.zeros(len(x_1)))
    moved = None if probes is None else jnp.moveaxis(probes, 1, 0)[:, :, None]
    (x_0, integral), nfe = solve_adaptively(field, start, (condition, moved), 1.0, 0.0, rtol=rtol, atol=atol)
    # Backwards, the integral has the other sign.
    return LogLikelihood(log_normal(x_0, noise_scale) + integral, x_0, nfe)


def draw_probes(key: Key[Array, ""], indices: Int[Array, " b"], shape: tuple[int, ...], num_probes: int) -> Array:
    """Returns signs, +1 or -1, (num_probes, b, *shape); those of image i are a function of (key, i) alone."""

    def draw(i):
        return jax.random.rademacher(jax.random.fold_in(key, i), (num_probes, *shape), jnp.float32)

    return jnp.moveaxis(jax.vmap(draw)(indices), 1, 0)


def dequantise(
    key: Key[Array, ""], indices: Int[Array, " b"], images: UInt8[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Returns images in about [-1, 1] with uniform noise as wide as a grey level, centred on it.

    The noise of image i is a function of (key, i) alone. The density of the result bounds the likelihood of the images
    from below (Theis et al., arXiv:1511.01844).
    """
    shape = images.shape[1:]
    noise = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-0.5, maxval=0.5))(indices)
    return (images.astype(jnp.float32) + noise) / 127.5 - 1


def bits_per_dim(log_p: Float[Array, " b"], num_elements: int) -> Float[Array, " b"]:
    """Returns bits per dimension of 8-bit images, from the log density (nats) of what `dequantise` makes of them."""
    return -log_p / (math.log(2) * num_elements) + BITS_OFFSET


@partial(jax.jit, static_argnames=("network", "objective", "config", "is_pixels"))
def measure_batch(
    params: PyTree,
    codec: Codec,
    key: Key[Array, ""],
    batch: Batch,
    indices: Int[Array, " b"],
    *,
    network: Network,
    objective: Objective,
    config: LikelihoodConfig,
    is_pixels: bool,
) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
    """Returns (bits per dimension, NFE) of each image of a batch; nats per element of the latents unless `is_pixels`.

    `indices` are the images' numbers: everything random about image i is a function of (key, i) alone.
    """
    # The point whose density is asked for: dequantised pixels, or latents, whose density is not one of images.
    image_key, probe_key = jax.random.split(key)
    condition = network.condition.prepare(codec, batch.condition)
    if is_pixels:
        assert isinstance(batch, PixelBatch)
        x_1 = dequantise(image_key, indices, batch.image)
    else:
        keys = jax.vmap(partial(jax.random.fold_in, image_key))(indices)
        x_1 = batch.to_latents(codec, keys)

    # The same probes all along the path: an estimate that changes would defeat the error control.
    probes = draw_probes(probe_key, indices, x_1.shape[1:], config.num_probes) if config.num_probes else None

    def velocity_of(condition):
        return objective.velocity(model_fn(network, params), condition)

    scale = noise_scale(objective)
    if config.num_steps is None:
        tolerances = {"rtol": config.rtol, "atol": config.atol}
        found = adaptive_log_likelihood(velocity_of, x_1, condition, probes, **tolerances, noise_scale=scale)
    else:
        found = midpoint_log_likelihood(velocity_of(condition), x_1, probes, config.num_steps, scale)

    # Per element, so that sizes compare.
    num_elements = math.prod(x_1.shape[1:])
    if is_pixels:
        return bits_per_dim(found.log_p, num_elements), found.nfe
    return -found.log_p / num_elements, found.nfe
