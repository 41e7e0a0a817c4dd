"""Which folders below a folder of images are splits and which are classes, and what else lies in them.

A folder holds a subfolder for each class, its images at any depth below it, or images of one class; either of them also
below folders named after splits (`train`, `valid`, `test` and the like).
"""

import posixpath
import re
from collections.abc import Sequence

from utils.base.messages import UserError, printable, progress_bar, warn_once
from utils.data.folder_tables import Asked
from utils.images.folders import (
    EDM_TABLE,
    IMAGE_SUFFIXES,
    Scanned,
    check_folders,
    is_table,
    read_edm_labels,
    scan,
    system_message,
    unused_message,
)
from utils.images.tables import TABLES
from utils.storage.tree import Tree, stem

MAX_LISTED = 3  # files named in a message
PACKED_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")

# Names that folders of splits go by, also as train2017, training_set, seg_test, valid-images.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("masks", "annotations", "segmentations"), "no images to learn"),
}
SPLIT_PATTERN = re.compile(rf"(?:seg[_-])?({'|'.join(SPLIT_NAMES)})(?:[_ -]?(?:set|images?|imgs?|data|split|\d+))*")


def scan_images(tree: Tree, folder: str = "") -> Scanned:
    """Returns the entries of a folder, images being those of IMAGE_SUFFIXES."""
    return scan(tree, folder, IMAGE_SUFFIXES)


def split_of(folder_name: str) -> str | None:
    """Returns the split that a folder's name stands for, a value of SPLIT_NAMES; None if it stands for none."""
    match = SPLIT_PATTERN.fullmatch(folder_name.lower())
    return match and SPLIT_NAMES[match[1]]


def find_splits(tree: Tree, asked: Asked | None = None) -> tuple[str, str | None]:
    """Returns (folder of the training split, folder of the validation split or None if that is to be held out).
    Files that are not `asked` for are named.

    Raises UserError if names of splits stand beside other folders, or if none of them is for training.
    """
    flag = f"--dataset_name={tree.source}"
    top = _find_top(tree)
    scanned = scan_images(tree, top)
    splits = {folder: split_of(posixpath.basename(folder)) for folder in scanned.folders}
    named = [folder for folder in scanned.folders if splits[folder]]
    others = [folder for folder in scanned.folders if not splits[folder]]

    # Classes without splits. Pictures of trains beside pictures of busses: a class like the others.
    is_train = [posixpath.basename(folder).lower() for folder in named] == ["train"]
    is_class = is_train and others and not scan_images(tree, named[0]).folders
    if not named or is_class:
        return top, None
    train_folder = tree.show(posixpath.join(top, "train"))
    if others:
        raise UserError(
            f"{flag}: {list_names(named)} may be splits rather than classes, unlike {list_names(others)} beside them; "
            f"move the classes into {train_folder}, or rename {list_names(named[:1])} if it is a class"
        )

    # One folder for training, at most one for validation.
    by_split = {split: [folder for folder in named if splits[folder] == split] for split in ("train", "validation")}
    for split, found in by_split.items():
        if len(found) > 1:
            raise UserError(f"{flag}: {list_names(found)} could each be the {split} split; leave one of them there")
    if not by_split["train"]:
        fix = "name the folder to train on, or rename what is a class"
        if scanned.images:
            fix = f"move them into {train_folder}"
        beside = "images beside it" if scanned.images else "no train/"
        raise UserError(f"{flag}: {tree.show(top)} holds {list_names(named)} but {beside}; {fix}")
    (train,) = by_split["train"]
    validation = next(iter(by_split["validation"]), None)

    # The rest is named, not read.
    unused = [folder for folder in named if folder not in (train, validation)]
    not_read = [list_names(unused)] if unused else []
    if scanned.images:
        not_read.append(describe_some(scanned.images, "image"))
    warn_once(
        f"{tree.root}: training on {train}/, validating on {f'{validation}/' if validation else 'a part of it'}"
        + f"; not read: {', '.join(not_read)}" * bool(not_read)
    )
    _name_unused(tree, top, scanned, asked=asked)
    return _unwrap(tree, train, asked), validation and _unwrap(tree, validation, asked)


def _find_top(tree: Tree) -> str:
    """Returns the folder that holds the classes or splits: the root, or of an archive that a folder was packed into
    with its name (`zip -r pets.zip pets`) that folder, which is named."""
    top = ""
    while tree.is_archive:
        scanned = scan_images(tree, top)
        if len(scanned.folders) != 1 or scanned.images or split_of(posixpath.basename(scanned.folders[0])):
            break
        below = scan_images(tree, scanned.folders[0])
        names = [posixpath.basename(path) for path in (*below.folders, *below.others)]
        # A folder in a class means nothing: only several, or a split or a table, tell that it is none.
        if len(below.folders) < 2 and not any(split_of(name) or name in TABLES for name in names):
            break
        (top,) = scanned.folders
    if top:
        warn_once(f"{tree.root}: read from {top}/, the only folder in it")
    return top


def _unwrap(tree: Tree, split_folder: str, asked: Asked | None) -> str:
    """Returns the folder of a split, or the only folder in it if that bears the same split's name.

    An archive that is unpacked into a folder of its own name leaves such a nest.
    """
    scanned = scan_images(tree, split_folder)
    if len(scanned.folders) == 1 and not scanned.images:
        (below,) = scanned.folders
        if split_of(posixpath.basename(below)) == split_of(posixpath.basename(split_folder)):
            _name_unused(tree, split_folder, scanned, asked=asked)
            return _unwrap(tree, below, asked)
    return split_folder


def _name_unused(tree: Tree, folder: str, *all_scanned: Scanned, asked: Asked | None) -> None:
    """Warns of files below `folder` that are not used: those that may hold labels, others, and the system's."""
    images = [path for scanned in all_scanned for path in scanned.images]
    others = [path for scanned in all_scanned for path in scanned.others]
    if asked:
        stems = set(map(stem, images))
        others = [path for path in others if not asked.is_read(path, stems)]
    # Tables of labels matter most: a user may take them for read.
    if message := unused_message(tree, folder, others, images):
        is_readable = asked is None and any(_is_readable(tree, path) for path in others)
        warn_once(message + "; --condition_columns reads it" * is_readable)
    if rest := [path for path in others if not is_table(path)]:
        shown = [tree.show(path) for path in rest]
        warn_once(f"{tree.show(folder)}: ignored {describe_some(shown, 'file')} without the suffix of an image")
    if message := system_message(tree, [path for scanned in all_scanned for path in scanned.system]):
        warn_once(f"{tree.show(folder)}: {message}")


def _is_readable(tree: Tree, path: str) -> bool:
    """Returns whether --condition_columns finds something in a file: a table, but no dataset.json without labels."""
    name = posixpath.basename(path)
    return name in TABLES and not (name == EDM_TABLE and read_edm_labels(tree, path) == {})


def list_names(folders: Sequence[str]) -> str:
    listed = ", ".join(f"{printable(posixpath.basename(folder))}/" for folder in folders[:MAX_LISTED])
    return listed + ", ..." * (len(folders) > MAX_LISTED)


def describe_layout(tree: Tree) -> str:
    suffixes = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    one, many, train = (tree.show(path) for path in ("IMAGE", "CLASS/IMAGE", "train"))
    return f"expected are {many} or {one} (or the same below {train}), images being {suffixes}"


def find_classes(tree: Tree, folder: str, asked: Asked | None = None, has_classes: bool = True) -> dict[str, Scanned]:
    """Returns {folder of a class: contents at any depth below it}; '' alone if all images are of one class.

    Unless folders are the classes (`has_classes`), all images below `folder` are of one. Files that are not
    `asked` for are named. Raises UserError if images lie beside folders of classes, or if there are none.
    """
    flag = f"--dataset_name={tree.source}"
    if not has_classes:
        everything = _scan_below(tree, folder)
        if not everything.images:
            raise UserError(f"{flag}: {tree.show(folder)} holds no images; {describe_layout(tree)}")
        _name_unused(tree, folder, everything, asked=asked)
        return {"": everything}

    # All files, at any depth below the folders of classes.
    top = scan_images(tree, folder)
    subfolders = progress_bar(top.folders, "listing the folders", unit="folder", delay=5)
    classes = {subfolder: _scan_below(tree, subfolder) for subfolder in subfolders}
    found = (top, *classes.values())
    images = {subfolder: scanned.images for subfolder, scanned in classes.items() if scanned.images}

    # One class, or a folder for each. Where it might be meant otherwise, a message says what was understood.
    if not images:
        if not top.images:
            raise UserError(
                f"{flag}: {tree.show(folder)} holds no images{_describe_packed(found)}; {describe_layout(tree)}"
            )
        classes = {"": top}
    elif top.images:
        name = posixpath.basename(top.images[0])
        raise UserError(f"{flag}: {tree.show(folder)} holds {name} beside folders of classes; move it into one")
    elif reason := check_folders(tree, folder, images):
        warn_once(f"{tree.show(folder)}: {reason}: all images are of one class")
        classes = {"": Scanned([path for paths in images.values() for path in paths])}
    elif len(classes) == 1 and len(below := scan_images(tree, next(iter(classes))).folders) > 1:
        name = next(iter(classes))
        fix = f"move them into {tree.show(folder)}" if tree.is_archive else f"give folder:{tree.show(name)}"
        warn_once(
            f"{tree.show(folder)}: one class, {posixpath.basename(name)}, of all images below it; "
            f"if {list_names(below)} are classes, {fix}"
        )
    _name_unused(tree, folder, *found, asked=asked)
    return classes


def _describe_packed(found: Sequence[Scanned]) -> str:
    """Returns a remark on archives among files, which hide what they hold; '' if there are none."""
    others = [path for scanned in found for path in scanned.others if path.lower().endswith(PACKED_SUFFIXES)]
    return f", but {describe_some(others, 'archive')} that {'are' if others[1:] else 'is'} to be unpacked" * bool(
        others
    )


def _scan_below(tree: Tree, folder: str) -> Scanned:
    """Returns the contents at any depth below the folder of a class; links are followed. Raises UserError for splits
    inside of it."""
    found = Scanned()
    seen = set()

    def visit(folder: str) -> None:
        if tree.identity(folder) in seen:  # a link back to a folder above
            return
        seen.add(tree.identity(folder))
        scanned = scan_images(tree, folder)

        # Splits below classes would mix what is to be held out with what is learned.
        splits = [below for below in scanned.folders if split_of(posixpath.basename(below))]
        if splits:
            raise UserError(
                f"--dataset_name={tree.source}: the class {tree.show(folder)} holds {list_names(splits)} as if "
                "there were splits in it; put them into a folder for each split instead, PATH/train/CLASS"
            )

        # One flat list: below the folder of a class, folders mean nothing.
        found.images.extend(scanned.images)
        found.others.extend(scanned.others)
        found.system.extend(scanned.system)
        for below in scanned.folders:
            visit(below)

    visit(folder)
    return found


def describe_some(paths: Sequence[str], noun: str) -> str:
    """'3 files (a/x.txt, ...)'."""
    names = ", ".join(map(printable, paths[:MAX_LISTED])) + ", ..." * (len(paths) > MAX_LISTED)
    return f"{len(paths)} {noun}{'s' * (len(paths) > 1)} ({names})"
