"""Measures what each option is worth: one small DiT on Fashion-MNIST, at equal steps and at equal wall-clock time.

    python benchmarks/fashion_mnist.py --out runs/fashion_mnist.npz
    python benchmarks/ablation.py --data runs/fashion_mnist.npz

A row is the recipe with some flags, trained once: as the learning rate is constant, an earlier checkpoint is a shorter
run. The number of steps at equal time follows from step times, which are measured side by side. Samples are compared
with the training images in features of a small classifier (fashion_classifier.py); guidance is chosen on 500 samples of
another seed, among settings of at most two passes of the network a step.

Each finished cell is a line of --results, and is not made again: the same command goes on where it stopped. At the end
it prints the tables and draws a plot and samples of the same noise. There are 46 cells, a few of which coincide; they
take about three hours of one core.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
from ablation_rows import (
    BEST,
    CHOICE_SEED,
    CHOICE_STEPS,
    GUIDE_FRACTION,
    RECIPE,
    ROUND_STEPS,
    ROWS,
    SAMPLED,
    SPREAD,
    START,
    STEP_COUNTS,
    UNSEEN,
    Cell,
    parse_flags,
)
from ablation_scores import NUM_INCEPTION, Data, Scorer, Setting, climb
from ablation_tables import Tables
from absl import flags
from ml_collections import ConfigDict

from utils.base.messages import UserError, log
from utils.base.processes import StopRequest
from utils.data.batches import read_ahead, to_devices
from utils.flags import program
from utils.flags.definitions import define_path
from utils.runs.config import RunConfig
from utils.runs.opening import load_generator
from utils.sampling.generator import ImageGenerator
from utils.training.build import build_run, compile_steps, make_state
from utils.training.configure import make_config
from utils.training.loop import train


def define_flags() -> None:
    define_path("data", "runs/fashion_mnist.npz", "Images, by fashion_mnist.py.")
    define_path("out", "runs/ablation", "Folder of the trainings.")
    define_path("results", str(common.ROOT / "docs" / "ablation.jsonl"), "File of the finished cells.")
    flags.DEFINE_list("rows", [], "Rows, by name; default: all.")
    flags.DEFINE_string("best", BEST, "Flags of the best combination.")
    flags.DEFINE_integer("train_steps", 3000, "Steps of the recipe; all have its steps or its time.", lower_bound=1)
    flags.DEFINE_integer("num_samples", 2000, "Samples of a cell.", lower_bound=10)
    flags.DEFINE_integer("num_choice", 500, "Samples by which guidance is chosen.", lower_bound=10)
    flags.DEFINE_integer("num_authpct", 1000, "Samples that are compared with the training images.", lower_bound=2)
    flags.DEFINE_integer("seeds", 3, "Trainings of the recipe and of the best row.", lower_bound=1)
    flags.DEFINE_integer("rounds", 15, "Measurements of a step's time; their median counts.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Steps in a measurement.", lower_bound=1)
    flags.DEFINE_integer("inception", 1, "1: Inception's FID and KID of the first and the best row.", 0, 1)
    flags.DEFINE_float("time_budget", None, "Minutes, after which no cell is begun.", lower_bound=0)
    flags.DEFINE_integer("only_show", 0, "1: makes no cell, and shows those that are there.", 0, 1)


def make_key(*parts: Any) -> str:
    """Returns a short hash of JSON values, by which --results finds a line again."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


class Ablation:
    """The cells of the ablation: which there are, which are finished, and how one is trained and scored."""

    def __init__(self, config: ConfigDict, stop: StopRequest | None = None):
        self.config = config
        self.stop = stop
        self.started = time.monotonic()
        self.rows = {**ROWS, "best": ROWS["best"]._replace(flags=config.best)}
        self.rows["best + autoguidance"] = ROWS["best + autoguidance"]._replace(flags=config.best)
        self.names = common.choose(self.rows, config.rows)
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.results = Path(config.results)
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.exists() else []
        self.known: dict[str, dict[str, Any]] = {line["key"]: line for line in map(json.loads, lines)}
        self.scorer = Scorer(Data.read(Path(config.data)), self.out)
        self.failures: dict[str, str] = {}  # why rows are left out
        self.works: dict[str, Callable] = {}  # steps of the recipe, beside which others are measured

    def record(self, line: dict[str, Any]) -> dict[str, Any]:
        """Adds a line to --results, and returns it."""
        self.known[line["key"]] = line
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def is_over(self) -> bool:
        """Returns whether to begin no other cell: the time is over, or a signal has come."""
        budget = self.config.time_budget
        is_late = budget is not None and time.monotonic() - self.started > 60 * budget
        return is_late or (self.stop is not None and self.stop.signal is not None)

    # --- Cells ---

    def cells(self) -> Iterator[Cell]:
        """Yields the cells, the most important ones first."""
        timed = [name for name in self.names if not self.rows[name].is_only_at_equal_steps]
        first = [name for name in timed if name in SPREAD]
        for name in timed:
            yield Cell(name, 0, "time")
        for name, seed in ((name, seed) for seed in range(1, self.config.seeds) for name in first):
            yield Cell(name, seed, "time")
        for name in self.names:
            yield Cell(name, 0, "steps")
        if self.config.inception:
            for name in (name for name in self.names if name in SAMPLED):
                yield Cell(name, 0, "inception")
        for name, seed in ((name, seed) for seed in range(1, self.config.seeds) for name in first):
            yield Cell(name, seed, "steps")

    def words(self, name: str) -> str:
        """Returns the flags of a training. Later ones win, as on a command line."""
        return " ".join([*RECIPE.split(), *self.rows[name].flags.split()])

    def steps_of(self, cell: Cell) -> int:
        """Returns the steps of a cell: the recipe's, or as many as take its time."""
        if cell.budget == "steps":
            return self.config.train_steps
        steps = self.config.train_steps / self.ratio(cell.row)
        return max(1, round(steps / ROUND_STEPS)) * ROUND_STEPS if steps > ROUND_STEPS else max(1, round(steps))

    def key_of(self, cell: Cell) -> str:
        config = self.config
        row = self.rows[cell.row]
        counts = (config.num_samples, config.num_choice, config.num_authpct)
        parts = (self.words(cell.row), dict(row.axes), row.is_guided_by_itself, cell.seed, self.steps_of(cell), counts)
        return make_key("inception" if cell.budget == "inception" else "cell", *parts)

    def find(self, cell: Cell) -> dict[str, Any] | None:
        return self.known.get(self.key_of(cell)) if self.has_ratio(cell) else None

    def make(self, cell: Cell) -> dict[str, Any] | None:
        """Returns the line of a cell: from --results, or made now; None where it was stopped before its scores."""
        key = self.key_of(cell)
        if key in self.known:
            return self.known[key]
        self.train(cell.row, cell.seed)
        if self.is_over():
            return None
        compute = self.score_by_inception if cell.budget == "inception" else self.score
        started = time.monotonic()
        line = {"key": key, "kind": compute.__name__, "row": cell.row, "flags": self.rows[cell.row].flags}
        line |= {"seed": cell.seed, "steps": self.steps_of(cell), **compute(cell)}
        return self.record(line | {"score_seconds": round(time.monotonic() - started, 1)})

    def make_config(self, name: str, settings: dict[str, Any]) -> RunConfig:
        given = parse_flags(f"{self.words(name)} {UNSEEN}")
        return make_config({**given, "dataset_name": f"npz:{self.config.data}", **settings})

    # --- Step times ---

    def speed_key(self, name: str) -> str:
        return make_key("speed", self.words(name))

    def has_ratio(self, cell: Cell) -> bool:
        return cell.budget == "steps" or self.speed_key(cell.row) in self.known

    def ratio(self, name: str) -> float:
        """Returns a row's seconds of a step over those of the recipe."""
        return self.known[self.speed_key(name)]["ratio"]

    def measure_speed(self, name: str) -> None:
        """Measures the steps of a row beside the recipe's, batches and all, unless they are known."""
        if self.speed_key(name) in self.known:
            return
        if "recipe" not in self.works:
            self.works["recipe"] = self.make_work("recipe")
        is_recipe = self.words(name) == self.words("recipe")
        works = {"recipe": self.works["recipe"]} | ({} if is_recipe else {name: self.make_work(name)})
        seconds = common.measure_interleaved(works, self.config.rounds, self.config.repeats)
        ratio = 1.0 if is_recipe else seconds[name] / seconds["recipe"]
        batch = parse_flags(RECIPE)["batch_size"]
        line = {"key": self.speed_key(name), "kind": "speed", "row": name, "flags": self.rows[name].flags}
        self.record(line | {"ratio": ratio, "recipe_images_per_second": batch / seconds["recipe"]})

    def make_work(self, name: str) -> Callable[[], Any]:
        """Returns a function that reads a batch and trains a step of a row, as the loop of training does."""
        run = build_run(self.make_config(name, {"seed": 0, "save_dir": str(self.folder(name, 0))}))
        if run.coupling is not None:  # potentials are fitted once: the training finds them in its folder
            run.folder.mkdir(parents=True, exist_ok=True)
            run.coupling.prepare(run.folder, is_new=True)
        step, _ = compile_steps(run, run.state_structs)
        batches = read_ahead(to_devices(run.training_batches(), run.mesh))
        state = make_state(run)

        def work():
            nonlocal state
            batch, _ = next(batches)
            state, metrics = step(state, batch)
            return metrics

        return work

    # --- Training ---

    def folder(self, name: str, seed: int) -> Path:
        name = self.rows[name].trained_as or name
        return self.out / f"{''.join(c if c.isalnum() else '_' for c in name)}_{make_key(self.words(name))[:6]}_{seed}"

    def checkpoint(self, cell: Cell) -> Path:
        return self.folder(cell.row, cell.seed) / "checkpoints" / str(self.steps_of(cell))

    def train(self, name: str, seed: int) -> None:
        """Trains a row for its steps of equal time and for the recipe's, whichever are more, with checkpoints at both,
        and at every quarter of the recipe's, from which guides are taken."""
        folder = self.folder(name, seed)
        steps = self.config.train_steps
        every = max(1, steps // GUIDE_FRACTION)
        budgets = ["steps"] if self.rows[name].is_only_at_equal_steps else ["steps", "time"]
        for target in sorted({self.steps_of(Cell(name, seed, budget)) for budget in budgets}):
            if (folder / "checkpoints" / str(target)).exists():
                continue
            log(f"training {name}, seed {seed}, to step {target} ...")
            settings = {"seed": seed, "max_steps": target, "save_interval": every, "save_dir": str(folder)}
            train(build_run(self.make_config(name, settings)), self.stop)

    # --- Scores ---

    def open(self, cell: Cell, params: str, guide: str | None, seed: int = 0) -> ImageGenerator:
        """Returns the generator of a cell's checkpoint."""
        return load_generator(self.checkpoint(cell), params=params, guide=guide, seed=seed, label_mode="balanced")

    def guide_of(self, cell: Cell) -> dict[str, str]:
        """Returns {"guide": the checkpoint that guides samples of a cell}, where one does."""
        if not self.rows[cell.row].is_guided_by_itself:
            return {}
        step = max(1, self.config.train_steps // GUIDE_FRACTION)
        return {"guide": str(self.folder(cell.row, cell.seed) / "checkpoints" / str(step))}

    def choose(self, cell: Cell) -> tuple[dict[str, Any], float]:
        """Returns the settings of a row's samples with the smallest Fréchet distance, and that distance.

        They are chosen once for each row, on --num_choice samples of its first cell.
        """
        row = self.rows[cell.row]
        first = self.find(Cell(cell.row, 0, "steps" if row.is_only_at_equal_steps else "time"))
        if first is not None:
            return first["setting"] | self.guide_of(cell), first["fd_choice"]
        axes = {**row.axes, **{name: (value,) for name, value in self.guide_of(cell).items()}}

        open_once = functools.cache(lambda params, guide: self.open(cell, params, guide, CHOICE_SEED))

        def measure(values: dict[str, Any]) -> float:
            setting = Setting.of(values)
            generator = open_once(setting.params, setting.guide)
            scores, _ = self.scorer.score(generator, setting.make_sampler(CHOICE_STEPS), self.config.num_choice)
            log(f"{cell.row}, {values}: {scores['fd_fashion']:.2f}")
            return scores["fd_fashion"]

        return climb(axes, {name: START.get(name, values[0]) for name, values in axes.items()}, measure)

    def score(self, cell: Cell) -> dict[str, Any]:
        """Returns the scores of a cell by number of steps, with its best guidance and with none."""
        config = self.config
        values, of_choice = self.choose(cell)
        setting = Setting.of(values)
        generator = self.open(cell, setting.params, setting.guide)
        by_steps = {}
        for num_steps in STEP_COUNTS:
            scores, images = self.scorer.score(generator, setting.make_sampler(num_steps), config.num_samples)
            by_steps[str(num_steps)] = scores
            if num_steps == max(STEP_COUNTS):
                authpct = self.scorer.authpct(images[: config.num_authpct])
        plain = Setting().make_sampler(max(STEP_COUNTS))
        unguided, _ = self.scorer.score(generator, plain, config.num_samples)
        passes = generator.count_passes(setting.make_sampler(max(STEP_COUNTS))) / max(STEP_COUNTS)
        shown = {name: value for name, value in values.items() if name != "guide"}
        line = {"setting": shown, "passes": passes, "fd_choice": of_choice, "scores": by_steps}
        loss = self.scorer.velocity_loss(generator, min(config.num_samples, len(self.scorer.data.test_images)))
        return line | {"unguided": unguided, "loss": loss, "authpct": authpct}

    def score_by_inception(self, cell: Cell) -> dict[str, Any]:
        """Returns Inception's scores at the most steps, with the guidance that the cell at equal time has."""
        line = self.find(cell._replace(budget="time"))
        if line is None:
            raise UserError(
                f"{cell.row}: Inception's scores take the guidance of its cell at equal time, which comes first"
            )
        setting = Setting.of(line["setting"])
        sampler = setting.make_sampler(max(STEP_COUNTS))
        count = min(NUM_INCEPTION["samples"], self.config.num_samples)
        scores, _ = self.scorer.score(self.open(cell, setting.params, setting.guide), sampler, count, "inception")
        return {"setting": dict(setting.sampler), "scores": {str(max(STEP_COUNTS)): scores}}

    def score_real(self) -> dict[str, Any]:
        """Returns the scores of test images: the floor of those of samples."""
        count = self.config.num_samples
        key = make_key("real", count, self.config.num_authpct)
        if key not in self.known:
            data = self.scorer.data
            scores = self.scorer.score_images(data.test_images[:count], data.test_labels[:count])
            authpct = self.scorer.authpct(data.test_images[: self.config.num_authpct])
            self.record({"key": key, "kind": "real", "scores": {str(max(STEP_COUNTS)): scores}, "authpct": authpct})
        return self.known[key]

    def leave_out(self, name: str, error: Exception) -> None:
        self.failures[name] = str(error).strip().splitlines()[-1]
        log(f"{name} is left out: {self.failures[name]}")


def make_cells(ablation: Ablation) -> None:
    """Makes the cells one after the other, until all are there, the time is over or a signal comes."""
    ablation.score_real()
    cells = list(ablation.cells())
    for number, cell in enumerate(cells, 1):
        if ablation.is_over():
            log("stopped: the same command goes on")
            return
        if cell.row in ablation.failures:
            continue
        try:
            if not ablation.rows[cell.row].is_only_at_equal_steps:
                ablation.measure_speed(cell.row)
            line = ablation.make(cell)
        except UserError as error:
            ablation.leave_out(cell.row, error)
            continue
        if line is not None:
            minutes = (time.monotonic() - ablation.started) / 60
            log(f"{number} of {len(cells)} cells, {minutes:.0f} min: {cell}, {line['scores'][str(max(STEP_COUNTS))]}")


def main(config: ConfigDict) -> None:
    ablation = Ablation(config, None if config.only_show else StopRequest())
    if not config.only_show:
        make_cells(ablation)
    tables = Tables(ablation)
    tables.show()
    tables.draw()


if __name__ == "__main__":
    program.run_program(define_flags, main)
