"""Results of evaluations: fid.json, fid.csv, a table and a plot. fid.json keeps its rows under the key `cells`."""

import csv
import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any

from matplotlib.figure import Figure

from utils.base.external import MAX_JSON_BYTES, BadFileError, parse_json
from utils.base.files import atomic_write, locked, prepare_output_file, read_bytes, set_aside, write_json
from utils.base.messages import log, show_result
from utils.images import plotting
from utils.metrics.memorisation import COLUMNS, ERRORS
from utils.metrics.metrics import metric_columns, metric_formats
from utils.networks.posthoc_ema import width_of
from utils.sampling.solvers import SOLVERS, SamplerConfig

# Settings that do not identify a row: places of files, which are identified by their hash instead.
NOT_COMPARED = ("fid_stats", "checkpoint", "samples", "convention_source", "train_images", "guide")
# Results that are numbers or None, beside the metrics.
NUMBERS = (
    "kid_error",
    "kd_dinov2_error",
    "straightness",
    "nfe",
    "passes",
    "inner_scale",
    "guide_scale",
    "num_steps",
    "cfg_scale",
    "num_samples",
    *ERRORS.values(),
)
# Settings that a row has only where they are not the default, so that rows of older versions are found again.
OPTIONAL = (
    "rtol", "atol", "time_shift", "spacing", "cfg_channels", "objective", "params", "empty_classes", "jax_variables",
    "extractor", "extractor_sha256", "metrics", "memorisation_features", "train_sha256", "train_mirrors",
    "num_train_images", "cfg_zero_star", "cfg_zero_steps", "inner_scale", "inner_interval", "guide_scale",
    "guide_interval", "guide_sha256",
)  # fmt: skip
# {setting of further guidance: its name in tables and curves}
GUIDANCE_TITLES = {"cfg_zero_star": "CFG-Zero*", "inner_scale": "inner", "guide_scale": "autoguidance"}


class Results:
    """fid.json: a list of rows, each its settings and its metrics, written after every one.

    Several processes may add to one file; one that cannot be understood is set aside.
    """

    def __init__(self, out: Path):
        self.path = out / "fid.json"
        with locked(self.path):
            self._read()

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the finished row of these settings, or None.

        Files are identified by their hash, wherever they are. A row that also has an Inception Score will do where none
        is requested.
        """
        # A requested Inception Score must be there; one that is not requested does no harm.
        requested = {name: value for name, value in settings.items() if name not in NOT_COMPARED}
        if requested["inception_logits_sha256"] is None:
            del requested["inception_logits_sha256"]
        return next((row for row in self.rows if _is_of(row, requested) and _is_finished(row)), None)

    def add(self, settings: dict[str, Any], metrics: Mapping[str, float | None]) -> dict[str, Any]:
        """Writes and returns the row, which replaces an earlier one of the same settings."""
        with locked(self.path):
            self._read()  # another process may have added some
            self.rows = [row for row in self.rows if not _is_of(row, settings)]
            self.rows.append({**settings, **metrics})
            write_json(self.path, {"cells": self.rows})
        return self.rows[-1]

    def _read(self) -> None:
        self.rows = []
        if not self.path.exists():
            return

        # A file that is damaged, or no regular file, is set aside: an evaluation takes too long to end for it.
        try:
            rows = _read_cells(self.path)
        except BadFileError as error:
            log(f"{self.path} cannot be understood ({error}; damaged?); it is kept as {set_aside(self.path)}")
            return
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file may be good, but for now it cannot be read
                raise
            log(f"{self.path}: {error.strerror}; it is kept as {set_aside(self.path)}")
            return

        # Values that are no rows are left out; a copy of the file keeps them.
        self.rows = [row for row in rows if _is_row(row)]
        if others := len(rows) - len(self.rows):
            kept = set_aside(self.path)
            log(f"{self.path}: left out {others} of {len(rows)} rows that no evaluation has written; all are in {kept}")
            write_json(self.path, {"cells": self.rows})


def read_results(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a fid.json, which stays as it is; none where there is no such file.

    Raises BadFileError or OSError where it cannot be read.
    """
    return [row for row in _read_cells(path) if _is_row(row)] if path.exists() else []


def _read_cells(path: Path) -> list[Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise BadFileError(f"it has more than {MAX_JSON_BYTES:,} bytes")
    rows = parse_json(read_bytes(path), is_finite=False).get("cells")
    if not isinstance(rows, list):
        raise BadFileError("it has no list `cells`")
    return rows


def _is_row(row: Any) -> bool:
    """Returns whether a value is a row: settings and metrics by name, each a single value or a list of them.

    An integer too large for a float, or a metric that is no number, would end a program when it is shown.
    """
    results = {*NUMBERS, *score_columns()}
    try:
        for name, value in row.items():
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(each, (bool, int, float, str, NoneType)) for each in values):
                return False
            # float() raises OverflowError for integers beyond its range, which JSON can hold.
            numbers = [float(each) for each in values if isinstance(each, (int, float))]
            is_number = bool(numbers) and not isinstance(value, (list, bool))
            if name in results and not (value is None or is_number):
                return False
    except (AttributeError, OverflowError):  # no dictionary; a number too large
        return False
    return True


def _is_finished(row: Mapping[str, Any]) -> bool:
    """Returns whether a row has its scores: the FID, or any score where others were asked for."""
    # Rows from before --extractor name no network: it was Inception.
    has_fid = "inception" in row.get("extractor", ["inception"]) and "metrics" not in row
    scores = ["fid"] if has_fid else list(metric_columns())
    if row.get("fid_stats", "") is None:  # of --memorisation alone
        scores = ["memorised"]
    return any(row.get(name) is not None for name in scores) and bool(row.get("num_steps") or row.get("nfe"))


def _is_of(row: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Returns whether a row has these settings, and none of OPTIONAL beyond them."""
    # .get on both sides: an optional setting at its default is absent from both.
    return settings.items() <= row.items() and all(row.get(name) == settings.get(name) for name in OPTIONAL)


def sampler_settings(sampler: SamplerConfig) -> dict[str, Any]:
    """Returns the settings of a sampler's row; those that were added later only where they are not the default."""
    # In every row.
    settings = {
        "num_steps": None if sampler.is_adaptive else sampler.num_steps,
        "cfg_scale": sampler.cfg_scale,
        "solver": sampler.solver,
        "cfg_interval": [float(end) for end in sampler.cfg_interval],
    }

    # Where they have an effect and differ from the default: see OPTIONAL.
    if sampler.is_adaptive:
        settings |= {"rtol": sampler.rtol, "atol": sampler.atol}
    if sampler.time_shift != 1:
        settings["time_shift"] = sampler.time_shift
    if SOLVERS.get(sampler.solver, SOLVERS["euler"]).grid == "objective":
        settings["spacing"] = sampler.spacing
    if sampler.cfg_channels is not None:
        settings["cfg_channels"] = sampler.cfg_channels

    # Guidance beside that by labels.
    if sampler.cfg_zero_star:
        settings |= {"cfg_zero_star": True, "cfg_zero_steps": sampler.cfg_zero_steps}
    for kind in ("inner", "guide"):
        if getattr(sampler, f"{kind}_scale") != 1:
            settings[f"{kind}_scale"] = getattr(sampler, f"{kind}_scale")
            settings[f"{kind}_interval"] = [float(end) for end in getattr(sampler, f"{kind}_interval")]
    return settings


def score_columns() -> dict[str, str]:
    """Returns {result: title in tables} of all metrics, and of what samples have of the training images."""
    return metric_columns() | COLUMNS


def choose_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns {name: title} of the columns of a table of these rows: those that some row can fill, and of the
    checkpoint where there are several."""
    columns = {"num_steps": "steps", "cfg_scale": "guidance"}
    if any(name in row for name in GUIDANCE_TITLES for row in rows):
        columns |= GUIDANCE_TITLES | {"passes": "passes"}
    columns |= {"num_samples": "samples"} | score_columns()
    if len({row.get("params") for row in rows}) > 1:
        columns = {"params": "parameters"} | columns
    if len({row.get("checkpoint_step") for row in rows}) > 1:
        columns = {"checkpoint_step": "step"} | columns
    columns["straightness"] = "straightness"
    if any(row.get("num_steps", 0) is None for row in rows):  # an adaptive solver
        columns = {"nfe": "NFE"} | columns
    return {name: title for name, title in columns.items() if any(name in row for row in rows)}


def to_markdown(rows: list[dict[str, Any]], first: Mapping[str, str] = MappingProxyType({})) -> str:
    """Returns a Markdown table of the rows: step count, guidance and every metric that one of them has.

    `first` are columns {setting: title} before these; texts in them are Markdown already.
    """
    columns = {**first, **choose_columns(rows)}

    # Numbers, to the right.
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---:|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(to_text(name, row) for name in columns) + " |")
    return "\n".join(lines)


def likelihood_to_markdown(result: dict[str, Any]) -> str:
    """Returns the result of likelihood.py as a table of one row."""
    unit = "bits/dim" if "bits_per_dim" in result else "nats per element of the latents"
    value = result.get("bits_per_dim", result.get("nats_per_latent_element"))
    error = "" if result["standard_error"] is None else f" ± {result['standard_error']:.4f}"
    return (
        f"| {unit} | images | data | labels | NFE |\n|---:|---:|---|---|---:|\n"
        f"| {value:.4f}{error} | {result['num_images']} | {result['dataset']}, {result['split']} | "
        f"{result['labels']} | {result['nfe']:.1f} |"
    )


def to_text(name: str, row: dict[str, Any]) -> str:
    """Returns a cell of the table; empty where the row has no such value."""
    # Absent, or a metric that could not be computed.
    if name == "params":
        return row.get(name, "ema")
    if name not in row:
        return ""
    value = row[name]
    if value is None and name not in ("num_steps", "cfg_scale"):
        return ""

    # Metrics: kernel distances have more digits, as they are far below 1.
    if name in ("kid", "kd_dinov2"):
        error = row.get(f"{name}_error")
        return f"{value:.5f}" if error is None else f"{value:.5f} ± {error:.5f}"
    if name in COLUMNS:
        error = row.get(ERRORS.get(name, ""))
        return f"{value:.1f}" + ("" if error is None else f" ± {error:.1f}")
    if name == "straightness":
        return f"{value:.3f}"
    if format_ := metric_formats().get(name):
        return f"{value:{format_}}"

    # Settings; None means something for two of them.
    if isinstance(value, str):
        return value
    if value is True:
        return "yes"
    if value is None:
        return "adaptive" if name == "num_steps" else "none"
    return f"{value:g}"


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows, with a column for everything that one of them has; lists are JSON."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with (
        atomic_write(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()})


def check_json_path(target: str | None, inputs: Mapping[str, str | None]) -> None:
    """Raises UserError where `write_json_rows` cannot write; see `prepare_output_file`."""
    if target and target != "-":
        prepare_output_file(Path(target), "json", "result.json", inputs)


def write_json_rows(target: str, rows: list[dict[str, Any]]) -> None:
    """Writes the rows as JSON into the file `target`, or prints them for '-'."""
    if target == "-":
        show_result(json.dumps(rows, indent=2))
    else:
        write_json(Path(target), rows)


def plot_fid(rows: list[dict[str, Any]]) -> Figure:
    """Draws FID against steps, a curve for each guidance scale; without it, the first score of the table that there
    is. Adaptive solvers count network evaluations instead."""
    columns = score_columns()
    score = next((name for name in columns if any(row.get(name) is not None for row in rows)), "fid")
    curves = {}
    for row in rows:
        if row.get(score) is None or not _is_finished(row):
            continue
        name = ", ".join([_guidance_title(row), *filter(None, [row.get("params")])])
        curves.setdefault(name, []).append((row["num_steps"] or row["nfe"], row[score]))
    return plotting.curves(curves, "steps", columns[score])


def plot_by_step(rows: list[dict[str, Any]]) -> Figure:
    """Draws every metric against the training steps of the rows, a curve for each sampler and kind of parameters.

    Baselines of held-out images, which are the same at all steps, are left out.
    """
    names = [(_guidance_title(row), f"{to_text('num_steps', row)} steps", to_text("params", row)) for row in rows]
    return plotting.metric_curves(_gather_points(rows, [row["checkpoint_step"] for row in rows], names))


def plot_by_ema(rows: list[dict[str, Any]]) -> Figure:
    """Draws every metric against the width of the EMA, a curve for each sampler and step.

    Rows without a width, of the recipe's EMA and of raw parameters, are left out; some row has to have one.
    """
    by_width = [(width, row) for row in rows if (width := row_width(row)) is not None]
    by_width.sort(key=lambda pair: pair[0])
    widths, rows = map(list, zip(*by_width, strict=True))
    names = [
        (_guidance_title(row), f"{to_text('num_steps', row)} steps", f"step {row['checkpoint_step']}") for row in rows
    ]
    points = _gather_points(rows, widths, names)
    return plotting.metric_curves(points, x_title="width of the EMA")


def row_width(row: Mapping[str, Any]) -> float | None:
    """Returns the relative width of the EMA of a row's parameters; None for the recipe's EMA and for no EMA."""
    return width_of(row.get("params", "ema"))


def _gather_points(
    rows: Sequence[Mapping[str, Any]], places: Sequence[float], names: Sequence[tuple[str, ...]]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Returns {metric: {curve: (place, value) points}}, of each row's place on the x axis.

    A curve's name consists of those of its rows' `names` in which rows differ.
    """
    told = [number for number, values in enumerate(zip(*names, strict=True)) if len(set(values)) > 1] or [0]
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row, place, name in zip(rows, places, names, strict=True):
        curve = ", ".join(name[number] for number in told)
        for score, title in score_columns().items():
            if row.get(score) is not None and not score.endswith("_validation"):
                points.setdefault(title, {}).setdefault(curve, []).append((place, row[score]))
    return points


def _guidance_title(row: Mapping[str, Any]) -> str:
    name = "no guidance" if row["cfg_scale"] is None else f"guidance {row['cfg_scale']:g}"
    others = [
        title if row[key] is True else f"{title} {row[key]:g}" for key, title in GUIDANCE_TITLES.items() if key in row
    ]
    return ", ".join([name, *others])
