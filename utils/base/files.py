"""Files: how they are opened, read, written atomically, set aside and locked; checks of paths before any work."""

import contextlib
import errno
import functools
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from utils.base.messages import NO_ROOM, UserError, WriteError, find_system_error, printable, progress_bar, warn

UNFINISHED = ".unfinished.json"  # in a folder that is being filled
MAX_STEM = 50  # letters of a file's name in that of its temporary, which has at most 255 bytes
TEMPORARY = re.compile(r"\..+?(?:\.([0-9a-f]{8}))?\.(\d+)\.tmp")  # older ones do not name the machine
HASHED_BYTES = 2**22  # read at a time
READ_PAUSES = (0.1, 0.4, 1.5)  # seconds before a failed read is tried again
# What another try cannot change: nothing is there, it is no file, or it may not be opened.
LASTING_ERRORS = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL,
)  # fmt: skip


def open_regular(path: str | os.PathLike) -> io.BufferedReader:
    """Opens a regular file to read its bytes: the one way in which files of others are opened.

    Raises OSError (EINVAL, "it is no regular file") for a named pipe, a socket, a device or a folder, on which a reader
    might wait for ever.
    """
    try:
        # O_NONBLOCK: a named pipe would wait for a writer. O_NOCTTY: a terminal would become that of the process.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, a device without a driver
            raise _no_regular_file(path) from None
        raise
    # The open file is judged, not its path: nothing can be put in its place in between.
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise _no_regular_file(path)


def check_regular(path: str | os.PathLike) -> None:
    """Raises OSError as `open_regular` does, for files that a library opens by their names."""
    open_regular(path).close()


def _no_regular_file(path: str | os.PathLike) -> OSError:
    return OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


def expand_home(path: str, setting: str) -> str:
    """Returns `path` with a leading ~ or ~user replaced. Raises UserError, naming the `setting`, if there is no such
    home."""
    if not path.startswith("~"):
        return path
    # Python leaves the path as it is where it knows no such user.
    expanded = os.path.expanduser(path)
    if expanded == path:
        raise UserError(f"{setting}: there is no home folder for {path.split('/')[0]}; give the whole path")
    return expanded


class LimitedReads:
    """A file from which at most `limit` bytes may be read, bytes read twice counted twice; then ValueError.

    For libraries that believe what a file says about its own size.
    """

    def __init__(self, file: io.BufferedIOBase, limit: float):
        self.file = file
        self.left = limit
        # All that zipfile asks of a file, passed on.
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable
        self.close = file.close

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self.left:  # one byte too many is enough to know
            size = -1 if math.isinf(self.left) else int(self.left) + 1
        content = self.file.read(size)
        if len(content) > self.left:
            raise ValueError("it asks for more bytes than a file of its kind and size does")
        self.left -= len(content)
        return content


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes as hexadecimal digits."""
    # Some at a time, so that a bar can move.
    digest = hashlib.sha256()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        with progress_bar(None, f"hashing {printable(path.name)}", size, unit="B", unit_scale=True, delay=2) as bar:
            while chunk := file.read(HASHED_BYTES):
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()


def count_bytes(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder, that are on disk so far."""
    files = path.rglob("*") if path.is_dir() else [path]
    total = 0
    for file in files:
        with contextlib.suppress(OSError):  # it has been renamed meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def cache_folder() -> Path:
    """Returns `jax-flow-matching/` in $XDG_CACHE_HOME or ~/.cache; it need not exist yet.

    A user without a home gets a folder of their own among the temporary files.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "jax-flow-matching"
    try:
        return Path.home() / ".cache" / "jax-flow-matching"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"jax-flow-matching-{os.getuid()}"


def read_bytes(path: Path) -> bytes:
    """Returns the content of a regular file, trying again for two seconds: network file systems have hiccups.

    Raises OSError if it still fails, and at once if trying again cannot help.
    """
    # None: the last try, after which there is nothing to wait for.
    for pause in (*READ_PAUSES, None):
        try:
            with open_regular(path) as file:
                return file.read()
        except OSError as error:
            if pause is None or error.errno in LASTING_ERRORS:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


def temporary_path(path: Path) -> Path:
    """Returns the path at which this process prepares `path`; see `remove_temporaries`."""
    return path.with_name(f".{path.name[:MAX_STEM]}.{machine_id()}.{os.getpid()}.tmp")


@contextlib.contextmanager
def atomic_write(path: Path, is_synced: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place when the block ends: complete and on disk.

    A kill, a power cut or an error in the block leaves the old file. Without `is_synced`, for one of many small files,
    the system decides when it goes to disk. The file gets the umask's mode, whatever writes it. Raises WriteError if
    the system does not let it be written, whichever library says so.
    """
    # Beside `path`: a rename is atomic only within one file system.
    temporary = temporary_path(path)
    try:
        temporary.touch()  # with the mode that the umask leaves
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary

        # The content is on disk before the name is.
        with temporary.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:  # safetensors replaces it by a file of mode 0600
                os.fchmod(file.fileno(), mode)
            if is_synced:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    # Already in words for the user, a WriteError of a file within the block among them.
    except UserError:
        raise
    except Exception as error:
        # Libraries wrap the system's error: it may be anywhere in the chain.
        for link in _chain(error):
            if _is_about(link, temporary, path):
                raise WriteError(path, link) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error and its causes: closing a file that could not be written raises further ones."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_about(error: BaseException, temporary: Path, path: Path) -> bool:
    """Returns whether writing failed, rather than the reading of some other file in the block."""
    name = getattr(error, "filename", None)
    if name is not None:
        return str(name) in (str(temporary), str(path))
    return find_system_error(error) is not None


@contextlib.contextmanager
def explaining_full_disk(describe: Callable[[], str]) -> Iterator[None]:
    """Adds to a WriteError what is finished by then, in the words of `describe`."""
    try:
        yield
    except WriteError as error:
        raise WriteError(error.path, error.error, "; ".join(filter(None, (error.whole, describe())))) from error


@functools.cache
def machine_id() -> str:
    """Returns eight digits that differ between machines, their starts and containers, as numbers of processes do."""
    # Containers share a host's name and start; the namespace of processes tells them apart.
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def remove_temporaries(folder: Path, name: str = "") -> None:
    """Removes what killed `atomic_write`s have left in a folder, or only what they left of its file `name`.

    Processes of this machine are known to be gone; other machines may share the folder, so their files must be a day
    old.
    """
    # Names as in `temporary_path`: .FILE.MACHINE.PROCESS.tmp
    start = f".{glob.escape(name[:MAX_STEM])}" if name else ""
    for path in folder.glob(f"{start}.*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if match and (is_gone(*match.groups()) or time.time() - path.lstat().st_mtime > 24 * 3600):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_gone(machine: str | None, pid: str) -> bool:
    """Returns whether a process is known to have ended; only those of this machine are known."""
    if machine != machine_id():
        return False
    try:
        # Signal 0 only asks whether the process is there.
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # of another user, or no number of a process
        return False
    return False


def mark_unfinished(folder: Path, num_files: int) -> None:
    """Marks a folder as being filled with `num_files` files, until `mark_finished`; see `check_finished`."""
    write_json(folder / UNFINISHED, {"num_files": num_files})


def mark_finished(folder: Path) -> None:
    (folder / UNFINISHED).unlink(missing_ok=True)


def check_finished(files: Sequence[Path], folder: Path, flag: str) -> None:
    """Raises UserError, which begins with `flag`, if a program has begun to fill `folder`, or the folder of one of
    `files`, and has not finished."""
    for each in dict.fromkeys((folder, *(file.parent for file in files))):
        if not (each / UNFINISHED).is_file():
            continue
        try:
            total = json.loads(read_bytes(each / UNFINISHED))["num_files"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            total = "an unknown number"
        # The mark says how many there are going to be.
        count = sum(file.parent == each for file in files)
        raise UserError(
            f"{flag}: {each} holds {count} of {total} samples: the program that writes them was stopped, or is still "
            "at work; give its command again, or copy the samples to another folder to take them as they are"
        )


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def set_aside(path: Path, folder: Path | None = None) -> Path:
    """Moves a damaged file or folder to a free name in `folder` (default: its own), and returns the new path.

    Nothing is removed.
    """
    folder = folder or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := folder / f"{path.name}.damaged{number}").exists():
        number += 1
    path.rename(target)
    return target


class FolderLock:
    """Lets one process at a time work in a folder.

    The system drops the lock on FOLDER/.NAME.lock when its process ends in any way. FOLDER/NAME.json tells others who
    holds it.
    """

    def __init__(self, folder: Path, name: str = "running"):
        self.folder = folder
        self.holder = folder / f"{name}.json"
        self.lock = filelock.FileLock(folder / f".{name}.lock")

    def acquire(self, flag: str) -> None:
        """Takes the lock until `release` or the process's end. Raises UserError, naming the holder, if it is taken."""
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"--{flag}={self.folder} is in use by {self._describe_holder()}; wait for it or stop it, or choose "
                "another folder"
            ) from None
        except OSError as error:  # a file system without locks
            warn(f"{self.folder} cannot be locked ({error.strerror}): make sure that no other process writes there")
        # For the error of the next one to try; the lock alone decides.
        own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(self.holder, own)

    @contextlib.contextmanager
    def held(self, flag: str) -> Iterator[None]:
        """Holds the lock during a block, however it ends; see `acquire`."""
        self.acquire(flag)
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        # While the lock is still held: afterwards the file may be that of the next holder.
        self.holder.unlink(missing_ok=True)
        self.lock.release()

    def _describe_holder(self) -> str:
        try:
            holder = json.loads(read_bytes(self.holder))
            return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "another process"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock beside `path` while its content is read, changed and written again."""
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        yield


def check_writable(folder: Path, flag: str, file: Path | None = None, names: Iterable[str] = ()) -> None:
    """Proves that files, or the one of --`flag`, can be written in a folder, `names` among them.

    Leaves nothing: it looks at the folder, or at the first above it that exists. Raises UserError otherwise.
    """
    # A folder in a file's place would be found only when the file is written.
    for name in names:
        if (folder / name).is_dir():
            raise UserError(f"--{flag}={folder} holds a folder {name}, where a file is to be; choose another folder")
    # Write something: permissions alone do not tell of full or read-only file systems.
    try:
        place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        with tempfile.TemporaryFile(dir=place) as probe:  # of no name: the processes of a run try at the same time
            probe.write(bytes(4096))
    except OSError as error:
        raise _not_writable(folder, flag, file, error) from None


def prepare_output_folder(folder: Path, flag: str, file: Path | None = None, names: Iterable[str] = ()) -> None:
    """Creates the folder of --`flag`, or of its `file`; proves that files can be written there (see `check_writable`),
    and removes the temporary files that killed writers have left. Raises UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, flag, file, error) from None
    check_writable(folder, flag, file, names)
    remove_temporaries(folder, file.name if file else "")


def _not_writable(folder: Path, flag: str, file: Path | None, error: OSError) -> UserError:
    fix = f"{NO_ROOM[error.errno]}, or choose" if error.errno in NO_ROOM else "choose"
    kind = "file" if file else "folder"
    return UserError(f"--{flag}={file or folder} cannot be written ({error.strerror}); {fix} another {kind}")


def prepare_output_file(path: Path, flag: str, example: str, inputs: Mapping[str, str | None] | None = None) -> None:
    """Prepares the folder of the file of --`flag`, named like `example`; see `prepare_output_folder`.

    Raises UserError where it cannot be written, is a folder or no regular file, or is one of `inputs`, {flag: path}.
    """
    if path.is_dir():
        raise UserError(f"--{flag}={path} is a folder; name the file to write, such as {path / example}")
    if path.exists() and not path.is_file():
        raise UserError(f"--{flag}={path} is no regular file; name another")

    # Paths are resolved: two spellings, or a link, may lead to one file.
    for name, value in (inputs or {}).items():
        if value and Path(value).resolve() == path.resolve():
            raise UserError(f"--{flag}={path} is the file of --{name}, which would be lost; name another file")
    prepare_output_folder(path.parent, flag, path)


def check_free_space(path: Path, flag: str, num_bytes: int) -> None:
    """Raises UserError if a file of `num_bytes` does not fit where it is to be written: the work would be lost."""
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise UserError(
            f"--{flag}={path} takes up to {num_bytes:,} bytes, but {free:,} are free there; make room, or choose "
            "another place"
        )
