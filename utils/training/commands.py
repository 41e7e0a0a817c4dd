"""The commands that follow a training, complete, as they are typed in a shell."""

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.base.checks import can_guide
from utils.data.dataset import DataOptions
from utils.objectives.objective import has_guidance
from utils.objectives.registry import make_objective

PROGRAMS = Path(__file__).resolve().parents[1]
MOST_SAMPLES, FEWEST_SAMPLES = 50_000, 1_000  # of a FID


def write_command(program: str, *words: object) -> str:
    """Returns the command line of a program of this project, from the current folder, quoted for a shell."""
    found, python = shutil.which("python"), sys.executable
    if found and Path(found).absolute().parent == Path(python).absolute().parent:
        python = "python"
    here = f"{Path.cwd()}/"
    paths = [path.removeprefix(here) for path in (python, str(PROGRAMS / program))]
    return shlex.join([*paths, *map(str, words)])


def shipped_statistics(dataset_name: str) -> Path | None:
    """Returns the reference statistics that ship for a data set, if there are any."""
    path = PROGRAMS / "data" / f"fid_stats_{dataset_name}.npz"
    return path if path.is_file() else None


def write_statistics_command(saved: dict[str, Any], out: Path) -> str:
    """Returns the command that makes reference statistics of the images that a run was trained on, or whose latents or
    samples it was trained on; `saved` is the run's configuration."""
    data, defaults = saved["dataset"], DataOptions()
    words = ["--dataset_name", data["name"]]
    is_derived = str(saved.get("dataset_name")).startswith(("latents:", "pairs:"))
    height, width, _ = data["image_shape"]
    if saved.get("image_size") is not None or data["name"].startswith("folder:") or (is_derived and height == width):
        words += ["--image_size", saved.get("image_size") or height]
    if saved.get("data_dir"):
        words += ["--data_dir", saved["data_dir"]]
    if data["name"].startswith("folder:") and not is_derived:
        for name in ("broken_images", "max_megapixels"):
            if saved.get(name, getattr(defaults, name)) != getattr(defaults, name):
                words += [f"--{name}", saved[name]]
    return write_command("compute_fid_stats.py", *words, "--out", out)


def commands_after_training(
    folder: Path, saved: dict[str, Any], num_images: int, params: str
) -> Iterator[tuple[str, str]]:
    """Yields (purpose, command) of what comes after the training of a run: samples, and their FID against the images
    of the data, of which there are `num_images` to train on. `saved` is the run's configuration, `params` 'ema' or
    'raw'."""
    model, data = saved["model"], saved["dataset"]
    words = ["--load_dir", folder, "--denoise_timesteps", model["denoise_timesteps"]]
    if has_guidance(make_objective(saved)) and can_guide(model["class_dropout_prob"]):
        words.append(f"--cfg_scale={model['cfg_scale']:g}")  # may be negative
    if params != "ema":
        words += ["--params", params]
    yield "samples", write_command("sample.py", *words)

    # As many samples as images, within what FID is usually computed of.
    words += ["--num_samples", min(MOST_SAMPLES, max(FEWEST_SAMPLES, num_images))]
    if saved.get("fid_stats"):
        words += ["--fid_stats", saved["fid_stats"]]
        if saved.get("convention"):
            words += ["--convention", saved["convention"]]
    elif not shipped_statistics(data["name"]):
        statistics = folder / "fid_stats.npz"
        yield "reference of FID", write_statistics_command(saved, statistics)
        words += ["--fid_stats", statistics]
    if saved.get("inception_weights"):
        words += ["--inception_weights", saved["inception_weights"]]
    if saved["wandb"]["mode"] != "online":
        words += ["--wandb.mode", saved["wandb"]["mode"]]
    yield "FID", write_command("eval_fid.py", *words)
