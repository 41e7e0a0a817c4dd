"""Instruments of a training: rates and traces, the progress bar, checks for values that are not finite."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from utils.base.bars import PAUSED, within
from utils.base.messages import UserError, log, progress_bar
from utils.runs.checkpoint import Checkpoints
from utils.trackers.trackers import Trackers
from utils.training.step import INTERNAL

Item = TypeVar("Item")

# Dense bfloat16 matmuls of one device, TFLOP/s, by jax.Device.device_kind; from the makers' data sheets.
PEAK_TFLOPS = {
    "NVIDIA B200": 2250,
    "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 3090": 71,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU7x": 1153,  # a chip is two devices
}


class Stages:
    """Measures the stages of a start, up to the first step, for one line about where its seconds went."""

    def __init__(self, imports: float | None = None):
        """`imports` are the seconds that the process has run already, if they are to be told."""
        self.seconds = {} if imports is None else {"imports": imports}
        self.last = time.monotonic()

    def end(self, name: str) -> None:
        """Ends a stage; the next one begins."""
        now = time.monotonic()
        self.seconds[name] = now - self.last
        self.last = now

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"the first step ended after {sum(self.seconds.values()):.1f} s: {stages}"


@dataclasses.dataclass
class Window:
    """A number of steps, the seconds between their ends, and how many of these were spent waiting for data."""

    num_steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, seconds: float, waited: float) -> None:
        self.num_steps += 1
        self.seconds += seconds
        self.waited += waited


class Throughput:
    """Measures rates of steps that all devices share, over a window of at least MIN_STEPS.

    A step counts from the end of the one before it. After `pause`, the next step only starts the clock, so that
    compilation, logging, saving and evaluating are left out. (Where every step is followed by a pause, each counts from
    the pause's end.) `flops_per_step` are the model's, not those that rematerialisation adds: their fraction of the
    peak is the model FLOPs utilisation (MFU, arXiv:2204.02311, appendix B). `peak_tflops` is the peak of one device;
    None stands for that of its kind.
    """

    MIN_STEPS = 3  # rates of fewer jump too much to be shown

    def __init__(self, images_per_step: int, flops_per_step: float, peak_tflops: float | None = None):
        self.images_per_step = images_per_step
        self.flops_per_step = flops_per_step
        # All devices count: `flops_per_step` are those of the global batch.
        peak = peak_tflops or PEAK_TFLOPS.get(jax.devices()[0].device_kind)
        self.peak_flops = peak and peak * 1e12 * jax.device_count()
        self.rates: dict[str, float] = {}  # of the last window that was long enough
        self.waited = 0.0  # in the present step
        self.start_window()
        self.pause()

    def start_window(self) -> None:
        self.steady = Window()  # steps that follow another one
        self.resumed = Window()  # steps that follow a pause

    def pause(self) -> None:
        """Ends a pause: the time since the last step is no part of the next."""
        self.last = time.monotonic()
        self.is_steady = False

    def finish_step(self) -> None:
        """Counts a step that has just ended."""
        now = time.monotonic()
        window = self.steady if self.is_steady else self.resumed
        window.add(now - self.last, self.waited)
        self.last = now
        self.is_steady = True
        self.waited = 0.0

    def waiting(self, batches: Iterator[Item], is_idle: Callable[[], bool]) -> Iterator[Item]:
        """Yields the batches. The time that one takes to come counts as waited if `is_idle()` is true once it has."""
        while True:
            started = time.monotonic()
            batch = next(batches)
            # A wait while the devices still compute costs nothing.
            if is_idle():
                self.waited += time.monotonic() - started
            yield batch

    def read(self) -> dict[str, float]:
        """Returns `images_per_second`, `tflops_per_second`, `data_wait_fraction` (0 to 1) and, where the peak is known,
        `mfu` (0 to 1).

        The rates are those of the present window, or of the one before while this one is too short; the result is empty
        before the first window is long enough.
        """
        # Steps after a pause measure less exactly, and are used only where there are no others.
        window = self.steady if self.steady.num_steps >= self.MIN_STEPS else self.resumed
        if window.num_steps < self.MIN_STEPS:
            return self.rates
        seconds = max(window.seconds, 1e-9)
        flops = window.num_steps * self.flops_per_step / seconds
        self.rates = {
            "images_per_second": window.num_steps * self.images_per_step / seconds,
            "tflops_per_second": flops / 1e12,
            "data_wait_fraction": window.waited / seconds,
        }
        if self.peak_flops:
            self.rates["mfu"] = flops / self.peak_flops
        return self.rates

    def read_window(self) -> dict[str, float]:
        """Returns what `read` does, and starts the next window if this one was long enough."""
        rates = self.read()
        if max(self.steady.num_steps, self.resumed.num_steps) >= self.MIN_STEPS:
            self.start_window()
        return rates

    def __str__(self) -> str:
        rates = self.read()
        if not rates:
            return "measuring speed"
        mfu = f" ({rates['mfu']:.0%} MFU)" if "mfu" in rates else ""
        images = rates["images_per_second"]
        return (
            f"{images:,.{0 if images >= 100 else 2}f} images/s, {rates['tflops_per_second']:,.3g} TFLOP/s{mfu}, "
            f"{rates['data_wait_fraction']:.0%} waiting for data"
        )


class StepTrace:
    """Writes a trace of ten steps into `folder`, if one is given, from the sixth step after `step` on.

    It is for xprof; `perfetto_trace.json.gz` in it is for ui.perfetto.dev.
    """

    def __init__(self, folder: str | None, step: int):
        self.folder = folder
        # Past the first steps, which load code and fill buffers.
        self.first = step + 6
        self.last = step + 15
        self.is_running = False

    def before(self, step: int) -> None:
        if self.folder and step == self.first:
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.is_running = True

    def after(self, step: int, outputs: object) -> None:
        """Ends the trace after the last of its steps, once that step's `outputs` have been computed."""
        if step == self.last:
            self.close(outputs)

    def close(self, outputs: object) -> None:
        """Ends the trace, if one is being written, once `outputs` have been computed."""
        if self.is_running:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self.is_running = False


class Progress:
    """Shows a progress bar, and logs the metrics of some steps.

    A step is reported once the next one is dispatched, so that its numbers are read without leaving the devices idle.
    As that waits for the step, no more than two are ever in flight. `flush` reports the last one.
    """

    def __init__(
        self,
        throughput: Throughput,
        trackers: Trackers,
        count_skipped: Callable,
        check: Callable,
        step: int,
        max_steps: int,
        stages: Stages,
    ):
        """`count_skipped(metrics, step)` is called at every step and returns the metrics to log, `check(metrics, step)`
        before they are logged. `stages` are logged once the first step is reported."""
        self.stages: Stages | None = stages
        self.throughput = throughput
        self.trackers = trackers
        self.count_skipped = count_skipped
        self.check = check
        self.pending = None
        self.bar: Any = progress_bar(total=max_steps, initial=step, unit="step")

    def add(self, step: int, metrics: dict[str, Any], validation: dict[str, Any] | None) -> None:
        """Reports the step before, and keeps this one to be reported next. It is logged if it has `validation`."""
        self.flush()
        self.pending = (step, metrics, validation)

    def flush(self) -> None:
        """Reports the step that is kept, if there is one; waits until it has been computed."""
        if self.pending is None:
            return
        step, metrics, validation = self.pending
        self.pending = None

        # The bar. Reading the loss waits for the step.
        loss = float(metrics["l2_loss"])
        if self.stages:
            self.stages.end("first step")
            log(str(self.stages))
            self.stages = None
        self.throughput.finish_step()
        self.bar.set_postfix_str(f"loss {loss:.4f}, {self.throughput}", refresh=False)
        self.bar.update()

        # The log.
        logged = self.count_skipped(metrics, step)
        if validation is not None:
            self.check(metrics, step)
            groups = {"training": logged | self.throughput.read_window(), "validation": validation}
            named = {f"{group}/{name}": x for group, values in groups.items() for name, x in values.items()}
            self.trackers.log(step, named)
            self.throughput.pause()

    @contextlib.contextmanager
    def pausing(self, what: str) -> Iterator[None]:
        """Has the bar say what it waits for in a block between two steps, whose time is left out of the rates and of
        the bar's estimate. Bars that begin there are shown as parts of it."""
        started = time.monotonic()
        with within(self.bar, what, PAUSED):
            yield

        # tqdm estimates from the time since its start: both of its clocks move by the pause.
        self.throughput.pause()
        if not self.bar.disable:
            seconds = time.monotonic() - started
            self.bar.start_t += seconds
            self.bar.last_print_t += seconds

    def is_idle(self) -> bool:
        """Returns whether the devices have finished all that was dispatched."""
        return self.pending is None or self.pending[1]["l2_loss"].is_ready()


# --- Divergence ---

tree_norm = jax.jit(optax.tree.norm)

# Beside the position in the data, in a checkpoint.
TOTAL = "skipped_updates"
IN_A_ROW = "skipped_in_a_row"


class SkippedUpdates:
    """Counts the updates that were left out, and ends the run after `limit` of them in a row (0: none is left out).

    The counts are saved with the position in the data, so that a resumed run counts on.
    """

    def __init__(self, limit: int, checkpoints: Checkpoints, params: PyTree, position: dict[str, Any]):
        """`params` is a tree of the parameters' structure, for the gradients' names; `position` is as it was saved."""
        self.limit = limit
        self.checkpoints = checkpoints
        # In the order of the leaves, by whose number the step names the largest gradient.
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        self.names = ["/".join(str(key.key) for key in path) for path in paths]
        self.total = position.get(TOTAL, 0)
        self.in_a_row = position.get(IN_A_ROW, 0)

    def extend_position(self, position: dict[str, Any]) -> dict[str, Any]:
        """Returns the position in the data with the counts; without them where no update is left out."""
        return position | {TOTAL: self.total, IN_A_ROW: self.in_a_row} if self.limit else position

    def count(self, metrics: dict[str, Any], step: int) -> dict[str, Any]:
        """Returns the metrics of a finished step to log: with the number of updates left out so far, without values
        that are not finite. Raises UserError where too many in a row were left out."""
        # Count; without a limit, the step has no such metrics.
        if not self.limit:
            return metrics
        is_skipped = bool(metrics["is_skipped"])
        self.total += is_skipped
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0

        # One bad batch is passed over, but a run whose every update is bad has diverged.
        if self.in_a_row >= self.limit:
            name = self.names[int(metrics["largest_gradient"])]
            loss, update, gradient = (
                float(metrics[name]) for name in ("l2_loss", "update_norm", "largest_gradient_norm")
            )
            raise UserError(
                f"--skip_nonfinite={self.limit}: the last {self.in_a_row} updates were not finite; at step {step} the "
                f"loss is {loss:g}, the norm of the update {update:g}, and the largest gradient that of {name} (norm "
                f"{gradient:g}); {_way_on(self.checkpoints)}"
            )

        # Strict JSON has no NaN or infinity, and no plot an axis for them.
        logged = {name: value for name, value in metrics.items() if name not in INTERNAL}
        if is_skipped:
            logged = {name: value for name, value in logged.items() if np.isfinite(value)}
        return logged | {TOTAL: self.total}


def check_finite(
    metrics: dict[str, Any], step: int, checkpoints: Checkpoints, ema_params: PyTree | None = None
) -> None:
    """Raises UserError in a run that has diverged, before its state is saved over a good one.

    The loss of an update that was left out may be anything.
    """
    # A norm is finite only if all of its elements are: one number stands for a whole tree.
    values = [metrics["param_norm"]]
    if not metrics.get("is_skipped", False):
        values.append(metrics["l2_loss"])
    if ema_params is not None:
        values.append(tree_norm(ema_params))
    if not np.isfinite(values).all():
        raise UserError(f"loss or parameters are no longer finite at step {step}; {_way_on(checkpoints)}")


def _way_on(checkpoints: Checkpoints) -> str:
    # The newest checkpoint may still be on its way to the disk.
    checkpoints.wait()
    saved = checkpoints.steps()
    way = f"the same command continues from step {saved[0]}: run it" if saved else "start again"
    return f"{way} with a lower --model.lr, or with --model.dtype float32"
