"""Runs of every objective, on one device and several, in microbatches, killed and continued."""

import random

import pytest

from tests.conftest import run_program
from tests.runs import assert_close, kill_and_continue, losses

RUN = """
    --dataset_name digits --use_stable_vae 0 --model.hidden_size 16 --model.depth 1 --model.num_heads 2
    --model.patch_size 4 --model.num_classes 10 --batch_size 64 --model.lr 1e-3 --model.dtype float32
    --log_interval 1 --eval_interval 0 --wandb.mode disabled
""".split()  # noqa: SIM905 (a command line, as one types it)
STEPS = 40

OBJECTIVES = {
    "data": """--objective.prediction data --objective.t_mean -0.8 --objective.t_std 0.8 --objective.noise_scale 2
        --model.bottleneck 4""",
    "diffusion": "--objective.name diffusion",
    "shortcut": """--objective.name shortcut --objective.finest_steps 8 --objective.bootstrap_every 4
        --objective.bootstrap_guidance 2""",
    "mean_flow": "--objective.name mean_flow",
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_devices_microbatches_and_kills_change_nothing(tmp_path, objective):
    words = [*RUN, *OBJECTIVES[objective].split()]
    whole, killed, split = (tmp_path / name for name in ("whole", "killed", "split"))
    run_program("train_flow.py", *words, "--max_steps", STEPS, "--save_dir", whole)
    kill_and_continue(killed, random.randint(9, 20), *words, "--max_steps", STEPS, "--save_interval", 8)
    assert losses(killed) == losses(whole)  # bit for bit
    assert len(losses(whole)) == STEPS
    run_program("train_flow.py", *words, "--max_steps", 4, "--grad_accum", 2, "--save_dir", split, devices=8)
    assert_close(losses(split), losses(whole), 4)
