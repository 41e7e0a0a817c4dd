"""Arrays -> figures and animations. Knows no model and no wandb."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import color_sequences
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter
from PIL import Image

GAP = 3  # pixels between images in a table


class _Cell(NamedTuple):
    """How an image of a table is drawn: as so many pixels, enlarged or reduced by Pillow's filter."""

    height: int
    width: int
    resample: Image.Resampling
    dpi: int

    @classmethod
    def of(cls, height: int, width: int) -> "_Cell":
        longer = max(height, width)
        if longer < 16:  # of a few pixels the eye makes out more when they are smoothed
            factor, resample = max(1, 64 // longer), Image.Resampling.BICUBIC
        elif longer < 128:
            factor, resample = max(1, round(112 / longer)), Image.Resampling.NEAREST
        else:
            factor, resample = min(1, 184 / longer), Image.Resampling.LANCZOS
        return cls(round(height * factor), round(width * factor), resample, 100 if longer < 128 else 160)

    def draw(self, image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "height width c"]:
        drawn = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        if drawn.size != (self.width, self.height):
            drawn = drawn.resize((self.width, self.height), self.resample)
        return np.asarray(drawn).reshape(self.height, self.width, -1)


def image_table(
    images: UInt8[np.ndarray, "rows columns h w c"],
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    title: str = "",
    captions: Sequence[str] = (),
) -> Figure:
    """A figure of images (grey or RGB) in rows and columns, titled on the left and on top; with `captions` (rows *
    columns at most, in reading order) each bears its own. Of Matplotlib it takes texts and one image, no axes: those of
    64 images cost half a second.
    """
    rows, columns, height, width, _ = images.shape
    cell = _Cell.of(height, width)
    pitch_y, pitch_x = cell.height + GAP, cell.width + GAP
    canvas = np.full((rows * pitch_y - GAP, columns * pitch_x - GAP, 3), 255, np.uint8)
    for row, column in np.ndindex(rows, columns):
        top, left = row * pitch_y, column * pitch_x
        canvas[top : top + cell.height, left : left + cell.width] = cell.draw(images[row, column])

    def pixels(inches: float) -> int:
        return round(inches * cell.dpi)

    left = pixels(0.1 + 0.085 * max([len(name) for name in row_titles], default=0))  # for the longest
    num_lines = max([1 + name.count("\n") for name in column_titles], default=0)
    top = pixels(0.1 + 0.3 * bool(title) + 0.16 * num_lines)
    total_width, total_height = left + canvas.shape[1] + GAP, top + canvas.shape[0] + GAP
    figure = Figure(figsize=(total_width / cell.dpi, total_height / cell.dpi), dpi=cell.dpi)
    figure.figimage(canvas, left, GAP)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        """At so many pixels from the left and from the top."""
        figure.text(x / total_width, 1 - y / total_height, text, **style)

    for column, name in enumerate(column_titles):
        write(left + column * pitch_x + cell.width / 2, top - 3, name, fontsize=8, ha="center", va="bottom")
    for row, name in enumerate(row_titles):
        write(left - 4, top + row * pitch_y + cell.height / 2, name, fontsize=8, ha="right", va="center")
    box = {"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0}
    for place, name in enumerate(captions):
        row, column = divmod(place, columns)
        x, y = left + column * pitch_x + 2, top + row * pitch_y + 2
        write(x, y, name, fontsize=6, va="top", color="white", bbox=box)
    if title:
        fontsize = min(10, 130 * total_width / cell.dpi / len(title))  # points at which it fits a narrow figure
        figure.suptitle(title, fontsize=fontsize, y=1 - pixels(0.08) / total_height, va="top")
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
    names = [class_names[label] for label in labels[order]]
    captions = [name if len(name) <= 16 else name[:15] + "…" for name in names]
    return image_table(table.reshape(rows, columns, *images.shape[1:]), title=title, captions=captions)


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
