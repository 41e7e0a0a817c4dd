"""Data of a training: its splits, the validation batch, and the coupling of noise with its images."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from utils.base.devices import check_batch_memory, format_bytes, host_memory
from utils.base.mesh import batch_sharding, shard_batch
from utils.base.messages import UserError, log
from utils.codecs.codec import Codec, is_identity
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import read_rows, restore_condition
from utils.data.batches import BatchReader, first_examples, next_batch, training_batches
from utils.data.coupled import CoupledBatch, Coupling, MinibatchCoupling, SemidiscreteCoupling, Space, split_condition
from utils.data.dataset import ImageDataset, PixelBatch, StreamSource
from utils.data.latents import LatentBatch
from utils.data.loaders import load_splits, summarize_data
from utils.images.pixels import UINT8
from utils.kernels.random import unroll
from utils.networks.models import ImageModel
from utils.objectives.flow_matching import draw_noise
from utils.objectives.objective import noise_scale
from utils.runs.config import RunConfig
from utils.training.step import VALIDATION, draw_examples

MAX_GROUP = 256  # rows of a coupled group by default: the time of an assignment grows with their cube
MAX_SHARE = 0.4  # of the machine's memory that the points of a semidiscrete coupling may take


def this_host() -> dict[str, Any]:
    """Returns which part of each batch this process reads, as `training_batches` takes it."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def load_data(config: RunConfig, mesh: Mesh) -> tuple[dict[str, ImageDataset], PyTree]:
    """Returns (data sets by split, the validation batch on the devices). Raises UserError for data that do not fit."""
    datasets = load_splits(config.data.dataset_name, config.data.options)
    check_images(config, datasets["train"])
    training = config.training
    check_batch_memory(training.batch_size, datasets["train"].image_shape)
    # The validation images are always the same, so that two points of a curve differ by the model alone.
    validation = training_batches(datasets["validation"], training.batch_size, training.seed, **this_host())
    batch = shard_batch(next_batch(validation), mesh)
    log(summarize_data(datasets, training.batch_size))
    return datasets, batch


def check_images(config: RunConfig, dataset: ImageDataset) -> None:
    """Raises UserError if --value_range is given of images that are no floats, or if --augment would change nothing."""
    if "value_range" in config.given and dataset.pixels == UINT8:
        raise UserError(f"--value_range={config.data.value_range}: the images are uint8, of 0 .. 255; leave it out")
    augment = config.augmentation.augment
    if not augment:
        return
    given = f"--augment={','.join(augment)}"
    if dataset.batch_type is not PixelBatch:
        raise UserError(
            f"{given}: --dataset_name={config.data.dataset_name} holds no images to change; train on the images that "
            "it was made from, or leave the flag out"
        )
    height, width, _ = dataset.image_shape
    if min(height, width) == 1:
        raise UserError(f"{given}: images of {height}x{width} cannot be changed so; leave the flag out")


def inherit_condition(datasets: Mapping[str, ImageDataset], saved: Mapping[str, Any] | None) -> dict[str, ImageDataset]:
    """Returns the splits for a run that starts from one of the configuration `saved`, see `Condition.inherit`."""
    if saved is None or datasets["train"].own_condition is None:
        return dict(datasets)
    source = restore_condition(saved["dataset"])
    return {
        split: dataclasses.replace(dataset, own_condition=dataset.condition.inherit(source))
        for split, dataset in datasets.items()
    }


def training_examples(config: RunConfig, dataset: ImageDataset) -> ImageDataset:
    """Returns the examples on which a run trains: --debug_overfit repeats one batch."""
    return first_examples(dataset, config.training.batch_size) if config.training.debug_overfit else dataset


# --- Coupling of noise and data ---


def make_coupling(config: RunConfig, dataset: ImageDataset, model: ImageModel) -> Coupling | None:
    """Returns the coupling that --coupling asks for; None where noise is independent of the images.

    Raises UserError where data, codec or objective do not allow it.
    """
    settings = config.coupling
    if settings.coupling == "none":
        return None
    check_coupling(config, dataset, model)
    to_x_1 = find_x_1(settings.coupling, dataset, model.codec)
    space = Space(to_x_1, model.latent_shape, config.training.seed, noise_scale(config.objective))
    batch_size = config.training.batch_size
    if settings.coupling == "semidiscrete":
        dataset = training_examples(config, dataset)
        check_points(dataset, model.latent_shape)
        return SemidiscreteCoupling(space, dataset, BatchReader(dataset, None), settings.coupling_draws, batch_size)

    # One row is enough to refuse a kind of condition that has neither labels nor vectors.
    source: Any = dataset.source
    vectors = split_condition(dataset.condition, read_rows(dataset.condition, [source[0]], 1))[1]
    weight = settings.coupling_weight
    if weight is not None and vectors is None:
        raise UserError(f"--coupling_weight={weight:g}: classes are coupled each by itself; leave it out")
    return MinibatchCoupling(space, dataset.condition, group_rows(config), batch_size, weight)


def check_coupling(config: RunConfig, dataset: ImageDataset, model: ImageModel) -> None:
    """Raises UserError for an objective or data whose noise cannot be chosen."""
    given = f"--coupling={config.coupling.coupling}"
    name = config.data.dataset_name
    if not getattr(config.objective, "TAKES_COUPLING", True):
        raise UserError(
            f"{given}: --objective.name={config.objective_name} needs noise that is independent of the images; leave "
            "the flag out"
        )
    if dataset.pair_shape is not None:
        raise UserError(f"{given}: --dataset_name={name} brings the noise of its samples; leave the flag out")
    if isinstance(dataset.source, StreamSource):
        raise UserError(
            f"{given}: --dataset_name={name} is read as a stream, not by its rows; prepare it as array_record, or "
            "leave the flag out"
        )
    if config.augmentation.augment:
        raise UserError(
            f"{given}: --augment={','.join(config.augmentation.augment)} changes images after they are coupled; leave "
            "one of the two out"
        )


def check_points(dataset: ImageDataset, shape: tuple[int, ...]) -> None:
    """Raises UserError for data without classes, and for more points (h, w, c) than fit into memory."""
    if not isinstance(dataset.condition, ClassCondition):
        raise UserError(
            "--coupling=semidiscrete couples noise with images of a class, but the data have "
            f"{dataset.condition.summary() or 'other conditions'}; use minibatch"
        )
    num_points = len(dataset.source) * (1 + dataset.random_flip)
    needed = 4 * num_points * math.prod(shape)
    if needed > MAX_SHARE * host_memory():
        mirrors = ", with mirror images, which --random_flip 0 leaves out" if dataset.random_flip else ""
        raise UserError(
            f"--coupling=semidiscrete keeps {num_points:,} images in memory ({format_bytes(needed)} of "
            f"{format_bytes(host_memory())}{mirrors}); use minibatch"
        )


def group_rows(config: RunConfig) -> int:
    """Returns the rows of the global batch among which noise is coupled. Raises UserError where they do not fit."""
    # The default depends on the batch size alone: the number of processes changes no group.
    batch_size = config.training.batch_size
    rows = config.coupling.coupling_rows
    if rows is None:
        rows = next(size for size in range(min(MAX_GROUP, batch_size), 0, -1) if batch_size % size == 0)
    num_processes = jax.process_count()
    local_size = batch_size // num_processes
    has_several_batches = rows % batch_size == 0 and num_processes == 1
    if local_size % rows and not has_several_batches:
        fix = f"be a multiple of it; use {batch_size}"
        where = f"the batch (--batch_size={batch_size})"
        if num_processes > 1:
            where = f"the {local_size} rows of a batch that each of {num_processes} processes reads"
            fix = f"be as many; use {local_size}"
        raise UserError(f"--coupling_rows={rows} has to divide {where}, or {fix}, for example")
    return rows


def find_x_1(coupling: str, dataset: ImageDataset, codec: Codec) -> Callable[[Any], np.ndarray]:
    """Returns a function from batches in memory to x_1 (b, h, w, c), float32, in which the cost of a coupling is taken.

    For latents that are drawn from a posterior, x_1 is the mean. Raises UserError where only the devices know x_1, and
    for a codec that does more to latents than to scale and shift them.
    """
    if dataset.batch_type is PixelBatch and is_identity(codec):
        return lambda batch: dataset.pixels.to_unit_on_host(batch.image)
    if dataset.batch_type is not LatentBatch:
        raise UserError(
            f"--coupling={coupling}: the codec encodes images on the devices, after they are coupled; encode them "
            "first (python encode_latents.py), and train on latents:DIR"
        )

    # Latents without a posterior are x_1 as they are.
    row: Any = dataset.empty_batch(1)
    latent_codec: Any = codec
    if row.moments.shape[1] == 1:
        return lambda batch: batch.moments[:, 0].astype(np.float32)

    # Others are scaled and shifted by the codec, number by number. Two inputs show by how much, a third that it is so.
    def scaled(value: float) -> np.ndarray:
        mean = jnp.full(row.moments.shape[:1] + row.moments.shape[2:], value)
        return np.asarray(
            latent_codec.sample_latents(jax.random.split(jax.random.key(0), 1), mean, jnp.full_like(mean, -jnp.inf))
        )

    zero, one, two = map(scaled, (0.0, 1.0, 2.0))
    if zero.shape[1:] != row.moments.shape[2:] or not np.allclose(two - one, one - zero, rtol=1e-3, atol=1e-5):
        raise UserError(f"--coupling={coupling}: this codec does more to latents than to scale them; leave it out")
    return lambda batch: batch.moments[:, 0].astype(np.float32) * (one - zero) + zero


def with_independent_noise(batch: PyTree, config: RunConfig, model: ImageModel) -> CoupledBatch:
    """Returns the validation batch with the very noise that it has in a run without a coupling.

    The losses of both kinds of run are then of the same noise and images, and differ by the parameters alone. Raises
    UserError for an objective that takes no noise from a batch.
    """

    @partial(jax.jit, out_shardings=batch_sharding(model.mesh))
    def draw(key: Array, batch: PyTree) -> Float[Array, "b h w c"]:
        key = jax.random.fold_in(unroll(key), VALIDATION)
        draws = draw_examples(key, batch, config.objective, class_dropout_prob=0.0)["draws"]
        if "noise_key" not in draws:
            raise UserError(
                f"--coupling={config.coupling.coupling}: --objective.name={config.objective_name} draws its noise "
                "itself, and takes none of a batch; leave the flag out"
            )
        return draw_noise(draws, jnp.zeros((batch.num_examples, *model.latent_shape)))

    return CoupledBatch.of(batch, draw(jax.random.key(config.training.seed), batch))
