"""Lists the images and folders in a folder, without what systems put there."""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from utils.base.console import printable

# What file servers (Synology, QNAP, NetApp, Samba), Windows, macOS, Android, desktops and Jupyter keep beside the files
# of their users, in any case. Most of it are thumbnails and deleted files.
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
# AppleDouble files of macOS, bins by user id, Windows' recovered files, open files that NFS deleted.
SYSTEM_PATTERN = re.compile(r"\._.*|\.trash-\d+|found\.\d{3}|\.nfs[0-9a-f]{8,}|\.fuse_hidden[0-9a-f]+", re.DOTALL)
MAX_LISTED = 3  # names in a message


@dataclasses.dataclass(frozen=True)
class Scanned:
    """Entries of a folder, each kind sorted by name; hidden ones are left out. An image may turn out to be no file."""

    images: list[Path] = dataclasses.field(default_factory=list)
    others: list[Path] = dataclasses.field(default_factory=list)
    folders: list[Path] = dataclasses.field(default_factory=list)
    system: list[Path] = dataclasses.field(default_factory=list)  # files and folders


def scan(folder: Path, suffixes: tuple[str, ...]) -> Scanned:
    """Returns the entries of a folder; those with one of the `suffixes`, in lower case, are images."""
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


def is_system_name(name: str) -> bool:
    """Whether a system, rather than a user, gives this name to a file or folder."""
    return name.lower() in SYSTEM_NAMES or bool(SYSTEM_PATTERN.fullmatch(name.lower()))


def system_message(paths: Iterable[Path]) -> str:
    """Says how many system files are left out; '' where there are none."""
    paths = list(paths)
    count = sum(_count_files(path) for path in paths)
    names = list(dict.fromkeys(printable(path.name) + "/" * path.is_dir() for path in paths))
    listed = ", ".join(names[:MAX_LISTED]) + ", ..." * (len(names) > MAX_LISTED)
    return f"left out {count:,} system file{'s' * (count != 1)} ({listed})" if paths else ""


@functools.cache  # a file server may keep a folder of thumbnails for each image, and both splits ask
def _count_files(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(len(files) for _, _, files in os.walk(path))
