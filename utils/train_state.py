"""What a run carries from step to step: step count, parameters, their EMA, optimizer state, random key."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree


class TrainState(flax.struct.PyTreeNode):
    """`step` counts finished steps; `key` never changes: step i draws from fold_in(key, i)."""

    # Trees of arrays, or of their shapes or shardings.
    step: PyTree  # int32 ()
    params: PyTree
    ema_params: PyTree
    opt_state: PyTree
    key: PyTree  # a typed key ()


def make_optimizer(lr: float, beta1: float, beta2: float) -> optax.GradientTransformation:
    """Adam (arXiv:1412.6980) as the recipe has it: constant rate, no decay, warm-up or clipping."""
    return optax.adam(lr, b1=beta1, b2=beta2)


def create_train_state(params: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> TrainState:
    """A state at step 0 whose EMA starts as the parameters themselves (a copy: the state is donated)."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        key=key,
    )


@dataclasses.dataclass(frozen=True)
class EmaSchedule:
    """The decay of the EMA at update n = 0, 1, ...: `decay`, but with `has_warmup` no more than (1 + n) / (10 + n)."""

    decay: float
    has_warmup: bool = False

    def decay_at(self, step: Int[Array, ""]) -> float | Float[Array, ""]:
        return jnp.minimum(self.decay, (1 + step) / (10 + step)) if self.has_warmup else self.decay

    def initial_weight(self, num_steps: int) -> float:
        """Weight in [0, 1] of the initial parameters after `num_steps` updates: the product of the decays."""
        steps = np.arange(num_steps, dtype=np.float64)
        decays = np.full(num_steps, self.decay)
        if self.has_warmup:
            decays = np.minimum(decays, (1 + steps) / (10 + steps))
        return float(np.prod(decays))


def update_ema(ema_params: PyTree, params: PyTree, ema_decay: float | Float[Array, ""]) -> PyTree:
    """Exponential moving average: decay * ema + (1 - decay) * params, of the parameters just updated."""
    return jax.tree.map(lambda ema, new: ema_decay * ema + (1 - ema_decay) * new, ema_params, params)


def apply_gradients(
    state: TrainState,
    grads: PyTree,
    optimizer: optax.GradientTransformation,
    ema_decay: float | Float[Array, ""],
) -> tuple[TrainState, PyTree]:
    """(state one step on, the parameter updates that were added)."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = update_ema(state.ema_params, params, ema_decay)
    return state.replace(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state), updates
