"""Arrays -> figures and animations. Knows no model and no wandb."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import color_sequences
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter
from PIL import Image


def image_table(
    images: UInt8[np.ndarray, "rows columns h w c"],
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """A figure of images (grey or RGB) in rows and columns, titled on the left and on top."""
    rows, columns, height, _, _ = images.shape
    size = 0.65 if height < 32 else 1.15  # inches; tiny images are easier to recognise small
    left = 0.1 + 0.085 * max([len(name) for name in row_titles], default=0)  # inches for the longest row title
    top = 0.1 + 0.3 * bool(title) + 0.16 * max([1 + name.count("\n") for name in column_titles], default=0)
    width, total = left + columns * size, top + rows * size
    figure = Figure(figsize=(width, total), dpi=100 if height < 128 else 160)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left / width, 0.02 / rows, 1, 1 - top / total, wspace=0.04, hspace=0.04)
    # Of a few pixels the eye makes out more when they are smoothed; other small images are shown as they are.
    interpolation = "bicubic" if height < 16 else "nearest" if height < 128 else "antialiased"
    for row in range(rows):
        for column in range(columns):
            axis = axes[row, column]
            axis.set_axis_off()
            axis.imshow(images[row, column].squeeze(), cmap="gray", vmin=0, vmax=255, interpolation=interpolation)
    for axis, name in zip(axes[0], column_titles, strict=False):
        axis.set_title(name, fontsize=8, pad=4)
    for axis, name in zip(axes[:, 0], row_titles, strict=False):
        axis.text(-0.06, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=8)
    if title:
        fontsize = min(10, 130 * width / len(title))  # points at which a long title fits a narrow figure
        figure.suptitle(title, fontsize=fontsize, y=1 - 0.08 / total, va="top")
    return figure


def sample_grid(
    images: UInt8[np.ndarray, "n h w c"], labels: np.ndarray, class_names: Sequence[str], title: str = ""
) -> Figure:
    """Samples ordered by label in a near-square table, each under the name of its class."""
    order = np.argsort(labels, kind="stable")
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    table = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    table[: len(images)] = images[order]
    figure = image_table(table.reshape(rows, columns, *images.shape[1:]), title=title)
    names = [class_names[label] for label in labels[order]]
    for axis, name in zip(figure.axes, names, strict=False):
        text = name if len(name) <= 16 else name[:15] + "…"
        axis.text(0.03, 0.97, text, transform=axis.transAxes, va="top", fontsize=6, color="white",
                  bbox={"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0})  # fmt: skip
    return figure


def tile_images(images: UInt8[np.ndarray, "n h w c"], least_side: int = 64) -> UInt8[np.ndarray, "height width 3"]:
    """One RGB image of all, in a near-square grid with a border; tiny images are enlarged to `least_side` pixels."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    factor = max(1, least_side // max(height, width))
    cells = np.full((rows * columns, height * factor + 2, width * factor + 2, 3), 255, np.uint8)
    enlarged = images.repeat(factor, axis=1).repeat(factor, axis=2)
    cells[:count, 1:-1, 1:-1] = enlarged if channels == 3 else enlarged.repeat(3, axis=-1)
    table = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    return table.reshape(rows * cells.shape[1], columns * cells.shape[2], 3)


def save_film(path: Path, frames: UInt8[np.ndarray, "frames n h w c"], file_format: str, seconds: float) -> None:
    """An animation of the frames, each a grid of all images; the first is held for half a second, the last for two."""
    pages = [Image.fromarray(tile_images(images)) for images in frames]
    durations = [max(20, round(1000 * seconds / len(pages)))] * len(pages)
    durations[0], durations[-1] = 500, 2000
    pages[0].save(
        path,
        format=file_format.upper(),
        save_all=True,
        append_images=pages[1:],
        duration=durations,
        loop=0,
        **({"quality": 90} if file_format == "webp" else {}),
    )


def curves(
    points: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str, markers: bool = True
) -> Figure:
    """A figure of named curves of (x, y) points, x logarithmic, and y where it spans more than a factor of five; with
    `markers` every point is marked, and its x stands on the axis."""
    figure = Figure(figsize=(5.5, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, pairs in points.items():
        axes.plot(*zip(*sorted(pairs), strict=True), marker="o" if markers else None, label=name)
    xs, ys = ({pair[i] for pairs in points.values() for pair in pairs} for i in range(2))
    axes.set_xscale("log")
    if markers:
        axes.set_xticks(sorted(xs), [f"{x:g}" for x in sorted(xs)])
    else:
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if max(ys) > 5 * min(ys):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def running_mean(values: Sequence[float], window: int) -> Float[np.ndarray, " n"]:
    """Mean of each value and those before it, `window` in all, or as many as there are."""
    return np.array([np.mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)])


def metric_curves(
    points: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], smooth: int = 1, log_y: bool = False
) -> Figure:
    """A figure of {metric: {run: (step, value) points}}: an axis for each metric, a colour for each run.

    With `smooth` above 1, the running mean of that many values is drawn over the values themselves.
    """
    runs = list(dict.fromkeys(run for curves in points.values() for run in curves))
    palette = color_sequences["tab10" if len(runs) <= 10 else "tab20"]
    colours = {run: palette[i % len(palette)] for i, run in enumerate(runs)}
    columns = len(points) if len(points) <= 3 else min(4, math.ceil(math.sqrt(len(points))))
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 0.6 + 2.5 * rows), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (metric, curves) in zip(axes, points.items(), strict=False):
        for run in (run for run in curves if curves[run]):
            steps, values = zip(*curves[run], strict=True)
            marker = "." if len(steps) <= 30 else None  # a single point makes no line
            if smooth > 1:
                axis.plot(steps, values, color=colours[run], alpha=0.25)
                values = running_mean(values, smooth)
            axis.plot(steps, values, color=colours[run], marker=marker)
        if log_y and any(value > 0 for curve in curves.values() for _, value in curve):
            axis.set_yscale("log", nonpositive="mask")
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.minorticks_off()
        axis.set_title(metric, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(points) :]:
        axis.set_axis_off()
    lines = [Line2D([], [], color=colour) for colour in colours.values()]
    figure.legend(lines, runs, loc="outside upper center", ncols=min(len(runs), columns + 1), fontsize=8)
    return figure
