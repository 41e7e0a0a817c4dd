"""Image files in folders, on a disk (folder:PATH) or in an archive, whose classes and splits
utils/data/folder_layout.py finds.

Every image is decoded once before training starts (utils/images/checks.py), unless --check_images 0 trusts them.
Nothing is kept of an image but its path, its label and some bytes.
"""

import contextlib
import contextvars
import dataclasses
import os
import posixpath
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

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
from utils.data.fingerprint import Fingerprint, Rows
from utils.data.folder_layout import MAX_LISTED, describe_layout, find_classes, find_splits, scan_images
from utils.data.folder_tables import Asked, digest_rows, make_own_condition, read_conditions
from utils.images.checks import CheckedImages, check_images, read_image_of, trust_images
from utils.images.decoding import CHANNELS, MAX_MEGAPIXELS, MODES, SIXTEEN_BITS, BrokenImageError, read_image
from utils.images.pixels import UINT8, describe_range
from utils.images.sizes import Size, write_size
from utils.images.tables import COLUMNS
from utils.storage.remote_tree import RemoteTree
from utils.storage.tree import LocalTree, Tree, relative
from utils.storage.urls import is_url


def load_folder(name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns the split of a folder of image files, see `load_images`. Raises UserError if the folder is missing or
    unfinished, too."""
    path = name.partition(":")[2]
    if is_url(path):
        return load_archive(name, split, options, RemoteTree)
    tree = LocalTree(Path(path))
    if tree.folder.is_file():
        raise UserError(f"--dataset_name={name}: {tree.root} is a file; zip:, tar:, parquet: and npz: read files")
    if not tree.folder.is_dir():
        raise UserError(f"--dataset_name={name}: there is no folder {tree.root}; {describe_layout(tree)}")
    if tree.is_file(UNFINISHED):  # written by sample.py or eval_fid.py
        check_finished(list(tree.folder.glob("*.png")), tree.folder, f"--dataset_name={name}")
    return load_images(tree, name, split, options)


def load_archive(name: str, split: str, options: DataOptions, open_tree: Callable[[str], Tree]) -> ImageDataset:
    """Returns the split of the images in an archive, see `load_images`; `open_tree` opens it by its name. Raises
    UserError for what is no such archive."""
    return load_images(_once(name, lambda: open_tree(name)), name, split, options)


def load_images(tree: Tree, name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns the split of the image files in a tree, each turned upright, its middle resized to `options.size`.

    Raises UserError if there are no images, splits that may be classes, or broken files.
    """
    size = options.size
    assert size is not None  # `load_dataset` has filled in the default

    # Images of the split. Of data without a validation split a part is held out.
    columns = options.condition_columns or tree.default_columns
    asked = None if columns is None else Asked.of_text(columns)
    listed, train = list_split(tree, split, options, asked)

    # Classes. WordNet ids of ImageNet get their English names.
    names = listed.class_names
    if len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        names = imagenet_class_names()
    mode = options.image_mode or listed.mode

    # Conditions, whose facts are those of the training images. A listing tells them apart by a number.
    condition = None
    identities: Any = listed.labels
    if asked and listed.columns:
        names = names if "class" in asked.kinds else ()
        condition = make_own_condition(
            asked, {"label": train.labels, **train.columns}, train.numbers, names, options.text_encoder
        )
        identities = digest_rows(listed.labels, listed.columns)
    return ImageDataset(
        name=name,
        split=split,
        source=ImageFiles(tree, listed.paths, listed.labels, size, mode, options.max_megapixels, listed.columns),
        image_shape=(*size, CHANNELS[mode]),
        class_names=names,
        random_flip=False,
        fingerprint=Fingerprint.of_rows("files", Rows(listed.keys, identities, listed.digests)),
        empty_classes=find_empty_classes(listed.labels, len(names)) if names else (),
        own_condition=condition,
        is_remote=tree.is_remote,
        pixels=SIXTEEN_BITS if mode == "I;16" else UINT8,
    )


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Source of image files, turned upright and brought to `size`, (height, width), and to a mode of decoding.MODES."""

    tree: Tree
    paths: Sequence[str]
    labels: Int32[np.ndarray, " n"]
    size: Size
    mode: str = "RGB"
    max_megapixels: float = MAX_MEGAPIXELS
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of conditions, by keys of an example

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        # Checked before training, but a run is long: files may go or be replaced meanwhile.
        name = self.tree.show(self.paths[index])
        try:
            content = read_image_of(self.tree, self.paths[index], self.max_megapixels)
        except (OSError, BrokenImageError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{name} cannot be read any more ({reason}); bring it back") from error
        image = read_image(content, name, self.size, mode=self.mode, max_megapixels=self.max_megapixels)
        return {"image": image, **self.read_condition(index)}

    def read_condition(self, index: int) -> Example:
        """Returns an example without its image, of which nothing is decoded."""
        values = {key: column[index] for key, column in self.columns.items()}
        if "caption" in values:
            values["caption"] = str(values["caption"])
        return {"label": self.labels[index], **values}


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """The readable images of one split, sorted by class and name."""

    class_names: tuple[str, ...]
    paths: list[str]
    labels: Int32[np.ndarray, " n"]
    keys: list[str]  # names that stay the same wherever the tree is
    digests: np.ndarray  # of the files' contents; b'' where they are not known
    mode: str  # of decoding.MODES, which keeps what all of them have
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of a table, by keys of an example
    numbers: tuple[str, ...] = ()  # names of those in "conditions"

    def take(self, rows: Sequence[int] | Int[np.ndarray, " m"]) -> "FolderSplit":
        """Returns these rows alone."""
        rows = np.asarray(rows, np.int64)
        return dataclasses.replace(
            self,
            paths=[self.paths[row] for row in rows],
            labels=self.labels[rows],
            keys=[self.keys[row] for row in rows],
            digests=self.digests[rows],
            columns={key: column[rows] for key, column in self.columns.items()},
        )

    def hold_out(self, tree: Tree) -> tuple["FolderSplit", "FolderSplit"]:
        """Returns (images to train on, images held out). Raises UserError of one image."""
        if len(self.paths) < 2:
            raise UserError(
                f"--dataset_name={tree.source}: {tree.root} holds 1 image; 2 are needed, one of them to hold out"
            )
        train, validation = hold_out(self.keys, num_held_out(len(self.paths)))
        return self.take(train), self.take(validation)


_listings: contextvars.ContextVar[dict | None] = contextvars.ContextVar("listings", default=None)


@contextlib.contextmanager
def sharing_listings() -> Iterator[None]:
    """Lists the same files once in a block that loads several splits: of a million it takes seconds."""
    token = _listings.set({})
    try:
        yield
    finally:
        _listings.reset(token)


def _once(key: Hashable, make: Callable[[], Any]) -> Any:
    """Returns what `make` makes, the same again for this key within `sharing_listings`."""
    shared = _listings.get()
    if shared is None:
        return make()
    if key not in shared:
        shared[key] = make()
    return shared[key]


def list_split(
    tree: Tree, split: str, options: DataOptions, asked: Asked | None = None
) -> tuple[FolderSplit, FolderSplit]:
    """Returns (images of `split`, those of the training split).

    Raises UserError naming broken files and classes without images, or leaves them out with a warning, as
    `options.broken_images` says. Raises it, too, if folders may be splits or classes.
    """
    # The training split settles the classes; it is listed for both.
    train, validation = _once((tree.source, options), lambda: _list_training(tree, options, asked))
    if split == "train":
        return train, train
    if isinstance(validation, str):
        validation = _list_validation(tree, validation, train, options, asked)
    return validation, train


def _list_training(tree: Tree, options: DataOptions, asked: Asked | None) -> tuple[FolderSplit, FolderSplit | str]:
    """Returns (training images, validation images held out of them, or the folder where these are)."""
    train_folder, validation_folder = find_splits(tree, asked)
    train = _list_files(tree, train_folder, options, asked)
    if validation_folder is None:
        return train.hold_out(tree)
    # A flat folder of validation images tells no classes apart, unless a table does.
    if asked is None and len(train.class_names) > 1 and not scan_images(tree, validation_folder).folders:
        shown = tree.show(validation_folder), tree.show(train_folder)
        warn(f"{shown[0]} has no folders of classes: part of {shown[1]} is held out for validation instead")
        return train.hold_out(tree)
    return train, validation_folder


def _list_validation(
    tree: Tree, folder: str, train: FolderSplit, options: DataOptions, asked: Asked | None
) -> FolderSplit:
    """Returns the validation images in a folder, with the labels of training."""
    validation = _list_files(tree, folder, options, asked, is_training=False)
    flag = f"--dataset_name={tree.source}: "
    unknown = sorted(set(validation.class_names) - set(train.class_names))
    if unknown:
        raise UserError(
            f"{flag}{tree.show(folder)} has a class {unknown[0]!r} that the training images lack; move it out"
        )
    if validation.numbers != train.numbers:
        theirs, ours = (", ".join(part.numbers) for part in (validation, train))
        raise UserError(
            f"{flag}the table of {tree.show(folder)} has the numbers {theirs}, that of the training images {ours}; "
            "name those to learn by --condition_columns vector:a,b"
        )
    labels = np.array([train.class_names.index(name) for name in validation.class_names], np.int32)
    return dataclasses.replace(
        validation, class_names=train.class_names, labels=labels[validation.labels], mode=train.mode
    )


def _text(name: str) -> str:
    """Returns a file's name as UTF-8, whatever the locale; bytes of another encoding as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _list_files(
    tree: Tree, folder: str, options: DataOptions, asked: Asked | None, is_training: bool = True
) -> FolderSplit:
    """Lists the images of the split in `folder`, each decoded once; those that are broken are refused or skipped."""
    table = asked.find_table(tree, folder) if asked else None
    classes = find_classes(tree, folder, asked, has_classes=asked is None or asked.has_folders(table))

    # Every file, decoded once, unless they are trusted.
    paths = [path for scanned in classes.values() for path in scanned.images]
    check = check_images if options.check_images else trust_images
    checked = check(tree, paths, options.max_megapixels)
    shown = tree.show(folder)
    _say_smallest(tree, folder, paths, checked, options.size)
    _name_broken(tree, folder, paths, checked, options)
    readable = np.ones(len(paths), bool)
    readable[list(checked.reasons)] = False

    # A look at the range, of one split: a data set is warned of once.
    if is_training:
        known = readable & (checked.heights > 0)
        if known.any() and (remark := describe_range(np.stack([checked.lowest, checked.highest], axis=1)[known])):
            warn_once(f"{shown}: {remark}")

    # Classes, without what is to be skipped.
    names = []
    labels = np.full(len(paths), -1, np.int32)
    start = 0
    for subfolder, scanned in classes.items():
        rows = slice(start, start + len(scanned.images))
        start = rows.stop
        if not readable[rows].any():
            what = f"the folder {tree.show(subfolder)} of a class holds no {'readable ' * bool(scanned.images)}images"
            if options.broken_images == "refuse":
                raise UserError(
                    f"--dataset_name={tree.source}: {what}; fill it or move it out, or give --broken_images skip"
                )
            warn(f"skipped: {what}")
            continue
        labels[rows] = len(names)
        names.append(_text(posixpath.basename(subfolder) or tree.title))
    if not names:
        raise UserError(f"--dataset_name={tree.source}: {shown} holds no readable images; {describe_layout(tree)}")
    # Relative to the split, so that the data may be moved.
    keys = [_text(relative(path, folder)) for path in paths]
    mode = _choose_mode(shown, checked.modes[readable], options if is_training else None)
    split = FolderSplit(tuple(names), paths, labels, keys, checked.digests, mode)
    if not readable.all():
        split = split.take(np.flatnonzero(readable))
    return split if asked is None else _add_conditions(tree, split, asked, table, folder, SPLITS[not is_training])


def _name_broken(tree: Tree, folder: str, paths: Sequence[str], checked: CheckedImages, options: DataOptions) -> None:
    """Warns of images that cannot be read. Raises UserError, unless they are to be skipped."""
    if not checked.reasons:
        return
    reasons = "; ".join(
        f"{tree.show(paths[row])} ({reason})" for row, reason in sorted(checked.reasons.items())[:MAX_LISTED]
    )
    count = len(checked.reasons)
    what = f"{count} of {len(paths)} images cannot be read: {reasons}{'; ...' * (count > MAX_LISTED)}"
    if options.broken_images == "refuse":
        raise UserError(
            f"--dataset_name={tree.source}: {what}. Put good copies in their place, or give --broken_images skip"
        )
    warn(f"{tree.show(folder)}: skipped: {what}")


def _add_conditions(
    tree: Tree, split: FolderSplit, asked: Asked, table: str | None, folder: str, name: str
) -> FolderSplit:
    """Returns the images of a split, called `name`, with the conditions that are asked for; without those whose label
    is -1."""
    found = read_conditions(asked, tree, table, split.paths, folder)
    split = dataclasses.replace(split, columns=found.columns, numbers=found.names)
    if found.labels is None:
        return split
    labels = np.array(found.labels, np.int32)
    split = dataclasses.replace(split, labels=labels, class_names=found.class_names)
    labelled = np.flatnonzero(labels >= 0)
    if len(labelled) < len(labels):
        where = tree.show(folder if table in (None, COLUMNS) else table)
        warn_once(unlabelled_message(where, name, len(labels) - len(labelled), len(labels)))
        split = split.take(labelled)
    return split


def _choose_mode(folder: str, modes: np.ndarray, options: DataOptions | None) -> str:
    """Returns the mode of images that have `modes`, numbers of MODES: colour if one of them has it, 16 bits if all do.

    With `options` that leave the mode open, says where it is that of 16 bits.
    """
    found = {MODES[mode] for mode in np.unique(modes)}
    if "RGB" in found:
        return "RGB"
    if found != {"I;16"}:
        return "L"
    if options and options.image_mode is None:
        warn_once(
            f"{folder}: all images have 16 bits: they are read as float32 in 0 .. 1; --image_mode L rounds them to 8"
        )
    return "I;16"


def _say_smallest(tree: Tree, folder: str, paths: Sequence[str], checked: CheckedImages, size: Size | None) -> None:
    """Warns of images that are enlarged to become (height, width) `size`."""
    if size is None:
        return
    # The share of the size that the side has which an image lacks most.
    known = np.flatnonzero(checked.heights > 0)
    shares = np.minimum(checked.heights[known] / size[0], checked.widths[known] / size[1])
    if len(known) and shares.min() < 1:
        row = int(known[shares.argmin()])
        height, width = checked.heights[row], checked.widths[row]
        own = f"has a side of {min(height, width)}" if size[0] == size[1] else f"has {height}x{width}"
        warn_once(
            f"{tree.show(folder)}: images below {write_size(size)} pixels are enlarged; the smallest, "
            f"{tree.show(paths[row])}, {own}"
        )
