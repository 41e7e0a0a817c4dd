"""jax-flow's pickled checkpoints as runs: both sets of parameters, golden velocities and samples; none is executed."""

import codecs
import functools
import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze
from flax.traverse_util import unflatten_dict
from jax._src.array import _reconstruct_array
from ml_collections import ConfigDict

import convert_checkpoint
from tests.conftest import GOLDEN, run_program
from utils.base.mesh import make_mesh, replicated
from utils.base.messages import UserError
from utils.convert.jax_flow_files import find_jax_flow_config, import_jax_flow, read_jax_flow, training_settings
from utils.convert.sources import read_source
from utils.runs.checkpoint import Checkpoints
from utils.runs.opening import load_generator
from utils.sampling.solvers import SamplerConfig
from utils.training.start import SourceRun, start_from

CONFIG = {
    "lr": 3e-4, "beta1": 0.9, "beta2": 0.99, "hidden_size": 32, "patch_size": 2, "depth": 2, "num_heads": 2,
    "mlp_ratio": 4, "class_dropout_prob": 0.2, "num_classes": 10, "denoise_timesteps": 16, "cfg_scale": 1.5,
    "target_update_rate": 0.999, "t_sampler": "log-normal", "t_conditioning": 1, "preset": "debug", "use_stable_vae": 1,
}  # fmt: skip
VAE = GOLDEN / "vae_tiny"
LABELS = "LabelEmbedder_0/Embed_0/embedding"


def golden_of(name):
    return dict(np.load(GOLDEN / f"{name}.npz").items())


def flat_of(golden):
    return {key.removeprefix("params/"): value for key, value in golden.items() if key.startswith("params/")}


@pytest.fixture(scope="module")
def golden():
    return golden_of("dit_latent_small")


@pytest.fixture(scope="module")
def flat(golden):
    return flat_of(golden)


def nested(flat):
    return unflatten_dict(flat, sep="/")


def checkpoint_of(flat, **others):
    """As jax-flow pickles it. The golden parameters are the EMA; the others are twice as large."""
    return {"model": nested({name: 2 * value for name, value in flat.items()}), "model_eps": nested(flat), **others}


@pytest.fixture
def convert(read_flags):
    def run(*words):
        convert_checkpoint.main(read_flags(convert_checkpoint, list(map(str, words))))

    return run


def write(folder, content, protocol=4):
    path = folder / "old.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


# --- What it becomes ---


@pytest.fixture(scope="module")
def run(tmp_path_factory, flat):
    """The run of a checkpoint of JAX arrays with its configuration, made by the program itself."""
    folder = tmp_path_factory.mktemp("jax_flow")
    content = jax.tree.map(jnp.asarray, checkpoint_of(flat)) | {"config": CONFIG}
    done = run_program("convert_checkpoint.py", "--source", write(folder, content), "--family", "jax-flow",
                       "--vae", VAE, "--out", folder / "run")  # fmt: skip
    printed = done.stdout + done.stderr
    assert (
        "32 wide, 2 deep, 2 heads, patch 2 on 8x8x4, 10 classes, objective flow_matching, time times 10000" in printed
    )
    assert f"sample.py --load_dir {folder / 'run'} --cfg_scale 4 --num_samples 4" in printed
    return folder / "run"


def difference(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.mark.usefixtures("optimised")
def test_velocities_and_samples_are_jax_flows(run, golden):
    generator = load_generator(run)
    with jax.default_matmul_precision("highest"):
        velocity = generator.model_fn(golden["x_1"], golden["t"], golden["labels"])
        assert difference(velocity, golden["v_of_x1"]) < 1e-5
        for steps, scale in ((16, 1.5), (7, 4.0)):
            sampler = SamplerConfig(steps, scale)
            samples = generator.sample_latents(jnp.asarray(golden["noise"]), golden["sample_labels"], sampler)
            assert difference(samples, golden[f"sample_steps{steps}_cfg{scale}"]) < 1e-5


def test_a_run_has_both_sets_of_parameters_and_the_settings(run):
    checkpoints = Checkpoints(run)
    params, ema = (checkpoints.restore_stored(0, name) for name in ("params", "ema_params"))
    jax.tree.map(lambda raw, average: np.testing.assert_array_equal(raw, 2 * np.asarray(average)), params, ema)
    raw = load_generator(run, params="raw").params
    jax.tree.map(np.testing.assert_array_equal, raw, params)
    config = json.loads((run / "config.json").read_text())
    taken = {
        "lr": 3e-4, "class_dropout_prob": 0.2, "t_sampler": "logit_normal", "target_update_rate": 0.999,
        "timestep_scale": 10_000, "num_heads": 2, "mlp_ratio": 4, "cfg_scale": 1.5, "denoise_timesteps": 16,
    }  # fmt: skip
    assert {name: config["model"][name] for name in taken} == taken
    assert config["objective"]["name"] == "flow_matching"
    assert config["imported"]["family"] == "jax-flow"


def test_a_training_starts_from_both_sets_and_does_not_continue(run):
    source = SourceRun.open(str(run))
    params = source.checkpoints.restore_stored(0, "params")
    start = start_from(source, params, source.saved, replicated(make_mesh()), from_ema=False)
    jax.tree.map(np.testing.assert_array_equal, start.params, params)
    kernels = [tree["block_1"]["mlp"]["dense_0"]["kernel"] for tree in (start.params, start.ema_params)]
    np.testing.assert_array_equal(kernels[0], 2 * kernels[1])
    with pytest.raises(UserError, match="holds an imported model, which has no optimizer to continue with; train from"):
        source.checkpoints.refuse_imported(0)


def test_labels_without_a_name_are_left_out(convert, tmp_path, flat, capsys):
    names = tmp_path / "names.txt"
    names.write_text("female\nmale\n")
    convert("--source", write(tmp_path, checkpoint_of(flat)), "--class_names", names, "--out", tmp_path / "a")
    assert "its table has rows for 10 labels: the first 2, which are named, are kept" in capsys.readouterr().out
    table = Checkpoints(tmp_path / "a").restore_stored(0, "ema_params")["label_embed"]["Embed_0"]["embedding"]
    np.testing.assert_array_equal(table, flat[LABELS][[0, 1, 10]])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["dataset"]["class_names"] == ["female", "male"]
    assert (config["model"]["num_classes"], config["dataset"]["vae"]) == (2, "stabilityai/sd-vae-ft-mse")


def test_a_table_of_positions_that_one_set_has_trained_is_a_parameter_of_both(tmp_path, flat):
    moved = {**flat, "pos_embed": flat["pos_embed"] + np.float32(0.01)}
    content = {"model": nested(moved), "model_eps": nested(flat)}
    source = read_source(str(write(tmp_path, content)))
    network, shape = find_jax_flow_config(source.jax_flow)
    assert (network.learned_positions, network.dtype, shape) == (1, "float32", (8, 8, 4))
    ema, params = import_jax_flow(source.jax_flow, network)
    np.testing.assert_array_equal(ema["pos_embed"], flat["pos_embed"])
    np.testing.assert_array_equal(params["pos_embed"], moved["pos_embed"])


def test_sizes_are_those_of_the_parameters(tmp_path, capsys):
    golden = flat_of(golden_of("dit_pixel_patch4"))
    config = {"depth": 12, "hidden_size": 48, "mlp_ratio": 4.0, "preset": "big", "t_sampler": "uniform", "own": None}
    checkpoint = read_jax_flow(write(tmp_path, checkpoint_of(golden, config=config)))
    network, shape = find_jax_flow_config(checkpoint)
    assert (network.depth, network.num_heads, network.num_classes, shape) == (3, 3, 7, (16, 16, 3))
    assert training_settings(checkpoint.config, network) == {"t_sampler": "uniform"}
    assert capsys.readouterr().out == "its config has depth 12, but its parameters 3, which counts\n"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_and_kind_of_tree_is_read(tmp_path, flat, protocol):
    content = checkpoint_of(flat)
    kinds = [
        content,
        jax.tree.map(jnp.asarray, content),
        {name: freeze(jax.tree.map(jnp.asarray, tree)) for name, tree in content.items()},
        {name: {"params": tree} for name, tree in content.items()},
        {**content, "config": ConfigDict(CONFIG), "step": jnp.int32(7), "rng": jax.random.PRNGKey(0), "a": ["b", (1,)]},
        {**content, "config": freeze({**CONFIG, "lr": np.array(3e-4)})},
    ]  # fmt: skip
    for kind in kinds:
        found = read_jax_flow(write(tmp_path, kind, protocol))
        assert found.config == (CONFIG if "config" in kind else {})
        for tree, factor in ((found.params, 2), (found.ema_params, 1)):
            assert tree.keys() == flat.keys()
            assert all(np.array_equal(tree[name], factor * value) for name, value in flat.items())


# --- What is refused ---


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.arguments = (function, arguments)

    def __reduce__(self):
        return self.arguments


def jax_array_of(make, *arguments):
    """A JAX array that is rebuilt by calling `make`."""
    return Calls(_reconstruct_array, make, arguments, (1, (2,), np.dtype("f4"), False, b"12345678"), {})


def state_of(shape):
    """A pickled array of eight bytes that claims `shape`."""
    rebuild, arguments, _ = np.zeros(2, np.float32).__reduce__()
    return Calls(_reconstruct_array, rebuild, arguments, (1, shape, np.dtype("f4"), False, b"12345678"), {})


def shared(flat):
    """A thousand names of one array."""
    return {"model": dict.fromkeys(map(str, range(1000)), flat[LABELS]), "model_eps": nested(flat)}


def with_ema(change):
    """A checkpoint whose EMA is changed: {name: array, or None to leave it out}."""

    def make(flat):
        changed = {**flat, **change}
        return {"model": nested(flat), "model_eps": nested({k: v for k, v in changed.items() if v is not None})}

    return make


BIAS = "DiTBlock_1/Dense_0/bias"
NO_NUMPY = "it holds a JAX array that is not made of a NumPy array"
HOSTILE = {
    "os.system": (lambda ran: Calls(os.system, f"touch {ran}"), r"it asks for (posix|nt)\.system, which no array"),
    "eval": (lambda ran: Calls(eval, f"open({str(ran)!r}, 'w')"), r"it asks for \w+\.eval, which no array"),
    "nested": (lambda ran: [{"a": (Calls(exec, f"open({str(ran)!r}, 'w')"),)}], "it asks for .*exec, which no array"),
    "call in a JAX array": (lambda ran: jax_array_of(os.system, f"touch {ran}"), "it asks for .*system, which no"),
    "getattr": (lambda ran: Calls(getattr, ran, "touch"), r"it asks for (builtins|__builtin__)\.getattr"),
    "partial": (lambda ran: functools.partial(os.system, f"touch {ran}"), r"it asks for functools\.partial"),
    "no array within": (lambda ran: jax_array_of(codecs.encode, "x", "latin1"), NO_NUMPY),
    "text in its place": (lambda ran: Calls(_reconstruct_array, "f", (), (), {}), NO_NUMPY),
    "FrozenDict of a list": (lambda ran: Calls(FrozenDict, [1]), "a FrozenDict that is made of no dictionary"),
    "train state": (lambda ran: optax.EmptyState(), r"it asks for optax\..*EmptyState"),
    "objects": (lambda ran: np.array([{}, None]), "it holds an array whose state is not one|dtype .*O8"),
    "huge": (lambda ran: state_of((2**40,)), r"it holds an array of shape \(1099511627776,\) in 8 bytes"),
    "negative": (lambda ran: state_of((-1, 2)), "it holds an array whose shape is none"),
    "complex": (lambda ran: np.zeros(3, np.complex64), "dtype <c8, not of float16 or float32"),
    "set": (lambda ran: {1, 2}, "opcode EMPTY_SET|it asks for .*set"),
    "deep": (lambda ran: functools.reduce(lambda tree, _: {"a": tree}, range(200), {}), "100 levels"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_runs_something_or_claims_much_is_refused(convert, tmp_path, flat, name):
    make, message = HOSTILE[name]
    content = {"model": {"a": make(tmp_path / "ran")}, "model_eps": nested(flat)}
    with pytest.raises(UserError, match=rf"--source=.*: .*({message})") as error:
        convert("--source", write(tmp_path, content), "--family", "jax-flow", "--out", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old.pkl"]


LAYOUT = r"; a jax-flow checkpoint is \{'model': parameters, 'model_eps': their EMA, 'config': its --model"
REFUSED = {
    "only the EMA": (lambda flat: {"model_eps": nested(flat), "a": 3}, f"no entry model, but model_eps, a{LAYOUT}"),
    "no EMA": (lambda flat: {"model": nested(flat)}, "it has no entry model_eps, but model;"),
    "others": (lambda flat: {"params": nested(flat), "ema": 1}, "no entry model and no model_eps, but params, ema"),
    "nothing": (lambda flat: {}, "it has no entry model and no model_eps, but none"),
    "a list": (lambda flat: [nested(flat)], "it holds list; a jax-flow checkpoint is"),
    "a text": (lambda flat: {"model": "x", "model_eps": nested(flat)}, "its model is str, no tree of parameters"),
    "an array": (lambda flat: {"model": nested(flat), "model_eps": flat[LABELS]}, "its model_eps is ndarray, no tree"),
    "empty": (lambda flat: {"model": {}, "model_eps": nested(flat)}, "its model is empty, no tree of parameters"),
    "texts in a tree": (with_ema({BIAS: "x"}), f"its model_eps has {BIAS}, which is str and no array"),
    "config": (lambda flat: checkpoint_of(flat, config=[1]), "its config is list, no dictionary of --model"),
    "a setting": (lambda flat: checkpoint_of(flat, config={"lr": "fast"}), r"model\.lr"),
    "a rate": (lambda flat: checkpoint_of(flat, config={"class_dropout_prob": 7}), r"model\.class_dropout_prob"),
    "missing": (with_ema({BIAS: None}), rf"its model_eps has no {BIAS} \(1 parameters are missing\)"),
    "no labels": (with_ema({LABELS: None}), f"its model_eps has no {LABELS}, but DiTBlock_0/Dense_0/bias"),
    "left over": (with_ema({"Extra_0/kernel": np.zeros(1)}), "its model_eps has Extra_0/kernel, which no jax-flow DiT"),
    "shape": (with_ema({BIAS: np.zeros(191)}), rf"its model_eps has {BIAS} of shape \(191,\), not \(192,\)"),
    "replicated": (lambda flat: checkpoint_of({k: v[None] for k, v in flat.items()}), r"of shape \(1, 2, 2, 4, 32\)"),
    "no tokens": (with_ema({"pos_embed": np.zeros((1, 0, 32))}), r"its model_eps has pos_embed of shape \(1, 0, 32\)"),
    "no square": (with_ema({"pos_embed": np.zeros((1, 15, 32))}), "its parameters are of 15 patches, 32 wide, 2 heads"),
    "NaN": (with_ema({BIAS: np.full(192, np.nan)}), f"its model_eps has {BIAS}, which is not of finite floats"),
    "integers": (with_ema({BIAS: np.zeros(192, np.int32)}), f"its model_eps has {BIAS}, which is not of finite floats"),
    "one array under many names": (shared, "its arrays share their bytes with each other"),
    "cut": (lambda flat: pickle.dumps(checkpoint_of(flat))[:-999], "it is no whole pickle"),
    "a byte": (lambda flat: b"\x80\x04", "it is no whole pickle"),
    "protocol 0": (lambda flat: pickle.dumps(checkpoint_of(flat), 0), "torch.save did not write it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_another_checkpoint_is_refused_by_what_it_has(convert, tmp_path, flat, name):
    make, message = REFUSED[name]
    with pytest.raises(UserError, match=f"--source=.*: .*{message}") as error:
        convert("--source", write(tmp_path, make(flat)), "--family", "jax-flow", "--out", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--family", "dit"], "it is a jax-flow's, not DiT's"),
        (["--num_heads", "4"], "its kernels have 2 heads, not --num_heads=4; leave the flag out"),
        (["--class_names", "NAMES"], "it has 10 classes, but --class_names names 11"),
        (["--model.depth", "2"], "--model.depth=2 has no effect"),
        (["--source", str(GOLDEN / "checkpoints" / "dit_tiny.pt"), "--family", "jax-flow"], "it is no pickle, as jax-"),
    ],
)  # fmt: skip
def test_flags_that_contradict_the_file_are_one_line(convert, tmp_path, flat, words, message):
    (tmp_path / "names").write_text("\n".join(map(str, range(11))))
    words = [str(tmp_path / "names") if word == "NAMES" else word for word in words]
    with pytest.raises(UserError, match=message):
        convert("--source", write(tmp_path, checkpoint_of(flat)), *words, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
