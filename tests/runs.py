"""Runs of train_flow.py in processes of their own, and what they logged; runs in this process."""

import re
import shutil
import signal
import time

import numpy as np

from tests.conftest import Program, run_program, xla_flags
from utils.trackers.trackers import read_metrics
from utils.training import build_run, make_config, train

SCALARS = ("l2_loss", "v_abs_mean", "v_pred_abs_mean", "grad_norm", "update_norm", "param_norm")


def losses(run_dir) -> dict[int, list[float]]:
    """{step: [every scalar of training/ and validation/]} of a run's metrics.jsonl."""
    names = [f"{split}/{name}" for split in ("training", "validation") for name in SCALARS]
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {line["step"]: [line[name] for name in names] for line in lines if names[0] in line}


def start(*args, devices: int = 1, env: dict[str, str] | None = None) -> Program:
    return Program(["train_flow.py", *map(str, args)], {"XLA_FLAGS": xla_flags(devices), **(env or {})})


def wait_for_step(process: Program, run_dir, step: int) -> None:
    deadline = time.monotonic() + 120
    while max(losses(run_dir), default=0) < step:
        assert process.poll() is None, process.outputs()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_and_continue(run_dir, step: int, *args, devices: int = 1) -> None:
    """Starts a run in `run_dir`, kills it after this step and its first checkpoint, and lets it go on to its end."""
    args = [*args, "--save_dir", run_dir]
    process = start(*args, devices=devices)
    wait_for_step(process, run_dir, step)
    while not any(path.name.isdigit() for path in (run_dir / "checkpoints").iterdir()):  # they are written behind
        assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = run_program("train_flow.py", *args, devices=devices)
    assert re.search(r"resuming .* from step \d+", done.stdout)


def train_and_repeat(folder, settings: dict) -> None:
    """Trains a run of four steps in FOLDER/whole, and its last two again from its checkpoint in FOLDER/stopped."""
    config = {**settings, "max_steps": 4, "save_interval": 2}
    train(build_run(make_config({**config, "save_dir": str(folder / "whole")})))
    shutil.copytree(folder / "whole", folder / "stopped")
    shutil.rmtree(folder / "stopped" / "checkpoints" / "4")
    train(build_run(make_config({**config, "save_dir": str(folder / "stopped")})))


def assert_close(actual: dict, expected: dict, steps: int) -> None:
    """The same losses at the first `steps` steps, to float32 rounding."""
    assert list(actual) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(actual.values()), [expected[step] for step in actual], rtol=2e-4)
