"""Configurations of runs: from flags, files and Python, and back to the JSON that a run saves."""

import dataclasses
import json
import tarfile

import pytest
import yaml

import train_flow
from tests.conftest import GOLDEN
from utils.base.messages import UserError
from utils.base.settings import setting
from utils.networks.network import NETWORKS, NetworkConfig, NetworkEntry
from utils.runs.config import RunConfig
from utils.runs.saved_config import read_config
from utils.training import make_config
from utils.training.configure import flatten_settings


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """The folder of a run that an earlier version saved."""
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(GOLDEN / "run.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


@pytest.fixture
def settings_file(tmp_path):
    """settings_file(content, name) -> the path of a file with these settings."""

    def write(content, name="settings.yaml"):
        path = tmp_path / name
        path.write_text(json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content))
        return path

    return write


def test_a_saved_configuration_comes_back_as_it_was(saved_run):
    saved = json.loads((saved_run / "config.json").read_text())
    found = RunConfig.from_settings(flatten_settings(read_config(saved))).to_json()
    before = {name: value for name, value in saved.items() if name not in ("dataset", "model", "wandb")}
    assert before.items() <= found.items()
    model = {**saved["model"], "t_sampler": "logit_normal"}  # once called log-normal
    assert model.items() <= found["model"].items()
    assert saved["wandb"].items() <= found["wandb"].items()


def test_python_and_the_command_line_make_one_configuration(configure):
    given = {"dataset_name": "digits", "model.use_stable_vae": 0, "model.preset": "DiT-S/2", "model.depth": 3}
    given |= {"objective.name": "shortcut", "weight_decay": 0.1, "wandb.tags": ["a", "b"], "save_dir": "runs/x"}
    words = [f"--{name}={','.join(value) if isinstance(value, list) else value}" for name, value in given.items()]
    config = make_config(given)
    assert config == configure(words)
    assert (config.model.hidden_size, config.model.depth, config.model.step_conditioning) == (384, 3, 1)
    assert config.wandb.tags == ("a", "b")


def test_a_file_stands_below_the_command_line(configure, settings_file):
    path = settings_file({"batch_size": 64, "model": {"depth": 3, "num_heads": 4}, "model.lr": 1e-3, "plan": True})
    config = configure(["--config", path, "--model.depth", "5", "--dataset_name", "digits"])
    assert (config.training.batch_size, config.model.depth, config.model.num_heads) == (64, 5, 4)
    assert (config.optimizer.lr, config.training.plan) == (1e-3, 1)
    assert {"batch_size", "model.num_heads"} <= config.given


def test_a_runs_own_file_is_the_configuration_of_another_run(configure, saved_run, tmp_path):
    path = saved_run / "config.json"
    config = configure(["--config", path, "--save_dir", tmp_path / "new", "--max_steps", "7"])
    assert (config.folder, config.training.max_steps) == (tmp_path / "new", 7)
    assert (config.data.dataset_name, config.model.hidden_size, config.optimizer.lr) == ("digits", 32, 1e-3)
    with pytest.raises(
        UserError, match=r"is the configuration of a run: name the folder of the new one with --save_dir"
    ):
        configure(["--config", path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"batch_sise": 64}, "batch_sise is no setting"),
        ({"model": {"depht": 3}}, "model.depht is no setting"),
        ({"batch_size": "many"}, "many is no whole number"),
        (["batch_size"], "has no settings"),
    ],
)
def test_files_that_are_no_settings_are_refused(configure, settings_file, content, message):
    with pytest.raises(UserError, match=message):
        configure(["--config", settings_file(content)])


def test_a_file_that_is_not_there_is_refused(configure, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(there is no such file\); give a YAML or JSON file"):
        configure(["--config", tmp_path / "none.yaml"])


def test_a_folder_alone_continues_its_run(configure, saved_run, capsys):
    config = configure(["--save_dir", saved_run, "--max_steps", "30", "--wandb.mode", "disabled"])
    assert f"continuing {saved_run} with its own configuration" in capsys.readouterr().out
    assert (config.folder, config.training.max_steps, config.training.batch_size) == (saved_run, 30, 16)
    assert (config.data.dataset_name, config.model.hidden_size, config.model.dtype) == ("digits", 32, "float32")
    # What says what is learned is a whole command, as ever.
    assert configure(["--save_dir", saved_run, "--dataset_name", "digits"]).model.hidden_size == 64


@dataclasses.dataclass(frozen=True)
class ConvNetConfig(NetworkConfig):
    PRESETS = {"wide": {"channels": 256}}  # noqa: RUF012 (of a frozen dataclass)

    channels: int = setting(64, "Width.", 1, 4096)


@pytest.fixture
def convnet(monkeypatch):
    monkeypatch.setitem(NETWORKS, "convnet", NetworkEntry(ConvNetConfig, lambda config, remat, mesh: None))


@pytest.mark.usefixtures("convnet")
def test_a_network_has_settings_and_presets_of_its_own(configure):
    line = ["--model.network", "convnet", "--dataset_name", "digits", "--use_stable_vae", "0"]
    assert configure([*line, "--model.channels", "8"]).model == ConvNetConfig(network="convnet", channels=8)
    assert configure([*line, "--model.preset", "wide"]).model.channels == 256
    assert "hidden_size" not in configure(line).to_json()["model"]
    with pytest.raises(UserError, match=r"--model.rope=1 has no effect with --model.network=convnet"):
        configure([*line, "--model.rope", "1"])
    with pytest.raises(UserError, match=r"--model.preset=DiT-S/2: use one of wide"):
        configure([*line, "--model.preset", "DiT-S/2"])


def test_one_name_for_two_settings_is_refused(read_flags, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Other(NetworkConfig):
        depth: int = setting(7, "Layers.", 1, 10)

    monkeypatch.setitem(NETWORKS, "other", NetworkEntry(Other, lambda config, remat, mesh: None))
    with pytest.raises(UserError, match=r"--model.depth is defined in different ways by the networks dit and other"):
        read_flags(train_flow, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_sise": 4}, "--batch_sise is no setting of a run; did you mean --batch_size"),
        ({"model.depth": 0}, "--model.depth=0: use a number from 1 to 1000"),
        ({"model.depth": "3"}, "--model.depth='3': use a whole number"),
        ({"sharding": "pp"}, "--sharding=pp: use one of dp, fsdp"),
        ({"model.beta1": 1.0}, "--model.beta1=1.0 must be below 1"),
        ({"objective.name": "none"}, "--objective.name=none is unknown; known are flow_matching"),
    ],
)
def test_python_is_told_what_a_setting_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        make_config(given)
