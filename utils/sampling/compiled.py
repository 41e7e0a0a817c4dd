"""The compiled functions of a generator: paths, or parts of them, for a network, an objective and a solver.

They are compiled for `static`; parameters, codec, conditions and the numbers of a sampler are ordinary arguments.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from utils.base.mesh import batch_sharding, shape_structs
from utils.codecs.codec import pixel_format
from utils.conditions.condition import Mixture, count_rows, take_rows
from utils.kernels.random import unroll
from utils.networks.models import ImageModel, model_fn
from utils.objectives.objective import ModelFn, VelocityFn
from utils.sampling import paths, solvers
from utils.sampling.guidance import guide, mix, within
from utils.sampling.solvers import ADAPTIVE_SOLVERS, SOLVERS, SamplerConfig, adaptive_sample, sample_noise

STEPS = 2**31 - 1  # a random stream beside the samples', which fold 0, 1, 2, ... into the noise key


class SamplerNumbers(NamedTuple):
    """Numbers of a sampler that may change without compiling anew. All are floats: a function compiled for the integer
    4 would not serve 1.5."""

    cfg_scale: float
    cfg_interval: tuple[float, float]
    time_shift: float
    rtol: float
    atol: float

    @classmethod
    def of(cls, sampler: SamplerConfig) -> "SamplerNumbers":
        low, high = sampler.cfg_interval
        numbers = (sampler.time_shift, sampler.rtol, sampler.atol)
        # Without guidance the scale is never read; a number keeps the shape of the arguments.
        return cls(float(sampler.cfg_scale or 0), (float(low), float(high)), *map(float, numbers))


class CompiledFor(NamedTuple):
    """Static arguments of the functions of this file: another value compiles them anew."""

    # All are hashable, and equal where the compiled functions are the same.
    network: Any
    objective: Any
    solver: str
    spacing: str
    is_guided: bool
    has_interval: bool  # in which guidance is on; without one, at all times
    cfg_channels: int | None

    @classmethod
    def of(cls, model: ImageModel, sampler: SamplerConfig) -> "CompiledFor":
        is_guided = sampler.cfg_scale is not None
        # Where nothing is guided, functions do not differ by the interval.
        has_interval = is_guided and sampler.has_interval
        return cls(
            network=model.network,
            objective=model.objective,
            solver=sampler.solver,
            spacing=sampler.spacing,
            is_guided=is_guided,
            has_interval=has_interval,
            cfg_channels=sampler.cfg_channels,
        )

    def times(self, settings: SamplerNumbers) -> solvers.TimeGrid:
        """Returns the times of the solver's steps."""
        # Every grid takes (step, num_steps), both of which may be traced.
        grid = SOLVERS[self.solver].grid
        if grid == "sde":
            return solvers.sde_time_at
        if grid == "objective":
            return self.objective.time_grid(self.spacing)
        return partial(solvers.time_at, time_shift=settings.time_shift)

    def step_keys(self, noise_key: Any, indices: Int[Array, " b"]) -> Any:
        """Returns the keys of the samples' fresh noise; None where the solver draws none."""
        if not SOLVERS[self.solver].is_stochastic:
            return None
        # A function of (seed, sample) alone, whatever the batch; the step is folded in by the solver.
        return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(noise_key, STEPS)))(indices)

    def velocity(self, params: PyTree, settings: SamplerNumbers, condition: PyTree) -> VelocityFn:
        """Returns the field, guided in the interval of guidance; for a mixture, the weighted mean of two fields."""
        model = model_fn(self.network, params)
        # Conditions that cannot be averaged are mixed by their velocities, at twice the cost.
        if isinstance(condition, Mixture):
            fields = (self._guided(model, settings, side) for side in (condition.first, condition.second))
            return mix(*fields, condition.fraction)
        return self._guided(model, settings, condition)

    def _guided(self, model: ModelFn, settings: SamplerNumbers, condition: PyTree) -> VelocityFn:
        # An ancestral step takes the variance that the network has learned, too.
        has_variance = self.solver == "ddpm" and self.network.config.learn_sigma
        velocity = self.objective.velocity_with_variance if has_variance else self.objective.velocity
        plain = velocity(model, condition)
        if not self.is_guided:
            return plain
        guided = velocity(guide(model, self.network.condition.null, settings.cfg_scale, self.cfg_channels), condition)
        # An interval compiles the network twice, and an adaptive solver computes both.
        return within(guided, plain, *settings.cfg_interval) if self.has_interval else guided


@jax.jit  # as one function: by themselves, its three parts compile for longer
def split_seed(seed):
    """Returns two keys, of the noise and of the conditions of a seed's samples."""
    noise_key, label_key = jax.random.split(jax.random.key(seed))
    return noise_key, label_key


@partial(jax.jit, static_argnames=("kind", "mode"))
def draw_conditions(key, indices, weights, *, kind, mode):
    """Returns the conditions (b, ...) of the samples `indices`, see `Condition.draw`."""
    return kind.draw(unroll(key), indices, mode, weights)


@jax.jit
def draw_rows(key, indices, pool):
    """Returns conditions (b, ...) for the samples `indices`, each a row of the pool (m, ...) drawn uniformly."""
    draw = jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(unroll(key), i), (), 0, count_rows(pool)))
    return take_rows(pool, draw(indices))


@partial(jax.jit, static_argnames=("shape",))
def draw_noise(key, indices, *, shape):
    """Returns the noise (b, *shape) of the samples `indices`."""
    return sample_noise(key, indices, shape)


@partial(jax.jit, static_argnames=("static",))
def integrate(params, key, x, condition, settings, first, last, num_steps, *, static):
    """Returns x after the steps first .. last - 1 of a solver of fixed steps; before step 0 it is noise."""
    # One compiled function serves every stage of a path: `first`, `last` and `num_steps` are traced.
    velocity_fn = static.velocity(params, settings, condition)
    times = static.times(settings)
    # A grid may start after t = 0, where noise is a little narrower.
    x = jnp.where(first == 0, solvers.start_path(x, num_steps, times), x)
    keys = static.step_keys(key, jnp.arange(len(x)))
    return solvers.take_steps(velocity_fn, x, first, last, num_steps, static.solver, times, keys)


@partial(jax.jit, static_argnames=("static", "latent_shape"))
def generate(params, codec, key, indices, condition, settings, num_steps, *, static, latent_shape):
    """Returns (images, evaluations of the velocity for each, None for a solver of fixed steps) of samples `indices`."""
    noise = sample_noise(key, indices, latent_shape)
    # An adaptive solver makes the field for each sample by itself, to take steps that its neighbours do not change.
    if static.solver in ADAPTIVE_SOLVERS:
        velocity_of = partial(static.velocity, params, settings)
        latents, nfe = adaptive_sample(velocity_of, noise, condition, rtol=settings.rtol, atol=settings.atol)
    else:
        velocity_fn = static.velocity(params, settings, condition)
        times = static.times(settings)
        keys = static.step_keys(key, indices)
        latents = solvers.sample(velocity_fn, noise, num_steps, static.solver, times, keys)
        nfe = None
    return pixel_format(codec).from_unit(codec.decode(latents)), nfe


def lower_sampler(model: ImageModel, params: PyTree, sampler: SamplerConfig, batch_size: int) -> jax.stages.Lowered:
    """Lowers the function that draws `batch_size` samples; for parameters (or their shapes) on the devices of the
    model's mesh, which may be only described."""
    # Shapes with shardings stand for the arguments: nothing is computed, and the mesh needs no real devices.
    sharding = batch_sharding(model.mesh)
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding)
    condition = shape_structs(jax.eval_shape(lambda: model.condition.null(batch_size)), sharding)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (params, model.codec, key, rows, condition, SamplerNumbers.of(sampler), sampler.num_steps)
    return generate.lower(*arguments, static=CompiledFor.of(model, sampler), latent_shape=model.latent_shape)


@partial(jax.jit, static_argnames=("static",))
def solve(params, x, condition, settings, t_start, t_end, *, static):
    """Returns (x carried from t_start to t_end by an adaptive solver, evaluations for each)."""
    velocity_of = partial(static.velocity, params, settings)
    return adaptive_sample(velocity_of, x, condition, t_start, t_end, rtol=settings.rtol, atol=settings.atol)


@partial(jax.jit, static_argnames=("static",))
def measure_straightness(params, noise, condition, settings, *, static):
    """Returns the straightness of the path of each noise, see `paths.straightness`."""
    return paths.straightness(static.velocity(params, settings, condition), noise)


@partial(jax.jit, static_argnames=("static",))
def find_noise(params, x, condition, settings, num_steps, *, static):
    """Returns the noise (b, ...) from which the ODE leads to the latents x."""
    # Both run from data at t = 1 to noise at t = 0.
    if static.solver in ADAPTIVE_SOLVERS:
        velocity_of = partial(static.velocity, params, settings)
        return adaptive_sample(velocity_of, x, condition, 1.0, 0.0, rtol=settings.rtol, atol=settings.atol)[0]
    velocity_fn = static.velocity(params, settings, condition)
    return paths.invert(velocity_fn, x, num_steps, static.solver, static.times(settings))


@partial(jax.jit, static_argnames=("static",))
def fill_hole(params, codec, key, images, is_hole, noise, condition, settings, num_steps, num_repeats, *, static):
    """Returns images whose hole (h, w) is filled; their other pixels are those of `images`."""
    # What is known of the latents.
    encode_key, noise_key = jax.random.split(key)
    x_known = codec.encode(encode_key, pixel_format(codec).to_unit(images))
    # A latent is known where all of its pixels are: the hole grows to whole latents.
    factors = (images.shape[1] // x_known.shape[1], images.shape[2] // x_known.shape[2])
    is_known = ~is_hole.reshape(x_known.shape[1], factors[0], x_known.shape[2], factors[1]).any(axis=(1, 3))[..., None]

    # The path, then the known pixels themselves: a codec does not give them back exactly.
    velocity_fn = static.velocity(params, settings, condition)
    keys = jax.vmap(partial(jax.random.fold_in, noise_key))(jnp.arange(len(images)))
    latents = paths.inpaint(
        velocity_fn, keys, noise, x_known, is_known, num_steps, static.solver, static.times(settings), num_repeats
    )
    return jnp.where(is_hole[..., None], pixel_format(codec).from_unit(codec.decode(latents)), images)


@partial(jax.jit, static_argnames=("network", "objective"))
def evaluate_velocity(params, x, t, condition, *, network, objective):
    """Returns the velocity at x and t, without guidance."""
    return objective.velocity(model_fn(network, params), condition)(x, t, t)


@jax.jit
def decode_images(codec, latents):
    return pixel_format(codec).from_unit(codec.decode(latents))


@jax.jit
def encode_images(codec, key, images):
    return codec.encode(key, pixel_format(codec).to_unit(images))
