"""The state of a training: parameters, their exponential moving average (EMA), optimizer, step count and random key."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class EmaSchedule:
    """The decay of the EMA at update n = 0, 1, ...: `decay`, but with `has_warmup` no more than (1 + n) / (10 + n)."""

    decay: float
    has_warmup: bool = False

    @classmethod
    def of_run(cls, config: Mapping[str, Any] | ConfigDict) -> "EmaSchedule":
        """Returns the schedule of a run's configuration. The recipe's rate 1 means "no EMA" (decay 0), not "frozen"."""
        rate = config["model"]["target_update_rate"]
        return cls(0.0 if rate == 1 else rate, bool(config.get("ema_warmup")))

    def decay_at(self, step: Int[Array, ""]) -> float | Float[Array, ""]:
        return jnp.minimum(self.decay, (1 + step) / (10 + step)) if self.has_warmup else self.decay

    def initial_weight(self, num_steps: int) -> float:
        """Returns the weight in [0, 1] of the initial parameters after `num_steps` updates: the decays' product."""
        # In float64: a run has many factors close to 1.
        steps = np.arange(num_steps, dtype=np.float64)
        decays = np.full(num_steps, self.decay)
        if self.has_warmup:
            decays = np.minimum(decays, (1 + steps) / (10 + steps))
        return float(np.prod(decays))


def update_ema(ema_params: PyTree, params: PyTree, ema_decay: float | Float[Array, ""]) -> PyTree:
    """Returns decay * ema + (1 - decay) * params, given the parameters just updated."""
    return jax.tree.map(lambda ema, new: ema_decay * ema + (1 - ema_decay) * new, ema_params, params)


YOUNG = 0.1  # initial weight above which an EMA draws other images than the parameters


def young_ema_hint(saved: Mapping[str, Any], step: int) -> str | None:
    """Returns a warning that the EMA at `step` still holds much of the initial parameters; None where it does not.

    `saved` is the configuration of the run.
    """
    weight = EmaSchedule.of_run(saved).initial_weight(step)
    if weight < YOUNG:
        return None
    # What that weight falls on: noise, unless the run started from the parameters of another.
    initial = "the parameters that the run started from" if saved.get("load_dir") else "initial parameters, noise"
    profiles = saved.get("ema_profiles")
    other = f"--params ema:{profiles[-1]} takes an EMA that forgets them" if profiles else ""
    return (
        f"the EMA at step {step:,} is still {weight:.0%} {initial}; "
        f"{other or '--params raw takes the parameters themselves'}"
    )


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step of training reads and replaces.

    `step` counts finished steps. `key` never changes: step i draws from fold_in(key, i), so that a resumed run draws
    what an uninterrupted one would.
    """

    # Trees of arrays, or of their shapes or shardings.
    step: PyTree  # int32 ()
    params: PyTree
    ema_params: PyTree
    opt_state: PyTree
    key: PyTree  # a typed key ()
    # {width: EMA of the trained parts}, by --ema_profiles; see utils/networks/posthoc_ema.py.
    ema_profiles: PyTree = flax.struct.field(default_factory=dict)


def select_parts(params: PyTree, frozen: tuple[str, ...], of_frozen: PyTree) -> PyTree:
    """Returns the top-level parts of `params`, with those named in `frozen` from `of_frozen` instead."""
    return {part: of_frozen[part] if part in frozen else tree for part, tree in params.items()} if frozen else params


def trained_parts(params: PyTree, frozen: tuple[str, ...]) -> PyTree:
    """Returns the top-level parts of `params` that are not `frozen`."""
    return {part: tree for part, tree in params.items() if part not in frozen} if frozen else params


def create_train_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    profiles: Sequence[str] = (),
    frozen: tuple[str, ...] = (),
) -> TrainState:
    """Returns a state at step 0 whose EMA starts as the parameters themselves.

    `profiles` are the widths of power-function EMAs of all parts but the `frozen` ones; they start as zeros, which
    their first update replaces.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: steps donate the state, and one buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        key=key,
        ema_profiles={width: jax.tree.map(jnp.zeros_like, trained_parts(params, frozen)) for width in profiles},
    )


def apply_gradients(
    state: TrainState,
    grads: PyTree,
    optimizer: optax.GradientTransformation,
    ema_decay: float | Float[Array, ""],
    frozen: tuple[str, ...] = (),
) -> tuple[TrainState, PyTree]:
    """Returns (state one step on, the updates added to the parameters). `frozen` parts stay the same, bit for bit."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    # Frozen parts are taken over rather than recomputed: averaging equal numbers would already round.
    params = select_parts(optax.apply_updates(state.params, updates), frozen, state.params)
    ema_params = select_parts(update_ema(state.ema_params, params, ema_decay), frozen, state.ema_params)
    return state.replace(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state), updates
