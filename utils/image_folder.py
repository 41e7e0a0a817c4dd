"""Folders of image files: their classes and splits, and a check of every file before training starts.

A folder holds a subfolder for each class, or images of one class; either of them also below `train` and `validation`
(or `val`). The check decodes every image once, so that no file ends an epoch halfway; its result is kept in the cache
folder and made anew when a file changes.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.errors import UserError
from utils.files import cache_folder
from utils.images import BrokenImageError, decode_image, read_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CHECK_VERSION = 1  # of what is decoded how; raise it when utils/images.py takes other files for broken
FEW = 3  # files named in a message


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Source of image files, turned upright and brought to RGB of `size` x `size`."""

    files: Sequence[tuple[Path, int]]  # and their labels
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        path, label = self.files[index]
        return {"image": read_image(path, str(path), self.size, upright=True), "label": np.int32(label)}


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """The readable images of one split, sorted by class and name."""

    class_names: tuple[str, ...]
    files: list[tuple[Path, int]]  # and their labels
    keys: list[str]  # names that stay the same wherever the folder is


def list_folder(root: Path, split: str, broken_images: str, size: int) -> tuple[FolderSplit, bool]:
    """(images of `split` below `root`, whether they are the whole data set, of which a part is to be held out).

    Broken files and classes without images raise UserError naming them, or are left out with a message, as
    `broken_images` ('refuse' or 'skip') says. `size` is that to which images will be brought, for a message.
    """
    flag = f"--dataset_name=folder:{root}"
    if not root.is_dir():
        raise UserError(f"{flag}: there is no folder {root}; {_layout(root)}")
    train_folder, validation_folder = _find_splits(root)
    train = _list_split(train_folder, root, broken_images, size)
    if validation_folder is None:
        return train, True
    if len(train.class_names) > 1 and not _scan(validation_folder).folders:
        say(f"{validation_folder} has no folders of classes: part of {train_folder} is held out for validation instead")
        return train, True
    if split == "train":
        return train, False
    validation = _list_split(validation_folder, root, broken_images, size)
    unknown = sorted(set(validation.class_names) - set(train.class_names))
    if unknown:
        raise UserError(f"{flag}: {validation_folder} has a class {unknown[0]!r} that {train_folder} lacks; remove it")
    labels = [train.class_names.index(name) for name in validation.class_names]
    files = [(path, labels[label]) for path, label in validation.files]
    return FolderSplit(train.class_names, files, validation.keys), False


def _find_splits(root: Path) -> tuple[Path, Path | None]:
    """(folder of the training split, folder of the validation split or None where it is to be held out)."""
    names = [folder.name for folder in _scan(root).folders]
    validation = next((root / name for name in ("validation", "val") if name in names), None)
    # Beside other folders and without a validation split, `train` is a class: pictures of trains.
    if "train" in names and (validation or set(names) <= {"train", "test"}):
        return root / "train", validation
    return root, None


def _layout(root: Path) -> str:
    suffixes = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    return f"expected are {root}/CLASS/IMAGE or {root}/IMAGE (or the same below {root}/train), images being {suffixes}"


def _list_split(folder: Path, root: Path, broken_images: str, size: int) -> FolderSplit:
    flag = f"--dataset_name=folder:{root}"
    top = _scan(folder)
    classes = {subfolder: _scan(subfolder) for subfolder in top.folders}
    if not any(scanned.images for scanned in classes.values()):
        if not top.images:
            raise UserError(f"{flag}: {folder} holds no images; {_layout(root)}")
        classes = {root.resolve(): top}
    elif top.images:
        raise UserError(f"{flag}: {folder} holds {top.images[0].name} beside folders of classes; move it into one")
    others = [path for scanned in classes.values() for path in scanned.others]
    if others:
        say(f"{folder}: ignored {_some(others, 'file')} that no suffix marks as an image")

    paths = tuple(path for scanned in classes.values() for path in scanned.images)
    broken = _check(folder, paths, size)
    if broken:
        reasons = "; ".join(f"{path} ({reason})" for path, reason in list(broken.items())[:FEW])
        what = f"{len(broken)} of {len(paths)} images cannot be read: {reasons}{'; ...' * (len(broken) > FEW)}"
        if broken_images == "refuse":
            raise UserError(f"{flag}: {what}. Replace or remove them, or give --broken_images skip")
        say(f"{folder}: skipped: {what}")
    names, files = [], []
    for subfolder, scanned in classes.items():
        readable = [path for path in scanned.images if path not in broken]
        if not readable:
            what = f"the folder {subfolder} of a class holds no {'readable ' * bool(scanned.images)}images"
            if broken_images == "refuse":
                raise UserError(f"{flag}: {what}; fill or remove it, or give --broken_images skip")
            say(f"skipped: {what}")
            continue
        files += [(path, len(names)) for path in readable]
        names.append(subfolder.name)
    if not files:
        raise UserError(f"{flag}: {folder} holds no readable images; {_layout(root)}")
    return FolderSplit(tuple(names), files, [path.relative_to(folder).as_posix() for path, _ in files])


@dataclasses.dataclass(frozen=True)
class _Scanned:
    """What lies directly in a folder, sorted by name, hidden things left out."""

    images: list[Path]
    others: list[Path]
    folders: list[Path]


def _scan(folder: Path) -> _Scanned:
    scanned = _Scanned([], [], [])
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            is_image = entry.name.lower().endswith(IMAGE_SUFFIXES)
            kind = scanned.folders if entry.is_dir() else scanned.images if is_image else scanned.others
            kind.append(Path(entry.path))
    return scanned


@functools.lru_cache(maxsize=4)  # the splits of one folder are asked for one after the other
def _check(folder: Path, paths: tuple[Path, ...], size: int) -> dict[Path, str]:
    """{image that cannot be read: why}; says which images are smaller than `size`."""
    digest = hashlib.sha256(str(CHECK_VERSION).encode())
    for path in paths:
        facts = path.stat()
        digest.update(f"{path.absolute()} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    kept = cache_folder() / f"checked-{digest.hexdigest()[:32]}.json"
    try:
        result = json.loads(kept.read_text())
    except (OSError, ValueError):
        result = _decode_all(paths)
        _keep(kept, result)
    smallest, side = result["smallest"], result["side"]
    if smallest is not None and side < size:
        say(f"{folder}: images below {size} pixels are enlarged; the smallest, {smallest}, has a side of {side}")
    return {Path(path): reason for path, reason in result["broken"].items()}


def _decode_all(paths: Sequence[Path]) -> dict:
    """{'broken': {path: reason}, 'smallest': path of the readable image of the shortest side, 'side': that side}."""

    def decode(path: Path) -> tuple[int, str]:
        try:
            return min(decode_image(path, upright=True).size), ""
        except BrokenImageError as error:
            return 0, str(error)

    broken, smallest, shortest = {}, None, sys.maxsize
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        # A bar only where it takes more than a moment.
        bar = tqdm(pool.map(decode, paths), "checking every image, once", len(paths), unit="image", delay=5)
        for path, (side, reason) in zip(paths, bar, strict=True):
            if reason:
                broken[str(path)] = reason
            elif side < shortest:
                smallest, shortest = str(path), side
    return {"broken": broken, "smallest": smallest, "side": shortest}


def _keep(file: Path, result: dict) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(result))
        os.replace(temporary, file)
    except OSError:
        pass  # a cache that cannot be written is checked again next time


def _some(paths: Sequence[Path], noun: str) -> str:
    """'3 files (a/x.txt, ...)'."""
    names = ", ".join(str(path) for path in paths[:FEW]) + ", ..." * (len(paths) > FEW)
    return f"{len(paths)} {noun}{'s' * (len(paths) > 1)} ({names})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
