"""Options of docs/quality.md in one run: killed, and spread over devices. Slow: each has quick tests of its own."""

import pytest

from tests.conftest import run_program
from tests.runs import assert_close, kill_and_continue, losses
from utils.runs.checkpoint import Checkpoints
from utils.sampling.generator import hash_params

NUM_STEPS = 12
COMMON = f"""
    --dataset_name digits --codec pixels --model.hidden_size 32 --model.depth 2 --model.num_heads 2 --model.patch_size 2
    --model.num_classes 10 --batch_size 64 --model.lr 1e-2 --warmup_steps 2 --log_interval 1 --eval_interval 0
    --save_interval 4 --max_steps {NUM_STEPS} --wandb.mode disabled
    --objective.prediction data --model.bottleneck 3 --optimizer muon --ema_profiles 0.05,0.1
""".split()
RUNS = {
    "flow_matching": [
        *("--model.inner_head", "1", "--coupling", "minibatch", "--coupling_rows", "32"),
        *("--objective.t_mean", "-0.4", "--objective.noise_scale", "1.5"),
    ],
    "mean_flow": ["--objective.name", "mean_flow"],
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_killed_and_spread_over_devices_a_run_with_all_options_stays_the_same(words, dtype, tmp_path):
    whole, killed, split = (tmp_path / name for name in ("whole", "killed", "split"))
    words = [*COMMON, *words, "--model.dtype", dtype]
    run_program("train_flow.py", *words, "--save_dir", whole)
    kill_and_continue(killed, 4, *words)
    assert losses(killed) == losses(whole)
    for part in ("params", "ema_params", "ema_profiles"):
        found, expected = (hash_params(Checkpoints(run).restore_stored(NUM_STEPS, part)) for run in (killed, whole))
        assert found == expected, part
    if dtype == "float32":  # rounding to bfloat16 depends on how a batch is split
        sharding = ["--sharding", "hybrid", "--num_shards", 4, "--grad_accum", 2]
        run_program("train_flow.py", *words, *sharding, "--save_dir", split, devices=8)
        assert_close(losses(split), losses(whole), NUM_STEPS)
