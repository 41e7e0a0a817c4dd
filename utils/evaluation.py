"""What training and eval_fid share: loss by t, panels of reconstructions and samples, generated images and their FID.

Parameters, codec, guidance scale, step count and times are arguments of the compiled programs, so that a new value of
any of them compiles nothing anew; the model and the shapes are static.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree, UInt8
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_transformer import DiT
from utils import flow, inception, plotting, sampling
from utils.config import can_guide, check_model
from utils.errors import UserError
from utils.fid import ImageStatistics, ReferenceStatistics
from utils.sharding import gather, replicated, spread
from utils.stable_vae import PixelCodec, StableVAE, encode_batch, images_to_uint8

PANEL_SIZE = 8
RECIPE_BATCH_SIZE = 128
LOSS_TIMES = tuple(i / 10 for i in range(11))
PANEL_GUIDANCE = (0, 0.1, 1, 4, 10)
PANEL_STEPS = (1, 4, 32)


class Context(NamedTuple):
    """What stays the same through a run: the model, its codec and the data it is about."""

    model: DiT
    codec: PixelCodec | StableVAE
    mesh: Mesh
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.codec.latent_shape(self.image_shape)


def load_codec(
    use_stable_vae: bool, vae: str, mesh: Mesh, image_shape: Sequence[int], expected_sha256: str | None = None
) -> PixelCodec | StableVAE:
    """The codec of a run, on all devices. UserError where the VAE does not take images of that shape, or is another
    than the one whose weights have `expected_sha256`."""
    if not use_stable_vae:
        if expected_sha256:
            raise UserError("--model.use_stable_vae=0, but the data set is of latents; leave the flag out")
        return PixelCodec()
    if image_shape[-1] != 3:
        raise UserError("--model.use_stable_vae=1, but the images are grey; train on pixels with --use_stable_vae 0")
    codec = StableVAE.load(vae)
    if expected_sha256 not in (None, codec.sha256):
        raise UserError(
            f"--vae={vae} is another VAE (sha256 {codec.sha256[:12]}...) than the one that made the latents "
            f"({expected_sha256[:12]}...); name that one"
        )
    codec.latent_shape(tuple(image_shape))
    return jax.device_put(codec, replicated(mesh))


def make_context(
    model_config: ConfigDict,
    codec: PixelCodec | StableVAE,
    mesh: Mesh,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    remat: str = "none",
) -> Context:
    """The context of a run from its --model.* values and its data set's facts; UserError where they do not fit."""
    check_model(model_config, codec.latent_shape(tuple(image_shape)))
    if len(class_names) > model_config.num_classes:
        raise UserError(
            f"--model.num_classes={model_config.num_classes} is fewer than the {len(class_names)} classes of the data "
            f"set; use {len(class_names)} or more"
        )
    model = DiT(
        patch_size=model_config.patch_size,
        hidden_size=model_config.hidden_size,
        depth=model_config.depth,
        num_heads=model_config.num_heads,
        mlp_ratio=model_config.mlp_ratio,
        class_dropout_prob=model_config.class_dropout_prob,
        num_classes=model_config.num_classes,
        t_conditioning=bool(model_config.t_conditioning),
        dtype=jnp.dtype(model_config.dtype),
        remat=remat,
    )
    return Context(model, codec, mesh, tuple(image_shape), tuple(class_names))


def init_params(context: Context, key: Key[Array, ""]) -> PyTree:
    """Freshly initialised parameters of the context's model, float32."""
    latents = jnp.zeros((1, *context.latent_shape))
    return context.model.init(key, latents, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]


def model_fn(model: DiT, params: PyTree) -> sampling.ModelFn:
    """The model without label dropout, as guidance and solvers call it."""
    return lambda x, t, labels: model.apply({"params": params}, x, t, labels)


@partial(jax.jit, static_argnames="model")
def _loss_at(params, codec, key, batch, t, *, model):
    codec_key, noise_key = jax.random.split(key)
    x_1 = encode_batch(codec, codec_key, batch)
    x_0 = jax.random.normal(noise_key, x_1.shape)

    def velocity_fn(x_t, t):
        return model_fn(model, params)(x_t, t, batch["label"])

    return flow.flow_matching_loss(velocity_fn, x_0, x_1, jnp.full(len(x_1), t)).mean()


def loss_by_time(context: Context, params: PyTree, batch: PyTree, key: Key[Array, ""]) -> dict[str, float]:
    """Loss of `batch`, labels kept, at t = 0.0, 0.1, ..., 1.0, and `mean` over 0.1 .. 0.9; same noise at every t."""
    losses = [float(_loss_at(params, context.codec, key, batch, t, model=context.model)) for t in LOSS_TIMES]
    named = {f"{t:.1f}": loss for t, loss in zip(LOSS_TIMES, losses, strict=True)}
    return {**named, "mean": float(np.mean(losses[1:-1]))}


@partial(jax.jit, static_argnames="model")
def _reconstruct(params, codec, key, batch, t, *, model):
    codec_key, noise_key = jax.random.split(key)
    x_1 = encode_batch(codec, codec_key, batch)
    x_t = flow.interpolate(jax.random.normal(noise_key, x_1.shape), x_1, t)
    predicted = flow.predict_data(x_t, model_fn(model, params)(x_t, t, batch["label"]), t)
    clean = batch["image"] if "image" in batch else images_to_uint8(codec.decode(x_1))
    return jnp.stack([clean, *(images_to_uint8(codec.decode(x)) for x in (x_t, predicted))])


@partial(jax.jit, static_argnames=("model", "guided"))
def _advance(params, x, labels, cfg_scale, first, last, num_steps, *, model, guided):
    scale = cfg_scale if guided else None
    velocity_fn = sampling.guided_velocity(model_fn(model, params), labels, model.num_classes, scale)
    return sampling.ode_steps(velocity_fn, x, first, last, num_steps)


@jax.jit
def _decode(codec, latents):
    return images_to_uint8(codec.decode(latents))


def reconstruction_panel(context: Context, params: PyTree, batch: PyTree, key: Key[Array, ""]) -> Figure:
    """Eight images of `batch` noised to t = 0, 1/8, ..., 7/8 and denoised in one step: clean, noised, predicted."""
    rows = {name: np.resize(gather(values), (PANEL_SIZE, *values.shape[1:])) for name, values in batch.items()}
    t = np.arange(PANEL_SIZE, dtype=np.float32) / PANEL_SIZE
    panel = gather(_reconstruct(params, context.codec, key, rows, t, model=context.model))
    columns = [f"t = {value:.3g}\n{context.class_names[label]}" for value, label in zip(t, rows["label"], strict=True)]
    return plotting.image_table(panel, ("clean", "noised", "predicted"), columns)


def sample_stages(
    context: Context, params: PyTree, noise: Array, labels: Array, cfg_scale: float | None, num_steps: int
) -> UInt8[np.ndarray, "rows stages h w c"]:
    """Decoded states of an Euler path of `num_steps` after 1/8, 2/8, ..., 8/8 of its steps."""
    x, stages = noise, []
    cuts = [num_steps * i // PANEL_SIZE for i in range(PANEL_SIZE + 1)]
    for first, last in itertools.pairwise(cuts):
        scale = 0.0 if cfg_scale is None else cfg_scale
        guided = cfg_scale is not None
        x = _advance(params, x, labels, scale, first, last, num_steps, model=context.model, guided=guided)
        stages.append(gather(_decode(context.codec, x)))
    return np.stack(stages, axis=1)


def sample_panels(
    context: Context, params: PyTree, key: Key[Array, ""], sampler: sampling.Sampler
) -> Iterator[tuple[str, Figure]]:
    """(`sample_cfg_S`, panel) for each guidance scale and (`sample_N/N`, panel) for each step count; without guidance,
    where the model has not learned it, the one for scale 1 alone.

    Every panel starts from the same noise and labels, so that scales and step counts can be compared by eye.
    """
    indices = jnp.arange(PANEL_SIZE)
    labels = indices % len(context.class_names)
    noise = sampling.sample_noise(key, indices, context.latent_shape)
    names = [context.class_names[label] for label in np.asarray(labels)]
    stage_titles = [f"{i + 1}/{PANEL_SIZE}" for i in range(PANEL_SIZE)]

    @functools.cache
    def stages(scale, num_steps):
        # Scales of 0 and 1 leave one of guidance's two passes without effect, so they go without it.
        given = jnp.full_like(labels, context.model.num_classes) if scale == 0 else labels
        return sample_stages(context, params, noise, given, None if scale in (0, 1) else scale, num_steps)

    for scale in PANEL_GUIDANCE if can_guide(context.model.class_dropout_prob) else (1,):
        images = stages(scale, sampler.num_steps)
        title = f"{sampler._replace(cfg_scale=scale)}, by share of the path"
        yield f"sample_cfg_{scale}", plotting.image_table(images, names, stage_titles, title)
    for steps in PANEL_STEPS:
        final = stages(1 if sampler.cfg_scale is None else sampler.cfg_scale, steps)[None, :, -1]
        yield f"sample_N/{steps}", plotting.image_table(final, (), names, str(sampler._replace(num_steps=steps)))


@partial(jax.jit, static_argnames=("model", "latent_shape", "label_mode", "solver", "guided"))
def _generate(
    params, codec, key, indices, class_counts, cfg_scale, cfg_interval, num_steps, *,
    model, latent_shape, label_mode, solver, guided,
):  # fmt: skip
    noise_key, label_key = jax.random.split(key)
    noise = sampling.sample_noise(noise_key, indices, latent_shape)
    labels = sampling.sample_labels(label_key, indices, class_counts, label_mode)
    scale = cfg_scale if guided else None
    velocity_fn = sampling.guided_velocity(model_fn(model, params), labels, model.num_classes, scale, cfg_interval)
    return images_to_uint8(codec.decode(sampling.ode_sample(velocity_fn, noise, num_steps, solver))), labels


class ImageBatch(NamedTuple):
    """Images on the devices, with labels unless they are not known; only the first `count` rows are meant."""

    images: UInt8[Array, "b h w c"]
    labels: Int[Array, " b"] | None
    count: int

    def to_host(self) -> tuple[UInt8[np.ndarray, "count h w c"], Int[np.ndarray, " count"]]:
        return gather(self.images)[: self.count], gather(self.labels)[: self.count]


class Generator:
    """A compiled program that samples `batch_size` images at a time, split over the devices.

    Sample i (noise, and label as `label_mode` and `class_counts` say, see `sampling.sample_labels`) is a function of
    (seed, i) alone, whatever the batch size or the number of devices. Guidance scale, interval and step count compile
    nothing anew; with and without guidance are two programs.
    """

    def __init__(
        self,
        context: Context,
        params: PyTree,
        *,
        seed: int,
        label_mode: str = "uniform",
        class_counts: Sequence[int] | None = None,
    ):
        self.context, self.params, self.key, self.label_mode = context, params, jax.random.key(seed), label_mode
        self.counts = np.ones(len(context.class_names)) if class_counts is None else np.asarray(class_counts, float)

    def _call(self, function: Callable, sampler: sampling.Sampler, start: int, batch_size: int):
        """function(*arguments, **static arguments) of `_generate` for samples start .. start + batch_size - 1."""
        static = {
            "model": self.context.model,
            "latent_shape": self.context.latent_shape,
            "label_mode": self.label_mode,
            "solver": sampler.solver,
            "guided": sampler.cfg_scale is not None,
        }
        # Python numbers become one type each: a program compiled for 4 would not serve 1.5.
        scale, interval = float(sampler.cfg_scale or 0), tuple(map(float, sampler.cfg_interval))
        indices = spread(np.arange(start, start + batch_size, dtype=np.int32), self.context.mesh)
        arguments = (self.key, indices, self.counts, scale, interval, sampler.num_steps)
        return function(self.params, self.context.codec, *arguments, **static)

    def generate(self, sampler: sampling.Sampler, num_samples: int, batch_size: int) -> Iterator[ImageBatch]:
        """Batches of `batch_size` rows until exactly `num_samples` are made."""
        for start in range(0, num_samples, batch_size):
            images, labels = self._call(_generate, sampler, start, batch_size)
            # The last batch is computed whole: another shape would compile.
            yield ImageBatch(images, labels, min(batch_size, num_samples - start))

    def fitting_batch_size(self, sampler: sampling.Sampler, num_samples: int, free_memory: int | None) -> int:
        """A batch for devices with that many bytes free, by the compiler's analysis of one sample for each: a power of
        two times their number, no more than `num_samples` need. Where memory is not known: about the recipe's 128."""
        num_devices = self.context.mesh.size
        most = -(-num_samples // num_devices)
        if free_memory is None:
            return min(most, max(1, RECIPE_BATCH_SIZE // num_devices)) * num_devices
        compiled = self._call(_generate.lower, sampler, 0, num_devices).compile()
        # A quarter is left for the Inception network, and for what the pool of memory loses between its pieces.
        fitting = 0.75 * free_memory / max(1, compiled.memory_analysis().temp_size_in_bytes)
        return min(most, 2 ** int(np.log2(max(1, fitting)))) * num_devices


def place_images(batches: Iterable[UInt8[np.ndarray, "b h w c"]], batch_size: int, mesh: Mesh) -> Iterator[ImageBatch]:
    """Batches of up to `batch_size` images on the devices, filled up to that size."""
    for images in batches:
        yield ImageBatch(spread(np.resize(images, (batch_size, *images.shape[1:])), mesh), None, len(images))


def measure_images(
    extractor: Callable,
    batches: Iterable[ImageBatch],
    statistics: ImageStatistics,
    total: int | None = None,
    title: str | None = None,
) -> Iterator[ImageBatch]:
    """The batches, each after `statistics` has been given its Inception features; grey counts as three equal channels.

    While the host waits for the features of one batch, the devices already have the next one's work. With `total`, the
    number of images, a progress bar is shown.
    """
    bar = tqdm(total=total, unit="image", desc=title, disable=total is None)

    def finish(batch: ImageBatch, features: inception.Features) -> ImageBatch:
        statistics.update(*(gather(rows)[: batch.count] for rows in features))
        bar.update(batch.count)
        return batch

    waiting = None
    for batch in batches:
        images = batch.images if batch.images.shape[-1] == 3 else jnp.repeat(batch.images, 3, axis=-1)
        features = extractor(images)
        if waiting:
            yield finish(*waiting)
        waiting = (batch, features)
    if waiting:
        yield finish(*waiting)
    bar.close()


def find_convention(reference: ReferenceStatistics, given: str | None) -> str:
    """The convention under which the statistics were made; 'adm', saying so, where neither they nor the user tell."""
    told = reference.convention
    if told and given and told != given:
        raise UserError(f"--convention={given}, but {reference.path} was made under {told}; leave the flag out")
    if not (told or given):
        print(f"{reference.path} does not say its convention: taking adm (--convention pytorch_fid for the other)")
    return told or given or "adm"
