"""Training: the loop that steps, logs, evaluates and saves, from the newest checkpoint to the last step."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from utils.base.background import in_background
from utils.base.devices import describe_machine, explaining_out_of_memory, memory_needed
from utils.base.external import BadFileError, read_json
from utils.base.files import FolderLock, prepare_output_folder, write_json
from utils.base.mesh import shard_batch
from utils.base.messages import DataError, UserError, log
from utils.base.processes import Interrupted, StopRequest
from utils.data.batches import next_batch, read_ahead, to_devices
from utils.data.fingerprint import write_listing
from utils.networks.state import TrainState
from utils.objectives.objective import row_period
from utils.runs.best import BestSteps, KeepBest
from utils.runs.checkpoint import Checkpoints, DamagedCheckpointError, has_checkpoints
from utils.runs.ema_snapshots import EmaSnapshots
from utils.runs.pool import write_pool
from utils.trackers.trackers import Trackers
from utils.training.advice import batch_structs, ema_hints, plan_lines
from utils.training.build import (
    MEMORY_FLAGS,
    Run,
    compile_steps,
    compile_train_step,
    make_state,
    summarize_run,
)
from utils.training.evaluation import evaluate, is_evaluation_due, is_evaluation_missing, log_evaluation
from utils.training.progress import Progress, SkippedUpdates, StepTrace, Throughput, check_finite
from utils.training.saving import Saver
from utils.training.start import compare_with_saved


class Resources(NamedTuple):
    """Everything that a running training holds open: checkpoints, data and logs."""

    checkpoints: Checkpoints
    batches: Any  # endless, at the position of the state
    position: dict[str, Any]  # in the data, of the checkpoint that the run continues from
    snapshots: EmaSnapshots
    trackers: Trackers
    stop: StopRequest


def train(run: Run, stop: StopRequest | None = None) -> TrainState:
    """Trains a run from its newest checkpoint, or from step 0, to --max_steps or until a signal asks for an end.

    Writes checkpoints, metrics.jsonl and images to the run's folder, which no other process may use meanwhile. Returns
    the last state, which is saved. Raises UserError where the folder holds another run, the data cannot be read, or
    the update is no longer finite.
    """
    if run.config.training.plan:
        raise UserError("--plan=1 trains nothing; plan_run(run) says what a training takes; leave it out to train")
    stop = stop or StopRequest()
    prepare_output_folder(run.folder, "save_dir")
    if run.config.logging.profile:
        prepare_output_folder(Path(run.config.logging.profile), "profile")
    # One process at a time writes to a run; of several processes of one run, the first answers for all.
    lock = FolderLock(run.folder)
    if jax.process_index() == 0:
        lock.acquire("save_dir")
    try:
        with nullcontext() if run.config.remote is None else run.config.remote.in_use("save_dir"):
            return train_in_folder(run, stop)
    finally:
        lock.release()


def train_in_folder(run: Run, stop: StopRequest) -> TrainState:
    """Trains a run whose folder is this process's own."""
    # Where the run stands.
    keep = run.config.checkpoints
    best = BestSteps(run.folder, KeepBest.parse(keep.keep_best)) if keep.keep_best else None
    checkpoints = Checkpoints(run.folder, keep.keep_last, keep.keep_every, best, run.config.remote)
    checkpoints.remove_unfinished()
    if run.config.remote is not None:
        run.config.remote.keep = checkpoints.retention.kept
    batches = run.training_batches()
    wait_for_state, step, position = restore_or_init(run, checkpoints, batches)
    if step >= run.config.training.max_steps and not is_evaluation_missing(run, step):
        log(f"nothing to do: {run.folder} is at step {step} already; raise --max_steps to go on")
        return wait_for_state()

    # Everything is in place: say what is trained, and begin.
    announce(run)
    if not prepare_coupling(run, stop):
        return wait_for_state()
    write_config(run, step)
    settings = {**run.config.to_json(), "dataset": run.record["dataset"]}
    trackers = Trackers(run.folder, settings, step)
    snapshots = EmaSnapshots(run.folder, keep.ema_snapshots if run.config.optimizer.ema_profiles else 0, step)
    resources = Resources(checkpoints, batches, position, snapshots, trackers, stop)
    with explaining_out_of_memory("training", MEMORY_FLAGS):
        # An evaluation that a kill has cut short comes first: it is of this step's state.
        max_steps = run.config.training.max_steps
        is_done = step and (not finish_evaluation(run, wait_for_state(), resources) or step >= max_steps)
        state = wait_for_state() if is_done else run_steps(run, wait_for_state, step, resources)
    # Everything is on disk before the run says so.
    checkpoints.wait()
    if best is not None and jax.process_index() == 0:
        log(best.describe(checkpoints.steps()))
    checkpoints.close()
    trackers.close()
    return state


def announce(run: Run) -> None:
    """Logs what is trained, with which settings, and why first images may be noise."""
    log(f"settings: {run.config.describe_given() or 'the defaults'}; all are in {run.folder / 'config.json'}")
    log(summarize_run(run, run.state_structs))
    interval = run.config.evaluation.eval_interval
    first_evaluation = min(1000, interval) if interval else None
    for hint in ema_hints(run.ema, first_evaluation, run.config.training.max_steps):
        log(f"note: {hint}")


def restore_or_init(
    run: Run, checkpoints: Checkpoints, batches: Any
) -> tuple[Callable[[], TrainState], int, dict[str, Any]]:
    """Returns (what waits for the state, its step, position in the data) of the newest intact checkpoint, to which
    `batches` are moved; those of step 0 without checkpoints.

    What has changed since it was saved is logged. Raises UserError where the run would become another.
    """
    # Without checkpoints, the run begins; its parameters are drawn while the step is compiled.
    steps = checkpoints.steps()
    target = run.state_structs
    if not steps:
        return in_background(partial(make_state, run)), 0, {}
    # The newest checkpoint may be damaged: then the one before it is read.

    def read(step: int) -> tuple[list[str], TrainState, dict[str, Any]]:
        saved = checkpoints.restore_config(step)
        differences = compare_with_saved(run.record, saved, run.datasets, run.folder)
        state, position = checkpoints.restore(step, target)
        next_index = position.get("next_index") if isinstance(position, dict) else None
        if type(next_index) is not int or next_index < 0:
            raise DamagedCheckpointError(f"checkpoint of step {step} is damaged: it has no position in the data")
        return differences, state, position

    step, (differences, state, position) = checkpoints.restore_newest(read, steps)
    # Damaged ones make room for new ones of their step, but nothing of them is lost.
    for damaged in steps[: steps.index(step)]:
        checkpoints.set_aside(damaged)
    # The data go on where the state has stopped.
    batches.set_state({"next_index": position["next_index"]})
    log(f"resuming {run.folder} from step {step}")
    for difference in differences:
        log(f"since step {step}: {difference}")
    return lambda: state, int(state.step), position


def prepare_coupling(run: Run, stop: StopRequest) -> bool:
    """Prepares the coupling of noise and data, which may take minutes, and records its hash; returns False where a
    signal ends that."""
    if run.coupling is None:
        return True
    # The hash that the previous start of the run has recorded.
    try:
        saved = read_json(run.folder / "config.json")
    except BadFileError:
        saved = {}
    try:
        with stop.interrupting():
            is_new = not has_checkpoints(run.folder)
            sha256 = run.coupling.prepare(run.folder, is_new, saved.get("dataset", {}).get("coupling_sha256"))
    except Interrupted:
        return False
    if sha256 is not None:
        run.record["dataset"]["coupling_sha256"] = sha256
    return True


def write_config(run: Run, step: int) -> None:
    """Writes config.json, a copy of it under the time and step of this start, and what is kept of the data: their
    listing, and conditions of samples."""
    if jax.process_index() > 0:
        return
    history = run.folder / "configs"
    history.mkdir(exist_ok=True)
    # The machine is that of this start, and in no checkpoint: a published model says nothing of it.
    record = {**run.record, "machine": describe_machine()}
    for path in (history / f"{time.strftime('%Y%m%d-%H%M%S')}_step{step}.json", run.folder / "config.json"):
        write_json(path, record)
    write_listing(run.folder, {split: dataset.fingerprint for split, dataset in run.datasets.items()})
    write_pool(run.folder, run.model.pool)


def run_steps(run: Run, wait_for_state: Callable[[], TrainState], step: int, resources: Resources) -> TrainState:
    """Trains to --max_steps or a stop request, logging, evaluating and saving on the way; returns the last state."""
    config = run.config
    metrics = position = None  # of the last step

    # The first batch is read while the steps are compiled; what saves, reports and traces is there before.
    batches = read_ahead(to_devices(resources.batches, run.mesh))
    saver, skipped, check, progress, trace = make_instruments(run, step, resources)
    batches = progress.throughput.waiting(batches, progress.is_idle)
    with progress.bar:
        with progress.pausing("compiling"):
            train_step, validate = compile_steps(run, run.state_structs)
            state = wait_for_state()
        while True:
            # The next batch; where the data end, what has been learned is saved.
            try:
                batch, position = next(batches)
            except DataError as error:
                progress.flush()
                if metrics is not None:
                    check(metrics, step)
                end_without_data(error, step, saver, state, position and skipped.extend_position(position))

            # Train; metrics are read while the next step runs.
            step += 1
            trace.before(step)
            state, metrics = train_step(state, batch)
            trace.after(step, metrics)

            # Validate on the same batch at every logged step.
            is_end = step == config.training.max_steps
            is_last = is_end or resources.stop.is_due()
            is_logged = step % config.logging.log_interval == 0 or step == 1 or is_end
            losses = None
            if is_logged:
                state, losses = validate(state)
            progress.add(step, metrics, losses)
            if resources.snapshots.is_due(step):
                progress.flush()
                with progress.pausing("saving"):
                    resources.snapshots.save(state.ema_profiles, step)

            # Save, then evaluate, which takes its time.
            is_evaluated = is_evaluation_due(config, step)
            is_saved = saver.is_due(step, is_evaluated and bool(config.checkpoints.keep_best)) or is_last
            if is_evaluated or is_saved:
                progress.flush()
                check(metrics, step, ema_params=state.ema_params)
            if is_saved:
                with progress.pausing("saving"):
                    (saver.save_last if is_last else saver.save)(state, skipped.extend_position(position))
            if is_evaluated:
                with progress.pausing("evaluating"):
                    is_complete = log_evaluation(resources.trackers, evaluate(run, state, batch), step, resources.stop)
                    if not (is_complete or is_last):
                        saver.save_last(state, skipped.extend_position(position))
                        is_last = True
            if is_last:
                trace.close(metrics)
                return state


def make_instruments(
    run: Run, step: int, resources: Resources
) -> tuple[Saver, SkippedUpdates, Callable, Progress, StepTrace]:
    """Returns what accompanies the steps: what saves, what counts skipped updates, `check(metrics, step)` for values
    that are not finite, the progress bar, and the trace of some steps."""
    config = run.config
    checkpoints = resources.checkpoints
    keep = config.checkpoints
    before = resources.snapshots.wait
    saver = Saver(checkpoints, run.record, keep.save_interval, keep.save_minutes, step, before)
    skipped = SkippedUpdates(config.optimizer.skip_nonfinite, checkpoints, run.state_structs.params, resources.position)
    check = partial(check_finite, checkpoints=checkpoints)
    throughput = Throughput(config.training.batch_size, run.flops_per_step, config.logging.peak_tflops)
    max_steps = config.training.max_steps
    progress = Progress(throughput, resources.trackers, skipped.count, check, step, max_steps, run.stages)
    return saver, skipped, check, progress, StepTrace(config.logging.profile, step)


def finish_evaluation(run: Run, state: TrainState, resources: Resources) -> bool:
    """Makes the evaluation that a kill or a signal left undone; returns False where it is interrupted again."""
    step = int(state.step)
    if not is_evaluation_missing(run, step):
        return True
    log(f"the evaluation of step {step} was not finished: running it now")
    # Of the batch before the one that comes next.
    batches = resources.batches
    batches.set_state({"next_index": batches.get_state()["next_index"] - 1})
    batch = shard_batch(next_batch(batches), run.mesh)
    return log_evaluation(resources.trackers, evaluate(run, state, batch), step, resources.stop)


def end_without_data(error: DataError, step: int, saver: Saver, state: TrainState, position: object) -> NoReturn:
    """Ends a run whose data cannot be read any more, after saving what it has learned."""
    # Of several processes the others cannot be notified in time: they wait for this one in the middle of a step.
    if position is None or jax.process_count() > 1:
        raise error
    saver.save_last(state, position)
    raise UserError(f"{error}; saved at step {step}: with the data back, the same command continues from there")


# --- What a training will take, before it starts ---


def plan_run(run: Run) -> Iterator[str]:
    """Yields what this training will take (memory, time), in lines; nothing of it is written."""
    state = run.state_structs
    training = run.config.training
    compiled = {}
    yield summarize_run(run, state)

    # Two batches are compiled, and the memory of others lies on the line through them.
    def measure(batch_size: int) -> int:
        compiled[batch_size] = compile_train_step(run, state, batch_structs(run.validation_batch, batch_size))
        return memory_needed(compiled[batch_size])

    yield from plan_lines(
        state,
        measure,
        lambda: time_step(run, compiled[training.batch_size]),
        batch_size=training.batch_size,
        multiple=run.mesh.size * run.config.devices.grad_accum * row_period(run.model.objective),
        flops_per_image=run.flops_per_step / training.batch_size,
        num_images=len(run.datasets["train"].source),
        num_steps=training.max_steps,
        devices=run.mesh.devices.flatten().tolist(),
    )


def time_step(run: Run, compiled_step: jax.stages.Compiled) -> float:
    """Returns the seconds of the faster of the first two steps; the first may load code."""
    # Each step donates the state, and the next takes what it returned.
    state = make_state(run)
    seconds = []
    with explaining_out_of_memory("the training step", MEMORY_FLAGS):
        for _ in range(2):
            jax.block_until_ready(state)
            started = time.monotonic()
            state, metrics = compiled_step(state, run.validation_batch, run.model.codec, np.bool_(False))
            jax.block_until_ready((state, metrics))
            seconds.append(time.monotonic() - started)
    return min(seconds)
