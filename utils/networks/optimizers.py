"""Optimizers: the rule by which gradients change parameters, its learning rate, and parts that it leaves alone."""

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from utils.networks.muon import names_of, scale_by_muon
from utils.networks.network import NetworkConfig


def make_optimizer(
    lr: float,
    beta1: float,
    beta2: float,
    *,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    weight_decay: float = 0.0,
    grad_clip: float | None = None,
    muon_of: NetworkConfig | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Adam (arXiv:1412.6980) as the recipe has it: constant rate, no decay, warm-up or clipping.

    `warmup_steps` lets the rate rise from 0; `decay_steps` lets it fall to 0 at that step along a cosine;
    `weight_decay` is AdamW's (arXiv:1711.05101), of matrices; `grad_clip` bounds the gradients' norm. With `muon_of`, a
    network's configuration, Muon takes the kernels that its `count_matrices` names, and Adam the rest: only Muon's are
    then decayed, and the devices of `mesh` share the work of orthogonalising.
    """
    rate = learning_rate(lr, warmup_steps, decay_steps)
    # Biases and scales are not decayed: only matrices are.
    if muon_of:
        adam = optax.adam(rate, b1=beta1, b2=beta2)
        optimizer = muon_beside(adam, rate, weight_decay, muon_of, mesh)
    elif weight_decay:
        optimizer = optax.adamw(rate, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=_is_matrix)
    else:
        optimizer = optax.adam(rate, b1=beta1, b2=beta2)
    # Clipping comes first: Adam's moments then see the clipped gradients.
    return optimizer if grad_clip is None else optax.chain(optax.clip_by_global_norm(grad_clip), optimizer)


def muon_beside(
    adam: optax.GradientTransformation,
    rate: float | optax.Schedule,
    weight_decay: float,
    network: NetworkConfig,
    mesh: Mesh | None,
) -> optax.GradientTransformation:
    """Returns Muon for the kernels that the network's configuration names, and `adam` for the other parameters."""
    muon = optax.chain(
        scale_by_muon(network.count_matrices, network.dtype, mesh),
        *([optax.add_decayed_weights(weight_decay)] if weight_decay else []),
        optax.scale_by_learning_rate(rate),
    )

    def label(path, leaf):
        return "muon" if network.count_matrices(names_of(path), leaf.shape) else "adam"

    # Each keeps a state for its own parameters alone.
    return optax.partition({"muon": muon, "adam": adam}, lambda params: jax.tree_util.tree_map_with_path(label, params))


def learning_rate(lr: float, warmup_steps: int = 0, decay_steps: int | None = None) -> float | optax.Schedule:
    """Returns the learning rate, or a function of the step if it changes."""
    # The cosine ends at `decay_steps`, of which warm-up is a part, as optax counts.
    if decay_steps is not None:
        return optax.warmup_cosine_decay_schedule(0.0 if warmup_steps else lr, lr, warmup_steps, decay_steps)
    return optax.linear_schedule(0.0, lr, warmup_steps) if warmup_steps else lr


def _is_matrix(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def freeze_parts(optimizer: optax.GradientTransformation, frozen: tuple[str, ...]) -> optax.GradientTransformation:
    """Returns the optimizer of all top-level parts of the parameters but the `frozen` ones, which get no state."""
    if not frozen:
        return optimizer

    def label(params):
        return {part: part in frozen for part in params}

    # Moments are kept for the trained parts alone: frozen ones would take twice their own memory for zeros.
    return optax.partition({False: optimizer, True: optax.set_to_zero()}, label)
