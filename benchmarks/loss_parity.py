"""Two runs of one seed side by side: how far their smoothed losses part, both curves, and the same samples of both.

make demo DEMO=runs/bfloat16 DEMO_FLAGS="--log_interval 10"
make demo DEMO=runs/float32 DEMO_FLAGS="--log_interval 10 --model.dtype float32"
python benchmarks/loss_parity.py --runs runs/bfloat16,runs/float32 --out runs/parity
"""

from pathlib import Path

import common  # noqa: F401 (puts the project on the path)
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from utils import checks, cli, plotting
from utils.errors import UserError
from utils.tracking import read_metrics

NUM_SAMPLES = 8


def define_flags() -> None:
    flags.DEFINE_list("runs", ["runs/bfloat16", "runs/float32"], "Folders of two runs that `make demo` left.")
    flags.DEFINE_string("out", "runs/parity", "Folder for the images.")
    flags.DEFINE_integer("window", 10, "Logged steps over which a loss is averaged.", lower_bound=1)


def read_losses(run: Path, name: str) -> dict[int, float]:
    """{step: value} of one metric; UserError where the run has none."""
    losses = {line["step"]: line[name] for line in read_metrics(run / "metrics.jsonl") if name in line}
    if not losses:
        raise UserError(f"--runs={run} has logged no {name}; give the folder of a run of train_flow.py")
    return losses


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and those before it, `window` in all."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


def main(config: ConfigDict) -> None:
    runs, out = [Path(run) for run in config.runs], Path(config.out)
    if len(runs) != 2:
        raise UserError(f"--runs={','.join(config.runs)}: give two folders, separated by a comma")
    checks.check_writable(out, "out")
    curves = {}
    for name in ("training/l2_loss", "validation/l2_loss"):
        losses = [read_losses(run, name) for run in runs]
        steps = sorted(losses[0].keys() & losses[1].keys())
        pair = [smooth(np.array([loss[step] for step in steps]), config.window) for loss in losses]
        apart = np.abs(pair[0] / pair[1] - 1)
        print(
            f"{name}, {len(steps)} logged steps, mean of {config.window}: at most {apart.max():.2%} apart "
            f"(at step {steps[apart.argmax() + config.window - 1]}), {apart[-1]:.2%} at the end"
        )
        for run, values in zip(runs, pair, strict=True):
            points = zip(steps[config.window - 1 :], values, strict=True)
            curves[f"{name.partition('/')[0]}, {run.name}"] = list(points)
    plotting.curves(curves, "steps", f"loss, mean of {config.window}", markers=False).savefig(out / "loss_parity.png")
    samples = [np.load(run / "samples.npz") for run in runs]
    rows = np.stack([archive["arr_0"][:NUM_SAMPLES] for archive in samples])
    titles = [f"{label}" for label in samples[0]["arr_1"][:NUM_SAMPLES]]
    plotting.image_table(rows, [run.name for run in runs], titles).savefig(out / "samples_parity.png")
    difference = np.abs(samples[0]["arr_0"].astype(int) - samples[1]["arr_0"])
    print(f"samples of the same noise: {difference.mean():.1f} grey levels apart on average, of {len(difference)}")
    print(f"written: {out / 'loss_parity.png'}, samples_parity.png")


if __name__ == "__main__":
    cli.run_program(define_flags, main)
