"""Draws metrics of one run or several, from their metrics.jsonl: one axis per metric, one colour per run; or compares
runs in a table.

    python plot_metrics.py --runs runs/a,runs/b --metrics 'validation/l2_loss,training_loss_t/*' --out curves.png
    python plot_metrics.py --runs 'runs/*' --x hours --dpi 300 --out curves.pdf
    python plot_metrics.py --runs 'runs/sweep/*' --table

docs/metrics.md says what each metric means.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from utils.base.files import atomic_write, write_text
from utils.base.messages import UserError, log, show_result
from utils.flags import program, reading
from utils.flags.definitions import define_path, define_quiet_flag
from utils.flags.effects import RULES, check_effects
from utils.images import plotting
from utils.runs.axes import AXES, place_steps
from utils.runs.comparison import (
    RESULTS_FILE,
    Curves,
    compare_runs,
    find_columns,
    find_runs,
    read_scores,
    to_markdown,
)
from utils.runs.results import write_csv
from utils.trackers.trackers import name_runs

# Those that a run has logged, in curves and in a table.
DEFAULT_METRICS = ("training/l2_loss", "validation/l2_loss", "training/grad_norm", "fid")
TABLE_METRICS = ("training/l2_loss", "validation/l2_loss", "validation_loss_t/mean", "fid", f"{RESULTS_FILE}/fid")


def define_flags() -> None:
    flags.DEFINE_list(
        "runs", [], "Run folders or metrics.jsonl files, separated by commas; * stands for any characters."
    )
    flags.DEFINE_list(
        "metrics",
        list(DEFAULT_METRICS),
        "Names of metrics, separated by commas; * stands for any characters. Scores of eval_fid.py are fid.json/NAME "
        f"in a table, which has {', '.join(TABLE_METRICS)} by default.",
    )
    flags.DEFINE_bool(
        "table",
        False,
        "Print a table in place of curves: a row per run with its last and best metrics, its step, seconds and "
        "parameters, and the settings that differ.",
    )
    define_path(
        "out", "runs/curves.png", "The .png, .pdf or .svg to write; with --table a .md or .csv, by default none."
    )
    flags.DEFINE_enum("x", "steps", list(AXES), "Over steps, images seen, or hours of the training.")
    flags.DEFINE_integer("dpi", 120, "Pixels an inch of a .png.", 30, 1200)
    flags.DEFINE_integer("smooth", 1, "Logged values in a running mean; 1: none.", lower_bound=1)
    flags.DEFINE_bool("log_y", False, "Logarithmic values.")
    define_quiet_flag()


def choose_metrics(known: Iterable[str], requested: Sequence[str], is_optional: bool) -> list[str]:
    """Returns the known metrics that `requested` names or matches, in its order, each once.

    Raises UserError for a name that nothing matches; where `is_optional`, only if no name matches anything.
    """
    # Defaults may be missing, as runs without statistics log no FID; a name that was typed may not.
    known = sorted(known)
    matches = {pattern: [name for name in known if fnmatchcase(name, pattern)] for pattern in requested}
    missing = [pattern for pattern, names in matches.items() if not names]
    if not requested or (len(missing) == len(matches) if is_optional else missing):
        # Metrics by time have many names: the error lists one pattern for them.
        choices = dict.fromkeys(name.partition("_t/")[0] + "_t/*" if "_t/" in name else name for name in known)
        raise UserError(
            f"--metrics={missing[0] if missing else ''} matches no logged metric; there are {', '.join(choices)}"
        )
    return list(dict.fromkeys(name for names in matches.values() for name in names))


def draw_curves(config: ConfigDict, runs: Mapping[str, Path], curves: Mapping[str, Curves]) -> None:
    """Writes the figure of --out: the metrics of each run in {name: its curves}, whose path is in `runs`."""
    known = {metric for curve in curves.values() for metric in curve}
    metrics = choose_metrics(known, config.metrics, is_optional=not reading.is_explicit("metrics"))
    out = reading.prepare_out(config.out, (".png", ".pdf", ".svg"), "curves.png")  # before it is drawn

    # Where the steps of each run stand on the axis, and the points of its curves there.
    places = {}
    for run, path in runs.items():
        steps = sorted({step for metric in metrics for step in curves[run].get(metric, {})})
        places[run] = dict(zip(steps, place_steps(path, config.x, steps), strict=True))
    points = {
        metric: {
            run: [(places[run][step], value) for step, value in curve.get(metric, {}).items()]
            for run, curve in curves.items()
        }
        for metric in metrics
    }
    for run in curves:
        if missing := [metric for metric in metrics if not points[metric][run]]:
            log(f"{run} has not logged {', '.join(missing)}")
    figure = plotting.metric_curves(points, config.smooth, config.log_y, AXES[config.x])
    with atomic_write(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:].lower(), dpi=config.dpi)
    log(f"written: {out}")


def show_table(config: ConfigDict, runs: Mapping[str, Path], curves: Mapping[str, Curves]) -> None:
    """Prints a row for each run in {name: its path}, and writes them to --out if that is given."""
    out = reading.prepare_out(config.out, (".md", ".csv"), "table.md") if reading.is_explicit("out") else None

    # Metrics of training, and of eval_fid.py.
    is_default = not reading.is_explicit("metrics")
    curves = {name: curve | read_scores(runs[name]) for name, curve in curves.items()}
    known = {metric for curve in curves.values() for metric in curve}
    metrics = choose_metrics(known, TABLE_METRICS if is_default else config.metrics, is_default)

    # The table, and a file of it.
    rows = compare_runs(runs, curves, metrics)
    columns = find_columns(rows, metrics)
    text = to_markdown(rows, columns)
    show_result(text)
    if out is not None and out.suffix.lower() == ".csv":
        write_csv(out, [{name: row.get(name) for name in columns} for row in rows])
    elif out is not None:
        write_text(out, text + "\n")


def main(config: ConfigDict) -> None:
    jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerators
    check_effects(RULES["plot_metrics"], config)
    if not all(config.runs) or not config.runs:
        given = f"={','.join(config.runs)} has an empty name" if config.runs else " is not given"
        raise UserError(f"--runs{given}: name run folders, separated by commas, such as runs/a,runs/b")

    found = find_runs(config.runs, "runs")
    runs = dict(zip(name_runs(list(found)), found, strict=True))
    curves = {name: found[path] for name, path in runs.items()}
    if config.table:
        show_table(config, runs, curves)
    else:
        draw_curves(config, runs, curves)


if __name__ == "__main__":
    program.run_program(define_flags, main, needs_devices=False)
