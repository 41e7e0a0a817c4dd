"""tar:GLOB: images in tars, in folders as on a disk, or with files beside them as WebDataset has them."""

import tarfile
from collections.abc import Iterator, Sequence

from utils.base.external import BadFileError
from utils.base.messages import progress_bar, warn_once
from utils.storage.archive import STORED, ArchiveTree, Index, check_member, explaining
from utils.storage.parts import PartsFile, find_files, split_of

GZIP, BZIP2, XZ, ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"  # how compressed files begin


def open_tar(source: str) -> ArchiveTree:
    """Opens tars, as tar:FILE or tar:GLOB; their files belong together. Raises UserError where there is none, for what
    is compressed or no tar, and for files of the same path."""
    with explaining(source):
        tree = ArchiveTree(source, find_files(source), "tar", list_tars)
    # Unlike parquet's, names of tars tell no splits: folders in them do.
    splits = sorted({split_of(file.name) for file in tree.files} - {""})
    if len(splits) > 1 and not any(is_folder and split_of(f"{name}/x") for name, is_folder in tree.scan()):
        warn_once(
            f"{tree.root}: the tars are named after splits ({', '.join(splits)}), and all are trained on; "
            "name those of training alone"
        )
    # WebDataset has classes beside its images.
    if any(path.endswith(".cls") for path in tree.index.paths):
        tree.default_columns = "class"
    return tree


def list_tars(files: Sequence[PartsFile]) -> Index:
    """Returns the files in tars. Raises BadFileError where they cannot be read from them."""
    # By bytes: there may be a single tar, of any size.
    rows = []
    size = sum(file.size for file in files)
    bar = progress_bar(total=size, desc="listing the tars, once", unit="B", unit_scale=True, delay=5)
    with bar:
        for number, file in enumerate(files):
            if file.read(0, 6).startswith((GZIP, BZIP2, XZ, ZSTD)):
                raise BadFileError(f"{file.name} is compressed, and cannot be read at random; unpack it to a .tar")
            # In the order of the tar; links and folders are none.
            start = bar.n
            for member in _members(file):
                bar.update(start + member.offset_data - bar.n)
                path = check_member(member.name)
                if member.offset_data + member.size > file.size:
                    raise BadFileError(f"{file.name} is cut short")
                rows.append((path, number, member.offset_data, member.size, member.size, STORED, 0))
            bar.update(start + file.size - bar.n)
    return Index.of_rows(rows, files)


def _members(file: PartsFile) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files in a tar; links, devices and folders are left out."""
    with file.open() as opened:
        try:
            archive = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115 (nothing to close but `opened`)
            while (member := archive.next()) is not None:
                archive.members = []  # ty: ignore[missing-attribute]  # a million of them would be kept
                if member.isreg() and not member.issparse():
                    yield member
        except (tarfile.TarError, ValueError, OSError, UnicodeError) as error:
            raise BadFileError(f"{file.name} is no whole tar ({error})") from None
        # A tar ends with blocks of zeros: without one it was cut, perhaps between two files.
        if file.read(archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise BadFileError(f"{file.name} is cut short: its end is missing")
