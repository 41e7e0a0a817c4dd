"""Draws metrics of one run or several, from their metrics.jsonl: one axis per metric, one colour per run.

    python plot_metrics.py --runs runs/a,runs/b --metrics 'validation/l2_loss,training_loss_t/*' --out curves.png

docs/metrics.md says what each metric means.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from utils.base.files import atomic_write, prepare_output_file
from utils.base.messages import UserError, log
from utils.flags import program, reading
from utils.flags.definitions import define_path
from utils.images import plotting
from utils.runs.given import expand_path
from utils.trackers.trackers import name_runs, read_curves

DEFAULT_METRICS = ("training/l2_loss", "validation/l2_loss", "training/grad_norm", "fid")  # those that a run has logged


def define_flags() -> None:
    flags.DEFINE_list("runs", [], "Run folders or metrics.jsonl files, separated by commas.")
    flags.DEFINE_list(
        "metrics", list(DEFAULT_METRICS), "Names of metrics, separated by commas; * stands for any characters."
    )
    define_path("out", "runs/curves.png", "The .png to write.")
    flags.DEFINE_integer("smooth", 1, "Logged values in a running mean; 1: none.", lower_bound=1)
    flags.DEFINE_bool("log_y", False, "Logarithmic values.")


def choose_metrics(known: Iterable[str], requested: list[str], is_optional: bool) -> list[str]:
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


def main(config: ConfigDict) -> None:
    jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerators

    # Which runs and which metrics.
    if not all(config.runs) or not config.runs:
        given = f"={','.join(config.runs)} has an empty name" if config.runs else " is not given"
        raise UserError(f"--runs{given}: name run folders, separated by commas, such as runs/a,runs/b")
    paths = [Path(expand_path(run, "runs")) for run in dict.fromkeys(config.runs)]
    curves = {name: read_curves(path, "runs") for name, path in zip(name_runs(paths), paths, strict=True)}
    known = {metric for curve in curves.values() for metric in curve}
    metrics = choose_metrics(known, config.metrics, is_optional=not reading.is_explicit("metrics"))

    # Where the figure goes: before it is drawn.
    out = Path(config.out)
    if out.is_dir() or out.suffix.lower() != ".png":
        example = out / "curves.png" if out.is_dir() else "curves.png"
        raise UserError(f"--out={out}: name a .png file, such as {example}")
    prepare_output_file(out, "out", "curves.png")

    # The figure.
    points = {metric: {run: list(curve.get(metric, {}).items()) for run, curve in curves.items()} for metric in metrics}
    for run in curves:
        if missing := [metric for metric in metrics if not points[metric][run]]:
            log(f"{run} has not logged {', '.join(missing)}")
    figure = plotting.metric_curves(points, config.smooth, config.log_y)
    with atomic_write(out) as temporary:
        figure.savefig(temporary, format="png")
    log(f"written: {out}")


if __name__ == "__main__":
    program.run_program(define_flags, main, needs_devices=False)
