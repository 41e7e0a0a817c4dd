"""--keep_best METRIC:COUNT: the checkpoints with the best scores, which stay on disk beside the newest ones."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.base.hosts import broadcast, is_first
from utils.base.messages import UserError
from utils.metrics.metrics import METRICS, Metric
from utils.trackers.trackers import METRICS_FILE, read_metrics

# Names of scores in --keep_best, and in metrics.jsonl where that is another: the validation loss over all t.
LOSS = "loss"
LOGGED = {LOSS: "validation_loss_t/mean"}
# It needs a file that trainings do not take.
NEVER_LOGGED = "inception_score"


class KeepBest(NamedTuple):
    """The value of --keep_best: a score of evaluations, and how many checkpoints to keep for it."""

    score: str
    count: int

    @classmethod
    def parse(cls, text: str) -> "KeepBest":
        """Raises UserError for anything but SCORE:COUNT."""
        match = re.fullmatch(r"(\w+):([1-9]\d{0,5})", text)
        if match is None:
            raise UserError(f"--keep_best={text}: give a score and a number of checkpoints, such as fid:3 or {LOSS}:3")
        return cls(match[1], int(match[2]))


def check_keep_best(text: str, metrics: Sequence[Metric], has_statistics: bool) -> None:
    """Raises UserError where --keep_best=`text` names a score that the run does not log: those of its `metrics` against
    --fid_stats, if it has them, and the validation loss."""
    score = KeepBest.parse(text).score
    known = [LOSS]
    if has_statistics:
        chosen = [metric for metric in metrics if str(metric) != NEVER_LOGGED]
        known += [name for metric in chosen for name in metric.columns]
    if score not in known:
        others = "--metrics has more" if has_statistics else "--fid_stats brings others"
        raise UserError(f"--keep_best={text}: {score} is not logged by this run; use {', '.join(known)} ({others})")


def is_higher_better(score: str) -> bool:
    """Returns whether a score of evaluations is better where it is higher; losses and unknown ones are not."""
    return any(metric.is_higher_better for metric in METRICS if score in metric.columns)


class BestSteps:
    """Finds the steps of a run with the best scores in its metrics.jsonl; a policy by which Orbax preserves them."""

    def __init__(self, run_dir: Path, keep: KeepBest):
        self.path = Path(run_dir) / METRICS_FILE
        self.keep = keep

    def find(self, steps: Sequence[int]) -> dict[int, float]:
        """Returns {step: score} of the best among `steps`, best first, at most as many as are kept; equal ones newest
        first."""
        name = LOGGED.get(self.keep.score, self.keep.score)
        lines = read_metrics(self.path)
        scores = {line["step"]: line[name] for line in lines if isinstance(line.get(name), (int, float))}
        known = {step: scores[step] for step in steps if step in scores and math.isfinite(scores[step])}
        sign = -1 if is_higher_better(self.keep.score) else 1
        best = sorted(known, key=lambda step: (sign * known[step], -step))[: self.keep.count]
        return {step: known[step] for step in best}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns which checkpoints are among the best. All processes ask for it in the same save."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        # The first process alone has the log.
        best = broadcast(list(self.find(steps)) if is_first() else None)
        return [step in best for step in steps]

    def describe(self, steps: Sequence[int]) -> str:
        """Returns the best of `steps` and their scores, in words."""
        best = ", ".join(f"{score:.4g} at step {step}" for step, score in self.find(steps).items())
        return f"best {self.keep.score}: {best or 'none was logged'}"
