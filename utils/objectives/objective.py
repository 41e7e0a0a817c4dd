"""The interface of objectives: what is drawn for a loss, the loss itself, and the velocity that samplers integrate.

Training, validation, loss by t, reconstructions and sampling all go through it, and know nothing else of how a model
learns. Time runs from noise x_0 at t = 0 to data x_1 at t = 1.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

# The network without label dropout: model_fn(x_t, t, labels).
ModelFn = Callable[[Float[Array, "b ..."], Float[Array, " b"], Int[Array, " b"]], Float[Array, "b ..."]]
# velocity_fn(x, t, t_next): the average velocity from t to t_next, of which an instantaneous field uses t alone.
VelocityFn = Callable[[Float[Array, "b ..."], Float[Array, " b"], Float[Array, " b"]], Float[Array, "b ..."]]
# Per example, first axis = batch; "t" is always there.
Draws = dict[str, Array]


@runtime_checkable
class Objective(Protocol):
    """Immutable and hashable: a static argument of the compiled steps."""

    def draw(self, time_key: Key[Array, ""], noise_key: Key[Array, ""], num_examples: int) -> Draws:
        """Everything random in the loss of `num_examples` examples, as small as possible: keys rather than noise.

        Row i must not depend on how a batch is split over devices or microbatches.
        """

    def loss(
        self,
        model_fn: ModelFn,
        ema_model_fn: ModelFn,
        x_1: Float[Array, "b ..."],
        labels: Int[Array, " b"],
        draws: Draws,
    ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
        """(loss, other metrics to log), all per example and float32. `ema_model_fn` is for targets from the EMA."""

    def corrupt(self, x_1: Float[Array, "b ..."], draws: Draws) -> Float[Array, "b ..."]:
        """What the network sees of x_1 at the times and with the noise of `draws`."""

    def predict_data(
        self, model_fn: ModelFn, x_t: Float[Array, "b ..."], t: Float[Array, " b"], labels: Int[Array, " b"]
    ) -> Float[Array, "b ..."]:
        """x_1 as one evaluation of the network at x_t predicts it."""

    def velocity(self, model_fn: ModelFn, labels: Int[Array, " b"]) -> VelocityFn:
        """The field whose integration from t = 0 to 1 turns noise into data."""
