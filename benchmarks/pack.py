"""A data set, the Inception weights and reference statistics as parts of a given size, for a machine without a network.

    python benchmarks/pack.py --dataset_name cifar10 --data_dir DIR --fid_stats STATS.npz --to .parts
    python benchmarks/pack.py --unpack .parts --to runs/data

Images are packed without loss (WebP, many to a sheet). What is unpacked: images.npz for --dataset_name npz:FILE,
inception.pt for --inception_weights, fid_stats.npz for --fid_stats.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import common  # noqa: F401 (finds the suite)
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from utils.base.messages import UserError, log
from utils.data.batches import epoch_batches
from utils.data.dataset import ImageDataset, array_dataset
from utils.data.loaders import load_dataset
from utils.flags import program, reading
from utils.flags.definitions import define_data_flags, define_path
from utils.metrics.inception import inception_weights_path

SHEET = 1024  # images of one, in rows of 32: 1024x1024 pixels of CIFAR-10
COLUMNS = 32
PART = "part_{:04d}"
FILES = ("inception.pt", "fid_stats.npz")


def define_flags() -> None:
    define_data_flags()
    define_path("fid_stats", None, "Reference statistics that go along.")
    define_path("inception_weights", None, "Local copy of the Inception weights.")
    flags.DEFINE_integer("num_validation", 1000, "Validation images that go along.", lower_bound=1)
    flags.DEFINE_integer("part_mib", 24, "Size of a part.", lower_bound=1)
    define_path("unpack", None, "Folder of parts to unpack, instead of packing.")
    define_path("to", None, "Folder for the result.")


def read_split(dataset: ImageDataset, count: int) -> dict[str, np.ndarray]:
    """The first `count` images and labels, sorted by label: alike images compress better side by side."""
    batches = list(epoch_batches(dataset, min(SHEET, count), stop=count))
    images = np.concatenate([batch.image for batch in batches])
    labels = np.concatenate([batch.condition for batch in batches])
    order = np.argsort(labels, kind="stable")
    return {"image": images[order], "condition": labels[order]}


def write_sheets(images: np.ndarray) -> Iterator[bytes]:
    """WebP files of uint8 (n, h, w, c), `SHEET` images each, the last filled up with black."""
    _, height, width, _ = images.shape
    for start in range(0, len(images), SHEET):
        rows = np.zeros((SHEET, height, width, 3), np.uint8)
        rows[: len(images) - start] = images[start : start + SHEET]  # grey ones three times
        sheet = rows.reshape(-1, COLUMNS, height, width, 3).swapaxes(1, 2).reshape(-1, COLUMNS * width, 3)
        content = io.BytesIO()
        Image.fromarray(sheet).save(content, "webp", lossless=True, quality=100, method=4)
        yield content.getvalue()


def read_sheet(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The images (SHEET, h, w, c) of a sheet."""
    height, width, channels = shape
    sheet = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    rows = sheet.reshape(-1, height, COLUMNS, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    return rows[..., :channels]


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def hash_split(images: np.ndarray, labels: np.ndarray) -> str:
    return array_dataset("packed", images, labels).fingerprint.sha256


def add_images(archive: tarfile.TarFile, dataset: ImageDataset, count: int, prefix: str) -> dict[str, np.ndarray]:
    """Adds the sheets of `count` images; the arrays that belong to them."""
    rows = read_split(dataset, count)
    for number, sheet in enumerate(write_sheets(rows["image"])):
        add_file(archive, f"{prefix}images/{number:04d}.webp", sheet)
    arrays = {
        "labels": rows["condition"],
        "shape": dataset.image_shape,
        "sha256": hash_split(rows["image"], rows["condition"]),
    }
    return {f"{prefix}{name}": np.array(value) for name, value in arrays.items()}


def pack(config: ConfigDict) -> None:
    folder = Path(config.to)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"--to={folder} is not empty; name a new folder")
    train, validation = (
        load_dataset(config.dataset_name, split, reading.read_data_options(config)) for split in ("train", "validation")
    )
    content = io.BytesIO()
    labels = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        arrays = add_images(archive, train, len(train.source), "")
        count = min(config.num_validation, len(validation.source))
        arrays |= add_images(archive, validation, count, "validation_")
        np.savez(labels, **arrays, class_names=np.array(train.class_names))
        add_file(archive, "labels.npz", labels.getvalue())
        for name, path in zip(FILES, (inception_weights_path(config.inception_weights), config.fid_stats), strict=True):
            if path is not None:
                add_file(archive, name, Path(path).read_bytes())
    data = content.getvalue()
    size = config.part_mib * 2**20
    for number, start in enumerate(range(0, len(data), size)):
        (folder / PART.format(number)).write_bytes(data[start : start + size])
    (folder / "SHA256").write_text(hashlib.sha256(data).hexdigest() + "\n", encoding="utf-8")
    log(f"{-(-len(data) // size)} parts in {folder}, {len(data) / 2**20:,.0f} MiB")


def unpack(config: ConfigDict) -> None:
    source = Path(config.unpack)
    folder = Path(config.to)
    data = b"".join(path.read_bytes() for path in sorted(source.glob("part_*")))
    try:
        expected = (source / "SHA256").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"--unpack={source}: {error.strerror}: {error.filename}; name what was given as --to") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise UserError(f"--unpack={source}: parts are missing or damaged; bring all of them there")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        contents = {entry.name: archive.extractfile(entry).read() for entry in archive}
    for name in set(FILES) & set(contents):
        (folder / name).write_bytes(contents[name])
    with np.load(io.BytesIO(contents["labels.npz"])) as file:
        saved = dict(file)
    arrays = {"class_names": saved["class_names"]}
    for prefix in ("", "validation_"):
        labels = saved[f"{prefix}labels"]
        shape = tuple(map(int, saved[f"{prefix}shape"]))
        names = sorted(name for name in contents if name.startswith(f"{prefix}images/"))
        images = np.concatenate([read_sheet(contents[name], shape) for name in names])[: len(labels)]
        if hash_split(images, labels) != str(saved[f"{prefix}sha256"]):
            raise UserError(f"--unpack={source}: unpacked images differ from those packed; is Pillow's WebP whole?")
        arrays |= {f"{prefix}images": images, f"{prefix}labels": labels}
    np.savez(folder / "images.npz", **arrays)
    log(f"{len(arrays['images']):,} images and their weights and statistics are in {folder}")


def main(config: ConfigDict) -> None:
    if config.to is None:
        raise UserError("--to is missing; name a folder for the result")
    (unpack if config.unpack else pack)(config)


if __name__ == "__main__":
    program.run_program(define_flags, main)
