"""Reads and writes files of samples: ADM's npz (`arr_0` NHWC, `arr_1` labels) or a folder of PNGs. Both are read and
written a batch at a time, so that any number of samples fits in memory."""

import contextlib
import dataclasses
import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO

import jax
import numpy as np
from jaxtyping import PyTree
from numpy.lib import format as npy
from PIL import Image

from utils.base.bars import within
from utils.base.external import ArrayHeader, BadFileError, map_npy, read_npz_headers, read_rows
from utils.base.files import (
    TEMPORARY,
    UNFINISHED,
    atomic_write,
    check_finished,
    explaining_full_disk,
    file_sha256,
    mark_finished,
    mark_unfinished,
    prepare_output_file,
    prepare_output_folder,
)
from utils.base.messages import UserError, WriteError, printable, progress_bar, warn
from utils.images.decoding import MAX_MEGAPIXELS, BrokenImageError, copy_pixels
from utils.images.folders import SUFFIXES, find_images, is_system_name
from utils.images.pixels import Images, describe_range
from utils.images.sample_images import ALPHA_MODES, GREY_MODES, open_sample, read_header


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images of one shape, in a fixed order. `read(batch_size)` yields them, (b, h, w, c) of `dtype`, in batches; the
    last may be short."""

    num_samples: int
    image_shape: tuple[int, int, int]
    read: Callable[[int], Iterator[np.ndarray]]
    dtype: str = "uint8"  # or float32

    def first(self, num_samples: int) -> "Samples":
        """Returns the first of these samples alone."""

        def read(batch_size: int) -> Iterator[np.ndarray]:
            # Reading ends with the last batch that is needed: files may be large.
            left = num_samples
            for batch in self.read(batch_size):
                yield batch[:left]
                left -= len(batch)
                if left <= 0:
                    return

        return dataclasses.replace(self, num_samples=num_samples, read=read)


def open_samples(path: str | Path, flag: str = "samples", is_any: bool = False) -> Samples:
    """Opens the samples in an npz or .npy, or in a folder of images (at any depth, as EDM writes them, sorted by path).

    In an npz they are `arr_0` or the only array that can be images. With `is_any` they may be floats, read as float32,
    and have any number of channels; (n, h, w) has one. Raises UserError, naming --`flag`, if there are none, or if they
    are not uint8 images (n, h, w, 1 or 3) of one size. Reading them to the end warns if they use
    little of 0 .. 255, like images that were in [0, 1] before.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, f"--{flag}={path}")
    if not path.is_file():
        raise UserError(f"--{flag}={path} is neither a file nor a folder; give an npz or .npy, or a folder of PNGs")
    return (_open_npy if path.suffix == ".npy" else _open_npz)(path, f"--{flag}={path}", is_any)


def content_sha256(path: str | Path) -> str:
    """Returns the sha256 of a file, or of the names and contents of all images in a folder."""
    path = Path(path)
    if path.is_file():
        return file_sha256(path)

    # Names count: another order of the same images is another set of samples.
    digest = hashlib.sha256()
    # One bar for all; that of a large file is a part of it.
    files = find_images(path)
    bar = progress_bar(total=len(files), desc="hashing the images", unit="image", delay=2)
    with bar, within(bar):
        for file in files:
            digest.update(f"{file.relative_to(path)}\0{file_sha256(file)}\n".encode("utf-8", "surrogateescape"))
            bar.update()
    return digest.hexdigest()


def holds_images(path: str | Path, is_any: bool = False) -> bool:
    """Returns whether `path` is a folder, a .npy, or an npz with ADM's array of images, `arr_0`; with `is_any`, also
    one with `images`, as data sets have."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".npy":
        return True
    try:
        return bool({"arr_0", *(["images"] if is_any else [])} & read_npz_headers(path).keys())
    except BadFileError:
        return False


def check_sample_path(path: str | Path, inputs: Mapping[str, str | None] | None = None) -> None:
    """Raises UserError if `SampleWriter` cannot write to `path`, or would have to remove anything but earlier samples.
    For `inputs`, see `prepare_output_file`."""
    path = Path(path)

    # A file: its folder is proved writable now, rather than after the samples are drawn.
    if path.suffix == ".npz" and path.is_dir():
        raise UserError(f"--save_samples={path} is a folder; name a file, or a folder without .npz")
    if path.suffix == ".npz":
        prepare_output_file(path, "save_samples", "samples.npz", inputs)
        return

    # A folder: a new one, or one with nothing but samples, traces of killed writers and the system's files.
    if not path.exists():
        prepare_output_folder(path.parent, "save_samples", path)
        return
    if not path.is_dir():
        raise UserError(f"--save_samples={path} is a file; name an .npz or a folder")
    names = (file.name for file in path.iterdir() if not is_system_name(file.name) and file.name != UNFINISHED)
    other = next((name for name in names if not TEMPORARY.fullmatch(name) and not _is_sample(path / name)), None)
    if other is not None:
        raise UserError(f"--save_samples={path} holds {printable(other)}, which is no sample; name a new folder")
    prepare_output_folder(path, "save_samples")


def _is_sample(file: Path) -> bool:
    """Returns whether `SampleWriter` may have written the file, and so may replace it."""
    return bool(re.fullmatch(r"\d{6,}\.png", file.name)) and file.is_file() and not file.is_symlink()


def _open_npz(path: Path, flag: str, is_any: bool) -> Samples:
    """Opens the array of images in an npz. Nothing is read yet but the arrays' headers."""
    try:
        headers = read_npz_headers(path)
    except BadFileError as error:
        raise UserError(
            f"{flag} is not a whole npz of images ({error}); write it with eval_fid.py --save_samples"
        ) from None

    # Acceptable before a byte of the images is read.
    name = _choose_images(headers, flag, is_any)
    shape, dtype = _check_array(headers[name], flag, is_any)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        # Headers may be whole and the data after them cut.
        try:
            for rows in read_rows(path, name, batch_size):
                yield _as_images(rows, dtype)
        except BadFileError as error:
            raise UserError(f"{flag}: {error}; write it again") from None

    return _make_samples(shape, dtype, read, flag)


def _open_npy(path: Path, flag: str, is_any: bool) -> Samples:
    """Opens a .npy, mapped into memory."""
    try:
        header, array = map_npy(path)
    except BadFileError as error:
        raise UserError(f"{flag} is not a whole .npy of images ({error}); write it with numpy.save") from None
    shape, dtype = _check_array(header, flag, is_any)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(array), batch_size):
            yield _as_images(np.array(array[start : start + batch_size]), dtype)

    return _make_samples(shape, dtype, read, flag)


def _as_images(rows: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(rows if rows.ndim == 4 else rows[..., None], dtype)


def _make_samples(shape: tuple[int, int, int, int], dtype: str, read: Callable, flag: str) -> Samples:
    # Floats may have any range.
    checked = partial(_warn_of_range, read, flag) if dtype == "uint8" else read
    return Samples(shape[0], shape[1:], checked, dtype)


def _check_array(header: ArrayHeader, flag: str, is_any: bool) -> tuple[tuple[int, int, int, int], str]:
    """Returns (the shape (n, h, w, c), the dtype, uint8 or float32) of images. Raises UserError for any other array."""
    shape, is_fortran, dtype = header

    # Values, then the layout of the axes.
    if dtype != np.uint8 and not (is_any and dtype.kind == "f"):
        raise UserError(
            f"{flag} holds {dtype} images; FID is of uint8 pixels: clip, round and convert them to uint8 first, or use "
            "--metrics moments, which takes floats"
        )
    if is_any and len(shape) == 3:
        shape = (*shape, 1)
    if is_any and (len(shape) != 4 or not all(shape)):
        raise UserError(f"{flag} holds an array of shape {shape}; images are (n, height, width, channels)")
    if not is_any and (len(shape) != 4 or shape[-1] not in (1, 3) or not shape[0]):
        raise UserError(f"{flag} holds an array of shape {shape}; images are (n, height, width, 1 or 3)")
    if is_fortran:
        raise UserError(
            f"{flag} holds its images in Fortran order, last axis first; save numpy.ascontiguousarray(images) instead"
        )

    # Memory: images are read in batches of any size.
    count, height, width, channels = shape
    if height * width > MAX_MEGAPIXELS * 1e6:
        raise UserError(f"{flag} holds images of {height}x{width}, above {MAX_MEGAPIXELS:g} megapixels; resize them")
    return (count, height, width, channels), "uint8" if dtype == np.uint8 else "float32"


def _choose_images(headers: dict[str, ArrayHeader], flag: str, is_any: bool) -> str:
    """Returns the name of the array that holds the images. Raises UserError if that is not clear."""
    # By its name, which in files of data is `images`, or as the only array.
    names = ("arr_0", "images") if is_any else ("arr_0",)
    if named := [name for name in (*names, *list(headers)[: len(headers) == 1]) if name in headers]:
        return named[0]

    # By its shape and dtype.
    candidates = [name for name, (shape, _, dtype) in headers.items() if len(shape) == 4 and dtype == np.uint8]
    if len(candidates) == 1:
        return candidates[0]
    arrays = ", ".join(f"{name} {dtype} {shape}" for name, (shape, _, dtype) in headers.items())[:200]
    raise UserError(
        f"{flag} holds {len(candidates) or 'no'} arrays that may be uint8 images ({arrays or 'nothing at all'}); save "
        "the images (n, height, width, 1 or 3) as arr_0"
    )


def _warn_of_range(read: Callable, flag: str, batch_size: int) -> Iterator[np.ndarray]:
    """Yields the batches of `read`, and warns at the end if their values are a small part of 0 .. 255."""
    extremes = []  # (lowest, highest) of every image
    for batch in read(batch_size):
        pixels = batch.reshape(len(batch), -1)
        extremes.append(np.stack([pixels.min(axis=1), pixels.max(axis=1)], axis=1))
        yield batch

    # After the last batch: the range is that of all images.
    found = np.concatenate(extremes)
    if found.max() == 1:
        warn(
            f"{flag}: no value is above 1, so these images are black: were they in [0, 1] when they became uint8? "
            "Multiply by 255 and round first"
        )
    elif remark := describe_range(found):
        warn(f"{flag}: {remark}")


def _open_folder(path: Path, flag: str) -> Samples:
    """Opens a folder of images. All headers are read now, the pixels later."""
    files = find_images(path)
    check_finished(files, path, flag)
    if not files:
        raise UserError(f"{flag} holds no images ({', '.join(SUFFIXES)})")

    # One size. Files differ more often than arrays: the message names two of them.
    listed = progress_bar(files, "reading sizes of images", len(files), unit="image", delay=2)
    headers = [read_header(file, flag) for file in listed]
    sizes = [size for size, _ in headers]
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        first, second = (
            f"{file.relative_to(path)} is {size[1]}x{size[0]}"
            for file, size in ((files[0], sizes[0]), (files[other], sizes[other]))
        )
        raise UserError(f"{flag}: {first} but {second}; samples are of one size")

    # One number of channels: a mixture of grey and colour is RGB.
    num_alpha = sum(mode in ALPHA_MODES for _, mode in headers)
    if num_alpha:
        warn(f"{flag}: {num_alpha} of {len(files)} images have an alpha channel, which is left out, as in pytorch-fid")
    is_grey = all(mode in GREY_MODES for _, mode in headers)

    # Pixels are decoded when they are asked for, a batch at a time.
    width, height = sizes[0]
    shape = (height, width, 1 if is_grey else 3)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            images = np.empty((len(batch), *shape), np.uint8)
            for file, pixels in zip(batch, images, strict=True):
                with open_sample(file, flag) as image:
                    if image.size != (width, height):  # replaced after its header was read
                        raise BrokenImageError(f"it is another one than before, {'x'.join(map(str, image.size))}")
                    image.load()
                    copy_pixels(image, pixels)
            yield images

    return Samples(len(files), shape, partial(_warn_of_range, read, flag))


def _number_leaves(labels: PyTree) -> dict[str, np.ndarray]:
    return {f"arr_{number}": leaf for number, leaf in enumerate(jax.tree.leaves(labels), start=1)}


class SampleWriter:
    """Writes batches to `path`: into an npz if that is its suffix, else as PNGs (000000.png, ...) into a folder, where
    they replace earlier samples. It is a context manager: the npz appears at the end of the block, and until then a
    folder is marked as unfinished. An npz takes floats and any number of channels, PNGs uint8 with 1 or 3.

    `name_columns` gives the arrays of an npz beside the images, {name: (n, ...)} of the samples' conditions, such as
    `Condition.to_columns`.

    Raises UserError if the folder holds anything else, WriteError if the system does not let the samples be written,
    which is also kept as `failure`, and ValueError for another number of samples or labels.
    """

    def __init__(
        self,
        path: str | Path,
        num_samples: int,
        name_columns: Callable[[PyTree], Mapping[str, np.ndarray]] | None = None,
    ):
        check_sample_path(path)
        self.path = Path(path)
        self.num_samples = num_samples
        self.num_written = 0
        self.name_columns = name_columns or _number_leaves
        self.labels: list[PyTree] = []  # of the images so far, batch by batch
        self.failure: WriteError | None = None  # for callers who go on without the samples

        # Of an npz: the archive, and the array of images in it, to which batches are appended.
        self.archive: zipfile.ZipFile | None = None
        self.file: IO[bytes] | None = None
        # A generator for each format: what is done before the first batch and after the last.
        self.writing = self._write_npz() if self.path.suffix == ".npz" else self._fill_folder()

    def __enter__(self) -> "SampleWriter":
        self.writing.__enter__()
        return self

    def write(self, images: Images, labels: PyTree) -> None:
        """Writes the next images. `labels` are their conditions: an array (b, ...), or a tree of arrays."""
        # A mistake of the caller, before anything is written.
        for leaf in jax.tree.leaves(labels):
            if len(leaf) != len(images):
                raise ValueError(f"{len(leaf)} labels of {len(images)} images")

        # The system's errors, whether raised here or by a helper, are kept and raised as WriteError.
        try:
            if self.archive is None:
                self._write_pngs(images)
            else:
                self._append(images)
        except OSError as error:
            self.failure = WriteError(self.path, error)
            raise self.failure from error
        except WriteError as error:
            self.failure = error
            raise
        self.labels.append(labels)
        self.num_written += len(images)

    def __exit__(self, kind, error, trace) -> None:
        error = error or self.failure  # the caller may have suppressed it
        try:
            self.writing.__exit__(type(error) if error else None, error, trace)
        except WriteError as failure:
            self.failure = failure
            raise

    @contextlib.contextmanager
    def _write_npz(self) -> Iterator[None]:
        """Opens the archive, and completes it after the block: labels come last."""
        with (
            atomic_write(self.path) as temporary,
            open(os.devnull, "wb") as nowhere,
            temporary.open("wb") as file,
            zipfile.ZipFile(file, "w") as self.archive,
        ):
            try:
                yield
                if self.file is not None:
                    # An archive has one open member at a time, and the images are all written.
                    self.file.close()
                    whole = jax.tree.map(lambda *batches: np.concatenate(batches), *self.labels)
                    for name, column in self.name_columns(whole).items():
                        with self.archive.open(f"{name}.npy", "w") as file:
                            npy.write_array(file, column, allow_pickle=False)
                self._check_count()
            except BaseException:
                # Closing writes: on a full disk it would fail again, and hide the first error.
                self.archive.fp = nowhere
                if self.file is not None:
                    self.file.close()
                self.archive.fp = None
                raise

    def _append(self, images: Images) -> None:
        """Writes images to the array in the archive. Its header comes with the first of them, which tell the shape."""
        assert self.archive is not None
        if self.file is None:
            # zip64, because the member may pass 2 GiB, which is not known yet to the archive.
            self.file = self.archive.open("arr_0.npy", "w", force_zip64=True)
            shape = (self.num_samples, *images.shape[1:])
            descr = npy.dtype_to_descr(images.dtype)
            npy.write_array_header_1_0(self.file, {"descr": descr, "fortran_order": False, "shape": shape})
        self.file.write(np.ascontiguousarray(images).data)

    @contextlib.contextmanager
    def _fill_folder(self) -> Iterator[None]:
        """Empties the folder of earlier samples, and marks it as unfinished until the end of the block."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Marked before anything is removed: a killed writer leaves no folder that looks complete.
        mark_unfinished(self.path, self.num_samples)
        for file in self.path.iterdir():
            if _is_sample(file):
                file.unlink()
        yield
        self._check_count()
        mark_finished(self.path)

    def _write_pngs(self, images: Images) -> None:
        """Writes images under the next numbers. Raises UserError for floats and for other than 1 or 3 channels."""
        if images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
            raise UserError(
                f"{self.path}: PNGs hold uint8 images of 1 or 3 channels, but these are {images.dtype} with "
                f"{images.shape[-1]}; name an .npz, which holds any array"
            )
        for number, image in enumerate(images, self.num_written):
            # Not synced one by one, which would be slow; after a kill each PNG is still whole or absent.
            with (
                explaining_full_disk(lambda number=number: f"{number} of {self.num_samples} samples are whole"),
                atomic_write(self.path / f"{number:06d}.png", is_synced=False) as temporary,
            ):
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, "PNG")

    def _check_count(self) -> None:
        """Raises ValueError if samples are missing, or are too many."""
        if self.num_written != self.num_samples:
            raise ValueError(f"{self.num_written} samples were written to {self.path}, not {self.num_samples}")
