"""Divergence: updates that are not finite are left out and counted, or end the run before its state is saved."""

from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from utils.base.errors import UserError
from utils.runs.checkpoint import Checkpoints

tree_norm = jax.jit(optax.tree.norm)

# Metrics of a step that are for `SkippedUpdates` alone (see `train_step.skip_nonfinite_update`).
INTERNAL = ("is_skipped", "largest_gradient", "largest_gradient_norm")
TOTAL, IN_A_ROW = "skipped_updates", "skipped_in_a_row"  # beside the position in the data, in a checkpoint


class SkippedUpdates:
    """Counts the updates that were left out; the run ends with `limit` of them in a row, at 0 with none.

    The counts are saved with the position in the data, so that a run that is continued counts on.
    """

    def __init__(self, limit: int, checkpoints: Checkpoints, params: PyTree, position: dict[str, Any]):
        """`params`: a tree of the parameters' structure, for the gradients' names. `position`: as saved."""
        self.limit, self.checkpoints = limit, checkpoints
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        self.names = ["/".join(str(key.key) for key in path) for path in paths]
        self.total, self.in_a_row = position.get(TOTAL, 0), position.get(IN_A_ROW, 0)

    def extend_position(self, position: dict[str, Any]) -> dict[str, Any]:
        """The position in the data with the counts; without them where updates are not left out."""
        return position | {TOTAL: self.total, IN_A_ROW: self.in_a_row} if self.limit else position

    def count(self, metrics: dict[str, Any], step: int) -> dict[str, Any]:
        """The metrics of a finished step as they are logged: with the number of updates left out so far, without what
        is not finite. UserError where too many in a row were left out."""
        if not self.limit:
            return metrics
        is_skipped = bool(metrics["is_skipped"])
        self.total += is_skipped
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0
        if self.in_a_row >= self.limit:
            name = self.names[int(metrics["largest_gradient"])]
            loss, update, gradient = (
                float(metrics[name]) for name in ("l2_loss", "update_norm", "largest_gradient_norm")
            )
            raise UserError(
                f"--skip_nonfinite={self.limit}: the last {self.in_a_row} updates were not finite; at step {step} the "
                f"loss is {loss:g}, the norm of the update {update:g}, and the largest gradient that of {name} (norm "
                f"{gradient:g}); {_way_on(self.checkpoints)}"
            )
        logged = {name: value for name, value in metrics.items() if name not in INTERNAL}
        if is_skipped:
            logged = {name: value for name, value in logged.items() if np.isfinite(value)}
        return logged | {TOTAL: self.total}


def check_finite(
    metrics: dict[str, Any], step: int, checkpoints: Checkpoints, ema_params: PyTree | None = None
) -> None:
    """Ends a run that has diverged, before its state is saved over a good one. The loss of an update that was left out
    may be anything."""
    values = [metrics["param_norm"]]
    if not metrics.get("is_skipped", False):
        values.append(metrics["l2_loss"])
    if ema_params is not None:
        values.append(tree_norm(ema_params))
    if not np.isfinite(values).all():
        raise UserError(f"loss or parameters are no longer finite at step {step}; {_way_on(checkpoints)}")


def _way_on(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    saved = checkpoints.steps()
    way = f"the same command continues from step {saved[0]}: run it" if saved else "start again"
    return f"{way} with a lower --model.lr, or with --model.dtype float32"
