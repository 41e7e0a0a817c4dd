"""Hints for the user before training starts: settings that are hardly meant, and why first images may be noise."""

import math

from ml_collections import ConfigDict

from utils.data.dataset import ImageDataset
from utils.networks.ema import YOUNG, EmaSchedule


def model_hints(
    model: ConfigDict, latent_shape: tuple[int, int, int], dataset: ImageDataset, batch_size: int
) -> list[str]:
    """About --model.*, the batch and the training split."""
    hints, (height, width, _) = [], latent_shape
    num_images, num_classes = len(dataset.source), dataset.num_classes
    if model.num_classes > max(2 * num_classes, num_classes + 10):
        hints.append(
            f"--model.num_classes={model.num_classes}, but the data has {num_classes}: the other labels are never "
            f"trained; use --model.num_classes {num_classes}"
        )
    if batch_size > num_images:
        hints.append(f"--batch_size={batch_size} is more than the {num_images} training images: some come twice a step")
    if model.get("network", "dit") == "dit" and model.patch_size == height == width:
        hints.append(
            f"--model.patch_size={model.patch_size} makes one token of each {height}x{width} input, which leaves "
            "attention nothing to attend to; use a smaller one"
        )
    return hints


def ema_hints(ema: EmaSchedule, first_evaluation: int | None, max_steps: int) -> list[str]:
    """About the EMA, from which images are drawn and FID is computed, where it is mostly the initial parameters.

    `first_evaluation` is the step of the run's first one; None: it has none.
    """
    at_last = ema.initial_weight(max_steps)
    share = f"{at_last:.0%} is initial parameters at --max_steps"
    if first_evaluation is not None:
        first = min(first_evaluation, max_steps)
        at_first = ema.initial_weight(first)
        share = (
            f"{at_first:.0%} is initial parameters at the first evaluation (step {first:,}) and {at_last:.0%} at "
            "--max_steps"
        )
    if (at_last if first_evaluation is None else at_first) < YOUNG:
        return []
    fixes = ["--ema_warmup 1 follows the parameters from the start"]
    if at_last > 0.02:
        rate = 1 - math.ceil(1e4 * (1 - 0.01 ** (1 / max_steps))) / 1e4
        fixes.insert(0, f"--model.target_update_rate {rate:g} leaves 1% at the end")
    return [f"images and FID use the EMA, of which {share}; {', or '.join(fixes)}"]
