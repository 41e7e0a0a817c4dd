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
from utils.base.messages import UserError, log, rewording, show_result
from utils.flags import program, reading
from utils.flags.definitions import define_path, define_quiet_flag
from utils.flags.effects import RULES, check_effects
from utils.flags.help import topic
from utils.images.films import MAX_SECONDS, MIN_SECONDS, film_of_files
from utils.images.plotting import MAX_SCALE, MIN_SCALE
from utils.report.data import gather
from utils.report.images import PictureStore, find_panels
from utils.report.page import write_page
from utils.runs.comparison import Curves, find_runs
from utils.trackers.trackers import name_runs

WATCHED = ("metrics.jsonl", "fid.json", "config.json")
FILM_SUFFIXES = (".webp", ".gif", ".mp4")


def define_flags() -> None:
    flags.DEFINE_list(
        "runs", [], "Run folders or metrics.jsonl files, separated by commas; * stands for any characters."
    )
    define_path("out", "report.html", "The .html to write; with --film a .webp, .gif or .mp4.")
    define_quiet_flag()
    flags.DEFINE_bool("watch", False, "Write it again whenever a run has logged something, until Ctrl-C.")
    flags.DEFINE_float("watch_seconds", 10.0, "With --watch: seconds between two looks.", 1.0, 86400.0)
    flags.DEFINE_float("image_megabytes", 4.25, "Room for pictures in the page; the last and first ones go first.", 0.0)
    with topic("Films over the training"):
        flags.DEFINE_list(
            "film", [], "Instead of a page, films of these panels, a frame a step; default: RUN/films/PANEL.webp."
        )
        flags.DEFINE_float("film_seconds", 5.0, "Duration of a film.", MIN_SECONDS, MAX_SECONDS)
        flags.DEFINE_float("scale", 1.0, "Size of the pictures in films: a factor.", MIN_SCALE, MAX_SCALE)


def open_runs(names: list[str]) -> tuple[dict[str, Path], dict[str, Curves]]:
    """Returns ({name of a run: path}, {name: its curves}) of --runs. Raises UserError for what is no run."""
    if not names or not all(names):
        given = f"={','.join(names)} has an empty name" if names else " is not given"
        raise UserError(f"--runs{given}: name run folders, separated by commas, such as runs/a,runs/b")
    # Two runs of one name are told apart by their paths.
    found = find_runs(names, "runs", needs_images=True)
    runs = dict(zip(name_runs(list(found)), found, strict=True))
    return runs, {name: found[path] for name, path in runs.items()}


def look_at(runs: Mapping[str, Path]) -> list[tuple[str, int, int]]:
    """Returns (path, time, size) of the files of runs, by which a change shows."""
    # A folder's time changes when a picture is added to it.
    files = [file for path in runs.values() for file in (path, *path.glob("images/*"), *map(path.joinpath, WATCHED))]
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]


def write_report(config: ConfigDict, store: PictureStore, watch: float) -> None:
    """Writes the page of --out once."""
    runs, curves = open_runs(config.runs)
    out = Path(config.out)
    write_page(out, gather(runs, curves, out, store, watch))


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
                if seen is None:
                    show_result(config.out)
                seen = now
            time.sleep(config.watch_seconds)
    finally:
        write_report(config, store, 0)


def write_films(config: ConfigDict) -> None:
    """Writes a film of every panel of --film of every run, over the steps of its training."""
    # The place first: of one film it may be anywhere.
    out = reading.prepare_out(config.out, FILM_SUFFIXES, "film.webp") if reading.is_explicit("out") else None
    runs, _ = open_runs(config.runs)
    wanted = [(run, path, panel) for run, path in runs.items() for panel in dict.fromkeys(config.film)]
    if out is not None and len(wanted) > 1:
        raise UserError(f"--out={out} holds one film, but there are {len(wanted)}; name one run and one panel")

    # Panels that a run has not drawn are named, with those that it has, before any film is made.
    files = {}
    for run, path, panel in wanted:
        found = find_panels(path)
        files[run, panel] = [file for file in found if file.panel == panel]
        if not files[run, panel]:
            panels = ", ".join(dict.fromkeys(file.panel for file in found)) or "none"
            raise UserError(f"--film={panel}: {run} has no such panel; it has {panels}")

    # Each in the folder of its run, or at --out.
    for run, path, panel in wanted:
        place = out or path / "films" / f"{panel}.webp"
        prepare_output_file(place, "out", "film.webp")
        frames = [file.path for file in files[run, panel]]
        titles = [f"{run}, step {file.step:,}" for file in files[run, panel]]
        file_format = place.suffix.lower().removeprefix(".")
        with rewording({"--film_format=mp4": f"--out={place}", "--film_format webp": "--out film.webp"}):
            film_of_files(frames, titles, place, file_format, config.film_seconds, config.scale)
        show_result(str(place))


def main(config: ConfigDict) -> None:
    jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerators
    check_effects(RULES["report"], config)
    if config.film:
        return write_films(config)

    # The page's place, before runs are read.
    out = reading.prepare_out(config.out, (".html",), "report.html")

    # Once, then as long as the runs go on. Pictures that were encoded are kept.
    store = PictureStore(round(config.image_megabytes * 2**20))
    if config.watch:
        log(f"written whenever a run has logged something, until Ctrl-C; open {out.absolute().as_uri()}")
        return watch(config, store)
    write_report(config, store, 0)
    show_result(str(out))


if __name__ == "__main__":
    program.run_program(define_flags, main, needs_devices=False)
