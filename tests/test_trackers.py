"""A tracker is one class and one line: toys are registered, and told what is logged, whatever another one does.

tests/test_extension_points.py has them in a training."""

import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import train_flow
from utils.base.messages import UserError
from utils.base.processes import Interrupted
from utils.trackers.trackers import PACKAGES, TRACKERS, Trackers, choose_trackers, read_curves, read_metrics


class Toy:
    """Keeps what it is told."""

    def __init__(self, run):
        self.run = run
        self.numbers = []
        self.images = []
        self.num_closed = 0

    def log(self, step, numbers):
        self.numbers.append((step, numbers))

    def image(self, step, name, file):
        self.images.append((step, name, file))

    def close(self):
        self.num_closed += 1


class Broken(Toy):
    """Fails from the second call of a method on."""

    def __init__(self, run, method="log", error=None):
        super().__init__(run)
        self.calls = []
        self.method = method
        self.error = error or OSError("the line is\ndead")

    def _call(self, method):
        self.calls.append(method)
        if method == self.method and (method == "close" or self.calls.count(method) > 1):
            raise self.error

    def log(self, step, numbers):
        self._call("log")

    def image(self, step, name, file):
        self._call("image")

    def close(self):
        self._call("close")


@pytest.fixture
def started(monkeypatch) -> list:
    """The toys that have been started, in their order; --trackers knows `toy` and `broken`."""
    trackers = []

    def register(name, kind):
        monkeypatch.setitem(TRACKERS, name, lambda run: trackers.append(kind(run)) or trackers[-1])

    register("toy", Toy)
    register("broken", Broken)
    return trackers


def settings(*names: str) -> dict:
    return {"trackers": list(names), "wandb": {"mode": "disabled"}}


@pytest.mark.parametrize("method", ["start", "log", "image", "close"])
def test_what_fails_is_named_once_and_left_out(tmp_path, monkeypatch, capsys, method):
    broken = Broken(None, method)

    def start(run):
        if method == "start":
            raise RuntimeError("no room")
        return broken

    toy = Toy(None)
    monkeypatch.setitem(TRACKERS, "broken", start)
    monkeypatch.setitem(TRACKERS, "toy", lambda run: toy)
    trackers = Trackers(tmp_path, settings("broken", "toy"), 0)
    for step in (1, 2, 3):
        trackers.log(step, {"loss": np.float32(step)})
        trackers.log_figure(step, "sample", Figure())
    trackers.close()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(
        "broken: no room; nothing is" if method == "start" else "broken: the line is dead; nothing"
    )
    assert broken.calls.count(method) == {"start": 0, "close": 1}.get(method, 2)
    assert len(toy.numbers) == len(toy.images) == len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert toy.num_closed == 1


def test_a_signal_is_no_fault_of_a_tracker(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "broken", lambda run: Broken(run, error=Interrupted()))
    trackers = Trackers(tmp_path, settings("broken"), 0)
    trackers.log(1, {"loss": 1})
    with pytest.raises(Interrupted):
        trackers.log(2, {"loss": 2})


def test_processes_beside_the_first_are_silent(tmp_path, started, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    trackers = Trackers(tmp_path / "run", settings("toy"), 0)
    trackers.log(1, {"loss": 1})
    trackers.log_figure(1, "sample", Figure())
    trackers.close()
    assert (started, (tmp_path / "run").exists()) == ([], False)


def test_lines_say_when_they_were_written_and_how_long_the_run_has_been_running(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "time": 5.5, "seconds": 1000.0, "loss": 2}\n'
        '{"step": 3, "time": 6.5, "seconds": 2000.0, "loss": 1}\n'
    )
    trackers = Trackers(tmp_path, settings(), 2)
    trackers.log(3, {"loss": 4})
    trackers.close()
    *older, line = read_metrics(tmp_path / "metrics.jsonl")
    assert older == [{"step": 1, "loss": 3}, {"step": 2, "time": 5.5, "seconds": 1000.0, "loss": 2}]
    assert 1000 <= line["seconds"] < 1100
    assert abs(line["time"] - time.time()) < 100
    # The most bytes that this process has held, of which the system has 1,024 a unit.
    assert line["memory"] == pytest.approx(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, rel=0.05)
    assert read_curves(tmp_path, "runs") == {"loss": {1: 3, 2: 2, 3: 4}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--trackers mlflow", r"--trackers=mlflow: mlflow is unknown; known are wandb, tensorboard\. Register it"),
        ("--trackers wandb,", r"--trackers=wandb,: an empty name is unknown"),
        ("--trackers lacking", r"--trackers=lacking needs another package \(none_such\): `pip install none_such`"),
        ("--trackers= --wandb.group x", r"--wandb.group=x has no effect without wandb among --trackers"),
        ("--trackers= --save_dir a --wandb.name x", r"--wandb.name=x has no effect without wandb among --trackers"),
    ],
)
def test_names_and_flags_without_effect_are_refused(read_flags, monkeypatch, words, message):
    monkeypatch.setitem(PACKAGES, "lacking", "none_such")
    if "lacking" in words:
        monkeypatch.setitem(TRACKERS, "lacking", Toy)
    with pytest.raises(UserError, match=message):
        read_flags(train_flow, words.split())


def test_which_trackers_a_command_line_chooses(read_flags):
    def choose(words):
        return choose_trackers(read_flags(train_flow, words.split()).to_dict())

    assert choose("--wandb.mode online") == ["wandb"]
    assert choose("--wandb.mode disabled") == choose("--trackers= --wandb.name a_folder") == []


def test_event_files_are_what_tensorboard_reads(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    for first_step in (0, 1):
        trackers = Trackers(tmp_path, settings("tensorboard"), first_step)
        trackers.log(first_step + 1, {"training/l2_loss": 1.5 + first_step})
        trackers.log_figure(first_step + 1, "sample_N/4", Figure())
        trackers.close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    events = [event for file in files for event in read_events(file)]
    assert [event.step for event in events if event.HasField("session_log")] == [1, 2]
    values = [(event.step, value) for event in events for value in event.summary.value]
    scalars = [(step, value.tag, value.simple_value) for step, value in values if not value.HasField("image")]
    assert scalars == [(1, "training/l2_loss", 1.5), (2, "training/l2_loss", 2.5)]
    images = [(step, value) for step, value in values if value.HasField("image")]
    assert [(step, value.tag) for step, value in images] == [(1, "sample_N/4"), (2, "sample_N/4")]
    png = tmp_path / "images" / "sample_N_4" / "00000001.png"
    assert images[0][1].image.encoded_image_string == png.read_bytes()


def read_events(file: Path):
    """The events of a file of records: the length and its checksum, the record and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
