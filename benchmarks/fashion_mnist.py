"""Fashion-MNIST (Xiao et al., arXiv:1708.07747) as npz:FILE reads it, from its idx files, packed by gzip or not.

    python benchmarks/fashion_mnist.py --idx /usr/share/datasets/fashion-mnist --out runs/fashion_mnist.npz

On Debian the files are those of the package dataset-fashion-mnist. The 60,000 images of training and the 10,000 of the
test, which become the validation split, are 28x28 and grey, of ten kinds of clothes.
"""

import gzip
import sys
import zlib
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.base.files import atomic_write
from utils.base.messages import UserError, log
from utils.flags import program
from utils.flags.definitions import define_path

CLASS_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# {prefix of the arrays: (prefix of the files, number of images)}
SPLITS = {"": ("train", 60_000), "validation_": ("t10k", 10_000)}
SIDE = 28
UNSIGNED_BYTES = 8  # the third byte of an idx file: the type of its numbers


def define_flags() -> None:
    define_path("idx", "/usr/share/datasets/fashion-mnist", "Folder of the four idx files.")
    define_path("out", "runs/fashion_mnist.npz", "File to write.")


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the bytes (uint8) of an idx file, PATH or PATH.gz, in this shape.

    The file begins with four bytes, of which the third is the type and the fourth the number of axes, and the length of
    each axis as a big-endian integer. Raises UserError for a file that is missing, damaged or of another shape.
    """
    packed = path.with_name(f"{path.name}.gz")
    if not (path.is_file() or packed.is_file()):
        raise UserError(f"--idx={path.parent}: there is no {path.name} or {packed.name}")
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--idx={path.parent}: {packed.name} cannot be unpacked ({error}); fetch it again") from None

    # The whole header follows from the shape.
    header = bytes([0, 0, UNSIGNED_BYTES, len(shape)]) + np.array(shape, ">u4").tobytes()
    if content[: len(header)] != header or len(content) != len(header) + int(np.prod(shape)):
        lengths = "x".join(map(str, shape))
        raise UserError(f"--idx={path.parent}: {path.name} is no idx file of {lengths} bytes; fetch it again")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of both splits by the names of npz:FILE: images (n, 28, 28, 1) and labels (n,), uint8."""
    arrays = {"class_names": np.array(CLASS_NAMES)}
    for prefix, (name, count) in SPLITS.items():
        arrays[f"{prefix}images"] = read_idx(folder / f"{name}-images-idx3-ubyte", (count, SIDE, SIDE))[..., None]
        arrays[f"{prefix}labels"] = read_idx(folder / f"{name}-labels-idx1-ubyte", (count,))
        if arrays[f"{prefix}labels"].max() >= len(CLASS_NAMES):
            raise UserError(f"--idx={folder}: {name}-labels-idx1-ubyte has labels above 9; fetch it again")
    return arrays


def main(config: ConfigDict) -> None:
    arrays = read_arrays(Path(config.idx))
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as path, path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    log(f"written: {out}, {len(arrays['images']):,} images and {len(arrays['validation_images']):,} to validate")


if __name__ == "__main__":
    program.run_program(define_flags, main)
