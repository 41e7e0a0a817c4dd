"""From a configuration to a model: the network, its objective, its codec and the data it is about."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

import diffusion_transformer  # noqa: F401 (enters DiT among the networks)
from utils.base.errors import UserError
from utils.base.settings import find_entry
from utils.codecs.codec import Codec
from utils.networks.lora import merge_lora
from utils.networks.network import NETWORKS, NetworkConfig
from utils.objectives.objective import ModelFn, Objective


@runtime_checkable
class Network(Protocol):
    """What is trained and sampled, as flax modules have it; DiT is one. Immutable and hashable: a static argument.

    One more is an entry of NETWORKS (utils/networks/network.py).
    """

    config: NetworkConfig  # of which guidance and training use `num_classes` and `class_dropout_prob`

    def init(self, rngs: Any, x: Any, t: Any, labels: Any) -> Any:
        """{"params": fresh parameters}."""

    def apply(self, variables: Any, x: Any, t: Any, labels: Any) -> Any:
        """The output for x_t (b, h, w, c), times (b,) and labels (b,): of the shape of x_t, or with more channels. With
        `config.step_conditioning`, a fourth argument is the step (b,)."""

    def count_flops(self, image_shape: tuple[int, int, int]) -> int:
        """Of one forward pass on one image, matmuls only (2 per MAC)."""


class ImageModel(NamedTuple):
    """Everything about a model but its parameters; constant through a run."""

    network: Network
    objective: Objective
    codec: Codec
    mesh: Mesh
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    empty_classes: tuple[int, ...] = ()  # labels without training images, of which no samples are drawn

    @property
    def drawn_classes(self) -> Float[np.ndarray, " classes"]:
        """1 for each class of which samples are drawn, 0 for the empty ones."""
        counts = np.ones(len(self.class_names))
        counts[list(self.empty_classes)] = 0
        return counts

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.codec.latent_shape(self.image_shape)


def read_network(values: Mapping[str, Any]) -> NetworkConfig:
    """Returns the network's configuration among the --model.* values of a saved run. Raises UserError for a network
    that is not registered."""
    entry = find_entry("model.network", values.get("network", "dit"), NETWORKS)
    return entry.config_class.from_mapping(values)


def make_model(
    config: NetworkConfig,
    objective: Objective,
    codec: Codec,
    mesh: Mesh,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    remat: str = "none",
    empty_classes: Sequence[int] = (),
) -> ImageModel:
    """Returns the model of a network's configuration for a data set. Raises UserError where they do not fit."""
    height, width, channels = image_shape
    shape = (height, width, channels)
    config.check(codec.latent_shape(shape))
    if len(class_names) > config.num_classes:
        raise UserError(
            f"--model.num_classes={config.num_classes} is fewer than the {len(class_names)} classes of the data set; "
            f"use {len(class_names)} or more"
        )
    network = NETWORKS[config.network].build(config, remat, mesh)
    return ImageModel(network, objective, codec, mesh, shape, tuple(class_names), tuple(empty_classes))


def init_params(model: ImageModel, key: Key[Array, ""]) -> PyTree:
    """Freshly initialised parameters of the network, float32."""
    latents = jnp.zeros((1, *model.latent_shape))
    return model.network.init(key, latents, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]


def model_fn(network: Network, params: PyTree) -> ModelFn:
    """The network as objectives, guidance and solvers call it; LoRA's factors are merged into its kernels."""
    params = merge_lora(params)

    def apply(x, t, labels, *step):
        if labels is None:
            labels = jnp.full(t.shape, network.config.num_classes)
        output: Any = network.apply({"params": params}, x, t, labels, *step)
        return output

    return apply
