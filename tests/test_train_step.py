"""What a step passes to its network: labels dropped in training alone, new noise each step, the same in validation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_transformer import DiTConfig
from utils.codecs.pixels import PixelCodec
from utils.models import Network
from utils.objectives.flow_matching import FlowMatching
from utils.train_state import EmaSchedule, create_train_state, make_optimizer
from utils.train_step import accumulate_microbatches, draw_examples, train_step, validation_step

OPTIMIZER = make_optimizer(0.1, 0.9, 0.99)
LABELS = np.arange(200, dtype=np.int32) % 10


class Probe(Network):
    """A network that answers with its input, and shows what it was asked."""

    config = DiTConfig(class_dropout_prob=0.3, num_classes=10)

    def __init__(self):
        self.seen = []

    def apply(self, variables, x_t, t, labels):
        self.seen.append([np.asarray(jax.lax.stop_gradient(x)) for x in (x_t, t, labels)])
        return x_t * variables["params"]["w"]


@pytest.fixture
def probe():
    return Probe()


def run(function, probe, **changes):
    """(new state or metrics, what the network saw) of a step's function on 200 black images."""
    probe.seen.clear()
    state = create_train_state({"w": jnp.array(1.0)}, OPTIMIZER, jax.random.key(0)).replace(**changes)
    batch = {"image": jnp.zeros((200, 2, 2, 1), jnp.uint8), "label": jnp.asarray(LABELS)}
    static = {"model": probe, "objective": FlowMatching(), "optimizer": OPTIMIZER, "grad_accum": 1}
    with jax.disable_jit():
        result = function(state, batch, PixelCodec(), **static)
    return result, probe.seen[0]


def train(*arguments, **static):
    return train_step(*arguments, **static, ema=EmaSchedule(0.9))


def test_training_drops_labels_and_draws_anew_each_step(probe):
    (state, metrics), (x_t, t, labels) = run(train, probe)
    is_dropped = labels == 10
    assert 35 <= is_dropped.sum() <= 85  # 200 draws of probability 0.3: 60, give or take four deviations
    np.testing.assert_array_equal(labels[~is_dropped], LABELS[~is_dropped])
    assert int(state.step) == 1
    assert set(metrics) == {"l2_loss", "v_abs_mean", "v_pred_abs_mean", "grad_norm", "update_norm", "param_norm"}
    _, others = run(train, probe, step=jnp.int32(1))
    assert all(not np.array_equal(a, b) for a, b in zip((x_t, t, labels), others, strict=True))
    _, again = run(train, probe)
    assert all(np.array_equal(a, b) for a, b in zip((x_t, t, labels), again, strict=True))


def test_validation_keeps_labels_and_noise_whatever_the_step(probe):
    metrics, first = run(validation_step, probe)
    np.testing.assert_array_equal(first[2], LABELS)
    later_metrics, later = run(validation_step, probe, step=jnp.int32(7))
    assert all(np.array_equal(a, b) for a, b in zip(first, later, strict=True))
    assert {name: float(x) for name, x in metrics.items()} == {name: float(x) for name, x in later_metrics.items()}
    _, in_training = run(train, probe)
    assert not np.array_equal(first[1], in_training[1])  # of a random stream of its own


def test_microbatches_are_the_mean_over_all_rows():
    rows = jnp.arange(24.0).reshape(12, 2)
    for count in (1, 2, 3, 6):
        means = accumulate_microbatches(lambda part: {"mean": part.mean(0)}, rows, count)
        np.testing.assert_allclose(means["mean"], rows.mean(0), rtol=1e-6)


def test_what_is_drawn_differs_from_example_to_example():
    batch = {"label": jnp.asarray(LABELS)}
    examples = draw_examples(jax.random.key(0), batch, FlowMatching(), 0.3)
    keys = jax.random.key_data(jnp.concatenate([examples["codec_key"], examples["draws"]["noise_key"]]))
    assert len(np.unique(keys, axis=0)) == 400
    assert len(np.unique(examples["draws"]["t"])) == 200
