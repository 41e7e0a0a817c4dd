"""Conditions: the class against the label arithmetic that it stands for; another kind: test_extension_points.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.base.messages import UserError
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import Mixture, drop_rows, record_condition, restore_condition
from utils.sampling.guidance import guide

CLASSES = ClassCondition(("cat", "dog", "golden retriever"), (1,), num_classes=5)


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
    assert ClassCondition(("faces",)).titles(np.array([0, 1])) == ["", "no class"]
    assert CLASSES.mix([0], [2], [0.5]) == Mixture([0], [2], [0.5])
    assert CLASSES.fit(7).null(2).tolist() == [7, 7]
    with pytest.raises(UserError, match=r"--model.num_classes=2 is fewer than the 3 classes"):
        CLASSES.fit(2)


def test_a_run_records_its_condition_and_older_runs_have_classes():
    record = record_condition(CLASSES)
    assert record["condition"] == {"kind": "class", "arrays": [[[], "int32"]]}
    assert restore_condition(record) == dataclasses.replace(CLASSES, num_classes=3)
    assert restore_condition({"class_names": ["a", "b"]}) == ClassCondition(("a", "b"))
