"""From a configuration to a model: the network, its objective, its codec and the data it is about."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict

from diffusion_transformer import DiT, DiTConfig
from utils.checks import check_model
from utils.codecs.codec import Codec
from utils.errors import UserError
from utils.objectives.objective import ModelFn, Objective
from utils.ops import choose_attention_for


class ImageModel(NamedTuple):
    """Everything about a model but its parameters; constant through a run."""

    network: DiT
    objective: Objective
    codec: Codec
    mesh: Mesh
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.codec.latent_shape(self.image_shape)


def make_model(
    config: ConfigDict,
    objective: Objective,
    codec: Codec,
    mesh: Mesh,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    remat: str = "none",
) -> ImageModel:
    """The model of the --model.* values `config` for a data set; UserError where they do not fit."""
    check_model(config, codec.latent_shape(tuple(image_shape)))
    if len(class_names) > config.num_classes:
        raise UserError(
            f"--model.num_classes={config.num_classes} is fewer than the {len(class_names)} classes of the data set; "
            f"use {len(class_names)} or more"
        )
    head_dim = config.hidden_size // config.num_heads
    attention_form = choose_attention_for(mesh.devices.flat[0], head_dim, config.dtype)
    network = DiT(DiTConfig.from_mapping(config), remat, attention_form)
    return ImageModel(network, objective, codec, mesh, tuple(image_shape), tuple(class_names))


def init_params(model: ImageModel, key: Key[Array, ""]) -> PyTree:
    """Freshly initialised parameters of the network, float32."""
    latents = jnp.zeros((1, *model.latent_shape))
    return model.network.init(key, latents, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]


def model_fn(network: DiT, params: PyTree) -> ModelFn:
    """The network as objectives, guidance and solvers call it."""
    return lambda x, t, labels: network.apply({"params": params}, x, t, labels)
