"""Runs of train_flow.py in processes of their own, and what they logged."""

import os
import subprocess
import sys
import time

from tests.conftest import ROOT
from utils.tracking import read_metrics

SCALARS = ("l2_loss", "v_abs_mean", "v_pred_abs_mean", "grad_norm", "update_norm", "param_norm")


def losses(run_dir) -> dict[int, list[float]]:
    """{step: [every scalar of training/ and validation/]} of a run's metrics.jsonl."""
    names = [f"{split}/{name}" for split in ("training", "validation") for name in SCALARS]
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {line["step"]: [line[name] for name in names] for line in lines if names[0] in line}


def start(*args, devices: int = 1) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "train_flow.py", *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(process: subprocess.Popen, run_dir, step: int) -> None:
    deadline = time.monotonic() + 120
    while max(losses(run_dir), default=0) < step:
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
