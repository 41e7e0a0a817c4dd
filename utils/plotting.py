"""Arrays -> figures. Knows no model, no file and no wandb."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter


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
