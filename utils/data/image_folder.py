"""Folders of image files (folder:PATH): their classes and splits.

A folder holds a subfolder for each class, its images at any depth below it, or images of one class; either of them also
below folders named after splits (`train`, `valid`, `test` and the like). Every image is decoded once before training
starts (`check_images` of utils/images/folders.py), so that no file ends an epoch halfway.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.base.files import UNFINISHED, check_finished
from utils.base.messages import UserError, printable, warn, warn_once
from utils.conditions.classes import imagenet_class_names
from utils.data.dataset import SPLITS, DataOptions, Example, ImageDataset, find_empty_classes, hold_out, num_held_out
from utils.data.fingerprint import Fingerprint, Row
from utils.images.decoding import (
    CHANNELS,
    MAX_MEGAPIXELS,
    SIXTEEN_BITS,
    BrokenImageError,
    read_image,
    read_image_file,
)
from utils.images.folders import (
    CheckedImage,
    Scanned,
    check_folders,
    check_images,
    is_table,
    scan,
    system_message,
    unused_message,
)
from utils.images.pixels import UINT8, describe_range
from utils.images.sizes import Size, write_size

# In lower case; a file with another suffix is named as ignored.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
MAX_LISTED = 3  # files named in a message

# Names that folders of splits go by, also as train2017, training_set, seg_test, valid-images.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("masks", "annotations", "segmentations"), "no images to learn"),
}
SPLIT_PATTERN = re.compile(rf"(?:seg[_-])?({'|'.join(SPLIT_NAMES)})(?:[_ -]?(?:set|images?|imgs?|data|split|\d+))*")


def load_folder(name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns the split of a folder of image files, each turned upright, its middle resized to `options.size`.

    Raises UserError if the folder is missing or unfinished, or holds no images, splits that may be classes, or broken
    files.
    """
    root = Path(name.partition(":")[2])
    size = options.size
    assert size is not None  # `load_dataset` has filled in the default
    if (root / UNFINISHED).is_file():  # written by sample.py or eval_fid.py
        check_finished(list(root.glob("*.png")), root, f"--dataset_name={name}")

    # Images of the split. Of data without a validation split a part is held out.
    listed, has_one_split = list_folder(root, split, options)
    if has_one_split:
        if len(listed.files) < 2:
            raise UserError(f"--dataset_name={name}: {root} holds 1 image; 2 are needed, one of them to hold out")
        listed = listed.take(hold_out(listed.keys, num_held_out(len(listed.files)))[SPLITS.index(split)])

    # Classes. WordNet ids of ImageNet get their English names.
    names = listed.class_names
    if len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        names = imagenet_class_names()
    labels = [label for _, label in listed.files]
    mode = options.image_mode or listed.mode
    rows = [Row(*values) for values in zip(listed.keys, labels, listed.digests, strict=True)]
    return ImageDataset(
        name=name,
        split=split,
        source=ImageFiles(listed.files, size, mode, options.max_megapixels),
        image_shape=(*size, CHANNELS[mode]),
        class_names=names,
        random_flip=False,
        fingerprint=Fingerprint.of_rows("files", rows),
        empty_classes=find_empty_classes(labels, len(names)),
        pixels=SIXTEEN_BITS if mode == "I;16" else UINT8,
    )


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Source of image files, turned upright and brought to `size`, (height, width), and to a mode of decoding.MODES."""

    files: Sequence[tuple[Path, int]]  # and their labels
    size: Size
    mode: str = "RGB"
    max_megapixels: float = MAX_MEGAPIXELS

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        # Checked before training, but a run is long: files may go or be replaced meanwhile.
        path, label = self.files[index]
        try:
            content = read_image_file(path, self.max_megapixels)
        except (OSError, BrokenImageError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read any more ({reason}); bring it back") from error
        image = read_image(content, str(path), self.size, mode=self.mode, max_megapixels=self.max_megapixels)
        return {"image": image, "label": np.int32(label)}


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """The readable images of one split, sorted by class and name."""

    class_names: tuple[str, ...]
    files: list[tuple[Path, int]]  # and their labels
    keys: list[str]  # names that stay the same wherever the folder is
    digests: list[str]  # of the files' contents
    mode: str  # of decoding.MODES, which keeps what all of them have

    def take(self, rows: Sequence[int]) -> "FolderSplit":
        """Returns these rows alone."""

        def take(column):
            return [column[row] for row in rows]

        return dataclasses.replace(self, files=take(self.files), keys=take(self.keys), digests=take(self.digests))


def list_folder(root: Path, split: str, options: DataOptions) -> tuple[FolderSplit, bool]:
    """Returns (images of `split` below `root`, whether they are all of the data, of which a part is to be held out).

    Raises UserError naming broken files and classes without images, or leaves them out with a warning, as
    `options.broken_images` says. Raises it, too, if folders may be splits or classes.
    """
    flag = f"--dataset_name=folder:{root}"
    if not root.is_dir():
        raise UserError(f"{flag}: there is no folder {root}; {_layout(root)}")

    # The training split settles the classes.
    train_folder, validation_folder = _find_splits(root)
    train = _list_split(train_folder, root, options)
    if validation_folder is None:
        return train, True
    # A flat folder of validation images tells no classes apart.
    if len(train.class_names) > 1 and not _scan(validation_folder).folders:
        warn(
            f"{validation_folder} has no folders of classes: part of {train_folder} is held out for validation instead"
        )
        return train, True
    if split == "train":
        return train, False

    # Validation images, with the labels of training.
    validation = _list_split(validation_folder, root, options, is_training=False)
    unknown = sorted(set(validation.class_names) - set(train.class_names))
    if unknown:
        raise UserError(
            f"{flag}: {validation_folder} has a class {unknown[0]!r} that {train_folder} lacks; move it out"
        )
    labels = [train.class_names.index(name) for name in validation.class_names]
    files = [(path, labels[label]) for path, label in validation.files]
    return dataclasses.replace(validation, class_names=train.class_names, files=files, mode=train.mode), False


def split_of(folder_name: str) -> str | None:
    """Returns the split that a folder's name stands for, a value of SPLIT_NAMES; None if it stands for none."""
    match = SPLIT_PATTERN.fullmatch(folder_name.lower())
    return match and SPLIT_NAMES[match[1]]


def _find_splits(root: Path) -> tuple[Path, Path | None]:
    """Returns (folder of the training split, folder of the validation split or None if that is to be held out).

    Raises UserError if names of splits stand beside other folders, or if none of them is for training.
    """
    flag = f"--dataset_name=folder:{root}"
    scanned = _scan(root)
    splits = {folder: split_of(folder.name) for folder in scanned.folders}
    named = [folder for folder in scanned.folders if splits[folder]]
    others = [folder for folder in scanned.folders if not splits[folder]]

    # Classes without splits. Pictures of trains beside pictures of busses: a class like the others.
    is_class = [folder.name.lower() for folder in named] == ["train"] and others and not _scan(named[0]).folders
    if not named or is_class:
        return root, None
    if others:
        raise UserError(
            f"{flag}: {_names(named)} may be splits rather than classes, unlike {_names(others)} beside them; move the "
            f"classes into {root}/train, or rename {named[0].name}/ if it is a class"
        )

    # One folder for training, at most one for validation.
    by_split = {split: [folder for folder in named if splits[folder] == split] for split in ("train", "validation")}
    for split, found in by_split.items():
        if len(found) > 1:
            raise UserError(f"{flag}: {_names(found)} could each be the {split} split; leave one of them there")
    if not by_split["train"]:
        fix = "name the folder to train on, or rename what is a class"
        if scanned.images:
            fix = f"move them into {root}/train"
        beside = "images beside it" if scanned.images else "no train/"
        raise UserError(f"{flag}: {root} holds {_names(named)} but {beside}; {fix}")
    (train,) = by_split["train"]
    validation = next(iter(by_split["validation"]), None)

    # The rest is named, not read.
    unused = [folder for folder in named if folder not in (train, validation)]
    not_read = [_names(unused)] if unused else []
    if scanned.images:
        not_read.append(_some([Path(path.name) for path in scanned.images], "image"))
    warn_once(
        f"{root}: training on {train.name}/, validating on {f'{validation.name}/' if validation else 'a part of it'}"
        + f"; not read: {', '.join(not_read)}" * bool(not_read)
    )
    _name_unused(root, scanned)
    return _unwrap(train), validation and _unwrap(validation)


def _unwrap(split_folder: Path) -> Path:
    """Returns the folder of a split, or the only folder in it if that bears the same split's name.

    An archive that is unpacked into a folder of its own name leaves such a nest.
    """
    scanned = _scan(split_folder)
    if len(scanned.folders) == 1 and not scanned.images:
        (below,) = scanned.folders
        if split_of(below.name) == split_of(split_folder.name):
            _name_unused(split_folder, scanned)
            return _unwrap(below)
    return split_folder


def _name_unused(folder: Path, *all_scanned: Scanned) -> None:
    """Warns of files below `folder` that are not used: those that may hold labels, others, and the system's."""
    # Tables of labels matter most: a user may take them for read.
    others = [path for scanned in all_scanned for path in scanned.others]
    if message := unused_message(folder, others, (path for scanned in all_scanned for path in scanned.images)):
        warn_once(message)
    if rest := [path for path in others if not is_table(path)]:
        warn_once(f"{folder}: ignored {_some(rest, 'file')} without the suffix of an image")
    if message := system_message(path for scanned in all_scanned for path in scanned.system):
        warn_once(f"{folder}: {message}")


def _text(name: str) -> str:
    """Returns a file's name as UTF-8, whatever the locale; bytes of another encoding as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _names(folders: Sequence[Path]) -> str:
    listed = ", ".join(f"{printable(folder.name)}/" for folder in folders[:MAX_LISTED])
    return listed + ", ..." * (len(folders) > MAX_LISTED)


def _layout(root: Path) -> str:
    suffixes = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    return f"expected are {root}/CLASS/IMAGE or {root}/IMAGE (or the same below {root}/train), images being {suffixes}"


def _list_split(folder: Path, root: Path, options: DataOptions, is_training: bool = True) -> FolderSplit:
    """Lists the images of the split in `folder`, each decoded once; those that are broken are refused or skipped."""
    flag = f"--dataset_name=folder:{root}"
    classes = _find_classes(folder, root)

    # Every file, decoded once.
    paths = tuple(path for scanned in classes.values() for path in scanned.images)
    checked = check_images(folder, paths, options.max_megapixels)
    _say_smallest(folder, checked, options.size)
    broken = {path: image.reason for path, image in checked.items() if image.reason}
    if broken:
        reasons = "; ".join(f"{path} ({reason})" for path, reason in list(broken.items())[:MAX_LISTED])
        what = f"{len(broken)} of {len(paths)} images cannot be read: {reasons}{'; ...' * (len(broken) > MAX_LISTED)}"
        if options.broken_images == "refuse":
            raise UserError(f"{flag}: {what}. Put good copies in their place, or give --broken_images skip")
        warn(f"{folder}: skipped: {what}")

    # A look at the range, of one split: a data set is warned of once.
    if is_training:
        extremes = [(image.lowest, image.highest) for image in checked.values() if not image.reason]
        if extremes and (remark := describe_range(np.array(extremes))):
            warn_once(f"{folder}: {remark}")

    # Classes, without what is to be skipped.
    names = []
    files = []
    for subfolder, scanned in classes.items():
        readable = [path for path in scanned.images if path not in broken]
        if not readable:
            what = f"the folder {subfolder} of a class holds no {'readable ' * bool(scanned.images)}images"
            if options.broken_images == "refuse":
                raise UserError(f"{flag}: {what}; fill it or move it out, or give --broken_images skip")
            warn(f"skipped: {what}")
            continue
        files += [(path, len(names)) for path in readable]
        names.append(_text(subfolder.name))
    if not files:
        raise UserError(f"{flag}: {folder} holds no readable images; {_layout(root)}")
    # Relative to the split, so that the data may be moved.
    keys = [_text(path.relative_to(folder).as_posix()) for path, _ in files]
    mode = _choose_mode(folder, [checked[path].mode for path, _ in files], options if is_training else None)
    return FolderSplit(tuple(names), files, keys, [checked[path].digest for path, _ in files], mode)


def _choose_mode(folder: Path, modes: Sequence[str], options: DataOptions | None) -> str:
    """Returns the mode of images that have `modes`: colour if one of them has it, 16 bits if all do.

    With `options` that leave the mode open, says where it is that of 16 bits.
    """
    found = set(modes)
    if "RGB" in found:
        return "RGB"
    if found != {"I;16"}:
        return "L"
    if options and options.image_mode is None:
        warn_once(
            f"{folder}: all images have 16 bits: they are read as float32 in 0 .. 1; --image_mode L rounds them to 8"
        )
    return "I;16"


def _find_classes(folder: Path, root: Path) -> dict[Path, Scanned]:
    """Returns {folder of a class: contents at any depth below it}; the root alone if all images are of one class.

    Raises UserError if images lie beside folders of classes, or if there are none.
    """
    flag = f"--dataset_name=folder:{root}"

    # All files, at any depth below the folders of classes.
    top = _scan(folder)
    classes = {subfolder: _scan_below(subfolder, flag) for subfolder in top.folders}
    found = (top, *classes.values())
    images = {subfolder: scanned.images for subfolder, scanned in classes.items() if scanned.images}

    # One class, or a folder for each. Where it might be meant otherwise, a message says what was understood.
    if not images:
        if not top.images:
            raise UserError(f"{flag}: {folder} holds no images; {_layout(root)}")
        classes = {root.resolve(): top}
    elif top.images:
        raise UserError(f"{flag}: {folder} holds {top.images[0].name} beside folders of classes; move it into one")
    elif reason := check_folders(flag, folder, root, images):
        warn_once(f"{folder}: {reason}: all images are of one class")
        classes = {root.resolve(): Scanned([path for paths in images.values() for path in paths])}
    elif len(classes) == 1 and len(below := _scan(next(iter(classes))).folders) > 1:
        name = next(iter(classes))
        warn_once(
            f"{folder}: one class, {name.name}, of all images below it; "
            f"if {_names(below)} are classes, give folder:{name}"
        )
    _name_unused(folder, *found)
    return classes


_scan = functools.partial(scan, suffixes=IMAGE_SUFFIXES)


def _scan_below(folder: Path, flag: str) -> Scanned:
    """Returns the contents at any depth below the folder of a class; links are followed. Raises UserError for splits
    inside of it."""
    found = Scanned()
    seen = set()

    def visit(folder: Path) -> None:
        identity = (folder.stat().st_dev, folder.stat().st_ino)
        if identity in seen:  # a link back to a folder above
            return
        seen.add(identity)
        scanned = _scan(folder)

        # Splits below classes would mix what is to be held out with what is learned.
        splits = [below for below in scanned.folders if split_of(below.name)]
        if splits:
            raise UserError(
                f"{flag}: the class {folder} holds {_names(splits)} as if there were splits in it; put them into "
                "a folder for each split instead, PATH/train/CLASS"
            )

        # One flat list: below the folder of a class, folders mean nothing.
        found.images.extend(scanned.images)
        found.others.extend(scanned.others)
        found.system.extend(scanned.system)
        for below in scanned.folders:
            visit(below)

    visit(folder)
    return found


def _say_smallest(folder: Path, checked: dict[Path, CheckedImage], size: Size | None) -> None:
    """Warns of images that are enlarged to become (height, width) `size`."""
    if size is None:
        return
    # The share of the size that the side has which an image lacks most.
    shares = {
        path: min(image.height / size[0], image.width / size[1]) for path, image in checked.items() if not image.reason
    }
    smallest = min(shares, key=lambda path: shares[path], default=None)
    if smallest is not None and shares[smallest] < 1:
        found = checked[smallest]
        is_square = size[0] == size[1]
        own = f"has a side of {min(found[:2])}" if is_square else f"has {found.height}x{found.width}"
        warn_once(f"{folder}: images below {write_size(size)} pixels are enlarged; the smallest, {smallest}, {own}")


def _some(paths: Sequence[Path], noun: str) -> str:
    """'3 files (a/x.txt, ...)'."""
    names = ", ".join(str(path) for path in paths[:MAX_LISTED]) + ", ..." * (len(paths) > MAX_LISTED)
    return f"{len(paths)} {noun}{'s' * (len(paths) > 1)} ({names})"
