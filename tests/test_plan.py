"""--plan says how much memory the compiled program then needs."""

import re

import pytest

from utils.base.devices import memory_needed
from utils.base.messages import UserError, format_duration
from utils.training import loop
from utils.training.advice import MemoryModel, batch_structs, bytes_on_device
from utils.training.build import build_run

RUN = """
    --dataset_name digits --use_stable_vae 0 --model.hidden_size 32 --model.depth 1 --model.num_heads 2
    --model.patch_size 1 --model.num_classes 10 --batch_size 128 --wandb.mode disabled
""".split()  # noqa: SIM905 (a command line, as one types it)


@pytest.fixture
def run(configure, tmp_path):
    return build_run(configure([*RUN, "--plan", "1", "--max_steps", "500", "--save_dir", tmp_path / "run"]))


def test_a_line_through_two_batches():
    memory = MemoryModel({8: 1000, 16: 1400})
    assert [memory.bytes_of(size) for size in (8, 16, 100)] == [1000, 1400, 5600]
    assert memory.largest_batch(5599, multiple=1) == 99
    assert memory.largest_batch(5599, multiple=8) == 96
    assert memory.largest_batch(500, multiple=1) == 0


def test_the_plan_is_what_the_compiler_says_of_another_batch(run, tmp_path, monkeypatch):
    needed = {}
    compile_train_step = loop.compile_train_step

    def record(run, state, batch):
        compiled = compile_train_step(run, state, batch)
        needed[len(batch.condition)] = memory_needed(compiled)
        return compiled

    monkeypatch.setattr(loop, "compile_train_step", record)
    lines = list(loop.plan_run(run))
    assert set(needed) == {64, 128}
    memory = MemoryModel(needed)

    state = run.state_structs
    actual = memory_needed(compile_train_step(run, state, batch_structs(run.validation_batch, 256)))
    assert memory.bytes_of(256) == pytest.approx(actual, rel=0.05)
    assert " parameters, " in lines[0]
    assert f"memory at batch 128, on a device of this kind: {needed[128] / 2**20:,.0f} MiB" in lines
    assert bytes_on_device(state.opt_state) == pytest.approx(2 * bytes_on_device(state.params), rel=1e-3)
    fitting = re.search(r"1 x 24 GiB: ([\d,]+)", "\n".join(lines)).group(1)
    assert int(fitting.replace(",", "")) == memory.largest_batch(0.95 * 24 * 2**30, 1)
    assert "500 steps are 42.67 epochs of 1,500 images" in lines  # --max_steps of 128 images
    (at_hand,) = [line for line in lines if "at hand" in line]
    rate, count, unit = re.search(r"at hand: ([\d.,e+]+) images/s, ([\d.]+) (\w+?)s?, without", at_hand).groups()
    seconds = float(count) * {"second": 1, "minute": 60, "hour": 3600}[unit]
    assert seconds == pytest.approx(500 * 128 / float(rate.replace(",", "")), rel=0.1)
    (h100,) = [line for line in lines if "H100" in line]
    rate = 0.4 * 989e12 / (run.flops_per_step / 128)
    assert h100.endswith(f"{rate:,.0f} images/s, less than a second")
    # Nothing is made, nor is anything trained from Python.
    with pytest.raises(UserError, match=r"--plan=1 trains nothing; plan_run\(run\) says what a training takes"):
        loop.train(run)
    assert not (tmp_path / "run").exists()


def test_a_plan_is_of_training_from_scratch(configure, tmp_path):
    with pytest.raises(UserError, match=r"--load_dir=.* has no effect with --plan"):
        configure([*RUN, "--plan", "1", "--load_dir", tmp_path / "none"])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "less than a second"), (0.4, "less than a second"), (1, "1 second"), (2.54, "2.5 seconds"),
        (59, "59 seconds"), (59.6, "1 minute"), (430, "7.2 minutes"), (3599, "1 hour"), (5400, "1.5 hours"),
        (86400 * 1.5, "1.5 days"), (86400 * 12345, "12,345 days"),
    ],
)  # fmt: skip
def test_durations_are_in_a_unit_that_suits_them(seconds, expected):
    assert format_duration(seconds) == expected
