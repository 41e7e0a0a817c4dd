"""Folders of object storage: read image by image, or fetched as a whole for what maps its files."""

from pathlib import Path

from utils.base.messages import UserError
from utils.storage import remote
from utils.storage.staging import StagedFolder
from utils.storage.tree import ListedTree


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
    # What is not there any more is not read either.
    copy = StagedFolder(url, remote.cache_path(url, "folders"))
    copy.pull(files)
    gone = copy.read_record()["files"].keys() - set(map(copy.relative, files))
    for name in gone:
        (copy.folder / name).unlink(missing_ok=True)
    copy.write_record(dict.fromkeys(gone))
    return copy.folder
