"""Conditions: a kind that is registered from outside, and the class against the label arithmetic that it stands for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import edit
import sample
from tests.test_change_this import run  # noqa: F401 (a fixture)
from utils.base.messages import UserError
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import CONDITIONS, Mixture, drop_rows, record_condition, restore_condition
from utils.runs.opening import load_generator
from utils.sampling.guidance import guide
from utils.trackers.trackers import read_metrics

CLASSES = ClassCondition(("cat", "dog", "golden retriever"), (1,), num_classes=5)


# --- A kind from outside ---


SIZES = {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 2, "denoise_timesteps": 2, "lr": 3e-3}


@pytest.mark.usefixtures("signal_handlers")
def test_an_own_condition_is_trained_sampled_and_resumed(run, read_flags, tmp_path, monkeypatch, capsys):  # noqa: F811
    names = run("condition", "loop")
    settings = {f"model.{name}": value for name, value in SIZES.items()} | {"model.target_update_rate": 0.9}
    settings |= {"dataset_name": "ramps", "batch_size": 64, "log_interval": 1, "eval_interval": 0}

    def train(max_steps):
        return names["fit"](str(tmp_path / "run"), max_steps, **settings)

    # Trained.
    generator = train(60)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [line["training/l2_loss"] for line in lines if "training/l2_loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert generator.condition.titles(generator.condition.show(0, 8))[1].startswith("[")
    assert generator.condition == names["Direction"]()

    # Sampled under guidance: bright on the right, and below.
    images = generator.sample(conditions=[[1, 0], [0, 1]], num_steps=8, cfg_scale=2.0).astype(float)
    right = (images[:, :, 4:] - images[:, :, :4]).mean((1, 2, 3))
    below = (images[:, 4:] - images[:, :4]).mean((1, 2, 3))
    assert right[0] > abs(right[1]) + 10
    assert below[1] > abs(below[0]) + 10
    drawn = generator.conditions(range(3))
    np.testing.assert_array_equal(generator.conditions([2]), drawn[2:])
    np.testing.assert_array_equal(
        generator.sample(num_samples=3, num_steps=2), generator.sample(conditions=drawn, num_steps=2)
    )
    with pytest.raises(UserError, match=r"conditions=\[\[1, 0, 0\]\]: the shape is \(1, 3\), not \(n, 2\)"):
        generator.sample(conditions=[[1, 0, 0]])

    # By the programs too.
    run_folder = tmp_path / "run"
    words = f"--load_dir {run_folder} --out {tmp_path} --denoise_timesteps 2 --num_samples 4".split()
    sample.main(read_flags(sample, [*words, "--film", "--save_samples", str(tmp_path / "s.npz")]))
    with np.load(tmp_path / "s.npz") as saved:
        np.testing.assert_array_equal(saved["arr_1"], generator.conditions(range(4)))
    edit.main(read_flags(edit, [*words, "--interpolate", "3"]))
    assert {"grid.png", "film.webp", "strip.png", "interpolation.png"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="--invert is for runs that are conditioned on classes"):
        edit.main(read_flags(edit, [*words, "--invert", str(tmp_path)]))

    # Resumed, but under no other condition; and known only where it is registered.
    train(61)
    printed = capsys.readouterr()
    assert "resuming" in printed.out + printed.err  # apart from results since a program has run here
    with monkeypatch.context() as patch:
        patch.setattr(names["Direction"], "spec", jax.ShapeDtypeStruct((3,), jnp.float32))
        with pytest.raises(UserError, match=r"has arrays \[\[\[2\], 'float32'\]\], but 'direction' is"):
            load_generator(tmp_path / "run")
    del CONDITIONS["direction"]
    with pytest.raises(UserError, match=r"the run's condition 'direction' is unknown; known are class. Register it"):
        load_generator(tmp_path / "run")


# --- The class ---


def test_guidance_and_dropout_of_classes_are_label_arithmetic():
    labels, x, t = jnp.array([0, 2, 1, 4]), jax.random.normal(jax.random.key(0), (4, 3)), jnp.linspace(0, 1, 4)
    is_dropped = jnp.array([True, False, False, True])
    np.testing.assert_array_equal(drop_rows(is_dropped, CLASSES.null(4), labels), [5, 2, 1, 5])

    def model_fn(x, t, labels):
        return x * jnp.sin(labels + 1.0)[:, None] + t[:, None]

    with_label, without = model_fn(x, t, labels), model_fn(x, t, jnp.full(4, 5))
    guided = guide(model_fn, CLASSES.null, 3.0)(x, t, labels)
    np.testing.assert_array_equal(guided, without + 3.0 * (with_label - without))


def test_rows_are_dropped_and_guided_in_trees_of_several_arrays():
    tree = {"a": jnp.ones((3, 2)), "b": jnp.arange(3)}
    null = {"a": jnp.zeros((3, 2)), "b": jnp.full(3, 9)}
    dropped = drop_rows(jnp.array([False, True, False]), null, tree)
    assert dropped["a"].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert dropped["b"].tolist() == [0, 9, 2]
    guided = guide(lambda x, t, tree: tree["a"] + tree["b"][:, None], lambda count: null, 2.0)
    np.testing.assert_array_equal(guided(jnp.zeros((3, 2)), jnp.zeros(3), tree)[:, 0], 9 + 2 * (1 + np.arange(3) - 9))


def test_classes_are_written_shown_and_mixed():
    assert CLASSES.parse("golden retriever, 0").tolist() == [2, 0]
    assert CLASSES.parse("all").tolist() == [0, 2]  # no samples are drawn of the class without images
    assert CLASSES.titles(np.array([2, 5])) == ["golden retriever", "no class"]
    assert CLASSES.mix([0], [2], [0.5]) == Mixture([0], [2], [0.5])
    assert CLASSES.fit(7).null(2).tolist() == [7, 7]
    with pytest.raises(UserError, match=r"--model.num_classes=2 is fewer than the 3 classes"):
        CLASSES.fit(2)


def test_a_run_records_its_condition_and_older_runs_have_classes():
    record = record_condition(CLASSES)
    assert record["condition"] == {"kind": "class", "arrays": [[[], "int32"]]}
    assert restore_condition(record) == dataclasses.replace(CLASSES, num_classes=3)
    assert restore_condition({"class_names": ["a", "b"]}) == ClassCondition(("a", "b"))
