"""Shows runs in a browser: one HTML file with their curves, pictures and scores, which opens from disk anywhere.

    python report.py --runs 'runs/*' --out report.html
    python report.py --runs runs/demo --watch
    python report.py --runs runs/demo --film sample_cfg_4

docs/report.md says what is on the page, docs/metrics.md what each metric means.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from utils.base.files import prepare_output_file
from utils.base.messages import UserError, log, show_result
from utils.flags import program
from utils.flags.definitions import define_path
from utils.flags.effects import RULES, check_effects
from utils.pages.report_data import gather
from utils.pages.report_images import PictureStore
from utils.pages.report_page import write_page
from utils.runs.comparison import Curves, find_runs
from utils.trackers.trackers import name_runs

WATCHED = ("metrics.jsonl", "fid.json", "config.json")


def define_flags() -> None:
    flags.DEFINE_list(
        "runs", [], "Run folders or metrics.jsonl files, separated by commas; * stands for any characters."
    )
    define_path("out", "report.html", "The .html to write.")
    flags.DEFINE_bool("watch", False, "Write it again whenever a run has logged something, until Ctrl-C.")
    flags.DEFINE_float("watch_seconds", 10.0, "With --watch: seconds between two looks.", 1.0, 86400.0)
    flags.DEFINE_float("image_megabytes", 4.25, "Room for pictures in the page; the last and first ones go first.", 0.0)


def open_runs(names: list[str]) -> tuple[dict[str, Path], dict[str, Curves]]:
    """Returns ({name of a run: path}, {name: its curves}) of --runs. Raises UserError for what is no run."""
    if not names or not all(names):
        given = f"={','.join(names)} has an empty name" if names else " is not given"
        raise UserError(f"--runs{given}: name run folders, separated by commas, such as runs/a,runs/b")
    # Two runs of one name are told apart by their paths.
    found = find_runs(names, "runs")
    runs = dict(zip(name_runs(list(found)), found, strict=True))
    return runs, {name: found[path] for name, path in runs.items()}


def look_at(runs: Mapping[str, Path]) -> list[tuple[str, int, int]]:
    """Returns (path, time, size) of the files of runs, by which a change shows."""
    files = [file for path in runs.values() for file in (path, *path.glob("images/*"), *map(path.joinpath, WATCHED))]
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]


def write_report(config: ConfigDict, store: PictureStore, watch: float) -> dict[str, Path]:
    """Writes the page of --out once, and returns the runs on it."""
    runs, curves = open_runs(config.runs)
    out = Path(config.out)
    write_page(out, gather(runs, curves, out, store, watch))
    return runs


def watch(config: ConfigDict, store: PictureStore) -> None:
    """Writes the page again whenever a run has changed, or another one matches --runs, until Ctrl-C. The last page
    does not load itself again."""
    seen = None
    try:
        while True:
            # The pattern again: a sweep may have started another run.
            runs, _ = open_runs(config.runs)
            if (now := look_at(runs)) != seen:
                write_report(config, store, config.watch_seconds)
                seen = now
            time.sleep(config.watch_seconds)
    finally:
        write_report(config, store, 0)


def main(config: ConfigDict) -> None:
    jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerators
    check_effects(RULES["report"], config)
    # The page's place, before runs are read.
    out = Path(config.out)
    if out.is_dir() or out.suffix.lower() not in (".html", ".htm"):
        raise UserError(
            f"--out={out}: name a .html file, such as {out / 'report.html' if out.is_dir() else 'report.html'}"
        )
    prepare_output_file(out, "out", "report.html")

    # Once, then as long as the runs go on. Pictures that were encoded are kept.
    store = PictureStore(round(config.image_megabytes * 2**20))
    write_report(config, store, config.watch_seconds if config.watch else 0)
    show_result(str(out))
    if config.watch:
        log(f"writing it again whenever a run has logged something; Ctrl-C ends this. Open {out.absolute().as_uri()}")
        watch(config, store)


if __name__ == "__main__":
    program.run_program(define_flags, main, needs_devices=False)
