"""Kills, signals, flipped bits and full disks: what is promised of a run, tried many times; one line of counts each.

    python benchmarks/campaigns.py                                  # all of it, half an hour on two cores
    python benchmarks/campaigns.py --kill_runs 0 --signals 0 --full_disks 0 --flips 300

kills        A run is killed with -9 `kills` times, at random moments of its start, steps, saves or evaluation, and
             then finished. Equal: parameters, EMA, optimizer, step and place in the data of its last checkpoint, by
             their checksums, and all of metrics.jsonl but for rates, are those of a run that nothing disturbed.
signals      A run of two processes gets SIGTERM or SIGINT at one of them. Both have to exit 75, at one saved step.
flips        One bit of a checkpoint's arrays is flipped. It has to change nothing, or the checkpoint before it is used,
             with one line that says so.
full disks   A run's disk (a tmpfs, so this one wants root) fills up. It has to go on with one line, and end in one.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.base.mesh import make_mesh, replicated, shape_structs  # noqa: E402
from utils.networks.optimizers import make_optimizer  # noqa: E402
from utils.networks.state import TrainState, create_train_state  # noqa: E402
from utils.runs.checkpoint import Checkpoints  # noqa: E402
from utils.runs.opening import open_checkpoint  # noqa: E402

MAX_STEPS = 120
RUN = f"""
    train_flow.py --dataset_name digits --use_stable_vae 0 --model.hidden_size 32 --model.depth 1 --model.num_heads 2
    --model.patch_size 2 --model.num_classes 10 --batch_size 64 --max_steps {MAX_STEPS} --log_interval 10
    --save_interval 15 --eval_interval 30 --model.denoise_timesteps 8 --wandb.mode disabled --save_dir
""".split()
RATES = ("images_per_second", "tflops_per_second", "mfu", "data_wait_fraction")


def start(folder: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, *RUN, str(folder), *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path) -> None:
    process = start(folder)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{folder} did not finish: {output[-2000:]}")


def newest_step(folder: Path) -> int:
    checkpoints = folder / "checkpoints"
    steps = [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()] if checkpoints.exists() else []
    return max(steps, default=0)


def final_state(folder: Path) -> dict:
    """The checksums of the last checkpoint, without those of its configuration, which has the folder's name."""
    sums = json.loads((folder / "checkpoints" / str(newest_step(folder)) / "checksums" / "metadata").read_bytes())
    return {name: sums[name] for name in ("params", "ema_params", "optimizer", "data")}


def metrics(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
    return [{name: value for name, value in line.items() if name.rpartition("/")[2] not in RATES} for line in lines]


def timed(function, *args) -> float:
    started = time.monotonic()
    function(*args)
    return time.monotonic() - started


def try_kills(root: Path, rng: random.Random, runs: int, kills: int) -> str:
    undisturbed = root / "undisturbed"
    finish(root / "warm")
    all_seconds = timed(finish, undisturbed)
    start_seconds = timed(finish, undisturbed)  # a finished run only starts
    killed = equal_states = equal_metrics = 0
    for number in range(runs):
        folder = root / f"run{number}"
        for _ in range(kills):
            left = 1 - newest_step(folder) / MAX_STEPS
            process = start(folder)
            try:
                process.wait(rng.uniform(0.05, 0.8) * (start_seconds + left * (all_seconds - start_seconds)))
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            process.communicate()
        finish(folder)
        equal_states += final_state(folder) == final_state(undisturbed)
        equal_metrics += metrics(folder) == metrics(undisturbed)
        print(f"  run {number}: {killed} kills, {equal_states} states, {equal_metrics} logs equal so far", flush=True)
        shutil.rmtree(folder)
    return f"{runs} runs, {killed} kills: {equal_states} final states and {equal_metrics} whole logs equal"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def try_signals(root: Path, rng: random.Random, number: int) -> str:
    good = 0
    for trial in range(number):
        folder = root / f"signal{trial}"
        address = f"--coordinator_address=localhost:{free_port()}"
        eval_interval = (0, 5)[
            trial // 4 % 2
        ]  # in every other four trials the signal mostly comes during an evaluation
        endless = ("--max_steps=1000000", f"--eval_interval={eval_interval}", address, "--num_processes=2")
        processes = [start(folder, *endless, f"--process_id={index}") for index in range(2)]
        while not (folder / "metrics.jsonl").exists() and processes[0].poll() is None:
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 3))
        processes[trial // 2 % 2].send_signal((signal.SIGTERM, signal.SIGINT)[trial % 2])
        outputs = [process.communicate()[0] for process in processes]
        is_good = [process.returncode for process in processes] == [75, 75]
        is_good &= f"stopped at step {newest_step(folder)} and saved" in outputs[0]  # process 0 speaks for both
        good += is_good
        if not is_good:
            print("\n".join(outputs))
        shutil.rmtree(folder)
    return f"{number} runs of two processes, SIGTERM and SIGINT to either: {good} stopped and saved"


def small_state(step: int) -> TrainState:
    params = {"kernel": jax.random.normal(jax.random.key(step), (50, 40)), "bias": jax.numpy.ones((7,)) * step}
    state = create_train_state(params, make_optimizer(1e-3, 0.9, 0.99), jax.random.key(0))
    return state.replace(ema_params=jax.tree.map(lambda x: x / 2, params), step=jax.numpy.int32(step))


def are_equal(state: TrainState, other: TrainState) -> bool:
    pairs = zip(jax.tree.leaves(state.replace(key=0)), jax.tree.leaves(other.replace(key=0)), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def try_flips(root: Path, rng: random.Random, number: int) -> str:
    states = {step: small_state(step) for step in (1, 2)}
    checkpoints = Checkpoints(root / "flips")
    for step, state in states.items():
        checkpoints.save(state, {"dataset_name": "digits", "dataset": {}}, {"next_index": step})
    checkpoints.close()
    target = shape_structs(states[1], replicated(make_mesh()))
    # Orbax keeps arrays as OCDBT: their bytes are the files in the folders named d.
    files = [path for path in (root / "flips" / "checkpoints" / "2").rglob("*") if path.is_file()]
    files = [path for path in files if path.parent.name == "d" and path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    counts = Counter()
    for _ in range(number):
        (file,) = rng.choices(files, sizes)
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        checkpoints, steps = open_checkpoint(root / "flips")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            step, (state, _) = checkpoints.restore_newest(lambda step: checkpoints.restore(step, target), steps)  # noqa: B023
        num_lines = output.getvalue().count("\n")
        if not are_equal(state, states[step]) or num_lines != (step == 1):
            counts["silent or not in one line"] += 1
        else:
            counts["noticed, the one before used" if step == 1 else "without effect on any value"] += 1
        file.write_bytes(content)
    return f"{number} flipped bits: " + ", ".join(f"{count} {name}" for name, count in counts.most_common())


def try_full_disks(root: Path, number: int) -> str:
    good = 0
    for trial in range(number):
        disk = root / f"disk{trial}"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
        try:
            folder = disk / "run"
            process = start(folder, "--max_steps=1000000", "--eval_interval=0", "--save_interval=300")
            while newest_step(folder) == 0 and process.poll() is None:
                time.sleep(0.1)
            with contextlib.suppress(OSError), open(disk / "filler", "wb") as filler:
                while filler.write(bytes(4096)):
                    filler.flush()
            time.sleep(10)
            is_running = process.poll() is None
            safe = newest_step(folder)
            process.terminate()
            output, _ = process.communicate()
            lines = [line for line in output.splitlines() if "could not be written" in line]
            is_good = is_running and process.returncode == 1 and "Traceback" not in output
            is_good &= len(lines) >= 2 and all(f"step {safe} is safe" in line for line in lines)
            good += is_good
            if not is_good:
                print(output[-3000:])
        finally:
            subprocess.run(["umount", disk], check=True)
    return f"{number} full disks: {good} runs went on, and ended in one line with their last checkpoint whole"


def main(_) -> None:
    options = flags.FLAGS
    rng = random.Random(flags.FLAGS.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": f"{root}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if options.flips:
            print(try_flips(root, rng, options.flips), flush=True)
        if options.signals:
            print(try_signals(root, rng, options.signals), flush=True)
        if options.full_disks:
            print(try_full_disks(root, options.full_disks), flush=True)
        if options.kill_runs:
            print(try_kills(root, rng, options.kill_runs, options.kills), flush=True)


if __name__ == "__main__":
    flags.DEFINE_integer("kill_runs", 20, "Runs that are killed.", lower_bound=0)
    flags.DEFINE_integer("kills", 4, "Kills of each of them.", lower_bound=0)
    flags.DEFINE_integer("signals", 8, "Runs of two processes that get a signal.", lower_bound=0)
    flags.DEFINE_integer("flips", 300, "Bits flipped.", lower_bound=0)
    flags.DEFINE_integer("full_disks", 2, "Disks filled.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Seed of the moments and bits.")
    app.run(main)
