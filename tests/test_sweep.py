"""Several checkpoints and kinds of parameters in one evaluation: the rows, names and curves of each, compiled once."""

import shutil

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import eval_fid
from tests.test_generate import run  # noqa: F401 (fixture)
from utils.base.messages import UserError
from utils.images import plotting
from utils.runs import evaluations, opening, run_evaluation
from utils.runs.checkpoint import Checkpoints
from utils.runs.opening import choose_steps, load_generator
from utils.runs.results import Results, plot_by_step, plot_fid, to_markdown
from utils.sampling import compiled
from utils.sampling.generator import ImageGenerator, hash_params

ORDER = [(20, "raw"), (20, None), (30, "raw"), (30, None), (40, "raw"), (40, None)]


@pytest.fixture(scope="module")
def swept(run):  # noqa: F811
    """The golden run with two more checkpoints, whose parameters are others."""
    checkpoints = Checkpoints(run)
    saved = checkpoints.restore_config(20)
    for step in (30, 40):
        trees = {name: checkpoints.restore_stored(20, name) for name in ("params", "ema_params")}
        changed = {name: jax.tree.map(lambda leaf: leaf + step / 1e5, tree) for name, tree in trees.items()}  # noqa: B023
        checkpoints._save(step, changed, {"config": saved})
    checkpoints.close()
    return run


@pytest.fixture
def evaluate(swept, read_flags, tmp_path):
    """evaluate('--flag value ...') -> rows of fid.json, of eight samples in one step."""
    np.savez(tmp_path / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8))

    def start(line: str, out="out", load_dir=swept) -> list[dict]:
        words = ["--load_dir", load_dir, "--fid_stats", tmp_path / "images.npz", "--metrics", "moments"]
        words += ["--out", tmp_path / out, "--num_samples", 8, "--batch_size", 8, "--denoise_timesteps", 1]
        words += ["--use_cfg", 0, "--wandb.mode", "disabled", *line.split()]
        eval_fid.main(read_flags(eval_fid, list(map(str, words))))
        return Results(tmp_path / out).rows

    return start


def test_each_snapshot_has_the_row_of_a_call_of_its_own(evaluate, swept, tmp_path, monkeypatch, capsys):
    # The first call is killed in its third row, and the same command goes on.
    scored = []
    score = run_evaluation.RunEvaluation.evaluate

    def count(self, sampler):
        scored.append(self.step)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score(self, sampler)

    monkeypatch.setattr(run_evaluation.RunEvaluation, "evaluate", count)
    # Instead of what takes long to compile and to draw: a number of the parameters, and empty grids.
    monkeypatch.setattr(
        ImageGenerator, "straightness", lambda self, *_, **__: float(jax.tree.leaves(self.params)[0].mean())
    )
    monkeypatch.setattr(plotting, "sample_grid", lambda *_: Figure())
    drawn = []
    draw = plotting.metric_curves
    monkeypatch.setattr(plotting, "metric_curves", lambda points: drawn.append(points) or draw(points))
    num_compiled = compiled.generate._cache_size()
    with pytest.raises(KeyboardInterrupt):
        evaluate("--checkpoints all --params raw,ema")
    rows = evaluate("--checkpoints all --params raw,ema")
    assert scored == [20, 20, 30, 30, 30, 40, 40]
    assert [(row["checkpoint_step"], row.get("params")) for row in rows] == ORDER
    assert compiled.generate._cache_size() <= num_compiled + 1
    assert rows[3]["params_sha256"] == hash_params(load_generator(swept / "checkpoints" / "30").params)
    assert len({row["mean_error"] for row in rows}) == len({row["straightness"] for row in rows}) == 6

    # Pictures, the plot and the table.
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    kinds = [(step, "_raw" if kind else "") for step, kind in ORDER]
    assert names == {"by_step.png", *(f"samples_1_none_step{step}{kind}.png" for step, kind in kinds)}
    assert drawn[0]["mean error (data's unit)"] == {
        kind or "ema": [(row["checkpoint_step"], row["mean_error"]) for row in rows if row.get("params") == kind]
        for kind in ("raw", None)
    }
    shown = capsys.readouterr()
    assert "| step | parameters | steps |" in shown.out
    assert "| 30 | raw | 1 | none | 8 |" in shown.out
    assert f"steps 20, 30, 40 of {swept}, raw and ema parameters" in shown.err
    written = ["fid.json", "fid.csv", *(f"samples_1_none_step{step}{kind}.png" for step, kind in kinds[2:])]
    assert shown.err.endswith(f"written in {tmp_path / 'out'}: {', '.join(written)}, by_step.png\n")

    # One alone, by its number or as a folder, has the same row under another name.
    (alone,) = evaluate("--checkpoints 20 --params raw", "alone")
    assert alone == rows[0]
    (newest,) = evaluate("", "newest")
    assert newest == rows[5]
    assert (tmp_path / "newest" / "samples_1_none.png").exists()


def test_trackers_show_scores_over_the_steps_of_the_training(evaluate, monkeypatch):
    class Recorder:
        def __init__(self, folder, settings, first_step, axis):
            self.lines = [axis]
            recorders.append(self)

        def log(self, step, numbers):
            self.lines.append((step, numbers))

        def log_figure(self, step, name, figure):
            self.lines.append((step, name))

        log_table = close = lambda self, *arguments: None

    recorders = []
    monkeypatch.setattr(evaluations, "Trackers", Recorder)
    monkeypatch.setattr(evaluations, "choose_trackers", lambda settings: ["recorder"])
    monkeypatch.setattr(run_evaluation.RunEvaluation, "evaluate", lambda self, sampler: {"fid": self.step, "nfe": 1})
    evaluate("--checkpoints last:2 --params ema,raw --denoise_timesteps 1,2")
    (axis, *lines, figure) = recorders[0].lines
    assert (axis, figure) == ("checkpoint_step", (8, "by_step"))
    assert lines[0] == (0, {"fid/guidance_none_1_steps": 30, "num_steps": 1, "checkpoint_step": 30})
    assert lines[7] == (7, {"fid/guidance_none_2_steps_raw": 40, "num_steps": 2, "checkpoint_step": 40})


def test_curves_are_named_by_what_tells_them_apart(monkeypatch):
    drawn = []
    monkeypatch.setattr(plotting, "metric_curves", lambda points: drawn.append(points) or Figure())
    monkeypatch.setattr(plotting, "curves", lambda curves, *titles: drawn.append(curves) or Figure())
    rows = [
        {
            "checkpoint_step": step,
            "num_steps": 4,
            "cfg_scale": scale,
            "fid": 10.0 * step + scale,
            "kid": None,
            "ct_validation": 0.1,
        }
        for step in (1, 2)
        for scale in (1.0, 2.0)
    ]
    plot_by_step(rows)
    assert drawn == [{"FID": {"guidance 1": [(1, 11), (2, 21)], "guidance 2": [(1, 12), (2, 22)]}}]
    plot_fid([rows[0], rows[0] | {"params": "raw"}])
    assert list(drawn[1]) == ["guidance 1", "guidance 1, raw"]
    assert "step |" not in to_markdown(rows[:2])


def test_damaged_checkpoints_are_left_out_unless_they_are_named(evaluate, swept, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(swept, copy)
    shutil.rmtree(copy / "checkpoints" / "20" / "ema_params")
    rows = evaluate("--checkpoints all", load_dir=copy)
    assert [row["checkpoint_step"] for row in rows] == [30, 40]
    assert "checkpoints/20 is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="checkpoints/20 is damaged"):
        evaluate("--checkpoints 20,30", load_dir=copy)


def test_checkpoints_that_a_training_removes_are_left_out(evaluate, swept, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(swept, copy)
    # The steps that the first process sees count for all.
    monkeypatch.setattr(opening.hosts, "broadcast", lambda value: [40, 30] if value == [40, 30, 20] else value)
    use = run_evaluation.RunEvaluation.use

    def remove_first(self, snapshot):
        shutil.rmtree(copy / "checkpoints" / "30", ignore_errors=True)
        return use(self, snapshot)

    monkeypatch.setattr(run_evaluation.RunEvaluation, "use", remove_first)
    (row,) = evaluate("--checkpoints all", load_dir=copy)
    assert row["checkpoint_step"] == 40
    assert "checkpoints/30 has been removed meanwhile; it is left out" in capsys.readouterr().err


def test_steps_that_are_chosen():
    steps = [30, 20, 10]
    chosen = {"all": [10, 20, 30], "last:2": [20, 30], "last:5": [10, 20, 30], "30,10": [10, 30], "20": [20]}
    for text, expected in chosen.items():
        assert choose_steps(text, steps) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--checkpoints 20,7", "--checkpoints=20,7: no checkpoint of step 7 is there; found 20, 30, 40"),
        ("--checkpoints last:0", "--checkpoints=last:0: give all, last:5 for the newest five, or steps such as 1000,"),
        ("--checkpoints newest", "--checkpoints=newest: give all"),
        ("--checkpoints all --save_samples x.npz", "--save_samples=x.npz is of one step count, guidance scale and che"),
        ("--params ema,raw --save_samples x.npz", "--save_samples=x.npz is of one"),
        ("--params x", "--params=x: use ema, raw, or ema:WIDTH"),
        ("--params ema,ema", "--params=ema,ema: give ema, raw or ema:WIDTH, each once"),
        ("--params=", "--params=: give ema, raw or ema:WIDTH, each once"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_line(line, message, evaluate, monkeypatch):
    monkeypatch.setattr(run_evaluation, "restore_params", None)
    with pytest.raises(UserError, match=message) as error:
        evaluate(line)
    assert "\n" not in str(error.value)


def test_checkpoints_of_one_checkpoint_or_of_samples_are_refused(evaluate, swept, read_flags):
    with pytest.raises(UserError, match=r"--checkpoints=all has no effect beside --load_dir=.*, which is one checkpoi"):
        evaluate("--checkpoints all", load_dir=swept / "checkpoints" / "20")
    with pytest.raises(UserError, match="--checkpoints=all has no effect on --samples"):
        eval_fid.main(read_flags(eval_fid, ["--samples", "a.npz", "--fid_stats", "b.npz", "--checkpoints", "all"]))
