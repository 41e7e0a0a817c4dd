"""Where a run's numbers and images go: into its folder always, and to the trackers that --trackers names.

A tracker is a sink with `log`, `image` and `close`. To add one, write a class and register it in TRACKERS;
docs/change_this.md shows how. Functions that read a run's metrics are at the end of this file.
"""

import importlib.util
import json
import math
import os
import re
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, SupportsFloat

import jax

from utils.base.devices import peak_memory
from utils.base.effects import Rule, check_effects
from utils.base.files import atomic_write, open_regular, read_bytes, write_text
from utils.base.messages import UserError, WriteError, one_line, warn, warn_once, with_urls
from utils.base.processes import Interrupted
from utils.base.settings import unknown_name
from utils.trackers.wandb_tracker import WandbTracker

# Files in a run's folder, and of those that programs write, the ones that trackers can show.
METRICS_FILE = "metrics.jsonl"
IMAGE_SUFFIXES = (".png", ".webp", ".gif")
# Beside the metrics, a line has its step, the time (UTC, in seconds since 1970), the seconds for which the run has been
# running, all of its starts together, and the most bytes that this start has held (utils/base/devices.py peak_memory).
# Lines of older runs have the step alone.
NOT_METRICS = ("step", "time", "seconds", "memory")
MAX_LINE_BYTES = 2**20  # a longer one is damaged
MAX_DRAWN = 1e300  # larger values overflow where an axis is scaled


class Tracker(Protocol):
    """A sink for the numbers and images of one run.

    Whatever it raises ends no run: it is reported in one line, and the tracker is left out from then on. It may also
    have `table(name, rows)`, which evaluations call with all of their results.
    """

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes the metrics of a step. A step may come twice: with its losses, then with its evaluation."""
        ...

    def image(self, step: int, name: str, file: Path) -> None:
        """Takes a picture: a file *.png, *.webp or *.gif, which stays where it is."""
        ...

    def close(self) -> None:
        """Ends; called once, after the last step."""
        ...


class TrackedRun(NamedTuple):
    """The facts that a tracker gets about its run when the run starts or is resumed."""

    folder: Path
    settings: Mapping[str, Any]  # all flags, those of --wandb.* in a group `wandb`, and what is known of the data
    first_step: int  # from which it goes on; later ones of an earlier start are going to be run again
    lines: Sequence[Mapping[str, Any]]  # of metrics.jsonl, up to there
    axis: str | None  # a metric against which the others are to be shown, instead of the step


class MetricsFile:
    """RUN/metrics.jsonl, a line for each call of `log`. While the disk is full, lines wait in memory."""

    def __init__(self, folder: Path, first_step: int):
        """Opens the file to append, without the lines after `first_step`: those steps are about to be run again.

        Raises UserError where it cannot be read, WriteError where it cannot be written.
        """
        # Lines of an earlier start, rewritten only if some of them go.
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        self.kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        text = "".join(json.dumps(line) + "\n" for line in self.kept)
        if not path.exists() or read_bytes(path) != text.encode():
            write_text(path, text)

        # Unbuffered: what `write` has taken is in the file.
        self.file = path.open("ab", buffering=0)
        self.unwritten = b""
        self.has_warned = False
        self.started = time.monotonic() - last_seconds(self.kept)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        # Wall-clock time, which may jump, for people; seconds of training for curves.
        facts = {"time": round(time.time(), 3), "seconds": round(time.monotonic() - self.started, 3)}
        facts["memory"] = peak_memory()
        self.unwritten += json.dumps({"step": step, **facts, **numbers}).encode() + b"\n"
        try:
            # A full disk takes a part of a line; the rest waits.
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.has_warned = False
        except OSError as error:
            if not self.has_warned:
                warn(f"{self.file.name} cannot be written ({error.strerror}); its lines wait until it can")
            self.has_warned = True

    def image(self, step: int, name: str, file: Path) -> None:
        """Leaves the file, which is in the run's folder already."""

    def close(self) -> None:
        if self.unwritten:
            warn(f"lost, as {self.file.name} cannot be written: {self.unwritten.decode()}")
        self.file.close()


class TensorBoardTracker:
    """Writes event files for TensorBoard to RUN/tensorboard.

    They are written at once, not by tensorboardX's SummaryWriter: on a full disk its thread dies, and the next call to
    it blocks forever.
    """

    def __init__(self, run: TrackedRun):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        # Protocol buffers make their classes at run time, unseen by type checkers.
        self.messages: Any = event_pb2
        summaries: Any = summary_pb2
        self.summaries = summaries.Summary
        folder = run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # tensorboardX names files after the second; two starts within one would share a file.
        self.writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{run.first_step}")
        # TensorBoard drops what an earlier start has logged from this step on.
        session = self.messages.SessionLog(status=self.messages.SessionLog.START)
        self._write(run.first_step + 1, session_log=session)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [self.summaries.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step, summary=self.summaries(value=values))

    def image(self, step: int, name: str, file: Path) -> None:
        content = read_bytes(file)
        width, height = struct.unpack(">II", content[16:24])  # a PNG's first chunk begins with them
        image = self.summaries.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        self._write(step, summary=self.summaries(value=[self.summaries.Value(tag=name, image=image)]))

    def close(self) -> None:
        self.writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self.writer.write_event(self.messages.Event(step=step, wall_time=time.time(), **content))
        self.writer.flush()


def _start_wandb_tracker(run: TrackedRun) -> WandbTracker:
    steps = [(line["step"], metrics_of(line)) for line in run.lines]
    return WandbTracker(run.folder, run.settings, steps, run.axis)


# {name in --trackers: what starts it}
TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": _start_wandb_tracker,
    "tensorboard": TensorBoardTracker,
}
# Packages that a tracker needs beside those of this project.
PACKAGES = {"tensorboard": "tensorboardX"}


def _has_no_wandb(values: Any) -> bool:
    return "wandb" not in values.trackers


# Settings of wandb without effect; `disabled` only says once more what --trackers says.
_NO_WANDB = "without wandb among --trackers"
RULES = (
    Rule(tuple(f"wandb.{name}" for name in ("project", "entity", "group", "notes", "tags")), _NO_WANDB, _has_no_wandb),
    Rule(("wandb.mode", "wandb.offline"), _NO_WANDB, lambda v: _has_no_wandb(v) and v.wandb["mode"] != "disabled"),
    # A training's folder is named after it, unless --save_dir names that.
    Rule(("wandb.name",), _NO_WANDB, lambda v: _has_no_wandb(v) and bool(getattr(v, "save_dir", True))),
)


def check_trackers(settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises UserError for a name in --trackers that TRACKERS does not have, or whose package is not installed, and for
    a setting of wandb among `given`, {name: value}, that has no effect."""
    names = settings["trackers"]
    text = f"--trackers={','.join(names)}"
    for name in names:
        if name not in TRACKERS:
            raise unknown_name(f"{text}: {name or 'an empty name'}", name, TRACKERS)
        package = PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"{text} needs another package ({package}): `pip install {package}`, or leave {name} out")
    check_effects(RULES, settings, given)


def choose_trackers(settings: Mapping[str, Any]) -> list[str]:
    """Returns the names of --trackers, each once; without wandb where --wandb.mode is disabled."""
    is_disabled = settings["wandb"]["mode"] == "disabled"
    return [name for name in dict.fromkeys(settings["trackers"]) if not (name == "wandb" and is_disabled)]


class Trackers:
    """All sinks of a run: its folder, and the trackers of its settings. Silent on every process but the first."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], first_step: int, axis: str | None = None):
        """See TrackedRun. Raises UserError where RUN/metrics.jsonl cannot be read, WriteError where it cannot be
        written."""
        self.folder = Path(folder)
        self.trackers: dict[str, Tracker] = {}
        if jax.process_index() > 0:
            return
        # The folder first: without it, a run keeps nothing.
        file = MetricsFile(self.folder, first_step)
        self.trackers[METRICS_FILE] = file

        # The others may fail: a training does not end because a service cannot be reached.
        run = TrackedRun(self.folder, settings, first_step, file.kept, axis)
        for name in choose_trackers(settings):
            try:
                self.trackers[name] = TRACKERS[name](run)
            except Interrupted:
                raise
            except Exception as error:
                warn(f"{name}: {one_line(error)}; nothing is logged there, and {self.folder} has everything")

    def log(self, step: int, numbers: Mapping[str, SupportsFloat]) -> None:
        """Logs metrics of a step."""
        values = {name: float(value) for name, value in numbers.items()} if self.trackers else {}
        self._tell_all(lambda tracker: tracker.log(step, values))

    def log_figure(self, step: int, name: str, figure: Any) -> None:
        """Writes a matplotlib Figure as RUN/images/NAME/STEP.png, and logs that file under `name`. One that cannot be
        written is left out."""
        if not self.trackers:
            return
        path = self.folder / "images" / re.sub(r"[^\w.-]", "_", name) / f"{step:08d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                figure.savefig(temporary, format="png")
        except (OSError, WriteError) as error:
            warn(f"{path} cannot be written ({error.strerror}) and is left out")
            return
        self._tell_all(lambda tracker: tracker.image(step, name, path))

    def log_image_files(self, step: int, paths: Iterable[Path]) -> None:
        """Logs those of the files that are images, each under its name without the suffix."""
        for path in paths:
            if path.suffix in IMAGE_SUFFIXES:
                self._tell_all(lambda tracker, path=path: tracker.image(step, path.stem, path))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs a table where a tracker takes one."""
        self._tell_all(lambda tracker: tracker.table(name, rows) if hasattr(tracker, "table") else None)

    def close(self) -> None:
        self._tell_all(lambda tracker: tracker.close())
        self.trackers = {}

    def _tell_all(self, act: Callable[[Any], None]) -> None:
        """Calls `act` with every tracker; leaves out one that fails."""
        for name, tracker in list(self.trackers.items()):
            try:
                act(tracker)
            except Interrupted:  # a signal's, which ends an evaluation
                raise
            except Exception as error:
                del self.trackers[name]
                warn(f"{name}: {one_line(error)}; nothing more is logged there, and {self.folder} has everything")


# --- Readers of a run's folder ---


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, oldest first, without those that a kill or a power cut has damaged.

    Each has its `step`, values by the names of metrics and, but for older runs, what else NOT_METRICS names.
    Raises UserError where it cannot be read, as of a named pipe.
    """
    # Line by line: what a kill has cut short is passed over, whatever it is, and the rest is used.
    lines = []
    num_damaged = 0
    try:
        with open_regular(path) as file:
            while text := file.readline(MAX_LINE_BYTES):
                line = _parse_line(text)
                if line is not None:
                    lines.append(line)
                elif text.strip() and (text.endswith(b"\n") or len(text) == MAX_LINE_BYTES):  # else cut by a kill
                    num_damaged += 1
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); move it away, or mend it") from None
    if num_damaged:
        warn_once(f"{path}: left out {num_damaged} damaged line{'s' * (num_damaged > 1)}")
    return lines


def read_log(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's folder, or of a metrics.jsonl, as `read_metrics` does."""
    return read_metrics(run / METRICS_FILE if run.is_dir() else run)


def _parse_line(text: bytes) -> dict[str, Any] | None:
    """Returns a line that MetricsFile may have written, a step and values by name; None for anything else."""
    try:
        line = json.loads(text)
        numbers = [float(value) for value in line.values() if value is not None and not isinstance(value, str)]
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):  # also for bytes that are no UTF-8
        return None
    return line if numbers and type(line.get("step")) is int and abs(line["step"]) < 2**63 else None


def metrics_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metrics of a line of `read_metrics`: all but its step and its times."""
    return {name: value for name, value in line.items() if name not in NOT_METRICS}


def last_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Returns the seconds for which a run had been running at the last of these lines; 0 if none records it."""
    known: list[Any] = [line.get("seconds") for line in lines]
    return max((float(each) for each in known if type(each) in (int, float) and 0 <= each < MAX_DRAWN), default=0.0)


def read_curves(run: Path, flag: str) -> dict[str, dict[int, float]]:
    """Returns {metric: {step: value}} of a run's folder or of a metrics.jsonl, steps ascending.

    Values too large for an axis become NaN. Raises UserError, naming --`flag` and other runs nearby, if there are no
    metrics.
    """
    try:
        lines = read_log(run)
    except UserError as error:
        raise UserError(f"--{flag}={run}: {error}") from None
    # A step that was logged twice, by its losses and by its evaluation, has the values of both lines.
    curves: dict[str, dict[int, float]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        for name, value in metrics_of(line).items():
            if type(value) in (int, float):
                curves.setdefault(name, {})[line["step"]] = value if abs(value) < MAX_DRAWN else math.nan
    # Nothing: the folder above or below may be the one that was meant.
    if not curves:
        bases = (run, run.parent) if run.is_dir() else (run.parent,)
        files = (file for base in bases for file in base.glob(f"*/{METRICS_FILE}") if file.is_file())
        others = sorted(str(file.parent) for file in files if run not in (file, file.parent))
        found = f"there are {', '.join(others)}" if others else f"{run.parent} has none"
        raise UserError(
            f"--{flag}={run} {'holds no metrics' if run.exists() else 'is not there'}; "
            f"give the folder of a run, or a {METRICS_FILE}: {found}"
        )
    return curves


def name_runs(runs: Sequence[Path]) -> list[str]:
    """Returns what to call each run: the name of its folder or file, or its path as given where two names are equal."""
    # The absolute path, so that `.` and `..` have a name too.
    names = []
    for run in runs:
        path = Path(with_urls(os.path.abspath(run)))
        names.append(path.parent.name if path.name == METRICS_FILE else path.name.removesuffix(".jsonl"))
    return [with_urls(str(run)) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
