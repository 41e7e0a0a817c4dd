"""Draws images from a trained model: the one way in which samples are made, for programs and for Python.

generator = load_generator("runs/demo")
images = generator.sample(labels=[3, 7], num_steps=64, cfg_scale=2.0, seed=0)  # uint8 (2, 8, 8, 1)
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num, PyTree, UInt8

from utils.base.bars import Bar
from utils.base.mesh import gather, shard_replicated
from utils.base.messages import UserError, progress_bar
from utils.codecs.codec import pixel_format
from utils.conditions.condition import Condition, Mixture, check_draw_mode, count_rows, resize_rows
from utils.images.pixels import ImageBatch, Images
from utils.networks.models import ImageModel
from utils.objectives.objective import noise_scale, scale_noise
from utils.sampling import compiled
from utils.sampling.compiled import CompiledFor, Guide, Parameters, SamplerNumbers, lower_sampler
from utils.sampling.samplers import can_guide, check_sampler, explain_no_guidance, guidance_scale, is_integer
from utils.sampling.solvers import ODE_SOLVERS, SamplerConfig

RECIPE_BATCH_SIZE = 128  # on all devices together, where the free memory is not known
Labels = Sequence[str | int] | np.ndarray | str | int  # labels, or names of classes


class ImageGenerator:
    """Draws samples from a model with parameters, sharded over the devices.

    Sample i (its noise, and its condition, drawn as `label_mode` and `class_counts` say: see `Condition.draw`) is a
    function of (seed, i) alone, whatever the batch size or the number of devices. Guidance scale, times of an interval,
    step count and time shift compile nothing anew; without guidance, with it, and with it in an interval are three
    compiled functions.

    `guide` generates by a smaller or less trained model, which guides this one where a sampler's `guide_scale` is not 1
    (autoguidance, arXiv:2406.02507).

    Raises UserError (a ValueError) for a sampler that the flags would refuse (see `samplers.check_sampler`), a seed
    outside of 0 .. 2^32 - 1, and conditions that the model does not take.
    """

    def __init__(
        self,
        model: ImageModel,
        params: PyTree,
        *,
        seed: int = 0,
        label_mode: str = "uniform",
        class_counts: Sequence[int] | Num[np.ndarray, " classes"] | None = None,
        guide: "ImageGenerator | None" = None,
    ):
        check_draw_mode(model.condition, label_mode)
        self.model = model
        self.params = params
        # Separate keys: the noise of a sample stays the same when its label is given instead of drawn.
        self.noise_key, self.label_key = compiled.split_seed(np.uint32(check_seed(seed)))
        self.label_mode = label_mode
        self.counts = None if class_counts is None else np.asarray(class_counts, float)
        self.guide = guide
        if guide is not None:
            check_guide(model, guide.model)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order; none for another kind of condition."""
        return getattr(self.condition, "class_names", ())

    @property
    def condition(self) -> Condition:
        """The kind of condition that the model takes."""
        return self.model.condition

    # --- Many samples, in batches ---

    def generate(
        self,
        sampler: SamplerConfig,
        num_samples: int,
        batch_size: int,
        conditions: PyTree | None = None,
        bar: Bar | None = None,
    ) -> Iterator[ImageBatch]:
        """Yields batches of `batch_size` rows until exactly `num_samples` are made, with these conditions (n, ...) or
        drawn ones. A `bar` of samples is moved by each batch. Raises ValueError for another number of
        conditions."""
        self.check_sampler(sampler)
        if conditions is not None:
            # On the host, where a batch is a slice and costs no compilation.
            conditions = jax.tree.map(np.asarray, conditions, is_leaf=lambda rows: isinstance(rows, list))
            if count_rows(conditions) != num_samples:
                raise ValueError(f"{count_rows(conditions)} conditions for {num_samples} samples")
        for start in range(0, num_samples, batch_size):
            # The last batch is computed whole: another shape would compile.
            indices = np.arange(start, start + batch_size, dtype=np.int32)
            rows = None
            if conditions is not None:
                given = jax.tree.map(lambda leaf, start=start: leaf[start:][:batch_size], conditions)
                rows = resize_rows(given, batch_size)

            # Dispatched, not waited for: the caller can prepare the next batch while this one is computed.
            given, arguments, static = self._arguments(sampler, indices, rows)
            images, nfe = compiled.generate(*arguments, **static)
            count = min(batch_size, num_samples - start)
            yield ImageBatch(images, given, count, nfe)
            if bar is not None:
                bar.update(count)

    def _arguments(
        self, sampler: SamplerConfig, indices: np.ndarray, conditions: PyTree | None
    ) -> tuple[PyTree, tuple, dict[str, Any]]:
        """Returns (conditions, arguments, static arguments of `compiled.generate`) for the samples `indices`."""
        # Rows are split over the devices, and the computation follows them.
        placed = shard_replicated(indices, self.model.mesh)
        if conditions is None:
            drawn = self._draw(placed)
        else:
            drawn = jax.tree.map(partial(shard_replicated, mesh=self.model.mesh), conditions)

        # Numbers are arguments, the rest of the sampler is what the function is compiled for.
        settings = SamplerNumbers.of(sampler)
        prepared = self._prepare(drawn)
        params = self._params(sampler)
        arguments = (params, self.model.codec, self.noise_key, placed, prepared, settings, sampler.num_steps)
        return drawn, arguments, {"static": self._static(sampler), "latent_shape": self.model.latent_shape}

    @property
    def _guide(self) -> Guide | None:
        return None if self.guide is None else Guide(self.guide.model.network, self.guide.model.objective)

    def _static(self, sampler: SamplerConfig) -> CompiledFor:
        return CompiledFor.of(self.model, sampler, self._guide)

    def _params(self, sampler: SamplerConfig) -> PyTree:
        # A guide that is not used is no argument.
        if self.guide is None or not sampler.is_model_guided:
            return self.params
        return Parameters(self.params, self.guide.params)

    def count_passes(self, sampler: SamplerConfig, nfe: float | None = None) -> float:
        """Returns the number of passes of the network that a sample takes: two for a velocity with classifier-free
        guidance; a pass of the guide counts by its share of the model's FLOPs. `nfe` is the number of velocities that
        an adaptive solver has taken."""
        cost = 0.0
        if self.guide is not None:
            shape = self.model.latent_shape
            cost = self.guide.model.network.count_flops(shape) / self.model.network.count_flops(shape)
        return self._static(sampler).count_passes(sampler, cost, nfe)

    def fitting_batch_size(self, sampler: SamplerConfig, num_samples: int, free_memory: int | None) -> int:
        """Returns the batch size for devices with `free_memory` bytes free each, None where that is not known.

        By the compiler's analysis of one sample for each device it is a power of two times their number, and no more
        than `num_samples` need. Where memory is not known: about the recipe's 128.
        """
        num_devices = self.model.mesh.size
        most = -(-num_samples // num_devices)
        if free_memory is None:
            return min(most, max(1, RECIPE_BATCH_SIZE // num_devices)) * num_devices

        # Temporary memory grows with the samples on a device; one is enough to measure it.
        lowered = lower_sampler(self.model, self._params(sampler), sampler, num_devices, self._guide)
        sizes: Any = lowered.compile().memory_analysis()
        # A quarter is left for the Inception network, and for fragmentation.
        fitting = 0.75 * free_memory / max(1, sizes.temp_size_in_bytes)
        return min(most, 2 ** int(np.log2(max(1, fitting)))) * num_devices

    # --- A few samples, at once ---

    def sample(
        self,
        labels: Labels | None = None,
        *,
        conditions: Any = None,
        num_samples: int | None = None,
        num_steps: int = 64,
        cfg_scale: float | None = None,
        seed: int | None = None,
        is_shown: bool = False,
        **sampler: Any,
    ) -> Images:
        """Returns images (n, h, w, c), drawn in one batch: one for each of `labels`, or `num_samples` with drawn ones.

        They have the format of the data: uint8, or float32 in the recorded range.

        Labels are numbers or names of classes; a model of another kind of condition takes `conditions` (n, ...) in
        their place, see `Condition.check`. `cfg_scale` None, -1 or 1 is no guidance. `seed`: default, the
        generator's. `is_shown`: with a progress bar. `sampler`: further fields of SamplerConfig, such as solver="heun".
        """
        # The conditions: given ones say how many samples there are.
        generator = self if seed is None else self.with_seed(seed)
        if labels is not None and conditions is not None:
            raise UserError("labels and conditions: give one of the two")
        given = labels if conditions is None else conditions
        if given is not None:
            given = self.condition.check(given)
            number = count_rows(given)
            if num_samples not in (None, number):
                raise UserError(f"num_samples={num_samples}, but there are {number} labels; give one of the two")
            num_samples = number

        # Everything is checked before anything is compiled.
        count = 1 if num_samples is None else num_samples
        if not is_integer(count, 1, 2**31 - 1):
            raise UserError(f"num_samples={count}: use a whole number, 1 or more")
        config = SamplerConfig(num_steps, cfg_scale, **sampler)
        self.check_sampler(config)

        # A whole number of rows for each device; those beyond `count` are cut off on the host.
        size = -(-count // self.model.mesh.size) * self.model.mesh.size
        config = config._replace(cfg_scale=guidance_scale(cfg_scale))
        with progress_bar(total=count, desc=str(config), unit="image") if is_shown else nullcontext() as bar:
            (images,) = (batch.to_host()[0] for batch in generator.generate(config, count, size, given, bar))
        return images

    def check_sampler(self, sampler: SamplerConfig) -> None:
        """Raises UserError for a sampler that the model cannot be sampled with."""
        model = self.model
        dropout = model.network.config.class_dropout_prob
        channels = model.latent_shape[-1]
        check_sampler(
            sampler,
            model.objective,
            class_dropout_prob=dropout,
            num_channels=channels,
            inner_head=model.network.config.inner_head,
            has_guide=self.guide is not None,
        )
        # Guidance by labels asks the guide for "no condition", too.
        if self.guide is not None and sampler.is_model_guided and guidance_scale(sampler.cfg_scale) is not None:
            dropout = self.guide.model.network.config.class_dropout_prob
            if not can_guide(dropout):
                raise UserError(f"--guide: {explain_no_guidance(dropout)}; use --cfg_scale 1, or another guide")

    def with_seed(self, seed: int) -> "ImageGenerator":
        # Nothing is copied: the parameters are shared, and compiled functions too.
        options = {"label_mode": self.label_mode, "class_counts": self.counts, "guide": self.guide}
        return ImageGenerator(self.model, self.params, seed=seed, **options)

    def noise(self, indices: Sequence[int] | Int[np.ndarray, " n"]) -> Float[Array, "n h w c"]:
        """Returns the standard normal noise, of latents, from which the samples `indices` start."""
        return compiled.draw_noise(self.noise_key, np.asarray(indices, np.int32), shape=self.model.latent_shape)

    def conditions(self, indices: Sequence[int] | Int[np.ndarray, " n"]) -> PyTree:
        """Returns the drawn conditions of the samples `indices`, on the host: of classes, labels (n,)."""
        return jax.tree.map(gather, self._draw(np.asarray(indices, np.int32)))

    def _draw(self, indices: Any) -> PyTree:
        if self.model.pool is not None:
            return compiled.draw_rows(self.label_key, indices, self.model.pool)
        if self.condition.DRAWS_ROWS:
            raise UserError(
                "the run has no conditions.npz, from which conditions are drawn: give conditions, or copy that of the "
                "run it was exported from into its folder"
            )
        return compiled.draw_conditions(self.label_key, indices, self.counts, kind=self.condition, mode=self.label_mode)

    def sample_latents(
        self, noise: Float[Array, "n h w c"], condition: PyTree, sampler: SamplerConfig
    ) -> Float[Array, "n h w c"]:
        """Returns the latents at t = 1 of the path that starts at `noise`, standard normal."""
        *_, latents = self.path(noise, condition, sampler, 1)
        return latents

    def path(
        self, noise: Float[Array, "n h w c"], condition: PyTree, sampler: SamplerConfig, num_stages: int
    ) -> Iterator[Float[Array, "n h w c"]]:
        """Yields the latents at `num_stages` + 1 times of the path, from x_0 to t = 1.

        x_0 is `noise`, standard normal, times the objective's `noise_scale`. The stages are equally many steps apart,
        or as near as the step count allows. Row j has the fresh noise of sample j, if the solver draws any.
        """
        self.check_sampler(sampler)
        condition = self._prepare(condition)
        settings = SamplerNumbers.of(sampler)
        params = self._params(sampler)
        static = self._static(sampler)
        x = scale_noise(noise, static.noise_scale)
        yield x

        # An adaptive solver has no steps to count: its stages are equal times.
        if sampler.is_adaptive:
            for first, last in itertools.pairwise(np.linspace(0, 1, num_stages + 1).tolist()):
                x, _ = compiled.solve(params, x, condition, settings, first, last, static=static)
                yield x
            return

        # Fixed steps are the same as in one run from start to end: the cuts fall between them.
        cuts = [sampler.num_steps * i // num_stages for i in range(num_stages + 1)]
        # Counts are traced: one function serves all stages.
        for first, last in itertools.pairwise(cuts):
            steps = (first, last, sampler.num_steps)
            x = compiled.integrate(params, self.noise_key, x, condition, settings, *steps, static=static)
            yield x

    def straightness(self, num_samples: int = 64, cfg_scale: float | None = None, **guidance: Any) -> float:
        """Returns the mean straightness of the paths of the first samples, see `paths.straightness`. `guidance` takes
        further fields of a SamplerConfig (solvers.GUIDANCE)."""
        # The number of steps is that of `paths.straightness`; only the guidance of the sampler counts.
        sampler = SamplerConfig(1, cfg_scale, **guidance)
        noise = self.noise(range(num_samples))
        condition = self._prepare(self.conditions(range(num_samples)))
        arguments = (self._params(sampler), noise, condition, SamplerNumbers.of(sampler))
        values = compiled.measure_straightness(*arguments, static=self._static(sampler))
        return float(gather(values).mean())

    def invert(
        self, latents: Float[Array, "n h w c"], condition: PyTree, sampler: SamplerConfig
    ) -> Float[Array, "n h w c"]:
        """Returns the standard normal noise from which the ODE leads to `latents`, up to the solver's error.

        Raises UserError for a solver that adds noise, and for one whose times do not go from 0 to 1.
        """
        # Noise that a solver adds could not be taken back.
        self._check_ode(sampler, "invert")
        settings = SamplerNumbers.of(sampler)
        arguments = (self._params(sampler), latents, self._prepare(condition), settings, sampler.num_steps)
        return compiled.find_noise(*arguments, static=self._static(sampler))

    def inpaint(
        self,
        images: Images,
        is_hole: Bool[np.ndarray, "h w"],
        condition: PyTree,
        sampler: SamplerConfig,
        num_repeats: int = 1,
    ) -> Images:
        """Returns the images with the hole filled and no other pixel changed. Hole i starts at the noise of sample i.

        `paths.inpaint` explains the method and `num_repeats`. For a latent model, the hole is widened to whole latents
        while it is filled. Raises UserError for an adaptive solver, which takes no fixed steps, and for one that adds
        noise.
        """
        # Known elements are put back after each step, at a time that all samples must share.
        if sampler.is_adaptive:
            raise UserError(f"{sampler.solver} cannot inpaint: use a solver of fixed steps")
        if num_repeats < 1:
            raise UserError(f"num_repeats={num_repeats}: use 1 or more")
        self._check_ode(sampler, "inpaint")
        noise = self.noise(range(len(images)))
        condition = self._prepare(condition)
        arguments = (images, is_hole, noise, condition, SamplerNumbers.of(sampler), sampler.num_steps, num_repeats)
        filled = compiled.fill_hole(
            self._params(sampler), self.model.codec, self.noise_key, *arguments, static=self._static(sampler)
        )
        return gather(filled)

    def _check_ode(self, sampler: SamplerConfig, verb: str) -> None:
        self.check_sampler(sampler)
        if not sampler.is_adaptive and sampler.solver not in ODE_SOLVERS:
            raise UserError(f"{sampler.solver} cannot {verb}: use one of {', '.join(ODE_SOLVERS)}")
        if sampler.cfg_zero_steps:
            raise UserError(f"cfg_zero_steps={sampler.cfg_zero_steps}: steps that are left out cannot {verb}; use 0")

    def model_fn(self, x: ArrayLike, t: Any, condition: Any) -> Float[Array, "n h w c"]:
        """Returns the velocity, float32, without guidance, at x (n, h, w, c), times t (n,) and conditions (n, ...).

        x is on the straight path from noise (t = 0) to data (t = 1), whatever the network itself predicts.
        """
        t = jnp.asarray(t, jnp.float32)
        static = {"network": self.model.network, "objective": self.model.objective}
        return compiled.evaluate_velocity(self.params, x, t, self._prepare(condition), **static)

    def _prepare(self, condition: PyTree) -> PyTree:
        """Returns conditions (n, ...) as the network takes them, JAX arrays."""
        # A mixture is not of the kind itself, but both of its sides are.
        if isinstance(condition, Mixture):
            first = self._prepare(condition.first)
            second = self._prepare(condition.second)
            return Mixture(first, second, jnp.asarray(condition.fraction, jnp.float32))
        return self.condition.prepare(self.model.codec, condition)

    def encode(self, images: Images, seed: int = 0) -> Float[Array, "n h2 w2 c2"]:
        """Returns latents of images; those of a VAE are drawn from its posterior by `seed`."""
        return compiled.encode_images(self.model.codec, jax.random.key(seed), images)

    def decode(self, latents: Float[Array, "n h2 w2 c2"]) -> Images:
        """Returns images of latents, in the format of the data."""
        return gather(compiled.decode_images(self.model.codec, latents))

    def to_pictures(self, images: Images) -> UInt8[np.ndarray, "*n h w c"]:
        """Returns images as figures show them: uint8, whatever the format of the data."""
        return np.asarray(pixel_format(self.model.codec).to_uint8(images))


def check_guide(model: ImageModel, guide: ImageModel) -> None:
    """Raises UserError for a guide whose latents, condition, codec or scale of the noise are not those of the model."""
    if guide.latent_shape != model.latent_shape:
        shapes = ["x".join(map(str, each.latent_shape)) for each in (guide, model)]
        raise UserError(f"--guide: it takes latents {shapes[0]}, the model {shapes[1]}; use a run of the same data")
    if guide.condition != model.condition:
        raise UserError("--guide: it takes another condition than the model; use a run of the same data")
    # Latents of another codec may have the same shape. A codec without weights, or whose weights are not here, has no
    # hash.
    codecs = {each.codec.sha256 for each in (guide, model)} - {None, ""}
    if len(codecs) > 1:
        raise UserError("--guide: it learned the latents of another codec than the model; use a run of the same data")
    scales = [noise_scale(each.objective) for each in (guide, model)]
    if scales[0] != scales[1]:
        raise UserError(
            f"--guide: it learned with --objective.noise_scale={scales[0]:g}, the model with {scales[1]:g}; use a run "
            "with the same noise"
        )


def check_seed(seed: int) -> int:
    """Returns the seed. Raises UserError unless it is an integer of 32 bits: JAX would cut a longer one."""
    if not is_integer(seed, 0, 2**32 - 1):
        raise UserError(f"seed={seed}: use a number from 0 to {2**32 - 1}")
    return seed


def hash_params(params: PyTree) -> str:
    """Returns the sha256 of all parameters' bytes, in the tree's order."""
    digest = hashlib.sha256()
    for leaf in progress_bar(jax.tree.leaves(params), "hashing the parameters", unit="array", delay=2):
        # Gathered leaf by leaf: all at once may not fit on the host.
        digest.update(np.ascontiguousarray(gather(leaf)).data)
    return digest.hexdigest()
