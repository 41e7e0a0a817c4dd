"""Object storage through fsspec: s3://BUCKET/NAME (s3fs), gs://BUCKET/NAME (gcsfs), and memory:// in tests.

Objects are read, listed, fetched into a cache, and written whole: an object is there complete, or not at all. Every
function raises RemoteError, a UserError of one line, for whatever storage answers.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from utils.base.bars import Bar
from utils.base.files import atomic_write, cache_folder
from utils.base.files import read_bytes as read_local
from utils.base.messages import UserError, one_line, printable, progress_bar

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "memory": ""}  # {scheme: the package that reads it}
_moves = threading.Lock()  # of bars: transfers are on several threads
LARGE = 2**25  # bytes above which a file is uploaded in parts, as they are read
FIRST_ANSWER = 10  # seconds within which a bucket has to answer for the first time; the libraries try for longer
CREDENTIALS = "docs/storage.md says where they are looked for"
# Options of the file systems: few tries, and listings that are always asked for anew.
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"max_attempts": 3},
            "max_pool_connections": 32,
        }
    },
    "gs": {},
    "memory": {},
}


class RemoteError(UserError):
    """An answer of object storage that ends what was asked: no such object, no credentials, no network.

    `reason` is the answer without the URL; `is_absent` says that the object is not there, though its bucket is.
    """

    def __init__(self, url: str, reason: str, flag: str | None = None, is_absent: bool = False):
        super().__init__(f"--{flag}={url}: {reason}" if flag else f"{url}: {reason}")
        self.reason = reason
        self.is_absent = is_absent


class NoBucketError(FileNotFoundError):
    """A bucket that is not there; the libraries say so in several ways."""


class RemoteFile(NamedTuple):
    """An object as it is listed."""

    url: str
    size: int
    version: str  # its etag, generation or time: another content has another


def join(url: str, name: str) -> str:
    """Returns the URL of `name`, a relative path, below `url`."""
    return f"{url.rstrip('/')}/{name}"


@functools.cache
def filesystem(scheme: str) -> Any:
    """Returns fsspec's file system of a scheme such as 's3'. Raises ImportError without its package."""
    import fsspec  # which takes a while, and most commands read local files alone

    # GCS: asking for a bucket's kind takes a second protocol, and a minute where an emulator does not speak it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of what is raised anyway
    options = {} if scheme == "memory" else {"use_listings_cache": False}
    return fsspec.filesystem(scheme, **options, **OPTIONS[scheme])


@functools.cache
def _meet(bucket: str) -> None:
    """Asks a bucket, s3://NAME, whether it is there, for at most FIRST_ANSWER seconds."""
    scheme, _, name = bucket.partition("://")
    system = filesystem(scheme)
    if not system.async_impl:
        return
    from fsspec.asyn import sync

    # One page of its names: a listing tells a missing bucket from a forbidden one.
    try:
        sync(system.loop, system._find, f"{name}/.jax-flow-matching", timeout=FIRST_ANSWER)
    except PermissionError:
        pass  # credentials may be for some objects alone
    except FileNotFoundError:
        raise NoBucketError from None


@contextlib.contextmanager
def _asking(url: str, flag: str | None = None) -> Iterator[tuple[Any, str]]:
    """Yields (file system, path in it) of a URL, and turns whatever it raises into a RemoteError."""
    scheme, _, path = url.partition("://")
    try:
        bucket = f"{scheme}://{path.partition('/')[0]}"
        _meet(bucket)
        yield filesystem(scheme), path if scheme != "memory" else f"/{path}"
    except UserError:
        raise
    except Exception as error:  # of two libraries, their HTTP clients and credentials, which share no type
        reason, is_absent = _explain(error, scheme, url)
        raise RemoteError(url, reason, flag, is_absent) from error


def _explain(error: Exception, scheme: str, url: str) -> tuple[str, bool]:
    """Returns (what storage answered and the fix, whether it is that nothing is there)."""
    bucket = url.partition("://")[2].partition("/")[0]
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    names = {type(each).__name__ for each in chain}
    code = str(getattr(error, "code", ""))

    # From what the user can mend to what nobody foresaw.
    if isinstance(error, ImportError):
        return f"the package {PACKAGES[scheme]} is not installed; make setup EXTRAS=cloud", False
    if any("Credentials" in name or name == "RefreshError" for name in names):
        return f"no credentials were found; {CREDENTIALS}", False
    if isinstance(error, PermissionError) or code in ("401", "403") or "Forbidden" in str(error):
        return f"these credentials do not allow it; {CREDENTIALS}", False
    if isinstance(error, NoBucketError):
        return f"there is no bucket {bucket}; check the name", False
    if isinstance(error, FileNotFoundError):
        return "there is no such object; check the name", True
    if isinstance(error, TimeoutError | ConnectionError) or any(
        word in name for name in names for word in ("Connect", "Timeout", "ServerDisconnected")
    ):
        problem = one_line(error)[:100] if str(error) else f"no answer within {FIRST_ANSWER} seconds"
        return f"its storage cannot be reached ({problem}); try again", False
    return f"its storage answered: {one_line(error)}", False


# --- Reading ---


def transfer_bar(what: str, num_bytes: int) -> Bar:
    """Returns the bar of transfers, for what takes more than a moment."""
    return progress_bar(total=num_bytes, desc=printable(what), unit="B", unit_scale=True, delay=2)


def find_file(url: str, flag: str | None = None) -> RemoteFile | None:
    """Returns the object of this URL; None where there is none. `flag` is named by errors, here and below."""
    try:
        with _asking(url, flag) as (system, path):
            info = system.info(path)
    except RemoteError as error:
        if error.is_absent:
            return None
        raise
    return _listed(url.partition("://")[0], info) if info["type"] == "file" else None


def list_files(url: str, flag: str | None = None) -> list[RemoteFile]:
    """Returns the objects below a URL, that is those of names that begin with URL/, in the order of their names."""
    with _asking(url, flag) as (system, path):
        found = system.find(f"{path.rstrip('/')}/", withdirs=False, detail=True)
        scheme = url.partition("://")[0]
        files = [_listed(scheme, info) for info in found.values() if info["type"] == "file"]
    # Names that are no relative paths, as of "folders" that end in a slash, are none that this suite has written.
    start = join(url, "")
    return sorted(file for file in files if file.url.startswith(start) and _is_path(file.url.removeprefix(start)))


def match_files(pattern: str, flag: str | None = None) -> list[str]:
    """Returns the URLs of the objects that a pattern matches, in the order of their names; * stands for no slash."""
    with _asking(pattern, flag) as (system, path):
        scheme = pattern.partition("://")[0]
        return sorted(f"{scheme}://{name.lstrip('/')}" for name in system.glob(path))


def _is_path(name: str) -> bool:
    return not {"", ".", ".."} & set(name.split("/"))


def _listed(scheme: str, info: dict[str, Any]) -> RemoteFile:
    # S3 has etags, GCS generations; the memory times, of two types.
    version = info.get("ETag") or info.get("generation") or info.get("created") or ""
    version = version.timestamp() if isinstance(version, datetime) else version
    return RemoteFile(f"{scheme}://{info['name'].lstrip('/')}", int(info["size"]), str(version).strip('"'))


def read_bytes(url: str, start: int | None = None, stop: int | None = None, flag: str | None = None) -> bytes:
    """Returns an object's bytes [start, stop), by default all."""
    with _asking(url, flag) as (system, path):
        return system.cat_file(path, start=start, end=stop)


def download(url: str, path: Path, flag: str | None = None, bar: Bar | None = None) -> None:
    """Writes an object to the file `path`, atomically, and moves the bar by its bytes. Raises WriteError where that
    cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, is_synced=False) as temporary, _asking(url, flag) as (system, name):
        system.get_file(name, str(temporary), callback=_moving(bar))


def _moving(bar: Bar | None) -> Any:
    """Returns fsspec's callback that moves a bar by the bytes of a transfer, several of which may be on their way."""
    from fsspec.callbacks import Callback

    class Moving(Callback):
        def relative_update(self, inc: int = 1) -> None:
            if bar is not None:
                with _moves:
                    bar.update(inc)

    return Moving()


def fetch(url: str, flag: str | None = None) -> Path:
    """Returns the local copy of an object, kept under the cache folder as long as the object stays the same.

    Its name is the object's. Raises RemoteError where there is none.
    """
    file = find_file(url, flag)
    if file is None:
        raise RemoteError(url, "there is no such object; check the name", flag, is_absent=True)
    version = hashlib.sha256(f"{file.version} {file.size}".encode()).hexdigest()[:16]
    folder = cache_path(url, "inputs")
    path = folder / version / url.rpartition("/")[2]
    if not path.exists():
        with transfer_bar(f"fetching {path.name}", file.size) as bar:
            download(url, path, flag, bar)
        # Copies of what the object was before: whoever has one open keeps it.
        for other in folder.iterdir():
            if other.name != version:
                shutil.rmtree(other, ignore_errors=True)
    return path


def cache_path(url: str, kind: str) -> Path:
    """Returns the local folder that belongs to a URL: jax-flow-matching/storage/KIND/NAME-HASH in the user's cache."""
    url = url.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rpartition("/")[2])[:60]
    return cache_folder() / "storage" / kind / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


# --- Writing ---


def upload(path: Path, url: str, flag: str | None = None, bar: Bar | None = None) -> None:
    """Makes an object of a local file, whole or not at all, and moves the bar by its bytes. Raises FileNotFoundError
    where there is no such file."""
    # As it is now: a log may grow meanwhile.
    size = path.stat().st_size
    if size <= LARGE:
        write_bytes(url, read_local(path), flag)
        _moving(bar).relative_update(size)
        return
    with _asking(url, flag) as (system, name):
        system.put_file(str(path), name, callback=_moving(bar))


def write_bytes(url: str, content: bytes, flag: str | None = None) -> None:
    """Makes an object of these bytes."""
    with _asking(url, flag) as (system, name):
        system.pipe_file(name, content)


def remove(url: str) -> None:
    """Removes an object, if there is one."""
    with _asking(url) as (system, name), contextlib.suppress(FileNotFoundError):
        system.rm_file(name)


def check_writable(url: str, flag: str) -> None:
    """Proves that objects can be made below a URL, and leaves none. Raises RemoteError, naming --`flag`, otherwise."""
    probe = join(url, f".probe-{os.getpid()}")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except RemoteError as error:
        raise RemoteError(url, error.reason, flag) from error
