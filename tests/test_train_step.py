"""Inputs of the network in a step: labels dropped in training alone, new noise each step, the same in validation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_transformer import DiTConfig
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition
from utils.data.dataset import PixelBatch
from utils.networks.models import Network
from utils.networks.optimizers import make_optimizer
from utils.networks.packing import SMALL
from utils.networks.state import EmaSchedule, create_train_state
from utils.objectives.flow_matching import FlowMatching
from utils.runs.checkpoint import Checkpoints
from utils.training.progress import SkippedUpdates, check_finite
from utils.training.step import VALIDATION, accumulate_microbatches, draw_examples, train_step

OPTIMIZER = make_optimizer(0.1, 0.9, 0.99)
LABELS = np.arange(200, dtype=np.int32) % 10


class Probe(Network):
    """A network that answers with its input, and shows what it was asked."""

    config = DiTConfig(class_dropout_prob=0.3, num_classes=10)
    condition = ClassCondition(num_classes=10)

    def __init__(self):
        self.seen = []

    def apply(self, variables, x_t, t, labels):
        self.seen.append([np.asarray(jax.lax.stop_gradient(x)) for x in (x_t, t, labels)])
        return x_t * variables["params"]["w"]


@pytest.fixture
def probe():
    return Probe()


def run(probe, objective=FlowMatching(), is_validation=False, **changes):  # noqa: B008 (frozen)
    """(new state, metrics, what the network saw) of a step on 200 black images."""
    probe.seen.clear()
    state = create_train_state({"w": jnp.array(1.0)}, OPTIMIZER, jax.random.key(0)).replace(**changes)
    batch = PixelBatch(condition=jnp.asarray(LABELS), image=jnp.zeros((200, 2, 2, 1), jnp.uint8))
    static = {"model": probe, "objective": objective, "optimizer": OPTIMIZER, "grad_accum": 1, "ema": EmaSchedule(0.9)}
    with jax.disable_jit():
        new_state, metrics = train_step(state, batch, PixelCodec(), is_validation, **static)
    return new_state, metrics, probe.seen[0]


def test_training_drops_labels_and_draws_anew_each_step(probe):
    state, metrics, (x_t, t, labels) = run(probe)
    is_dropped = labels == 10
    assert 35 <= is_dropped.sum() <= 85  # 200 draws of probability 0.3: 60, give or take four deviations
    np.testing.assert_array_equal(labels[~is_dropped], LABELS[~is_dropped])
    assert int(state.step) == 1
    assert set(metrics) == {"l2_loss", "v_abs_mean", "v_pred_abs_mean", "grad_norm", "update_norm", "param_norm"}
    *_, others = run(probe, step=jnp.int32(1))
    assert all(not np.array_equal(a, b) for a, b in zip((x_t, t, labels), others, strict=True))
    *_, again = run(probe)
    assert all(np.array_equal(a, b) for a, b in zip((x_t, t, labels), again, strict=True))


def test_validation_keeps_labels_and_noise_whatever_the_step(probe):
    _, metrics, first = run(probe, is_validation=True)
    np.testing.assert_array_equal(first[2], LABELS)
    _, later_metrics, later = run(probe, is_validation=True, step=jnp.int32(7))
    assert all(np.array_equal(a, b) for a, b in zip(first, later, strict=True))
    assert {name: float(x) for name, x in metrics.items()} == {name: float(x) for name, x in later_metrics.items()}
    *_, in_training = run(probe)
    assert not np.array_equal(first[1], in_training[1])  # of a random stream of its own


class Sums(Network):
    """A network whose output is its input times the sum of its parameters."""

    config = DiTConfig(class_dropout_prob=0.0, num_classes=10)
    condition = ClassCondition(num_classes=10)

    def apply(self, variables, x_t, t, labels):
        return x_t * sum(leaf.sum() for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("skips_nonfinite", [False, True])
def test_validation_leaves_the_state_as_it_is_and_measures_the_update_that_it_would_make(skips_nonfinite):
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.full(SMALL + 1, 0.01)}  # one is small, one is not
    static = {"model": Sums(), "objective": FlowMatching(), "optimizer": OPTIMIZER, "grad_accum": 1}
    static |= {"ema": EmaSchedule(0.9), "skips_nonfinite": skips_nonfinite}
    step = jax.jit(partial(train_step, **static))
    batch = PixelBatch(condition=jnp.ones(4, jnp.int32), image=jnp.zeros((4, 2, 2, 1), jnp.uint8))

    start = create_train_state(params, OPTIMIZER, jax.random.key(0))
    state, _ = step(start, batch, PixelCodec(), False)
    kept, metrics = step(state, batch, PixelCodec(), True)
    jax.tree.map(np.testing.assert_array_equal, without_key(kept), without_key(state))
    assert int(kept.step) == 1

    # As of a step whose random draws are those of validation: its number is that of the stream.
    moved, expected = step(state.replace(step=jnp.int32(VALIDATION)), batch, PixelCodec(), False)
    for name in ("l2_loss", "grad_norm", "update_norm"):
        np.testing.assert_array_equal(metrics[name], expected[name])
    updates = jax.tree.map(jnp.subtract, moved.params, state.params)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(updates), rtol=1e-4)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(state.params), rtol=1e-6)
    np.testing.assert_allclose(expected["param_norm"], optax.tree.norm(moved.params), rtol=1e-6)


def without_key(state):
    return state.replace(key=jax.random.key_data(state.key))


class TwoNetworks(FlowMatching):
    """An objective that shows both of its networks, by their answers to an input of ones."""

    def loss(self, model_fn, ema_model_fn, x_1, labels, draws):
        ones = jnp.ones_like(x_1)
        seen = {
            name: network(ones, draws["t"], labels).mean((1, 2, 3))
            for name, network in (("student", model_fn), ("teacher", ema_model_fn))
        }
        return seen["student"], seen


@pytest.mark.parametrize("is_validation", [False, True])
def test_the_teacher_of_an_objective_is_the_ema(probe, is_validation):
    _, metrics, _ = run(probe, TwoNetworks(), is_validation, ema_params={"w": jnp.array(3.0)})
    assert (float(metrics["student"]), float(metrics["teacher"])) == (1, 3)


def test_microbatches_are_the_mean_over_all_rows():
    rows = jnp.arange(24.0).reshape(12, 2)
    for count in (1, 2, 3, 6):
        means = accumulate_microbatches(lambda part: {"mean": part.mean(0)}, rows, count)
        np.testing.assert_allclose(means["mean"], rows.mean(0), rtol=1e-6)


def test_what_is_drawn_differs_from_example_to_example():
    batch = PixelBatch(condition=jnp.asarray(LABELS), image=None)
    examples = draw_examples(jax.random.key(0), batch, FlowMatching(), 0.3)
    keys = jax.random.key_data(jnp.concatenate([examples["codec_key"], examples["draws"]["noise_key"]]))
    assert len(np.unique(keys, axis=0)) == 400
    assert len(np.unique(examples["draws"]["t"])) == 200


class Poisoned(Network):
    """A network whose output is infinite, or a finite number too large, on batches with the label 7."""

    config = DiTConfig(class_dropout_prob=0.0, num_classes=10)
    condition = ClassCondition(num_classes=10)

    def __init__(self, poison):
        self.poison = poison

    def apply(self, variables, x_t, t, labels):
        w = variables["params"]
        # A condition, as a `where` would have NaN in its gradient on other batches too.
        return x_t * w["b"] * jax.lax.cond((labels == 7).any(), lambda: self.poison * w["a"], lambda: w["a"])


@pytest.mark.parametrize("poison", [jnp.inf, jnp.nan, 1e25])
def test_an_update_that_is_not_finite_changes_nothing_but_the_step(poison):
    """1e25 squared is beyond float32: Adam's second moment would be infinite for ever."""
    params = {"a": jnp.array([1.0]), "b": jnp.array(2.0)}
    state = create_train_state(params, OPTIMIZER, jax.random.key(0))
    static = {"model": Poisoned(poison), "objective": FlowMatching(), "optimizer": OPTIMIZER, "grad_accum": 1}
    static |= {"ema": EmaSchedule(0.9), "skips_nonfinite": True}

    def step(state, label):
        batch = PixelBatch(condition=jnp.full(4, label), image=jnp.zeros((4, 2, 2, 1), jnp.uint8))
        return train_step(state, batch, PixelCodec(), **static)

    good, metrics = step(state, 1)
    plain, _ = train_step(
        state, PixelBatch(condition=jnp.full(4, 1), image=jnp.zeros((4, 2, 2, 1), jnp.uint8)), PixelCodec(),
        **static | {"skips_nonfinite": False},
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, (good.params, good.opt_state), (plain.params, plain.opt_state))
    assert not metrics["is_skipped"]
    bad, metrics = step(good, 7)
    assert metrics["is_skipped"]
    assert int(metrics["largest_gradient"]) in (0, 1)
    assert int(bad.step) == 2
    for name in ("params", "ema_params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(bad, name), getattr(good, name))
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(good.params))
    after, metrics = step(bad, 1)
    assert not metrics["is_skipped"]
    assert float(jnp.abs(after.params["b"] - good.params["b"])) > 0


class FakeCheckpoints(Checkpoints):
    def __init__(self):
        pass

    def wait(self):
        pass

    def steps(self):
        return [40]


def test_skipped_updates_are_counted_and_too_many_in_a_row_end_the_run():
    params = {"block_0": {"kernel": 0, "bias": 0}, "final": {"bias": 0}}
    skipped = SkippedUpdates(2, FakeCheckpoints(), params, {"next_index": 5, "skipped_updates": 3})

    def metrics(is_skipped):
        loss = np.float32(np.inf if is_skipped else 0.5)
        own = {"is_skipped": np.bool_(is_skipped), "largest_gradient": 1, "largest_gradient_norm": np.inf}
        return {"l2_loss": loss, "param_norm": np.float32(1), "update_norm": loss, **own}

    assert skipped.count(metrics(False), 6) == {
        "l2_loss": 0.5, "param_norm": 1, "update_norm": 0.5, "skipped_updates": 3
    }  # fmt: skip
    assert skipped.count(metrics(True), 7) == {"param_norm": 1, "skipped_updates": 4}  # no infinity in metrics.jsonl
    check_finite(metrics(True), 7, FakeCheckpoints())
    assert skipped.extend_position({"next_index": 8}) == {
        "next_index": 8, "skipped_updates": 4, "skipped_in_a_row": 1
    }  # fmt: skip
    resumed = SkippedUpdates(2, FakeCheckpoints(), params, skipped.extend_position({"next_index": 8}))
    skipped.count(metrics(False), 8)
    skipped.count(metrics(True), 9)
    message = "last 2 updates were not finite; at step 8 the loss is inf, .* gradient that of block_0/kernel"
    with pytest.raises(UserError, match=message):
        resumed.count(metrics(True), 8)


def test_without_skipping_metrics_and_positions_stay_as_they_are():
    skipped = SkippedUpdates(0, FakeCheckpoints(), {"w": 0}, {})
    metrics = {"l2_loss": np.float32(np.nan), "param_norm": np.float32(1)}
    assert skipped.count(metrics, 3) is metrics
    assert skipped.extend_position({"next_index": 3}) == {"next_index": 3}
    with pytest.raises(UserError, match="no longer finite at step 3; the same command continues from step 40"):
        check_finite(metrics, 3, FakeCheckpoints())
