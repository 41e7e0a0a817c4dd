"""Folders of object storage: read image by image, or fetched as a whole for what maps its files."""

import json
from pathlib import Path

from utils.base.files import read_bytes, write_json
from utils.base.messages import UserError, progress_bar
from utils.storage import remote
from utils.storage.tree import ListedTree

VERSIONS = ".versions.json"  # of a fetched folder: {path: version of the object}


class RemoteTree(ListedTree):
    """The objects below a URL, as folder:URL. Raises RemoteError where they cannot be listed, UserError if there are
    none."""

    is_remote = True

    def __init__(self, source: str):
        self.source = source
        self.root = source.partition(":")[2].rstrip("/")
        self.title = self.root.rpartition("/")[2]
        self.key = self.root
        self.files = remote.list_files(self.root, "dataset_name")
        self.paths = [file.url.removeprefix(remote.join(self.root, "")) for file in self.files]
        if not self.files:
            raise UserError(f"--dataset_name={source}: there are no objects below {self.root}; check the name")

    def read(self, path: str, limit: int | None = None) -> bytes:
        try:
            return remote.read_bytes(self.files[self.find_file(path)].url, None if limit is None else 0, limit)
        except remote.RemoteError as error:
            raise OSError(error.reason) from None

    def stamp(self, path: str) -> str | None:
        row = self.find(path)
        return None if row is None else f"{self.files[row].size} {self.files[row].version}"


def fetch_folder(url: str, flag: str) -> Path:
    """Returns a local copy of all objects below a URL, of which only those are fetched that have changed.

    Raises RemoteError, naming --`flag`, where that fails, and UserError if there are none.
    """
    files = remote.list_files(url, flag)
    if not files:
        raise UserError(f"--{flag}={url}: there are no objects below it; check the name")
    # What was fetched before, and which versions these are.
    folder = remote.cache_path(url, "folders")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        versions = json.loads(read_bytes(folder / VERSIONS))
    except (OSError, ValueError):
        versions = {}
    start = remote.join(url, "")
    for file in progress_bar(files, f"fetching {url}", unit="file", delay=5):
        path = file.url.removeprefix(start)
        if versions.get(path) != file.version or not (folder / path).is_file():
            remote.download(file.url, folder / path, flag)
            versions[path] = file.version
            write_json(folder / VERSIONS, versions)
    # What is not there any more is not read either.
    for path in versions.keys() - {file.url.removeprefix(start) for file in files}:
        (folder / path).unlink(missing_ok=True)
    return folder
