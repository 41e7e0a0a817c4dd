"""Whether samples have the numbers that they were asked for: turned digits, whose angle a regression reads.

    python benchmarks/conditions.py runs/turned             # data, training, samples, figures: some ten minutes
    python benchmarks/conditions.py runs/turned --steps 500

The fours of scikit-learn are turned by up to 90 degrees either way; a model learns them by (cos, sin). A kernel ridge
regression that has seen real images alone reads the angle of real images that were held out, and of samples with
guidance 1 and 2. The programs are run as a user types them.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import r2_score

ROOT = Path(__file__).resolve().parent.parent
DIGIT = 4
NUM_HELD_OUT = 40  # originals
TURNS = 24  # of each
TRAIN = """--codec pixels --model.hidden_size 128 --model.depth 4 --model.num_heads 4 --model.mlp_ratio 4
    --model.patch_size 2 --model.lr 1e-3 --model.target_update_rate 0.998 --batch_size 128 --eval_interval 0
    --wandb.mode disabled"""


def make_data(path: Path) -> dict[str, np.ndarray]:
    """Writes the turned digits as npz:FILE reads them, and returns the arrays."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    originals = rng.permutation(digits.images[digits.target == DIGIT]) * (255 / 16)
    arrays: dict[str, np.ndarray] = {"condition_names": np.array(["cos", "sin"])}
    for prefix, part in (("", originals[NUM_HELD_OUT:]), ("validation_", originals[:NUM_HELD_OUT])):
        angles = rng.uniform(-90, 90, len(part) * TURNS)
        turned = [
            rotate(image, angle, reshape=False, order=1)
            for image, angle in zip(np.repeat(part, TURNS, axis=0), angles, strict=True)
        ]
        arrays[f"{prefix}images"] = np.clip(np.round(turned), 0, 255).astype(np.uint8)[..., None]
        radians = np.deg2rad(angles)
        arrays[f"{prefix}conditions"] = np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
    np.savez(path, **arrays)
    return arrays


def angle_of(vectors: np.ndarray) -> np.ndarray:
    """Returns the angles, in radians, of vectors (n, 2)."""
    return np.arctan2(vectors[:, 1], vectors[:, 0])


def run(*words: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = make_data(folder / "turned.npz")

    # What reads angles has seen real images alone; its own error is that of images it has not seen.
    flat = {name: data[name].reshape(len(data[name]), -1) / 255 for name in ("images", "validation_images")}
    reader = KernelRidge(kernel="rbf", alpha=0.01, gamma=0.1).fit(flat["images"], data["conditions"])
    truth = angle_of(data["validation_conditions"])
    real = r2_score(truth, angle_of(reader.predict(flat["validation_images"])))
    print(f"real images, held out: R^2 {real:.4f}")

    # A sample for each held-out condition.
    train = [*TRAIN.split(), "--dataset_name", f"npz:{folder / 'turned.npz'}", "--max_steps", str(options.steps)]
    run("train_flow.py", *train, "--save_dir", folder / "run")
    np.savez(folder / "asked.npz", conditions=data["validation_conditions"])
    for scale in (1, 2):
        saved = folder / f"guidance_{scale}.npz"
        words = ["--condition_file", folder / "asked.npz", "--num_samples", len(truth), "--cfg_scale", scale]
        run("sample.py", "--load_dir", folder / "run", *words, "--save_samples", saved, "--denoise_timesteps", 32)
        with np.load(saved) as samples:
            images = samples["images" if "images" in samples else "arr_0"]
        found = angle_of(reader.predict(images.reshape(len(images), -1) / 255))
        print(f"samples, guidance {scale}: R^2 {r2_score(truth, found):.4f}")
    run("sample.py", "--load_dir", folder / "run", "--sweep", "sin=-1:1:9", "--cfg_scale", 2, "--num_samples", 9)


if __name__ == "__main__":
    main()
