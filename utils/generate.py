"""From parameters to images: the one way samples are made."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, PyTree, UInt8

from utils.codecs.codec import images_to_uint8
from utils.models import ImageModel, model_fn
from utils.sampling import SamplerConfig, guide, ode_sample, sample_labels, sample_noise
from utils.sharding import gather, shard_replicated

RECIPE_BATCH_SIZE = 128


class ImageBatch(NamedTuple):
    """Images on the devices, with labels if they are known; only the first `count` rows are meant."""

    images: UInt8[Array, "b h w c"]
    labels: Int[Array, " b"] | None
    count: int

    def to_host(self) -> tuple[UInt8[np.ndarray, "count h w c"], Int[np.ndarray, " count"]]:
        """(images, labels) of generated samples."""
        if self.labels is None:
            raise ValueError("the labels of these images are not known")
        return gather(self.images)[: self.count], gather(self.labels)[: self.count]


@partial(jax.jit, static_argnames=("network", "objective", "latent_shape", "label_mode", "solver", "is_guided"))
def _generate(
    params, codec, key, indices, class_counts, cfg_scale, cfg_interval, num_steps, *,
    network, objective, latent_shape, label_mode, solver, is_guided,
):  # fmt: skip
    noise_key, label_key = jax.random.split(key)
    noise = sample_noise(noise_key, indices, latent_shape)
    labels = sample_labels(label_key, indices, class_counts, label_mode)
    scale = cfg_scale if is_guided else None
    guided = guide(model_fn(network, params), network.config.num_classes, scale, cfg_interval)
    latents = ode_sample(objective.velocity(guided, labels), noise, num_steps, solver)
    return images_to_uint8(codec.decode(latents)), labels


class ImageGenerator:
    """A compiled function that samples `batch_size` images at a time, sharded over the devices.

    Sample i (noise, and label as `label_mode` and `class_counts` say, see `sampling.sample_labels`) is a function of
    (seed, i) alone, whatever the batch size or the number of devices. Guidance scale, interval and step count compile
    nothing anew; with and without guidance are two compiled functions.
    """

    def __init__(
        self,
        model: ImageModel,
        params: PyTree,
        *,
        seed: int,
        label_mode: str = "uniform",
        class_counts: Sequence[int] | Int[np.ndarray, " classes"] | None = None,
    ):
        self.model = model
        self.params = params
        self.key = jax.random.key(seed)
        self.label_mode = label_mode
        self.counts = np.ones(len(model.class_names)) if class_counts is None else np.asarray(class_counts, float)

    def _call(self, function: Callable, sampler: SamplerConfig, start: int, batch_size: int):
        """function(*arguments, **static arguments) of `_generate` for samples start .. start + batch_size - 1."""
        static = {
            "network": self.model.network,
            "objective": self.model.objective,
            "latent_shape": self.model.latent_shape,
            "label_mode": self.label_mode,
            "solver": sampler.solver,
            "is_guided": sampler.cfg_scale is not None,
        }
        # Python numbers become one type each: a function compiled for 4 would not serve 1.5.
        scale = float(sampler.cfg_scale or 0)
        interval = tuple(map(float, sampler.cfg_interval))
        indices = shard_replicated(np.arange(start, start + batch_size, dtype=np.int32), self.model.mesh)
        arguments = (self.key, indices, self.counts, scale, interval, sampler.num_steps)
        return function(self.params, self.model.codec, *arguments, **static)

    def generate(self, sampler: SamplerConfig, num_samples: int, batch_size: int) -> Iterator[ImageBatch]:
        """Batches of `batch_size` rows until exactly `num_samples` are made."""
        for start in range(0, num_samples, batch_size):
            images, labels = self._call(_generate, sampler, start, batch_size)
            # The last batch is computed whole: another shape would compile.
            yield ImageBatch(images, labels, min(batch_size, num_samples - start))

    def fitting_batch_size(self, sampler: SamplerConfig, num_samples: int, free_memory: int | None) -> int:
        """A batch for devices with that many bytes free, by the compiler's analysis of one sample for each: a power of
        two times their number, no more than `num_samples` need. Where memory is not known: about the recipe's 128."""
        num_devices = self.model.mesh.size
        most = -(-num_samples // num_devices)
        if free_memory is None:
            return min(most, max(1, RECIPE_BATCH_SIZE // num_devices)) * num_devices
        compiled = self._call(_generate.lower, sampler, 0, num_devices).compile()
        # A quarter is left for the Inception network, and for fragmentation.
        fitting = 0.75 * free_memory / max(1, compiled.memory_analysis().temp_size_in_bytes)
        return min(most, 2 ** int(np.log2(max(1, fitting)))) * num_devices
