"""Rates: what is counted, and what counts as waiting."""

import itertools

import jax
import pytest

from utils import throughput
from utils.throughput import StepTrace, Throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances on request: clock.append(seconds)."""
    ticks = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: sum(ticks))
    return ticks


def test_rates_are_of_the_steps_since_the_restart(clock):
    meter = Throughput(images_per_step=8, flops_per_step=3e12, peak_tflops=12)
    clock.append(5)
    meter.restart()
    clock.append(2)
    meter.num_steps += 4
    expected = {"images_per_second": 16, "tflops_per_second": 6, "mfu": 0.5, "data_wait_fraction": 0}
    assert meter.read() == pytest.approx(expected)
    assert str(meter) == "16.00 images/s, 6 TFLOP/s (50% MFU), 0% waiting for data"


def test_the_peak_is_that_of_all_devices_or_not_told(monkeypatch):
    assert "mfu" not in Throughput(1, 1).read()  # a CPU
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(throughput, "PEAK_TFLOPS", {jax.devices()[0].device_kind: 2})
    assert Throughput(1, 1).peak_flops == 8e12
    assert Throughput(1, 1, peak_tflops=5).peak_flops == 20e12


def test_only_waiting_with_idle_devices_is_a_stall(clock):
    meter = Throughput(1, 1)

    def batches():
        for seconds in (1, 2, 4):
            clock.append(seconds)
            yield seconds

    idle = iter([True, False, True])
    taken = list(itertools.islice(meter.waiting(batches(), lambda: next(idle)), 3))
    assert taken == [1, 2, 4]
    assert meter.read()["data_wait_fraction"] == pytest.approx(5 / 7)


def test_a_trace_is_of_ten_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append(("start", step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", step)))
    trace = StepTrace(str(tmp_path), 100)
    for step in range(101, 130):
        trace.before(step)
        trace.after(step, None)
    assert calls == [("start", 106), ("stop", 115)]
    trace = StepTrace(str(tmp_path), 0)
    for step in range(1, 8):
        trace.before(step)
        trace.after(step, None)
    trace.close(None)
    assert calls[2:] == [("start", 6), ("stop", 7)]
