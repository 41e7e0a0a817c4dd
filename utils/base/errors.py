"""Exceptions that stand for what the user can mend rather than for a fault of the code's."""

import errno
import os
from pathlib import Path


class UserError(ValueError):
    """A message in one line that names the value, the flag and the fix; the programs print it and exit non-zero."""


class AbsentVAEError(UserError):
    """A VAE that is neither here nor to be fetched."""


class DataError(UserError):
    """Data that could be read when the program started cannot be any more."""


# What the system says of nothing but writing, and the way on.
NO_ROOM = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
}


class WriteError(UserError):
    """A file that the system did not let a program write: a full disk, a quota, a file system that is read-only.

    `whole`: what is finished all the same, in words.
    """

    def __init__(self, path: Path | str, error: BaseException, whole: str = ""):
        self.path, self.error = path, error
        code, reason = find_system_error(error) or (0, getattr(error, "strerror", None) or type(error).__name__)
        self.whole, self.strerror = whole, reason
        fix = NO_ROOM.get(code, "see to it, or choose another place")
        middle = f"; {whole}" if whole else ""
        super().__init__(f"{path} could not be written ({reason}){middle}; {fix}, and give the same command again")


# What the system says that is no verdict on a file's content.
SYSTEM_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG, errno.ESTALE, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM,
)  # fmt: skip


def find_system_error(error: BaseException) -> tuple[int, str] | None:
    """(number, text) of what the system refused, without the libraries' internals: their own types of error carry its
    text alone. None where it is something else."""
    for code in SYSTEM_ERRORS:
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return code, os.strerror(code)
    return None
