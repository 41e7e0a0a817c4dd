"""Axes over which curves of a run are drawn: its steps, the images that it has seen, or the hours of its training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.base.messages import UserError
from utils.runs.comparison import read_run_config
from utils.trackers.trackers import read_log

AXES = {"steps": "step", "images": "images seen", "hours": "hours"}  # {axis: its title}


def read_clock(lines: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    """Returns (steps, seconds for which the run had been running at each), both ascending, from the lines of its
    metrics.jsonl; empty lists for older runs, which have not recorded them."""
    # The last line of a step counts. Seconds that fall, as in a file put together by hand, are left out.
    known = {line["step"]: line["seconds"] for line in lines if type(line.get("seconds")) in (int, float)}
    steps: list[int] = []
    seconds: list[float] = []
    for step, value in sorted(known.items()):
        if math.isfinite(value) and value >= (seconds[-1] if seconds else 0):
            steps.append(step)
            seconds.append(float(value))
    return steps, seconds


def place_steps(run: Path, axis: str, steps: Sequence[int]) -> list[float]:
    """Returns where steps of a run, its folder or its metrics.jsonl, stand on one of AXES.

    Hours between two logged steps are interpolated. Raises UserError, naming --x, where the run has not recorded what
    the axis takes.
    """
    if axis == "images":
        batch_size = read_run_config(run).get("batch_size")
        if type(batch_size) is not int:
            raise UserError(f"--x=images: {run} has no config.json that says its batch size; use --x steps")
        return [float(step * batch_size) for step in steps]
    if axis == "hours":
        known, seconds = read_clock(read_log(run))
        if not known:
            raise UserError(f"--x=hours: {run} has recorded no times, as older runs have not; use --x steps")
        return (np.interp(steps, [0, *known], [0.0, *seconds]) / 3600).tolist()
    return [float(step) for step in steps]
