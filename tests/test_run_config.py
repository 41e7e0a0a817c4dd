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
from utils.objectives.objectives import OBJECTIVES
from utils.runs.config import RunConfig
from utils.runs.saved_config import read_config
from utils.training import build_run, make_config
from utils.training.configure import flatten_settings
from utils.training.start import check_settings


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


@pytest.mark.parametrize("before", OBJECTIVES)
@pytest.mark.parametrize("after", OBJECTIVES)
def test_what_an_objective_sets_follows_the_typed_one(configure, settings_file, tmp_path, before, after):
    other = ["--config", save_config(configure, settings_file, "--objective.name", before)]
    words = ["--dataset_name", "digits", "--codec", "pixels", "--objective.name", after, "--save_dir", tmp_path / "new"]
    assert configure([*words, *other]) == configure(words)
    # What the run had of its own stays.
    other = ["--config", save_config(configure, settings_file, "--model.target_update_rate", 0.9)]
    assert configure([*words, *other]).optimizer.target_update_rate == 0.9


def save_config(configure, settings_file, *words):
    """The path of the config.json of a run of digits with these flags."""
    config = configure(["--dataset_name", "digits", "--codec", "pixels", "--save_dir", "runs/before", *words])
    return settings_file({**config.to_json(), "dataset": {"image_shape": [8, 8, 1]}}, "config.json")


def test_a_typed_preset_wins_over_the_sizes_of_a_file(configure, settings_file, tmp_path):
    words = ["--save_dir", tmp_path / "new", "--model.preset", "DiT-S/4", "--model.num_heads", 3]
    hand_written = settings_file({"model": {"hidden_size": 16, "depth": 1, "num_heads": 1, "preset": "DiT-B/2"}})
    for path in (hand_written, save_config(configure, settings_file, "--model.hidden_size", 16, "--model.depth", 1)):
        model = configure(["--config", path, *words]).model
        assert (model.hidden_size, model.patch_size, model.depth, model.num_heads) == (384, 4, 12, 3)
    model = configure(["--config", hand_written, "--save_dir", tmp_path / "new"]).model
    assert (model.hidden_size, model.patch_size, model.depth) == (16, 2, 1)  # those of the file over its own preset's


@pytest.mark.parametrize(
    ("content", "words", "codec"),
    [
        ({"codec": "pixels"}, "--use_stable_vae 1", "kl"),
        ({"codec": "pixels"}, "--vae x", "kl:x"),
        ({"use_stable_vae": 0}, "--vae x", "kl:x"),
        ({"codec": "kl:x"}, "--model.use_stable_vae 0", "pixels"),
        ({"vae": "x"}, "--codec pixels", "pixels"),
        ({"vae": "x"}, "--use_stable_vae 1", "kl:x"),
    ],
)
def test_a_typed_spelling_wins_over_that_of_a_file(configure, settings_file, content, words, codec):
    assert configure(["--config", settings_file(content), *words.split()]).codec.text == codec


def test_a_typed_wandb_mode_wins_over_that_of_a_file(configure, settings_file):
    path = settings_file({"wandb": {"offline": True}})
    assert configure(["--config", path, "--wandb.mode", "disabled"]).wandb.mode == "disabled"
    assert configure(["--config", settings_file({"wandb.mode": "disabled"}), "--wandb.offline"]).wandb.mode == "offline"
    with pytest.raises(UserError, match=r"--wandb.offline contradicts --wandb.mode=online"):
        configure(["--config", settings_file({"wandb": {"offline": True, "mode": "online"}})])


def test_lists_in_a_file_keep_their_values(configure, settings_file):
    path = settings_file({"wandb": {"tags": ["a b", "c,d"], "mode": "disabled"}, "trackers": []})
    config = configure(["--config", path, "--trackers", "wandb"])
    assert config.wandb.tags == ("a b", "c,d")
    # No trackers, and wandb disabled besides, agree.
    assert configure(["--config", settings_file({"trackers": [], "wandb.mode": "disabled"})]).logging.trackers == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"batch_sise": 64}, "batch_sise is no setting; did you mean batch_size?"),
        ({"model": {"depht": 3}}, "model.depht is no setting; did you mean model.depth?"),
        ({"batch_size": "many"}, "batch_size=many: many is no whole number"),
        ({"model.lr": "fast"}, "model.lr=fast: could not convert"),
        ({"model.lr": float("nan")}, "--model.lr=nan is no finite number"),
        ({"batch_size": [16]}, r"batch_size=\[16\] is no single value; give one"),
        ({"wandb": {"notes": {"a": "b"}}}, r"wandb.notes=\{'a': 'b'\} is no single value; give one"),
        ({"model": {"depth": 1}, "model.depth": 2}, "model.depth is given twice, nested and with a dot"),
        ("batch_size: 1\nbatch_size: 2", "line 2: batch_size is given twice; give it once"),
        ({"config": "other.yml"}, "config=other.yml names another file, which is not read"),
        (["batch_size"], "there are no settings in it"),
    ],
)
def test_files_that_are_no_settings_are_refused(configure, settings_file, content, message):
    path = settings_file(content)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"--config={path}:? {message}"):
        configure(["--config", path])


def test_a_file_that_is_not_there_is_refused(configure, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(there is no such file\); give a YAML or JSON file"):
        configure(["--config", tmp_path / "none.yaml"])


def test_a_folder_alone_continues_its_run(configure, saved_run, capsys):
    config = configure(["--save_dir", saved_run, "--max_steps", "30", "--wandb.mode", "disabled"])
    assert f"continuing {saved_run} with its own configuration" in capsys.readouterr().out
    assert (config.folder, config.training.max_steps, config.training.batch_size) == (saved_run, 30, 16)
    assert (config.data.dataset_name, config.model.hidden_size, config.model.dtype) == ("digits", 32, "float32")
    # A command line that names its data stands for itself.
    assert configure(["--save_dir", saved_run, "--dataset_name", "digits"]).model.hidden_size == 64


def test_flags_beside_a_folder_change_the_configuration_of_its_run(configure, saved_run):
    own = configure(["--save_dir", saved_run])
    other = configure(["--save_dir", saved_run, "--model.lr", "0.5", "--data_dir", "/x"])
    changed = {name for name, value in other.settings().items() if own.settings()[name] != value}
    assert changed == {"model.lr", "data_dir"}
    assert other.data.dataset_name == "digits"
    # What cannot change is refused where the run is resumed, by the name that was typed.
    record = {"dataset": {"codec": {"name": "pixels", "source": None, "sha256": None}}}
    for word in ("--objective.name=diffusion", "--objective.name=shortcut", "--model.depth=7", "--batch_size=8"):
        changed = configure(["--save_dir", saved_run, word]).to_json() | record
        with pytest.raises(UserError, match=rf"holds a run with {word.partition('=')[0]}=\S+, not "):
            check_settings(changed, own.to_json() | record, saved_run)


@dataclasses.dataclass(frozen=True)
class ConvNetConfig(NetworkConfig):
    PRESETS = {"wide": {"channels": 256}}  # noqa: RUF012 (of a frozen dataclass)

    channels: int = setting(64, "Width.", 1, 4096)


@pytest.fixture
def convnet(monkeypatch):
    monkeypatch.setitem(NETWORKS, "convnet", NetworkEntry(ConvNetConfig, lambda config, remat, mesh: None))


@pytest.mark.usefixtures("convnet")
def test_a_runs_own_file_may_be_of_a_network_without_presets(configure, settings_file):
    path = save_config(configure, settings_file, "--model.network", "convnet", "--model.channels", 8)
    assert configure(["--config", path, "--save_dir", "runs/new"]).model == ConvNetConfig(network="convnet", channels=8)


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
        # As on the command line: names that are not registered, and settings without effect.
        ({"trackers": ["diary"]}, "--trackers=diary: diary is unknown; known are wandb"),
        ({"trackers": [], "wandb.tags": ["a"]}, "--wandb.tags=a has no effect without wandb among --trackers"),
        ({"num_shards": 3}, "--num_shards=3 has no effect with --sharding=dp"),
        ({"plan": 1, "load_dir": "x"}, "--load_dir=x has no effect with --plan"),
        ({"dataset_name": "digits", "broken_images": "skip"}, "--broken_images=skip has no effect on digits"),
        ({"objective.finest_steps": 8}, "--objective.finest_steps=8 has no effect with --objective.name=flow_matching"),
        ({"model": {"depth": 1}, "model.depth": 2}, "model.depth is given twice"),
        ({"seed": -1}, "--seed=-1: use a number from 0 to 4294967295"),
        ({"max_steps": 2**31}, "--max_steps=2147483648 is too large"),
        ({"save_dir": "hdfs://bucket/x"}, "--save_dir=hdfs://bucket/x is a URL"),
        ({"save_dir": ""}, "--save_dir=: a name of 1 to 255 bytes is needed"),
    ],
)
def test_python_is_told_what_a_setting_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        make_config(given)


def test_python_may_nest_groups_and_give_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_config({"save_dir": "~/run"}).folder == tmp_path / "run"
    config = make_config({"dataset_name": "digits", "model": {"depth": 1, "lr": 0.1}, "save_dir": tmp_path})
    assert config == make_config(
        {"dataset_name": "digits", "model.depth": 1, "model.lr": 0.1, "save_dir": str(tmp_path)}
    )


def test_one_of_several_processes_does_not_train_alone():
    with pytest.raises(UserError, match=r"--coordinator_address=localhost:1: call initialize_processes before build"):
        build_run(make_config({"dataset_name": "digits", "coordinator_address": "localhost:1"}))
