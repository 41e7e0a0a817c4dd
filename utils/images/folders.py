"""Folders of images: their contents, and tables of labels beside images.

Files that systems put into folders are left out. Tables are recognised, described and named, but not read as labels;
of the numbered folders of EDM and StyleGAN it is only known that they are not classes.
"""

import codecs
import dataclasses
import functools
import json
import posixpath
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from utils.base.external import BadFileError
from utils.base.messages import UserError, printable, warn_once
from utils.storage.tree import LocalTree, Tree, folders_of, relative, stem

# Kept beside their users' files by file servers (Synology, QNAP, NetApp, Samba), Windows, macOS, Android, desktops and
# Jupyter, in upper or lower case. Most of it is thumbnails and deleted files.
SYSTEM_NAMES = {
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "@__thumb", ".@__thumb", "#recycle", "#snapshot",
    "~snapshot", ".snapshot", ".snapshots", ".zfs", ".recycle", "lost+found", "$recycle.bin", "recycler", "recycled",
    "system volume information", "thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db",
    "desktop.ini", "picasa.ini", ".picasa.ini", ".picasaoriginals", "zbthumbnail.info", "__macosx", ".ds_store",
    ".appledouble", ".appledb", ".appledesktop", ".spotlight-v100", ".fseventsd", ".temporaryitems", ".trashes",
    ".trash", ".documentrevisions-v100", "network trash folder", "temporary items", "icon\r", ".thumbnails", ".thumb",
    ".thumbs", ".sh_thumbnails", "backups.backupdb", "_gsdata_", "$extend", ".xvpics", "lost.dir",
    ".ipynb_checkpoints", "__pycache__", ".directory",
}  # fmt: skip
# AppleDouble files of macOS, bins by user id, files recovered by Windows, files deleted on NFS while they were open.
SYSTEM_PATTERN = re.compile(r"\._.*|\.trash-\d+|found\.\d{3}|\.nfs[0-9a-f]{8,}|\.fuse_hidden[0-9a-f]+", re.DOTALL)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm")  # those of pytorch-fid
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".tif",
    ".tiff",
)  # of data to train on; others are said to be ignored
MAX_LISTED = 3  # names in a message

# Files that may hold labels or captions, by their suffix, and those that only describe the data.
TABLE_SUFFIXES = (
    ".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".parquet", ".arrow", ".feather",
    ".xls", ".xlsx", ".mat", ".npy", ".npz", ".pkl", ".pickle", ".h5", ".hdf5", ".lst", ".cls", ".caption", ".tags",
    ".data", ".db", ".sqlite",
)  # fmt: skip
ABOUT_DATA = re.compile(r"(readme|licen[cs]e|copying|notice|attribution|citation|changelog|requirements)\b", re.I)
HEAD_BYTES = 2**16  # of a table that is described
# Labels of ImageNet take 50 MB, and some ten times that once they are read.
MAX_EDM_BYTES = 2**26
EDM_TABLE = "dataset.json"


@dataclasses.dataclass(frozen=True)
class Scanned:
    """Paths of the entries of a folder in a tree, each kind sorted by name, without hidden ones. An "image" has the
    name of one: it may turn out to be anything."""

    images: list[str] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    folders: list[str] = dataclasses.field(default_factory=list)
    system: list[str] = dataclasses.field(default_factory=list)  # files, and folders, which end with '/'


def scan(tree: Tree, folder: str, suffixes: tuple[str, ...]) -> Scanned:
    """Returns the entries of a folder. Images are the files that end with one of the `suffixes`, which are in lower
    case."""
    scanned = Scanned()
    start = f"{folder}/" if folder else ""
    for name, is_folder in sorted(tree.scan(folder)):
        if is_system_name(name):
            scanned.system.append(start + name + "/" * is_folder)
        elif not name.startswith("."):
            is_image = name.lower().endswith(suffixes)
            kind = scanned.folders if is_folder else scanned.images if is_image else scanned.others
            kind.append(start + name)
    return scanned


def find_images(folder: Path) -> list[Path]:
    """Returns the image files at any depth, sorted by path. Links are followed, but not in circles; files that are
    hidden or the system's are left out, the latter with a warning."""
    images: list[str] = []
    system: list[str] = []
    tree = LocalTree(folder)

    def visit(below: str, seen: set[Hashable]) -> None:
        # A link to a folder that was visited.
        if tree.identity(below) in seen:
            return
        seen.add(tree.identity(below))
        scanned = scan(tree, below, SUFFIXES)
        images.extend(scanned.images)
        system.extend(scanned.system)
        for folder in scanned.folders:
            visit(folder, seen)

    visit("", set())
    if message := system_message(tree, system):
        warn_once(f"{folder}: {message}")
    return [folder / image for image in sorted(images, key=lambda image: image.split("/"))]


def is_system_name(name: str) -> bool:
    """Returns whether a file or folder of this name comes from a system rather than from a user."""
    return name.lower() in SYSTEM_NAMES or bool(SYSTEM_PATTERN.fullmatch(name.lower()))


def system_message(tree: Tree, paths: Iterable[str]) -> str:
    """Returns a message on how many system files are left out; '' if there are none. `paths` are as of `Scanned`."""
    paths = list(paths)
    count = sum(_count_files(tree, path) for path in paths)
    names = list(dict.fromkeys(printable(_last(path)) for path in paths))
    listed = ", ".join(names[:MAX_LISTED]) + ", ..." * (len(names) > MAX_LISTED)
    return f"left out {count:,} system file{'s' * (count != 1)} ({listed})" if paths else ""


def _last(path: str) -> str:
    """Returns the last name of a path; that of a folder keeps its '/'."""
    return path[path.rstrip("/").rfind("/") + 1 :]


@functools.lru_cache(maxsize=2**16)  # both splits ask, and a file server may keep a folder of thumbnails for each image
def _count_files(tree: Tree, path: str) -> int:
    """Returns the number of files that a path stands for; links are not followed."""
    local = tree.local_path(path)
    if not path.endswith("/") or (local is not None and local.is_symlink()):
        return 1
    below = path.rstrip("/")
    return sum(_count_files(tree, f"{path}{name}{'/' * is_folder}") for name, is_folder in tree.scan(below))


def unused_message(tree: Tree, folder: str, others: Sequence[str], images: Iterable[str]) -> str:
    """Returns a message that names files below `folder` which may hold labels or captions, as not used; '' if none may.

    `others` are files that are no images, `images` those that are.
    """
    found = [path for path in others if is_table(path)]
    if not found:
        return ""

    # A caption in a file of its own for each image would fill the message: these are only counted.
    stems = set(map(stem, images))
    tables: list[str] = []
    beside: list[str] = []
    for path in found:
        (beside if stem(path) in stems else tables).append(path)

    # Tables first, described by what they begin with.
    parts = []
    if tables:
        listed = ", ".join(_name(path, folder) + describe_table(tree, path) for path in tables[:MAX_LISTED])
        more = ", ..." * (len(tables) > MAX_LISTED)
        parts.append(f"{len(tables):,} file{'s' * (len(tables) > 1)} that may hold labels or captions ({listed}{more})")
    if beside:
        several = "s" * (len(beside) > 1)
        parts.append(f"{len(beside):,} file{several} named as an image, such as {_name(beside[0], folder)}")
    return f"{printable(tree.show(folder))}: not used: {'; '.join(parts)}"


def is_table(path: str) -> bool:
    """Returns whether a file that is no image may hold labels or captions, by its name."""
    name = posixpath.basename(path)
    return _suffix(name) in TABLE_SUFFIXES and not ABOUT_DATA.match(name)


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def describe_table(tree: Tree, path: str) -> str:
    """Returns in a few words, with a space before them, what a table holds; '' if that is not clear."""
    if posixpath.basename(path) == EDM_TABLE:
        labels = read_edm_labels(tree, path)
        return "" if labels is None else f" with labels of {len(labels):,} images" if labels else " without labels"

    # Of any other table the beginning: it may be of any size.
    try:
        head = tree.read(path, HEAD_BYTES)
    except OSError:
        return ""
    # Spreadsheets write UTF-16, or UTF-8 with a byte-order mark.
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    first = head.decode(encoding, "replace").partition("\n")[0].strip()
    if _suffix(path) in (".csv", ".tsv"):
        return f" beginning {printable(first[:60])!r}" if first else " that is empty"
    if _suffix(path) in (".json", ".jsonl", ".ndjson"):
        try:
            # A line of JSON lines, or all of a small file. Of a longer file the first line may be JSON by itself.
            row = json.loads(first if _suffix(path) != ".json" or len(head) == HEAD_BYTES else head)
        except (ValueError, RecursionError):
            return ""
        keys = ", ".join(list(row)[:5])[:60] if isinstance(row, dict) else ""
        return f" with {printable(keys)}" if keys else ""
    return ""


def read_edm_labels(tree: Tree, table: str) -> dict[str, str] | None:
    """Returns {path of an image: its label as JSON} of a dataset.json as EDM and StyleGAN write it.

    {} if it says that there are none; None if it is something else, or larger than MAX_EDM_BYTES.
    """
    try:
        content = json.loads(tree.read_bounded(table, MAX_EDM_BYTES))
        labels = content["labels"]
        pairs = labels.items() if isinstance(labels, dict) else labels or ()
        # Written on Windows, paths have backslashes.
        return {str(name).replace("\\", "/"): json.dumps(label) for name, label in pairs}
    except (BadFileError, ValueError, KeyError, TypeError, RecursionError):
        return None


def are_numbered(images: Mapping[str, Sequence[str]]) -> bool:
    """Returns whether {folder: its images} hold a thousand each, numbered as EDM and StyleGAN write any images
    (00001/img00001234.png) or as in FFHQ and EDM's samples (01000/01234.png)."""
    names = ((posixpath.basename(folder), paths) for folder, paths in images.items())
    return all(_is_numbered(folder, posixpath.basename(stem(image))) for folder, paths in names for image in paths)


def _is_numbered(folder: str, stem: str) -> bool:
    if not re.fullmatch(r"\d{5,8}", folder):
        return False
    is_edm = stem.startswith("img") and stem[3:-3] == folder and stem[3:].isdecimal()
    is_ffhq = stem.isdecimal() and len(stem) == len(folder) and f"{stem[:-3]}000" == folder
    return is_edm or is_ffhq


def check_folders(tree: Tree, folder: str, images: Mapping[str, Sequence[str]]) -> str:
    """Compares folders, {folder of a class: its images}, with the labels of a dataset.json in `folder` or above it.

    Returns why the folders are no classes, so that all images are of one, or ''. Raises UserError if the labels tell
    other classes apart than the folders do.
    """
    # A table beside the folders. If it cannot be read, numbered folders say nothing of the classes.
    is_numbered = are_numbered(images)
    tables = (posixpath.join(above, EDM_TABLE) for above in folders_of(folder))
    table = next(filter(tree.is_file, tables), None)
    labels = read_edm_labels(tree, table) if table else {}
    subject = f"--dataset_name={tree.source}: {tree.show(table or folder)}"
    fix = (
        "give --condition_columns class or vector, put the images of each label into a folder named after it, or make "
        "an npz with `images` and `labels`, and use npz:FILE"
    )
    if labels is None and is_numbered:
        raise UserError(f"{subject} cannot be read, and the folders beside it are numbered, no classes; {fix}")

    # Labels of the images in each folder.
    found: list[set[str]] = []
    num_labelled = 0
    for paths in images.values():
        names = [relative(path, posixpath.dirname(table)) for path in paths] if table and labels else []
        own = [labels[name] for name in names if name in labels] if labels else []
        num_labelled += len(own)
        found.append(set(own))

    # Folders are classes where each has one label, and none shares it.
    values = set().union(*found)
    if is_numbered and len(values) <= 1:
        return "folders of a thousand numbered images, as EDM, StyleGAN and FFHQ have them, are no classes"
    is_one_to_one = len(values) == sum(map(len, found)) and all(len(own) <= 1 for own in found)
    if not is_one_to_one:
        folders = f"{len(found):,} folders that they lie in" if len(found) > 1 else "folder that they lie in"
        way_out = "" if is_numbered else f". If the folders are the classes, move {EDM_TABLE} out"
        raise UserError(
            f"{subject} has labels of {num_labelled:,} images, whose {len(values):,} classes are not the "
            f"{folders}; {fix}{way_out}"
        )
    return ""


def _name(path: str, folder: str) -> str:
    return printable(relative(path, folder) if path.startswith(folder) else path)
