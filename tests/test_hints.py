"""Hints before training starts, and what is shown where memory runs out."""

import jax
import numpy as np
import pytest

import train_flow
from diffusion_transformer import DiTConfig
from utils.base.devices import explaining_out_of_memory
from utils.base.messages import UserError
from utils.data.dataset import SPLITS, DataOptions, array_dataset
from utils.data.loaders import describe_data, load_dataset, summarize_data
from utils.networks.state import EmaSchedule, young_ema_hint
from utils.training import build
from utils.training.advice import ema_hints, model_hints


@pytest.fixture(scope="module")
def digits():
    return {split: load_dataset("digits", split) for split in SPLITS}


def hints(digits, batch_size=64, **changes):
    model = DiTConfig(**{"num_classes": 10, "patch_size": 2} | changes)
    return model_hints(model, (8, 8, 1), digits["train"], batch_size)


def test_usual_settings_give_no_hint(digits):
    assert hints(digits) == []
    assert hints(digits, num_classes=12) == []


def test_each_hint_names_the_flag_and_the_fix(digits):
    (classes,) = hints(digits, num_classes=1000)
    assert "--model.num_classes=1000, but the data has 10" in classes
    assert classes.endswith("use --model.num_classes 10")
    (batch,) = hints(digits, batch_size=1501)
    assert "--batch_size=1501 is more than the 1500 training images" in batch
    (token,) = hints(digits, patch_size=8)
    assert "--model.patch_size=8 makes one token of each 8x8 input" in token


def test_the_data_are_summed_up_in_a_line(digits):
    assert summarize_data(digits, 150) == (
        "data: digits, 1,500 images to train on and 297 held out, 8x8x1, 10 classes, 10.0 steps per epoch, "
        "none mirrored"
    )


def test_one_image_is_no_plural():
    one = array_dataset("one", np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, np.int32))
    assert "data: one, 1 image to train on and 1 held out" in summarize_data(dict.fromkeys(SPLITS, one), 1)


def test_classes_without_training_images_are_said_and_recorded():
    images = np.zeros((6, 8, 8, 1), np.uint8)
    names = tuple("abcdefghi")
    train = array_dataset("letters", images, np.array([1, 1, 2, 4, 4, 4]), names)
    datasets = {"train": train, "validation": array_dataset("letters", images, np.arange(6), names, "validation")}
    assert "9 classes, 6 of them without images to train on (a, d, f, g, h, ...)" in summarize_data(datasets, 2)
    assert describe_data(datasets)["empty_classes"] == [0, 3, 5, 6, 7, 8]


def test_the_proposed_rate_leaves_a_hundredth(digits):
    """0.9999^1000 = 0.905 of the EMA is initial parameters; 0.9954^1000 = 0.01."""
    (hint,) = ema_hints(EmaSchedule(0.9999), 1000, 1000)
    assert "90% is initial parameters at the first evaluation (step 1,000) and 90% at --max_steps" in hint
    assert "--model.target_update_rate 0.9954 leaves 1% at the end, or --ema_warmup 1" in hint
    assert EmaSchedule(0.9954).initial_weight(1000) == pytest.approx(0.01, rel=0.05)
    (short,) = ema_hints(EmaSchedule(0.9), None, 2)  # 0.1^2 = 0.01
    assert "--model.target_update_rate 0.1 leaves 1% at the end" in short
    (long,) = ema_hints(EmaSchedule(0.9999), 1000, 400_000)
    assert "target_update_rate" not in long
    assert ema_hints(EmaSchedule(0.995), 1000, 1000) == []
    assert ema_hints(EmaSchedule(0.9999, has_warmup=True), 1000, 1000) == []
    (without,) = ema_hints(EmaSchedule(0.9999), None, 2000)  # --eval_interval 0
    assert "of which 82% is initial parameters at --max_steps; --model.target_update_rate" in without
    assert ema_hints(EmaSchedule(0.9999), None, 40_000) == []


def test_an_ema_of_mostly_initial_parameters_is_named_with_its_fraction():
    """0.9999^2000 = 0.819."""
    saved = {"model": {"target_update_rate": 0.9999}}
    hint = young_ema_hint(saved, 2000)
    assert hint.startswith("the EMA at step 2,000 is still 82% initial parameters, noise; --params raw takes")
    assert "is still 82% the parameters that the run started from" in young_ema_hint(saved | {"load_dir": "x"}, 2000)
    assert young_ema_hint(saved, 40_000) is None
    assert young_ema_hint(saved | {"ema_warmup": 1}, 2000) is None
    assert young_ema_hint({"model": {"target_update_rate": 1}}, 1) is None


@pytest.mark.parametrize("flip", [True, False, None])
def test_mirroring_is_what_was_asked_for(flip):
    train, validation = (load_dataset("digits", split, DataOptions(random_flip=flip)) for split in SPLITS)
    assert train.random_flip == bool(flip)
    assert not validation.random_flip


def test_memory_that_runs_out_is_one_line_with_the_flags_to_use():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
    with (
        pytest.raises(UserError, match=r"the step needs 3.00 GiB, a device has .*iB; use --batch_size"),
        explaining_out_of_memory("the step", "--batch_size", 3 * 2**30),
    ):
        raise error
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        explaining_out_of_memory("the step", "--batch_size"),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_steps_that_need_more_than_there_is_are_refused(monkeypatch, read_flags, tmp_path):
    monkeypatch.setattr(build, "device_memory", lambda: 1000)
    words = (
        "--dataset_name digits --use_stable_vae 0 --batch_size 8 --wandb.mode disabled --model.num_classes 10 "
        "--model.depth 1 --model.hidden_size 16"
    )
    config = read_flags(train_flow, [*words.split(), "--save_dir", str(tmp_path)])
    with pytest.raises(UserError, match=r"out of memory: the training step needs .* MiB.*--grad_accum"):
        train_flow.main(config)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
