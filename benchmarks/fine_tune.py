"""Fine-tuning against training from scratch for the same number of steps, on digits that the source has not seen.

    python benchmarks/fine_tune.py --out /tmp/fine_tune

A model of the digits 0 to 4 is trained, then fine-tuned to 5 to 9, wholly and by LoRA; a fresh one is trained on these.
FID is against the images of 5 to 9, recognition by a classifier trained on real digits.
"""

import json
import subprocess
import sys
from pathlib import Path

import common  # noqa: F401 (puts the project on the path)
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from recognise_digits import recognised_fraction
from sklearn.datasets import load_digits

from utils.flags import program
from utils.flags.definitions import define_path

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {"low": range(5), "high": range(5, 10)}
SIZES = "--model.hidden_size 128 --model.depth 4 --model.num_heads 4 --model.mlp_ratio 4 --model.patch_size 2"
COMMON = "--use_stable_vae 0 --batch_size 128 --image_size 8 --random_flip 0 --eval_interval 0"
VARIANTS = {
    "from scratch": [*SIZES.split(), "--model.num_classes", "5"],
    "fine-tuned": [],
    "LoRA, rank 4": ["--lora_rank", "4"],
}


def define_flags() -> None:
    define_path("out", None, "Folder for images and runs.")
    flags.DEFINE_integer("seeds", 3, "Seeds.", lower_bound=1)
    flags.DEFINE_integer("base_steps", 1000, "Steps of the source.", lower_bound=1)
    flags.DEFINE_integer("steps", 200, "Steps of each variant.", lower_bound=1)
    flags.DEFINE_integer("num_samples", 500, "Samples of a FID.", lower_bound=2)


def write_images(out: Path) -> None:
    digits = load_digits()
    for group, classes in GROUPS.items():
        for number, (image, target) in enumerate(zip(digits.images, digits.target, strict=True)):
            if target in classes:
                path = out / group / str(target) / f"{number:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(path)


def run(program: str, *args: object) -> None:
    command = [sys.executable, str(ROOT / program), *map(str, args), "--wandb.mode", "disabled"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program}: {done.stderr[-2000:]}")


def score(run_dir: Path, statistics: Path, num_samples: int) -> tuple[float, float]:
    """(FID, fraction recognised)."""
    samples = run_dir / "samples.npz"
    result = run_dir / "score.json"
    run(
        "eval_fid.py", "--load_dir", run_dir, "--fid_stats", statistics, "--denoise_timesteps", 32, "--cfg_scale", 2,
        "--num_samples", num_samples, "--save_samples", samples, "--json", result,
    )  # fmt: skip
    arrays = np.load(samples)
    images = arrays["arr_0"].mean(axis=-1)  # PNGs are read as RGB
    return json.loads(result.read_bytes())[0]["fid"], recognised_fraction(images, arrays["arr_1"] + 5)


def main(config: ConfigDict) -> None:
    out = Path(config.out)
    write_images(out)
    statistics = out / "high.npz"
    command = [sys.executable, ROOT / "compute_fid_stats.py", "--dataset_name", f"folder:{out / 'high'}", "--split"]
    command += ["train", "--image_size", "8", "--out", statistics]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    print("| seed | | FID | recognised |\n|---:|---|---:|---:|")
    for seed in range(config.seeds):
        shared = [*COMMON.split(), "--seed", seed]
        base = out / f"base{seed}"
        run(
            "train_flow.py", *shared, *SIZES.split(), "--dataset_name", f"folder:{out / 'low'}",
            "--model.num_classes", 5, "--model.lr", 1e-3, "--model.target_update_rate", 0.99,
            "--max_steps", config.base_steps, "--save_dir", base,
        )  # fmt: skip
        for name, words in VARIANTS.items():
            start = [] if name == "from scratch" else ["--load_dir", base]
            folder = out / f"{name.partition(',')[0].replace(' ', '_')}{seed}"
            run(
                "train_flow.py", *shared, *words, *start, "--dataset_name", f"folder:{out / 'high'}", "--model.lr",
                1e-3, "--model.target_update_rate", 0.98, "--max_steps", config.steps, "--save_dir", folder,
            )  # fmt: skip
            fid, recognised = score(folder, statistics, config.num_samples)
            print(f"| {seed} | {name} | {fid:.1f} | {recognised:.1%} |", flush=True)


if __name__ == "__main__":
    program.run_program(define_flags, main)
