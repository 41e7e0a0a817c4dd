"""From a trained model to images: the one way samples are made, and a model as Python calls it.

generator = load_generator("runs/demo")
images = generator.sample(labels=[3, 7], num_steps=64, cfg_scale=2.0, seed=0)  # uint8 (2, 8, 8, 1)
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num, PyTree, UInt8

from utils.base.devices import batch_sharding, gather, shard_replicated
from utils.base.errors import UserError
from utils.data.class_names import find_class
from utils.images.pixels import ImageBatch, images_from_uint8, images_to_uint8
from utils.networks.models import ImageModel, model_fn
from utils.objectives.objective import ModelFn, VelocityFn
from utils.sampling import solvers as sampling
from utils.sampling.samplers import check_sampler, guidance_scale, is_integer
from utils.sampling.solvers import (
    ADAPTIVE_SOLVERS,
    LABELS,
    ODE_SOLVERS,
    SOLVERS,
    SamplerConfig,
    adaptive_sample,
    sample_labels,
    sample_noise,
)

RECIPE_BATCH_SIZE = 128
STEPS = 2**31 - 1  # a random stream beside the samples', which fold 0, 1, 2, ... into the noise key
Labels = Sequence[int] | np.ndarray | Array
Classes = Labels | Sequence[str | int] | str | int  # labels, or names of classes


class ClassMix(NamedTuple):
    """In place of labels, for samples between two classes: velocities (1 - fraction) v(first) + fraction v(second)."""

    first: Any  # (n,) int
    second: Any  # (n,) int
    fraction: Any  # (n,) float in [0, 1]


class _Settings(NamedTuple):
    """Settings of a sampler that may change without compiling anew. Numbers are of one type each: a function compiled
    for 4 would not serve 1.5."""

    cfg_scale: float
    cfg_interval: tuple[float, float]
    time_shift: float
    rtol: float
    atol: float

    @classmethod
    def of(cls, sampler: SamplerConfig) -> "_Settings":
        low, high = sampler.cfg_interval
        numbers = (sampler.time_shift, sampler.rtol, sampler.atol)
        return cls(float(sampler.cfg_scale or 0), (float(low), float(high)), *map(float, numbers))


class _Static(NamedTuple):
    """Values that a compiled function is bound to."""

    network: Any
    objective: Any
    solver: str
    spacing: str
    is_guided: bool
    cfg_channels: int | None

    @classmethod
    def of(cls, model: ImageModel, sampler: SamplerConfig) -> "_Static":
        is_guided = sampler.cfg_scale is not None
        return cls(model.network, model.objective, sampler.solver, sampler.spacing, is_guided, sampler.cfg_channels)

    def times(self, settings: _Settings) -> sampling.TimeGrid:
        """The times of the solver's steps."""
        grid = SOLVERS[self.solver].grid
        if grid == "sde":
            return sampling.sde_time_at
        if grid == "diffusion":
            return partial(self.objective.time_at, spacing=self.spacing)
        return partial(sampling.time_at, time_shift=settings.time_shift)

    def step_keys(self, noise_key: Any, indices: Int[Array, " b"]) -> Any:
        """Keys of the samples' fresh noise; None where the solver draws none."""
        if not SOLVERS[self.solver].is_stochastic:
            return None
        return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(noise_key, STEPS)))(indices)

    def velocity(self, params: PyTree, settings: _Settings, labels: Int[Array, " b"] | ClassMix) -> VelocityFn:
        """The field with guidance, in its interval."""
        model = model_fn(self.network, params)
        if isinstance(labels, ClassMix):
            fields = (self._guided(model, settings, side) for side in (labels.first, labels.second))
            return sampling.mix(*fields, labels.fraction)
        return self._guided(model, settings, labels)

    def _guided(self, model: ModelFn, settings: _Settings, labels: Int[Array, " b"]) -> VelocityFn:
        has_variance = self.solver == "ddpm" and self.network.config.learn_sigma
        velocity = self.objective.velocity_with_variance if has_variance else self.objective.velocity
        plain = velocity(model, labels)
        if not self.is_guided:
            return plain
        guided = sampling.guide(model, self.network.config.num_classes, settings.cfg_scale, self.cfg_channels)
        return sampling.within(velocity(guided, labels), plain, *settings.cfg_interval)


@partial(jax.jit, static_argnames=("label_mode",))
def _draw_labels(key, indices, class_counts, *, label_mode):
    return sample_labels(key, indices, class_counts, label_mode)


@partial(jax.jit, static_argnames=("shape",))
def _draw_noise(key, indices, *, shape):
    return sample_noise(key, indices, shape)


@partial(jax.jit, static_argnames=("static",))
def _integrate(params, key, x, labels, settings, first, last, num_steps, *, static):
    """x after some of the steps of a fixed-step solver; before the first of them it is noise."""
    velocity_fn, times = static.velocity(params, settings, labels), static.times(settings)
    x = jnp.where(first == 0, sampling.start_path(x, num_steps, times), x)
    keys = static.step_keys(key, jnp.arange(len(x)))
    return sampling.take_steps(velocity_fn, x, first, last, num_steps, static.solver, times, keys)


@partial(jax.jit, static_argnames=("static", "latent_shape"))
def _generate(params, codec, key, indices, labels, settings, num_steps, *, static, latent_shape):
    """(images, evaluations of the velocity for each, or None) of the samples `indices`."""
    noise = sample_noise(key, indices, latent_shape)
    if static.solver in ADAPTIVE_SOLVERS:
        velocity_of = partial(static.velocity, params, settings)
        latents, nfe = adaptive_sample(velocity_of, noise, labels, rtol=settings.rtol, atol=settings.atol)
    else:
        velocity_fn, times = static.velocity(params, settings, labels), static.times(settings)
        keys = static.step_keys(key, indices)
        latents, nfe = sampling.sample(velocity_fn, noise, num_steps, static.solver, times, keys), None
    return images_to_uint8(codec.decode(latents)), nfe


def lower_sampler(model: ImageModel, params: PyTree, sampler: SamplerConfig, batch_size: int) -> jax.stages.Lowered:
    """Lowers the function that draws `batch_size` samples; for parameters (or their shapes) on the devices of the
    model's mesh, which may be only described."""
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=batch_sharding(model.mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (params, model.codec, key, rows, rows, _Settings.of(sampler), sampler.num_steps)
    return _generate.lower(*arguments, static=_Static.of(model, sampler), latent_shape=model.latent_shape)


@partial(jax.jit, static_argnames=("static",))
def _solve(params, x, labels, settings, t_start, t_end, *, static):
    velocity_of = partial(static.velocity, params, settings)
    return adaptive_sample(velocity_of, x, labels, t_start, t_end, rtol=settings.rtol, atol=settings.atol)


@partial(jax.jit, static_argnames=("static",))
def _straightness(params, noise, labels, settings, *, static):
    return sampling.straightness(static.velocity(params, settings, labels), noise)


@partial(jax.jit, static_argnames=("static",))
def _invert(params, x, labels, settings, num_steps, *, static):
    """The noise that leads to x."""
    if static.solver in ADAPTIVE_SOLVERS:
        velocity_of = partial(static.velocity, params, settings)
        return adaptive_sample(velocity_of, x, labels, 1.0, 0.0, rtol=settings.rtol, atol=settings.atol)[0]
    velocity_fn = static.velocity(params, settings, labels)
    return sampling.invert(velocity_fn, x, num_steps, static.solver, static.times(settings))


@partial(jax.jit, static_argnames=("static",))
def _inpaint(params, codec, key, images, is_hole, noise, labels, settings, num_steps, num_repeats, *, static):
    """Images whose hole (h, w) is filled; their other pixels are those of `images`."""
    encode_key, noise_key = jax.random.split(key)
    x_known = codec.encode(encode_key, images_from_uint8(images))
    # A latent is known where all of its pixels are.
    factors = (images.shape[1] // x_known.shape[1], images.shape[2] // x_known.shape[2])
    is_known = ~is_hole.reshape(x_known.shape[1], factors[0], x_known.shape[2], factors[1]).any(axis=(1, 3))[..., None]
    velocity_fn = static.velocity(params, settings, labels)
    keys = jax.vmap(partial(jax.random.fold_in, noise_key))(jnp.arange(len(images)))
    latents = sampling.inpaint(
        velocity_fn, keys, noise, x_known, is_known, num_steps, static.solver, static.times(settings), num_repeats
    )
    return jnp.where(is_hole[..., None], images_to_uint8(codec.decode(latents)), images)


@partial(jax.jit, static_argnames=("network", "objective"))
def _velocity(params, x, t, labels, *, network, objective):
    return objective.velocity(model_fn(network, params), labels)(x, t, t)


@jax.jit
def _decode(codec, latents):
    return images_to_uint8(codec.decode(latents))


@jax.jit
def _encode(codec, key, images):
    return codec.encode(key, images_from_uint8(images))


class ImageGenerator:
    """Samples of a model with parameters, sharded over the devices.

    Sample i (its noise, and its label as `label_mode` and `class_counts` say, see `sampling.sample_labels`) is a
    function of (seed, i) alone, whatever the batch size or the number of devices. Guidance scale, interval, step count
    and time shift compile nothing anew; with and without guidance are two compiled functions.

    UserError, which is a ValueError, for a sampler that the flags would refuse (see `samplers.check_sampler`), a seed
    outside of 0 .. 2^32 - 1, and labels that the model does not have.
    """

    def __init__(
        self,
        model: ImageModel,
        params: PyTree,
        *,
        seed: int = 0,
        label_mode: str = "uniform",
        class_counts: Sequence[int] | Num[np.ndarray, " classes"] | None = None,
    ):
        if label_mode not in LABELS:
            raise UserError(f"label_mode={label_mode!r}: use one of {', '.join(LABELS)}")
        self.model = model
        self.params = params
        self.noise_key, self.label_key = jax.random.split(jax.random.key(check_seed(seed)))
        self.label_mode = label_mode
        self.counts = model.drawn_classes if class_counts is None else np.asarray(class_counts, float)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.model.class_names

    # --- Many samples, in batches ---

    def generate(
        self, sampler: SamplerConfig, num_samples: int, batch_size: int, labels: Labels | None = None
    ) -> Iterator[ImageBatch]:
        """Batches of `batch_size` rows until exactly `num_samples` are made, with these labels (n,) or drawn ones."""
        self.check_sampler(sampler)
        if labels is not None and len(labels) != num_samples:
            raise ValueError(f"{len(labels)} labels for {num_samples} samples")
        for start in range(0, num_samples, batch_size):
            # The last batch is computed whole: another shape would compile.
            indices = np.arange(start, start + batch_size, dtype=np.int32)
            rows = None if labels is None else np.resize(np.asarray(labels, np.int32)[start:][:batch_size], batch_size)
            arguments, static = self._arguments(sampler, indices, rows)
            images, nfe = _generate(*arguments, **static)
            yield ImageBatch(images, arguments[4], min(batch_size, num_samples - start), nfe)

    def _arguments(
        self, sampler: SamplerConfig, indices: np.ndarray, labels: np.ndarray | None
    ) -> tuple[tuple, dict[str, Any]]:
        """(arguments, static arguments) of `_generate` for the samples `indices`."""
        placed = shard_replicated(indices, self.model.mesh)
        if labels is None:
            drawn = _draw_labels(self.label_key, placed, self.counts, label_mode=self.label_mode)
        else:
            drawn = shard_replicated(labels, self.model.mesh)
        settings = _Settings.of(sampler)
        arguments = (self.params, self.model.codec, self.noise_key, placed, drawn, settings, sampler.num_steps)
        return arguments, {"static": self._static(sampler), "latent_shape": self.model.latent_shape}

    def _static(self, sampler: SamplerConfig) -> _Static:
        return _Static.of(self.model, sampler)

    def fitting_batch_size(self, sampler: SamplerConfig, num_samples: int, free_memory: int | None) -> int:
        """A batch for devices with that many bytes free, by the compiler's analysis of one sample for each: a power of
        two times their number, no more than `num_samples` need. Where memory is not known: about the recipe's 128."""
        num_devices = self.model.mesh.size
        most = -(-num_samples // num_devices)
        if free_memory is None:
            return min(most, max(1, RECIPE_BATCH_SIZE // num_devices)) * num_devices
        sizes: Any = lower_sampler(self.model, self.params, sampler, num_devices).compile().memory_analysis()
        # A quarter is left for the Inception network, and for fragmentation.
        fitting = 0.75 * free_memory / max(1, sizes.temp_size_in_bytes)
        return min(most, 2 ** int(np.log2(max(1, fitting)))) * num_devices

    # --- A few samples, at once ---

    def sample(
        self,
        labels: Classes | None = None,
        *,
        num_samples: int | None = None,
        num_steps: int = 64,
        cfg_scale: float | None = None,
        seed: int | None = None,
        **sampler: Any,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """Images uint8 (n, h, w, c), in one batch: one for each of `labels`, or `num_samples` with drawn ones.

        Labels are numbers or names of classes. `cfg_scale` None, -1 or 1 is no guidance. `seed`: default, the
        generator's. `sampler`: further fields of SamplerConfig, such as solver="heun".
        """
        generator = self if seed is None else self.with_seed(seed)
        if labels is not None:
            labels = self.check_labels(labels)
            if num_samples not in (None, len(labels)):
                raise UserError(f"num_samples={num_samples}, but there are {len(labels)} labels; give one of the two")
            num_samples = len(labels)
        count = 1 if num_samples is None else num_samples
        if not is_integer(count, 1, 2**31 - 1):
            raise UserError(f"num_samples={count}: use a whole number, 1 or more")
        config = SamplerConfig(num_steps, cfg_scale, **sampler)
        self.check_sampler(config)
        size = -(-count // self.model.mesh.size) * self.model.mesh.size
        (batch,) = generator.generate(config._replace(cfg_scale=guidance_scale(cfg_scale)), count, size, labels)
        return batch.to_host()[0]

    def check_sampler(self, sampler: SamplerConfig) -> None:
        """Raises UserError for a sampler that the model cannot be sampled with."""
        model = self.model
        dropout, channels = model.network.config.class_dropout_prob, model.latent_shape[-1]
        check_sampler(sampler, model.objective, class_dropout_prob=dropout, num_channels=channels)

    def with_seed(self, seed: int) -> "ImageGenerator":
        return ImageGenerator(self.model, self.params, seed=seed, label_mode=self.label_mode, class_counts=self.counts)

    def check_labels(self, labels: Classes) -> Int[np.ndarray, " n"]:
        """The labels (n,) of numbers or names of classes; `num_classes`, "no label", is one of them. UserError for what
        is no class of the model."""
        no_label = self.model.network.config.num_classes
        found = []
        for label in [labels] if isinstance(labels, str) else np.atleast_1d(np.asarray(labels)).tolist():
            if isinstance(label, str):
                found.append(find_class(label, self.class_names))
            elif _is_whole(label) and (0 <= label < len(self.class_names) or label == no_label):
                found.append(int(label))
            else:
                raise UserError(f"there is no label {label}; use 0 to {len(self.class_names) - 1}, or names")
        if not found:
            raise UserError("labels is empty; give one for each image")
        return np.array(found, np.int32)

    def noise(self, indices: Sequence[int] | Int[np.ndarray, " n"]) -> Float[Array, "n h w c"]:
        """The noise, of latents, from which the samples `indices` start."""
        return _draw_noise(self.noise_key, np.asarray(indices, np.int32), shape=self.model.latent_shape)

    def labels(self, indices: Sequence[int] | Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The drawn labels of the samples `indices`."""
        drawn = _draw_labels(self.label_key, np.asarray(indices, np.int32), self.counts, label_mode=self.label_mode)
        return gather(drawn)

    def sample_latents(
        self, noise: Float[Array, "n h w c"], labels: Labels | ClassMix, sampler: SamplerConfig
    ) -> Float[Array, "n h w c"]:
        """Latents at t = 1 of the path that starts at `noise`."""
        *_, latents = self.path(noise, labels, sampler, 1)
        return latents

    def path(
        self, noise: Float[Array, "n h w c"], labels: Labels | ClassMix, sampler: SamplerConfig, num_stages: int
    ) -> Iterator[Float[Array, "n h w c"]]:
        """The latents at `num_stages` + 1 times of the path, from `noise` itself to t = 1, equally many steps apart (or
        as near as the step count allows). Row j has the fresh noise of sample j, if the solver draws any."""
        self.check_sampler(sampler)
        labels = _as_arrays(labels)
        settings, static = _Settings.of(sampler), self._static(sampler)
        yield noise
        if sampler.is_adaptive:
            for first, last in itertools.pairwise(np.linspace(0, 1, num_stages + 1).tolist()):
                noise, _ = _solve(self.params, noise, labels, settings, first, last, static=static)
                yield noise
            return
        cuts = [sampler.num_steps * i // num_stages for i in range(num_stages + 1)]
        for first, last in itertools.pairwise(cuts):
            steps = (first, last, sampler.num_steps)
            noise = _integrate(self.params, self.noise_key, noise, labels, settings, *steps, static=static)
            yield noise

    def straightness(self, num_samples: int = 64, cfg_scale: float | None = None) -> float:
        """Returns the straightness of the paths of the first samples, see `sampling.straightness`."""
        sampler = SamplerConfig(1, cfg_scale)
        noise, labels = self.noise(range(num_samples)), _as_arrays(self.labels(range(num_samples)))
        values = _straightness(self.params, noise, labels, _Settings.of(sampler), static=self._static(sampler))
        return float(gather(values).mean())

    def invert(
        self, latents: Float[Array, "n h w c"], labels: Labels | ClassMix, sampler: SamplerConfig
    ) -> Float[Array, "n h w c"]:
        """The noise from which the ODE leads to `latents`: `sample_latents` backwards, up to the solver's error.

        ValueError for a solver that is none of ODEs on times from 0 to 1.
        """
        self._check_ode(sampler, "invert")
        arguments = (self.params, latents, _as_arrays(labels), _Settings.of(sampler), sampler.num_steps)
        return _invert(*arguments, static=self._static(sampler))

    def inpaint(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        is_hole: Bool[np.ndarray, "h w"],
        labels: Labels | ClassMix,
        sampler: SamplerConfig,
        num_repeats: int = 1,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """The images with the hole filled; every other pixel as it was. Hole i starts at the noise of sample i.

        For the method, and what `num_repeats` is good for, see `sampling.inpaint`. The hole of a latent model is
        widened to whole latents. ValueError for an adaptive solver, which takes no fixed steps, and for one that is
        none of ODEs.
        """
        if sampler.is_adaptive:
            raise UserError(f"{sampler.solver} cannot inpaint: use a solver of fixed steps")
        if num_repeats < 1:
            raise UserError(f"num_repeats={num_repeats}: use 1 or more")
        self._check_ode(sampler, "inpaint")
        filled = _inpaint(
            self.params, self.model.codec, self.noise_key, images, is_hole, self.noise(range(len(images))),
            _as_arrays(labels), _Settings.of(sampler), sampler.num_steps, num_repeats, static=self._static(sampler),
        )  # fmt: skip
        return gather(filled)

    def _check_ode(self, sampler: SamplerConfig, verb: str) -> None:
        self.check_sampler(sampler)
        if not sampler.is_adaptive and sampler.solver not in ODE_SOLVERS:
            raise UserError(f"{sampler.solver} cannot {verb}: use one of {', '.join(ODE_SOLVERS)}")

    def model_fn(self, x: ArrayLike, t: Any, labels: Any) -> Float[Array, "n h w c"]:
        """The velocity, float32, without guidance, at x (n, h, w, c) on the straight path from noise (t = 0) to data
        (t = 1), times (n,) and labels (n,); whatever the network predicts."""
        t, labels = jnp.asarray(t, jnp.float32), jnp.asarray(labels, jnp.int32)
        static = {"network": self.model.network, "objective": self.model.objective}
        return _velocity(self.params, x, t, labels, **static)

    def encode(self, images: UInt8[np.ndarray | Array, "n h w c"], seed: int = 0) -> Float[Array, "n h2 w2 c2"]:
        """Latents of images; drawn from the posterior of a VAE."""
        return _encode(self.model.codec, jax.random.key(seed), images)

    def decode(self, latents: Float[Array, "n h2 w2 c2"]) -> UInt8[np.ndarray, "n h w c"]:
        """Images of latents."""
        return gather(_decode(self.model.codec, latents))


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer()


def check_seed(seed: int) -> int:
    """Returns the seed; UserError for no integer, and for one beyond 32 bits, which JAX would cut."""
    if not is_integer(seed, 0, 2**32 - 1):
        raise UserError(f"seed={seed}: use a number from 0 to {2**32 - 1}")
    return seed


def _as_arrays(labels: Labels | ClassMix) -> Array | ClassMix:
    if isinstance(labels, ClassMix):
        first, second = (jnp.asarray(side, jnp.int32) for side in (labels.first, labels.second))
        return ClassMix(first, second, jnp.asarray(labels.fraction, jnp.float32))
    return jnp.asarray(labels, jnp.int32)


def hash_params(params: PyTree) -> str:
    """The sha256 of all parameters' bytes, in the tree's order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(gather(leaf)).data)
    return digest.hexdigest()
