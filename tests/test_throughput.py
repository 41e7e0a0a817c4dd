"""Rates: what is counted, and what counts as waiting."""

import itertools
import time
from pathlib import Path

import jax
import pytest

from tests.conftest import run_program
from utils.training import progress
from utils.training.progress import Stages, StepTrace, Throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances on request: clock.append(seconds)."""
    ticks = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: sum(ticks))
    return ticks


def finish(meter, clock, *seconds):
    for each in seconds:
        clock.append(each)
        meter.finish_step()


def test_rates_are_of_three_steps_at_least_and_of_no_pause(clock):
    meter = Throughput(images_per_step=8, flops_per_step=3e12, peak_tflops=12)
    finish(meter, clock, 100, 1, 1)  # the first has compiled something, or waited for data
    assert (meter.read(), str(meter)) == ({}, "measuring speed")
    finish(meter, clock, 0.25)
    expected = {"images_per_second": 8 * 3 / 2.25, "tflops_per_second": 4, "mfu": 1 / 3, "data_wait_fraction": 0}
    assert meter.read_window() == pytest.approx(expected)
    assert str(meter) == "10.67 images/s, 4 TFLOP/s (33% MFU), 0% waiting for data"
    clock.append(50)  # logging, saving, evaluating
    meter.pause()
    finish(meter, clock, 1e-6, 2, 2)
    assert meter.read_window() == pytest.approx(expected)  # of the window before, as this one is too short
    finish(meter, clock, 2)
    assert meter.read()["images_per_second"] == 4


def test_where_every_step_is_logged_each_counts_from_the_end_of_the_logging(clock):
    meter = Throughput(images_per_step=8, flops_per_step=1)
    for _ in range(3):
        assert meter.read_window() == {}
        finish(meter, clock, 2)
        clock.append(7)
        meter.pause()
    assert meter.read_window()["images_per_second"] == 4


def test_the_peak_is_that_of_all_devices_or_not_told(monkeypatch):
    assert "mfu" not in Throughput(1, 1).read()  # a CPU
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(progress, "PEAK_TFLOPS", {jax.devices()[0].device_kind: 2})
    assert Throughput(1, 1).peak_flops == 8e12
    assert Throughput(1, 1, peak_tflops=5).peak_flops == 20e12


def test_only_waiting_with_idle_devices_is_a_stall(clock):
    meter = Throughput(1, 1)

    def batches():
        for seconds in (1, 2, 4):
            clock.append(seconds)
            yield seconds

    idle = iter([True, False, True])
    meter.finish_step()
    for _ in itertools.islice(meter.waiting(batches(), lambda: next(idle)), 3):
        meter.finish_step()
    assert meter.read()["data_wait_fraction"] == pytest.approx(5 / 7)


def test_the_stages_of_a_start_are_told_in_one_line(clock):
    stages = Stages(imports=1.5)
    for name, seconds in {"data": 0.25, "model": 2, "first step": 0.5}.items():
        clock.append(seconds)
        stages.end(name)
    line = "the first step ended after 4.2 s: imports 1.5, data 0.2, model 2.0, first step 0.5"
    assert str(stages) == line
    assert str(Stages()) == "the first step ended after 0.0 s: "


def test_the_age_of_a_process_is_that_since_its_start():
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system does not say when a process was started")
    words = "import time; time.sleep(0.3); from utils.flags.program import process_age; print(process_age())"
    started = time.monotonic()
    age = float(run_program("-c", words).stdout)
    assert 0.3 <= age <= time.monotonic() - started + 0.02  # started a tick earlier, perhaps


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
