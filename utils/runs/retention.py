"""Which checkpoints of a run are kept."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import orbax.checkpoint as ocp


class Retention(NamedTuple):
    """The newest `keep_last` (None: all), those at multiples of the step `keep_every`, and those of `best`, a policy of
    Orbax such as BestSteps (utils/runs/best.py)."""

    keep_last: int | None = None
    keep_every: int | None = None
    best: Any = None

    def options(self) -> ocp.CheckpointManagerOptions:
        """Returns the rules as Orbax applies them to a local folder."""
        if self.best is None:
            return ocp.CheckpointManagerOptions(max_to_keep=self.keep_last, keep_period=self.keep_every)
        policies = [ocp.checkpoint_managers.LatestN(self.keep_last), self.best]
        if self.keep_every is not None:
            policies.append(ocp.checkpoint_managers.EveryNSteps(self.keep_every))
        policy = ocp.checkpoint_managers.AnyPreservationPolicy(policies)
        return ocp.CheckpointManagerOptions(preservation_policy=policy)

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Returns which of these steps are kept, by the same rules, for object storage."""
        ascending = sorted(steps)
        if self.keep_last is None:
            return set(ascending)
        multiples = {step for step in ascending if self.keep_every and step % self.keep_every == 0}
        best = self.best.find(ascending) if self.best is not None else {}
        return {*ascending[-self.keep_last :], *multiples, *best}
