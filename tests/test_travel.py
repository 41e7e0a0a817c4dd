"""Exports on their way: read where they lie, in any place and spelling; the card, its picture, scores and lines; the
upload."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import fsspec
import huggingface_hub.constants as constants
import jax
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.hf_api import api
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.numpy import load_file, save_file

import convert_checkpoint
import sample
from tests.conftest import ROOT
from tests.fake_hub import fake_hub
from tests.test_generate import run as golden_run  # noqa: F401 (fixture)
from utils.base.external import open_safetensors
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.conditions.condition import record_condition
from utils.conditions.vector import VectorCondition
from utils.convert.sources import EXPORT_KEY, METADATA_KEY
from utils.networks.models import init_params
from utils.runs.checkpoint import Checkpoints
from utils.runs.export import export_run
from utils.runs.model_card import Extras, as_code, as_text, model_card
from utils.runs.opening import load_generator, load_model, open_checkpoint
from utils.runs.remote_run import find_remote_run
from utils.sampling.generator import hash_params
from utils.storage import remote, staging
from utils.training.start import SourceRun

HOSTILE = "<img src=x onerror=alert(1)> $(touch x) `y` | **z** \u202e"
KIND = VectorCondition.of_rows(np.array([[0, 10], [1, 20], [2, 60]], np.float32), ["angle $(touch x) `<b>|", "mass"])
STEP = 20  # of the golden run


@pytest.fixture(scope="module")
def exported(golden_run, tmp_path_factory):  # noqa: F811
    """The folder of an export without a picture."""
    folder = tmp_path_factory.mktemp("exported") / "cats"
    export_run(str(golden_run), folder, picture="none")
    return folder


@pytest.fixture(scope="module")
def expected(golden_run):  # noqa: F811
    """Samples of the run itself."""
    return draw(load_generator(golden_run))


@pytest.fixture(scope="module")
def vector_run(golden_run, tmp_path_factory):  # noqa: F811
    """A run whose condition are two numbers, and its parameters at random."""
    folder = tmp_path_factory.mktemp("vector") / "run"
    saved = Checkpoints(golden_run).restore_config(STEP)
    del saved["dataset"]["class_names"]
    saved["dataset"] |= record_condition(KIND)
    shapes = jax.eval_shape(lambda: init_params(load_model(saved, make_mesh()), jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), shapes)
    Checkpoints(folder).save_params(params, saved)
    return folder


def draw(generator):
    return generator.sample([3, 7], num_steps=2, cfg_scale=2.0, seed=5)


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- Read where it lies ---


def test_an_export_draws_what_its_run_draws_from_any_place(exported, expected, tmp_path, monkeypatch):
    there = shutil.copytree(exported, tmp_path / "a place" / "cats")
    shutil.copy(there / "model.safetensors", tmp_path / "a place" / "alone.safetensors")
    (tmp_path / "link").symlink_to(there)
    (tmp_path / "link.safetensors").symlink_to(there / "model.safetensors")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = content_of(tmp_path)
    for path in tmp_path.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        places = [there, f"{there}/", f"{there}/checkpoints", "../a place/cats", "../link", "../link.safetensors"]
        for place in [*places, there / "model.safetensors", "../a place/alone.safetensors"]:
            np.testing.assert_array_equal(draw(load_generator(place)), expected)
            assert open_checkpoint(place)[1] == [STEP]
    finally:
        for path in tmp_path.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert content_of(tmp_path) == before


def test_a_training_starts_from_it_and_an_export_of_it_is_the_same(exported, golden_run, tmp_path):  # noqa: F811
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step, (params, ema) = SourceRun.open(str(exported)).restore(sharding)
    _, (_, own) = SourceRun.open(str(golden_run)).restore(sharding)
    assert step == STEP
    for tree in (params, ema):  # one set serves as both
        jax.tree.map(np.testing.assert_array_equal, tree, own)
    export_run(str(exported), tmp_path / "again.safetensors")
    again, first = (open_safetensors(path) for path in (tmp_path / "again.safetensors", exported / "model.safetensors"))
    assert again.metadata == first.metadata
    jax.tree.map(np.testing.assert_array_equal, again.tensors, first.tensors)


def test_which_parameters_it_has_is_known(exported, golden_run, tmp_path, capsys):  # noqa: F811
    raw = tmp_path / "raw.safetensors"
    export_run(str(golden_run), raw, "raw")
    own = load_generator(golden_run, params="raw").params
    capsys.readouterr()
    for place, params, is_said in ((exported, "raw", True), (raw, "raw", False), (exported, "ema", False)):
        found = load_generator(place, params=params).params
        assert ("holds one set of parameters, which --params=raw takes as well" in capsys.readouterr().err) == is_said
        if place == raw:
            jax.tree.map(np.testing.assert_array_equal, found, own)
    with pytest.raises(UserError, match=r"without --ema_profiles, .* or was exported without them; use ema or raw"):
        load_generator(exported, params="ema:0.1")


def test_outputs_lie_in_the_folder_and_beside_a_file(exported, expected, tmp_path, monkeypatch, read_flags):
    folder = shutil.copytree(exported, tmp_path / "cats")
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    line = "--num_samples 2 --classes 3,7 --denoise_timesteps 2 --cfg_scale 2 --seed 5 --save_samples s.npz"
    for place, out in (("../cats", folder / "samples"), ("../alone.safetensors", tmp_path / "alone" / "samples")):
        sample.main(read_flags(sample, ["--load_dir", place, *line.split()]))
        assert [path.name for path in out.iterdir()] == ["grid.png"]
        np.testing.assert_array_equal(np.load("s.npz")["arr_0"], expected)
        Path("s.npz").unlink()
    assert not list(Path().iterdir())


def rewrite(file, change, metadata=None):
    """Saves the tensors of an export after a change, with its own metadata or others."""
    if metadata is None:
        header = file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")]
        metadata = json.loads(header)["__metadata__"]
    tensors = {name: value.copy() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def flip(folder):
    def change(tensors):
        tensors["blocks.0.attn.proj.bias"].view(np.uint32)[0] ^= 1

    rewrite(folder / "model.safetensors", change)


def strip(folder):
    rewrite(folder / "model.safetensors", lambda tensors: None, {"format": "pt"})


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def point(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")


def pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def of_another_depth(folder):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("blocks.0.")]:
            tensors[name.replace("blocks.0.", "blocks.7.")] = tensors[name]

    metadata = {"format": "pt", METADATA_KEY: (folder / "config.json").read_text()}
    rewrite(folder / "model.safetensors", change, metadata)


def with_other_facts(folder):
    metadata = {
        METADATA_KEY: (folder / "config.json").read_text(),
        EXPORT_KEY: '{"step": -1, "params": [], "crc32": 3}',
    }
    rewrite(folder / "model.safetensors", lambda tensors: None, metadata)


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (cut, "cats", "it is no whole safetensors file|cut short"),
        (cut, "cats/model.safetensors", "it is no whole safetensors file|cut short"),
        (flip, "cats", "its tensor blocks.0.attn.proj.bias is not what was written; take the file from a copy"),
        (strip, "cats", "was not exported here; make a run of it .*convert_checkpoint.py --source .* --family sit"),
        (empty, "cats", "it is empty"),
        (point, "cats", "it is a pointer of Git LFS in place of the file; fetch that by git lfs pull"),
        (pipe, "cats", "holds no checkpoint"),
        (of_another_depth, "cats", "it has a tensor blocks.7.* that no such model has"),
        (lambda folder: None, "cats/checkpoints/5", "an export has the parameters of one step, 20; give .*cats"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cats", "holds no checkpoint .*no file model.safe"),
    ],
)
def test_what_is_no_whole_export_is_refused_in_a_line(exported, tmp_path, monkeypatch, change, place, message):
    change(shutil.copytree(exported, tmp_path / "cats"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_generator(place)
    assert "\n" not in str(error.value)
    assert f"--load_dir={place}" in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_files_without_facts_or_with_wrong_ones_are_read_as_before(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "cats")
    with_other_facts(folder)
    assert open_checkpoint(folder)[1] == [0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"dataset": {"name": "dogs"}}, "config.json has another dataset.* than model.safetensors, whose own settings"),
        ("{", "config.json: it is no JSON.*; the settings in model.safetensors count"),
        ({"hub": "adds this"}, None),
    ],
)
def test_settings_that_are_not_those_of_the_weights_are_said(exported, tmp_path, capsys, content, said):
    folder = shutil.copytree(exported, tmp_path / "cats")
    own = json.loads((folder / "config.json").read_text())
    text = content if isinstance(content, str) else json.dumps({**own, **content})
    (folder / "config.json").write_text(text)
    saved = open_checkpoint(folder)[0].restore_config(STEP)
    assert saved["dataset"]["name"] == own["dataset"]["name"]
    printed = capsys.readouterr().err
    assert re.search(said, printed) if said else not printed


def test_a_codec_that_is_not_here_is_missed_by_images_alone(golden_run, tmp_path, capsys):  # noqa: F811
    saved = Checkpoints(golden_run).restore_config(STEP)
    vae = str(tmp_path / "no" / "vae")
    saved["model"]["use_stable_vae"] = 1
    saved["dataset"] |= {
        "image_shape": [64, 64, 3], "latent_shape": [8, 8, 1], "vae": vae, "vae_sha256": "ab" * 32,
        "codec": {"name": "kl", "source": vae, "sha256": "ab" * 32},
    }  # fmt: skip
    Checkpoints(tmp_path / "run").save_params(Checkpoints(golden_run).restore_stored(STEP, "ema_params"), saved)
    export_run(str(tmp_path / "run"), tmp_path / "cats")
    assert re.search(r"the card has no picture: --codec=kl:.*; --picture FILE names one", capsys.readouterr().out)
    generator = load_generator(tmp_path / "cats")
    assert generator.noise([0]).shape == (1, 8, 8, 1)
    with pytest.raises(UserError, match=f"--codec=kl:{vae}"):
        load_generator(tmp_path / "cats", needs_images=True)
    card = (tmp_path / "cats" / "README.md").read_text()
    assert f"a VAE with sha256 {'ab' * 32}" in card
    assert '`--codec kl:FILE`, in Python `codec="kl:FILE"`' in card
    assert str(tmp_path) not in card
    assert not (tmp_path / "cats" / "samples.png").exists()


def test_exports_in_object_storage_are_read_and_read_again_after_a_change(exported, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find_remote_run.cache_clear()
    try:
        for name in ("model.safetensors", "config.json", "README.md"):
            remote.write_bytes(f"memory://bucket/cats/{name}", (exported / name).read_bytes())
        remote.write_bytes("memory://bucket/alone.safetensors", (exported / "model.safetensors").read_bytes())
        for url in ("memory://bucket/cats", "memory://bucket/alone.safetensors", "memory://bucket/cats/"):
            np.testing.assert_array_equal(draw(load_generator(url)), expected)
        with pytest.raises(UserError, match=r"memory://bucket/cats/checkpoints/5: an export has .* 20; give memory://"):
            raise UserError(staging_text(lambda: load_generator("memory://bucket/cats/checkpoints/5")))
        # Another file in its place.
        changed = shutil.copytree(exported, tmp_path / "changed")
        with_other_facts(changed)
        remote.write_bytes("memory://bucket/cats/model.safetensors", (changed / "model.safetensors").read_bytes())
        find_remote_run.cache_clear()
        assert open_checkpoint("memory://bucket/cats")[1] == [0]
    finally:
        fsspec.filesystem("memory").store.clear()
        staging._outputs.clear()
        find_remote_run.cache_clear()


def staging_text(call):
    """The message of a refusal, with URLs as programs print them."""
    from utils.base.messages import with_urls

    with pytest.raises(UserError) as error:
        call()
    return with_urls(str(error.value))


# --- The card ---

CONFIG = {
    "model": {"hidden_size": 8, "depth": 1, "num_heads": 2, "patch_size": 4, "timestep_scale": 1.0,
              "class_dropout_prob": 0.1},
    "objective": {"name": "flow_matching"},
    "dataset": {"name": f"npz:/home/me/{HOSTILE}", "image_shape": [8, 8, 3], "latent_shape": [8, 8, 3], "vae": None,
                "vae_sha256": None, "class_names": [HOSTILE, "b"], "empty_classes": [0]},
}  # fmt: skip
ROW = {
    "solver": "heun", "num_steps": 16, "cfg_scale": 1.5, "num_samples": 500, "seed": 0, "convention": "adm",
    "inception_sha256": "0", "fid_stats": "/home/me/stats.npz", "fid_stats_sha256": "cd" * 32, "fid": 12.3456789,
    "kid": 0.0123, "kid_error": 0.001, "precision": float("nan"), "recall": None, "checkpoint": "/home/me/runs/cats",
}  # fmt: skip


def test_scores_are_a_table_and_metadata_of_the_hub():
    rows = [ROW, {**ROW, "num_steps": None, "nfe": 33.0, "solver": "dopri5", "cfg_scale": None, "fid": 9.0}]
    rows.append({**ROW, "extractor": ["dinov2"], "convention": None, "fid_stats": "s3://private/d.npz", "fid": None})
    card = ModelCard(model_card(CONFIG, "me/cats", 7, Extras(rows=rows, licence="cc-by-4.0")))
    assert (card.data.license, card.data.model_name) == ("cc-by-4.0", "cats")
    results = card.data.eval_results
    assert {(r.metric_type, r.metric_value) for r in results} == {("fid", 12.3457), ("fid", 9.0), ("kid", 0.0123)}
    assert {r.task_type for r in results} == {"unconditional-image-generation"}
    first = results[0]
    assert first.metric_args["statistics"] == "stats.npz"
    assert first.metric_args.items() >= {"solver": "heun", "num_steps": 16, "cfg_scale": 1.5}.items()
    assert "/home" not in card.content
    assert "private" not in card.content
    # The page.
    html = MarkdownIt().enable("table").render(card.text)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html)
    assert {"heun", "16", "1.5", "500", "12.346", "0.01230 ± 0.00100", "dopri5", "33", "none"} <= set(cells)
    assert html.count("<table>") == 2
    assert re.search(r"Against <code>stats.npz</code> \(sha256 (cd){6}\), features of <code>inception</code>", html)
    assert "features of <code>dinov2</code>" in html
    # Without scores or a licence it says so.
    plain = ModelCard(model_card(CONFIG, "me/cats", 7))
    assert (plain.data.license, plain.data.eval_results) == (None, None)
    assert "No licence is given for the model. That of the data is not known here." in plain.text


def test_hostile_names_are_text_in_the_page_and_in_the_metadata():
    extras = Extras("samples.png", HOSTILE, [{**ROW, "solver": HOSTILE, "extractor": [HOSTILE], "fid_stats": HOSTILE}])
    card = model_card(CONFIG, f"me/{HOSTILE}\n---\n# x", 7, extras)
    _, metadata, text = card.split("---\n", 2)
    shown = " ".join(HOSTILE.split()[:-1])
    assert yaml.safe_load(metadata)["model-index"][0]["name"].startswith(shown)
    assert yaml.safe_load(metadata)["model-index"][0]["results"][0]["dataset"]["name"] == f"npz:{shown}"
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert not re.search(r"<img src=x|<strong>|<script|\u202e", html)
    assert html.count("<h1>") == 1
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") >= 6  # title, caption, data, class, solver, features
    for words in (HOSTILE, "a``b`", "`", "1. x", "a\nb", "-", "&amp;", "\udc80x", "n" * 300):
        wanted = "".join(c if c.isprintable() else " " for c in words)
        for markdown in (as_text(words), as_code(words)):
            seen = re.sub("<[^>]*>", "", MarkdownIt().render(f"a {markdown} z"))
            seen = seen.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
            assert seen.split() == ["a", *wanted.split(), "z"]


# --- Picture, scores and upload, as a user does it ---


@pytest.fixture
def convert(read_flags):
    return lambda *words: convert_checkpoint.main(read_flags(convert_checkpoint, list(map(str, words))))


def test_a_card_has_a_picture_of_the_export_and_the_scores_of_its_parameters(
    vector_run, tmp_path, monkeypatch, convert
):
    run = shutil.copytree(vector_run, tmp_path / "run")
    monkeypatch.setattr("utils.runs.card_picture.EXAMPLE_STEPS", 2)
    row = {**ROW, "params_sha256": hash_params(load_generator(run).params), "checkpoint_step": 0}
    (run / "fid.json").write_text(json.dumps({"cells": [row, {**row, "params_sha256": "0" * 64, "fid": 777.0}]}))
    convert("--load_dir", run, "--out", tmp_path / "cats", "--license", "mit")
    card = ModelCard.load(tmp_path / "cats" / "README.md")
    assert [r.metric_value for r in card.data.eval_results if r.metric_type == "fid"] == [12.3457]
    assert "777" not in card.content
    assert "stats.npz" in card.text
    assert not re.search(rf"{tmp_path}|/home", card.content)
    assert card.data.license == "mit"
    assert "![Samples](samples.png)\n\n*The first 16 samples: 2 Euler steps, guidance 2, seed 0.*" in card.text
    with Image.open(tmp_path / "cats" / "samples.png") as image:
        assert np.asarray(image).std() > 10
    # The user's own.
    Image.new("RGB", (4, 4), "red").save(tmp_path / "own.JPG")
    convert("--load_dir", run, "--out", tmp_path / "own", "--picture", tmp_path / "own.JPG")
    assert (tmp_path / "own" / "samples.jpg").read_bytes() == (tmp_path / "own.JPG").read_bytes()
    assert "![Samples](samples.jpg)\n\nA diffusion" in (tmp_path / "own" / "README.md").read_text()
    # More than minutes on a CPU are not begun.
    monkeypatch.setattr("utils.runs.card_picture.MAX_CPU_OPERATIONS", 10)
    convert("--load_dir", run, "--out", tmp_path / "own")
    assert "![" not in (tmp_path / "own" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--picture", "a.txt"], "--picture=a.txt: name a file of .png"),
        (["--picture", "/no/a.png"], "--picture=/no/a.png is no image that can be read .there is no such file"),
        (["--picture", "README.png"], "--picture=README.png is no image"),
        (["--license", "MIT License"], "--license=MIT License: give the hub's name of a licence, such as mit"),
        (["--push", "a/b/c"], "--push=a/b/c: .*; give USER/NAME"),
        (["--push", "cats"], "--push=cats names no user; give USER/NAME"),
        (["--private"], "--private=True has no effect without --push"),
    ],
)
def test_what_the_card_or_the_hub_cannot_have_is_refused_first(
    exported, tmp_path, monkeypatch, convert, words, message
):
    monkeypatch.chdir(tmp_path)
    Path("README.png").write_text("no image")
    with pytest.raises(UserError, match=message) as error:
        convert("--load_dir", exported, "--out", "out", *words)
    assert "\n" not in str(error.value)
    assert not Path("out").exists()
    with pytest.raises(UserError, match=r"--license=mit has no effect where --out=x.safetensors is a file"):
        convert("--load_dir", exported, "--out", "x.safetensors", "--license", "mit")


def test_the_lines_of_a_card_run_as_they_stand(vector_run, tmp_path, monkeypatch, convert, read_flags, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    there = tmp_path / "there"
    there.mkdir()
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(api, "endpoint", hub.address)
        out = tmp_path / "angles"
        (out / "samples").mkdir(parents=True)
        (out / "samples" / "grid.png").touch()  # of an earlier look at it
        Image.new("RGB", (4, 4), "red").save(tmp_path / "own.png")
        convert("--load_dir", vector_run, "--out", out, "--push", "me/angles", "--picture", tmp_path / "own.png")
        files = hub.repositories["me/angles"]
        assert files.keys() == {"README.md", "config.json", "model.safetensors", "samples.png"}
        card = files["README.md"].decode()

        # As a shell reads them, from another folder.
        monkeypatch.chdir(there)
        block = re.search(r"(?m)^    export PYTHONPATH=.*\n(    .*\n)+", card)[0]
        block = block.replace("/path/to/jax-flow-matching", str(ROOT))
        script = 'python() { printf "%s\\0" "$@"; printf "\\n"; }\n' + block
        lines = subprocess.run(["bash", "-c", script], capture_output=True, check=True, text=True).stdout.splitlines()
        program, *words = lines[0].split("\0")[:-1]
        assert program == f"{ROOT}/sample.py"
        sample.main(
            read_flags(sample, [*words, "--num_samples", "1", "--denoise_timesteps", "2", "--save_samples", "s.npz"])
        )
        assert {path.name for path in there.iterdir()} == {"runs", "s.npz"}

        # In Python: the same sample.
        python = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        namespace = {}
        exec(python.replace("num_steps=64", "num_steps=2"), namespace)
        np.testing.assert_array_equal(namespace["images"], np.load("s.npz")["arr_0"])
        assert "# uint8 (1, 8, 8, 1)" in python

    # Rows of the data are no part of an export: without a condition, the error says so.
    given = KIND.from_fields([{KIND.names[0]: "1", "mass": "30"}])
    own, moved = (
        load_generator(place).sample(conditions=given, num_steps=2, cfg_scale=2.0) for place in (vector_run, out)
    )
    np.testing.assert_array_equal(own, moved)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"has no conditions\.npz, .*: give conditions, or copy that of the run it was"):
        sample.main(read_flags(sample, ["--load_dir", str(out), "--denoise_timesteps", "2"]))
