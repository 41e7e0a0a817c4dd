"""zip:FILE: images in a zip, in folders as on a disk, or as EDM and StyleGAN pack them (with a dataset.json)."""

import zipfile
from collections.abc import Sequence

from utils.base.external import BadFileError
from utils.base.files import LimitedReads
from utils.base.messages import progress_bar
from utils.storage.archive import (
    DEFLATED,
    MAX_MEMBER_BYTES,
    STORED,
    ArchiveTree,
    Index,
    check_member,
    explaining,
)
from utils.storage.parts import PartsFile, open_file

METHODS = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ"}  # APPNOTE.TXT, 4.4.5
RATIO = 1032  # of what deflate can expand a byte into, at most


def open_zip(source: str) -> ArchiveTree:
    """Opens a zip, as zip:FILE. Raises UserError for what is no zip, for one that is cut short, encrypted or compressed
    in another way than deflate, and for one with paths that lead out of it, or twice the same."""
    with explaining(source):
        return ArchiveTree(source, [open_file(source.partition(":")[2])], "zip", list_zip)


def list_zip(files: Sequence[PartsFile]) -> Index:
    """Returns the files in a zip. Raises BadFileError where they cannot be read from it."""
    (file,) = files
    rows = []
    with file.open() as opened:
        try:
            # The directory is read once: what claims to be larger than the file is not believed.
            limited = LimitedReads(opened, 3 * file.size + 2**16)
            archive = zipfile.ZipFile(limited)  # ty: ignore[no-matching-overload]
        except Exception as error:  # BadZipFile, struct.error, UnicodeDecodeError, ValueError
            raise BadFileError(f"it is no whole zip ({error or type(error).__name__})") from None
    members = archive.infolist()
    for member in progress_bar(members, "listing the zip, once", unit="file", delay=5):
        if member.is_dir():
            continue
        path = check_member(member.filename)
        _check(member, path, file.size)
        rows.append(
            (path, 0, member.header_offset, member.compress_size, member.file_size, member.compress_type, member.CRC)
        )
    return Index.of_rows(rows, files)


def _check(member: zipfile.ZipInfo, path: str, size: int) -> None:
    """Raises BadFileError for a file that could not be read."""
    if member.flag_bits & 1:
        raise BadFileError(f"{path} is encrypted; give one without a password")
    if member.compress_type not in (STORED, DEFLATED):
        name = METHODS.get(member.compress_type, f"method {member.compress_type}")
        raise BadFileError(f"{path} is compressed by {name}; pack the images again by zip -0, which only stores them")
    if member.header_offset + member.compress_size > size:
        raise BadFileError("it is cut short")
    is_bomb = member.file_size > RATIO * member.compress_size + 2**16 or member.file_size > MAX_MEMBER_BYTES
    if is_bomb or (member.compress_type == STORED and member.file_size != member.compress_size):
        raise BadFileError(f"{path} says that {member.compress_size:,} bytes become {member.file_size:,}")
