"""How fast a run goes: images and floating-point operations a second, the fraction of the peak, the time spent waiting
for data; and traces of where the time goes."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

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


def format_duration(seconds: float) -> str:
    """Returns a time in the unit that suits it, such as '7 minutes' or '2.5 days'."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60))
    unit, size = next((pair for pair in units if seconds >= 0.99 * pair[1]), ("second", 1))
    count = seconds / size
    if unit == "second" and count < 1:
        return "less than a second"
    text = f"{count:,.0f}" if count >= 9.95 else f"{count:.1f}".removesuffix(".0")
    return f"{text} {unit}{'s' * (text != '1')}"


@dataclasses.dataclass
class Window:
    """Steps, the seconds between their ends, and those of them spent waiting for data."""

    num_steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, seconds: float, waited: float) -> None:
        self.num_steps += 1
        self.seconds += seconds
        self.waited += waited


class Throughput:
    """Rates of steps that all devices share, over a window of MIN_STEPS at least.

    A step counts from the end of the one before it, so that compilation, logging, saving and evaluating are left out:
    after `pause`, the next step only starts the clock. (Where every step is followed by a pause, each counts from its
    end.) `flops_per_step` are the model's (not those that rematerialisation adds), so that their fraction of the peak
    is the model FLOPs utilisation (MFU, arXiv:2204.02311, appendix B). `peak_tflops` is that of one device; None: by
    its kind.
    """

    MIN_STEPS = 3

    def __init__(self, images_per_step: int, flops_per_step: float, peak_tflops: float | None = None):
        self.images_per_step = images_per_step
        self.flops_per_step = flops_per_step
        peak = peak_tflops or PEAK_TFLOPS.get(jax.devices()[0].device_kind)
        self.peak_flops = peak and peak * 1e12 * jax.device_count()
        self.rates: dict[str, float] = {}  # of the last window that was long enough
        self.waited = 0.0  # in the present step
        self.start_window()
        self.pause()

    def start_window(self) -> None:
        self.steady, self.resumed = Window(), Window()

    def pause(self) -> None:
        """Ends a pause: the time since the last step is no part of the next."""
        self.last, self.is_steady = time.monotonic(), False

    def finish_step(self) -> None:
        now = time.monotonic()
        window = self.steady if self.is_steady else self.resumed
        window.add(now - self.last, self.waited)
        self.last, self.is_steady, self.waited = now, True, 0.0

    def waiting(self, batches: Iterator[Item], is_idle: Callable[[], bool]) -> Iterator[Item]:
        """The batches; the time that each takes to come counts as waited if `is_idle()` once it is there."""
        while True:
            started = time.monotonic()
            batch = next(batches)
            if is_idle():
                self.waited += time.monotonic() - started
            yield batch

    def read(self) -> dict[str, float]:
        """`images_per_second`, `tflops_per_second`, `data_wait_fraction`, and `mfu` where the peak is known: of the
        present window, or the one before while that is too short; nothing before the first."""
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
        """`read`, and the next window begins, if this one was long enough."""
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
    """Writes a trace of ten steps into `folder`, if one is given, from the sixth step after `step` on: for xprof, and
    `perfetto_trace.json.gz` for ui.perfetto.dev."""

    def __init__(self, folder: str | None, step: int):
        self.folder, self.first, self.last, self.is_running = folder, step + 6, step + 15, False

    def before(self, step: int) -> None:
        if self.folder and step == self.first:
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.is_running = True

    def after(self, step: int, outputs: object) -> None:
        """Ends the trace with the last of its steps, or with `close`, once `outputs` are there."""
        if step == self.last:
            self.close(outputs)

    def close(self, outputs: object) -> None:
        if self.is_running:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self.is_running = False
