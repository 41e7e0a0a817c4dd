"""How long people wait before anything happens, cold and warm, of several checkouts side by side.

    git worktree add ../before 26eb35d && ln -s "$PWD/.venv" ../before/.venv
    python benchmarks/startup.py --checkouts ../before,.

Rows: --help; the first step of the demo's training, until its metrics are written; 16 guided samples of it. A cold
start has nothing in its compilation cache, a warm one is the same command once more. The checkouts take turns; a
median of --rounds is shown, and its ratio to that of the first checkout.
"""

import collections
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_list("checkouts", ["."], "Folders of checkouts, each with a .venv; the first is the one to compare with.")
flags.DEFINE_integer("rounds", 5, "Starts of each kind.", lower_bound=1)
flags.DEFINE_string("network", "128 4 4", "Width, depth and heads of the network; default: the demo's.")

TRAIN = """train_flow.py --dataset_name digits --use_stable_vae 0 --wandb.mode disabled
    --model.hidden_size {} --model.depth {} --model.num_heads {} --model.mlp_ratio 4 --model.patch_size 2
    --model.num_classes 10 --batch_size 128 --eval_interval 0 --max_steps 1 --save_dir"""
SAMPLE = "sample.py --num_samples 16 --cfg_scale 2 --params raw --load_dir"


def run(checkout: Path, cache: Path, *words: str) -> float:
    """Returns the time at which a program was started; its compilation cache is in `cache`."""
    variables = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
    started = time.time()
    command = [str(checkout / ".venv/bin/python"), *words]
    done = subprocess.run(
        command, cwd=checkout, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed in {checkout}:\n{done.stderr[-2000:]}")
    return started


def measure(checkout: Path, folder: Path) -> dict[str, float]:
    """Returns the seconds of each row in one round. `folder` is empty."""
    seconds = {}
    started = run(checkout, folder / "cache", "train_flow.py", "--help")
    seconds["--help"] = time.time() - started
    for state in ("cold", "warm"):
        save_dir = folder / state
        train = shlex.split(TRAIN.format(*FLAGS.network.split()))
        started = run(checkout, folder / "cache", *train, str(save_dir))
        seconds[f"first step, {state}"] = (save_dir / "metrics.jsonl").stat().st_mtime - started
    # A cache of their own: a training has compiled some of what they need.
    for state in ("cold", "warm"):
        words = [*shlex.split(SAMPLE), str(folder / "warm"), "--out", str(folder / "samples")]
        started = run(checkout, folder / "sample_cache", *words)
        seconds[f"16 samples, {state}"] = time.time() - started
    return seconds


def main(_) -> None:
    checkouts = [Path(name).absolute() for name in FLAGS.checkouts]
    found: dict[str, dict[Path, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for _ in range(FLAGS.rounds):
        for checkout in checkouts:
            with tempfile.TemporaryDirectory() as folder:
                for row, seconds in measure(checkout, Path(folder)).items():
                    found[row][checkout].append(seconds)

    # A table: seconds of each checkout, and the ratio of the last to the first.
    print(f"| seconds | {' | '.join(path.name for path in checkouts)} | ratio |")
    print("|---|" + "---:|" * (len(checkouts) + 1))
    for row, of_checkouts in found.items():
        medians = [statistics.median(of_checkouts[checkout]) for checkout in checkouts]
        cells = " | ".join(f"{seconds:.1f}" for seconds in medians)
        print(f"| {row} | {cells} | {medians[-1] / medians[0]:.2f} |")


if __name__ == "__main__":
    app.run(main)
