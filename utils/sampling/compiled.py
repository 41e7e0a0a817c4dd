"""The compiled functions of a generator: paths, or parts of them, for a network, an objective and a solver.

They are compiled for `static`; parameters, codec, conditions and the numbers of a sampler are ordinary arguments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from utils.base.mesh import batch_sharding, shape_structs
from utils.codecs.codec import pixel_format
from utils.conditions.condition import Mixture, count_rows, take_rows
from utils.kernels.random import unroll
from utils.networks.models import ImageModel, model_fn
from utils.objectives.objective import ModelFn, VelocityFn, ends_with_euler, noise_scale, scale_noise
from utils.sampling import paths, solvers
from utils.sampling.guidance import guide, guide_by_inner, guide_by_model, mix, within
from utils.sampling.solvers import ADAPTIVE_SOLVERS, SOLVERS, SamplerConfig, adaptive_sample, is_always, sample_noise

STEPS = 2**31 - 1  # a random stream beside the samples', which fold 0, 1, 2, ... into the noise key


class SamplerNumbers(NamedTuple):
    """Numbers of a sampler that may change without compiling anew. All are floats: a function compiled for the integer
    4 would not serve 1.5."""

    cfg_scale: float
    cfg_interval: tuple[float, float]
    inner_scale: float
    inner_interval: tuple[float, float]
    guide_scale: float
    guide_interval: tuple[float, float]
    cfg_zero_steps: int
    time_shift: float
    rtol: float
    atol: float

    @classmethod
    def of(cls, sampler: SamplerConfig) -> "SamplerNumbers":
        # Without guidance a scale is never read; a number keeps the shape of the arguments.
        values: dict[str, Any] = {name: getattr(sampler, name) or 0 for name in cls._fields}
        for name, value in values.items():
            if name != "cfg_zero_steps":
                values[name] = tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)
        return cls(**values)


class Guide(NamedTuple):
    """A guiding model as a static argument of the compiled functions; its parameters are an ordinary argument."""

    network: Any
    objective: Any

    def field(self, params: PyTree) -> ModelFn:
        return field_of(self.objective.velocity, model_fn(self.network, params))


def field_of(velocity: Callable[[ModelFn, PyTree], VelocityFn], model: ModelFn) -> ModelFn:
    """Returns the velocity as a function of (x, t, condition, t_next): guidance calls it with and without condition."""
    return lambda x, t, condition, t_next: velocity(model, condition)(x, t, t_next)


class Parameters(NamedTuple):
    """Parameters of a model that is guided by another, and those of its guide."""

    model: PyTree
    guide: PyTree


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
    is_zero_star: bool
    is_inner_guided: bool
    guide: Guide | None
    guide_has_interval: bool

    @classmethod
    def of(cls, model: ImageModel, sampler: SamplerConfig, guide: Guide | None = None) -> "CompiledFor":
        # Where nothing is guided, functions do not differ by the interval.
        is_guided = sampler.cfg_scale is not None
        guide = guide if sampler.is_model_guided else None
        is_cut = sampler.solver == "heun" and ends_with_euler(model.objective)
        return cls(
            network=model.network,
            objective=model.objective,
            solver="heun_euler" if is_cut else sampler.solver,
            spacing=sampler.spacing,
            is_guided=is_guided,
            has_interval=is_guided and not is_always(sampler.cfg_interval),
            cfg_channels=sampler.cfg_channels,
            is_zero_star=is_guided and sampler.cfg_zero_star,
            is_inner_guided=sampler.is_inner_guided,
            guide=guide,
            guide_has_interval=guide is not None and not is_always(sampler.guide_interval),
        )

    @property
    def noise_scale(self) -> float:
        """The deviation of the noise x_0."""
        return noise_scale(self.objective)

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
        field = self._guided(params, settings)

        def velocity_of(condition):
            return lambda x, t, t_next: field(x, t, condition, t_next)

        # Conditions that cannot be averaged are mixed by their velocities, at twice the cost.
        if isinstance(condition, Mixture):
            return mix(velocity_of(condition.first), velocity_of(condition.second), condition.fraction)
        return velocity_of(condition)

    def _guided(self, params: PyTree, settings: SamplerNumbers) -> ModelFn:
        """Returns the field (x, t, condition, t_next) -> velocity, guided by the model's inner head, then by another
        model, and last by the condition. The first two apply with the condition as well as without it."""
        if self.guide is None:
            field = self._own_field(params, settings)
        else:
            own = self._own_field(params.model, settings)
            field = guide_by_model(own, self.guide.field(params.guide), settings.guide_scale)
            if self.guide_has_interval:
                field = within(field, own, *settings.guide_interval)
        if not self.is_guided:
            return field

        # By the condition. An interval compiles the network twice, and an adaptive solver computes both.
        scale = settings.cfg_scale
        guided = guide(field, self.network.condition.null, scale, self.cfg_channels, self.is_zero_star)
        return within(guided, field, *settings.cfg_interval) if self.has_interval else guided

    def _own_field(self, params: PyTree, settings: SamplerNumbers) -> ModelFn:
        """Returns the field of the model, guided by its inner head."""
        # An ancestral step takes the variance that the network has learned, too.
        has_variance = self.solver == "ddpm" and self.network.config.learn_sigma
        velocity = self.objective.velocity_with_variance if has_variance else self.objective.velocity
        model = model_fn(self.network, params, with_inner=self.is_inner_guided)
        if not self.is_inner_guided:
            return field_of(velocity, model)

        def field(x, t, condition, t_next):
            low, high = settings.inner_interval
            scales = jnp.where((low <= t) & (t <= high), settings.inner_scale, 1.0)
            return velocity(guide_by_inner(model, scales), condition)(x, t, t_next)

        return field

    def count_passes(self, sampler: SamplerConfig, guide_cost: float, nfe: float | None = None) -> float:
        """Returns the number of passes of the network that a sample takes; a pass of the guide counts as `guide_cost`.

        `nfe` is the number of velocities that an adaptive solver has taken; None for a solver of fixed steps.
        """
        guide_cost = guide_cost if self.guide else 0.0
        if nfe is not None:
            # Each sample has times of its own, so that both branches of an interval are computed.
            return nfe * (1 + self.is_guided + self.has_interval) * (1 + guide_cost + self.guide_has_interval)

        # The times at which velocities are taken.
        grid = self.times(SamplerNumbers.of(sampler))
        steps = jnp.arange(sampler.cfg_zero_steps, sampler.num_steps + 1)
        times = np.asarray(jax.vmap(lambda step: grid(step, sampler.num_steps))(steps))
        ways = np.diff(times)
        taken = np.concatenate([times[:-1] + fraction * ways for fraction in SOLVERS[self.solver].fractions])

        def is_on(interval):
            low, high = np.asarray(interval, np.float32)
            return (low <= taken) & (taken <= high)

        # With and without the condition, and in each of these branches the model and its guide.
        branches = 1 + self.is_guided * is_on(sampler.cfg_interval)
        return float((branches * (1 + guide_cost * is_on(sampler.guide_interval))).sum())

    def first_step(self, settings: SamplerNumbers) -> int | Array:
        """Returns the first step that is taken: those before it leave x as it is (CFG-Zero*)."""
        return settings.cfg_zero_steps if self.is_zero_star else 0


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
    """Returns x after the steps first .. last - 1 of a solver of fixed steps; before step 0 it is x_0."""
    # One compiled function serves every stage of a path: `first`, `last` and `num_steps` are traced.
    velocity_fn = static.velocity(params, settings, condition)
    times = static.times(settings)
    # A grid may start after t = 0, where noise is a little narrower.
    x = jnp.where(first == 0, solvers.start_path(x, num_steps, times), x)
    first = jnp.maximum(first, static.first_step(settings)) if static.is_zero_star else first
    keys = static.step_keys(key, jnp.arange(len(x)))
    return solvers.take_steps(velocity_fn, x, first, last, num_steps, static.solver, times, keys, static.noise_scale)


@partial(jax.jit, static_argnames=("static", "latent_shape"))
def generate(params, codec, key, indices, condition, settings, num_steps, *, static, latent_shape):
    """Returns (images, evaluations of the velocity for each, None for a solver of fixed steps) of samples `indices`."""
    noise = sample_noise(key, indices, latent_shape)
    # An adaptive solver makes the field for each sample by itself, to take steps that its neighbours do not change.
    if static.solver in ADAPTIVE_SOLVERS:
        velocity_of = partial(static.velocity, params, settings)
        x_0 = scale_noise(noise, static.noise_scale)
        latents, nfe = adaptive_sample(velocity_of, x_0, condition, rtol=settings.rtol, atol=settings.atol)
    else:
        velocity_fn = static.velocity(params, settings, condition)
        times = static.times(settings)
        keys = static.step_keys(key, indices)
        first = static.first_step(settings)
        scale = static.noise_scale
        latents = solvers.sample(velocity_fn, noise, num_steps, static.solver, times, keys, first, scale)
        nfe = None
    return pixel_format(codec).from_unit(codec.decode(latents)), nfe


def lower_sampler(
    model: ImageModel, params: PyTree, sampler: SamplerConfig, batch_size: int, guide: Guide | None = None
) -> jax.stages.Lowered:
    """Lowers the function that draws `batch_size` samples; for parameters (or their shapes) on the devices of the
    model's mesh, which may be only described. `params` are `Parameters` where the sampler needs those of a guide."""
    # Shapes with shardings stand for the arguments: nothing is computed, and the mesh needs no real devices.
    sharding = batch_sharding(model.mesh)
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding)
    condition = shape_structs(jax.eval_shape(lambda: model.condition.null(batch_size)), sharding)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (params, model.codec, key, rows, condition, SamplerNumbers.of(sampler), sampler.num_steps)
    static = CompiledFor.of(model, sampler, guide)
    return generate.lower(*arguments, static=static, latent_shape=model.latent_shape)


@partial(jax.jit, static_argnames=("static",))
def solve(params, x, condition, settings, t_start, t_end, *, static):
    """Returns (x carried from t_start to t_end by an adaptive solver, evaluations for each)."""
    velocity_of = partial(static.velocity, params, settings)
    return adaptive_sample(velocity_of, x, condition, t_start, t_end, rtol=settings.rtol, atol=settings.atol)


@partial(jax.jit, static_argnames=("static",))
def measure_straightness(params, noise, condition, settings, *, static):
    """Returns the straightness of the path of each noise, see `paths.straightness`."""
    velocity_fn = static.velocity(params, settings, condition)
    return paths.straightness(velocity_fn, scale_noise(noise, static.noise_scale))


@partial(jax.jit, static_argnames=("static",))
def find_noise(params, x, condition, settings, num_steps, *, static):
    """Returns the standard normal noise (b, ...) from which the ODE leads to the latents x."""
    # Both run from data at t = 1 to noise at t = 0.
    if static.solver in ADAPTIVE_SOLVERS:
        velocity_of = partial(static.velocity, params, settings)
        x_0, _ = adaptive_sample(velocity_of, x, condition, 1.0, 0.0, rtol=settings.rtol, atol=settings.atol)
    else:
        velocity_fn = static.velocity(params, settings, condition)
        x_0 = paths.invert(velocity_fn, x, num_steps, static.solver, static.times(settings))
    return scale_noise(x_0, 1 / static.noise_scale)


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
        velocity_fn,
        keys,
        noise,
        x_known,
        is_known,
        num_steps,
        static.solver,
        static.times(settings),
        num_repeats,
        static.noise_scale,
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
