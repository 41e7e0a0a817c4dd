"""One step, of training or of validation: a pure function of state, batch and codec, for every objective.

All randomness of a step is a function of (state.key, state.step) and of the example's place in the global batch, so
that neither the number of devices nor that of microbatches changes it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.tree_util import Partial
from jaxtyping import Array, Key, PyTree

from utils.codecs.codec import Codec
from utils.conditions.augmented import Augmented, Change
from utils.conditions.condition import drop_rows
from utils.data.dataset import Batch
from utils.kernels.random import roll, unroll
from utils.networks.models import Network, model_fn
from utils.networks.packing import Packing
from utils.networks.posthoc_ema import update_profiles
from utils.networks.state import EmaSchedule, TrainState, apply_gradients, select_parts, trained_parts
from utils.objectives.objective import Objective, row_period
from utils.training.augmentation import draw_augmentation, warp

# Random streams beside the training steps', which fold 0, 1, 2, ... into the seed's key: no run takes so many steps.
INIT = 2**31 - 1
VALIDATION = 2**31 - 2
# Folded into the key with which a codec draws.
AUGMENTATION = 1
# Metrics for `SkippedUpdates` alone, of a step that may leave its update out.
INTERNAL = ("is_skipped", "largest_gradient", "largest_gradient_norm")


def accumulate_microbatches(
    function: Callable[[PyTree], PyTree], examples: PyTree, grad_accum: int, period: int = 1
) -> PyTree:
    """Returns the mean of function(microbatch) over `grad_accum` microbatches of the examples, one after the other.

    Rows go to microbatches in turn, `period` at a time.
    """
    if grad_accum == 1:
        return function(examples)

    # In turn: whatever rows a device has, it has as many of each microbatch.
    def split(rows):
        blocks = rows.reshape(-1, grad_accum, period, *rows.shape[1:]).swapaxes(0, 1)
        return blocks.reshape(grad_accum, -1, *rows.shape[1:])

    # A loop rather than a sum of calls: one microbatch's activations are in memory at a time. All microbatches have one
    # size, so the mean of their means is the batch's.
    batches = jax.tree.map(split, examples)
    shapes = jax.eval_shape(function, jax.tree.map(lambda rows: rows[0], batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(lambda total, batch: (jax.tree.map(jnp.add, total, function(batch)), None), zeros, batches)
    return jax.tree.map(lambda x: x / grad_accum, total)


def draw_examples(
    key: Key[Array, ""], batch: Batch, objective: Objective, class_dropout_prob: float | Array, num_parts: int = 0
) -> dict[str, PyTree]:
    """Returns the batch with all that is random in its loss, per example.

    These are keys for the codec, the objective's draws, and which conditions are dropped (classifier-free guidance,
    arXiv:2207.12598). Of `num_parts` each is dropped by itself, too.
    """
    # A key for each purpose, so that none depends on how much another draws. All rows are drawn at once, before any
    # split into microbatches; noise, and what a codec draws, by JAX's own form of a key, which computes faster.
    codec_key, time_key, noise_key, dropout_key = jax.random.split(unroll(key), 4)
    examples = {
        "batch": batch,
        "codec_key": jax.random.split(roll(codec_key), batch.num_examples),
        "draws": objective.draw(time_key, roll(noise_key), batch.num_examples) | batch.draws(),
        "is_dropped": jax.random.bernoulli(dropout_key, class_dropout_prob, (batch.num_examples,)),
    }
    if num_parts:
        shape = (batch.num_examples, num_parts)
        examples["drops"] = jax.random.bernoulli(jax.random.fold_in(dropout_key, 1), class_dropout_prob, shape)
    return examples


def example_losses(
    params: PyTree,
    ema_params: PyTree,
    codec: Codec,
    examples: dict[str, PyTree],
    *,
    model: Network,
    objective: Objective,
) -> tuple[Array, dict[str, Array]]:
    """Returns (losses, metrics) of the examples, each (b,); `metrics` is {name: values}."""
    # Data at t = 1, in the codec's space. Images among the conditions change as theirs do.
    batch = examples["batch"]
    augmentation = examples.get("augmentation")
    change = [] if augmentation is None else [Partial(warp, parameters=augmentation)]
    x_1 = batch.to_latents(codec, examples["codec_key"], *change)

    # Rows without their condition teach the unconditional model, from which guidance leads away.
    is_dropped = examples["is_dropped"]
    null = model.condition.null(len(is_dropped))
    condition = drop_rows(is_dropped, null, model.condition.prepare(codec, batch.condition, *change))
    if "drops" in examples:
        condition = model.condition.drop_each(examples["drops"], condition)
    # The network knows how an image was changed also where its condition is dropped.
    if augmentation is not None:
        condition, null = (Change(tree, augmentation) for tree in (condition, null))

    # The network under both sets of parameters: objectives may take targets from the EMA.
    functions = (model_fn(model, params, with_inner=bool(model.config.inner_head)), model_fn(model, ema_params))
    return objective.loss(*functions, x_1, condition, examples["draws"] | {"is_dropped": is_dropped, "null": null})


def compute_gradients(
    state: TrainState,
    key: Key[Array, ""],
    batch: Batch,
    codec: Codec,
    *,
    model: Network,
    objective: Objective,
    grad_accum: int,
    class_dropout_prob: float | Array,
    augment_prob: float | Array = 0.0,
    frozen: tuple[str, ...] = (),
) -> tuple[PyTree, dict[str, Array]]:
    """Returns (gradients, mean metrics) of the objective's loss on a global batch. `l2_loss` is that loss, without that
    of an inner head, which has a part in the gradients.

    The gradients of `frozen` parts of the parameters are zero, and are not computed. `augment_prob` is that of each
    change of the images, where the network's condition is one of changed images.
    """

    def gradients(examples):
        def loss_fn(params):
            # Frozen parts are constants to autodiff: XLA drops what would only lead to their gradients.
            params = select_parts(params, frozen, jax.lax.stop_gradient(params))
            losses, metrics = example_losses(
                params, state.ema_params, codec, examples, model=model, objective=objective
            )
            # Over the global batch: the compiler adds the devices' parts.
            means = jax.tree.map(jnp.mean, {"l2_loss": losses, **metrics})
            # The inner head's loss is added to the gradients alone: l2_loss stays comparable with other models.
            inner = model.config.inner_weight * means["inner_loss"] if model.config.inner_head else 0
            return means["l2_loss"] + inner, means

        return jax.grad(loss_fn, has_aux=True)(state.params)

    # Microbatches keep whole periods of rows, as an objective may give rows different roles.
    num_parts = model.condition.num_parts if model.config.condition_dropout == "each" else 0
    examples = draw_examples(key, batch, objective, class_dropout_prob, num_parts)
    if isinstance(model.condition, Augmented):
        keys = jax.vmap(jax.random.fold_in, (0, None))(examples["codec_key"], AUGMENTATION)
        examples["augmentation"] = draw_augmentation(keys, model.condition.names, augment_prob)
    return accumulate_microbatches(gradients, examples, grad_accum, row_period(objective))


def train_step(
    state: TrainState,
    batch: Batch,
    codec: Codec,
    is_validation: bool | Array = False,
    *,
    model: Network,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    grad_accum: int,
    ema: EmaSchedule,
    frozen: tuple[str, ...] = (),
    skips_nonfinite: bool = False,
    is_elementwise: bool = True,
    is_whole: bool = True,
) -> tuple[TrainState, dict[str, Array]]:
    """Returns (next state, metrics) of one step of the optimizer on a global batch.

    With `is_validation`, the state and the images stay as they are, all conditions are kept, and noise and times are
    the same whatever the step: points of a curve differ by the parameters alone. The metrics are then those of the
    update that the batch would cause. As it is an argument of the compiled function, training and validation are
    compiled once.

    With `skips_nonfinite`, an update that is not finite changes nothing but the step. `is_elementwise` says that the
    optimizer treats each element by itself, and `is_whole` that every device has all of the state: small arrays are
    packed where both hold.
    """
    # The key follows from the step alone: a resumed run draws what it would have drawn.
    is_augmented = isinstance(model.condition, Augmented)
    grads, metrics = compute_gradients(
        state,
        jax.random.fold_in(unroll(state.key), jnp.where(is_validation, VALIDATION, state.step)),
        batch,
        codec,
        model=model,
        objective=objective,
        grad_accum=grad_accum,
        class_dropout_prob=jnp.where(is_validation, 0.0, model.config.class_dropout_prob),
        augment_prob=jnp.where(is_validation, 0.0, model.condition.prob) if is_augmented else 0.0,
        frozen=frozen,
    )

    # Parts on different devices, and beside frozen ones, stay as they are. The scope's name is for readers of traces.
    packing = Packing.of(state.params) if is_elementwise and is_whole and not frozen else None
    with jax.named_scope("optimizer"):
        old_state = map_parts(packing.pack_all, state) if packing else state
        packed = packing.pack(grads) if packing else grads
        new_state, updates = apply_gradients(old_state, packed, optimizer, ema.decay_at(state.step), frozen)
        metrics |= {"grad_norm": optax.tree.norm(packed), "update_norm": optax.tree.norm(updates)}
        is_kept = is_validation
        if skips_nonfinite:
            metrics |= find_nonfinite(metrics, grads)
            is_kept |= metrics["is_skipped"]

        # A select rather than a branch: the decision stays on the devices, and the host waits for nothing.
        new_state = map_parts(partial(select, is_kept), old_state, new_state)
        new_state = average_profiles(new_state, state.step + 1, is_validation, frozen)
        metrics |= {"param_norm": optax.tree.norm(new_state.params)}
        new_state = map_parts(packing.unpack_all, new_state) if packing else new_state
        return new_state.replace(step=jnp.where(is_validation, state.step, new_state.step)), metrics


def average_profiles(
    state: TrainState, step: Array, is_validation: bool | Array, frozen: tuple[str, ...]
) -> TrainState:
    """Returns the state after step number `step` with its parameters averaged into its EMA profiles.

    Profiles average over steps: a step whose update is left out counts with the parameters that it has kept.
    """
    profiles = update_profiles(state.ema_profiles, trained_parts(state.params, frozen), step)
    return state.replace(ema_profiles=select(is_validation, state.ema_profiles, profiles))


def map_parts(function: Callable, *states: TrainState) -> TrainState:
    """Returns the last state with function(that part of each state) as parameters, EMAs and optimizer's state."""
    names = ("params", "ema_params", "opt_state", "ema_profiles")
    parts = {name: function(*(getattr(state, name) for state in states)) for name in names}
    return states[-1].replace(**parts)


def select(condition: bool | Array, chosen: PyTree, other: PyTree) -> PyTree:
    """Returns one of two trees of arrays."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)


def find_nonfinite(metrics: dict[str, Array], grads: PyTree) -> dict[str, Array]:
    """Returns whether an update is not finite, and the largest gradient, for `SkippedUpdates`.

    An update is finite if its loss and the norms of gradients and update are: an infinite gradient can end as a finite
    update, but leaves Adam's second moment infinite for ever.
    """
    is_finite = jnp.isfinite(jnp.stack([metrics[name] for name in ("l2_loss", "grad_norm", "update_norm")])).all()
    # For the message that ends a run. NaN counts as infinity: both are the largest, and the first one is named.
    sizes = jnp.stack([optax.tree.norm(leaf) for leaf in jax.tree.leaves(grads)])
    sizes = jnp.where(jnp.isnan(sizes), jnp.inf, sizes)
    return {
        "is_skipped": ~is_finite,
        "largest_gradient": jnp.argmax(sizes),  # its place among the leaves
        "largest_gradient_norm": jnp.max(sizes),
    }


def jit_train_step(shardings: TrainState, metrics_sharding: NamedSharding, **static: Any) -> jax.stages.Wrapped:
    """Returns `train_step`, compiled for these static arguments; the next state takes the memory of the state."""
    # Shardings are fixed, so that the next state is laid out as this one and fits the compiled step again.
    is_whole = all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))
    step = partial(train_step, **static, is_whole=is_whole)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, metrics_sharding))


@partial(jax.jit, static_argnames=("model", "objective"))
def loss_at_time(
    params: PyTree,
    codec: Codec,
    key: Key[Array, ""],
    batch: Batch,
    t: Array,
    *,
    model: Network,
    objective: Objective,
) -> Array:
    """Returns the mean loss of a batch, all conditions kept, with every time set to `t`; the noise is that of any t."""
    examples = draw_examples(key, batch, objective, class_dropout_prob=0.0)
    # Replaced after they are drawn, so that the noise does not depend on t. As an array, t is traced: one compilation.
    examples["draws"] |= {"t": jnp.full_like(examples["draws"]["t"], t)}
    losses, _ = example_losses(params, params, codec, examples, model=model, objective=objective)
    return losses.mean()
