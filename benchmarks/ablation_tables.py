"""The finished cells of the ablation as Markdown tables and figures."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ablation_rows import PATCHES, SAMPLED, STEP_COUNTS, Cell
from ablation_scores import NUM_INCEPTION, Setting

from utils.images import plotting

MOST = str(max(STEP_COUNTS))
MAX_CURVES = 8  # in the plot: the recipe's, and those of the rows with the smallest distances
TITLES = {
    "cfg_scale": "guidance",
    "inner_scale": "inner",
    "guide_scale": "by itself",
    "params": "",
    "cfg_zero_fraction": "zero steps",
}

Line = Mapping[str, Any]  # of a finished cell


def distance_at(num_steps: int | str) -> Callable[[Line], float]:
    return lambda line: line["scores"][str(num_steps)]["fd_fashion"]


# {title: (number of a line, its format)}; the scores of test images lack what they have no number for.
COLUMNS: dict[str, tuple[Callable[[Line], float], str]] = {
    **{f"FD, {count}": (distance_at(count), ".1f") for count in STEP_COUNTS},
    "unguided": (lambda line: line["unguided"]["fd_fashion"], ".1f"),
    "KD": (lambda line: line["scores"][MOST]["kd_fashion"], ".3f"),
    "agrees": (lambda line: line["scores"][MOST]["agreement"], ".1%"),
    "loss": (lambda line: line["loss"], ".4f"),
    "AuthPct": (lambda line: line["authpct"], ".1f"),
    "images/s": (lambda line: line["images_per_second"], ",.0f"),
}


def describe(setting: Mapping[str, Any]) -> str:
    """Returns settings of samples in words, such as `guidance 2, inner 1.3`."""
    shown = [f"{TITLES[name]} {value}".strip() for name, value in setting.items() if name in TITLES and value != 1]
    return ", ".join(shown) or "none"


def mean_of(lines: Sequence[Line], read: Callable[[Line], float], form: str) -> str:
    """Returns the mean of a number over trainings, with its range where values differ; empty where lines lack it."""
    try:
        values = [read(line) for line in lines]
    except KeyError:
        return ""
    text = format(statistics.mean(values), form)
    return (
        text if min(values) == max(values) else f"{text} ({format(min(values), form)} to {format(max(values), form)})"
    )


def print_table(rows: Sequence[Sequence[str]], num_texts: int = 1) -> None:
    """Prints rows, the first of which has the titles, as Markdown; columns after the first `num_texts` are numbers."""
    title, *others = rows
    rules = ["---"] * num_texts + ["---:"] * (len(title) - num_texts)
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in (title, rules, *others)))


class Tables:
    """The finished cells of an ablation, as its tables and figures show them."""

    def __init__(self, ablation: Any):
        self.ablation = ablation

    def lines(self, name: str, budget: str) -> list[Line]:
        """Returns the finished cells of a row, one for each seed, with its speed."""
        cells = (Cell(name, seed, budget) for seed in range(self.ablation.config.seeds))
        own, recipe = (self.ablation.known.get(self.ablation.speed_key(each)) for each in (name, "recipe"))
        speed = {}
        if own is not None and recipe is not None:
            speed = {"images_per_second": recipe["recipe_images_per_second"] / own["ratio"]}
        return [line | speed for line in map(self.ablation.find, cells) if line is not None]

    def show(self) -> None:
        for budget in ("time", "steps"):
            rows = [["row", "settings", "passes a step", "trained", *COLUMNS]]
            for name in self.ablation.names:
                lines = self.lines(name, budget)
                if lines and not (budget == "time" and self.ablation.rows[name].is_only_at_equal_steps):
                    first = [name, describe(lines[0]["setting"]), f"{lines[0]['passes']:g}", f"{lines[0]['steps']:,}"]
                    rows.append(first + [mean_of(lines, *column) for column in COLUMNS.values()])
            real = self.ablation.score_real()
            rows.append(["test images", "", "", "", *(mean_of([real], *column) for column in COLUMNS.values())])
            print(f"\nAt equal {budget}:")
            print_table(rows, num_texts=2)
        self._show_patches()
        self._show_inception()
        for name, reason in self.ablation.failures.items():
            print(f"\n{name} is left out: {reason}")

    def _show_patches(self) -> None:
        rows = [["patch", "velocity", "data"]]
        for patch, names in PATCHES.items():
            found = [self.lines(name, "steps") for name in names]
            if all(found):
                rows.append([str(patch), *(mean_of(lines, distance_at(MOST), ".1f") for lines in found)])
        print_table(rows)

    def _show_inception(self) -> None:
        rows = [[f"{NUM_INCEPTION['samples']:,} samples", "FID", "KID"]]
        for name in SAMPLED:
            for line in self.lines(name, "inception"):
                scores = line["scores"][MOST]
                rows.append([name, f"{scores['fid']:.1f}", f"{scores['kid']:.4f} ± {scores['kid_error']:.4f}"])
        print_table(rows)

    def draw(self) -> None:
        """Draws distances by number of steps of the best rows, and samples of the same noise, beside --results."""
        found = {name: lines[0] for name in self.ablation.names if (lines := self.lines(name, "time"))}
        if not found:
            return
        path = self.ablation.results.with_suffix("")
        nearest = sorted(found, key=lambda name: (name != "recipe", distance_at(MOST)(found[name])))[:MAX_CURVES]
        curves = {name: [(n, distance_at(n)(found[name])) for n in STEP_COUNTS] for name in nearest}
        plotting.curves(curves, "steps", "Fréchet distance").savefig(path.with_suffix(".png"))

        # One of each class, where the trainings are still there.
        images = {}
        for name, line in found.items():
            cell = Cell(name, line["seed"], "time")
            if self.ablation.checkpoint(cell).exists():
                setting = Setting.of(line["setting"] | self.ablation.guide_of(cell))
                generator = self.ablation.open(cell, setting.params, setting.guide)
                (batch,) = generator.generate(setting.make_sampler(max(STEP_COUNTS)), 10, 10, np.arange(10))
                images[name] = batch.to_host()[0]
        if images:
            figure = plotting.image_table(np.stack(list(images.values())), row_titles=list(images))
            figure.savefig(path.with_name(f"{path.name}_samples.png"))
