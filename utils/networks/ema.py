"""The exponential moving average (EMA) of a model's parameters, and how its decay grows."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class EmaSchedule:
    """The decay of the EMA at update n = 0, 1, ...: `decay`, but with `has_warmup` no more than (1 + n) / (10 + n)."""

    decay: float
    has_warmup: bool = False

    @classmethod
    def of_run(cls, config: Mapping[str, Any] | ConfigDict) -> "EmaSchedule":
        """The schedule of a run's configuration. The recipe's rate 1 means "no EMA" (decay 0), not "frozen"."""
        rate = config["model"]["target_update_rate"]
        return cls(0.0 if rate == 1 else rate, bool(config.get("ema_warmup")))

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


YOUNG = 0.1  # initial weight above which an EMA draws other images than the parameters


def young_ema_hint(saved: Mapping[str, Any], step: int) -> str | None:
    """A warning that the EMA at `step` of a run of the configuration `saved` is mostly initial parameters; None where
    it is not."""
    weight = EmaSchedule.of_run(saved).initial_weight(step)
    if weight < YOUNG:
        return None
    initial = "the parameters that the run started from" if saved.get("load_dir") else "initial parameters, noise"
    return f"the EMA at step {step:,} is still {weight:.0%} {initial}; --params raw takes the parameters themselves"
