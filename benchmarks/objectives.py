"""The objectives on one network, one data order and one evaluation: digits, by number of steps.

    python benchmarks/objectives.py --out runs/objectives

Each model is trained for the demo's budget, then scored at several step counts against the digits. Every finished cell
is kept in OUT, so that the same command goes on where it stopped, and the tables are printed again at the end.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import common  # noqa: F401 (puts the project on the path)
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from recognise_digits import recognised_fraction

from utils import cli

ROOT = Path(__file__).resolve().parents[1]
NETWORK = """
    --model.hidden_size 128 --model.depth 4 --model.num_heads 4 --model.mlp_ratio 4 --model.patch_size 2
    --model.num_classes 10
"""
COMMON = """
    --use_stable_vae 0 --batch_size 128 --model.lr 1e-3 --eval_interval 0 --log_interval 100 --model.dtype float32
"""


class Recipe(NamedTuple):
    """How a model is trained, and scored: at these step counts, with guidance 2 where it is not baked in."""

    flags: str
    steps: tuple[int, ...]
    is_guided: bool = True
    share: float = 1.0  # of the demo's steps
    solver: str = "euler"


RECIPES = {
    "flow matching": Recipe("--dataset_name digits --model.target_update_rate 0.998", (64, 16, 4, 1)),
    "diffusion": Recipe(
        "--dataset_name digits --model.target_update_rate 0.998 --objective.name diffusion",
        (64, 16, 4, 1),
        solver="ddim",
    ),
    "shortcut": Recipe(
        "--dataset_name digits --model.target_update_rate 0.99 --objective.name shortcut --objective.finest_steps 16 "
        "--objective.bootstrap_every 4 --objective.bootstrap_guidance 2",
        (16, 4, 1),
        is_guided=False,
    ),
    "MeanFlow": Recipe(
        "--dataset_name digits --model.target_update_rate 0.998 --objective.name mean_flow", (4, 1), is_guided=False
    ),
    "reflow": Recipe(
        "--dataset_name pairs:PAIRS --load_dir FLOW --model.target_update_rate 0.998", (4, 1), is_guided=False
    ),
    "distilled": Recipe(
        "--dataset_name pairs:PAIRS --load_dir FLOW --model.target_update_rate 0.998 --objective.distill 1",
        (1,),
        is_guided=False,
    ),
    "MeanFlow from the flow": Recipe(
        "--dataset_name digits --load_dir FLOW --model.target_update_rate 0.99 --objective.name mean_flow",
        (4, 1),
        is_guided=False,
        share=1 / 3,
    ),
}


def define_flags() -> None:
    cli.define_path("out", "runs/objectives", "Folder for runs, pairs and results.")
    flags.DEFINE_list("objectives", list(RECIPES), "Which, by name.")
    flags.DEFINE_integer("train_steps", 1500, "Steps of each training.", lower_bound=1)
    flags.DEFINE_integer("num_samples", 600, "Samples of a cell.", lower_bound=2)
    flags.DEFINE_integer("num_pairs", 4864, "Pairs of reflow.", lower_bound=100)
    flags.DEFINE_integer("seed", 0, "Seed of training and samples.", lower_bound=0)


def run(program: str, *args: object) -> None:
    command = [sys.executable, str(ROOT / program), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} {' '.join(map(str, args))}\n{done.stderr[-2000:]}")


class Comparison:
    def __init__(self, config: ConfigDict):
        self.config, self.out = config, Path(config.out)
        self.statistics = self.out / "digits.npz"
        self.results = self.out / "results.json"
        self.out.mkdir(parents=True, exist_ok=True)
        self.cells = json.loads(self.results.read_text()) if self.results.exists() else {}

    def folder(self, name: str) -> Path:
        return self.out / f"{name.replace(' ', '_')}_{self.config.seed}"

    def prepare(self) -> None:
        if not self.statistics.exists():
            run("compute_fid_stats.py", "--dataset_name", "digits", "--out", self.statistics, "--num_features", 2000)

    def make_pairs(self) -> Path:
        pairs = self.out / f"pairs_{self.config.seed}"
        words = f"--load_dir {self.folder('flow matching')} --num_pairs {self.config.num_pairs} --cfg_scale 2"
        run("make_pairs.py", *words.split(), "--denoise_timesteps", 64, "--batch_size", 256, "--out", pairs)
        return pairs

    def train(self, name: str) -> None:
        recipe, folder = RECIPES[name], self.folder(name)
        steps = round(recipe.share * self.config.train_steps)
        if (folder / "checkpoints" / str(steps)).exists():
            return
        words = recipe.flags
        if "PAIRS" in words:
            words = words.replace("PAIRS", str(self.make_pairs()))
        words = words.replace("FLOW", str(self.folder("flow matching")))
        network = "" if "--load_dir" in words else NETWORK
        started = time.monotonic()
        run(
            "train_flow.py", *words.split(), *network.split(), *COMMON.split(), "--seed", self.config.seed,
            "--max_steps", steps, "--save_dir", folder, "--wandb.mode", "disabled",
        )  # fmt: skip
        self.record(f"{name}/seconds", time.monotonic() - started)

    def score(self, name: str, num_steps: int) -> None:
        recipe, folder, key = RECIPES[name], self.folder(name), f"{name}/{self.config.seed}/{num_steps}"
        if key in self.cells:
            return
        samples, result = folder / f"samples_{num_steps}.npz", folder / f"score_{num_steps}.json"
        run(
            "eval_fid.py", "--load_dir", folder, "--fid_stats", self.statistics, "--denoise_timesteps", num_steps,
            "--cfg_scale", 2 if recipe.is_guided else 1, "--num_samples", self.config.num_samples,
            "--labels", "balanced", "--solver", recipe.solver, "--save_samples", samples, "--json", result,
            "--wandb.mode", "disabled",
        )  # fmt: skip
        (row,) = json.loads(result.read_text())
        arrays = np.load(samples)
        row["recognised"] = recognised_fraction(arrays["arr_0"], arrays["arr_1"])
        self.record(key, {metric: row.get(metric) for metric in ("fid", "kid", "mind", "recognised")})

    def record(self, key: str, value: object) -> None:
        self.cells[key] = value
        self.results.write_text(json.dumps(self.cells, indent=2))

    def show(self) -> None:
        print("| objective | steps | FID | KID | MIND | recognised |\n|---|---:|---:|---:|---:|---:|")
        for key, cell in self.cells.items():
            if isinstance(cell, dict):
                name, _, steps = key.split("/")
                kid, mind = (f"{cell[metric]:.4g}" for metric in ("kid", "mind"))
                print(f"| {name} | {steps} | {cell['fid']:.1f} | {kid} | {mind} | {cell['recognised']:.1%} |")


def main(config: ConfigDict) -> None:
    comparison = Comparison(config)
    comparison.prepare()
    for name in config.objectives:
        comparison.train(name)
        for num_steps in RECIPES[name].steps:
            comparison.score(name, num_steps)
            print(f"{name}, {num_steps} steps: {comparison.cells[f'{name}/{config.seed}/{num_steps}']}", flush=True)
    comparison.show()


if __name__ == "__main__":
    cli.run_program(define_flags, main)
