"""What training looks at: loss by t, reconstructions, and samples by guidance scale and by step count.

Parameters, codec, guidance scale, step count and times are arguments of the compiled functions, so that a new value of
any of them compiles nothing anew; the network and the shapes are static.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree, UInt8
from matplotlib.figure import Figure

from utils.base.devices import gather
from utils.data.dataset import Batch
from utils.images import plotting
from utils.images.pixels import images_to_uint8
from utils.networks.models import ImageModel, model_fn
from utils.objectives.objective import has_guidance
from utils.sampling.generator import ImageGenerator
from utils.sampling.samplers import can_guide, largest_steps
from utils.sampling.solvers import SamplerConfig, sample_noise
from utils.training.step import draw_examples, loss_at_time

PANEL_SIZE = 8
LOSS_TIMES = tuple(i / 10 for i in range(11))
PANEL_GUIDANCE = (0, 0.1, 1, 4, 10)
PANEL_STEPS = (1, 4, 32)


def loss_by_time(model: ImageModel, params: PyTree, batch: Batch, key: Key[Array, ""]) -> dict[str, float]:
    """Loss of `batch`, all labels kept, at t = 0.0, 0.1, ..., 1.0, and `mean` over 0.1 .. 0.9; one noise for all t."""
    static = {"model": model.network, "objective": model.objective}
    losses = [float(loss_at_time(params, model.codec, key, batch, t, **static)) for t in LOSS_TIMES]
    named = {f"{t:.1f}": loss for t, loss in zip(LOSS_TIMES, losses, strict=True)}
    return {**named, "mean": float(np.mean(losses[1:-1]))}


@partial(jax.jit, static_argnames=("network", "objective"))
def _reconstruct(params, codec, key, batch, t, *, network, objective):
    """uint8 images (3, b, h, w, c): clean, noised to t, and predicted from that in one step."""
    examples = draw_examples(key, batch, objective, class_dropout_prob=0.0)
    x_1 = batch.to_latents(codec, examples["codec_key"])
    x_t = objective.corrupt(x_1, examples["draws"] | {"t": t})
    predicted = objective.predict_data(model_fn(network, params), x_t, t, batch.condition)
    return jnp.stack([batch.to_images(codec, x_1), *(images_to_uint8(codec.decode(x)) for x in (x_t, predicted))])


def reconstruction_panel(model: ImageModel, params: PyTree, batch: Batch, key: Key[Array, ""]) -> Figure:
    """Eight images of `batch` noised to t = 0, 1/8, ..., 7/8 and denoised in one step: clean, noised, predicted."""
    rows = jax.tree.map(lambda values: np.resize(gather(values), (PANEL_SIZE, *values.shape[1:])), batch)
    t = np.arange(PANEL_SIZE, dtype=np.float32) / PANEL_SIZE
    images = _reconstruct(params, model.codec, key, rows, t, network=model.network, objective=model.objective)
    titles = [f"t = {value:.3g}\n{model.class_names[label]}" for value, label in zip(t, rows.condition, strict=True)]
    return plotting.image_table(gather(images), ("clean", "noised", "predicted"), titles)


def sample_stages(
    model: ImageModel, params: PyTree, noise: Array, labels: Array, cfg_scale: float | None, num_steps: int
) -> UInt8[np.ndarray, "rows stages h w c"]:
    """Decoded states of an Euler path of `num_steps` after 1/8, 2/8, ..., 8/8 of its steps."""
    generator = ImageGenerator(model, params)
    stages = generator.path(noise, labels, SamplerConfig(num_steps, cfg_scale), PANEL_SIZE)
    return np.stack([generator.decode(latents) for latents in itertools.islice(stages, 1, None)], axis=1)


def panel_labels(model: ImageModel, number: int) -> list[int]:
    """Returns the labels of the panels of evaluation `number`, among the classes that have images: all of them where
    they fit; otherwise half of the places have the same at every evaluation, and the others take the rest in turn."""
    labels = np.flatnonzero(model.drawn_classes).tolist()
    if len(labels) <= PANEL_SIZE:
        return np.resize(labels, PANEL_SIZE).tolist()
    half = PANEL_SIZE // 2
    rest = np.roll(labels[half:], -half * number)
    return [*labels[:half], *rest[:half].tolist()]


def sample_panels(
    model: ImageModel,
    params: PyTree,
    key: Key[Array, ""],
    sampler: SamplerConfig,
    *,
    number: int = 0,
    name: str = "sample",
    note: str = "",
    scales: Sequence[float] = PANEL_GUIDANCE,
    step_counts: Sequence[int] = PANEL_STEPS,
) -> Iterator[tuple[str, Figure]]:
    """Yields (`NAME_cfg_S`, panel) for each guidance scale, the sampler's own among them, and (`NAME_N/N`, panel) for
    each step count; of a model that cannot be guided, scale 1 alone. `number` counts the evaluations of a run; `note`
    ends every title.

    Every panel starts from the same noise and labels, so that scales and step counts can be compared by eye.
    """
    labels = jnp.array(panel_labels(model, number))
    noise = sample_noise(key, jnp.arange(PANEL_SIZE), model.latent_shape)
    names = [model.class_names[label] for label in np.asarray(labels)]
    stage_titles = [f"{i + 1}/{PANEL_SIZE}" for i in range(PANEL_SIZE)]

    @functools.cache
    def stages(scale, num_steps):
        # Scales of 0 and 1 leave one of guidance's two passes without effect, so they go without it.
        shown = jnp.full_like(labels, model.network.config.num_classes) if scale == 0 else labels
        return sample_stages(model, params, noise, shown, None if scale in (0, 1) else scale, num_steps)

    note = note and f"; {note}"
    is_guided = has_guidance(model.objective) and can_guide(model.network.config.class_dropout_prob)
    own = () if sampler.cfg_scale is None else (sampler.cfg_scale,)
    for scale in sorted({*scales, *own}) if is_guided else (1,):
        images = stages(scale, sampler.num_steps)
        title = f"{sampler._replace(cfg_scale=scale)}, by fraction of the path{note}"
        yield f"{name}_cfg_{scale:g}", plotting.image_table(images, names, stage_titles, title)
    for num_steps in dict.fromkeys(largest_steps(count, model.objective) for count in step_counts):
        final = stages(1 if sampler.cfg_scale is None else sampler.cfg_scale, num_steps)[None, :, -1]
        title = f"{sampler._replace(num_steps=num_steps)}{note}"
        yield f"{name}_N/{num_steps}", plotting.image_table(final, (), names, title)
