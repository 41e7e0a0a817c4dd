"""convert_checkpoint.py as a user runs it: published files of all kinds in, runs and files out, the hub on loopback."""

import json
import os
import pickle
import re
import shutil
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert_checkpoint
from tests.conftest import GOLDEN, run_program
from tests.test_generate import run as golden_run  # noqa: F401 (fixture)
from tests.torch_writer import save_torch
from utils.base.external import BadFileError
from utils.base.mesh import make_mesh
from utils.base.messages import UserError, WriteError
from utils.base.torch_files import read_torch_file
from utils.convert.sources import METADATA_KEY, read_source
from utils.images.samples import open_samples
from utils.runs.checkpoint import Checkpoints
from utils.runs.export import model_card
from utils.runs.opening import load_generator, load_model
from utils.sampling.solvers import SamplerConfig

FILES = GOLDEN / "checkpoints"
VAE = GOLDEN / "vae_tiny"
SIT = ["--source", FILES / "sit_small_train.pt", "--family", "sit", "--num_heads", "2"]


@pytest.fixture
def convert(read_flags):
    def run(*words):
        convert_checkpoint.main(read_flags(convert_checkpoint, list(map(str, words))))

    return run


@pytest.fixture(scope="module")
def state():
    return read_source(str(FILES / "sit_small_train.pt")).state


def outputs(folder):
    generator = load_generator(folder)
    golden = np.load(FILES / "sit_small_golden.npz")
    with jax.default_matmul_precision("highest"):
        found = generator.model_fn(np.moveaxis(golden["x"], 1, -1), golden["t"], golden["y"])
    return np.moveaxis(np.asarray(found), -1, 1), golden["out"]


def test_an_imported_run_holds_its_parameters_once_and_is_a_run(convert, tmp_path, capsys):
    run = tmp_path / "a run"
    convert(*SIT, "--vae", VAE, "--out", run)
    printed = capsys.readouterr()
    assert f"sample.py --load_dir '{run}' --cfg_scale 1.5 --cfg_channels 3 --num_samples 4" in printed.out + printed.err
    assert "24 wide, 1 deep, 2 heads, patch 4 on 8x8x4, 7 classes, objective flow_matching" in printed.out + printed.err
    items = {path.name for path in (run / "checkpoints" / "0").iterdir() if path.is_dir()}
    assert items == {"ema_params", "config", "checksums"}
    found, expected = outputs(run)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    out = tmp_path / "images"
    run_program("sample.py", "--load_dir", run, "--num_samples", 3, "--solver", "sde", "--denoise_timesteps", 4,
                "--cfg_scale", 1.5, "--cfg_channels", 3, "--out", out, "--save_samples", out / "s.npz")  # fmt: skip
    assert open_samples(out / "s.npz").image_shape == (64, 64, 3)
    with pytest.raises(UserError, match="holds a run already; choose another folder"):
        convert(*SIT, "--vae", VAE, "--out", run)
    done = run_program("train_flow.py", "--dataset_name", "digits", "--use_stable_vae", 0, "--save_dir", run,
                       "--model.num_classes", 10, "--model.patch_size", 2, check=False)  # fmt: skip
    assert "imported model, which has no optimizer to continue with; train from it with --load_dir" in done.stderr


def stop_here(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["write_json", "Checkpoints.save_params", "Checkpoints.close"])
def test_an_import_that_was_stopped_is_done_by_the_same_command(convert, tmp_path, monkeypatch, place):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(f"utils.runs.importing.{place}", stop_here)
        with pytest.raises(KeyboardInterrupt):
            convert(*SIT, "--vae", VAE, "--out", run)
    if place == "Checkpoints.close":  # all is there
        assert (run / "config.json").exists()
        with pytest.raises(UserError, match="holds a run already"):
            convert(*SIT, "--vae", VAE, "--out", run)
    else:
        (run / "checkpoints" / "0.orbax-checkpoint-tmp-0" / "ema_params").mkdir(parents=True)
        convert(*SIT, "--vae", VAE, "--out", run)
    found, expected = outputs(run)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["0"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "configs/20260101-000000_step0.json"])
def test_a_training_without_a_checkpoint_is_a_run(convert, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(UserError, match="holds a run already; choose another folder"):
        convert(*SIT, "--vae", VAE, "--out", tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == [name.partition("/")[0]]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(convert, tmp_path, full_disk, silent_orbax, capfd):
    full_disk(4096)
    with pytest.raises(
        UserError, match=r"step 0 could not be written .*File too large.*: make room, and give the same"
    ):
        convert(*SIT, "--vae", VAE, "--out", tmp_path / "run")
    full_disk(None)
    convert(*SIT, "--vae", VAE, "--out", tmp_path / "run")
    full_disk(4096)
    with pytest.raises(WriteError, match=r"x\.safetensors could not be written \(File too large\); raise the limit"):
        convert("--load_dir", tmp_path / "run", "--out", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["fp16.pt", "bf16.safetensors", "module.pt", "float32.bin", "ema.pt"])
def test_half_precision_prefixes_and_other_files_are_read(convert, tmp_path, state, kind):
    name, suffix = kind.split(".")
    dtype = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}.get(name, np.float32)
    tensors = {key: np.ascontiguousarray(value).astype(dtype) for key, value in state.items()}
    if name == "module":
        tensors = {f"module.{key}": value for key, value in tensors.items()}
    path = tmp_path / kind
    if suffix == "safetensors":
        save_file(tensors, path)
    elif name == "ema":
        others = {key: np.zeros_like(value) for key, value in tensors.items()}
        save_torch(path, {"model": others, "ema": tensors, "opt": {"state": {0: {"step": 3}}}, "lr": 1e-4})
    else:
        save_torch(path, tensors)
    convert("--source", path, "--family", "sit", "--num_heads", 2, "--vae", VAE, "--out", tmp_path / "run")
    found, expected = outputs(tmp_path / "run")
    tolerance = {"fp16": 2e-3, "bf16": 2e-2}.get(name, 1e-5)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < tolerance
    if dtype != np.float32:  # what is read is what was written
        stored = Checkpoints(tmp_path / "run").restore_stored(0, "ema_params")
        kernel = np.asarray(stored["block_0"]["mlp"]["dense_0"]["kernel"])
        np.testing.assert_array_equal(kernel, tensors["blocks.0.mlp.fc1.weight"].astype(np.float32).T)


def test_diffusers_says_what_it_is(convert, tmp_path):
    convert("--source", FILES / "dit_tiny_diffusers", "--vae", VAE, "--out", tmp_path / "a")
    convert(
        "--source", FILES / "dit_tiny.pt", "--family", "dit", "--num_heads", 4, "--vae", VAE, "--out", tmp_path / "b"
    )
    trees = [Checkpoints(tmp_path / name).restore_stored(0, "ema_params") for name in "ab"]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    assert saved["dataset"]["class_names"] == [f"class {i}" for i in range(10)]
    assert saved["objective"] == {"name": "diffusion", "diffusion_timesteps": 1000}


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (self.path,)


def copy_diffusers(tmp_path):
    return shutil.copytree(FILES / "dit_tiny_diffusers", tmp_path / "copy")


def write_evil(tmp_path, state):
    save_torch(tmp_path / "evil.pt", {}, pickle.dumps({"a": Runs(tmp_path / "ran")}, 2))
    return tmp_path / "evil.pt"


def write_legacy(tmp_path, state):
    (tmp_path / "old.pt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    return tmp_path / "old.pt"


def write_cut(tmp_path, state):
    content = (FILES / "dit_tiny.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    return tmp_path / "cut.pt"


def write_cut_safetensors(tmp_path, state):
    save_file({"a": np.zeros(1000, np.float32)}, tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:2000])
    return tmp_path / "cut.safetensors"


def write_without_weights(tmp_path, state):
    folder = copy_diffusers(tmp_path)
    next((folder / "transformer").glob("*.safetensors")).unlink()
    return folder


def write_other_schedule(tmp_path, state):
    folder = copy_diffusers(tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


def write_absurd(sizes):
    def write(tmp_path, state):
        folder = copy_diffusers(tmp_path)
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
        return folder

    return write


def write_missing(tmp_path, state):
    left = {key: np.ascontiguousarray(value) for key, value in state.items() if key != "blocks.0.attn.proj.weight"}
    save_file(left, tmp_path / "missing.safetensors")
    return tmp_path / "missing.safetensors"


def write_compressed(tmp_path, state):
    with (
        zipfile.ZipFile(FILES / "dit_tiny.pt") as old,
        zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return tmp_path / "c.pt"


def write_text(tmp_path, state):
    (tmp_path / "a.pt").write_text("no checkpoint")
    return tmp_path / "a.pt"


def write_no_model(tmp_path, state):
    save_torch(tmp_path / "n.pt", {"opt": {"lr": 1.0}})
    return tmp_path / "n.pt"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_evil, r"it asks for (pathlib|__builtin__|builtins)\.\w+, which no array needs; it was not run"),
        (write_legacy, "PyTorch before 1.6 wrote it; read it there and save it again"),
        (write_cut, "cut short"),
        (write_cut_safetensors, "no whole safetensors file"),
        (write_without_weights, "the folder holds no weights"),
        (write_other_schedule, "its scheduler has prediction_type v_prediction"),
        (write_absurd({"sample_size": 2**19}), "its config.json has sample_size 524288, which no model"),
        (write_absurd({"sample_size": 9}), "its config.json has sample_size 9, which no model of patches 2"),
        (write_absurd({"sample_size": 2**30}), "its config.json has sample_size 1073741824"),
        (
            write_absurd({"num_attention_heads": 2**19}),
            "its config.json says width .* but its pos_embed.proj",
        ),
        (write_absurd({"patch_size": 2**10}), "its config.json says width .* and patch_size 1024"),
        (write_missing, r"no tensor blocks\.0\.attn\.proj\.weight"),
        (write_compressed, "is compressed"),
        (write_text, "no whole zip"),
        (write_no_model, "neither ema nor model"),
        (lambda *_: FILES / "lightningdit_tiny.pt", "LightningDiT"),
        (lambda *_: "/no/such.pt", "there is no such file"),
        (lambda tmp_path, _: tmp_path, "the folder holds no weights"),
    ],
)
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(convert, tmp_path, state, write, message):
    source = write(tmp_path, state)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=message) as error:
        convert("--source", source, "--family", "sit", "--num_heads", 2, "--vae", VAE, "--out", out)
    assert "\n" not in str(error.value)
    assert "--source=" in str(error.value)
    assert not out.exists()
    assert not (tmp_path / "ran").exists()


# --- Prefixes, and what stands beside a model ---

AVERAGE = {"n_averaged": np.array(3)}
BESIDE = np.zeros(3, np.float32)


def under(prefix, tensors):
    return {f"{prefix}{name}": value for name, value in tensors.items()}


@pytest.fixture(scope="module")
def trained(state):
    """Other parameters than the EMA `state`."""
    return {name: np.zeros_like(value) for name, value in state.items()}


WRAPPED = {
    **{prefix: lambda ema, _, prefix=prefix: under(prefix, ema) for prefix in (
        "module.", "_orig_mod.", "model.", "net.", "ema_model.", "_fsdp_wrapped_module.", "module.module.",
        "ema.module.", "_orig_mod.module.", "module._orig_mod.", "module.model._orig_mod.ema.net.", "state_dict.model.",
    )},
    "wrapped blocks": lambda ema, _: {
        re.sub(r"^blocks\.0\.", "blocks.0._checkpoint_wrapped_module._orig_mod.", name): x for name, x in ema.items()
    },
    "averaged": lambda ema, _: AVERAGE | under("module.", ema),
    "ema_pytorch": lambda ema, raw: {
        "initted": np.array(True), "step": np.array(7), **under("online_model.", raw), **under("ema_model.module.", ema)
    },
    "lightning ema": lambda ema, raw: under("model.", raw) | under("ema.module.", ema),
    "model with its ema inside": lambda ema, raw: raw | under("ema.", ema),
    "lightning": lambda ema, raw: {
        "epoch": 3, "state_dict": under("model._orig_mod.", ema), "callbacks": {"x": {"best": BESIDE}},
        "optimizer_states": [{"state": {}}], "lr_schedulers": {"a": BESIDE},
    },
    "training": lambda ema, raw: {
        "model": {"module": raw}, "ema": under("module.", ema), "opt": {"state": {0: {"exp_avg": BESIDE}}}
    },
    "model alone": lambda ema, _: {"model": ema, "opt": {"lr": 1.0}, "steps": 3},
    "with its VAE": lambda ema, _: under("model.", ema) | {"vae.decoder.weight": BESIDE, "step": np.array(1)},
}  # fmt: skip
SAID = {
    "averaged": "not of the model, and left out: n_averaged",
    "ema_pytorch": "the EMA under 'ema_model.' is taken; what is under 'online_model.' is not\n"
    "not of the model, and left out: initted, step",
    "lightning ema": "the EMA under 'ema.' is taken; what is under 'model.' is not",
    "model with its ema inside": "the EMA under 'ema.' is taken; what is under '' is not",
    "training": "the EMA under 'ema.' is taken; what is under 'model.' is not",
    "with its VAE": "not of the model, and left out: step, vae.decoder.weight",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_wrappers_put_before_names_is_no_part_of_them(tmp_path, state, trained, capsys, name):
    content = WRAPPED[name](state, trained)
    if all(isinstance(value, np.ndarray) for value in content.values()):
        path = tmp_path / "x.safetensors"
        save_file({key: np.ascontiguousarray(value) for key, value in content.items()}, path)
    else:
        path = tmp_path / "x.pt"
        save_torch(path, content)
    found = read_source(str(path)).state
    assert found.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(found[key], value)
    assert capsys.readouterr().out == (f"{SAID[name]}\n" if name in SAID else "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ema, _: under("module.foo.", ema), "its tensors are under 'foo.', which no known wrapper writes; save"),
        (lambda ema, _: {"best": {"weights": ema}}, "its tensors are under 'best.weights.', which no known"),
        (lambda ema, raw: {"ema_2": raw, "ema": ema}, "2 models, under 'ema_2.' and 'ema.'"),
        (lambda ema, raw: {"model": raw, "state_dict": ema}, "it holds 2 models, under 'model.' and 'state_dict.'"),
        (lambda ema, raw: under("module.", raw) | ema, "it has two tensors .*, under different wrappers"),
        (lambda ema, _: under("net.", ema) | {"other.weight": BESIDE}, "a tensor other.weight beside .* 'net.'"),
        (lambda ema, _: {"ema": {"blocks.0.x": BESIDE}}, "no tensor x_embedder.proj.weight, .* but ema.blocks.0.x"),
        (lambda ema, _: {"pos_embed.proj.weight": BESIDE}, "have diffusers' names; give the folder"),
    ],
)  # fmt: skip
def test_what_is_under_other_names_is_refused_by_its_prefix(tmp_path, state, trained, change, message):
    save_torch(tmp_path / "x.pt", change(state, trained))
    with pytest.raises(UserError, match=message):
        read_source(str(tmp_path / "x.pt"))


def write_shards(folder, state, stem="model.safetensors"):
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number, names in enumerate(np.array_split(sorted(state), 2), 1):
        file = f"{stem.split('.')[0]}-0000{number}-of-00002.{stem.split('.')[1]}"
        part = {name: np.ascontiguousarray(state[name]) for name in names.tolist()}
        (save_file if file.endswith("safetensors") else lambda tensors, path: save_torch(path, tensors))(
            part, folder / file
        )
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards_are_read_from_their_folder_or_index(convert, tmp_path, state):
    write_shards(tmp_path / "a", under("module.", state))
    write_shards(tmp_path / "b", state, "pytorch_model.bin")
    for place in ("a", "a/model.safetensors.index.json", "b/pytorch_model.bin.index.json"):
        found = read_source(str(tmp_path / place)).state
        assert found.keys() == state.keys()
        assert all(np.array_equal(found[name], value) for name, value in state.items())
    # Of diffusers.
    folder = copy_diffusers(tmp_path)
    (file,) = (folder / "transformer").glob("*.safetensors")
    write_shards(folder / "transformer", load_file(file), file.name)
    file.unlink()
    convert("--source", folder, "--vae", VAE, "--out", tmp_path / "run")
    convert("--source", FILES / "dit_tiny_diffusers", "--vae", VAE, "--out", tmp_path / "whole")
    trees = [Checkpoints(tmp_path / name).restore_stored(0, "ema_params") for name in ("run", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_shards_that_are_not_whole_are_refused_by_name(tmp_path, state):
    weight_map = write_shards(tmp_path / "a", state)
    index = tmp_path / "a" / "model.safetensors.index.json"
    second = max(weight_map.values())

    def refused(content, message):
        index.write_text(content if isinstance(content, str) else json.dumps({"weight_map": content}))
        with pytest.raises(UserError, match=message) as error:
            read_source(str(tmp_path / "a"))
        assert "\n" not in str(error.value)

    refused(weight_map | {"blocks.9.x": second}, f"its shard {second} has no tensor blocks.9.x")
    refused("{", "it is no JSON")
    for content in ({}, [], None, {"a": 3}, {"a": "../x.safetensors"}, {"a": "/x.safetensors"}, {"a": index.name}):
        refused(content, "has no weight_map to files beside it")
    (tmp_path / "a" / second).write_bytes(b"x" * 100)
    refused(weight_map, f"its shard {second}: it is ")
    (tmp_path / "a" / second).unlink()
    refused(weight_map, f"its shard {second} is missing \\(1 of 2 are\\)")
    os.mkfifo(tmp_path / "a" / second)
    refused(weight_map, f"its shard {second}: it is no regular file")


def test_tensors_that_an_index_leaves_out_are_read(tmp_path, state):
    weight_map = write_shards(tmp_path / "a", state)
    kept = dict(list(weight_map.items())[::2])
    assert set(kept.values()) == set(weight_map.values())
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": kept}))
    found = read_source(str(tmp_path / "a")).state
    assert found.keys() == state.keys()
    assert all(np.array_equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", FILES / "dit_tiny.pt", "--num_heads", "4"], "no tensor tells DiT from SiT: give --family"),
        (["--source", FILES / "dit_tiny_diffusers", "--family", "sit"], "it is a DiT's, not SiT's"),
        (["--source", FILES / "sit_small_train.pt", "--family", "dit", "--num_heads", "2"], "it is a SiT's, not DiT's"),
        (["--source", FILES / "sit_small_train.pt"], "no published model is 24 wide: give .* --num_heads"),
        (["--source", FILES / "sit_small_train.pt", "--num_heads", "7"], "--num_heads=7 does not divide"),
        ([*SIT, "--class_names", "NAMES"], "it has 7 classes, but --class_names names 2"),
        ([*SIT, "--class_names", "/no/such"], "--class_names=/no/such: there is no such file"),
        ([*SIT, "--push", "a/b"], "--push=a/b has no effect with --source"),
        ([*SIT, "--model.depth", "3"], "--model.depth=3 has no effect"),
        ([*SIT, "--load_dir", "x"], "give one of --source"),
        ([], "give one of --source"),
        (["--load_dir", "/no/such"], "--load_dir=/no/such holds no checkpoint"),
        (["--load_dir", "x", "--family", "dit"], "--family=dit has no effect with --load_dir"),
    ],
)
def test_flags_that_cannot_be_are_one_line(convert, tmp_path, words, message):
    (tmp_path / "names").write_text("cat\ndog\n")
    words = [str(tmp_path / "names") if word == "NAMES" else word for word in words]
    with pytest.raises(UserError, match=message) as error:
        convert(*words, "--out", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--out is not given"):
        convert("--source", FILES / "dit_tiny.pt")


def test_a_vae_of_other_latents_is_refused(convert, tmp_path):
    convert("--source", FILES / "lightningdit_tiny.pt", "--family", "lightningdit", "--out", tmp_path / "run")
    saved = Checkpoints(tmp_path / "run").restore_config(0)
    with pytest.raises(UserError, match="makes latents 4x4x4 of images 32x32x3, but the model takes 4x4x8"):
        load_model(saved, make_mesh(), codec=f"kl:{VAE}")
    with pytest.raises(UserError, match="has latents of 4 channels, the model 8"):
        convert(
            "--source",
            FILES / "lightningdit_tiny.pt",
            "--family",
            "lightningdit",
            "--vae",
            VAE,
            "--out",
            tmp_path / "b",
        )


def test_a_run_is_exported_and_comes_back_bit_for_bit(convert, tmp_path):
    convert(*SIT, "--vae", VAE, "--out", tmp_path / "run")
    convert("--load_dir", tmp_path / "run", "--out", tmp_path / "x.safetensors")
    convert("--source", tmp_path / "x.safetensors", "--out", tmp_path / "again")
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode  # that of the umask
    trees = [Checkpoints(tmp_path / name).restore_stored(0, "ema_params") for name in ("run", "again")]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    configs = [Checkpoints(tmp_path / name).restore_config(0) for name in ("run", "again")]
    assert configs[0] == configs[1]
    convert("--load_dir", tmp_path / "again", "--out", tmp_path / "y.safetensors")
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "xy")
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    with pytest.raises(UserError, match=r"--family=sit has no effect on .*, which says it itself"):
        convert("--source", tmp_path / "x.safetensors", "--family", "sit", "--out", tmp_path / "b")


@pytest.mark.parametrize(("words", "item"), [("", "ema_params"), ("--params raw", "params")])
def test_the_parameters_that_the_flag_names_are_exported(convert, golden_run, tmp_path, monkeypatch, words, item):  # noqa: F811
    def read(self, step, name):
        raise UserError(f"reads {name}")

    monkeypatch.setattr(Checkpoints, "restore_stored", read)
    with pytest.raises(UserError, match=f"reads {item}"):
        convert("--load_dir", golden_run, "--out", tmp_path / "x.safetensors", *words.split())


@pytest.mark.parametrize(
    ("dataset", "vae", "words"),
    [
        ({"name": "folder:/home/me/pets"}, "/home/me/vae", "of `folder:pets`|a VAE with sha256 abc"),
        ({"name": "npz:../secret/a.npz"}, None, "of `npz:a.npz`"),
        ({"name": "latents:~/secret/lat"}, "secret/../vae", "of `latents:lat`|a VAE with sha256 abc"),
        ({"name": "imagenet256"}, "stabilityai/sd-vae-ft-ema", "of `imagenet256`|of `stabilityai/sd-vae-ft-ema`"),
    ],
)
def test_a_model_card_names_no_folder_of_this_machine(dataset, vae, words):
    sizes = {"hidden_size": 8, "depth": 1, "num_heads": 2, "patch_size": 4, "timestep_scale": 1.0}
    config = {
        "model": {**sizes, "class_dropout_prob": 0.1},
        "objective": {"name": "mean_flow"},
        "dataset": {"image_shape": [8, 8, 3], "latent_shape": [8, 8, 3], "class_names": ["a"], "vae": vae,
                    "vae_sha256": "abc", **dataset},
    }  # fmt: skip
    card = model_card(config, "someone/pets", 10)
    assert not re.search(r"/home|secret|~", card)
    assert all(word in card for word in words.split("|"))
    assert "cfg_scale" not in card  # guidance is part of what MeanFlow learns
    assert "cfg_scale=2.0" in model_card({**config, "objective": {"name": "flow_matching"}}, "someone/pets", 10)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model": {}, "dataset": {}}', '{"model": {"depth": "x"}, "dataset": {}}']
)
def test_metadata_that_are_no_run_are_refused(convert, tmp_path, state, text):
    tensors = {name: np.ascontiguousarray(value) for name, value in state.items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={METADATA_KEY: text})
    with pytest.raises(UserError, match="are no configuration of a run"):
        convert("--source", tmp_path / "x.safetensors", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensors_stay_within_their_storage(tmp_path):
    save_torch(tmp_path / "a.pt", {"a": np.arange(4, dtype=np.float32)})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert files["a/data.pkl"].count(b"K\x04") == 2  # the storage's size, and the shape
    reasons = []
    for place in range(len(files["a/data.pkl"])):
        if files["a/data.pkl"][place : place + 2] == b"K\x04":
            changed = files | {"a/data.pkl": files["a/data.pkl"][:place] + b"K\x05" + files["a/data.pkl"][place + 2 :]}
            with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
                for name, content in changed.items():
                    archive.writestr(name, content)
            # A larger storage is said, or a tensor of five of its four numbers.
            reason = None
            try:
                np.testing.assert_array_equal(read_torch_file(tmp_path / "b.pt")["a"], np.arange(4))
            except BadFileError as error:
                reason = str(error)
            reasons.append(reason)
    assert reasons == [None, "it holds a tensor that reaches beyond its storage"]


def test_tensors_are_no_larger_than_the_file(tmp_path):
    save_torch(tmp_path / "a.pt", {"a": np.arange(4, dtype=np.float32)})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        pickled = archive.read("a/data.pkl").replace(b"K\x04\x85", b"K\x05\x85").replace(b"K\x01\x85", b"K\x00\x85")
    save_torch(tmp_path / "b.pt", {"a": np.arange(4, dtype=np.float32)}, pickled)
    with pytest.raises(BadFileError, match=r"a tensor of shape \(5,\) in 4 numbers"):
        read_torch_file(tmp_path / "b.pt")

    # Tied weights are read; not one tensor under many names.
    tensors = {"a": np.arange(1000, dtype=np.float32)}
    save_torch(tmp_path / "a.pt", tensors)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        pickled = archive.read("a/data.pkl")
    (place,) = re.findall(rb"Rq(.)s\.$", pickled, re.DOTALL)
    for count in (2, 6):
        others = (b"X\x01\0\0\0" + bytes([ord("a") + i]) + b"h" + place + b"s" for i in range(1, count))
        save_torch(tmp_path / "a.pt", tensors, pickled[:-1] + b"".join(others) + b".")
        if count == 2:
            assert [array.size for array in read_torch_file(tmp_path / "a.pt").values()] == [1000, 1000]
        else:
            with pytest.raises(BadFileError, match="share their bytes with each other"):
                read_torch_file(tmp_path / "a.pt")


def test_latents_need_no_vae(convert, tmp_path):
    """Without the VAE, latents are sampled from Python, and what needs images says what is missing."""
    saved = GOLDEN / "checkpoints" / "dit_tiny.pt"
    convert("--source", saved, "--family", "dit", "--num_heads", 4, "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dataset"]["vae"] == "stabilityai/sd-vae-ft-ema"
    config["dataset"]["codec"]["source"] = "no/such/vae"
    params = Checkpoints(tmp_path / "run").restore_stored(0, "ema_params")
    Checkpoints(tmp_path / "other").save_params(params, config)
    generator = load_generator(tmp_path / "other")
    assert generator.model.latent_shape == (8, 8, 4)
    sampler = SamplerConfig(2, 1.5, solver="ddim", cfg_channels=3)
    latents = generator.sample_latents(generator.noise([0]), [3], sampler)
    assert latents.shape == (1, 8, 8, 4)
    with pytest.raises(UserError, match="--codec=kl:no/such/vae is neither a file, a folder nor a hub id"):
        generator.decode(latents)
    with pytest.raises(UserError, match="--codec=kl:no/such/vae"):
        load_generator(tmp_path / "other", needs_images=True)
