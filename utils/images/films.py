"""Films of samples on their path, and of pictures over training steps, as WebP, GIF or MP4. Frames are drawn and
written one at a time: a film of any length takes the memory of a few."""

import contextlib
import importlib.util
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from utils.base.background import in_background
from utils.base.bars import Bar
from utils.base.files import atomic_write
from utils.base.messages import UserError, find_system_error, one_line, progress_bar, warn
from utils.images import plotting
from utils.images.decoding import BrokenImageError, decode_image, read_image_file
from utils.images.fonts import draw_text

FORMATS = ("webp", "gif", "mp4")
MAX_SAMPLES = 64  # all frames of all of them are in memory at once
SECONDS = 3.0  # of a film with any number of frames, before the first and the last are held
MIN_SECONDS = 0.1
MAX_SECONDS = 3600.0
FIRST_MILLISECONDS = 500  # for which the first frame is held
LAST_MILLISECONDS = 2000
MIN_MILLISECONDS = 20  # browsers slow down films with shorter frames
MAX_SIDE = 4096  # pixels: what browsers play, and decoders in hardware
FRAME_RATE = 30  # of MP4, about
FILE_RATE = 25  # of a film of files, at most
MAX_FILES = 300  # frames of a film of files
MAX_GIF_AREA = 2**28  # pixels of all frames of a GIF, which Pillow keeps until the last, as a byte each


# --- Samples ---


def check_film(name: str, num_samples: int, image_size: tuple[int, int], scale: float) -> None:
    """Raises UserError, which names --scale and the file `name`, if a film of so many samples is too large to play."""
    plotting.check_table(name, plotting.shape_grid(num_samples), image_size, scale, MAX_SIDE)


def save_film(
    path: Path,
    frames: UInt8[np.ndarray, "frames n h w c"],
    file_format: str,
    seconds: float,
    labels: np.ndarray | None = None,
    class_names: Sequence[str] = ("",),
    title: str = "",
    scale: float = 1.0,
) -> None:
    """Writes an animation in one of FORMATS. Each frame looks like a `sample_grid`, without captions if there are no
    labels. The first frame is held for half a second, the last for two.

    Raises UserError if the encoder of MP4 is missing or fails.
    """
    labels = np.zeros(frames.shape[1], np.int32) if labels is None else labels
    table, order = plotting.lay_out_grid(frames.shape[2:4], labels, class_names, title, scale)
    pages = table.draw_pages(images[order] for images in frames)

    # Frames of one duration, but for two.
    durations = [max(MIN_MILLISECONDS, round(1000 * seconds / len(frames)))] * len(frames)
    durations[0] = FIRST_MILLISECONDS
    durations[-1] = LAST_MILLISECONDS
    with progress_bar(total=len(frames), desc="writing the film", unit="frame", delay=2) as bar:
        write_film(path, _count(pages, bar), durations, file_format)


# --- Files ---


def film_of_files(
    paths: Sequence[Path], titles: Sequence[str], out: Path, file_format: str, seconds: float, scale: float = 1.0
) -> None:
    """Writes a film of image files, such as the panels of a run by step, to `out`: complete, or not at all.

    Each is a frame below its title, all for the same time, `seconds` together; of many files some are left out, but
    neither the first nor the last. Smaller ones lie on white. `scale` multiplies their sizes. Warns about files that
    cannot be decoded, and leaves them out. Raises UserError if fewer than two are left, if they are too large, or if
    the film cannot be written.
    """
    check_format(file_format)
    limit = min(MAX_FILES, int(FILE_RATE * seconds))
    chosen = [(paths[i], " ".join(titles[i].split())) for i in spread(len(paths), limit)]

    # Files are decoded twice: their sizes have to be known before the first frame, and damage, too.
    sizes: dict[tuple[Path, str], tuple[int, int]] = {}
    for path, title in progress_bar(chosen, "reading", unit="image", delay=2):
        image = _decode(path)
        if image is not None:
            sizes[path, title] = image.size
    if len(sizes) < 2:
        raise UserError(f"{out}: a film needs two images that can be read, of which there are {len(sizes)}")

    # One size for all. A GIF of large ones has fewer frames.
    layout = _Layout.fit(list(sizes.values()), [title for _, title in sizes], scale, out)
    good = list(sizes)
    if file_format == "gif":
        good = [good[i] for i in spread(len(good), max(2, MAX_GIF_AREA // (layout.width * layout.height)))]
    ends = np.linspace(0, 1000 * seconds, len(good) + 1).round().astype(int)
    durations = np.maximum(MIN_MILLISECONDS, np.diff(ends)).tolist()
    with progress_bar(total=len(good), desc="film", unit="frame", delay=2) as bar, atomic_write(out) as temporary:
        write_film(temporary, _draw_pages(layout, good, bar), durations, file_format)


def _count(pages: Iterator[Image.Image], bar: Bar) -> Iterator[Image.Image]:
    for page in pages:
        bar.update()
        yield page


def _draw_pages(layout: "_Layout", files: list[tuple[Path, str]], bar: Bar) -> Iterator[Image.Image]:
    for path, title in files:
        page = layout.draw(_decode(path), title)
        bar.update()
        yield page


def spread(count: int, limit: int) -> list[int]:
    """Returns `limit` of the numbers below `count`, at about equal distances, with the first and the last; at least
    two, and all of fewer."""
    return np.linspace(0, count - 1, min(count, max(2, limit))).round().astype(int).tolist()


def _decode(path: Path) -> Image.Image | None:
    """Returns an image in RGB, transparency on white; None, with a warning, if it cannot be read."""
    try:
        return decode_image(read_image_file(path))
    except (BrokenImageError, OSError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        warn(f"{path} is left out of the film: it cannot be read ({reason})")
        return None


class _Layout(NamedTuple):
    """Where title and picture lie in the frames of a film of files, in pixels."""

    width: int
    height: int
    top: int  # the pictures begin below the titles
    scale: float
    dpi: int
    fontsize: float

    @classmethod
    def fit(cls, sizes: list[tuple[int, int]], titles: list[str], scale: float, out: Path) -> "_Layout":
        """Returns frames as large as the largest of the (width, height) `sizes`, scaled, below the longest title.
        Raises UserError if they are larger than films may be."""
        # Like the titles of tables: letters of one size, in a few lines where they are long.
        width = max(1, round(scale * max(width for width, _ in sizes)))
        dpi = round((100 if width < 1000 * scale else 160) * max(1, scale))
        fitted = [plotting.fit_title(title, width, dpi) for title in titles]
        num_lines = max(text.count("\n") + 1 for text, _ in fitted)
        top = round(dpi * (0.26 + 0.14 * (num_lines - 1)))
        height = top + max(1, round(scale * max(height for _, height in sizes)))

        # Larger ones play nowhere.
        if max(width, height) > MAX_SIDE:
            fitting = int(100 * scale * MAX_SIDE / max(width, height)) / 100
            raise UserError(
                f"{out}: its frames would be {width:,} pixels wide and {height:,} high, of at most {MAX_SIDE:,}; "
                f"use --scale {fitting:g}"
            )
        return cls(width, height, top, scale, dpi, min(size for _, size in fitted))

    def draw(self, image: Image.Image | None, title: str) -> Image.Image:
        """Returns a frame: the picture, scaled, below its title, on white. Without a picture, the title alone."""
        # The title, in a figure of its own.
        figure = Figure(figsize=(self.width / self.dpi, self.top / self.dpi), dpi=self.dpi)
        text, _ = plotting.fit_title(title, self.width, self.dpi)
        draw_text(figure, 0.5, 1 - 0.08 * self.dpi / self.top, text, fontsize=self.fontsize, ha="center", va="top")
        drawn = FigureCanvasAgg(figure)
        drawn.draw()
        page = Image.new("RGB", (self.width, self.height), "white")
        page.paste(Image.fromarray(np.asarray(drawn.buffer_rgba())[..., :3]))

        # The picture, in the middle.
        if image is not None:
            if self.scale != 1:
                size = (max(1, round(self.scale * image.width)), max(1, round(self.scale * image.height)))
                image = image.resize(size, Image.Resampling.LANCZOS)
            page.paste(image, ((self.width - image.width) // 2, self.top))
        return page


# --- Formats ---


def write_film(path: Path, pages: Iterator[Image.Image], durations: Sequence[int], file_format: str) -> None:
    """Writes pages of one size in RGB, as many as `durations`, each for so many milliseconds, in one of FORMATS. WebP
    and GIF play again and again."""
    if file_format == "mp4":
        _write_mp4(path, pages, durations)
        return

    # The clock of a GIF ticks a hundred times a second; its films last as long nevertheless.
    if file_format == "gif":
        ends = 10 * np.round(np.cumsum(durations) / 10).astype(int)
        durations = np.diff(ends, prepend=0).tolist()
    _Pages(pages, len(durations)).save(
        path,
        format=file_format.upper(),
        save_all=True,
        duration=list(durations),
        loop=0,
        **({"quality": 90} if file_format == "webp" else {}),
    )


class _Pages(Image.Image):
    """An image of several pages, of which one is in memory: of a list, Pillow's WebP would take all at once."""

    def __init__(self, pages: Iterator[Image.Image], count: int):
        super().__init__()
        self.pages = pages
        self.n_frames = count
        self.at = -1
        self.seek(0)

    def seek(self, frame: int) -> None:
        """Moves on to the next page, as encoders do; going back to a former one has no effect."""
        if frame >= self.n_frames:
            raise EOFError
        if frame == self.at + 1:
            page = next(self.pages)
            self.im = page.im
            self._mode = page.mode
            self._size = page.size
            self.at = frame

    def tell(self) -> int:
        return self.at


# --- MP4 ---


def check_format(file_format: str) -> None:
    """Raises UserError if a film of such a format cannot be written here."""
    if file_format == "mp4":
        _find_ffmpeg()


def _find_ffmpeg() -> str:
    """Returns the path of ffmpeg, as imageio-ffmpeg knows it: its own, that of $IMAGEIO_FFMPEG_EXE, or the system's.
    Raises UserError if there is none."""
    # The package is an extra: its ffmpeg is under the GPL.
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UserError(
            "--film_format=mp4 needs the package imageio-ffmpeg: make setup EXTRAS=film; or use --film_format webp"
        )
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(f"--film_format=mp4: {one_line(error)} Or use --film_format webp") from error


def _write_mp4(path: Path, pages: Iterator[Image.Image], durations: Sequence[int]) -> None:
    """Writes H.264 that every browser plays, at a constant rate: a page is repeated for as long as it is shown."""
    # The shortest page takes a whole number of frames, so that pages of one duration do.
    shortest = min(durations)
    repeats = max(1, round(FRAME_RATE * shortest / 1000))
    rate = Fraction(1000 * repeats, shortest)
    ends = [round(rate * int(end) / 1000) for end in np.cumsum(durations)]

    # The size of the first page is that of all.
    first = next(pages)
    with _encoder(path, first.size, rate) as stream:
        start = 0
        for page, end in zip(_chain(first, pages), ends, strict=True):
            content = page.tobytes()
            for _ in range(start, end):
                stream.write(content)
            start = end


def _chain(first: Image.Image, others: Iterable[Image.Image]) -> Iterator[Image.Image]:
    yield first
    yield from others


@contextlib.contextmanager
def _encoder(path: Path, size: tuple[int, int], rate: Fraction) -> Iterator[IO[bytes]]:
    """Yields the stream on which ffmpeg takes frames, RGB in rows, and waits for it after the block.

    Raises UserError if it fails, or OSError if the system does not let it write. However the block ends, ffmpeg ends.
    """
    command = [
        *(_find_ffmpeg(), "-nostdin", "-v", "error", "-y"),
        *("-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{size[0]}x{size[1]}"),
        *("-framerate", str(rate), "-i", "pipe:0"),
        # Chroma of half the size needs even sides: a white line is added to odd ones.
        *(
            "-vf",
            "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white,scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,"
            "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709",
        ),
        *("-c:v", "libx264", "-preset", "medium", "-crf", "18"),
        # The index comes first, so that a browser begins to play before it has the whole file.
        *("-movflags", "+faststart", "-f", "mp4", f"file:{path.absolute()}"),
    ]
    # Signals that Python ignores stay ignored: at a file's largest size ffmpeg gives a reason, instead of a core.
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, restore_signals=False)
    except OSError as error:
        raise UserError(f"--film_format=mp4: {command[0]} cannot be started ({error.strerror})") from error

    # An ffmpeg that fails closes the pipe; its messages say why.
    is_broken = False
    with process:
        assert process.stdin
        assert process.stderr
        try:
            wait_for_messages = in_background(process.stderr.read)
            try:
                yield process.stdin
                process.stdin.close()
            except BrokenPipeError:
                is_broken = True
            messages = wait_for_messages().decode(errors="replace")
            status = process.wait()
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):  # closing writes what is left
                process.stdin.close()
    if status or is_broken:
        _explain_failure(status, messages)


def _explain_failure(status: int, messages: str) -> None:
    """Raises the error that says why ffmpeg has failed: OSError if the system did not let it write."""
    error = find_system_error(RuntimeError(messages))
    if error:
        raise OSError(*error)
    # The first line is the cause of the others.
    lines = messages.strip().splitlines() or [f"exit status {status}"]
    reason = f"ended by {signal.Signals(-status).name}" if status < 0 else one_line(RuntimeError(lines[0]))
    raise UserError(f"--film_format=mp4: ffmpeg failed ({reason}); use --film_format webp")
