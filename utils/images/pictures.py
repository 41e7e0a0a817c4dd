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
from utils.images import plotting
from utils.images.samples import SampleWriter

# Duration of a film of any number of frames, before the first and the last are held.
FILM_SECONDS = 3.0


class PictureFolder:
    """Writes pictures into a folder, each complete or not at all, and remembers them in their order. Of several
    processes, the first does so; the others have nothing to write.

    The methods raise WriteError if the system does not let them write, and leave no file then.
    """

    def __init__(self, folder: Path):
        self.folder = folder
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
        self._save_figure(name, lambda: plotting.sample_grid(images, labels, class_names, title))

    def save_table(
        self,
        name: str,
        images: UInt8[np.ndarray, "rows columns h w c"],
        row_titles: Sequence[str],
        column_titles: Sequence[str],
        title: str,
    ) -> None:
        """Writes rows and columns of images as a PNG, titled on the left and on top."""
        self._save_figure(name, lambda: plotting.image_table(images, row_titles, column_titles, title))

    def save_film(
        self,
        name: str,
        frames: UInt8[np.ndarray, "frames n h w c"],
        labels: np.ndarray,
        class_names: Sequence[str],
        title: str,
    ) -> None:
        """Writes an animation in the format of the name's suffix, .webp or .gif, each frame laid out like a grid."""
        # Given by name: the temporary file that Pillow sees has another suffix.
        file_format = name.rpartition(".")[2]
        self._write(
            name,
            lambda path: plotting.save_film(path, frames, file_format, FILM_SECONDS, labels, class_names, title),
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
