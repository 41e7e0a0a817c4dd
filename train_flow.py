"""Trains a flow-matching DiT: flags -> configuration -> one loop that steps, logs, evaluates and saves.

    python train_flow.py --dataset_name digits --use_stable_vae 0 --model.patch_size 2 --model.num_classes 10

The same command again continues a run from its newest checkpoint, and so does --save_dir RUN alone. docs/training.md
has the recipes, docs/flags.md the flags.
"""

import sys

from ml_collections import ConfigDict

from utils.base.messages import log, show_result
from utils.base.processes import EXIT_STOPPED, StopRequest, describe_processes, initialize_processes
from utils.flags.definitions import define_run_flags
from utils.flags.program import process_age, run_program
from utils.flags.run import read_run_config
from utils.networks.state import TrainState
from utils.training.advice import commands_after_training
from utils.training.build import Run, build_run
from utils.training.evaluation import is_evaluation_missing
from utils.training.loop import plan_run, train
from utils.training.progress import Stages

define_flags = define_run_flags


def main(values: ConfigDict) -> None:
    stages = Stages(process_age())
    # Several processes find each other before anything asks for devices.
    stop = StopRequest()
    initialize_processes(values.coordinator_address, values.num_processes, values.process_id, stop)
    if values.coordinator_address:
        stop.share()
    log(describe_processes())

    # Everything that can be refused is, here and in `build_run`, before a step compiles.
    config = read_run_config(values)
    run = build_run(config, stages)
    if config.training.plan:
        for line in plan_run(run):
            show_result(line)
        return
    report_end(run, train(run, stop))


def report_end(run: Run, state: TrainState) -> None:
    """Logs where everything is and what may follow; exits with EXIT_STOPPED if the run was stopped before its end."""
    step = int(state.step)
    # Its own status, so that a job script knows to give the command again (docs/reliability.md).
    if step < run.config.training.max_steps or is_evaluation_missing(run, step):
        log(f"stopped at step {step} and saved; the same command continues from there")
        sys.exit(EXIT_STOPPED)
    log(f"done: images, metrics.jsonl and checkpoints are in {run.folder}")
    # A young EMA still holds much of the initial parameters: a profile, or the raw parameters, are better then.
    profiles = run.config.optimizer.ema_profiles
    other = f"ema:{profiles[-1]}" if profiles else "raw"
    params = other if run.ema.initial_weight(step) > 0.5 else "ema"
    num_images = len(run.datasets["train"].source)
    for purpose, command in commands_after_training(run.folder, run.record, num_images, params):
        log(f"{purpose}: {command}")


if __name__ == "__main__":
    run_program(define_flags, main)
