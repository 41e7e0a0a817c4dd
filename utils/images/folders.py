"""Folders of images: their contents, whether every image can be decoded, and tables of labels beside images.

Files that systems put into folders are left out. Tables are recognised, described and named, but not read as labels;
of the numbered folders of EDM and StyleGAN it is only known that they are not classes.
"""

import codecs
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import PIL

from utils.base.external import BadFileError, read_bounded
from utils.base.files import cache_folder, open_regular, read_bytes, remove_temporaries, write_text
from utils.base.messages import UserError, WriteError, printable, progress_bar, warn_once
from utils.images.decoding import BrokenImageError, check_image, read_image_file

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
MAX_LISTED = 3  # names in a message
CHECK_VERSION = 4  # of what is decoded how; raise it when utils/images/decoding.py takes other files for broken

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
    """The entries of a folder, each kind sorted by name, without hidden ones. An "image" has the name of one: it may
    turn out to be anything."""

    images: list[Path] = dataclasses.field(default_factory=list)
    others: list[Path] = dataclasses.field(default_factory=list)
    folders: list[Path] = dataclasses.field(default_factory=list)
    system: list[Path] = dataclasses.field(default_factory=list)  # files and folders


def scan(folder: Path, suffixes: tuple[str, ...]) -> Scanned:
    """Returns the entries of a folder. Images are the files that end with one of the `suffixes`, which are in lower
    case."""
    scanned = Scanned()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_system_name(entry.name):
                scanned.system.append(Path(entry.path))
            elif not entry.name.startswith("."):
                is_image = entry.name.lower().endswith(suffixes)
                kind = scanned.folders if entry.is_dir() else scanned.images if is_image else scanned.others
                kind.append(Path(entry.path))
    return scanned


def find_images(folder: Path) -> list[Path]:
    """Returns the image files at any depth, sorted by path. Links are followed, but not in circles; files that are
    hidden or the system's are left out, the latter with a warning."""
    images = []
    system = []

    def visit(folder: Path, seen: set[Path]) -> None:
        # A link to a folder that was visited.
        if folder.resolve() in seen:
            return
        seen.add(folder.resolve())
        scanned = scan(folder, SUFFIXES)
        images.extend(scanned.images)
        system.extend(scanned.system)
        for below in scanned.folders:
            visit(below, seen)

    visit(folder, set())
    if message := system_message(system):
        warn_once(f"{folder}: {message}")
    return sorted(images, key=lambda file: file.relative_to(folder).parts)


def is_system_name(name: str) -> bool:
    """Returns whether a file or folder of this name comes from a system rather than from a user."""
    return name.lower() in SYSTEM_NAMES or bool(SYSTEM_PATTERN.fullmatch(name.lower()))


def system_message(paths: Iterable[Path]) -> str:
    """Returns a message on how many system files are left out; '' if there are none."""
    paths = list(paths)
    count = sum(_count_files(path) for path in paths)
    names = list(dict.fromkeys(printable(path.name) + "/" * path.is_dir() for path in paths))
    listed = ", ".join(names[:MAX_LISTED]) + ", ..." * (len(names) > MAX_LISTED)
    return f"left out {count:,} system file{'s' * (count != 1)} ({listed})" if paths else ""


@functools.cache  # both splits ask, and a file server may keep a folder of thumbnails for each image
def _count_files(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(len(files) for _, _, files in os.walk(path))


class CheckedImage(NamedTuple):
    """Result of the check of one file."""

    height: int  # in pixels, upright; 0 if it cannot be read
    width: int
    mode: str  # that keeps what it has, one of decoding.MODES; '' if it cannot be read
    digest: str  # the first 16 hex digits of its content's sha256
    reason: str  # why it cannot be read, or ''
    lowest: int = 0  # of its values, 0 .. 255
    highest: int = 0


def check_images(folder: Path, paths: tuple[Path, ...], max_megapixels: float) -> dict[Path, CheckedImage]:
    """Returns what decoding each file found, now or when it was last checked with the same size and times.

    Only what a file's bytes have shown is remembered, never that the system could not read it.
    """
    return _check_images(folder, paths, tuple(map(_stamp, paths)), max_megapixels)


@functools.lru_cache(maxsize=4)  # the splits of one folder are asked for one after the other
def _check_images(
    folder: Path, paths: tuple[Path, ...], stamps: tuple[str | None, ...], max_megapixels: float
) -> dict[Path, CheckedImage]:
    """`check_images` of files whose sizes and times are `stamps`."""
    # What earlier checks found, if the rules of decoding and the limit are the same.
    kept = cache_folder() / f"checked-{hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:32]}.json"
    version = f"{CHECK_VERSION}, Pillow {PIL.__version__}, up to {max_megapixels:g} megapixels"
    remembered = _read_kept(kept, version)

    # Files that have not changed since.
    keys = {path: str(path.relative_to(folder)) for path in paths}
    stamp_of = dict(zip(paths, stamps, strict=True))
    checked = {
        path: CheckedImage(*remembered[keys[path]][1:])
        for path in paths
        if stamp_of[path] and remembered.get(keys[path], [None])[0] == stamp_of[path]
    }

    # All others are decoded, on threads: Pillow releases the interpreter meanwhile.
    unknown = [path for path in paths if path not in checked]
    lasting = set(checked)
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        results = pool.map(functools.partial(_check_file, max_megapixels=max_megapixels), unknown)
        # A bar only where it takes more than a moment.
        bar = progress_bar(results, "checking every image, once", len(unknown), unit="image", delay=5)
        for path, (image, is_lasting) in zip(unknown, bar, strict=True):
            checked[path] = image
            if is_lasting:
                lasting.add(path)

    # Kept as a whole, without files that are gone or could not be read.
    if unknown:
        files = {keys[path]: [stamp_of[path], *checked[path]] for path in paths if path in lasting and stamp_of[path]}
        _keep(kept, {"version": version, "files": files})
    return {path: checked[path] for path in paths}


def _stamp(path: Path) -> str | None:
    """Returns a text that changes whenever a file's content does; None where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _check_file(path: Path, max_megapixels: float) -> tuple[CheckedImage, bool]:
    """Returns (the finding, whether the file's bytes have shown it, so that it lasts until they change)."""
    try:
        if not path.is_file():
            what = "a link to nothing" if path.is_symlink() and not path.exists() else "no regular file"
            return CheckedImage(0, 0, "", "", what), False
        content = read_image_file(path, max_megapixels)
    except OSError as error:
        return CheckedImage(0, 0, "", "", error.strerror or str(error)), False
    except BrokenImageError as error:
        return CheckedImage(0, 0, "", "", str(error)), False

    # From here on the finding depends on the bytes alone.
    digest = hashlib.sha256(content).hexdigest()[:16]
    try:
        height, width, mode, lowest, highest = check_image(content, max_megapixels=max_megapixels)
        return CheckedImage(height, width, mode, digest, "", lowest, highest), True
    except BrokenImageError as error:
        return CheckedImage(0, 0, "", digest, str(error)), True


def _read_kept(file: Path, version: str) -> dict[str, list]:
    """Returns {path: [stamp, *CheckedImage]} of an earlier check; {} if there is none that can be understood."""
    try:
        content = json.loads(read_bytes(file))
        files = content["files"] if content["version"] == version else {}
        types = [str, int, int, str, str, str, int, int]
        return {path: row for path, row in files.items() if [type(x) for x in row] == types}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _keep(file: Path, content: dict) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(file.parent, file.name)
        write_text(file, json.dumps(content))
    except (OSError, WriteError):
        pass  # what cannot be kept is checked again next time


def unused_message(folder: Path, others: Sequence[Path], images: Iterable[Path]) -> str:
    """Returns a message that names files below `folder` which may hold labels or captions, as not used; '' if none may.

    `others` are files that are no images, `images` those that are.
    """
    found = [path for path in others if is_table(path)]
    if not found:
        return ""

    # A caption in a file of its own for each image would fill the message: these are only counted.
    stems = {os.path.splitext(image)[0] for image in images}
    tables = []
    beside = []
    for path in found:
        (beside if os.path.splitext(path)[0] in stems else tables).append(path)

    # Tables first, described by what they begin with.
    parts = []
    if tables:
        listed = ", ".join(_name(path, folder) + describe_table(path) for path in tables[:MAX_LISTED])
        more = ", ..." * (len(tables) > MAX_LISTED)
        parts.append(f"{len(tables):,} file{'s' * (len(tables) > 1)} that may hold labels or captions ({listed}{more})")
    if beside:
        several = "s" * (len(beside) > 1)
        parts.append(f"{len(beside):,} file{several} named as an image, such as {_name(beside[0], folder)}")
    return f"{printable(str(folder))}: not used: {'; '.join(parts)}"


def is_table(path: Path) -> bool:
    """Returns whether a file that is no image may hold labels or captions, by its name."""
    return path.suffix.lower() in TABLE_SUFFIXES and not ABOUT_DATA.match(path.name)


def describe_table(path: Path) -> str:
    """Returns in a few words, with a space before them, what a table holds; '' if that is not clear."""
    if path.name == EDM_TABLE:
        labels = read_edm_labels(path)
        return "" if labels is None else f" with labels of {len(labels):,} images" if labels else " without labels"

    # Of any other table the beginning: it may be of any size.
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return ""
    # Spreadsheets write UTF-16, or UTF-8 with a byte-order mark.
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    first = head.decode(encoding, "replace").partition("\n")[0].strip()
    if path.suffix.lower() in (".csv", ".tsv"):
        return f" beginning {printable(first[:60])!r}" if first else " that is empty"
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        try:
            # A line of JSON lines, or all of a small file. Of a longer file the first line may be JSON by itself.
            row = json.loads(first if path.suffix.lower() != ".json" or len(head) == HEAD_BYTES else head)
        except (ValueError, RecursionError):
            return ""
        keys = ", ".join(list(row)[:5])[:60] if isinstance(row, dict) else ""
        return f" with {printable(keys)}" if keys else ""
    return ""


def read_edm_labels(table: Path) -> dict[str, str] | None:
    """Returns {path of an image: its label as JSON} of a dataset.json as EDM and StyleGAN write it.

    {} if it says that there are none; None if it is something else, or larger than MAX_EDM_BYTES.
    """
    try:
        content = json.loads(read_bounded(table, MAX_EDM_BYTES))
        labels = content["labels"]
        pairs = labels.items() if isinstance(labels, dict) else labels or ()
        # Written on Windows, paths have backslashes.
        return {str(name).replace("\\", "/"): json.dumps(label) for name, label in pairs}
    except (BadFileError, ValueError, KeyError, TypeError, RecursionError):
        return None


def are_numbered(images: Mapping[Path, Sequence[Path]]) -> bool:
    """Returns whether {folder: its images} hold a thousand each, numbered as EDM and StyleGAN write any images
    (00001/img00001234.png) or as in FFHQ and EDM's samples (01000/01234.png)."""
    return all(_is_numbered(folder.name, image.stem) for folder, paths in images.items() for image in paths)


def _is_numbered(folder: str, stem: str) -> bool:
    if not re.fullmatch(r"\d{5,8}", folder):
        return False
    is_edm = stem.startswith("img") and stem[3:-3] == folder and stem[3:].isdecimal()
    is_ffhq = stem.isdecimal() and len(stem) == len(folder) and f"{stem[:-3]}000" == folder
    return is_edm or is_ffhq


def check_folders(flag: str, folder: Path, root: Path, images: Mapping[Path, Sequence[Path]]) -> str:
    """Compares folders, {folder of a class: its images}, with the labels of a dataset.json in `folder` or `root`.

    Returns why the folders are no classes, so that all images are of one, or ''. Raises UserError if the labels tell
    other classes apart than the folders do.
    """
    # A table beside the folders. If it cannot be read, numbered folders say nothing of the classes.
    is_numbered = are_numbered(images)
    table = next((path for path in (folder / EDM_TABLE, root / EDM_TABLE) if path.is_file()), None)
    labels = read_edm_labels(table) if table else {}
    fix = (
        "give --condition_columns class or vector, put the images of each label into a folder named after it, or make "
        "an npz with `images` and `labels`, and use npz:FILE"
    )
    if labels is None and is_numbered:
        raise UserError(f"{flag}: {table} cannot be read, and the folders beside it are numbered, no classes; {fix}")

    # Labels of the images in each folder.
    found: list[set[str]] = []
    num_labelled = 0
    for paths in images.values():
        names = [path.relative_to(table.parent).as_posix() for path in paths] if table and labels else []
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
            f"{flag}: {table} has labels of {num_labelled:,} images, whose {len(values):,} classes are not the "
            f"{folders}; {fix}{way_out}"
        )
    return ""


def _name(path: Path, folder: Path) -> str:
    return printable(path.relative_to(folder).as_posix()) if path.is_relative_to(folder) else printable(str(path))
