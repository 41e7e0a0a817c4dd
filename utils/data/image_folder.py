"""Folders of image files (folder:PATH), whose classes and splits utils/data/folder_layout.py finds.

Every image is decoded once before training starts (`check_images` of utils/images/folders.py), so that no file ends an
epoch halfway.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.base.files import UNFINISHED, check_finished
from utils.base.messages import UserError, warn, warn_once
from utils.conditions.classes import imagenet_class_names
from utils.data.dataset import (
    SPLITS,
    DataOptions,
    Example,
    ImageDataset,
    find_empty_classes,
    hold_out,
    num_held_out,
    unlabelled_message,
)
from utils.data.fingerprint import Fingerprint, Row
from utils.data.folder_layout import MAX_LISTED, describe_layout, find_classes, find_splits, scan_images
from utils.data.folder_tables import Asked, digest_rows, make_own_condition, read_conditions
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
    check_images,
)
from utils.images.pixels import UINT8, describe_range
from utils.images.sizes import Size, write_size


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
    asked = None if options.condition_columns is None else Asked.of_text(options.condition_columns)
    listed, train = list_folder(root, split, options, asked)

    # Classes. WordNet ids of ImageNet get their English names.
    names = listed.class_names
    if len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        names = imagenet_class_names()
    labels = [label for _, label in listed.files]
    mode = options.image_mode or listed.mode

    # Conditions, whose facts are those of the training images. A listing tells them apart by a number.
    condition = None
    identities = labels
    if asked and listed.columns:
        names = names if "class" in asked.kinds else ()
        train_labels = np.array([label for _, label in train.files], np.int32)
        columns = {"label": train_labels, **train.columns}
        condition = make_own_condition(asked, columns, train.numbers, names, options.text_encoder)
        identities = digest_rows(labels, listed.columns)
    rows = [Row(*values) for values in zip(listed.keys, identities, listed.digests, strict=True)]
    return ImageDataset(
        name=name,
        split=split,
        source=ImageFiles(listed.files, size, mode, options.max_megapixels, listed.columns),
        image_shape=(*size, CHANNELS[mode]),
        class_names=names,
        random_flip=False,
        fingerprint=Fingerprint.of_rows("files", rows),
        empty_classes=find_empty_classes(labels, len(names)) if names else (),
        own_condition=condition,
        pixels=SIXTEEN_BITS if mode == "I;16" else UINT8,
    )


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Source of image files, turned upright and brought to `size`, (height, width), and to a mode of decoding.MODES."""

    files: Sequence[tuple[Path, int]]  # and their labels
    size: Size
    mode: str = "RGB"
    max_megapixels: float = MAX_MEGAPIXELS
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of conditions, by keys of an example

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        # Checked before training, but a run is long: files may go or be replaced meanwhile.
        path, _ = self.files[index]
        try:
            content = read_image_file(path, self.max_megapixels)
        except (OSError, BrokenImageError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read any more ({reason}); bring it back") from error
        image = read_image(content, str(path), self.size, mode=self.mode, max_megapixels=self.max_megapixels)
        return {"image": image, **self.read_condition(index)}

    def read_condition(self, index: int) -> Example:
        """Returns an example without its image, of which nothing is decoded."""
        values = {key: column[index] for key, column in self.columns.items()}
        if "caption" in values:
            values["caption"] = str(values["caption"])
        return {"label": np.int32(self.files[index][1]), **values}


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """The readable images of one split, sorted by class and name."""

    class_names: tuple[str, ...]
    files: list[tuple[Path, int]]  # and their labels
    keys: list[str]  # names that stay the same wherever the folder is
    digests: list[str]  # of the files' contents
    mode: str  # of decoding.MODES, which keeps what all of them have
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of a table, by keys of an example
    numbers: tuple[str, ...] = ()  # names of those in "conditions"

    def take(self, rows: Sequence[int]) -> "FolderSplit":
        """Returns these rows alone."""

        def take(column):
            return [column[row] for row in rows]

        columns = {key: column[list(rows)] for key, column in self.columns.items()}
        return dataclasses.replace(
            self, files=take(self.files), keys=take(self.keys), digests=take(self.digests), columns=columns
        )

    def hold_out(self, flag: str, root: Path) -> tuple["FolderSplit", "FolderSplit"]:
        """Returns (images to train on, images held out). Raises UserError, which begins with `flag`, of one image."""
        if len(self.files) < 2:
            raise UserError(f"{flag}: {root} holds 1 image; 2 are needed, one of them to hold out")
        train, validation = hold_out(self.keys, num_held_out(len(self.files)))
        return self.take(train), self.take(validation)


def list_folder(
    root: Path, split: str, options: DataOptions, asked: Asked | None = None
) -> tuple[FolderSplit, FolderSplit]:
    """Returns (images of `split` below `root`, those of the training split).

    Raises UserError naming broken files and classes without images, or leaves them out with a warning, as
    `options.broken_images` says. Raises it, too, if folders may be splits or classes.
    """
    flag = f"--dataset_name=folder:{root}"
    if not root.is_dir():
        raise UserError(f"{flag}: there is no folder {root}; {describe_layout(root)}")

    # The training split settles the classes.
    train_folder, validation_folder = find_splits(root, asked)
    train = _list_split(train_folder, root, options, asked)
    if validation_folder is None:
        parts = train.hold_out(flag, root)
        return parts[SPLITS.index(split)], parts[0]
    # A flat folder of validation images tells no classes apart, unless a table does.
    if asked is None and len(train.class_names) > 1 and not scan_images(validation_folder).folders:
        warn(
            f"{validation_folder} has no folders of classes: part of {train_folder} is held out for validation instead"
        )
        parts = train.hold_out(flag, root)
        return parts[SPLITS.index(split)], parts[0]
    if split == "train":
        return train, train

    # Validation images, with the labels of training.
    validation = _list_split(validation_folder, root, options, asked, is_training=False)
    unknown = sorted(set(validation.class_names) - set(train.class_names))
    if unknown:
        raise UserError(
            f"{flag}: {validation_folder} has a class {unknown[0]!r} that {train_folder} lacks; move it out"
        )
    if validation.numbers != train.numbers:
        theirs, ours = (", ".join(part.numbers) for part in (validation, train))
        raise UserError(
            f"{flag}: the table of {validation_folder} has the numbers {theirs}, that of {train_folder} {ours}; name "
            "those to learn by --condition_columns vector:a,b"
        )
    labels = [train.class_names.index(name) for name in validation.class_names]
    files = [(path, labels[label]) for path, label in validation.files]
    return dataclasses.replace(validation, class_names=train.class_names, files=files, mode=train.mode), train


def _text(name: str) -> str:
    """Returns a file's name as UTF-8, whatever the locale; bytes of another encoding as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _list_split(
    folder: Path, root: Path, options: DataOptions, asked: Asked | None, is_training: bool = True
) -> FolderSplit:
    """Lists the images of the split in `folder`, each decoded once; those that are broken are refused or skipped."""
    flag = f"--dataset_name=folder:{root}"
    table = asked.find_table(folder, root) if asked else None
    classes = find_classes(folder, root, asked, has_classes=asked is None or asked.has_folders(table))

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
        raise UserError(f"{flag}: {folder} holds no readable images; {describe_layout(root)}")
    # Relative to the split, so that the data may be moved.
    keys = [_text(path.relative_to(folder).as_posix()) for path, _ in files]
    mode = _choose_mode(folder, [checked[path].mode for path, _ in files], options if is_training else None)
    split = FolderSplit(tuple(names), files, keys, [checked[path].digest for path, _ in files], mode)
    return split if asked is None else _add_conditions(split, asked, table, folder, SPLITS[not is_training])


def _add_conditions(split: FolderSplit, asked: Asked, table: Path | None, folder: Path, name: str) -> FolderSplit:
    """Returns the images of a split, called `name`, with the conditions that are asked for; without those whose label
    is -1."""
    paths = [path for path, _ in split.files]
    found = read_conditions(asked, table, paths, folder)
    split = dataclasses.replace(split, columns=found.columns, numbers=found.names)
    if found.labels is None:
        return split
    files = list(zip(paths, found.labels, strict=True))
    split = dataclasses.replace(split, files=files, class_names=found.class_names)
    labelled = [row for row, label in enumerate(found.labels) if label >= 0]
    if len(labelled) < len(files):
        warn_once(unlabelled_message(str(table), name, len(files) - len(labelled), len(files)))
        split = split.take(labelled)
    return split


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
