"""Numbers as conditions: how they are measured, embedded, written by a user, drawn, and carried through a run."""

import dataclasses
import json
import shutil
from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eval_fid
import sample
from diffusion_transformer import DiT
from tests.conftest import run_program
from tests.runs import train_and_repeat
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition, LabelEmbed
from utils.conditions.condition import drop_rows, record_condition, restore_condition
from utils.conditions.images import ImageCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.tokens import TextCondition, TokensCondition
from utils.conditions.vector import VectorCondition
from utils.conditions.words import parse_rows, read_kinds
from utils.data.dataset import ImageDataset, PixelBatch
from utils.data.fingerprint import Fingerprint
from utils.data.loaders import LOADERS, Loader
from utils.flags.conditions import read_condition_file, read_prompts, read_sweep
from utils.images.pixels import PixelFormat
from utils.networks.dit_config import DiTConfig
from utils.networks.models import init_params
from utils.networks.state import create_train_state
from utils.objectives.flow_matching import FlowMatching
from utils.runs.checkpoint import Checkpoints
from utils.runs.model_card import example_fields
from utils.runs.opening import load_generator
from utils.runs.pool import FILE as POOL
from utils.training import build_run, make_config, step
from utils.training.step import draw_examples

ROWS = np.array([[0, 10], [1, 20], [2, 60]], np.float32)
KIND = VectorCondition.of_rows(ROWS, ["angle", "mass"])


# --- The kind ---


def test_numbers_are_standardised_by_the_training_data():
    assert KIND.means == (1, 30)
    np.testing.assert_allclose(KIND.stds, ROWS.std(axis=0), rtol=1e-6)
    assert (KIND.lows, KIND.highs) == ((0, 10), (2, 60))
    # What the first layer sees has mean 0 and variance 1.
    embed = KIND.embedder(8)
    params = embed.init(jax.random.key(0), KIND.null(1))
    params = flax.core.unfreeze(params)
    params["params"]["dense_0"] = {"kernel": 20 * jnp.eye(2, 8), "bias": jnp.zeros(8)}
    params["params"]["dense_1"] = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
    value = embed.apply(params, KIND.check(ROWS)).vector[:, :2] / 20
    expected = (ROWS - ROWS.mean(axis=0)) / ROWS.std(axis=0)
    np.testing.assert_allclose(value, expected * jax.nn.sigmoid(20 * expected), rtol=1e-5, atol=1e-7)


def test_a_one_hot_vector_can_be_a_class():
    # An MLP whose hidden units are each for one class has the rows of a table of labels as its second matrix.
    num_classes, width = 5, 16
    rows = np.eye(num_classes, dtype=np.float32)
    kind = VectorCondition.of_rows(rows)
    table = jax.random.normal(jax.random.key(1), (num_classes + 1, width))
    labels = jnp.arange(num_classes)
    classes = LabelEmbed(num_classes, width, jnp.float32)
    expected = classes.apply({"params": {"Embed_0": {"embedding": table}}}, labels).vector

    # Hidden unit j is silu(30) where the number j is one, and silu(-30), which is zero, elsewhere.
    low, high = (0 - kind.means[0]) / kind.stds[0], (1 - kind.means[0]) / kind.stds[0]
    scale = 60 / (high - low)
    first = {"kernel": jnp.eye(num_classes, width) * scale, "bias": jnp.full(width, 30 - scale * high)}
    last = {
        "kernel": jnp.zeros((width, width)).at[:num_classes].set(table[:-1] / jax.nn.silu(30.0)),
        "bias": jnp.zeros(width),
    }
    embed = kind.embedder(width)
    params = {"params": {"dense_0": first, "dense_1": last, "null": table[-1]}}
    found = embed.apply(params, kind.check(rows)).vector
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # No class is the learned row.
    np.testing.assert_array_equal(embed.apply(params, kind.null(2)).vector, np.tile(table[-1], (2, 1)))


def test_dropped_rows_are_those_without_a_condition():
    dropped = drop_rows(jnp.array([True, False, True]), KIND.null(3), KIND.check(ROWS))
    assert dropped["is_given"].tolist() == [False, True, False]
    # What stands in a dropped row cannot matter, even if it is not a number.
    params = KIND.embedder(8).init(jax.random.key(0), KIND.null(1))
    spoilt = {**dropped, "value": dropped["value"].at[0].set(jnp.nan)}
    found = [KIND.embedder(8).apply(params, tree).vector for tree in (dropped, spoilt)]
    np.testing.assert_array_equal(*found)


def test_a_record_gives_the_kind_back():
    # Statistics of real data are no short decimals; equal kinds share what is compiled.
    kind = VectorCondition.of_rows(np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32))
    again = restore_condition(json.loads(json.dumps(record_condition(kind))))
    assert again == kind
    assert hash(again) == hash(kind)
    assert kind.names == ("c0", "c1", "c2")


@pytest.mark.parametrize(
    "change",
    [
        {"names": []},
        {"names": ["a"]},
        {"names": [1, 2]},
        {"stds": [0, 1]},
        {"means": [float("nan"), 1]},
        {"means": "ab"},
        {"lows": None},
    ],
)
def test_a_record_that_no_training_wrote_is_refused(change):
    record = record_condition(KIND)
    record["vector"] |= change
    with pytest.raises(UserError, match="is no record of names, means, stds and ranges"):
        restore_condition(record)


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ([[1, np.nan], [2, 3], [3, np.inf]], None, "of 2 of 3 rows are NaN or infinite (the first is row 0)"),
        ([[1, 5], [2, 5]], ["a", "b"], "b is the same in all rows"),
        ([[1, 5], [2, 6]], ["a"], "1 names (a) for 2 numbers"),
        ([[1, 5], [2, 6]], ["a", "a"], "'a' cannot name a number"),
        ([[1, 5], [2, 6]], ["a", "b=c"], "'b=c' cannot name a number"),
        (np.zeros((3, 2000)), None, "1 to 1024 numbers, not 2000"),
    ],
)
def test_rows_that_are_no_conditions_are_refused(rows, names, message):
    with pytest.raises(UserError) as error:
        VectorCondition.of_rows(np.array(rows, np.float32), names)
    assert message in str(error.value)


# --- Words ---


def test_conditions_are_written_by_name():
    rows = parse_rows("angle=0.5, mass=2e1; mass=30,angle=-1", KIND.fields)
    np.testing.assert_array_equal(KIND.from_fields(rows)["value"], np.float32([[0.5, 20], [-1, 30]]))
    assert parse_rows('text="a 3, left; of 7"', ["text"]) == [{"text": "a 3, left; of 7"}]
    assert KIND.titles(KIND.check(ROWS[:2])) == ["angle=0, mass=10", "angle=1, mass=20"]
    assert KIND.titles(KIND.null(1)) == ["no condition"]
    assert KIND.remarks(KIND.check(ROWS)) == []
    (remark,) = KIND.remarks(KIND.check([[2.5, 20]]))
    assert remark == "angle=2.5 is outside of the training data, 0 to 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("angle=1", "lacks mass; give a value for each of angle, mass"),
        ("angle=1,mas=2", "'mas' is no part of the run's condition; give angle, mass"),
        ("angle=1,angle=2", "angle is given twice; separate conditions by ;"),
        ("angle,mass=2", "'angle' is not of the form NAME=VALUE"),
        ("angle=1,5,mass=2", '; a value with a comma stands in quotes, angle="1,5"'),
        ("angle=one,mass=2", "angle=one is no number"),
        ("angle=nan,mass=2", "angle=nan is no number"),
        ("", "gives no condition; write angle=..., mass=..."),
    ],
)
def test_words_that_are_no_condition_are_refused(text, message):
    with pytest.raises(UserError) as error:
        KIND.from_fields(parse_rows(text, KIND.fields))
    assert message in str(error.value)


def test_columns_are_picked_by_kind():
    assert read_kinds("vector:a,b+class:c") == {"vector": ("a", "b"), "class": ("c",)}
    assert read_kinds("vector") == {"vector": ()}
    for text in ("vector:", "vector:a,a", "vector:a+vector:b"):
        with pytest.raises(UserError, match="--condition_columns="):
            read_kinds(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("angle,weight\n1,2\n", "it has no column mass; there are angle, weight"),
        ("angle,mass\n", "it has no rows"),
        ("angle,mass\n1,2\n1\n", "row 1 (from 0) has no mass"),
        ("angle,mass\n1,x\n", "mass=x is no number"),
        ("", "it has no column angle, mass; there are none"),
        ("angle;mass\n1;2\n", "it has no column angle, mass; there are angle;mass"),
        ("angle,mass,angle\n1,2,3\n", "it has several columns angle; leave it one"),
    ],
)
def test_a_table_that_lacks_something_is_refused(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_condition_file(path, KIND)
    assert message in str(error.value)


def test_a_table_is_read_as_what_is_written(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("\ufefffile_name, mass, angle\na.png, 20, 0.5\n\nb.png,30,-1\n", encoding="utf-8")
    np.savez(tmp_path / "rows.npz", conditions=np.float64([[0.5, 20], [-1, 30]]), other=np.zeros(1))
    written = KIND.from_fields(parse_rows("angle=0.5,mass=20; angle=-1,mass=30", KIND.fields))
    for path in (table, tmp_path / "rows.npz"):
        jax.tree.map(np.testing.assert_array_equal, read_condition_file(path, KIND), written)
    # Numbers that have names are found by them.
    np.savez(tmp_path / "rows.npz", conditions=[[20, 9, 0.5], [30, 9, -1]], condition_names=["mass", "x", "angle"])
    jax.tree.map(np.testing.assert_array_equal, read_condition_file(tmp_path / "rows.npz", KIND), written)
    np.savez(tmp_path / "rows.npz", labels=np.arange(2))
    with pytest.raises(UserError, match="it has no array conditions"):
        read_condition_file(tmp_path / "rows.npz", KIND)


IMAGE = ImageCondition((4, 4, 3))


@pytest.mark.parametrize(
    ("kind", "arrays", "message"),
    [
        (KIND, {"conditions": ROWS[:, :1]}, "conditions are float32 (3, 1), but the run takes numbers (n, 2)"),
        (KIND, {"conditions": ROWS[0]}, "conditions are float32 (2, 1), but the run takes numbers (n, 2)"),
        (KIND, {"conditions": ROWS.astype(str)}, ", but the run takes numbers (n, 2)"),
        (KIND, {"conditions": ROWS, "condition_names": ["angle", "weight"]}, "lack mass; there are angle, weight"),
        (KIND, {"conditions": ROWS, "condition_names": ["angle"]}, "there are 1 condition_names for 2 numbers"),
        (ClassCondition(("a", "b")), {"labels": [0.5, 1]}, "labels are float64 (2,), but the run takes integers (n)"),
        (IMAGE, {"condition_images": np.zeros((2, 4, 4, 1), np.uint8)}, "but the run takes uint8 (n, 4, 4, 3)"),
        (IMAGE, {"condition_images": np.zeros((2, 4, 4, 3))}, "are float64 (2, 4, 4, 3), but the run takes uint8"),
        (TokensCondition(3, 2), {"tokens": np.zeros((2, 3, 1))}, "but the run takes floats (n, any, 2)"),
        (TextCondition(6, 64), {"captions": np.arange(2)}, "captions are int64 (2,), but the run takes texts (n)"),
        (
            TokensCondition(3, 2),
            {"tokens": np.zeros((2, 3, 2)), "token_mask": np.ones((2, 2), bool)},
            "token_mask are bool (2, 2), but the run takes truth values (n, 3)",
        ),
        (TokensCondition(3, 2), {"tokens": np.zeros((2, 4, 2))}, "it has 4 tokens, but the run was trained on up to 3"),
    ],
)
def test_arrays_that_numpy_would_bend_are_refused(tmp_path, kind, arrays, message):
    np.savez(tmp_path / "rows.npz", **arrays)
    with pytest.raises(UserError) as error:
        read_condition_file(tmp_path / "rows.npz", kind)
    assert message in str(error.value)


def test_many_captions_of_a_file_are_read(tmp_path):
    kind = TextCondition(6, 64)
    captions = np.array([f"a red {number} above a blue {number + 1}, in the mist" for number in range(1000)])
    for form in (captions, np.char.encode(captions)):
        np.savez(tmp_path / "rows.npz", captions=form)
        assert kind.titles(read_condition_file(tmp_path / "rows.npz", kind)) == captions.tolist()


def test_a_sweep_changes_one_number():
    found = read_sweep("angle=0:2:5", None, KIND)
    np.testing.assert_array_equal(found.conditions["value"], np.float32([[a, 30] for a in (0, 0.5, 1, 1.5, 2)]))
    assert found.titles == ["angle=0", "angle=0.5", "angle=1", "angle=1.5", "angle=2"]
    assert found.others == "mass=30"
    assert set(read_sweep("angle=0:2:5", "mass=11", KIND).conditions["value"][:, 1].tolist()) == {11}
    for text in ("angle=0:2", "weight=0:1:3", "angle=0:1:1", "angle=a:b:3", "angle=0:inf:3", "angle"):
        with pytest.raises(UserError):
            read_sweep(text, None, KIND)
    with pytest.raises(UserError, match="angle is what the flag gives itself; leave it out of --condition"):
        read_sweep("angle=0:2:5", "angle=1,mass=2", KIND)
    with pytest.raises(UserError, match="a text is no number; give texts by --prompt"):
        read_sweep("text=0:2:5", None, TextCondition(3, 64))


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("", None, "it gives no text; write one"),
        ("a 3", "text=b", "the text is all of the run's condition; leave --condition out"),
    ],
)
def test_prompts_that_are_none_are_refused(text, given, message):
    with pytest.raises(UserError, match=message):
        read_prompts(text, given, TextCondition(3, 64))


# --- A run ---


def load_ramps(name, split, options):
    """Images of floats that are as bright as their condition says, in a direction."""
    rng = np.random.default_rng(split == "train")
    numbers = rng.uniform([0, -1], [1, 1], (40, 2)).astype(np.float32)
    slope = np.linspace(-1, 1, 8)[None, None, :] * numbers[:, 1, None, None]
    images = np.float32(1 + 8 * numbers[:, 0, None, None] + 6 * np.broadcast_to(slope, (40, 8, 8)))[..., None]
    source = [{"image": image, "conditions": row} for image, row in zip(images, numbers, strict=True)]
    fingerprint = Fingerprint("ramps", len(source), "")
    kind = VectorCondition.of_rows(
        np.random.default_rng(1).uniform([0, -1], [1, 1], (40, 2)).astype(np.float32), ["level", "slope"]
    )
    pixels = PixelFormat("float32", -5.0, 15.0)
    return ImageDataset(name, split, source, (8, 8, 1), (), False, fingerprint, pixels=pixels, own_condition=kind)


SETTINGS = {
    "dataset_name": "ramps", "codec": "pixels", "model.hidden_size": 8, "model.depth": 1, "model.num_heads": 1,
    "model.patch_size": 8, "model.class_dropout_prob": 0.5, "batch_size": 8, "eval_interval": 0,
    "wandb.mode": "disabled", "log_interval": 1,
}  # fmt: skip


def load_others(name, split, options):
    """The same images, in data whose numbers have other statistics."""
    kind = VectorCondition.of_rows(np.float32([[5, 5], [9, 8]]), ["level", "slope"])
    return dataclasses.replace(load_ramps(name, split, options), own_condition=kind)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of three runs: `source`, which has not been trained, and two of four steps that start from it with
    other data: `whole`, and `stopped`, which goes on from step 2."""
    folder = tmp_path_factory.mktemp("vector")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOADERS, "ramps", Loader(load_ramps))
        source = build_run(make_config({**SETTINGS, "save_dir": str(folder / "source"), "max_steps": 1}))
        Checkpoints(source.folder).save_params(init_params(source.model, jax.random.key(0)), source.record)
        patch.setitem(LOADERS, "ramps", Loader(load_others))
        train_and_repeat(folder, {**SETTINGS, "load_dir": str(folder / "source")})
    return folder


def test_a_run_goes_on_exactly(runs):
    whole, stopped = (load_generator(runs / name, params="raw") for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, stopped.params)
    # The condition and its absence have both been learned.
    embed = whole.params["vector_embed"]
    assert np.abs(embed["dense_1"]["kernel"]).max() > 0
    assert np.abs(embed["null"]).max() > 0


def test_fine_tuning_keeps_what_the_numbers_mean(runs):
    # The first layer goes on with the means that it knows, also where the run is continued.
    source, whole, stopped = (load_generator(runs / name).condition for name in ("source", "whole", "stopped"))
    assert source == whole == stopped
    assert source != load_others("ramps", "train", None).condition


def test_conditions_of_samples_are_rows_of_the_data(runs):
    # The data are gone by now: the run has kept them.
    generator = load_generator(runs / "whole", seed=3)
    drawn = generator.conditions(range(200))
    rows = {tuple(example["conditions"].tolist()) for example in load_ramps("ramps", "train", None).source}
    found = [tuple(row.tolist()) for row in drawn["value"]]
    assert set(found) <= rows
    assert len(set(found)) > 35  # of 40: all are drawn in time
    assert drawn["is_given"].all()
    # Sample i by its number alone.
    again = generator.conditions([7, 150])
    np.testing.assert_array_equal(again["value"], drawn["value"][[7, 150]])
    with pytest.raises(UserError, match="labels and conditions: give one of the two"):
        generator.sample([0], conditions=[[0.5, 0]])
    images = generator.sample(num_samples=2, num_steps=1)
    given = generator.sample(conditions=drawn["value"][:2], num_steps=1)
    np.testing.assert_array_equal(images, given)


def test_a_run_that_has_lost_its_rows_draws_given_conditions_alone(runs, tmp_path):
    shutil.copytree(runs / "whole", tmp_path / "run")
    content = (tmp_path / "run" / POOL).read_bytes()
    (tmp_path / "run" / POOL).unlink()
    generator = load_generator(tmp_path / "run")
    assert generator.sample(conditions=[[0.5, 0]], num_steps=1).shape == (1, 8, 8, 1)
    with pytest.raises(UserError, match=r"has no conditions\.npz"):
        generator.sample(num_samples=1, num_steps=1)
    # A damaged file is named.
    (tmp_path / "run" / POOL).write_bytes(content[:100])
    with pytest.raises(UserError, match=f"{POOL} cannot be read"):
        load_generator(tmp_path / "run")
    np.savez(tmp_path / "run" / POOL, np.zeros((3, 5)), np.zeros(3, bool))
    with pytest.raises(UserError, match="its arrays are not of the run's condition"):
        load_generator(tmp_path / "run")


def test_the_shell_draws_what_python_draws(runs, tmp_path, read_flags, capfd):
    words = f"--load_dir {runs / 'whole'} --denoise_timesteps 2 --cfg_scale 2 --out {tmp_path}".split()
    text = "level=0.3,slope=-0.2;level=1.5,slope=1"
    saved = tmp_path / "samples.npz"
    arguments = [*words, "--condition", text, "--num_samples", "2", "--save_samples", str(saved)]
    sample.main(read_flags(sample, arguments))
    with np.load(saved) as file:
        generator = load_generator(runs / "whole")
        expected = generator.sample(conditions=[[0.3, -0.2], [1.5, 1]], num_steps=2, cfg_scale=2)
        np.testing.assert_array_equal(file["arr_0"], expected)
    assert "level=1.5 is outside of the training data" in capfd.readouterr().err
    sample.main(read_flags(sample, [*words, "--sweep", "slope=-1:1:3"]))
    assert (tmp_path / "sweep.png").stat().st_size > 1000

    # Wrong words, before anything is drawn.
    for wrong, message in (
        (["--classes", "3"], 'no classes; use --condition "level=...,slope=..."'),
        (["--condition", "level=1"], "--condition=level=1: 'level=1' lacks slope"),
        (["--condition_file", "none.csv"], "--condition_file=none.csv: there is no such file"),
        (["--condition", text, "--condition_file", "none.csv"], "--condition and --condition_file: give one of them"),
        (["--sweep", "level=1"], "--sweep=level=1: write NAME=FIRST:LAST:COUNT"),
        (["--condition", text, "--labels", "balanced"], "--labels=balanced has no effect where conditions are given"),
    ):
        with pytest.raises(UserError) as error:
            sample.main(read_flags(sample, [*words, *wrong]))
        assert message in str(error.value)


def test_samples_are_scored_under_rows_of_the_data(runs, tmp_path, read_flags):
    images = np.stack([example["image"] for example in load_ramps("ramps", "train", None).source])
    np.savez(tmp_path / "data.npz", images=images)
    line = f"--load_dir {runs / 'whole'} --fid_stats {tmp_path}/data.npz --metrics moments --num_samples 6"
    line += f" --denoise_timesteps 2 --cfg_scale 1 --save_samples {tmp_path}/samples.npz --out {tmp_path}/out"
    eval_fid.main(read_flags(eval_fid, [*line.split(), "--wandb.mode", "disabled"]))
    generator = load_generator(runs / "whole")
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["conditions"], generator.conditions(range(6))["value"])
        np.testing.assert_array_equal(file["arr_0"], generator.sample(num_samples=6, num_steps=2, cfg_scale=1))
    (row,) = json.loads((tmp_path / "out" / "fid.json").read_text())["cells"]
    assert row["mean_error"] > 0


# --- Several at once ---


def test_several_conditions_are_added_and_dropped_one_by_one():
    classes = ClassCondition(("a", "b", "c"))
    kind = SeveralCondition((("class", classes), ("vector", KIND)))
    again = restore_condition(json.loads(json.dumps(record_condition(kind))))
    assert again == kind
    rows = parse_rows("class=b,angle=1,mass=20;mass=60,class=2,angle=0", kind.fields)
    values = kind.from_fields(rows)
    assert kind.titles(values) == ["b, angle=1, mass=20", "c, angle=0, mass=60"]
    assert kind.class_names == classes.class_names
    # A file of samples has them as data do, with all names.
    columns = {name: column.tolist() for name, column in kind.to_columns(values).items()}
    assert (columns["labels"], columns["class_names"]) == ([1, 2], ["a", "b", "c"])
    assert (columns["conditions"], columns["condition_names"]) == ([[1, 20], [0, 60]], ["angle", "mass"])
    assert example_fields(kind) == {"class": "0", "angle": "1", "mass": "30"}

    # The vector is the sum of those of the parts.
    class Network(nn.Module):
        @nn.compact
        def __call__(self, condition):
            return kind.embedder(8)(condition)

    embed = Network()
    params = jax.tree.map(lambda x: x + 0.1, embed.init(jax.random.key(0), kind.null(1)))
    found = embed.apply(params, values).vector
    parts = [
        part.embedder(8).apply({"params": params["params"][name]}, values[key]).vector
        for key, part, name in (("class", classes, "label_embed"), ("vector", KIND, "vector_embed"))
    ]
    np.testing.assert_allclose(found, parts[0] + parts[1], rtol=1e-6)

    # Each part by itself.
    drops = jnp.array([[True, False], [False, True]])
    dropped = kind.drop_each(drops, values)
    assert dropped["class"].tolist() == [3, 2]
    assert dropped["vector"]["is_given"].tolist() == [True, False]


def test_parts_are_dropped_as_often_as_is_asked():
    batch = PixelBatch(condition=KIND.null(4000), image=np.zeros((4000, 1, 1, 1), np.uint8))
    draw = partial(draw_examples, jax.random.key(0), batch, FlowMatching(), 0.25)
    together, each = draw(), draw(num_parts=2)
    # The flag changes nothing else.
    np.testing.assert_array_equal(together["is_dropped"], each["is_dropped"])
    np.testing.assert_array_equal(together["draws"]["t"], each["draws"]["t"])
    # All together with probability p, and each alone with p: five standard errors of 4,000 draws.
    np.testing.assert_allclose(each["drops"].mean(axis=0), 0.25, atol=0.035)
    both = each["drops"].all(axis=1).mean()
    np.testing.assert_allclose(both, 0.25**2, atol=0.02)


def test_a_step_drops_parts_if_the_flag_says_so(monkeypatch):
    kind = SeveralCondition((("class", ClassCondition(("a", "b"))), ("vector", KIND)))
    batch = PixelBatch(condition=jax.tree.map(np.asarray, kind.null(2)), image=np.zeros((2, 8, 8, 1), np.uint8))
    seen = []

    def record(*arguments):
        seen.append(arguments[-1])
        raise InterruptedError  # nothing is computed

    monkeypatch.setattr(step, "draw_examples", record)
    key = jax.random.key(0)
    for mode in ("together", "each"):
        sizes = {"hidden_size": 8, "depth": 1, "num_heads": 1, "patch_size": 8}
        network = DiT(DiTConfig(**sizes, condition_dropout=mode), condition=kind)
        shapes = jax.eval_shape(network.init, key, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), kind.null(1))["params"]
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        state = create_train_state(params, optax.sgd(0.1), key)
        with pytest.raises(InterruptedError):
            step.compute_gradients(
                state,
                key,
                batch,
                PixelCodec(),
                model=network,
                objective=FlowMatching(),
                grad_accum=1,
                class_dropout_prob=0.1,
            )
    assert seen == [0, 2]
    # A single condition has no parts.
    config = make_config({"dataset_name": "digits", "codec": "pixels", "model.condition_dropout": "each"})
    with pytest.raises(UserError, match=r"--model\.condition_dropout=each: the data have one condition alone"):
        build_run(config)


def test_runs_of_any_kind_are_read_in_python():
    program = "import utils.runs.opening; from utils.conditions.condition import CONDITIONS; print(*sorted(CONDITIONS))"
    assert run_program("-c", program).stdout.split() == ["class", "image", "several", "text", "tokens", "vector"]
