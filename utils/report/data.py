"""Contents of a report, as JSON: curves, pictures, scores and facts of several runs.

Numbers and texts alone: utils/report/report.js lays them out, and shows every text as text.
"""

import json
import math
import os
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.base.devices import format_bytes
from utils.base.external import BadFileError
from utils.base.messages import format_duration, printable
from utils.conditions.condition import restore_condition
from utils.report.curves import clock_curve, loss_frames, split_curves, thin_curve
from utils.report.images import PictureStore, find_panels, natural_order
from utils.runs.checkpoint import FOLDER
from utils.runs.comparison import (
    RESULTS_FILE,
    Curves,
    compare_runs,
    find_best,
    find_columns,
    find_direction,
    read_run_config,
    read_scores,
)
from utils.runs.model_card import public_name
from utils.runs.results import choose_columns, read_results, score_columns, to_text
from utils.trackers.trackers import read_log

MAX_FRAMES = 64  # evaluations of the losses by t, of each run
# Metrics that come first, in this order. All others follow under the names of their groups.
MAIN = ("training/l2_loss", "validation/l2_loss", "validation_loss_t/mean", "fid")
TABLE_METRICS = ("training/l2_loss", "validation/l2_loss", "validation_loss_t/mean", f"{RESULTS_FILE}/fid")


def gather(
    runs: Mapping[str, Path], curves: Mapping[str, Curves], out: Path, store: PictureStore, watch: float
) -> dict[str, Any]:
    """Returns all that the page of --out shows of the runs in {name: path}, whose logged metrics are `curves`.

    `watch`: seconds after which the page loads itself again, 0 for never. Links are relative to the folder of `out`.
    """
    # Pictures of all runs share one budget.
    pictures = store.choose({name: find_panels(path) for name, path in runs.items()})
    configs = {name: read_run_config(path) for name, path in runs.items()}
    logs = {name: read_log(path) for name, path in runs.items()}
    records = [describe_run(name, curves[name], configs[name], logs[name], pictures[name]) for name in runs]

    # The metrics and panels of all runs, in one order.
    metrics = sorted({metric for record in records for metric in record["curves"]}, key=_metric_rank)
    return {
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "watch": watch,
        "metrics": metrics,
        "main": [metric for metric in metrics if _metric_rank(metric)[0] < len(MAIN)],
        "panels": sorted({panel for record in records for panel in record["panels"]}, key=natural_order),
        "runs": records,
        "tables": {
            "runs": tabulate_runs(
                runs, curves, {name: describe_facts(configs[name], logs[name]) for name in runs}, out
            ),
            "scores": tabulate_scores(runs),
        },
    }


def _metric_rank(metric: str) -> tuple[int, str]:
    return (MAIN.index(metric) if metric in MAIN else len(MAIN), metric)


def describe_run(
    name: str,
    curves: Curves,
    config: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Mapping[int, str]],
) -> dict[str, Any]:
    """Returns what the page draws of a run: its curves, its clock, its losses by t and its pictures. `config` is its
    configuration, {} where that is not known, and `lines` are those of its metrics.jsonl."""
    over_steps, by_t = split_curves(curves)
    batch_size = config.get("batch_size")  # for the axis of images seen
    return {
        "name": printable(name),
        "curves": {metric: thin_curve(curve) for metric, curve in over_steps.items()},
        "clock": clock_curve(lines),
        "batch_size": batch_size if type(batch_size) is int else None,
        "losses": loss_frames(by_t, MAX_FRAMES),
        "panels": {panel: [[step, url] for step, url in sorted(steps.items())] for panel, steps in pictures.items()},
    }


# --- Tables ---


def cell(text: str, value: Any = None, **more: Any) -> dict[str, Any]:
    """Returns a cell: its text, and the number by which its column is sorted, if it is not a text."""
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return {"text": printable(text), "value": value if is_number else None, **more}


def tabulate_runs(
    runs: Mapping[str, Path], curves: Mapping[str, Curves], facts: Mapping[str, Mapping[str, Any]], out: Path
) -> dict[str, Any]:
    """Returns a row for each run: the settings that differ, its size and time, its `facts`, metrics, checkpoints."""
    # The rows of `plot_metrics.py --table`.
    curves = {name: curve | read_scores(runs[name]) for name, curve in curves.items()}
    known = {metric for curve in curves.values() for metric in curve}
    metrics = [metric for metric in TABLE_METRICS if metric in known]
    rows = compare_runs(runs, curves, metrics)
    best = {name: find_best(name, [row.get(name, math.nan) for row in rows]) for name in _best_columns(metrics)}

    # With facts that a terminal has no room for, in front of the metrics.
    columns = find_columns(rows, metrics)
    place = next((i for i, name in enumerate(columns) if name in (*metrics, *best)), len(columns))
    columns[place:place] = [
        name for name in ("data", "memory", "machine") if any(name in fact for fact in facts.values())
    ]
    cells = []
    for row in rows:
        known_cells = facts[row["run"]]
        texts = [known_cells.get(name) or _run_cell(name, row.get(name), best, len(rows)) for name in columns]
        links = find_checkpoints(runs[row["run"]], out)
        cells.append([*texts, cell("", links=links)])
    titles = ["time" if name == "seconds" else name for name in columns]
    return {"columns": [*titles, "checkpoints"], "rows": cells, "runs": [printable(row["run"]) for row in rows]}


def _best_columns(metrics: Sequence[str]) -> list[str]:
    return [f"{direction} {metric}" for metric in metrics if (direction := find_direction(metric))]


def _run_cell(name: str, value: Any, best: Mapping[str, float], count: int) -> dict[str, Any]:
    # Numbers as people read them; they are sorted by their values.
    if value is None:
        return cell("")
    if name == "seconds":
        return cell(format_duration(value), value)
    if name in ("parameters", "step"):
        return cell(f"{value:,}", value)
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return cell(text, value, best=count > 1 and value == best.get(name))


def describe_facts(config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns {column: cell} of a run's data, memory and machine, as far as its configuration and its log know them."""
    facts = {}
    if data := config.get("dataset"):
        facts["data"] = cell(describe_data(data))
    # The most that any of its starts has held.
    peaks = [line["memory"] for line in lines if type(line.get("memory")) in (int, float)]
    if peaks:
        facts["memory"] = cell(format_bytes(max(peaks)), max(peaks))
    if text := describe_machine(config.get("machine")):
        facts["machine"] = cell(text)
    return facts


def describe_data(data: Mapping[str, Any]) -> str:
    """Returns a run's record of its data in words, without the folders of a path."""
    count = (data.get("splits") or {}).get("train", {}).get("num_examples")
    parts = [public_name(str(data.get("name", ""))), f"{count:,} images" if isinstance(count, int) else ""]
    parts.append("x".join(map(str, data.get("image_shape", ()))))
    try:
        parts.append(restore_condition(data).summary())
    except Exception:  # a condition that is registered elsewhere
        parts.append("")
    return ", ".join(part for part in parts if part)


def describe_machine(machine: Any) -> str:
    """Returns in words what a run has recorded of its machine (utils/base/devices.py); '' where it has not."""
    if not isinstance(machine, dict) or not isinstance(machine.get("kind"), str):
        return ""
    # A file may be anyone's: what is missing or of another type is left out.
    devices = machine.get("devices", 1)
    name = machine["kind"] if devices == 1 else f"{devices} x {machine['kind']}"
    memory = machine.get("memory")
    room = f", {format_bytes(memory)}" if type(memory) in (int, float) else ""
    return f"{name}, {machine.get('cores', '?')} cores{room}, JAX {machine.get('jax', '?')}"


def find_checkpoints(run: Path, out: Path) -> list[dict[str, str]]:
    """Returns the links to a run's checkpoints, newest first: [{"text", "href"}], relative to the folder of `out`."""
    folder = run / FOLDER
    steps = sorted((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), reverse=True)
    links = []
    for step in steps if run.is_dir() else ():
        # Relative: report and runs may move together. A name may have any character of a URL.
        path = os.path.relpath(folder / str(step), out.absolute().parent)
        links.append({"text": f"{step:,}", "href": urllib.parse.quote(os.fsencode(path)) + "/"})
    return links


def tabulate_scores(runs: Mapping[str, Path]) -> dict[str, Any] | None:
    """Returns the rows of the runs' fid.json, the best value of each metric marked; None where there are none."""
    # A run may have none, or a file that cannot be read.
    found = []
    for name, path in runs.items():
        try:
            rows = read_results(path / RESULTS_FILE) if path.is_dir() else []
        except (BadFileError, OSError):  # `read_scores` has warned of it
            rows = []
        found += [(name, row) for row in rows]
    if not found:
        return None

    # Columns as in the tables of eval_fid.py; the best, where there are several to choose from.
    rows = [row for _, row in found]
    columns = choose_columns(rows)
    best = {}
    for name in score_columns().keys() & columns.keys():
        values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
        if len(set(values)) > 1:
            best[name] = find_best(name, values)
    cells = []
    for run, row in found:
        texts = [
            cell(to_text(name, row), row.get(name), best=name in best and row.get(name) == best[name])
            for name in columns
        ]
        cells.append([cell(run), *texts])
    return {"columns": ["run", *columns.values()], "rows": cells, "runs": [printable(run) for run, _ in found]}


def to_script(content: Mapping[str, Any]) -> str:
    """Returns JSON that may stand in an HTML page's script element: no character in it can end the element."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII alone
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
