"""Rules for samplers: what Python refuses in its own words, flags refuse in theirs."""

import numpy as np
import pytest

import eval_fid
from utils.base.messages import UserError
from utils.flags import reading
from utils.objectives.diffusion import Diffusion
from utils.objectives.flow_matching import FlowMatching
from utils.objectives.mean_flow import MeanFlow
from utils.objectives.shortcut import Shortcut
from utils.sampling.samplers import check_sampler, largest_steps
from utils.sampling.solvers import SamplerConfig

# (fields in Python, objective, the same on a command line, what is refused)
REFUSED = [
    ({"num_steps": 0}, None, "--denoise_timesteps 0", "use a whole number from 1 to 1,000,000"),
    ({"num_steps": -3}, None, "--denoise_timesteps -3", "use a whole number from 1"),
    ({"num_steps": 1_000_001}, None, "--denoise_timesteps 1000001", "use a whole number from 1"),
    ({"num_steps": 1, "solver": "sde"}, None, "--denoise_timesteps 1 --solver sde", "from 2 .* with solver sde"),
    ({"num_steps": 3}, Shortcut(), "--denoise_timesteps 3", "a shortcut model takes a power of two"),
    ({"num_steps": 501, "solver": "ddim"}, Diffusion(), "--denoise_timesteps 501 --solver ddim", "500 noise levels"),
    ({"solver": "ddim"}, None, "--solver ddim", "it is of models trained as diffusions; use one of euler"),
    ({"solver": "heun"}, Shortcut(), "--solver heun --cfg_scale 1", "it does not fit what the model learned"),
    ({"cfg_scale": float("nan")}, None, "--cfg_scale nan", "use a scale from 0 to 1000, or -1"),
    ({"cfg_scale": -2.0}, None, "--cfg_scale -2", "use a scale from 0 to 1000, or -1"),
    ({"cfg_scale": 1001.0}, None, "--cfg_scale 1001", "use a scale from 0 to 1000, or -1"),
    ({"cfg_scale": 2.0}, MeanFlow(), "--cfg_scale 2", "guidance is part of what the model has learned"),
    ({"cfg_interval": (0.9, 0.1)}, None, "--cfg_interval 0.9,0.1", "give first and last time"),
    ({"cfg_interval": (0.0, float("nan"))}, None, "--cfg_interval 0,nan", "give first and last time"),
    ({"cfg_channels": 2}, None, "--cfg_channels 2", "the model has 1 channels; use 1 to 1"),
    ({"time_shift": 3.0}, Shortcut(), "--time_grid shift:3 --cfg_scale 1", "steps of equal length; use the uniform"),
    ({"rtol": 2.0, "solver": "dopri5"}, None, None, "use a tolerance from 1e-7 to 1"),
    ({"solver": "eular"}, None, None, "did you mean euler"),
    ({"num_steps": 2.5}, None, None, "use a whole number"),
    ({"num_steps": True}, None, None, "use a whole number"),
    ({"cfg_scale": True}, None, None, "use a scale"),
    ({"cfg_scale": np.array([1.0, 2.0])}, None, None, "use a scale"),
    *(({"cfg_interval": value}, None, None, "give first and last time") for value in (None, 0.5, "0,1", ("0", "1"))),
    ({"time_shift": 0.0}, None, None, "use a shift from 0.01 to 100"),
    ({"spacing": "trailing"}, None, None, "use one of linspace, leading"),
]


@pytest.mark.parametrize(("fields", "objective", "line", "message"), REFUSED)
def test_python_and_flags_refuse_the_same(read_flags, fields, objective, line, message):
    name = next(iter(fields))
    scale = None if objective else 2.0
    sampler = SamplerConfig(**{"num_steps": 4, "cfg_scale": scale} | fields)
    with pytest.raises(UserError, match=f"^{name}=.*{message}"):
        check_sampler(sampler, objective, class_dropout_prob=0.1, num_channels=1)
    if line is not None:
        words = line if "denoise" in line else f"--denoise_timesteps 4 {line}"
        flag = "time_grid" if name == "time_shift" else name.replace("num_steps", "denoise_timesteps")
        with pytest.raises(UserError, match=f"^--{flag}=.*{message}"):
            reading.read_samplers(read_flags(eval_fid, words.split()), 0.1, objective, 1)


def test_what_can_be_sampled_passes():
    check_sampler(SamplerConfig(1, None))
    check_sampler(SamplerConfig(0, 4.0, solver="dopri5", cfg_channels=3), class_dropout_prob=0.1, num_channels=4)
    check_sampler(SamplerConfig(128, None), Shortcut())
    check_sampler(SamplerConfig(500, -1.0, solver="ddpm"), Diffusion(), class_dropout_prob=0.0)
    check_sampler(SamplerConfig(3, None, time_shift=3.0), MeanFlow())


def test_a_model_that_knows_no_guidance_is_not_guided():
    for dropout, reason in ((0.0, "has no meaning for"), (1.0, "knows no labels")):
        with pytest.raises(UserError, match=f"^cfg_scale=2: .*{reason}"):
            check_sampler(SamplerConfig(4, 2.0), class_dropout_prob=dropout)
        check_sampler(SamplerConfig(4, 1.0), class_dropout_prob=dropout)


def test_evaluations_take_as_many_steps_as_the_model_can():
    assert [largest_steps(count, Shortcut(finest_steps=16)) for count in (1, 3, 16, 32)] == [1, 2, 16, 16]
    assert largest_steps(30, FlowMatching()) == 30
