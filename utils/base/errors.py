"""Errors that the user can mend, as opposed to faults of the code."""

import errno
import os
from pathlib import Path


class UserError(ValueError):
    """A message in one line that names the value, the flag and the fix; the programs print it and exit non-zero."""


class AbsentCodecError(UserError):
    """A codec whose weights are neither here nor can be fetched."""


class DataError(UserError):
    """Data that could be read when the program started cannot be any more."""


def one_line(error: BaseException) -> str:
    """Returns an error's message in one line of at most 200 characters; its type where it has none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


# Errors of the system that only writing meets, and the fix.
NO_ROOM = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
}


class WriteError(UserError):
    """A file that the system did not let a program write: a full disk, a quota, a read-only file system.

    `whole`: says what is finished nevertheless.
    """

    def __init__(self, path: Path | str, error: BaseException, whole: str = ""):
        self.path = path
        self.error = error
        # Errors of libraries may carry the system's number only as text, or not at all: then their type has to do.
        code, reason = find_system_error(error) or (0, getattr(error, "strerror", None) or type(error).__name__)
        self.whole = whole  # `explaining_full_disk` adds to it
        self.strerror = reason
        fix = NO_ROOM.get(code, "see to it, or choose another place")
        middle = f"; {whole}" if whole else ""
        super().__init__(f"{path} could not be written ({reason}){middle}; {fix}, and give the same command again")


# Errors of the system, none of which is about a file's content.
SYSTEM_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG, errno.ESTALE, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM,
)  # fmt: skip


def find_system_error(error: BaseException) -> tuple[int, str] | None:
    """Returns (number, text) of the system's error, None if it is another.

    Libraries wrap it in types of their own, which carry only its text.
    """
    for code in SYSTEM_ERRORS:
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return code, os.strerror(code)
    return None
