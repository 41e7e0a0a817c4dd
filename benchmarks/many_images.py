"""Times the start of a training on many image files: the first, one that was killed, the second, and one that trusts.

    python benchmarks/many_images.py --out /tmp/many --num_images 1300000

Makes the files once (synthetic PNGs of some hundred bytes in 1,000 folders, or in a zip, a tar or parquet with
--kinds), and loads both splits of them in a process of its own, whose seconds and peak memory are printed as a table.
"""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.base.messages import log, progress_bar  # noqa: E402
from utils.data.dataset import DataOptions  # noqa: E402
from utils.data.fingerprint import write_listing  # noqa: E402
from utils.data.loaders import describe_data, load_splits  # noqa: E402
from utils.flags import program  # noqa: E402

NUM_CLASSES = 1000
SIDE = 8
STARTS = ("first, killed halfway", "first, continued", "second", "second, --check_images 0")


def define_flags() -> None:
    flags.DEFINE_string("out", "/tmp/many_images", "Folder of the files; it may take some gigabytes.")
    flags.DEFINE_integer("num_images", 1_300_000, "Images.", lower_bound=2 * NUM_CLASSES)
    flags.DEFINE_list("kinds", ["folder"], "folder, zip, tar, parquet.")
    flags.DEFINE_string("load", None, "Loads this data set, and prints seconds and memory as JSON.")
    flags.DEFINE_bool("trust", False, "With --load: --check_images 0.")


def make_image(number: int) -> bytes:
    """Returns a grey PNG of SIDE x SIDE pixels, each number another (RFC 2083)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    data = zlib.compress(rows, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def make_files(count: int) -> Iterator[tuple[str, bytes]]:
    """Yields (path, bytes) of images in folders of classes, in the order of their paths."""
    for number in progress_bar(range(count), "making the images", unit="image"):
        yield f"c{number * NUM_CLASSES // count:04}/{number:08}.png", make_image(number)


def make_data(kind: str, out: Path, count: int) -> str:
    """Makes the images once, and returns the name of the data set."""
    done = out / f"{kind}_{count}"
    path = out / f"{kind}_{count}.{kind}"
    match kind:
        case "folder":
            if not done.is_file():
                for name, content in make_files(count):
                    file = out / f"images_{count}" / name
                    if name.endswith("0.png") or not file.parent.is_dir():
                        file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content)
            name = f"folder:{out / f'images_{count}'}"
        case "zip":
            if not done.is_file():
                with zipfile.ZipFile(path, "w") as archive:
                    for name, content in make_files(count):
                        archive.writestr(name, content)
            name = f"zip:{path}"
        case "tar":
            if not done.is_file():
                with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
                    for name, content in make_files(count):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        archive.addfile(info, BytesIO(content))
                        archive.members = []  # a million of them would be kept
            name = f"tar:{path}"
        case "parquet":
            if not done.is_file():
                _write_parquet(path, count)
            name = f"parquet:{path}"
        case _:
            raise SystemExit(f"--kinds={kind} is unknown; use folder, zip, tar, parquet")
    done.touch()
    return name


def _write_parquet(path: Path, count: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())])
    with parquet.ParquetWriter(path, schema) as writer:
        rows: list[tuple[str, bytes]] = []
        for row in make_files(count):
            rows.append(row)
            if len(rows) == 1000:
                writer.write_table(_to_table(rows, schema))
                rows = []
        if rows:
            writer.write_table(_to_table(rows, schema))


def _to_table(rows: list[tuple[str, bytes]], schema):
    import pyarrow as pa

    images = [{"bytes": content, "path": name} for name, content in rows]
    return pa.table({"image": images, "label": [int(name[1:5]) for name, _ in rows]}, schema)


def load(name: str, is_trusting: bool) -> None:
    """Does what the start of a training does with its data, and prints what that took."""
    start = time.monotonic()
    datasets = load_splits(name, DataOptions(image_size=SIDE, check_images=not is_trusting))
    folder = Path(name.partition(":")[2]).parent / "listing"
    folder.mkdir(exist_ok=True)
    describe_data(datasets)
    write_listing(folder, {split: dataset.fingerprint for split, dataset in datasets.items()})
    images = sum(len(dataset.source) for dataset in datasets.values())
    seconds = time.monotonic() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"images": images, "seconds": seconds, "gib": memory}), flush=True)


def main(config: ConfigDict) -> None:
    if config.load:
        load(config.load, config.trust)
        return
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for kind in config.kinds:
        name = make_data(kind, out, config.num_images)
        cache = out / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--load", name]
        for start in STARTS:
            words = [*command, "--trust"] if "0" in start else command
            began = time.monotonic()
            process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
            if "killed" in start:
                _wait_for_half(cache, process, config.num_images)
                process.send_signal(signal.SIGKILL)
                process.wait()
                lines.append(f"| {kind} | {start} | {time.monotonic() - began:.0f} | |")
            else:
                output, _ = process.communicate()
                if process.returncode:
                    raise SystemExit(f"{name}: status {process.returncode}")
                found = json.loads(output.splitlines()[-1])
                lines.append(f"| {kind} | {start} | {found['seconds']:.0f} | {found['gib']:.2f} |")
            log(lines[-1])
    log(f"{config.num_images:,} images of {SIDE}x{SIDE} pixels")
    log("\n".join(["| source | start | seconds | GiB |", "|---|---|---:|---:|", *lines]))


def _wait_for_half(cache: Path, process: subprocess.Popen, count: int) -> None:
    """Waits until half of the images are checked, by the size of what is kept of them."""
    import sqlite3

    while process.poll() is None:
        time.sleep(1)
        for file in (cache / "jax-flow-matching").glob("checked-*.sqlite"):
            try:
                with sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=1) as memory:
                    (found,) = memory.execute("SELECT count(*) FROM images").fetchone()
            except sqlite3.Error:
                continue
            if found >= count // 2:
                return


if __name__ == "__main__":
    program.run_program(define_flags, main, needs_devices=False)
