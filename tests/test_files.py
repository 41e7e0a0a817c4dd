"""Files written whole or not at all, reads tried again, and one process at a time in a folder."""

import ast
import errno
import gc
import gzip
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from matplotlib.figure import Figure
from PIL import Image
from safetensors.numpy import save_file

from tests.conftest import ROOT
from utils.base import files
from utils.base.files import (
    FolderLock,
    atomic_write,
    cache_folder,
    explaining_full_disk,
    file_sha256,
    open_regular,
    prepare_output_folder,
    read_bytes,
    remove_temporaries,
    set_aside,
    temporary_path,
    write_json,
)
from utils.base.messages import UserError, WriteError

NOISE = np.random.default_rng(0).standard_normal((60, 60))


def test_what_fails_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})

    def write():
        with atomic_write(tmp_path / "a.json") as temporary:
            temporary.write_text('{"a"')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("code", "tries"), [(errno.EIO, 4), (errno.ESTALE, 4), (errno.ENOENT, 1), (errno.EACCES, 1)])
def test_reads_are_tried_again_where_that_can_help(tmp_path, monkeypatch, code, tries):
    called = []

    def fail(path):
        called.append(path)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "open_regular", fail)
    monkeypatch.setattr(files, "READ_PAUSES", (0, 0, 0))
    with pytest.raises(OSError, match=os.strerror(code)):
        read_bytes(tmp_path / "x")
    assert len(called) == tries


def test_a_read_that_works_again_is_no_error(tmp_path, monkeypatch):
    answers = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), b"content"]

    def read(path):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(files, "open_regular", read)
    monkeypatch.setattr(files, "READ_PAUSES", (0, 0, 0))
    assert read_bytes(tmp_path / "x") == b"content"


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "good").symlink_to(tmp_path / "file")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in ("pipe", "link", "socket", ".", "/dev/null", "/dev/tty"):
            with pytest.raises(OSError, match="no regular file") as error:
                open_regular(tmp_path / path)
            assert error.value.filename == str(tmp_path / path)
    for read in (read_bytes, file_sha256):
        with pytest.raises(OSError, match="no regular file"):
            read(tmp_path / "pipe")
    with open_regular(tmp_path / "good") as file:
        assert file.read() == b"content"
        assert not os.get_inheritable(file.fileno())
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")


def save_matplotlib(path):
    figure = Figure()
    figure.subplots().plot(NOISE[0])
    figure.savefig(path, format="png")


def save_records(path):
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for row in NOISE:
        writer.write(row.tobytes())
    writer.close()


def save_npz(path):
    with path.open("wb") as file:
        np.savez_compressed(file, noise=NOISE)


def save_gzip(path):
    with gzip.open(path, "wt") as file:
        file.write(str(NOISE.tolist()))


@pytest.mark.parametrize(
    "save",
    [
        save_matplotlib,
        save_records,
        save_npz,
        save_gzip,
        lambda path: Image.fromarray((NOISE * 99).astype(np.uint8)).save(path, "webp", lossless=True),
        lambda path: save_file({"noise": NOISE}, path),
        lambda path: path.write_text(str(NOISE.tolist())),
    ],
    ids=["matplotlib", "array_record", "npz", "gzip", "pillow", "safetensors", "text"],
)
def test_a_full_disk_under_any_library_is_one_line(tmp_path, save, full_disk, capfd):
    path = tmp_path / "result.bin"
    path.write_text("before")
    full_disk(2048)

    def write():
        with explaining_full_disk(lambda: "2 of 3 are whole"), atomic_write(path) as temporary:
            save(temporary)

    with pytest.raises(WriteError) as error:
        write()
    assert str(error.value) == (
        f"{path} could not be written (File too large); 2 of 3 are whole; raise the limit of a file's size (ulimit "
        "-f), and give the same command again"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["result.bin"]
    assert path.read_text() == "before"
    del error
    gc.collect()
    assert capfd.readouterr() == ("", "")
    full_disk(None)
    with atomic_write(path) as temporary:
        save(temporary)
    assert path.stat().st_size > 2048


def test_what_fails_to_be_read_meanwhile_is_not_called_a_failed_write(tmp_path):
    def write():
        with atomic_write(tmp_path / "out"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/image.png")

    with pytest.raises(OSError, match=r"/data/image\.png"):
        write()


def test_only_what_no_process_writes_any_more_is_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    machine = temporary_path(tmp_path / "a.npz").name.split(".")[-3]
    gone, alive = f".a.npz.{machine}.{ended.pid}.tmp", f".a.npz.{machine}.{os.getpid()}.tmp"
    elsewhere, other = f".a.npz.0123abcd.{ended.pid}.tmp", f".b.npz.{machine}.{ended.pid}.tmp"
    names = (gone, alive, elsewhere, other)
    for name in names:
        (tmp_path / name).touch()
    remove_temporaries(tmp_path, "a.npz")
    assert {path.name for path in tmp_path.iterdir()} == {alive, elsewhere, other}
    os.utime(tmp_path / elsewhere, (0, 0))
    prepare_output_folder(tmp_path, "out")  # which every program asks before it works
    assert {path.name for path in tmp_path.iterdir()} == {alive}


def test_temporaries_of_killed_writers_are_removed_once_they_are_old(tmp_path):
    names = (".fid.json.123.tmp", ".new.json.123.tmp", ".notes.tmp", "mine.123.tmp")
    for name in names:
        (tmp_path / name).touch()
        if "new" not in name:
            os.utime(tmp_path / name, (0, 0))
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


def test_what_is_set_aside_is_kept(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "x.json").write_text(content)
        set_aside(tmp_path / "x.json")
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["first", "second"]


def test_a_user_without_a_home_has_a_cache(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert str(os.getuid()) in cache_folder().name


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_ends(tmp_path):
    program = "from pathlib import Path; from utils.base.files import FolderLock; import time\n"
    program += (
        f"lock = FolderLock(Path({str(tmp_path)!r})); lock.acquire('out'); print('held', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    started = time.monotonic()
    message = rf"--out={tmp_path} is in use by process {first.pid} on \S+ \(since 20"
    with pytest.raises(UserError, match=message) as error:
        FolderLock(tmp_path).acquire("out")
    assert time.monotonic() - started < 1
    assert "\n" not in str(error.value)
    (tmp_path / "running.json").write_text("damaged")
    with pytest.raises(UserError, match="in use by another process"):
        FolderLock(tmp_path).acquire("out")
    first.send_signal(signal.SIGKILL)
    first.wait()
    lock = FolderLock(tmp_path)
    lock.acquire("out")
    assert json.loads((tmp_path / "running.json").read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / "running.json").exists()


def test_make_lists_its_targets_and_refuses_unknown_devices():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"demo", "test", "lint", "setup"} <= {line.split()[0] for line in done.stdout.splitlines()}
    for device in ("foo", "", "cpu tpu", "%"):
        command = ["make", "-n", "setup", f"DEVICE={device}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert f"DEVICE={device} is unknown; use one of cpu cuda12 cuda13 tpu" in done.stderr


def is_text_without_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in whatever encoding the locale has."""
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if is_method else getattr(call.func, "id", None)
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return is_method
    modes = [str(getattr(argument, "value", "")) for argument in call.args[:2]]
    own_mode = modes[not is_method :][:1]  # of a path's method the first, of the function the second
    is_text = any(re.fullmatch(r"[rwax]\+?t?", mode) for mode in own_mode) or any(mode[1:] == "t" for mode in modes)
    return name == "open" and (is_text or not (is_method or own_mode))


def opens_by_name(call: ast.Call) -> bool:
    """Whether a call opens whatever there is under a name, a named pipe too, to read it."""
    modes = [str(getattr(argument, "value", "")) for argument in call.args]
    if any(re.fullmatch(r"[wxa]\+?[bt]?", mode) for mode in modes):
        return False
    if not isinstance(call.func, ast.Attribute):
        return getattr(call.func, "id", "") == "open"
    owner, name = ast.unparse(call.func.value), call.func.attr
    if name == "open":
        is_module = owner in ("Image", "gzip", "mmap", "io", "os", "wave", "tarfile")
        return is_module or any(re.fullmatch("rb?t?", mode) for mode in modes) or not (modes or call.keywords)
    return name in ("read_bytes", "read_text", "fromfile", "memmap", "ParquetFile") or (owner, name) == ("np", "load")


def test_files_of_others_are_opened_by_one_function():
    """The exceptions: what is no path, or is remote, or of the package itself."""
    allowed = {
        "utils/base/files.py": {
            "os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)",
            'temporary.open("rb")',
            'Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")',
        },
        "utils/base/devices.py": {'Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")'},
        "utils/base/messages.py": {"os.open(os.devnull, os.O_WRONLY)"},
        "utils/flags/program.py": {'Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")'},
        "utils/base/external.py": {'np.memmap(file, header.dtype, "r", start, header.shape, order)'},
        "utils/images/decoding.py": {"Image.open(limited, formats=FORMATS)"},
        "utils/conditions/classes.py": {'IMAGENET_LABELS.read_text(encoding="utf-8")'},
        "utils/data/fingerprint.py": {'gzip.open(compressed, "rb")'},
        "utils/data/tfds_files.py": {"path.read_bytes()", 'file.open("rb")'},  # after `check_regular`, and remote ones
        "utils/metrics/inception.py": {"extracted.read_bytes()"},
        # What `open_regular` has opened, or what lies in object storage.
        "utils/storage/archive.py": {"np.load(opened, allow_pickle=False)"},
        "utils/storage/zip_files.py": {"file.open()"},
        "utils/storage/tar_files.py": {"file.open()", 'tarfile.open(fileobj=opened, mode="r:")'},
        "utils/storage/parquet_files.py": {"self.file.open()", "parquet.ParquetFile(opened)"},
        "utils/storage/lease.py": {"remote.read_bytes(self.url)"},
        "utils/runs/remote_run.py": {"remote.read_bytes(url)"},
        "utils/storage/parts.py": {"remote.read_bytes(self.name, start, stop)"},
        "utils/storage/remote_tree.py": {
            "remote.read_bytes(self.files[self.find_file(path)].url, None if limit is None else 0, limit)"
        },
    }
    for path in [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py"), *(ROOT / "data").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and opens_by_name(node))
        found = {str(ast.get_source_segment(text, call)) for call in calls}
        assert found <= allowed.get(str(path.relative_to(ROOT)), set()), path
    for text in (
        "open(x)",
        "x.open()",
        "x.open('rb')",
        "Image.open(x)",
        "np.load(x)",
        "x.read_bytes()",
        "os.open(x, 0)",
    ):
        assert opens_by_name(ast.parse(text, mode="eval").body)


def test_texts_are_utf_8_whatever_the_locale():
    folders = (ROOT / name for name in ("utils", "data", "benchmarks", "docs"))
    sources = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    found = []
    for path in sources:
        nodes = ast.walk(ast.parse(path.read_bytes()))
        calls = (node for node in nodes if isinstance(node, ast.Call) and is_text_without_encoding(node))
        found += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls]
    assert found == []
    assert len(sources) > 80
    for text in ("open(x)", "open(x, 'w')", "x.open('r')", "gzip.open(x, 'wt', 3)", "x.read_text()"):
        assert is_text_without_encoding(ast.parse(text, mode="eval").body)


LOCALISED = """
from pathlib import Path
from absl import flags
from utils.flags import program
from utils.flags.definitions import define_path
from utils.base.messages import show_result

def define_flags():
    flags.DEFINE_string("name", None, "A name.")
    define_path("dir", None, "A folder.")

def main(config):
    (Path(config.dir) / config.name).mkdir()
    show_result(config.name)

program.run_program(define_flags, main)
"""


def test_names_beyond_ascii_work_under_any_locale(tmp_path):
    """Under `LC_ALL=C PYTHONUTF8=0`, Python reads and writes ASCII alone."""
    folder = tmp_path / "données"
    folder.mkdir()
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOCALISED, f"--dir={folder}", "--name=猫"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout.decode()) == (0, "猫\n"), done.stderr
    assert os.listdir(os.fsencode(folder)) == ["猫".encode()]
