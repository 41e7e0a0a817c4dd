"""One step of training and of validation: pure functions of state, batch and codec, their other parts static.

What is random in a step is a function of (state.key, state.step) and of the example's place in the global batch, so
that neither the number of devices nor that of the parts of a batch changes it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from diffusion_transformer import DiT
from utils import flow
from utils.stable_vae import PixelCodec, StableVAE, encode_batch
from utils.train_state import TrainState, apply_gradients

Codec = PixelCodec | StableVAE

# Streams of randomness beside the training steps', which fold 0, 1, 2, ... into the seed's key.
INIT, VALIDATION = 2**31 - 1, 2**31 - 2


def mean_over_parts(function: Callable[[PyTree], PyTree], examples: PyTree, num_parts: int) -> PyTree:
    """The mean of function(part) over `num_parts` parts of the examples' rows, computed one after the other."""
    if num_parts == 1:
        return function(examples)
    # Every num_parts-th row: whatever rows a device has, it has as many of each part.
    parts = jax.tree.map(lambda rows: rows.reshape(-1, num_parts, *rows.shape[1:]).swapaxes(0, 1), examples)
    shapes = jax.eval_shape(function, jax.tree.map(lambda rows: rows[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, parts)
    return jax.tree.map(lambda x: x / num_parts, total)


def loss_and_gradients(
    params: PyTree,
    key: jax.Array,
    batch: PyTree,
    codec: Codec,
    *,
    model: DiT,
    t_sampler: str,
    train: bool,
    grad_accum: int,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """(gradients, mean metrics) of the flow-matching loss on a global batch; labels are dropped only if `train`.

    All that is random is drawn by example, so that `grad_accum`, the number of parts, changes nothing but rounding.
    """
    codec_key, time_key, noise_key, dropout_key = jax.random.split(key, 4)
    count = len(batch["label"])
    examples = {
        "batch": batch,
        "codec_key": jax.random.split(codec_key, count),
        "noise_key": jax.random.split(noise_key, count),
        "t": flow.sample_times(time_key, count, t_sampler),
        "is_dropped": jax.random.bernoulli(dropout_key, model.class_dropout_prob if train else 0.0, (count,)),
    }

    def gradients(examples):
        labels, is_dropped = examples["batch"]["label"], examples["is_dropped"]
        x_1 = encode_batch(codec, examples["codec_key"], examples["batch"])
        x_0 = jax.vmap(lambda key: jax.random.normal(key, x_1.shape[1:]))(examples["noise_key"])

        def loss_fn(params):
            def velocity_fn(x_t, t):
                return model.apply({"params": params}, x_t, t, labels, train, force_drop_ids=is_dropped)

            metrics = jax.tree.map(jnp.mean, flow.flow_matching_terms(velocity_fn, x_0, x_1, examples["t"]))
            return metrics["l2_loss"], metrics

        return jax.grad(loss_fn, has_aux=True)(params)

    return mean_over_parts(gradients, examples, grad_accum)


def norms(grads: PyTree, updates: PyTree, params: PyTree) -> dict[str, jax.Array]:
    trees = {"grad_norm": grads, "update_norm": updates, "param_norm": params}
    return {name: optax.tree.norm(tree) for name, tree in trees.items()}


def train_step(
    state: TrainState,
    batch: PyTree,
    codec: Codec,
    *,
    model: DiT,
    optimizer: optax.GradientTransformation,
    t_sampler: str,
    grad_accum: int,
    ema_decay: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(next state, metrics) of one Adam step on a global batch {'image': uint8 (b, h, w, c), 'label': int32 (b,)}."""
    key = jax.random.fold_in(state.key, state.step)
    options = {"model": model, "t_sampler": t_sampler, "grad_accum": grad_accum, "train": True}
    grads, metrics = loss_and_gradients(state.params, key, batch, codec, **options)
    new_state, updates = apply_gradients(state, grads, optimizer, ema_decay)
    return new_state, metrics | norms(grads, updates, new_state.params)


def validation_step(
    state: TrainState,
    batch: PyTree,
    codec: Codec,
    *,
    model: DiT,
    optimizer: optax.GradientTransformation,
    t_sampler: str,
    grad_accum: int,
) -> dict[str, jax.Array]:
    """Metrics of a batch without label dropout, with the same noise and times whatever the step; the norms are those of
    the update that this batch would cause, which is not applied."""
    key = jax.random.fold_in(state.key, VALIDATION)
    options = {"model": model, "t_sampler": t_sampler, "grad_accum": grad_accum, "train": False}
    grads, metrics = loss_and_gradients(state.params, key, batch, codec, **options)
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    return metrics | norms(grads, updates, state.params)
