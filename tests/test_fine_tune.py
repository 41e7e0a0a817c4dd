"""Starting from another run: what is taken, what is made new, what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from diffusion_transformer import DiT, DiTConfig
from tests.conftest import run_program
from utils.base.messages import UserError
from utils.convert.sources import read_source
from utils.data.arrays import load_digits
from utils.data.dataset import DataOptions
from utils.networks.lora import add_lora, merge_lora
from utils.networks.network import NetworkConfig
from utils.networks.optimizers import freeze_parts, learning_rate, make_optimizer
from utils.networks.state import apply_gradients, create_train_state
from utils.runs.checkpoint import Checkpoints
from utils.runs.export import export_run
from utils.runs.opening import load_generator, open_checkpoint
from utils.training.build import build_run
from utils.training.start import adapt_params, frozen_beside_lora, read_frozen

CLASSES = ("a", "b", "c")
TINY = """
    --use_stable_vae 0 --model.hidden_size 32 --model.depth 2 --model.num_heads 2 --model.patch_size 2 --model.lr 1e-2
    --model.num_classes 5 --batch_size 16 --eval_interval 0 --wandb.mode disabled --model.dtype float32
    --random_flip 0
""".split()  # noqa: SIM905 (a command line, as one types it)
TUNE = """
    --use_stable_vae 0 --batch_size 16 --eval_interval 0 --wandb.mode disabled --model.dtype float32 --model.lr 1e-2
    --random_flip 0
""".split()  # noqa: SIM905


def make_params(channels=3, side=4, **changes):
    config = DiTConfig(**{"patch_size": 2, "hidden_size": 8, "depth": 1, "num_classes": 3, **changes})
    arguments = (jnp.zeros((1, side, side, channels)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(DiT(config).init, jax.random.key(0), *arguments)["params"]
    rng = np.random.default_rng(len(str(changes)))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def test_what_is_the_same_is_taken_bit_for_bit():
    source = make_params()
    fresh = make_params()
    adapted = adapt_params(source, jax.tree.map(np.zeros_like, fresh), DiTConfig(patch_size=2), CLASSES, CLASSES)
    for path, value in flatten_dict(source).items():
        np.testing.assert_array_equal(flatten_dict(adapted.params)[path], value)
    count = len(flatten_dict(source))
    assert (adapted.remarks, adapted.new) == ([f"{count} of {count} arrays taken as they are"], ())


@pytest.mark.parametrize(
    ("classes", "kept", "new"),
    [(("c", "x", "a"), 2, 1), (("x", "y", "z"), 0, 3), (("b",), 1, 0), (("a", "b", "c", "d", "e"), 3, 2)],
)
def test_labels_go_by_name_and_new_ones_start_from_no_label(classes, kept, new):
    source = make_params()
    fresh = make_params(num_classes=len(classes))
    adapted = adapt_params(source, fresh, DiTConfig(patch_size=2), CLASSES, classes)
    rows, table = (tree["label_embed"]["Embed_0"]["embedding"] for tree in (source, adapted.params))
    for label, name in enumerate(classes):
        np.testing.assert_array_equal(table[label], rows[CLASSES.index(name) if name in CLASSES else 3])
    np.testing.assert_array_equal(table[-1], rows[-1])
    words = f'label table: {kept} classes kept where names match, {new} new rows started from "no label"'
    assert adapted.remarks[1:] == [words]


def test_other_channels_keep_those_that_both_have():
    source = make_params(channels=3)
    fresh = make_params(channels=4)
    adapted = adapt_params(source, fresh, DiTConfig(patch_size=2), CLASSES, CLASSES).params
    kernel = adapted["patch_embed"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, :3], source["patch_embed"]["kernel"])
    assert not kernel[:, :, 3].any()
    out, theirs = (tree["final_layer"]["dense"]["kernel"].reshape(8, 4, -1) for tree in (adapted, source))
    np.testing.assert_array_equal(out[..., :3], theirs)
    assert not out[..., 3].any()
    # A further channel changes nothing at first.
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    t = jnp.ones(2)
    labels = jnp.zeros(2, jnp.int32)
    config = DiTConfig(patch_size=2, hidden_size=8, depth=1, num_classes=3, dtype="float32")
    found = DiT(config).apply({"params": jax.tree.map(jnp.asarray, adapted)}, x, t, labels)
    expected = DiT(config).apply({"params": jax.tree.map(jnp.asarray, source)}, x[..., :3], t, labels)
    np.testing.assert_allclose(found[..., :3], expected, rtol=1e-4, atol=1e-5)


def test_another_patch_size_and_more_blocks_are_made_new():
    source = make_params()
    fresh = make_params(patch_size=1, depth=3)
    adapted = adapt_params(source, fresh, DiTConfig(patch_size=1), CLASSES, CLASSES)
    np.testing.assert_array_equal(adapted.params["patch_embed"]["kernel"], fresh["patch_embed"]["kernel"])
    np.testing.assert_array_equal(
        adapted.params["block_2"]["mlp"]["dense_0"]["kernel"], fresh["block_2"]["mlp"]["dense_0"]["kernel"]
    )
    np.testing.assert_array_equal(
        adapted.params["block_0"]["mlp"]["dense_0"]["kernel"], source["block_0"]["mlp"]["dense_0"]["kernel"]
    )
    assert {"patch_embed/kernel", "block_1/mlp/dense_0/kernel"} <= set(adapted.new)
    assert adapted.remarks[-1].startswith("made new: ")


def test_a_learned_table_of_positions_is_resized():
    source = make_params(learned_positions=1)
    fresh = make_params(side=8, learned_positions=1)
    source["pos_embed"] = np.broadcast_to(np.float32(3), source["pos_embed"].shape)  # a constant remains one
    adapted = adapt_params(source, fresh, DiTConfig(patch_size=2), CLASSES, CLASSES)
    np.testing.assert_allclose(adapted.params["pos_embed"], 3, rtol=1e-6)
    assert adapted.remarks[-1] == "position table: resized from 4 to 16 tokens"


def test_another_network_takes_over_what_has_the_same_shape():
    source = {"in": {"kernel": np.ones((3, 4))}, "deep": {"label_embed": {"Embed_0": {"embedding": np.eye(4, 5)}}}}
    fresh = {"in": {"kernel": np.zeros((3, 4))}, "deep": {"label_embed": {"Embed_0": {"embedding": np.zeros((3, 5))}}}}
    fresh["patch_embed"] = {"kernel": np.zeros((2, 2, 4, 8))}
    source["patch_embed"] = {"kernel": np.ones((2, 2, 3, 8))}
    adapted = adapt_params(source, fresh, NetworkConfig(), CLASSES, ("c", "x"))
    assert adapted.params["in"]["kernel"].all()
    table = adapted.params["deep"]["label_embed"]["Embed_0"]["embedding"]
    np.testing.assert_array_equal(table, np.eye(4, 5)[[2, 3, 3]])
    assert adapted.new == ("patch_embed/kernel",)
    fresh["deep"]["label_embed"]["Embed_0"]["embedding"] = np.zeros((3, 7))
    assert "deep/label_embed/Embed_0/embedding" in adapt_params(source, fresh, NetworkConfig(), CLASSES, CLASSES).new


# --- What is trained ---


def test_parts_are_frozen_by_name():
    parts = ("block_0", "block_1", "block_2", "label_embed", "patch_embed", "lora")
    assert read_frozen(["blocks.0-1", "label_embed"], parts) == ("block_0", "block_1", "label_embed")
    assert read_frozen(["blocks"], parts) == ("block_0", "block_1", "block_2")
    assert read_frozen(["blocks.2"], parts) == ("block_2",)
    for word in ("blocks.3", "blocks.2-1", "block_0", "lora", "x", "blocks.-1"):
        with pytest.raises(UserError, match=f"--freeze={word}"):
            read_frozen([word], parts)
    with pytest.raises(UserError, match="leaves nothing to train"):
        read_frozen(["blocks", "label_embed"], parts[:4])
    with pytest.raises(UserError, match=r"--freeze=blocks is no part of the model; use label_embed, patch_embed$"):
        read_frozen(["blocks"], parts[3:5])
    assert frozen_beside_lora(parts, ["patch_embed/kernel"]) == ("block_0", "block_1", "block_2")


def test_frozen_parts_do_not_move_nor_have_a_state():
    params = {"block_0": {"w": jnp.float32([1 / 3, 0.1])}, "label_embed": {"w": jnp.ones(3)}}
    frozen = ("block_0",)
    optimizer = freeze_parts(make_optimizer(0.1, 0.9, 0.99, grad_clip=1.0), frozen)
    state = create_train_state(params, optimizer, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * 3 + 1
    for _ in range(50):
        state, updates = apply_gradients(state, jax.tree.map(jnp.ones_like, params), optimizer, 0.9, frozen)
    for tree in (state.params, state.ema_params):
        np.testing.assert_array_equal(tree["block_0"]["w"], params["block_0"]["w"])
        assert np.abs(tree["label_embed"]["w"] - 1).min() > 0.1
    assert not np.asarray(updates["block_0"]["w"]).any()


def test_schedules_clipping_and_decay():
    warm = learning_rate(2.0, warmup_steps=4)
    np.testing.assert_allclose([warm(i) for i in (0, 1, 4, 100)], [0, 0.5, 2, 2])
    cosine = learning_rate(2.0, warmup_steps=4, decay_steps=12)
    np.testing.assert_allclose([cosine(i) for i in (0, 4, 8, 12)], [0, 2, 1, 0], atol=1e-6)
    assert learning_rate(2.0) == 2.0
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    decayed = make_optimizer(0.1, 0.9, 0.99, weight_decay=0.5)
    updates, _ = decayed.update(jax.tree.map(jnp.zeros_like, params), decayed.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5)
    assert not updates["b"].any()
    # Adam's own steps know no scale; of two gradients clipped to one norm the moments are one half each.
    clipped = make_optimizer(0.1, 0.9, 0.99, grad_clip=1.0)
    _, (_, (moments, _)) = clipped.update({"w": jnp.full(4, 100.0)}, clipped.init({"w": jnp.ones(4)}), None)
    np.testing.assert_allclose(moments.mu["w"], 0.1 * 0.5, rtol=1e-5)


def test_all_that_is_off_is_adam_alone():
    params = {"w": jnp.ones(2)}
    ours = make_optimizer(1e-3, 0.9, 0.99)
    plain = optax.adam(1e-3, b1=0.9, b2=0.99)
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(plain.init(params))
    assert freeze_parts(ours, ()) is ours


def test_lora_starts_as_the_same_function_and_merges_exactly():
    params = jax.tree.map(jnp.asarray, make_params())
    with_factors = add_lora(params, 2, jax.random.key(0))
    names = {"/".join(path[:-1]) for path in flatten_dict(with_factors["lora"])}
    layers = ("attention/qkv", "attention/out", "mlp/dense_0", "mlp/dense_1")
    assert names == {f"block_0/{layer}/kernel" for layer in layers}
    for path, value in flatten_dict(merge_lora(with_factors)).items():
        np.testing.assert_array_equal(value, flatten_dict(params)[path])
    factors = with_factors["lora"]["block_0"]["mlp"]["dense_0"]["kernel"]
    factors["b"] = jax.random.normal(jax.random.key(1), factors["b"].shape)
    merged = merge_lora(with_factors)["block_0"]["mlp"]["dense_0"]["kernel"]
    expected = np.float64(params["block_0"]["mlp"]["dense_0"]["kernel"]) + np.float64(factors["a"]) @ np.float64(
        factors["b"]
    )
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


# --- The programs ---


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Folders of real digits: 0 to 4, 5 to 9, and these at twice the size."""
    root = tmp_path_factory.mktemp("digits")
    source = load_digits("digits", "train", DataOptions()).source
    for image, label in zip(source.images[:200], source.labels[:200], strict=True):
        for folder, side in (("low", 8), ("high", 8), ("large", 16)):
            if (label < 5) == (folder == "low"):
                path = root / folder / str(label) / f"{len(list(root.rglob('*.png'))):05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[..., 0]).resize((side, side)).save(path)
    return root


@pytest.fixture(scope="module")
def base(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "run"
    words = ["--dataset_name", f"folder:{digits / 'low'}", "--image_size", "8", "--max_steps", "6"]
    run_program("train_flow.py", *TINY, *words, "--save_dir", folder)
    return folder


def params_of(folder, step, name="params"):
    return flatten_dict(Checkpoints(folder).restore_stored(step, name))


tuned = pytest.mark.xdist_group("fine-tuning")


@tuned
def test_a_run_is_fine_tuned_frozen_and_resumed(digits, base, tmp_path):
    words = [*TUNE, "--dataset_name", f"folder:{digits / 'high'}", "--load_dir", base, "--save_dir", tmp_path / "run"]
    words += ["--freeze", "blocks.0,label_embed", "--warmup_steps", "2", "--grad_clip", "1", "--save_interval", "1"]
    done = run_program("train_flow.py", *words, "--max_steps", "2", "--keep_last", "9")
    assert 'label table: 0 classes kept where names match, 5 new rows started from "no label"' in done.stdout
    assert "are trained)" in done.stdout
    run_program("train_flow.py", *words, "--max_steps", "4", "--keep_last", "9")
    before = params_of(base, 6, "ema_params")
    moved = set()
    for path, value in params_of(tmp_path / "run", 4).items():
        if path[0] == "block_0":
            np.testing.assert_array_equal(value, before[path], err_msg="/".join(path))
        elif path[0] != "label_embed" and not np.array_equal(value, before[path]):
            moved.add(path[0])
    assert moved >= {"block_1", "patch_embed", "final_layer", "timestep_embed"}
    # Warm-up: the first step has a rate of zero.
    for path, value in params_of(tmp_path / "run", 1).items():
        if path[0] != "label_embed":
            np.testing.assert_array_equal(value, before[path])
    uninterrupted = [tmp_path / "whole" if word == tmp_path / "run" else word for word in words]
    run_program("train_flow.py", *uninterrupted, "--max_steps", "4")
    for path, value in params_of(tmp_path / "whole", 4).items():
        np.testing.assert_array_equal(value, params_of(tmp_path / "run", 4)[path])


@tuned
def test_lora_is_trained_sampled_exported_and_continued_without_its_source(digits, base, tmp_path):
    words = [*TUNE, "--dataset_name", f"folder:{digits / 'high'}", "--save_dir", tmp_path / "run", "--lora_rank", "1"]
    run_program("train_flow.py", *words, "--load_dir", base, "--max_steps", "2")
    done = run_program("train_flow.py", *words, "--max_steps", "4")  # what it does not say is as in its own run
    assert "resuming" in done.stdout
    before = params_of(base, 6, "ema_params")
    after = params_of(tmp_path / "run", 4)
    for path, value in after.items():
        if path[0] not in ("lora", "label_embed"):
            np.testing.assert_array_equal(value, before[path])
            np.testing.assert_array_equal(params_of(tmp_path / "run", 4, "ema_params")[path], before[path])
    assert np.abs(after["lora", "block_0", "mlp", "dense_1", "kernel", "b"]).max() > 0
    generator = load_generator(tmp_path / "run")
    export_run(str(tmp_path / "run"), tmp_path / "merged.safetensors")
    exported = read_source(str(tmp_path / "merged.safetensors")).state["blocks.0.mlp.fc2.weight"].T
    np.testing.assert_array_equal(generator.params["block_0"]["mlp"]["dense_1"]["kernel"], exported)
    done = run_program("train_flow.py", *words, "--max_steps", "5", "--lora_rank", "2", check=False)
    assert "holds a run with --lora_rank=1, not 2" in done.stderr


@tuned
def test_another_size_takes_the_network_as_it_is(digits, base, tmp_path):
    words = ["--dataset_name", f"folder:{digits / 'large'}", "--load_dir", base, "--save_dir", tmp_path / "run"]
    done = run_program("train_flow.py", *TUNE, *words, "--image_size", "16", "--max_steps", "1")
    assert "of 31 arrays taken as they are" in done.stdout
    assert open_checkpoint(str(tmp_path / "run"))[1] == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--freeze blocks.9", "--freeze=blocks.9: the model has blocks.0-1"),
        ("--freeze blocks.0 --lora_rank 2", "--freeze=blocks.0: with --lora_rank"),
        ("--model.hidden_size 64", "--model.hidden_size=64, but --load_dir=.* has 32; give that, or leave"),
        ("--model.timestep_scale 1", "--model.timestep_scale=1.0, but --load_dir=.* has 10000.0"),
        ("--model.preset DiT-S/2", "--model.hidden_size=384, but --load_dir"),
        ("--lr_schedule cosine --warmup_steps 5 --max_steps 5", "--warmup_steps=5: --lr_schedule=cosine ends at"),
        ("--weight_decay -1", "weight_decay"),
        ("--grad_clip 0", "grad_clip"),
    ],
)
@tuned
def test_what_does_not_fit_is_one_line(configure, digits, base, tmp_path, line, message):
    words = [*TUNE, "--dataset_name", f"folder:{digits / 'high'}", "--load_dir", base, "--save_dir", tmp_path / "run"]
    with pytest.raises(UserError, match=message):
        build_run(configure([*words, *line.split()]))
    assert not (tmp_path / "run" / "checkpoints").exists() or not Checkpoints(tmp_path / "run").steps()


def test_tuning_flags_need_a_source(configure, tmp_path):
    for line in ("--freeze blocks", "--lora_rank 2"):
        words = [*TINY, "--dataset_name", "digits", "--model.num_classes", "10", "--save_dir", str(tmp_path)]
        with pytest.raises(UserError, match=f"{line.split()[0]}=.* has no effect without --load_dir"):
            configure([*words, *line.split()])
