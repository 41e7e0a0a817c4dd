"""Runs side by side: a row for each, with its last and best metrics, its size, and the settings that differ."""

import glob
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from utils.base.external import BadFileError, read_json
from utils.base.messages import UserError, log_once, warn, warn_once
from utils.metrics.metrics import metric_columns
from utils.runs.best import is_higher_better
from utils.runs.checkpoint import Checkpoints, DamagedCheckpointError, has_checkpoints
from utils.runs.config import START_SETTINGS, flatten
from utils.runs.given import expand_path
from utils.runs.remote_run import find_remote_run
from utils.runs.results import read_results, score_columns
from utils.runs.saved_config import read_config
from utils.storage import remote
from utils.storage.urls import is_url
from utils.trackers.trackers import METRICS_FILE, last_seconds, read_curves, read_log

Curves = dict[str, dict[int, float]]  # {metric: {step: value}}
RESULTS_FILE = "fid.json"  # of eval_fid.py; its scores are metrics called fid.json/SCORE
# Settings that say where a run is and what it is called, that have another name today, or that follow from others.
NOT_COMPARED = (*START_SETTINGS, "vae", "frozen", "model.use_stable_vae")
FACTS = ("step", "seconds", "parameters")
MAX_LISTED = 8  # runs nearby, in an error


def find_runs(words: Sequence[str], flag: str, *, needs_images: bool = False) -> dict[Path, Curves]:
    """Returns {run: its curves} of the run folders and metrics.jsonl files that --`flag` names, in its order.

    Of runs in object storage, the log is fetched, and with `needs_images` the pictures of their evaluations.

    *, ? and [] stand for any characters, as in a shell; what they match without metrics is left out, in one line.
    Raises UserError where a name is no run, and where a pattern matches none.
    """
    runs: dict[Path, Curves] = {}
    words = [url for word in words for url in _expand_url(word, flag)]
    for word in dict.fromkeys(words):
        path = _find_path(word, flag, needs_images)
        # A name as it stands, which may have such characters itself.
        if os.path.lexists(path) or not glob.has_magic(str(path)):
            runs[path] = read_curves(path, flag)
            continue

        # A pattern.
        found: dict[Path, Curves] = {}
        left_out = []
        for match in map(Path, sorted(glob.glob(str(path)))):
            if not match.is_dir() and match.suffix != ".jsonl":
                continue  # what is no log, such as a table of the runs
            try:
                found[match] = read_curves(match, flag)
            except UserError:
                left_out.append(match.name)
        if not found:
            raise UserError(f"--{flag}={word} matches no run; {_list_nearby(path)}")
        if left_out:
            log_once(f"--{flag}={word}: left out what holds no metrics: {', '.join(left_out)}")
        runs |= found
    return runs


def _expand_url(word: str, flag: str) -> list[str]:
    """Returns the URLs of the runs that a pattern in object storage matches; any other word as it is. Raises UserError
    where it matches none."""
    if not (is_url(word) and glob.has_magic(word)):
        return [word]
    found = remote.match_files(remote.join(word, METRICS_FILE), flag)
    if not found:
        raise UserError(f"--{flag}={word} matches no run; check the name")
    return [url.removesuffix(f"/{METRICS_FILE}") for url in found]


def _find_path(word: str, flag: str, needs_images: bool) -> Path:
    """Returns the path of a run; of one in object storage, that of its local copy, without checkpoints."""
    word = expand_path(word, flag)
    if not is_url(word):
        return Path(word)
    run = find_remote_run(word)
    run.pull_run(flag, needs_checkpoint=False, needs_images=needs_images)
    return run.folder


def _list_nearby(pattern: Path) -> str:
    """Returns a line on the runs below the part of a pattern that has no special characters."""
    parts = pattern.parts
    base = Path(*parts[: next(number for number, part in enumerate(parts) if glob.has_magic(part))])
    files = [*base.glob(f"*/{METRICS_FILE}"), *base.glob(f"*/*/{METRICS_FILE}")]
    runs = sorted(str(file.parent) for file in files)
    more = ", ..." if len(runs) > MAX_LISTED else ""
    return f"there are {', '.join(runs[:MAX_LISTED])}{more}" if runs else f"{base} has none; name folders of runs"


def read_scores(run: Path) -> Curves:
    """Returns {fid.json/SCORE: {step: value}} of what eval_fid.py has written into a run's folder.

    Where there are several rows of a step, of other samplers, the best value counts. A file that cannot be read is left
    out with a warning.
    """
    try:
        rows = read_results(run / RESULTS_FILE) if run.is_dir() else []
    except (BadFileError, OSError) as error:
        warn(f"{run / RESULTS_FILE} cannot be read ({getattr(error, 'strerror', None) or error}) and is left out")
        return {}

    # Rows of a run's checkpoints. Baselines of held-out images say nothing about the run.
    curves: Curves = {}
    for row in rows:
        step = row.get("checkpoint_step")
        if not isinstance(step, int):
            continue
        for name in score_columns():
            if row.get(name) is not None and not name.endswith("_validation"):
                metric = f"{RESULTS_FILE}/{name}"
                values = curves.setdefault(metric, {})
                values[step] = find_best(metric, [row[name], values.get(step, math.nan)])
    return {name: dict(sorted(values.items())) for name, values in curves.items()}


def find_direction(metric: str) -> str | None:
    """Returns 'lowest' or 'highest', whichever value of a metric is its best; None for one that has no best value,
    such as a norm."""
    score = metric.rpartition("/")[2]
    if score in metric_columns():
        return "highest" if is_higher_better(score) else "lowest"
    return "lowest" if "loss" in metric else None


def find_best(metric: str, values: Sequence[float]) -> float:
    """Returns the best of the values of a metric; NaN where none is finite."""
    best = max if find_direction(metric) == "highest" else min
    return best((value for value in values if math.isfinite(value)), default=math.nan)


def compare_runs(runs: Mapping[str, Path], curves: Mapping[str, Curves], metrics: Sequence[str]) -> list[dict]:
    """Returns a row for each run, {column: value}: its name, the settings that differ, FACTS, and of each metric the
    last value and the best one. A row has no column of what its run does not have."""
    settings = find_differences({name: read_settings(run) for name, run in runs.items()})
    rows = []
    for name, run in runs.items():
        # What it is, and how far it has come.
        row: dict[str, Any] = {"run": name, **settings[name]}
        row["step"] = max((step for curve in curves[name].values() for step in curve), default=0)
        if seconds := last_seconds(read_log(run)):  # older runs log none
            row["seconds"] = seconds
        if (count := count_parameters(run)) is not None:
            row["parameters"] = count

        # What it has logged.
        for metric in metrics:
            if curve := curves[name].get(metric):
                row[metric] = list(curve.values())[-1]
                if direction := find_direction(metric):
                    row[f"{direction} {metric}"] = find_best(metric, list(curve.values()))
        rows.append(row)
    return rows


def find_columns(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[str]:
    """Returns the columns of a table in order: the run, settings, FACTS, metrics. A column that no row has is left
    out."""
    scores = [column for metric in metrics for column in (metric, f"{find_direction(metric)} {metric}")]
    known = {column for row in rows for column in row}
    settings = sorted(known - {"run", *FACTS, *scores})
    return [column for column in ("run", *settings, *FACTS, *scores) if column in known]


def read_run_config(run: Path) -> dict[str, Any]:
    """Returns the configuration in a run's folder, that of an older run completed by what it did not save; {} where
    there is none, as beside a metrics.jsonl of another name, and with a warning where it cannot be read."""
    path = (run if run.is_dir() else run.parent) / "config.json"
    is_of_run = run.is_dir() or run.name == METRICS_FILE  # another file may be anyone's
    if not is_of_run or not path.exists():
        return {}
    try:
        return read_config(read_json(path))
    except BadFileError as error:
        warn_once(f"{path}: {error}; nothing is said of the settings of this run")
        return {}


def read_settings(run: Path) -> dict[str, Any] | None:
    """Returns {name: value} of a run's settings, of an older run completed by what it did not save; None where they are
    not known, as of a metrics.jsonl alone."""
    config = read_run_config(run)
    if not config:
        return None
    return {
        name: value
        for name, value in flatten(config).items()
        if name not in NOT_COMPARED and name.partition(".")[0] != "wandb"
    }


def find_differences(settings: Mapping[str, dict[str, Any] | None]) -> dict[str, dict[str, str]]:
    """Returns {run: {name: value as on a command line}} of the settings of which two runs have other values.

    One that a run does not have, as it is of another network or younger than the run, says nothing.
    """
    known = [values for values in settings.values() if values is not None]
    names = {name for values in known for name in values}
    texts = {name: {_as_typed(values[name]) for values in known if name in values} for name in names}
    differ = {name for name in names if len(texts[name]) > 1}
    return {
        run: {name: _as_typed(value) for name, value in (values or {}).items() if name in differ}
        for run, values in settings.items()
    }


def count_parameters(run: Path) -> int | None:
    """Returns the number of parameters in a run's newest checkpoint; None where it has none that can be read."""
    if not run.is_dir() or not has_checkpoints(run):
        return None
    checkpoints = Checkpoints(run)
    try:
        shapes = checkpoints.stored_shapes(checkpoints.steps()[0], "ema_params")
    except (DamagedCheckpointError, IndexError):
        return None
    finally:
        checkpoints.close()
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _as_typed(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _to_text(column: str, value: Any) -> str:
    """Returns a cell of the table."""
    if column == "parameters":
        return f"{value:,}"
    if column == "seconds":
        return f"{value:.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Returns a Markdown table whose columns are aligned, numbers to the right; cells without a value are empty."""
    cells = [list(columns)]
    for row in rows:
        texts = [_to_text(name, row[name]) if name in row else "" for name in columns]
        cells.append([text.replace("|", "\\|") for text in texts])

    # Names and settings are texts.
    are_texts = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * (width - 1) + "-:"[not is_text] for width, is_text in zip(widths, are_texts, strict=True)])
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, is_text in zip(line, widths, are_texts, strict=True)
        ]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)
