"""The interface of objectives: what is drawn for a loss, the loss itself, and the velocity that samplers integrate.

Training, validation, loss by t, reconstructions and sampling all go through it, and know nothing else of how a model
learns. Time runs from noise x_0 at t = 0 to data x_1 at t = 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Key, PyTree

# The network: model_fn(x_t, t, condition), and of objectives whose network is given the step, too:
# model_fn(x_t, t, condition, step). The condition is a pytree of arrays (b, ...), which objectives pass through
# (utils/conditions/condition.py).
ModelFn = Callable[..., Float[Array, "b ..."]]
# velocity_fn(x, t, t_next): the average velocity from t to t_next, of which an instantaneous field uses t alone.
VelocityFn = Callable[[Float[Array, "b ..."], Float[Array, " b"], Float[Array, " b"]], Float[Array, "b ..."]]
# Per example, first axis = batch; "t" is always there.
Draws = dict[str, Array]


class Heads(NamedTuple):
    """Outputs of a network with an inner head: of its last layer, and of another output layer after an early block.

    In training, `model_fn` of such a network returns both (internal guidance, arXiv:2512.24176).
    """

    final: Float[Array, "b ..."]
    inner: Float[Array, "b ..."]


def has_inner_loss(objective: Any) -> bool:
    """Returns whether an objective (an instance or its class) has a loss for a network's inner head."""
    return getattr(objective, "HAS_INNER_LOSS", False)


def row_period(objective: "Objective") -> int:
    """Returns the number of rows after which their roles in a batch repeat; 1 where they have none."""
    return getattr(objective, "row_period", 1)


def has_guidance(objective: Any) -> bool:
    """Returns whether samples of a model with this objective (an instance or its class) can be guided."""
    return getattr(objective, "HAS_GUIDANCE", True)


def noise_scale(objective: Any) -> float:
    """Returns the scale s of an objective's noise x_0 = s n, n standard normal; 1 by default."""
    return getattr(objective, "noise_scale", 1.0)


def ends_with_euler(objective: Any) -> bool:
    """Returns whether Heun's method ends with an Euler step on the velocity of this objective."""
    return getattr(objective, "ends_with_euler", False)


def scale_noise(noise: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """Returns `scale` times the noise; the noise itself where the scale is 1, which adds no operation."""
    return noise if scale == 1 else scale * noise


# Members that an objective may lack are read by `getattr`, as in the functions above.
@runtime_checkable
class Objective(Protocol):
    """A way of learning. Immutable and hashable, as it is a static argument of the compiled steps.

    An objective may also have:
    - `MODEL_DEFAULTS` {name: value}: defaults of --model.* that differ for it.
    - `row_period`: the number of rows after which their roles repeat; microbatches and devices get whole periods.
    - `SOLVERS`: the solvers that fit its velocity; by default all ODE solvers and `sde`.
    - `NEEDS_UNIFORM_STEPS`: whether it learns steps of equal length alone; False by default.
    - `check_steps(num_steps)`: the reason why it cannot be sampled in `num_steps` steps; empty where it can.
    - `time_grid(spacing)`: grid(step, num_steps) of solvers whose times are the objective's own (`Solver.grid`), and
      `max_grid_steps`, the most steps that it has times for.
    - `HAS_GUIDANCE`: whether its samples can be guided; False where that is part of what is learned.
    - `HAS_INNER_LOSS`: whether its loss takes `Heads`, and returns the loss of the inner head as the metric
      `inner_loss`; False by default.
    - `noise_scale`: s of the noise x_0 = s n; 1 by default. The objective's loss has to scale by it, as samplers do.
    - `ends_with_euler`: whether Heun's last step is Euler's, as the velocity at t = 1 says little; False by default.
    - `TAKES_COUPLING`: whether its noise may depend on the data (--coupling); True by default. Its loss then has to
      take the noise from `draw_noise` of utils/objectives/flow_matching.py, or from "x_0" of the draws.
    """

    def draw(self, time_key: Key[Array, ""], noise_key: Key[Array, ""], num_examples: int) -> Draws:
        """Draws everything random in the loss of `num_examples` examples, as small as possible: keys rather than noise.

        Row i must not depend on how a batch is split over devices or microbatches.
        """

    def loss(
        self,
        model_fn: ModelFn,
        ema_model_fn: ModelFn,
        x_1: Float[Array, "b ..."],
        condition: PyTree,
        draws: Draws,
    ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
        """Returns (loss, other metrics to log), all (b,) and float32. `ema_model_fn` is for targets from the EMA.

        Besides the results of `draw`, `draws` has "is_dropped" (b,), whether `condition` is dropped, and "null", which
        is "no condition" for each example.
        """

    def corrupt(self, x_1: Float[Array, "b ..."], draws: Draws) -> Float[Array, "b ..."]:
        """Returns what the network sees of x_1 at the times and with the noise of `draws`."""

    def predict_data(
        self, model_fn: ModelFn, x_t: Float[Array, "b ..."], t: Float[Array, " b"], condition: PyTree
    ) -> Float[Array, "b ..."]:
        """Returns x_1 as one evaluation of the network at x_t, times t (b,), predicts it."""

    def velocity(self, model_fn: ModelFn, condition: PyTree) -> VelocityFn:
        """Returns the field whose integration from t = 0 to 1 turns noise into data."""
