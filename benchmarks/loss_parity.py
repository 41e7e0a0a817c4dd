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

from utils.base.external import BadFileError, read_npz, read_npz_headers
from utils.base.files import prepare_output_folder
from utils.base.messages import UserError
from utils.flags import program
from utils.flags.definitions import define_path
from utils.images import plotting
from utils.runs.given import expand_path
from utils.trackers.trackers import name_runs, read_curves

NUM_SAMPLES = 8


def define_flags() -> None:
    flags.DEFINE_list("runs", ["runs/bfloat16", "runs/float32"], "Folders of two runs that `make demo` left.")
    define_path("out", "runs/parity", "Folder for the images.")
    flags.DEFINE_integer("window", 10, "Logged steps over which a loss is averaged.", lower_bound=1)


def read_losses(runs: list[Path], name: str, window: int) -> tuple[list[int], list[np.ndarray]]:
    """(steps, losses of each run) of the steps that both have logged; UserError if they are fewer than a window."""
    curves = [read_curves(run, "runs").get(name, {}) for run in runs]
    for run, curve in zip(runs, curves, strict=True):
        if not curve:
            raise UserError(f"--runs={run} has logged no {name}; give the folder of a run of train_flow.py")
    steps = sorted(curves[0].keys() & curves[1].keys())
    if not steps:
        raise UserError(f"--runs={runs[0]},{runs[1]} have logged {name} at no step in common; use one --log_interval")
    if len(steps) < window:
        raise UserError(f"--window={window} logged steps, but the runs share {len(steps)} of {name}; use less")
    return steps, [np.array([curve[step] for step in steps]) for curve in curves]


def read_samples(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of a run, (n, h, w, c) and (n,); UserError where it has none."""
    path = run / "samples.npz"
    if not path.exists():
        raise UserError(f"{path} is not there; eval_fid.py --save_samples {path} writes it")
    try:
        headers = read_npz_headers(path)
        arrays = read_npz(path, {name: headers[name] for name in ("arr_0", "arr_1")})
    except (BadFileError, KeyError):
        arrays = {}
    if [array.ndim for array in arrays.values()] != [4, 1]:
        raise UserError(f"{path} is no npz of labelled images; eval_fid.py --save_samples {path} writes one")
    return arrays["arr_0"], arrays["arr_1"]


def compare_samples(runs: list[Path], names: list[str], out: Path) -> None:
    """Draws the same samples of both runs, and prints how far all of them are apart; UserError where they differ in
    more than the model."""
    (first, labels), (second, other_labels) = (read_samples(run) for run in runs)
    if first.shape != second.shape or not np.array_equal(labels, other_labels):
        raise UserError("they differ in number, size or labels; draw both with the same flags")
    titles = [f"{label}" for label in labels[:NUM_SAMPLES]]
    images = np.stack([first[:NUM_SAMPLES], second[:NUM_SAMPLES]])
    plotting.image_table(images, names, titles).savefig(out / "samples_parity.png")
    difference = np.abs(first.astype(int) - second)
    print(f"samples of the same noise: {difference.mean():.1f} grey levels apart on average, of {len(difference)}")
    print(f"written: {out / 'samples_parity.png'}")


def main(config: ConfigDict) -> None:
    if len(config.runs) != 2:
        raise UserError(f"--runs={','.join(config.runs)}: give two folders, separated by a comma")
    runs = [Path(expand_path(run, "runs")) for run in config.runs]
    out = Path(config.out)
    names = name_runs(runs)
    window = config.window
    losses = {name: read_losses(runs, name, window) for name in ("training/l2_loss", "validation/l2_loss")}
    prepare_output_folder(out, "out")

    # Losses.
    curves = {}
    for name, (steps, values) in losses.items():
        steps = steps[window - 1 :]  # those with a whole window
        pair = [plotting.running_mean(list(each), window)[window - 1 :] for each in values]
        apart = np.abs(pair[0] / pair[1] - 1)
        print(
            f"{name}, {len(values[0])} logged steps, mean of {window}: at most {apart.max():.2%} apart "
            f"(at step {steps[apart.argmax()]}), {apart[-1]:.2%} at the end"
        )
        for run, means in zip(names, pair, strict=True):
            curves[f"{name.partition('/')[0]}, {run}"] = list(zip(steps, means, strict=True))
    plotting.curves(curves, "steps", f"loss, mean of {window}", markers=False).savefig(out / "loss_parity.png")
    print(f"written: {out / 'loss_parity.png'}")

    # Samples, where both runs have them.
    try:
        compare_samples(runs, names, out)
    except UserError as error:
        print(f"samples are not compared: {error}")


if __name__ == "__main__":
    program.run_program(define_flags, main)
