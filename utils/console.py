"""What the programs say: by the first process of a run alone, names of files in any encoding included."""

import functools
import sys

import jax


def printable(text: str) -> str:
    r"""A text with file names in it as UTF-8; bytes of another encoding as \xNN."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def say(text: str) -> None:
    """A line on the standard output."""
    if jax.process_index() == 0:
        print(printable(text), flush=True)


def warn(text: str) -> None:
    """A line on the standard error output, where results go elsewhere."""
    if jax.process_index() == 0:
        print(printable(text), file=sys.stderr, flush=True)


@functools.cache
def warn_once(text: str) -> None:
    """Warns of what each split of a data set would warn of again."""
    warn(text)
