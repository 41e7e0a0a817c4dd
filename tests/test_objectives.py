"""An objective is one file and one line: a toy is registered, trained, evaluated, resumed and sampled."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import eval_fid
import train_flow
from utils.base.messages import UserError
from utils.base.settings import setting, settings_of
from utils.objectives.diffusion import Diffusion
from utils.objectives.flow_matching import FlowMatching, expand_times
from utils.objectives.mean_flow import MeanFlow
from utils.objectives.objectives import OBJECTIVES, make_objective
from utils.objectives.shortcut import Shortcut
from utils.runs import scoring
from utils.trackers.trackers import read_metrics

RUN = """
    --dataset_name digits --use_stable_vae 0 --model.hidden_size 16 --model.depth 1 --model.num_heads 2
    --model.patch_size 4 --model.num_classes 10 --model.denoise_timesteps 2 --batch_size 8 --log_interval 1
    --wandb.mode disabled --model.class_dropout_prob 0 --objective.name data_prediction
""".split()  # noqa: SIM905


EVALUATE = [
    "--fid_stats",
    "data/fid_stats_digits.npz",
    "--num_samples",
    "4",
    "--cfg_scale",
    "1",
    "--inception_weights",
    "WEIGHTS",
]


@dataclasses.dataclass(frozen=True)
class DataPrediction(FlowMatching):
    """The network predicts x_1; the loss is weighted."""

    weight: float = setting(2.0, "Factor of the loss.", 0, 10)

    def loss(self, model_fn, ema_model_fn, x_1, labels, draws):
        x_t = self.corrupt(x_1, draws)
        error = jnp.square(model_fn(x_t, draws["t"], labels) - x_1).mean((1, 2, 3))
        return self.weight * error, {
            "ema_error": jnp.square(ema_model_fn(x_t, draws["t"], labels) - x_1).mean((1, 2, 3))
        }

    def predict_data(self, model_fn, x_t, t, labels):
        return model_fn(x_t, t, labels)

    def velocity(self, model_fn, labels):
        return lambda x, t, t_next: (model_fn(x, t, labels) - x) / expand_times(1 - t, x)


@pytest.fixture
def train(monkeypatch, read_flags, tmp_path, signal_handlers):
    """train(*words): a run in this process."""
    monkeypatch.setitem(OBJECTIVES, "data_prediction", DataPrediction)
    return lambda *words: train_flow.main(read_flags(train_flow, [*RUN, "--save_dir", str(tmp_path), *words]))


def test_a_new_objective_is_trained_evaluated_and_resumed(train, read_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "load_extractors", lambda *names, **options: {})
    # Saved after every step, for the minutes' sake; of those the newest stays, and every second.
    keep = ["--save_minutes", "1e-9", "--keep_last", "1", "--keep_every", "2"]
    train("--max_steps", "2", "--objective.weight", "3", "--peak_tflops", "2", *keep)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2]
    # The network starts at zero: three times the mean square of x_1, whose values are mostly -1.
    assert lines[0]["training/l2_loss"] == pytest.approx(3 * lines[0]["training/ema_error"])
    assert 0.5 < lines[0]["training/ema_error"] < 1
    panels = {path.name for path in (tmp_path / "images").iterdir()}
    samples = {"sample_cfg_1", "sample_raw_cfg_1", "sample_N_1", "sample_N_4", "sample_N_32"}
    assert panels == {"reconstruction_n"} | samples
    with pytest.raises(UserError, match=r"with --objective.weight=3.0, not 5.0"):
        train("--max_steps", "3", "--objective.weight", "5")
    with pytest.raises(UserError, match=r"with --objective.name=data_prediction, not flow_matching"):
        train("--max_steps", "3", "--objective.name", "flow_matching")
    train("--max_steps", "6", "--eval_interval", "0", "--objective.weight", "3", "--peak_tflops", "2", *keep)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "6"}
    rates = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "training/mfu" in line][-1]
    assert rates["training/mfu"] == pytest.approx(rates["training/tflops_per_second"] / 2)
    with pytest.raises(UserError, match=r"--objective.weight=1.0, but the run of --load_dir has 3.0"):
        eval_fid.main(read_flags(eval_fid, ["--load_dir", str(tmp_path), *EVALUATE, "--objective.weight", "1"]))


def test_objectives_are_made_from_their_flags(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "data_prediction", DataPrediction)
    config = {"objective": {"name": "data_prediction", "weight": None}, "model": {"t_sampler": "uniform"}}
    assert make_objective(config) == DataPrediction("uniform", weight=2.0)
    config["objective"]["weight"] = 0.5
    assert make_objective(config) == DataPrediction("uniform", weight=0.5)
    config["objective"]["name"] = "flow_matching"
    assert make_objective(config) == FlowMatching("uniform")
    assert jax.tree.leaves(make_objective(config)) == [FlowMatching("uniform")]  # no pytree: a static argument


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "flow_matching --objective.distill 1 --model.t_sampler uniform --objective.prediction data "
            "--objective.t_mean -0.8 --objective.t_std 0.7 --objective.noise_scale 2",
            FlowMatching("uniform", distill=1, prediction="data", t_mean=-0.8, t_std=0.7, noise_scale=2.0),
        ),
        ("diffusion --objective.diffusion_timesteps 100", Diffusion(num_levels=100)),
        (
            "shortcut --objective.finest_steps 16 --objective.bootstrap_every 4 --objective.bootstrap_guidance 2",
            Shortcut(finest_steps=16, bootstrap_every=4, bootstrap_guidance=2.0),
        ),
        (
            "mean_flow --objective.step_every 2 --objective.omega 3 --objective.kappa 0.1 --objective.norm_p 0.5 "
            "--objective.norm_eps 0.2 --objective.guidance_start 0.3 --objective.guidance_end 0.6 "
            "--objective.prediction data",
            MeanFlow(2, 3.0, 0.1, 0.3, 0.6, norm_p=0.5, norm_eps=0.2, prediction="data"),
        ),
    ],
)
def test_every_field_of_an_objective_is_its_flags(read_flags, line, expected):
    words = f"--objective.name {line}".split()
    assert make_objective(read_flags(train_flow, words)) == expected
    given = {word.removeprefix("--") for word in words if word.startswith("--")}
    assert given == {"objective.name", *settings_of(expected, "objective")}
