"""Programs on several processes: what two of them make is what one makes, and none goes on without the others."""

import json
import os
import signal
import socket
import sys
import threading
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import compute_fid_stats
from tests.conftest import GOLDEN, ROOT, Program, run_program, xla_flags
from tests.test_batches import numbered
from tests.test_compatibility import unpack
from utils.base import hosts, messages
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.flags import program
from utils.images.pixels import ImageBatch
from utils.metrics import measure

together = pytest.mark.xdist_group("hosts")  # pairs of processes, one pair at a time


class Store:
    """The keys and values of JAX's service, in this process."""

    def __init__(self):
        self.values = {}
        self.barriers = []

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def blocking_key_value_get(self, key, timeout):
        return self.values[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(f"{prefix}/")]

    def wait_at_barrier(self, name, timeout):
        self.barriers.append(name)


@pytest.fixture
def two(monkeypatch):
    """two(number) makes this process that one of two, which share a store of keys and values."""
    store = Store()
    monkeypatch.setattr(hosts, "_store", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def be(number):
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(hosts, "_calls", iter(range(100)))
        return store

    return be


def test_the_first_process_decides(two):
    two(0)
    values = [3, "text", {"fid": 1.25, "found": None}, [True, float("inf")]]
    assert [hosts.broadcast(value) for value in values] == values
    store = two(1)
    assert [hosts.broadcast("not asked") for _ in values] == values
    hosts.barrier()
    assert store.barriers == [f"barrier/{len(values)}"]


def test_missing_files_are_dealt_out_in_turn(two, tmp_path):
    names = [f"{number}.bin" for number in range(7)]
    for number in (0, 3):
        (tmp_path / names[number]).touch()
    two(0)
    own = hosts.share_files(tmp_path, names)
    two(1)
    (tmp_path / names[1]).touch()  # already finished by process 0, which alone has looked
    assert own == {"1.bin", "4.bin", "6.bin"}
    assert hosts.share_files(tmp_path, names) == {"2.bin", "5.bin"}


def test_a_silent_process_and_one_that_says_so_have_gone(two, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store = two(0)
    watch = hosts.Watch()
    for sign in ("0", "1", "1"):
        store.values["alive/1"] = sign
        now[0] += hosts.PATIENCE
        assert watch.find_lost() is None
    now[0] += 0.1
    assert watch.find_lost() == "process 1 has gone"
    two(1)
    late = hosts.Watch()
    assert late.find_lost() is None  # process 0 alone watches
    store.values["lost/0"] = "process 0 has ended"
    assert late.find_lost() == watch.find_lost() == "process 0 has ended"


def test_the_watch_ends_its_process_with_one_line(two, monkeypatch, capsys):
    class Left(BaseException):
        pass

    def leave(status):
        ended.append(status)
        raise Left

    ended = []
    monkeypatch.setattr(hosts.os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    store = two(1)
    store.values["lost/0"] = "process 0 has ended"
    monkeypatch.setattr(hosts, "_watch", None)
    monkeypatch.setattr(hosts, "_last_word", threading.Lock())
    hosts.start_watch()
    hosts._watch.thread.join(10)
    assert ended == [1]
    assert capsys.readouterr().err.startswith(
        "error: process 0 has ended, and process 1 of 2 cannot finish without it;"
    )


def test_all_processes_have_the_same_flags(two):
    flags = {"coordinator_address": "localhost:1", "process_id": 0, "metrics": ["fid"], "seed": 0}
    two(0)
    program.check_same_flags(ConfigDict(flags))
    two(1)
    program.check_same_flags(ConfigDict({**flags, "coordinator_address": "host:1", "process_id": 1}))
    two(1)
    with pytest.raises(UserError, match="--seed=1, but process 0 has 0; give all processes the same command"):
        program.check_same_flags(ConfigDict({**flags, "seed": 1}))


def test_what_libraries_print_is_not_among_results(two, monkeypatch, capfd):
    monkeypatch.setattr(program, "initialize_processes", lambda *_: None)
    monkeypatch.setattr(program, "raise_on_signals", lambda: None)
    monkeypatch.setattr(hosts, "start_watch", lambda: None)
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    before = os.dup(1)
    try:
        store = two(0)
        config = {"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 0}
        program.join_processes(ConfigDict(config))
        assert store.values == {"value/0": '{"num_processes": "2"}'}  # flags for the others to compare
        os.write(1, b"[Gloo] Rank 0 is connected\n")
        messages.show_result("[]")
        assert capfd.readouterr() == ("[]\n", "[Gloo] Rank 0 is connected\n")
    finally:
        os.dup2(before, 1)


@pytest.mark.parametrize("count", [20, 13, 7])
def test_the_shares_of_two_processes_are_the_rows_of_one(two, monkeypatch, count):
    """All of the data set, some of it at random, and fewer than two batches, of which one process has no row."""
    dataset, mesh = numbered(20), make_mesh()
    monkeypatch.setattr(measure, "shard_batch", lambda rows, mesh: rows)

    def read():
        labels = np.zeros(dataset.num_classes, np.int64)
        images = compute_fid_stats.count_labels(compute_fid_stats.choose_examples(dataset, 6, count), labels)
        return list(measure.shard_shares(images, 6, count, mesh)), labels

    two(0)
    first, some = read()
    two(1)
    second, others = read()
    monkeypatch.undo()
    whole, labels = read()
    assert all(batch.places is None for batch in whole)
    for one, *parts in zip(whole, first, second, strict=True):
        images, places = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "places"))
        assert {len(part.images) for part in parts} == {3}
        batch = ImageBatch(images, None, parts[0].count, places=places)
        np.testing.assert_array_equal(batch.rows(images), one.rows(one.images))
    np.testing.assert_array_equal(some + others, labels)
    assert labels.sum() == count


# --- Two processes on this host ---


def start_two(*args, devices: int = 1) -> list[Program]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    words = [*map(str, args), "--coordinator_address", address, "--num_processes", "2", "--process_id"]
    return [Program([*words, str(number)], {"XLA_FLAGS": xla_flags(devices)}) for number in range(2)]


def without_gloo(output: str) -> str:
    """Returns the output without what the library of CPU collectives says of its connections."""
    return "".join(line for line in output.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def run_two(*args, devices: int = 1) -> list[str]:
    """Runs a program on two processes to its end, and returns what each has printed."""
    processes = start_two(*args, devices=devices)
    outputs = [without_gloo(process.communicate(timeout=240)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    return outputs


def end_one(processes: list[Program], number: int, signal_number: int, is_started) -> str:
    """Sends a process a signal once `is_started()`; returns the one line with which the other ends within a minute."""
    deadline = time.monotonic() + 120
    while not is_started():
        assert time.monotonic() < deadline
        assert [process.poll() for process in processes] == [None, None], processes[0].outputs()[0][-3000:]
        time.sleep(0.005)
    processes[number].send_signal(signal_number)
    other = processes[1 - number]
    output = other.communicate(timeout=60)[0]
    assert other.returncode == 1, output[-3000:]
    status = -signal_number if signal_number == signal.SIGKILL else 128 + signal_number
    assert processes[number].wait() == status, processes[number].outputs()[0][-3000:]
    assert "Traceback" not in output, output[-3000:]
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return error


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits of 8x8, with ten classes."""
    return unpack("run", tmp_path_factory.mktemp("golden")) / "run"


def read_files(folder) -> dict[str, bytes]:
    paths = (*folder.glob("*.array_record"), *folder.glob("*.json"))
    return {path.name: path.read_bytes() for path in paths}


def read_images(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(int)


@pytest.mark.slow
@together
def test_two_processes_draw_the_samples_of_one(run, tmp_path):
    command = ["sample.py", "--load_dir", run, "--num_samples", 10, "--batch_size", 4, "--denoise_timesteps", 3]
    command += ["--cfg_scale", 2, "--film"]
    run_program(*command, "--out", tmp_path / "one", "--save_samples", tmp_path / "one" / "samples")
    first, second = run_two(*command, "--out", tmp_path / "two", "--save_samples", tmp_path / "two" / "samples")
    assert second == ""  # process 0 speaks for both
    one, two = (read_images(tmp_path / name / "samples") for name in ("one", "two"))
    assert one.shape == (10, 8, 8)
    assert np.abs(one - two).max() <= 1
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names == [["film.webp", "grid.png", "samples", "strip.png"]] * 2
    assert all(str(tmp_path / "two" / name) in first for name in names[1])


@pytest.mark.slow
@together
def test_two_processes_make_the_pairs_of_one_and_one_alone_ends(run, tmp_path):
    command = ["make_pairs.py", "--load_dir", run, "--num_pairs", 100, "--shard_size", 9, "--batch_size", 8]
    command += ["--denoise_timesteps", 3, "--out"]
    run_program(*command, tmp_path / "one")
    outputs = run_two(*command, tmp_path / "two")
    assert "--dataset_name pairs:" in outputs[0]
    assert outputs[1] == ""
    expected = read_files(tmp_path / "one")
    assert len(expected) == 13  # twelve and the manifest
    assert read_files(tmp_path / "two") == expected


@pytest.mark.slow
@together
def test_two_processes_encode_the_bytes_of_one_whichever_is_killed(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    (tmp_path / "images").mkdir()
    for number in range(40):
        image.rotate(number).save(tmp_path / "images" / f"{number:02d}.png")
    command = ["encode_latents.py", "--dataset_name", f"folder:{tmp_path / 'images'}", "--vae", GOLDEN / "vae_tiny"]
    command += ["--batch_size", 2, "--shard_size", 2, "--out"]
    run_program(*command, tmp_path / "one")
    expected = read_files(tmp_path / "one")
    assert len(expected) > 20

    # One is killed: the other says so, and the same commands finish.
    out = tmp_path / "two"

    def is_started():
        return len(list(out.glob("*.array_record"))) > 2

    error = end_one(start_two(*command, out), 1, signal.SIGKILL, is_started)
    assert "process 1 has gone, and process 0 of 2 cannot finish without it; give the commands of all again" in error
    finished = {name for name in read_files(out) if name.endswith(".array_record")}
    assert 0 < len(finished) < len(expected) - 2

    # Process 0 is asked to end: it tells the other before it takes the store of keys with it.
    count = len(finished)
    error = end_one(start_two(*command, out), 0, signal.SIGTERM, lambda: len(list(out.glob("*.array_record"))) > count)
    assert error.startswith("error: process 0 has ended, and process 1 of 2 cannot finish without it")
    run_two(*command, out)
    assert read_files(out) == expected


@pytest.mark.slow
@together
def test_two_processes_measure_the_statistics_of_one(tmp_path, weights):
    command = ["compute_fid_stats.py", "--dataset_name", "digits", "--metrics", "fid,moments", "--num_images", 21]
    command += ["--batch_size", 8, "--inception_weights", weights, "--out"]
    run_program(*command, tmp_path / "one.npz")
    outputs = run_two(*command, tmp_path / "two.npz")
    assert outputs[1] == ""
    one, two = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max())
        else:
            np.testing.assert_array_equal(two[name], value)


@pytest.mark.slow
@together
def test_two_processes_score_as_one_and_find_what_is_finished(run, tmp_path, weights):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "train.npz", arr_0=images)
    command = ["eval_fid.py", "--load_dir", run, "--num_samples", 20, "--batch_size", 8, "--denoise_timesteps", "2,3"]
    command += ["--memorisation", "--train_images", tmp_path / "train.npz", "--memorisation_features", "inception"]
    command += ["--fid_stats", ROOT / "data" / "fid_stats_digits.npz", "--inception_weights", weights]
    command += ["--wandb.mode", "disabled", "--cfg_scale", 2, "--out"]
    run_program(*command, tmp_path / "one")

    # One is killed after the first row, which is found again.
    out = tmp_path / "two"
    error = end_one(start_two(*command, out), 1, signal.SIGKILL, lambda: (out / "fid.json").exists())
    assert "process" in error
    before = json.loads((out / "fid.json").read_text())["cells"]
    assert len(before) == 1
    outputs = run_two(*command, out)
    assert outputs[1] == ""
    rows = {name: json.loads((tmp_path / name / "fid.json").read_text())["cells"] for name in ("one", "two")}
    assert rows["two"][0] == before[0]
    for one, two in zip(*rows.values(), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            rel = 1e-4 if name == "fid" else 1e-3
            assert two[name] == (pytest.approx(value, rel=rel) if isinstance(value, float) else value), name
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "one").iterdir())
