"""Pictures of a report: the panels of the runs' evaluations, small enough to travel in one file."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils.base.messages import log_once, warn_once
from utils.images.decoding import BrokenImageError, open_image

QUALITY = 75  # of WebP, 0 to 100
SIDES = (1280, 900, 640, 480)  # pixels to which larger pictures are reduced: the first with which enough of them fit
MIN_EVALUATIONS = 3  # of every panel, for which there should be room


class PanelFile(NamedTuple):
    """A picture of an evaluation, RUN/images/PANEL/STEP.png."""

    panel: str
    step: int
    path: Path


def natural_order(name: str) -> list[tuple[int, float, str]]:
    """Returns a key that sorts names with the numbers in them by value: sample_cfg_4 before sample_cfg_10."""
    # Numbers before words, so that unlike names can be compared.
    key = []
    for word in name.replace("_", " ").split():
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        key.append((0, number, "") if math.isfinite(number) else (1, 0.0, word))
    return key


def find_panels(run: Path) -> list[PanelFile]:
    """Returns the pictures that a run's evaluations have drawn, in the order of panels and steps; none of a
    metrics.jsonl alone."""
    files = sorted(run.glob("images/*/*.png")) if run.is_dir() else []
    found = [PanelFile(path.parent.name, int(path.stem), path) for path in files if path.stem.isdecimal()]
    return sorted(found, key=lambda file: (natural_order(file.panel), file.step))


def rank_steps(steps: Sequence[int]) -> list[int]:
    """Returns steps in the order in which they are worth showing: the last, the first, then always the middle of the
    widest gap, so that those of any beginning are spread over all."""
    # By their places, in which evaluations are evenly spaced whatever their steps are.
    places = list(range(len(steps)))
    ranked = [places[-1], places[0]] if len(places) > 1 else places
    gaps = [(0, len(steps) - 1)]
    while gaps:
        first, last = gaps.pop(0)  # of equal halves, the widest come first
        middle = (first + last) // 2
        if middle not in (first, last):
            ranked.append(middle)
            gaps += [(first, middle), (middle, last)]
    return [steps[place] for place in ranked]


class PictureStore:
    """Pictures as data URLs, within a budget of bytes. What was encoded once is kept for the next report."""

    def __init__(self, budget: int):
        """`budget` is that of all pictures of a report, in bytes of the page."""
        self.budget = budget
        self.damaged: set[Path] = set()
        self.encoded: dict[tuple[Path, int, int, int], str] = {}

    def choose(self, runs: Mapping[str, list[PanelFile]]) -> dict[str, dict[str, dict[int, str]]]:
        """Returns {run: {panel: {step: data URL}}} of as many pictures as the budget has room for.

        Every panel of every run has its last evaluation before any has two, and so on by `rank_steps`. A line says how
        many are left out.
        """
        # In rounds: the pictures of one rank, panel by panel, so that what does not fit is missing in all runs alike.
        queues = []
        for panel in dict.fromkeys(file.panel for files in runs.values() for file in files):
            for run, files in runs.items():
                by_step = {file.step: file for file in files if file.panel == panel}
                queues.append([(run, by_step[step]) for step in rank_steps(sorted(by_step))])
        depth = max(map(len, queues), default=0)
        rounds = [[queue[place] for queue in queues if place < len(queue)] for place in range(depth)]

        self.damaged.clear()
        chosen: dict[str, dict[str, dict[int, str]]] = {run: {} for run in runs}
        used = 0
        with ThreadPoolExecutor() as pool:
            # As large as leaves room for some evaluations of every panel: one alone would not show a training.
            for side in SIDES if rounds else ():
                urls = list(pool.map(partial(self._encode, side=side), [file.path for _, file in rounds[0]]))
                if sum(len(url or "") for url in urls) <= self.budget / min(depth, MIN_EVALUATIONS):
                    break

            # A round after another, until a picture does not fit.
            for wanted in rounds:
                urls = list(pool.map(partial(self._encode, side=side), [file.path for _, file in wanted]))
                for (run, file), url in zip(wanted, urls, strict=True):
                    if url is not None and used + len(url) <= self.budget:
                        used += len(url)
                        chosen[run].setdefault(file.panel, {})[file.step] = url
                if used + max((len(url or "") for url in urls), default=0) > self.budget:
                    break

        # A line about those that are not on the page; one that is damaged has had its own.
        self._drop_unused(chosen)
        shown = sum(len(steps) for panels in chosen.values() for steps in panels.values())
        if shown < (total := sum(map(len, rounds)) - len(self.damaged)):
            log_once(f"{shown:,} of {total:,} pictures fit into the page; --image_megabytes makes room for more")
        return chosen

    def _drop_unused(self, chosen: Mapping[str, Mapping[str, Mapping[int, str]]]) -> None:
        used = {id(url) for panels in chosen.values() for steps in panels.values() for url in steps.values()}
        self.encoded = {key: url for key, url in self.encoded.items() if id(url) in used}

    def _encode(self, path: Path, side: int) -> str | None:
        """Returns a picture as a data URL, reduced to `side` pixels; None, with a warning, for one that is damaged."""
        # Known by its time and size: evaluations that are run again replace it.
        try:
            status = path.stat()
            key = (path, status.st_mtime_ns, status.st_size, side)
            if key not in self.encoded:
                self.encoded[key] = _to_url(path, side)
            return self.encoded[key]
        except (OSError, BrokenImageError) as error:
            self.damaged.add(path)
            reason = getattr(error, "strerror", None) or error
            warn_once(f"{path} cannot be read ({reason}) and is left out")
            return None


def _to_url(path: Path, side: int) -> str:
    """Returns an image as a data URL, in WebP, `side` pixels at most."""
    with open_image(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=QUALITY, method=2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
