"""Where a run's numbers and images go: always RUN/metrics.jsonl and RUN/images/, and wandb unless it is disabled.

Silent on every process but the first.
"""

import contextlib
import errno
import json
import logging
import math
import netrc
import os
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsFloat
from urllib.parse import urlparse

import jax
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from utils.base.console import log, warn
from utils.base.errors import UserError, WriteError
from utils.base.files import atomic_write, open_regular, read_bytes, set_aside, write_text

MAX_LINE_BYTES = 2**20
MAX_DRAWN = 1e300

PROBE_SECONDS = 5  # for an answer of wandb's server
INIT_SECONDS = 30  # for starting a run there
FINISH_SECONDS = 60  # for uploading the rest at the end


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, oldest first; what a kill or a power cut has damaged is left out.

    UserError where it cannot be read, as of a named pipe.
    """
    lines, damaged = [], 0
    try:
        with open_regular(path) as file:
            while text := file.readline(MAX_LINE_BYTES):
                line = _parse_line(text)
                if line is not None:
                    lines.append(line)
                elif text.strip() and (text.endswith(b"\n") or len(text) == MAX_LINE_BYTES):  # else cut by a kill
                    damaged += 1
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); move it away, or mend it") from None
    if damaged:
        warn(f"{path}: left out {damaged} damaged line{'s' * (damaged > 1)}")
    return lines


def _parse_line(text: bytes) -> dict[str, Any] | None:
    """A line that a Tracker may have written, a step and values by name; None for anything else."""
    try:
        line = json.loads(text)
        numbers = [float(value) for value in line.values() if value is not None and not isinstance(value, str)]
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):  # also for bytes that are no UTF-8
        return None
    return line if numbers and type(line.get("step")) is int and abs(line["step"]) < 2**63 else None


def read_curves(run: Path, flag: str) -> dict[str, dict[int, float]]:
    """{metric: {step: value}} of a run's folder or of a metrics.jsonl, steps ascending.

    UserError, naming --`flag` and the runs beside it, if there are no metrics. What no axis has room for is NaN.
    """
    curves: dict[str, dict[int, float]] = {}
    try:
        lines = read_metrics(run / "metrics.jsonl" if run.is_dir() else run)
    except UserError as error:
        raise UserError(f"--{flag}={run}: {error}") from None
    for line in sorted(lines, key=lambda line: line["step"]):
        for name, value in line.items():
            if name != "step" and type(value) in (int, float):
                curves.setdefault(name, {})[line["step"]] = value if abs(value) < MAX_DRAWN else math.nan
    if not curves:
        bases = (run, run.parent) if run.is_dir() else (run.parent,)
        others = sorted(str(file.parent) for base in bases for file in base.glob("*/metrics.jsonl") if file != run)
        there = f"there are {', '.join(others)}" if others else f"{run.parent} has none"
        raise UserError(
            f"--{flag}={run} {'holds no metrics' if run.exists() else 'is not there'}; "
            f"give the folder of a run, or a metrics.jsonl: {there}"
        )
    return curves


def name_runs(runs: Sequence[Path]) -> list[str]:
    """What to call each run: the name of its folder or file, or all of its path where two names are the same."""
    names = []
    for run in runs:
        whole = Path(os.path.abspath(run))
        names.append(whole.parent.name if whole.name == "metrics.jsonl" else whole.name.removesuffix(".jsonl"))
    return [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


class Tracker:
    """Logs scalars and figures of one run by step. `first_step` is where this process starts: later lines of an
    earlier, killed process are dropped, because their steps are about to be run again. While the disk is full, lines
    wait in memory and images are left out; the run goes on.

    `metadata` goes into wandb's configuration beside `config`. `axis` names a metric against which wandb shows the
    others, instead of the step."""

    def __init__(
        self,
        run_dir: Path,
        config: ConfigDict,
        first_step: int,
        metadata: Mapping[str, Any] | None = None,
        axis: str | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.wandb_run: Any = None
        self.enabled = jax.process_index() == 0
        if not self.enabled:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if not path.exists() or read_bytes(path) != text.encode():
            write_text(path, text)
        self.file, self.unwritten, self.has_warned = path.open("ab", buffering=0), b"", False
        if config.wandb.mode != "disabled":
            self.wandb_run = start_wandb(self.run_dir, config, metadata or {})
        if self.wandb_run and axis:
            self.wandb_run.define_metric("*", step_metric=axis)
        if self.wandb_run and self.wandb_run.offline:  # a folder of its own for each start: the newest has all steps
            for line in kept:
                self._send({name: value for name, value in line.items() if name != "step"}, int(line["step"]))

    def log(self, metrics: Mapping[str, SupportsFloat], step: int) -> None:
        if not self.enabled:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self.unwritten += json.dumps({"step": step, **values}).encode() + b"\n"
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.has_warned = False
        except OSError as error:
            if not self.has_warned:
                warn(f"{self.file.name} cannot be written ({error.strerror}); its lines wait until it can")
            self.has_warned = True
        self._send(values, step)

    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        """Writes RUN/images/NAME/STEP.png and logs the same file to wandb under `name`."""
        if not self.enabled:
            return
        path = self.run_dir / "images" / re.sub(r"[^\w.-]", "_", name) / f"{step:08d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                figure.savefig(temporary, format="png")
        except (OSError, WriteError) as error:
            warn(f"{path} cannot be written ({error.strerror}) and is left out")
            return
        if self.wandb_run:
            import wandb

            self._send({name: wandb.Image(str(path))}, step)

    def log_image_files(self, paths: Sequence[Path]) -> None:
        """Image files on wandb, each under the name of its file."""
        if self.wandb_run:
            import wandb

            suffixes = (".png", ".webp", ".gif")
            images = {path.stem: wandb.Image(str(path)) for path in paths if path.suffix in suffixes}
            self._send(images)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table on wandb; empty where a row has no such column."""
        if self.wandb_run:
            import wandb

            columns: list[str | int] = list(dict.fromkeys(column for row in rows for column in row))
            data = [[row.get(str(column)) for column in columns] for row in rows]
            self._send({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def _send(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Logs to wandb, if that is on. What goes wrong there ends no run: local files have everything."""
        if not self.wandb_run:
            return
        try:
            self.wandb_run.log(values, step=step)
        except Exception as error:  # of its own process, which may be gone
            self._end_wandb(error, f"nothing more is logged there, and {self.run_dir} has everything")

    def close(self) -> None:
        if self.enabled:
            if self.unwritten:
                warn(f"lost, as {self.file.name} cannot be written: {self.unwritten.decode()}")
            self.file.close()
        if self.wandb_run:
            folder, is_offline = Path(self.wandb_run.dir).parent, self.wandb_run.offline
            try:
                self.wandb_run.finish()
            except Exception as error:  # where the network has gone, or its own process
                self._end_wandb(error, f"upload what is missing with `wandb sync {folder}`")
                return
            if is_offline:
                log(f"wandb: offline; upload with `wandb sync {folder}` (the newest folder there has all steps)")

    def _end_wandb(self, error: Exception, advice: str) -> None:
        """Goes on without wandb; a process of its own that has gone would be asked once more when Python ends."""
        import wandb

        warn(f"wandb: {one_line(error)}; {advice}")
        self.wandb_run = None
        with contextlib.suppress(Exception):
            wandb.teardown()


def start_wandb(run_dir: Path, config: ConfigDict, metadata: Mapping[str, Any]) -> Any:
    """The wandb run; offline, saying so in one line, where --wandb.mode is online but no account is set up, the server
    does not answer, or it refuses. None where it cannot start at all."""
    import wandb  # takes seconds, and nothing may touch it when it is disabled

    logging.raiseExceptions = False  # wandb's own log on a full disk would fill the screen with tracebacks
    options = config.wandb.to_dict()
    mode = options.pop("mode")
    options["name"] = options.pop("display_name", options["name"])
    settings: dict[str, Any] = {"silent": True, "console": "off"}
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings["init_timeout"] = INIT_SECONDS
    if "finish_timeout" in wandb.Settings.model_fields and "WANDB_FINISH_TIMEOUT" not in os.environ:
        settings |= {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
    id_file = run_dir / "wandb_id.txt"  # so that a resumed run goes on in the same curve
    known_id = _read_wandb_id(id_file)

    def start(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            **options,
            mode=mode,
            dir=run_dir,
            id=known_id,
            resume="allow" if mode == "online" else None,
            config={**config.to_dict(), **metadata},
            settings=wandb.Settings(**settings),
        )

    run, problem = None, explain_offline() if mode == "online" else ""
    try:
        if mode == "online" and not problem:
            try:
                run = start("online")
            except Exception as error:  # a key or a project that the server refuses, an answer that does not come
                problem = one_line(error)
        if problem:
            log(f"wandb: {problem}; logging offline under {run_dir / 'wandb'}")
        run = run or start("offline")
    except Exception as error:
        warn(f"wandb: {one_line(error)}; nothing is logged there, and {run_dir} has everything")
        return None
    if not run.offline:
        log(f"wandb: {run.url}")
    if run.id != known_id:
        write_text(id_file, run.id)
    return run


def one_line(error: Exception) -> str:
    """The error's message, shortened to one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def explain_offline() -> str:
    """Why wandb cannot be reached: no account, or a server that does not answer within PROBE_SECONDS; empty where it
    can be. wandb itself would try for 90 seconds."""
    import wandb

    try:
        settings = wandb.setup().settings  # of its environment variables and files
    except Exception as error:
        return one_line(error)
    if not has_wandb_account(settings.base_url):
        return "no account is set up (`wandb login` does it)"
    if settings.http_proxy or settings.https_proxy:
        return ""
    problems: list[str] = ["no answer"]

    def ask():
        try:
            urllib.request.urlopen(settings.base_url, timeout=PROBE_SECONDS).close()
            problems.clear()
        except urllib.error.HTTPError:  # an answer
            problems.clear()
        except urllib.error.URLError as error:
            problems[:] = [] if isinstance(error.reason, ssl.SSLError) else [str(error.reason)]
        except Exception as error:
            problems[:] = [str(error)]

    thread = threading.Thread(target=ask, daemon=True)  # as nothing else bounds the time of a name's resolution
    thread.start()
    thread.join(PROBE_SECONDS)
    return f"{settings.base_url} does not answer ({problems[0]})" if problems else ""


def _read_wandb_id(file: Path) -> str | None:
    """The id in a wandb_id.txt; None where there is none, or one that a power cut has damaged."""
    if not file.exists():
        return None
    try:
        with open_regular(file) as opened:
            text = opened.read(1000).decode(errors="replace").strip()
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        text = ""
    if re.fullmatch(r"[\w-]{1,64}", text):
        return text
    warn(f"{file} holds no wandb id (damaged?): the run goes on in a new curve, and the file is set aside")
    set_aside(file)
    return None


def has_wandb_account(base_url: str) -> bool:
    """Whether wandb will find credentials for the server without asking: in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlparse(base_url).hostname or "") is not None
