"""One folder of pictures: every figure, film and file of samples that a program draws goes through it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree, UInt8
from matplotlib.figure import Figure

from utils.base.files import atomic_write
from utils.base.hosts import is_first
from utils.base.messages import show_result
from utils.images import films, plotting
from utils.images.samples import SampleWriter


class PictureFolder:
    """Writes pictures into a folder, each complete or not at all, and remembers them in their order. Of several
    processes, the first does so; the others have nothing to write.

    The methods raise WriteError if the system does not let them write, and leave no file then; UserError if `scale`,
    the factor of the size at which images are drawn, makes a picture too large.
    """

    def __init__(self, folder: Path, scale: float = 1.0):
        self.folder = folder
        self.scale = scale
        self.written: list[Path] = []  # complete files alone

    def save_grid(
        self,
        name: str,
        images: UInt8[np.ndarray, "n h w c"],
        labels: np.ndarray,
        class_names: Sequence[str],
        title: str,
    ) -> None:
        """Writes samples as a near-square PNG, ordered by label, each under the name of its class."""
        plotting.check_table(name, plotting.shape_grid(len(images)), images.shape[1:3], self.scale)
        self._save_figure(name, lambda: plotting.sample_grid(images, labels, class_names, title, self.scale))

    def save_table(
        self,
        name: str,
        images: UInt8[np.ndarray, "rows columns h w c"],
        row_titles: Sequence[str],
        column_titles: Sequence[str],
        title: str,
    ) -> None:
        """Writes rows and columns of images as a PNG, titled on the left and on top."""
        plotting.check_table(name, images.shape[:2], images.shape[2:4], self.scale)
        self._save_figure(name, lambda: plotting.image_table(images, row_titles, column_titles, title, (), self.scale))

    def save_film(
        self,
        name: str,
        frames: UInt8[np.ndarray, "frames n h w c"],
        labels: np.ndarray,
        class_names: Sequence[str],
        title: str,
        seconds: float = films.SECONDS,
    ) -> None:
        """Writes an animation in the format of the name's suffix, one of `films.FORMATS`, each frame laid out like a
        grid; it takes so many seconds before its first and last frame are held."""
        films.check_film(name, frames.shape[1], frames.shape[2:4], self.scale)
        # Given by name: the temporary file that the encoder sees has another suffix.
        file_format = name.rpartition(".")[2]
        self._write(
            name,
            lambda path: films.save_film(path, frames, file_format, seconds, labels, class_names, title, self.scale),
        )

    def save_arrays(self, name: str, **arrays: Any) -> None:
        """Writes arrays as an npz under their names."""

        def write(path: Path) -> None:
            with path.open("wb") as file:  # by its name, NumPy would add a suffix
                np.savez(file, **arrays)

        self._write(name, write)

    def save_samples(self, path: str | Path, images: UInt8[np.ndarray, "n h w c"], conditions: PyTree) -> None:
        """Writes each image by itself, in an npz or as PNGs; see `SampleWriter`. The path need not be in the folder."""
        with SampleWriter(path, len(images)) as writer:
            writer.write(images, conditions)
        self.written.append(Path(path))

    def show_written(self) -> None:
        """Prints the paths of the finished files, one a line."""
        for path in self.written:
            show_result(str(path))

    def _save_figure(self, name: str, draw: Callable[[], Figure]) -> None:
        self._write(name, lambda path: draw().savefig(path, format="png"))

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        if is_first():
            with atomic_write(self.folder / name) as temporary:
                write(temporary)
            self.written.append(self.folder / name)
