"""Evaluations of a run that trains: loss by t, reconstructions, samples by guidance scale and by step count, and FID.

Parameters, codec, guidance scale, step count and times are arguments of the compiled functions, so that a new value of
any of them compiles nothing anew; the network and the shapes are static.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Key, PyTree, UInt8

from utils.base.mesh import gather
from utils.base.messages import progress_bar
from utils.base.processes import Interrupted, StopRequest
from utils.conditions.condition import resize_rows
from utils.data.dataset import Batch
from utils.images.pixels import ImageBatch, images_to_uint8
from utils.metrics.measure import measure_images
from utils.metrics.metrics import compute_metrics, sees_pixels
from utils.metrics.pixels import PixelStatistics
from utils.metrics.statistics import ImageStatistics
from utils.networks.models import ImageModel, model_fn
from utils.networks.state import TrainState
from utils.objectives.objective import has_guidance
from utils.runs.config import RunConfig
from utils.sampling.generator import ImageGenerator
from utils.sampling.samplers import can_guide, guidance_scale, largest_steps
from utils.sampling.solvers import SamplerConfig, sample_noise
from utils.trackers.trackers import Trackers, read_metrics
from utils.training.build import Run
from utils.training.step import VALIDATION, draw_examples, loss_at_time

PANEL_SIZE = 8  # images in a row, and stages of a path
LOSS_TIMES = tuple(i / 10 for i in range(11))
PANEL_GUIDANCE = (0, 0.1, 1, 4, 10)  # 0: no condition; 1: the condition, without guidance
PANEL_STEPS = (1, 4, 32)


def loss_by_time(model: ImageModel, params: PyTree, batch: Batch, key: Key[Array, ""]) -> dict[str, float]:
    """Returns the loss of `batch` at t = 0.0, 0.1, ..., 1.0, by "0.0" etc., and the `mean` over 0.1 .. 0.9.

    Conditions are kept, and the noise is the same for all t.
    """
    static = {"model": model.network, "objective": model.objective}
    losses = [float(loss_at_time(params, model.codec, key, batch, t, **static)) for t in LOSS_TIMES]
    named = {f"{t:.1f}": loss for t, loss in zip(LOSS_TIMES, losses, strict=True)}
    return {**named, "mean": float(np.mean(losses[1:-1]))}


@partial(jax.jit, static_argnames=("network", "objective"))
def _reconstruct(params, codec, key, batch, t, *, network, objective):
    """Returns uint8 images (3, b, h, w, c): clean, noised to t, and predicted from that in one step."""
    # The times are given; all other draws are as in training.
    examples = draw_examples(key, batch, objective, class_dropout_prob=0.0)
    x_1 = batch.to_latents(codec, examples["codec_key"])
    x_t = objective.corrupt(x_1, examples["draws"] | {"t": t})
    condition = network.condition.prepare(codec, batch.condition)
    predicted = objective.predict_data(model_fn(network, params), x_t, t, condition)
    return jnp.stack([batch.to_images(codec, x_1), *(images_to_uint8(codec.decode(x)) for x in (x_t, predicted))])


def reconstruction_panel(model: ImageModel, params: PyTree, batch: Batch, key: Key[Array, ""]) -> Any:
    """Draws a Figure of eight images of `batch`: clean, noised to t = 0, 1/8, ..., 7/8, and predicted from that in one
    step."""
    from utils.images import plotting  # slow to import: matplotlib

    # Gathered first: the rows of a global batch are spread over devices and processes.
    rows = resize_rows(jax.tree.map(gather, batch), PANEL_SIZE)
    t = np.arange(PANEL_SIZE, dtype=np.float32) / PANEL_SIZE
    images = _reconstruct(params, model.codec, key, rows, t, network=model.network, objective=model.objective)
    names = model.condition.titles(rows.condition)
    titles = [f"t = {value:.3g}\n{name}" for value, name in zip(t, names, strict=True)]
    return plotting.image_table(gather(images), ("clean", "noised", "predicted"), titles)


def sample_stages(
    model: ImageModel, params: PyTree, noise: Array, condition: PyTree, sampler: SamplerConfig
) -> UInt8[np.ndarray, "rows stages h w c"]:
    """Returns the decoded states of a path after 1/8, 2/8, ..., 8/8 of its steps."""
    generator = ImageGenerator(model, params)
    stages = generator.path(noise, condition, sampler, PANEL_SIZE)
    shown = itertools.islice(stages, 1, None)  # all but the noise itself
    return np.stack([generator.to_pictures(generator.decode(latents)) for latents in shown], axis=1)


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
) -> Iterator[tuple[str, Any]]:
    """Yields (`NAME_cfg_S`, Figure) for each guidance scale, the sampler's own among them, and (`NAME_N/N`, Figure) for
    each step count. A model that cannot be guided has a panel of scale 1 alone. `number` counts the evaluations of a
    run; `note` ends every title.

    Every panel starts from the same noise and conditions, so that scales and step counts can be compared by eye.
    """
    from utils.images import plotting  # slow to import: matplotlib

    # The same for all panels.
    condition = model.show(number, PANEL_SIZE)
    noise = sample_noise(key, jnp.arange(PANEL_SIZE), model.latent_shape)
    names = model.condition.titles(condition)
    pictures = model.condition.pictures(condition)
    stage_titles = ["given"] * (pictures is not None) + [f"{i + 1}/{PANEL_SIZE}" for i in range(PANEL_SIZE)]

    # Cached: the panels by step count show the end of a path that may be drawn already.
    @functools.cache
    def stages(scale, num_steps):
        # Scales of 0 and 1 leave one of guidance's two passes without effect, so they go without it.
        shown = model.condition.null(PANEL_SIZE) if scale == 0 else condition
        own = sampler._replace(num_steps=num_steps, cfg_scale=None if scale in (0, 1) else scale)
        return sample_stages(model, params, noise, shown, own)

    # Which panels there are. Two step counts may become one where the objective allows fewer steps.
    note = note and f"; {note}"
    is_guided = has_guidance(model.objective) and can_guide(model.network.config.class_dropout_prob)
    own = () if sampler.cfg_scale is None else (sampler.cfg_scale,)
    scales = sorted({*scales, *own}) if is_guided else (1,)
    step_counts = list(dict.fromkeys(largest_steps(count, model.objective) for count in step_counts))
    bar = progress_bar(total=len(scales) + len(step_counts), desc="panels", unit="panel")

    # By guidance scale: how the path unfolds, eight stages of every image.
    for scale in scales:
        images = stages(scale, sampler.num_steps)
        if pictures is not None:
            images = plotting.put_before(pictures, images)
        title = f"{sampler._replace(cfg_scale=scale)}, by fraction of the path{note}"
        yield f"{name}_cfg_{scale:g}", plotting.image_table(images, names, stage_titles, title)
        bar.update()

    # By step count: ends of paths.
    for num_steps in step_counts:
        final = stages(1 if sampler.cfg_scale is None else sampler.cfg_scale, num_steps)[None, :, -1]
        title = f"{sampler._replace(num_steps=num_steps)}{note}"
        yield f"{name}_N/{num_steps}", plotting.image_table(final, (), names, title)
        bar.update()
    bar.close()


# --- The evaluations of a run ---


def is_evaluation_due(config: RunConfig, step: int) -> bool:
    """Returns whether images are drawn, and FID computed, after this step."""
    interval = config.evaluation.eval_interval
    is_end = step == config.training.max_steps
    return bool(step and interval and (step % interval == 0 or step == 1000 or is_end))


def count_evaluations(config: RunConfig, step: int) -> int:
    """Returns how many evaluations are due before this step, not counting one at an earlier --max_steps."""
    # Step 1000 counts once, also where it is a multiple of the interval.
    interval = config.evaluation.eval_interval
    return (step - 1) // interval + (step > 1000 and 1000 % interval > 0)


def is_evaluation_missing(run: Run, step: int) -> bool:
    """Returns whether an evaluation is due after the step from which a run continues, but missing from its log, because
    a kill or a signal has ended it."""
    if not is_evaluation_due(run.config, step):
        return False

    # The first process alone has the log; all follow its answer, as an evaluation needs all of them.
    lines = read_metrics(run.folder / "metrics.jsonl") if jax.process_index() == 0 else []
    is_logged = any(line["step"] == step and "validation_loss_t/mean" in line for line in lines)
    if jax.process_count() > 1:
        return not multihost_utils.broadcast_one_to_all(np.bool_(is_logged))
    return not is_logged


def evaluate(run: Run, state: TrainState, batch: PyTree) -> Iterator[tuple[str, Any]]:
    """Yields (name, number or figure) of an evaluation. Images and FID use the EMA; while that is mostly the initial
    parameters, images are drawn from the parameters too."""
    config = run.config
    model = run.model
    # Panels alone are decoded by the viewer: losses and scores are the model's own.
    shown = model if run.viewer is None else model._replace(codec=run.viewer)
    key = jax.random.fold_in(state.key, VALIDATION)

    # Losses, of the parameters.
    for name, data in (("training", batch), ("validation", run.validation_batch)):
        for t, loss in loss_by_time(model, state.params, data, key).items():
            yield f"{name}_loss_t/{t}", loss
    yield "reconstruction_n", reconstruction_panel(shown, state.ema_params, run.validation_batch, key)

    # Samples, with the sampler of the run.
    is_guided = has_guidance(model.objective) and can_guide(config.model.class_dropout_prob)
    scale = guidance_scale(config.sampling.cfg_scale) if is_guided else None
    sampling = config.sampling
    num_steps = largest_steps(sampling.denoise_timesteps, model.objective)
    sampler = SamplerConfig(num_steps, scale, inner_scale=sampling.inner_scale if config.model.inner_head else 1.0)
    weight = run.ema.initial_weight(int(state.step))
    note = f"EMA, {weight:.0%} of it initial parameters" if weight > 0.005 else "EMA"
    number = count_evaluations(config, int(state.step))
    yield from sample_panels(shown, state.ema_params, key, sampler, number=number, note=note)
    if weight > 0.5:  # the EMA's images are mostly noise still
        raw = {"number": number, "name": "sample_raw", "note": "parameters without EMA", "step_counts": ()}
        yield from sample_panels(shown, state.params, key, sampler, scales=(1 if scale is None else scale,), **raw)

    # Numbers of many samples, which take the longest.
    yield "straightness", ImageGenerator(model, state.ema_params, seed=config.training.seed).straightness()
    if run.reference is not None:
        yield from score_samples(run, state, sampler).items()
    if config.evaluation.eval_memorisation:
        yield from compare_samples(run, state, sampler).items()


def score_samples(run: Run, state: TrainState, sampler: SamplerConfig) -> dict[str, float]:
    """Returns --metrics, by default the FID, of --fid_samples samples of the EMA against the run's reference."""
    assert run.reference is not None
    count = run.config.evaluation.fid_samples
    samples = _generate(run, state, sampler, count)
    metrics = run.reference.metrics
    statistics = ImageStatistics(pixels=PixelStatistics() if sees_pixels(metrics) else None)
    measure_images(run.reference.extractors, samples, statistics, count, "samples", is_announced=False)
    return compute_metrics(statistics, run.reference.statistics, metrics)


def compare_samples(run: Run, state: TrainState, sampler: SamplerConfig) -> dict[str, Any]:
    """Returns what --eval_memorisation samples of the EMA have of the training images, and the figure of the pairs."""
    batches = _generate(run, state, sampler, run.config.evaluation.eval_memorisation)
    images = np.concatenate([gather(batch.images)[: batch.count] for batch in batches])
    results, figure = run.memorising.compute(images, is_announced=False)
    return {**results, "memorised_pairs": figure}


def _generate(run: Run, state: TrainState, sampler: SamplerConfig, num_samples: int) -> Iterable[ImageBatch]:
    """Returns batches of `num_samples` samples of the EMA."""
    training = run.config.training
    generator = ImageGenerator(run.model, state.ema_params, seed=training.seed)
    needed = -(-num_samples // run.mesh.size) * run.mesh.size  # batches divide over the devices
    return generator.generate(sampler, num_samples, min(training.batch_size, needed))


def log_evaluation(trackers: Trackers, results: Iterator[tuple[str, Any]], step: int, stop: StopRequest) -> bool:
    """Logs the results of an evaluation, and returns whether it was finished.

    A signal ends it; the evaluation is then made again when the run continues.
    """
    # Figures at once. The numbers go into one line at the end, which marks the evaluation as finished.
    numbers: dict[str, float] = {}
    try:
        with stop.interrupting():
            for name, value in results:
                if isinstance(value, SupportsFloat):
                    numbers[name] = float(value)
                else:
                    trackers.log_figure(step, name, value)
                # No signal interrupts one of several processes: they would wait for it in the next computation.
                if jax.process_count() > 1 and stop.is_due():
                    return False
    except Interrupted:
        return False
    trackers.log(step, numbers)
    return True
