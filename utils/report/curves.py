"""Curves of a report: thinned to what a screen can show, with every extreme kept, and apart from the losses by t."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.images.films import spread
from utils.runs.axes import read_clock

MAX_POINTS = 800  # of a curve; a chart is some 400 pixels wide
LOSS_BY_T = "_loss_t/"  # in names such as validation_loss_t/0.5


def thin_curve(points: Mapping[int, float]) -> dict[str, Any]:
    """Returns a curve {step: value} as lists, with NaN as None: {"steps", "values"}.

    Of a curve of more than MAX_POINTS points they hold the first and the last one, and the lowest and the highest one
    of each of MAX_POINTS / 2 sections. Then there are also the sections' middle steps and mean values, for smoothing:
    {"mean_steps", "means", "section": how many points a section has}.
    """
    steps = np.fromiter(points.keys(), np.int64, len(points))
    values = np.fromiter(points.values(), np.float64, len(points))
    if len(steps) <= MAX_POINTS:
        return {"steps": steps.tolist(), "values": _to_list(values)}

    # Sections of equally many points. NaN is no extreme, but a section of nothing else keeps one.
    sections = np.array_split(np.arange(len(steps)), MAX_POINTS // 2)
    low = np.where(np.isnan(values), np.inf, values)
    high = np.where(np.isnan(values), -np.inf, values)
    extremes = [
        section[find(part[section])] for section in sections for find, part in ((np.argmin, low), (np.argmax, high))
    ]
    kept = sorted({0, len(steps) - 1, *map(int, extremes)})
    means = np.array([_mean(values[section]) for section in sections])
    return {
        "steps": steps[kept].tolist(),
        "values": _to_list(values[kept]),
        "mean_steps": [int(steps[section[len(section) // 2]]) for section in sections],
        "means": _to_list(means),
        "section": len(steps) / len(sections),
    }


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _to_list(values: np.ndarray) -> list[float | None]:
    """Returns values of six digits, which is more than an axis shows; None where they are not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def clock_curve(lines: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Returns what `axes.read_clock` does, {"steps", "seconds"}, thinned evenly to MAX_POINTS."""
    steps, seconds = read_clock(lines)
    kept = spread(len(steps), MAX_POINTS)
    return {"steps": [steps[i] for i in kept], "seconds": [round(seconds[i], 1) for i in kept]}


def split_curves(
    curves: Mapping[str, Mapping[int, float]],
) -> tuple[dict[str, Mapping[int, float]], dict[str, dict[float, Mapping[int, float]]]]:
    """Returns (curves over steps, losses by t: {"training_loss_t": {t: {step: loss}}}). Their means over t are curves
    over steps."""
    over_steps: dict[str, Mapping[int, float]] = {}
    by_t: dict[str, dict[float, Mapping[int, float]]] = {}
    for name, curve in curves.items():
        group, separator, place = name.partition(LOSS_BY_T)
        # A time is a number; the mean over t is a curve as others are.
        try:
            t = float(place) if separator else math.nan
        except ValueError:  # the mean
            t = math.nan
        if math.isfinite(t):
            by_t.setdefault(f"{group}{LOSS_BY_T}".rstrip("/"), {})[t] = curve
        else:
            over_steps[name] = curve
    return over_steps, by_t


def loss_frames(by_t: Mapping[str, Mapping[float, Mapping[int, float]]], limit: int) -> list[dict[str, Any]]:
    """Returns the losses by t of evaluations, `limit` at most, evenly spaced: [{"step", "losses": {name: {"t",
    "values"}}}]."""
    steps = sorted({step for curves in by_t.values() for curve in curves.values() for step in curve})
    frames = []
    for step in (steps[i] for i in spread(len(steps), limit)):
        # An evaluation may lack some times, as where their number was changed.
        losses = {}
        for name, curves in by_t.items():
            places = sorted(t for t, curve in curves.items() if step in curve)
            losses[name] = {"t": places, "values": _to_list(np.array([curves[t][step] for t in places]))}
        frames.append({"step": step, "losses": losses})
    return frames
