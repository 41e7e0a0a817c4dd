"""How fast a run goes: images and floating-point operations a second, the fraction of the peak, the time spent waiting
for data; and traces of where the time goes."""

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
}


class Throughput:
    """Rates since the last `restart`, of steps that all devices share.

    `flops_per_step` are the model's (not those that rematerialisation adds), so that their fraction of the peak is the
    model FLOPs utilisation (MFU, arXiv:2204.02311, appendix B). `peak_tflops` is that of one device; None: by its kind.
    """

    def __init__(self, images_per_step: int, flops_per_step: float, peak_tflops: float | None = None):
        self.images_per_step, self.flops_per_step = images_per_step, flops_per_step
        peak = peak_tflops or PEAK_TFLOPS.get(jax.devices()[0].device_kind)
        self.peak_flops = peak and peak * 1e12 * jax.device_count()
        self.restart()

    def restart(self) -> None:
        self.started, self.num_steps, self.waited = time.monotonic(), 0, 0.0

    def waiting(self, batches: Iterator[Item], is_idle: Callable[[], bool]) -> Iterator[Item]:
        """The batches; the time that each takes to come counts as waited if `is_idle()` once it is there."""
        while True:
            started = time.monotonic()
            batch = next(batches)
            if is_idle():
                self.waited += time.monotonic() - started
            yield batch

    def read(self) -> dict[str, float]:
        """`images_per_second`, `tflops_per_second`, `data_wait_fraction`, and `mfu` where the peak is known."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        flops = self.num_steps * self.flops_per_step / seconds
        rates = {
            "images_per_second": self.num_steps * self.images_per_step / seconds,
            "tflops_per_second": flops / 1e12,
            "data_wait_fraction": self.waited / seconds,
        }
        return rates | ({"mfu": flops / self.peak_flops} if self.peak_flops else {})

    def __str__(self) -> str:
        rates = self.read()
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
