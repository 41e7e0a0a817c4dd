"""From a configuration to a model: the network, its objective, its codec and the data it is about."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

import diffusion_transformer  # noqa: F401 (enters DiT among the networks)
import utils.conditions.images
import utils.conditions.several
import utils.conditions.tokens
import utils.conditions.vector  # noqa: F401 (likewise)
from utils.base.messages import UserError
from utils.base.settings import check_made, find_entry
from utils.codecs.codec import Codec
from utils.conditions.augmented import Augmented, without_augmentation
from utils.conditions.condition import Condition, count_rows, take_rows
from utils.networks.lora import merge_lora
from utils.networks.network import NETWORKS, NetworkConfig
from utils.objectives.objective import ModelFn, Objective, has_inner_loss
from utils.objectives.objectives import OBJECTIVES


@runtime_checkable
class Network(Protocol):
    """Interface of what is trained and sampled, in the shape of a Flax module; DiT is one.

    Immutable and hashable, because compiled functions take it as a static argument. Another network is an entry of
    NETWORKS (utils/networks/network.py).
    """

    config: NetworkConfig  # guidance and training read its `class_dropout_prob`
    condition: Condition  # the kind that it takes

    # A `step` (b,) is given with `config.step_conditioning` alone, and only networks of `takes_step` need to take it.
    # Networks of TAKES_INNER_HEAD also take `with_inner`, and return `Heads` where it is true.
    def init(self, rngs: Any, x: Any, t: Any, condition: Any, *step: Any) -> Any:
        """Returns {"params": fresh parameters}; the others are a batch of any values, for their shapes."""

    def apply(self, variables: Any, x: Any, t: Any, condition: Any, *step: Any) -> Any:
        """Returns the output for x_t (b, h, w, c), times (b,) and conditions (b, ...): of the shape of x_t, or with
        more channels."""

    def count_flops(self, image_shape: tuple[int, int, int]) -> int:
        """Returns the floating-point operations of one forward pass on one image, matmuls only (2 per MAC)."""


class ImageModel(NamedTuple):
    """Everything about a model but its parameters; constant through a run."""

    network: Network
    objective: Objective
    codec: Codec
    mesh: Mesh
    image_shape: tuple[int, int, int]
    pool: PyTree | None = None  # conditions (m, ...) from which those of samples are drawn; None where kinds draw them

    @property
    def condition(self) -> Condition:
        """The kind of condition that the data have, with what it knows of them."""
        return without_augmentation(self.network.condition)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.codec.latent_shape(self.image_shape)

    def show(self, number: int, count: int) -> PyTree:
        """Returns the `count` conditions that the panels of evaluation `number` show."""
        if self.pool is None:
            return self.condition.show(number, count)
        # The same rows at every evaluation, so that its panels can be compared.
        return take_rows(self.pool, np.linspace(0, count_rows(self.pool) - 1, count).round().astype(int))


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
    condition: Condition,
    remat: str = "none",
    augment: Sequence[str] = (),
    augment_prob: float = 0.0,
) -> ImageModel:
    """Returns the model of a network's configuration for a data set. Raises UserError where they do not fit.

    `augment` names how its images are changed in training, each with probability `augment_prob`.
    """
    height, width, channels = image_shape
    shape = (height, width, channels)
    # Checked before anything is built: a network that does not fit would fail in a trace, without a flag to name.
    config.check(codec.latent_shape(shape))
    if config.condition_dropout == "each" and not condition.num_parts:
        raise UserError("--model.condition_dropout=each: the data have one condition alone; use together")
    condition = condition.fit(config.num_classes).fit_latents(shape, codec.latent_shape(shape))
    if augment:
        if not config.TAKES_AUGMENTATION:
            raise UserError(
                f"--augment={','.join(augment)}: --model.network={config.network} does not take how an image was "
                "changed, so that samples would be, too; leave it out (docs/change_this.md, Network)"
            )
        condition = Augmented(condition, tuple(augment), augment_prob)
    check_inner_head(config, objective)
    network = NETWORKS[config.network].build(config, remat, mesh, condition)
    check_made(network, Network, f"the builder of --model.network={config.network}")
    return ImageModel(network, objective, codec, mesh, shape)


def check_inner_head(config: NetworkConfig, objective: Objective) -> None:
    """Raises UserError for an inner head that the network cannot have, or for which the objective has no loss."""
    if not config.inner_head:
        return
    given = f"--model.inner_head={config.inner_head}"
    if not config.TAKES_INNER_HEAD:
        raise UserError(
            f"{given}: --model.network={config.network} has no second output; use 0 (docs/change_this.md, Network)"
        )
    if not has_inner_loss(objective):
        kind = type(objective)
        name = next((name for name, known in OBJECTIVES.items() if known is kind), kind.__name__)
        raise UserError(f"{given}: --objective.name={name} has no loss for a second output; use 0")


def takes_step(network: Any) -> bool:
    """Returns whether a network can be given the step as a fourth argument, by the signature of its `__call__`."""
    try:
        inspect.signature(type(network).__call__).bind(network, "x", "t", "condition", "step")
    except TypeError:
        return False
    return True


def init_params(model: ImageModel, key: Key[Array, ""]) -> PyTree:
    """Returns freshly initialised parameters of the network, float32."""
    # Only shapes matter to initialisation: one image of zeros at t = 0, without a label.
    latents = jnp.zeros((1, *model.latent_shape))
    step = (jnp.zeros(1),) if model.network.config.step_conditioning else ()
    return model.network.init(key, latents, jnp.zeros(1), model.condition.null(1), *step)["params"]


def model_fn(network: Network, params: PyTree, with_inner: bool = False) -> ModelFn:
    """Returns the network as objectives, guidance and solvers call it, with LoRA's factors merged into its kernels.

    With `with_inner`, which needs a network with an inner head, it returns `Heads`.
    """
    # Once, not in each call of the network.
    params = merge_lora(params)
    options = {"with_inner": True} if with_inner else {}

    def apply(x, t, condition, *step):
        output: Any = network.apply({"params": params}, x, t, condition, *step, **options)
        return output

    return apply
