"""Draws figures of arrays: tables of images first, then curves. It knows no model and no tracker."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import color_sequences
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter
from PIL import Image

from utils.base.messages import UserError
from utils.images.fonts import count_columns, draw_text, make_legible, wrap

GAP = 3  # pixels between images in a table
MAX_SIDE = 60_000  # pixels of a picture; Matplotlib draws up to 65,535
MAX_AREA = 2**28  # pixels of a picture: a gigabyte while it is drawn
MIN_SCALE = 0.1
MAX_SCALE = 64.0
MAX_ROW_TITLE = 40  # columns of text
MIN_TITLE = 7  # points
MAX_LINES = 4  # of a title; captions, which hide what is below them, take a third of the image at most


# --- Images ---


class _Cell(NamedTuple):
    """The size at which the images of a table are drawn, in pixels, and the filter of Pillow that resizes them."""

    height: int
    width: int
    resample: Image.Resampling
    dpi: int
    gap: int  # to the next image

    @classmethod
    def fit(cls, height: int, width: int, scale: float = 1.0) -> "_Cell":
        """Returns the cell of images of this size: small ones are enlarged, large ones reduced. `scale` multiplies its
        sides; above 1 texts and gaps grow with it, below they stay legible."""
        longer = max(height, width)
        if longer < 16:  # the eye makes out more of a few pixels when they are smoothed
            factor = max(1, 64 // longer)
            resample = Image.Resampling.BICUBIC
        elif longer < 128:
            factor = max(1, round(112 / longer))
            resample = Image.Resampling.NEAREST
        else:
            factor = min(1, 184 / longer)
            resample = Image.Resampling.LANCZOS

        # The user's factor, on top of the usual one.
        factor *= scale
        if factor < 1:  # pixels of small images would be dropped
            resample = Image.Resampling.LANCZOS
        zoom = max(1, scale)
        dpi = round((100 if longer < 128 else 160) * zoom)
        return cls(max(1, round(height * factor)), max(1, round(width * factor)), resample, dpi, round(GAP * zoom))

    def count_letters(self, width: int, points: int) -> int:
        """Returns how many letters of the usual width fit into so many pixels."""
        return _count_letters(width, self.dpi, points)

    def count_lines(self, height: float, points: int) -> int:
        """Returns how many lines of text fit into so many pixels, MAX_LINES at most."""
        return max(1, min(MAX_LINES, int(height / (1.2 * points * self.dpi / 72))))

    def draw(self, image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "height width shown"]:
        """Returns the image at the size of the cell; of images that are neither grey nor RGB, the first channels."""
        drawn = Image.fromarray(image[..., :3] if image.shape[-1] >= 3 else image[..., 0])
        if drawn.size != (self.width, self.height):
            drawn = drawn.resize((self.width, self.height), self.resample)
        return np.asarray(drawn).reshape(self.height, self.width, -1)


class Table:
    """Images of one size in rows and columns, titled on the left and on top, with or without a caption on each.

    Matplotlib draws the texts and one image that holds all others. Axes for 64 images would cost half a second.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        image_size: tuple[int, int],
        row_titles: Sequence[str],
        column_titles: Sequence[str],
        title: str,
        captions: Sequence[str],
        scale: float = 1.0,
    ):
        """Lays the table out and writes its texts. `shape` is (rows, columns), `image_size` (height, width)."""
        rows, columns = shape
        cell = _Cell.fit(*image_size, scale)
        pitch_y = cell.height + cell.gap
        pitch_x = cell.width + cell.gap
        self.shape = shape
        self.cell = cell
        self.pitch = (pitch_y, pitch_x)

        def pixels(inches: float) -> int:
            return round(inches * cell.dpi)

        # Texts are broken into lines; the margins are as large as they are.
        row_titles = [_break_text(name, MAX_ROW_TITLE, cell.count_lines(cell.height, 8)) for name in row_titles]
        column_titles = [_break_text(name, cell.count_letters(pitch_x, 8), MAX_LINES) for name in column_titles]
        captions = [
            _break_text(name, cell.count_letters(pitch_x, 6), cell.count_lines(cell.height / 3, 6)) for name in captions
        ]
        left = pixels(0.1 + 0.085 * max(map(count_columns, "\n".join(row_titles).split("\n"))))
        self.left = left
        self.width = left + columns * pitch_x
        title, fontsize = fit_title(title, self.width, cell.dpi)
        num_lines = max([1 + name.count("\n") for name in column_titles], default=0)
        top = pixels(0.1 + 0.3 * bool(title) + 0.14 * title.count("\n") + 0.16 * num_lines)
        self.top = top
        self.height = top + rows * pitch_y
        self.texts = Figure(figsize=(self.width / cell.dpi, self.height / cell.dpi), dpi=cell.dpi)

        def write(x: float, y: float, text: str, **style: Any) -> None:
            """Writes at so many pixels from the left and from the top."""
            draw_text(self.texts, x / self.width, 1 - y / self.height, text, **style)

        # Titles and captions.
        zoom = cell.gap / GAP
        for column, name in enumerate(column_titles):
            write(left + column * pitch_x + cell.width / 2, top - cell.gap, name, fontsize=8, ha="center", va="bottom")
        for row, name in enumerate(row_titles):
            middle = top + row * pitch_y + cell.height / 2
            write(left - 4 * zoom, middle, name, fontsize=8, ha="right", va="center")
        box = {"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0}
        for place, name in enumerate(captions):
            row, column = divmod(place, columns)
            x = left + column * pitch_x + 2 * zoom
            y = top + row * pitch_y + 2 * zoom
            write(x, y, name, fontsize=6, va="top", color="white", bbox=box)
        if title:
            write(self.width / 2, pixels(0.08), title, fontsize=fontsize, ha="center", va="top")

    def paste(self, images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "height width 3"]:
        """Returns the images, in reading order, at their places on white."""
        gap = self.cell.gap
        canvas = np.full((self.height - self.top - gap, self.width - self.left - gap, 3), 255, np.uint8)
        for place, image in enumerate(images):
            row, column = divmod(place, self.shape[1])
            top = row * self.pitch[0]
            left = column * self.pitch[1]
            canvas[top : top + self.cell.height, left : left + self.cell.width] = self.cell.draw(image)
        return canvas

    def draw(self, images: UInt8[np.ndarray, "n h w c"]) -> Figure:
        """Returns the table with these images; to be called once."""
        self.texts.figimage(self.paste(images), self.left, self.cell.gap)
        return self.texts

    def draw_pages(self, frames: Iterable[UInt8[np.ndarray, "n h w c"]]) -> Iterator[Image.Image]:
        """Yields each frame as `draw` would show it. The texts are drawn once for all."""
        # Texts are drawn once, without a background, and laid over each frame.
        self.texts.patch.set_alpha(0)
        drawn = FigureCanvasAgg(self.texts)
        drawn.draw()
        overlay = Image.fromarray(np.asarray(drawn.buffer_rgba()))
        for images in frames:
            page = Image.new("RGB", overlay.size, "white")
            page.paste(Image.fromarray(self.paste(images)), (self.left, self.top))
            page.paste(overlay, mask=overlay)
            yield page


def _count_letters(width: int, dpi: int, points: int) -> int:
    return max(8, int(width / dpi / (0.0088 * points)))


def fit_title(title: str, width: int, dpi: int) -> tuple[str, float]:
    """Returns (the lines of a title, their size in points) for a figure of so many pixels: small enough for a narrow
    one; a title that would be too small to read has several lines."""
    title, _ = make_legible(title)  # emoji may become words
    fontsize = min(10, 130 * width / dpi / max(1, count_columns(title)))
    if fontsize >= MIN_TITLE:
        return title, fontsize
    return _break_text(title, _count_letters(width, dpi, MIN_TITLE), MAX_LINES), MIN_TITLE


def _break_text(text: str, columns: int, max_lines: int) -> str:
    """Returns the lines of a text, each in lines of its own that are not wider than so many columns."""
    return "\n".join(wrap(line, columns, max_lines) for line in make_legible(text)[0].split("\n"))


def image_table(
    images: UInt8[np.ndarray, "rows columns h w c"],
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    title: str = "",
    captions: Sequence[str] = (),
    scale: float = 1.0,
) -> Figure:
    """Returns a figure of images (grey or RGB) in rows and columns, titled on the left and on top. `captions` stand on
    the images, in reading order: rows * columns at most. `scale` multiplies the size at which images are drawn."""
    rows, columns, height, width, _ = images.shape
    table = Table((rows, columns), (height, width), row_titles, column_titles, title, captions, scale)
    return table.draw(images.reshape(-1, *images.shape[2:]))


def put_before(
    pictures: UInt8[np.ndarray, "rows h2 w2 c2"], images: UInt8[np.ndarray, "rows columns h w c"]
) -> UInt8[np.ndarray, "rows more h w 3"]:
    """Returns rows of images with a picture before each, resized to their size without smoothing; all in RGB."""
    height, width = images.shape[2:4]
    rows = np.arange(height) * pictures.shape[1] // height
    columns = np.arange(width) * pictures.shape[2] // width
    resized = pictures[:, rows][:, :, columns]
    return np.concatenate([_to_rgb(resized)[:, None], _to_rgb(images)], axis=1)


def _to_rgb(images: UInt8[np.ndarray, "*n c"]) -> UInt8[np.ndarray, "*n 3"]:
    return images[..., :3] if images.shape[-1] >= 3 else np.repeat(images[..., :1], 3, axis=-1)


def shape_grid(count: int) -> tuple[int, int]:
    """Returns the (rows, columns) of a near-square table of so many samples."""
    columns = math.ceil(math.sqrt(count))
    return -(-count // columns), columns


def lay_out_grid(
    image_size: tuple[int, int], labels: np.ndarray, class_names: Sequence[str], title: str, scale: float = 1.0
) -> tuple[Table, Int[np.ndarray, " n"]]:
    """Returns (near-square table of samples, the order in which they fill it: by label)."""
    # Stable: samples of one label keep the order in which they were drawn.
    order = np.argsort(labels, kind="stable")
    captions = [class_names[label] for label in labels[order]]
    return Table(shape_grid(len(labels)), image_size, (), (), title, captions, scale), order


def sample_grid(
    images: UInt8[np.ndarray, "n h w c"],
    labels: np.ndarray,
    class_names: Sequence[str],
    title: str = "",
    scale: float = 1.0,
) -> Figure:
    """Returns samples ordered by label in a near-square table, each under the name of its class."""
    table, order = lay_out_grid(images.shape[1:3], labels, class_names, title, scale)
    return table.draw(images[order])


def check_table(
    name: str,
    shape: tuple[int, int],
    image_size: tuple[int, int],
    scale: float,
    max_side: int = MAX_SIDE,
    max_area: int = MAX_AREA,
) -> None:
    """Raises UserError, which names --scale and the file `name`, if a table of (rows, columns) of images of (height,
    width) has more pixels than a picture may have."""
    # As it is going to be drawn, but for the texts on its left and on top.
    cell = _Cell.fit(*image_size, scale)
    height = shape[0] * (cell.height + cell.gap)
    width = shape[1] * (cell.width + cell.gap)
    if max(height, width) <= max_side and height * width <= max_area:
        return

    # A size that fits, rounded down.
    shrinking = min(max_side / max(height, width), math.sqrt(max_area / (height * width)))
    fitting = math.floor(100 * scale * shrinking) / 100
    advice = f"use --scale {fitting:g}, or fewer images" if fitting >= MIN_SCALE else "use fewer images"
    limit = f"{max_side:,} a side" if max(height, width) > max_side else f"{max_area:,} in all"
    raise UserError(
        f"--scale={scale:g}: {name} would be {width:,} pixels wide and {height:,} high, of at most {limit}; {advice}"
    )


# --- Curves ---


def curves(
    points: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str, markers: bool = True
) -> Figure:
    """Returns a figure of named curves of (x, y) points. The x axis is logarithmic; so is the y axis, if all values
    are positive and span more than a factor of five. With `markers` every point is marked, and its x stands on the
    axis."""
    # Points may come in any order: a curve runs from left to right.
    figure = Figure(figsize=(5.5, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, pairs in points.items():
        axes.plot(*zip(*sorted(pairs), strict=True), marker="o" if markers else None, label=name)

    # Ticks: at the points, or where Matplotlib puts them; as plain numbers.
    xs, ys = ({pair[i] for pairs in points.values() for pair in pairs} for i in range(2))
    axes.set_xscale("log")
    if markers:
        axes.set_xticks(sorted(xs), [f"{x:g}" for x in sorted(xs)])
    else:
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if 0 < 5 * min(ys, default=0) < max(ys):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())

    # Minor ticks of a logarithmic axis would write numbers between the points.
    axes.minorticks_off()
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def running_mean(values: Sequence[float], window: int) -> Float[np.ndarray, " n"]:
    """Returns the mean of each value and the `window` - 1 before it, or as many as there are."""
    return np.array([np.mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)])


def metric_curves(
    points: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    smooth: int = 1,
    log_y: bool = False,
    x_title: str = "step",
) -> Figure:
    """Returns a figure of {metric: {run: (step, value) points}} with axes for each metric and a colour for each run.

    `x_title` names the x axis. With `smooth` above 1, the running mean of that many values is drawn over the values
    themselves.
    """
    # Colours and places. A run has one colour in all axes, whichever metrics it has.
    runs = list(dict.fromkeys(run for curves in points.values() for run in curves))
    palette = color_sequences["tab10" if len(runs) <= 10 else "tab20"]
    colours = {run: palette[i % len(palette)] for i, run in enumerate(runs)}
    columns = len(points) if len(points) <= 3 else min(4, math.ceil(math.sqrt(len(points))))
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 0.6 + 2.5 * rows), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)

    for axis, (metric, curves) in zip(axes, points.items(), strict=False):
        # The curves of one metric.
        for run in (run for run in curves if curves[run]):
            steps, values = zip(*curves[run], strict=True)
            marker = "." if len(steps) <= 30 else None  # a single point would show no line
            if smooth > 1:
                axis.plot(steps, values, color=colours[run], alpha=0.25)
                values = running_mean(values, smooth)
            axis.plot(steps, values, color=colours[run], marker=marker)

        # Their axes.
        if log_y and any(value > 0 for curve in curves.values() for _, value in curve):
            axis.set_yscale("log", nonpositive="mask")
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.minorticks_off()
        text, families = make_legible(metric)
        axis.set_title(text, fontsize=9, fontfamily=families, parse_math=False)
        axis.set_xlabel(x_title, fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=x_title == "step"))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)

    # Places that no metric fills.
    for axis in axes[len(points) :]:
        axis.set_axis_off()

    # One legend. Its texts are set afterwards: a legend leaves out names that begin with an underscore.
    lines = [Line2D([], [], color=colour) for colour in colours.values()]
    columns = min(len(runs), columns + 1)
    legend = figure.legend(lines, [" "] * len(runs), loc="outside upper center", ncols=columns, fontsize=8)
    for entry, run in zip(legend.get_texts(), runs, strict=True):
        text, families = make_legible(run)
        entry.set(text=text, fontfamily=families, parse_math=False)
    return figure
