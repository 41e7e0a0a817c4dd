"""A program's start and end: flags parsed, errors in one line, exit statuses."""

import contextlib
import gc
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from utils.base import hosts
from utils.base.bars import close_bars
from utils.base.devices import check_jax_settings, keep_freed_memory, start_devices
from utils.base.messages import (
    NO_ROOM,
    UserError,
    WriteError,
    configure_output,
    finish_output,
    keep_libraries_apart,
    silence_orbax,
    with_urls,
)
from utils.base.processes import END_SIGNALS, handle_signals, initialize_processes, warn_of_copies
from utils.flags.config_file import expand_config_file, record_file_values
from utils.flags.help import explain_unknown, refuse_habits, show_help, to_integer, to_switch, topic
from utils.flags.reading import read_flags
from utils.runs.remote_run import is_run_file
from utils.storage.staging import upload_outputs

FLAGS = flags.FLAGS


def process_age() -> float | None:
    """Returns the seconds since this process was started, imports included; None where the system does not say."""
    try:  # Linux: when it started, in ticks since the machine did (proc(5))
        stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    ticks = int(stat.rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def use_utf8() -> None:
    """Starts the program again in Python's UTF-8 mode if the locale has another encoding.

    Names of files and classes beyond ASCII could be neither read nor written in it. From Python 3.15 on, UTF-8 is the
    default (PEP 686).
    """
    # The same words in both lists: nobody has changed sys.argv to call the program from another one.
    first = len(sys.orig_argv) - len(sys.argv) + 1
    is_own_process = sys.orig_argv[first:] == sys.argv[1:]
    if sys.getfilesystemencoding() != "utf-8" and is_own_process:
        os.environ["PYTHONUTF8"] = "1"  # for what the program starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


class Terminated(BaseException):
    """Raised by a signal in a program that has nothing to save, so that its `finally` clauses run."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number


def raise_on_signals() -> None:
    """Makes END_SIGNALS raise Terminated, as Ctrl-C raises KeyboardInterrupt; a second one ends the program at once."""

    def end(number, frame):
        # The default from now on: a second signal ends what hangs while it cleans up.
        signal.signal(number, signal.SIG_DFL)
        raise Terminated(signal.Signals(number))

    handle_signals(END_SIGNALS, end)


def run_program(
    define_flags: Callable[[], None], main: Callable[[ConfigDict], None], *, needs_devices: bool = True
) -> None:
    """Reads a program's flags and calls main(config).

    A UserError ends the program with one line and status 1. So does, if it `needs_devices`, a machine where JAX finds
    none.
    """
    # A main that was imported, as by a test, runs in a process that is not its own.
    if main.__module__ == "__main__":
        use_utf8()
        gc.freeze()  # what has been imported stays, and the collector need not go through it again

    def start(config: ConfigDict) -> None:
        check_jax_settings()
        if needs_devices and not config.get("coordinator_address"):  # several processes find each other first
            start_devices()
        main(config)
        upload_outputs(is_run_file)
        hosts.finish_together()

    # The process first: the allocator is set before JAX looks for devices, signals before there is work to lose.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in any encoding
    keep_freed_memory()
    silence_orbax()
    raise_on_signals()

    # One line for whatever the user can mend; a traceback is left to faults of the code.
    try:
        app.run(start, flags_parser=lambda argv: parse_flags(define_flags, argv))
    except UserError as error:
        _end(f"error: {error}")
    except BrokenPipeError:
        pass  # the reader of the output has left, as `head` does
    except OSError as error:
        if error.errno in NO_ROOM:
            _end(f"error: {WriteError(error.filename or 'a file', error)}")
        # Without a file there is nothing to name: a fault of the code.
        if error.errno is None or error.filename is None:
            raise
        _end(f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        # As shells number statuses: 128 + signal.
        _end("interrupted", 128 + signal.SIGINT)
    except Terminated as end:
        _end(f"ended by {end.number.name}", 128 + end.number)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        _end(f"error: process {jax.process_index()} of the run {explain_end(error)}")  # an ordinary end would wait
    finally:
        finish_output()


def explain_end(error: Exception) -> str:
    """Returns in words why one of several processes cannot go on; of a fault of the code, prints the traceback."""
    # A collective fails on the processes that are left when one has ended; JAX's errors have several types.
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
        reason = str(error).partition("\n")[0][:200]
        return f"has lost another one ({reason}); give all their commands again, and they continue from what is saved"
    traceback.print_exc()
    return "has met a fault of the code, which is above"


def join_processes(config: ConfigDict) -> None:
    """Makes one command of the processes that --coordinator_address names: the first line of a program that shares its
    work among them. Raises UserError as `initialize_processes`, and where the first has other flags."""
    if config.coordinator_address is None and config.num_processes is None and config.process_id is None:
        warn_of_copies(Path(sys.argv[0]).name, " without --coordinator_address")
        return
    initialize_processes(config.coordinator_address, config.num_processes, config.process_id)
    if config.coordinator_address is not None:
        raise_on_signals()  # again: JAX has taken SIGTERM
        keep_libraries_apart()
        hosts.start_watch()
        check_same_flags(config)


def check_same_flags(config: ConfigDict) -> None:
    """Raises UserError where a flag of this process differs from the first's: its share would be of other work."""
    own = {name: str(value) for name, value in config.items() if name not in ("coordinator_address", "process_id")}
    for name, value in hosts.broadcast(own).items():
        if own[name] != value:
            raise UserError(f"--{name}={own[name]}, but process 0 has {value}; give all processes the same command")


def _end(message: str, status: int = 1) -> NoReturn:
    """Ends the program with one line and this status."""
    hosts.take_last_word()
    close_bars()
    with contextlib.suppress(OSError):  # a terminal that has been closed, a log on a full disk
        print(with_urls(message), file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        hosts.tell_others()
        os._exit(status)  # an ordinary end would wait for the other processes, which wait for this one
    sys.exit(status)


def parse_flags(define_flags: Callable[[], None], argv: list[str]) -> ConfigDict:
    """Returns the values of the flags in `argv`, whose first word is the program.

    Defines the flags first; prints the help and exits if asked to. Raises UserError for words that are no flags, and
    for values that no flag can have.
    """
    # absl has flags of its own, which are neither listed nor recorded.
    builtin = set(FLAGS)
    define_flags()
    with topic("Start"):
        flags.DEFINE_integer("compilation_cache", 1, "0: compile everything anew, and keep nothing of it.", 0, 1)
    names = [name for name in FLAGS if name not in builtin]
    if {"-h", "-help", "--help"} & set(argv[1:]):
        show_help(names)
        sys.exit(0)

    # Integers may be written 1e6, and switches True, as in other tools.
    for name in names:
        parser: Any = FLAGS[name].parser
        if isinstance(parser, flags.IntegerParser):
            is_switch = (parser.lower_bound, parser.upper_bound) == (0, 1)
            parser.convert = to_switch if is_switch else to_integer

    # Words of other tools before absl sees them: it would only say that it does not know them.
    refuse_habits(argv[1:], names)
    argv, found = expand_config_file(argv, names) if "config" in names else (argv, {})
    try:
        extra = FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(explain_unknown(error.flagname, names)) from None
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())} (--help lists the flags)") from None
    record_file_values(found)
    if extra:
        # A shell has put several names in the place of a pattern.
        quoted = ", a * in quotes" if os.path.lexists(extra[0]) else ""
        raise UserError(f"unexpected argument {extra[0]!r}: flags are written --name value{quoted} (--help lists them)")

    # Before the first warning. Programs that share their work among processes look at these themselves.
    if "quiet" in names:
        configure_output(is_quiet=FLAGS.quiet)
    if "coordinator_address" not in names:
        warn_of_copies(Path(argv[0]).name)
    logging.set_verbosity(logging.WARNING)  # Orbax reports every stage of every save otherwise
    # Of JAX alone, and no setting of a program.
    jax.config.update("jax_enable_compilation_cache", bool(FLAGS.compilation_cache))
    return read_flags(set(FLAGS) - builtin - {"compilation_cache"})
