"""The objectives on one network, one data order and one evaluation: digits, by number of steps.

    python benchmarks/objectives.py --out runs/objectives

Each model is trained for the demo's budget, then scored against the digits. With several --seeds, the later ones are
scored in one step alone. What is finished in OUT is not made again, so that the same command goes on where it stopped;
at the end it prints the tables, and writes a plot and images of the same noise.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from recognise_digits import recognised_fraction

from utils.flags import program
from utils.flags.definitions import define_path
from utils.images import plotting
from utils.runs.opening import load_generator
from utils.sampling.solvers import SamplerConfig

NETWORK = """
    --model.hidden_size 128 --model.depth 4 --model.num_heads 4 --model.mlp_ratio 4 --model.patch_size 2
    --model.num_classes 10
"""
COMMON = """
    --use_stable_vae 0 --batch_size 128 --model.lr 1e-3 --eval_interval 0 --log_interval 100 --model.dtype float32
    --wandb.mode disabled
"""
FLOW = "flow matching"
STATISTICS = common.ROOT / "data" / "fid_stats_digits.npz"


class Recipe(NamedTuple):
    """How a model is trained, and at which step counts it is scored: with guidance 2 where it is not baked in."""

    flags: str
    steps: tuple[int, ...]
    is_guided: bool = False
    fraction: float = 1.0  # of the demo's steps
    solver: str = "euler"


# PAIRS and FLOW stand for the pairs and the run of flow matching.
RECIPES = {
    FLOW: Recipe("--dataset_name digits --model.target_update_rate 0.998", (64, 16, 4, 1), is_guided=True),
    "diffusion": Recipe(
        "--dataset_name digits --model.target_update_rate 0.998 --objective.name diffusion",
        (64, 16, 4, 1),
        is_guided=True,
        solver="ddim",
    ),
    "MeanFlow": Recipe("--dataset_name digits --model.target_update_rate 0.998 --objective.name mean_flow", (16, 4, 1)),
    "reflow": Recipe("--dataset_name pairs:PAIRS --load_dir FLOW --model.target_update_rate 0.998", (16, 4, 1)),
    "distilled": Recipe(
        "--dataset_name pairs:PAIRS --load_dir FLOW --model.target_update_rate 0.998 --objective.distill 1", (1,)
    ),
    "shortcut": Recipe(
        "--dataset_name digits --model.target_update_rate 0.99 --objective.name shortcut --objective.finest_steps 16 "
        "--objective.bootstrap_every 4 --objective.bootstrap_guidance 2",
        (16, 4, 1),
    ),
    "MeanFlow from the flow": Recipe(
        "--dataset_name digits --load_dir FLOW --model.target_update_rate 0.99 --objective.name mean_flow",
        (4, 1),
        fraction=1 / 3,
    ),
}


class Cell(NamedTuple):
    """A model that one command scores at these step counts, with guidance 2 or none."""

    name: str
    seed: int
    steps: tuple[int, ...]
    is_guided: bool


def define_flags() -> None:
    define_path("out", "runs/objectives", "Folder for runs, pairs and results.")
    flags.DEFINE_list("objectives", list(RECIPES), "Which, by name.")
    flags.DEFINE_integer("train_steps", 1500, "Steps of each training.", lower_bound=1)
    flags.DEFINE_integer("num_samples", 600, "Samples of a cell.", lower_bound=2)
    flags.DEFINE_integer("num_pairs", 4864, "Pairs of reflow.", lower_bound=100)
    flags.DEFINE_integer("seeds", 1, "Trainings of each model; the first is scored at all step counts.", lower_bound=1)


def run(program: str, *args: object) -> None:
    command = [sys.executable, str(common.ROOT / program), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} {' '.join(map(str, args))}\n{done.stderr[-2000:]}")


class Comparison:
    def __init__(self, config: ConfigDict):
        self.config = config
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"{name.replace(' ', '_')}_{seed}"

    def cells(self) -> Iterator[Cell]:
        """In the order in which they are made."""
        for seed in range(self.config.seeds):
            for name in self.config.objectives:
                recipe = RECIPES[name]
                yield Cell(name, seed, (1,) if seed else recipe.steps, recipe.is_guided)
                if recipe.is_guided and not seed:
                    yield Cell(name, seed, (64, 1), is_guided=False)

    # --- Training ---

    def train(self, name: str, seed: int) -> None:
        recipe = RECIPES[name]
        folder = self.folder(name, seed)
        steps = round(recipe.fraction * self.config.train_steps)
        if (folder / "checkpoints" / str(steps)).exists():
            return
        words = recipe.flags
        if "PAIRS" in words:
            words = words.replace("PAIRS", str(self.make_pairs(seed)))
        if "FLOW" in words:
            words = words.replace("FLOW", str(self.folder(FLOW, seed)))
        else:
            words += NETWORK
        words += COMMON
        run("train_flow.py", *words.split(), "--seed", seed, "--max_steps", steps, "--save_dir", folder)

    def make_pairs(self, seed: int) -> Path:
        """The pairs of a seed's flow, made once: another call continues what is there."""
        pairs = self.out / f"pairs_{seed}"
        words = f"--num_pairs {self.config.num_pairs} --cfg_scale 2 --denoise_timesteps 64 --batch_size 256"
        run("make_pairs.py", "--load_dir", self.folder(FLOW, seed), *words.split(), "--out", pairs)
        return pairs

    # --- Scores ---

    def score(self, cell: Cell) -> list[dict]:
        """A row for each of the cell's step counts."""
        recipe = RECIPES[cell.name]
        folder = self.folder(cell.name, cell.seed)
        path = folder / f"scores{'_guided' * cell.is_guided}.json"
        if path.exists():
            return json.loads(path.read_bytes())
        run(
            "eval_fid.py", "--load_dir", folder, "--fid_stats", STATISTICS, "--num_samples", self.config.num_samples,
            "--denoise_timesteps", ",".join(map(str, cell.steps)), "--cfg_scale", 2 if cell.is_guided else 1,
            "--labels", "balanced", "--solver", recipe.solver, "--json", folder / "rows.json",
            "--wandb.mode", "disabled",
        )  # fmt: skip
        rows = json.loads((folder / "rows.json").read_bytes())
        generator = load_generator(folder, label_mode="balanced")
        count = self.config.num_samples
        for row in rows:
            row |= {"objective": cell.name, "train_seed": cell.seed}
            sampler = SamplerConfig(row["num_steps"], row["cfg_scale"], solver=recipe.solver)
            (batch,) = generator.generate(sampler, count, count)
            row["recognised"] = recognised_fraction(*batch.to_host())
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
        return rows

    # --- What is shown ---

    def show(self, rows: list[dict]) -> None:
        first = [row for row in rows if row["train_seed"] == 0]
        print("| objective | steps | guidance | FID | KID | MIND | straightness | recognised |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        for row in first:
            scale = "none" if row["cfg_scale"] is None else f"{row['cfg_scale']:g}"
            print(
                f"| {row['objective']} | {row['num_steps']} | {scale} | {row['fid']:.1f} | {row['kid']:.4f} | "
                f"{row['mind']:.1f} | {row['straightness']:.4f} | {row['recognised']:.1%} |"
            )
        print("\n| in one step | FID, mean | of the seeds |\n|---|---:|---|")
        for name in self.config.objectives:
            values = [row["fid"] for row in rows if _is_one_step(row) and row["objective"] == name]
            print(f"| {name} | {statistics.mean(values):.1f} | {', '.join(f'{value:.1f}' for value in values)} |")
        curves = {}
        for row in first:
            if row["cfg_scale"] is not None or not RECIPES[row["objective"]].is_guided:
                curves.setdefault(row["objective"], []).append((row["num_steps"], row["fid"]))
        plotting.curves(curves, "steps", "FID, 600 samples").savefig(self.out / "objectives.png")
        self.draw_images()

    def draw_images(self) -> None:
        """One row of ten digits for each model and few steps, from the same noise."""
        images = []
        titles = []
        for name in self.config.objectives:
            recipe = RECIPES[name]
            generator = load_generator(self.folder(name, 0))
            for num_steps in (count for count in recipe.steps if count in (1, 64)):
                guidance = 2.0 if recipe.is_guided else None
                sampler = {"num_steps": num_steps, "cfg_scale": guidance, "solver": recipe.solver}
                images.append(generator.sample(range(10), **sampler))
                titles.append(f"{name}, {num_steps} step{'s' * (num_steps > 1)}")
        plotting.image_table(np.stack(images), row_titles=titles).savefig(self.out / "objectives_samples.png")


def _is_one_step(row: dict) -> bool:
    """Whether a row is of one step, with the guidance with which its objective is compared."""
    return row["num_steps"] == 1 and (row["cfg_scale"] is not None or not RECIPES[row["objective"]].is_guided)


def main(config: ConfigDict) -> None:
    comparison = Comparison(config)
    rows = []
    for cell in comparison.cells():
        comparison.train(cell.name, cell.seed)
        rows += comparison.score(cell)
        print(
            f"{cell.name}, seed {cell.seed}: FID {[round(row['fid'], 1) for row in rows[-len(cell.steps) :]]}",
            flush=True,
        )
    comparison.show(rows)


if __name__ == "__main__":
    program.run_program(define_flags, main)
