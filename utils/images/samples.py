"""Sampled images as files: ADM's npz (`arr_0` uint8 NHWC, `arr_1` labels) or a folder of PNGs. Both are written and
read a batch at a time, so that any number of samples fits in memory."""

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

import numpy as np
from jaxtyping import Int, UInt8
from numpy.lib import format as npy
from PIL import Image

from utils.base.console import printable, warn
from utils.base.errors import UserError, WriteError
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
from utils.images.decoding import MAX_MEGAPIXELS, BrokenImageError, copy_pixels, open_image
from utils.images.folders import SUFFIXES, find_images, is_system_name
from utils.images.pixels import describe_range

# Pillow's names of pixels of 8 bits.
GREY_MODES = ("L", "LA", "1")
ALPHA_MODES = ("RGBA", "LA")
MODES = ("RGB", "RGBA", "P", *GREY_MODES)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images of one shape, in a fixed order; `read(batch_size)` yields them, the last batch perhaps short."""

    num_samples: int
    image_shape: tuple[int, int, int]
    read: Callable[[int], Iterator[UInt8[np.ndarray, "b h w c"]]]

    def first(self, num_samples: int) -> "Samples":
        """The first of them alone."""

        def read(batch_size: int) -> Iterator[np.ndarray]:
            left = num_samples
            for batch in self.read(batch_size):
                yield batch[:left]
                left -= len(batch)
                if left <= 0:
                    return

        return dataclasses.replace(self, num_samples=num_samples, read=read)


def open_samples(path: str | Path, flag: str = "samples") -> Samples:
    """The samples in an npz or .npy or in a folder of images (at any depth, as EDM writes them, sorted by path).

    In an npz they are `arr_0` or the only array that can be images. UserError, naming --`flag`, where there are none,
    or they are not uint8 images (n, h, w, 1 or 3) of one size. Reading them warns where no value is above 1, as in
    images that were in [0, 1] before.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, f"--{flag}={path}")
    if not path.is_file():
        raise UserError(f"--{flag}={path} is neither a file nor a folder; give an npz or .npy, or a folder of PNGs")
    return (_open_npy if path.suffix == ".npy" else _open_npz)(path, f"--{flag}={path}")


def content_sha256(path: str | Path) -> str:
    """Of a file, or of the names and contents of all images in a folder."""
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in find_images(path):
        digest.update(f"{file.relative_to(path)}\0{file_sha256(file)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def holds_images(path: str | Path) -> bool:
    """Whether `path` is a folder, a .npy, or an npz with ADM's array of images, `arr_0`."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".npy":
        return True
    try:
        return "arr_0" in read_npz_headers(path)
    except BadFileError:
        return False


def check_sample_path(path: str | Path, inputs: Mapping[str, str | None] | None = None) -> None:
    """UserError where `SampleWriter` cannot write, or would have to remove something else than earlier samples; see
    `prepare_output_file`."""
    path = Path(path)
    if path.suffix == ".npz" and path.is_dir():
        raise UserError(f"--save_samples={path} is a folder; name a file, or a folder without .npz")
    if path.suffix == ".npz":
        prepare_output_file(path, "save_samples", "samples.npz", inputs)
        return
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
    """Whether `SampleWriter` may have written the file, and may replace it."""
    return bool(re.fullmatch(r"\d{6,}\.png", file.name)) and file.is_file() and not file.is_symlink()


def _open_npz(path: Path, flag: str) -> Samples:
    try:
        headers = read_npz_headers(path)
    except BadFileError as error:
        raise UserError(
            f"{flag} is not a whole npz of images ({error}); write it with eval_fid.py --save_samples"
        ) from None
    name = _choose_images(headers, flag)
    shape = _check_array(headers[name], flag)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        try:
            yield from read_rows(path, name, batch_size)
        except BadFileError as error:
            raise UserError(f"{flag}: {error}; write it again") from None

    return Samples(shape[0], shape[1:], partial(_warn_if_dark, read, flag))


def _open_npy(path: Path, flag: str) -> Samples:
    try:
        header, array = map_npy(path)
    except BadFileError as error:
        raise UserError(f"{flag} is not a whole .npy of images ({error}); write it with numpy.save") from None
    shape = _check_array(header, flag)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(array), batch_size):
            yield np.array(array[start : start + batch_size])

    return Samples(shape[0], shape[1:], partial(_warn_if_dark, read, flag))


def _check_array(header: ArrayHeader, flag: str) -> tuple[int, int, int, int]:
    """The shape (n, h, w, c) of uint8 images; UserError for any other array."""
    shape, is_fortran, dtype = header
    if dtype != np.uint8:
        raise UserError(
            f"{flag} holds {dtype} images; FID is of uint8 pixels: clip, round and convert them to uint8 first"
        )
    if len(shape) != 4 or shape[-1] not in (1, 3) or not shape[0]:
        raise UserError(f"{flag} holds an array of shape {shape}; images are (n, height, width, 1 or 3)")
    if is_fortran:
        raise UserError(
            f"{flag} holds its images in Fortran order, last axis first; save numpy.ascontiguousarray(images) instead"
        )

    count, height, width, channels = shape
    if height * width > MAX_MEGAPIXELS * 1e6:
        raise UserError(f"{flag} holds images of {height}x{width}, above {MAX_MEGAPIXELS:g} megapixels; resize them")
    return count, height, width, channels


def _choose_images(headers: dict[str, ArrayHeader], flag: str) -> str:
    """The name of the array that holds the images; UserError where that is not clear."""
    if "arr_0" in headers or len(headers) == 1:
        return "arr_0" if "arr_0" in headers else next(iter(headers))
    candidates = [name for name, (shape, _, dtype) in headers.items() if len(shape) == 4 and dtype == np.uint8]
    if len(candidates) == 1:
        return candidates[0]
    arrays = ", ".join(f"{name} {dtype} {shape}" for name, (shape, _, dtype) in headers.items())[:200]
    raise UserError(
        f"{flag} holds {len(candidates) or 'no'} arrays that may be uint8 images ({arrays or 'nothing at all'}); save "
        "the images (n, height, width, 1 or 3) as arr_0"
    )


def _warn_if_dark(read: Callable, flag: str, batch_size: int) -> Iterator[np.ndarray]:
    """The batches of `read`; a warning at the end if their values are a small part of 0 .. 255."""
    extremes = []
    for batch in read(batch_size):
        pixels = batch.reshape(len(batch), -1)
        extremes.append(np.stack([pixels.min(axis=1), pixels.max(axis=1)], axis=1))
        yield batch
    found = np.concatenate(extremes)
    if found.max() == 1:
        warn(
            f"{flag}: no value is above 1, so these images are black: were they in [0, 1] when they became uint8? "
            "Multiply by 255 and round first"
        )
    elif remark := describe_range(found):
        warn(f"{flag}: {remark}")


def _open_folder(path: Path, flag: str) -> Samples:
    files = find_images(path)
    check_finished(files, path, flag)
    if not files:
        raise UserError(f"{flag} holds no images ({', '.join(SUFFIXES)})")
    headers = [_image_header(file, flag) for file in files]
    sizes = [size for size, _ in headers]
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        first, second = (
            f"{file.relative_to(path)} is {size[1]}x{size[0]}"
            for file, size in ((files[0], sizes[0]), (files[other], sizes[other]))
        )
        raise UserError(f"{flag}: {first} but {second}; samples are of one size")
    num_alpha = sum(mode in ALPHA_MODES for _, mode in headers)
    if num_alpha:
        warn(f"{flag}: {num_alpha} of {len(files)} images have an alpha channel, which is left out, as in pytorch-fid")
    is_grey = all(mode in GREY_MODES for _, mode in headers)  # a mixture is RGB
    width, height = sizes[0]
    shape = (height, width, 1 if is_grey else 3)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            images = np.empty((len(batch), *shape), np.uint8)
            for file, pixels in zip(batch, images, strict=True):
                with _opened(file, flag) as image:
                    if image.size != (width, height):
                        raise BrokenImageError(f"it is another one than before, {'x'.join(map(str, image.size))}")
                    image.load()
                    copy_pixels(image, pixels)
            yield images

    return Samples(len(files), shape, partial(_warn_if_dark, read, flag))


def _image_header(file: Path, flag: str) -> tuple[tuple[int, int], str]:
    """((width, height), mode of the pixels)."""
    with _opened(file, flag) as image:
        mode, size = image.mode, image.size
    if mode not in MODES:
        raise UserError(f"{flag}: {file.name} has the pixels {mode}; samples are RGB or grey of 8 bits")
    return size, mode


@contextlib.contextmanager
def _opened(file: Path, flag: str) -> Iterator[Image.Image]:
    """The image, not decoded yet; UserError for what opening or decoding it raises."""
    try:
        with open_image(file) as image:
            yield image
    except BrokenImageError as error:
        raise UserError(f"{flag}: {file.name} is not a readable image ({error})") from None


class SampleWriter:
    """Writes batches to `path`, an npz if that is its suffix, else a folder of PNGs (000000.png, ...), in which earlier
    samples are replaced; the npz appears when it is whole, and the folder says until then that it is not. To be used in
    a `with` statement.

    UserError where the folder holds anything else; WriteError where the system does not let the samples be written,
    which is then kept as `failure`; ValueError for other numbers of samples or labels.
    """

    def __init__(self, path: str | Path, num_samples: int):
        check_sample_path(path)
        self.path, self.num_samples, self.labels = Path(path), num_samples, []
        self.archive: zipfile.ZipFile | None = None
        self.file: IO[bytes] | None = None
        self.failure: WriteError | None = None
        self.writing = self._write_npz() if self.path.suffix == ".npz" else self._fill_folder()

    def __enter__(self) -> "SampleWriter":
        self.writing.__enter__()
        return self

    def write(self, images: UInt8[np.ndarray, "b h w c"], labels: Int[np.ndarray, " labels"]) -> None:
        if len(images) != len(labels):
            raise ValueError(f"{len(labels)} labels of {len(images)} images")
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

    def __exit__(self, kind, error, trace) -> None:
        error = error or self.failure  # of which the caller may have chosen to go on
        try:
            self.writing.__exit__(type(error) if error else None, error, trace)
        except WriteError as failure:
            self.failure = failure
            raise

    @property
    def num_written(self) -> int:
        return sum(map(len, self.labels))

    @contextlib.contextmanager
    def _write_npz(self) -> Iterator[None]:
        with (
            atomic_write(self.path) as temporary,
            open(os.devnull, "wb") as nowhere,
            temporary.open("wb") as file,
            zipfile.ZipFile(file, "w") as self.archive,
        ):
            try:
                yield
                if self.file is not None:
                    self.file.close()
                    with self.archive.open("arr_1.npy", "w") as labels:
                        npy.write_array(labels, np.concatenate(self.labels))
                self._check_count()
            except BaseException:
                # What closing writes would fail again, over the first error.
                self.archive.fp = nowhere
                if self.file is not None:
                    self.file.close()
                self.archive.fp = None
                raise

    def _append(self, images: UInt8[np.ndarray, "b h w c"]) -> None:
        assert self.archive is not None
        if self.file is None:
            self.file = self.archive.open("arr_0.npy", "w", force_zip64=True)
            shape = (self.num_samples, *images.shape[1:])
            npy.write_array_header_1_0(self.file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        self.file.write(np.ascontiguousarray(images).data)

    @contextlib.contextmanager
    def _fill_folder(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        mark_unfinished(self.path, self.num_samples)
        for file in self.path.iterdir():
            if _is_sample(file):
                file.unlink()
        yield
        self._check_count()
        mark_finished(self.path)

    def _write_pngs(self, images: UInt8[np.ndarray, "b h w c"]) -> None:
        for number, image in enumerate(images, self.num_written):
            with (
                explaining_full_disk(lambda number=number: f"{number} of {self.num_samples} samples are whole"),
                atomic_write(self.path / f"{number:06d}.png", is_synced=False) as temporary,
            ):
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, "PNG")

    def _check_count(self) -> None:
        if self.num_written != self.num_samples:
            raise ValueError(f"{self.num_written} samples were written to {self.path}, not {self.num_samples}")
