"""--keep_best: the checkpoints with the best scores stay beside the newest, over resumes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from tests.test_checkpoint import CONFIG, state  # noqa: F401 (fixture)
from utils.base.messages import UserError
from utils.runs.best import BestSteps, KeepBest
from utils.runs.checkpoint import Checkpoints
from utils.training import loop
from utils.training.build import build_run


def write_scores(folder, **scores: dict[int, float]) -> None:
    """Adds lines {step, name: value} to a run's metrics.jsonl."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for name, values in scores.items():
            for step, value in values.items():
                file.write(json.dumps({"step": step, name.replace("__", "/"): value}) + "\n")


def find(folder, text: str, steps=range(1, 8)) -> list[int]:
    return list(BestSteps(folder, KeepBest.parse(text)).find(list(steps)))


def test_the_best_have_the_lowest_scores_or_the_highest(tmp_path):
    values = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 6: float("nan"), 9: 0.0}
    write_scores(tmp_path, fid=values, precision=values, validation_loss_t__mean=values)
    assert find(tmp_path, "fid:3") == [4, 2, 3]  # equal ones newest first; 9 is not there any more
    assert find(tmp_path, "precision:2") == [1, 3]
    assert find(tmp_path, "loss:1") == [4]
    assert find(tmp_path, "fid:9") == [4, 2, 3, 1]  # without those that have no number
    assert find(tmp_path, "kid:2") == []
    write_scores(tmp_path, fid={1: 1.0})  # an evaluation that was made again
    assert find(tmp_path, "fid:1") == [1]
    assert BestSteps(tmp_path, KeepBest("fid", 2)).describe([1, 2, 3]) == "best fid: 1 at step 1, 3 at step 2"
    assert BestSteps(tmp_path, KeepBest("kid", 2)).describe([1]) == "best kid: none was logged"


def test_the_best_stay_beside_the_newest_over_a_resume(tmp_path, state):  # noqa: F811
    def save(steps, scores):
        checkpoints = Checkpoints(tmp_path, 1, 5, BestSteps(tmp_path, KeepBest("fid", 2)))
        for step in steps:
            checkpoints.save(state.replace(step=jnp.int32(step)), CONFIG, None)
            write_scores(tmp_path, fid={step: scores[step]} if step in scores else {})
        checkpoints.close()
        return sorted(checkpoints.manager.all_steps())

    scores = {1: 4.0, 2: 2.0, 3: 3.0, 4: 9.0, 5: 8.0, 6: 1.0}
    assert save([1, 2, 3, 4], scores) == [2, 3, 4]
    assert save([5, 6, 7, 8], scores) == [2, 5, 6, 8]  # multiples of 5 stay, too


def test_a_training_saves_what_it_evaluates_and_keeps_the_best(tmp_path, configure, monkeypatch, capsys):
    """Steps and evaluations are made up."""
    scores = {2: 3.0, 3: 9.0, 4: 1.0, 6: 2.0, 8: 4.0, 9: 5.0}

    def step(before, batch):
        return before.replace(step=before.step + 1), {"l2_loss": jnp.ones(()), "param_norm": jnp.ones(())}

    def evaluate(run, reached, batch):
        yield "validation_loss_t/mean", scores[int(reached.step)]

    monkeypatch.setattr(loop, "compile_steps", lambda run, structs: (step, lambda unchanged: (unchanged, {})))
    monkeypatch.setattr(loop, "evaluate", evaluate)
    line = "--dataset_name digits --codec pixels --batch_size 8 --model.preset debug --wandb.mode disabled"
    line += " --eval_interval 2 --save_minutes 0 --save_interval 1000 --keep_last 1 --keep_best loss:1 --max_steps 9"
    run = build_run(configure([*line.split(), "--save_dir", tmp_path]))

    def train(**changes):
        parts = {name: dataclasses.replace(getattr(run.config, name), **given) for name, given in changes.items()}
        loop.train(dataclasses.replace(run, config=dataclasses.replace(run.config, **parts)))
        return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())

    # Without the flag, what is evaluated is not saved.
    assert train(training={"max_steps": 3}, checkpoints={"keep_best": None}) == [3]
    assert "best loss" not in capsys.readouterr().out
    assert train() == [4, 9]
    assert "best loss: 1 at step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--keep_best fid", "--keep_best=fid: give a score and a number of checkpoints, such as fid:3 or loss:3"),
        ("--keep_best fid:0 --fid_stats s.npz", "--keep_best=fid:0: give a score and a number"),
        (
            "--keep_best fid:3",
            r"--keep_best=fid:3: fid is not logged by this run; use loss \(--fid_stats brings others",
        ),
        ("--keep_best kid:3 --fid_stats s.npz", r"kid is not logged by this run; use loss, fid \(--metrics has more\)"),
        (
            "--keep_best inception_score:3 --metrics inception_score,prdc --fid_stats s.npz",
            "inception_score is not logged by this run; use loss, precision, recall, density, coverage",
        ),
        (
            "--keep_best fid:3 --extractor dinov2 --extractor_weights w.pth --fid_stats s.npz",
            r"fid is not logged by this run; use loss, fd_dinov2 \(--metrics has more\)",
        ),
        ("--keep_best loss:3 --eval_interval 0", "--keep_best=loss:3 has no effect with --eval_interval=0"),
    ],
)
def test_scores_that_are_not_logged_are_refused(words, message, configure, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        configure(["--save_dir", tmp_path, *words.split()])
    assert "\n" not in str(error.value)


def test_all_processes_keep_what_the_first_one_says(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr("utils.runs.best.broadcast", lambda own: told.append(own) or [1])
    write_scores(tmp_path, fid={1: 1.0})
    checkpoint = type("Checkpoint", (), {"step": 1})
    assert BestSteps(tmp_path, KeepBest("fid", 1)).should_preserve([checkpoint], context=None) == [True]
    assert told == [None]  # this process has not looked
