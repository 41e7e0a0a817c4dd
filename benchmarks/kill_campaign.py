"""Kills runs at random moments and compares what is left with a run that nothing disturbed; one line of counts.

    python benchmarks/kill_campaign.py --runs 20 --kills 4

Every run is the same small one on digits, with pictures; it is killed with -9 `kills` times, at a random moment of its
start, its steps, its saving or its pictures, and then finished. Equal means: the parameters, EMA, optimizer, step and
place in the data of the last checkpoint bit for bit, by their checksums, and the whole metrics.jsonl but for rates.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
RUN = """
    train_flow.py --dataset_name digits --use_stable_vae 0 --model.hidden_size 32 --model.depth 1 --model.num_heads 2
    --model.patch_size 2 --model.num_classes 10 --batch_size 64 --max_steps 120 --log_interval 10 --save_interval 15
    --eval_interval 30 --model.denoise_timesteps 8 --wandb.mode disabled --save_dir
""".split()  # noqa: SIM905 (a command line, as one types it)
RATES = ("images_per_second", "tflops_per_second", "mfu", "data_wait_fraction")


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, *RUN, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(folder: Path) -> None:
    process = start(folder)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{folder} did not finish: {errors[-2000:]}")


def final_state(folder: Path) -> dict:
    """The checksums of the last checkpoint, without those of its configuration, which has the folder's name."""
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    sums = json.loads((newest / "checksums" / "metadata").read_text())
    return {name: sums[name] for name in ("params", "ema_params", "optimizer", "data")}


def metrics(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name.rpartition("/")[2] not in RATES} for line in lines]


def main(_) -> None:
    rng = random.Random(flags.FLAGS.seed)
    with tempfile.TemporaryDirectory() as root:
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": f"{root}/compiled"}
        os.environ |= {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for name in ("warm", "undisturbed"):
            started = time.monotonic()
            finish(Path(root) / name)
            seconds = time.monotonic() - started
        undisturbed = Path(root) / "undisturbed"
        kills = equal_states = equal_metrics = 0
        for number in range(flags.FLAGS.runs):
            folder = Path(root) / f"run{number}"
            for _ in range(flags.FLAGS.kills):
                process = start(folder)
                try:
                    process.wait(timeout=rng.uniform(0.1, 0.95) * seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
                process.communicate()
            finish(folder)
            equal_states += final_state(folder) == final_state(undisturbed)
            equal_metrics += metrics(folder) == metrics(undisturbed)
            print(
                f"run {number}: {kills} kills so far, {equal_states} equal states, {equal_metrics} equal logs",
                flush=True,
            )
    print(f"{flags.FLAGS.runs} runs, {kills} kills: {equal_states} final states and {equal_metrics} logs equal")


if __name__ == "__main__":
    flags.DEFINE_integer("runs", 20, "Runs.", lower_bound=1)
    flags.DEFINE_integer("kills", 4, "Kills of each.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    app.run(main)
