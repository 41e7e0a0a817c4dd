"""Errors that the user can mend, as opposed to faults of the code, and the messages of the programs.

Messages are printed by process 0 of a run. Output that cannot be written, to a full disk or a closed terminal, ends no
run; names of files may be in any encoding.
"""

import contextlib
import errno
import functools
import logging as python_logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any, ClassVar

import jax
from absl import logging

from utils.base import bars


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


def printable(text: str) -> str:
    r"""Returns a text with file names in it as UTF-8; bytes of another encoding become \xNN."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _Output:
    """Destination of progress lines: the standard output, beside results, or the standard error output, or none."""

    is_apart = False  # results alone go to the standard output
    is_quiet = False  # no progress, no warnings
    reworded: tuple[tuple[str, str], ...] = ()  # (flag, the one that replaces it) in warnings, by `rewording`
    places: ClassVar[dict[str, str]] = {}  # {local path: the URL of which it is the copy}, by `show_path_as`


def configure_output(*, is_apart: bool | None = None, is_quiet: bool | None = None) -> None:
    """Sets where lines go; None leaves a setting as it is.

    `is_apart`: results to the standard output, all else to the standard error output. `is_quiet`: nothing but results
    and errors is printed, by libraries neither.
    """
    if is_apart is not None:
        _Output.is_apart = is_apart
    if is_quiet is not None:
        _Output.is_quiet = is_quiet
        python_logging.disable(python_logging.WARNING if is_quiet else python_logging.NOTSET)
        if is_quiet:
            warnings.simplefilter("ignore")


def keep_libraries_apart() -> None:
    """Sends what libraries print on the standard output to the standard error output: Gloo announces its connections,
    after which nobody could read results as JSON. Python's own lines go where they went."""
    if sys.stdout is sys.__stdout__:
        with contextlib.suppress(OSError):  # a standard output that is closed
            results = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
            os.dup2(2, 1)
            sys.stdout = results


def log(text: str) -> None:
    """Prints a line of progress."""
    if not _Output.is_quiet:
        _print(text, sys.stderr if _Output.is_apart else sys.stdout)


def warn(text: str) -> None:
    """Prints a line on the standard error output about what may be wrong."""
    if not _Output.is_quiet:
        _print(_reword(text), sys.stderr)


@contextlib.contextmanager
def rewording(flags: Mapping[str, str]) -> Iterator[None]:
    """Replaces flags in the texts of warnings and UserErrors within the block: {flag: the one that replaces it}."""
    _Output.reworded = tuple(flags.items())
    try:
        yield
    except UserError as error:
        raise UserError(_reword(str(error))) from None
    finally:
        _Output.reworded = ()


def _reword(text: str) -> str:
    for flag, other in _Output.reworded:
        text = text.replace(flag, other)
    return text


def show_path_as(path: Path, url: str | None) -> None:
    """Has all messages name the URL of which a local path is the copy; with None, the path itself."""
    _Output.places[str(path)] = str(path) if url is None else url


def with_urls(text: str) -> str:
    """Returns a message with URLs in place of their local copies."""
    if not _Output.places:
        return text
    # The longest first; the look-ahead keeps the start of another name as it is.
    paths = "|".join(map(re.escape, sorted(_Output.places, key=len, reverse=True)))
    return re.sub(rf"(?:{paths})(?![\w-]|\.\w)", lambda match: _Output.places[match[0]], text)


def show_result(text: str) -> None:
    """Prints a result on the standard output."""
    _print(text, sys.stdout)


@functools.cache
def warn_once(text: str) -> None:
    """Prints a warning only the first time: every split of a data set would repeat it."""
    warn(text)


def _print(text: str, file: Any) -> None:
    # Of several processes one speaks; the others would say the same.
    if jax.process_index() == 0:
        with contextlib.suppress(OSError), bars.above_bars():
            print(printable(with_urls(text)), file=file, flush=True)


def finish_output() -> None:
    """Drops output that cannot be written any more: Python's own last flush would turn success into status 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # From here on, flushes go to the null device and succeed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- Progress bars ---


def progress_bar(*args: Any, **options: Any) -> bars.Bar:
    """Returns a bar with the arguments of tqdm, wherever it is drawn (utils/base/bars.py): the one way to one.

    --quiet silences it; of several processes, one has bars. Where there is nothing to do, there is none. A full disk
    under the log ends none.
    """
    is_silent = are_bars_silent() or options.get("total") == 0
    return bars.make_bar(*args, **{"disable": is_silent, **options})


def download_bar(what: str) -> contextlib.AbstractContextManager[Any]:
    """Returns what yields the `tqdm_class` for downloads by huggingface_hub, whose bar is as silent as
    `progress_bar`."""
    return bars.download_bar(what, are_bars_silent())


def are_bars_silent() -> bool:
    return _Output.is_quiet or bars.are_hidden() or jax.process_index() > 0


def format_duration(seconds: float) -> str:
    """Returns a time in the unit that suits it, such as '7 minutes' or '2.5 days'."""
    # The largest unit that the time fills at least once, up to rounding.
    units = (("day", 86400), ("hour", 3600), ("minute", 60))
    unit, size = next((pair for pair in units if seconds >= 0.99 * pair[1]), ("second", 1))
    count = seconds / size
    if unit == "second" and count < 1:
        return "less than a second"

    # Two digits are enough for an estimate: 2.5 days, 37 minutes.
    text = f"{count:,.0f}" if count >= 9.95 else f"{count:.1f}".removesuffix(".0")
    return f"{text} {unit}{'s' * (text != '1')}"


@functools.cache
def log_once(text: str) -> None:
    """Prints a line of progress only the first time: what looks again and again would repeat it."""
    log(text)


@functools.cache  # once: each call would wrap the hooks again
def silence_orbax() -> None:
    """Keeps off the screen what Orbax logs about errors that it also raises: hundreds of lines from several threads.

    It replaces Python's hooks for exceptions in threads and coroutines. Programs call it as they start; so may those
    who use the suite from Python and want a damaged checkpoint to be one line.
    """
    # Its own log, and that of reads and writes which nobody waited for.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    getLogger("asyncio").addFilter(lambda record: not _is_of_orbax(record))

    # Threads beside the one whose error is raised.
    previous = threading.excepthook
    threading.excepthook = lambda args: None if "orbax" in type(args.thread).__module__ else previous(args)

    # Reads and writes that report to an event loop which is closed by then.
    previous_unraisable = sys.unraisablehook

    def ignore_late_answers(unraisable):
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        if "Event loop is closed" not in str(unraisable.exc_value) and (not code or "orbax" not in code.co_filename):
            previous_unraisable(unraisable)

    sys.unraisablehook = ignore_late_answers


def _is_of_orbax(record: LogRecord) -> bool:
    # By its text, or by the files that its traceback passes through.
    error = record.exc_info and record.exc_info[1]
    frames = traceback.walk_tb(error.__traceback__) if error else ()
    return "orbax" in record.getMessage() or any("orbax" in frame.f_code.co_filename for frame, _ in frames)
