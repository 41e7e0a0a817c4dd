"""What a network does with a condition's tokens and channels: attention with masks, in context and across."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_transformer import DiT, DiTConfig, build_dit
from utils.base.mesh import make_mesh
from utils.base.messages import UserError, warn_once
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import Condition, Embedded
from utils.conditions.tokens import TokensCondition
from utils.convert.published import export_published, import_published
from utils.kernels.ops import attention, packed_attention
from utils.kernels.tpu_attention import TpuAttention
from utils.networks.lora import add_lora
from utils.training.start import adapt_params, frozen_beside_lora, keep_null_vector

SIZES = {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "dtype": "float32"}
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 8, 2), np.float32))
T = jnp.asarray(np.array([0.1, 0.5, 0.9], np.float32))


def test_forms_without_masks_leave_them_to_xla_and_say_so_once(monkeypatch, capsys):
    query, key, value = (jax.random.normal(jax.random.key(i), (2, 5, 2, 8)) for i in range(3))
    mask = jnp.array([[True, False, True, True, False], [False, True, True, True, True]])
    expected = attention(query, key, value, "xla", mask)
    packed = jnp.concatenate([x.reshape(2, 5, 16) for x in (query, key, value)], axis=-1)
    for form in ("cudnn", TpuAttention(make_mesh(), is_interpreted=True)):
        np.testing.assert_array_equal(attention(query, key, value, form, mask), expected)
        np.testing.assert_array_equal(packed_attention(packed, 2, form, mask), expected.reshape(2, 5, 16))

    warn_once.cache_clear()
    monkeypatch.setattr("diffusion_transformer.choose_attention_for", lambda *_: "cudnn")
    for mode in ("context", "cross"):
        build_dit(DiTConfig(**SIZES, token_mode=mode), "none", make_mesh(), TokensCondition(4, 5))
    assert capsys.readouterr().err.count("takes XLA's form") == 1


def make_network(condition, form="by_head", **settings):
    """(a DiT, random parameters of it, but those that have to start at zero as they start)."""
    network = DiT(DiTConfig(**{**SIZES, **settings}), attention_form=form, condition=condition)
    fresh = network.init(jax.random.key(0), X, T, network.condition.null(3))["params"]
    rng = np.random.default_rng(0)
    flat = flatten_dict(fresh)
    for path, x in flat.items():
        if path[0] != "condition_patches" and path[1:3] != ("cross_attention", "out"):
            flat[path] = jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
    return network, unflatten_dict(flat)


@partial(jax.jit, static_argnums=0)
def run(network, params, condition, x=X):
    return network.apply({"params": params}, x, T, condition)


def of_parts(params, network, condition):
    """The part of the parameters that a network with another condition has."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), X, T, condition)["params"]
    flat = flatten_dict(params)
    return unflatten_dict({path: flat[path] for path in flatten_dict(shapes)})


def make_tokens(length, mask):
    value = jax.random.normal(jax.random.key(5), (3, 9, 5))[:, :length]
    return {"value": value, "mask": jnp.asarray(mask)}


def with_outputs(params):
    """Cross-attention that has been trained."""
    rng = np.random.default_rng(1)
    flat = flatten_dict(params)
    for path in flat:
        if path[1:3] == ("cross_attention", "out"):
            flat[path] = jnp.asarray(0.3 * rng.standard_normal(flat[path].shape), jnp.float32)
    return unflatten_dict(flat)


@pytest.mark.parametrize(
    ("mode", "form", "settings"),
    [
        ("context", "by_head", {"rope": 1}),
        ("cross", "xla", {"qk_norm": 1, "norm": "rms"}),
    ],
)
def test_neither_contents_nor_number_of_masked_tokens_matter(mode, form, settings):
    network, params = make_network(TokensCondition(4, 5), form, token_mode=mode, **settings)
    params = with_outputs(params)
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    tokens = make_tokens(4, mask)
    expected = run(network, params, tokens)
    for filler in (7.0, jnp.nan, jnp.inf):
        other = {**tokens, "value": jnp.where(mask[..., None], tokens["value"], filler)}
        np.testing.assert_array_equal(run(network, params, other), expected)
    assert jnp.abs(run(network, params, {**tokens, "mask": ~tokens["mask"]}) - expected).min(axis=(1, 2, 3)).max() > 0

    # Five more, none of them there.
    longer = network.clone(condition=TokensCondition(9, 5))
    positions = jnp.pad(params["token_embed"]["positions"], ((0, 5), (0, 0)), constant_values=3)
    more = {**params, "token_embed": {**params["token_embed"], "positions": positions}}
    found = run(longer, more, make_tokens(9, np.pad(mask, ((0, 0), (0, 5)))))
    np.testing.assert_allclose(found, expected, atol=1e-5 * jnp.abs(expected).max())


@dataclasses.dataclass(frozen=True)
class Given(Condition):
    """Brings what it is given as it is: a tree of Embedded."""

    brought: tuple[str, ...] = ()
    spec = jax.ShapeDtypeStruct((), jnp.float32)  # not read here

    def read(self, example):
        raise NotImplementedError

    def null(self, count):
        shapes = {"vector": (16,), "tokens": (2, 16), "channels": (8, 8, 3), "mask": (2,)}
        names = self.brought or ("mask",)
        return {name: jnp.zeros((count, *shapes[name]), bool if name == "mask" else None) for name in names}

    def embedder(self, width, dtype):
        return GivenEmbed(self.brought)


class GivenEmbed(nn.Module):
    brought: tuple[str, ...]

    @nn.compact
    def __call__(self, condition):
        return Embedded(**{name: condition[name] for name in self.brought})


def test_cross_attention_and_channels_start_as_the_network_without_them():
    """Bit for bit, whatever tokens and channels are."""
    plain = DiT(DiTConfig(**SIZES), condition=Given())
    crossed, params = make_network(TokensCondition(4, 5), token_mode="cross")
    expected = run(plain, of_parts(params, plain, Given().null(3)), Given().null(3))
    for mask in (np.ones((3, 4), bool), np.zeros((3, 4), bool)):
        np.testing.assert_array_equal(run(crossed, params, make_tokens(4, mask)), expected)

    wide, params = make_network(Given(("channels",)))
    channels = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    expected = run(plain, of_parts(params, plain, Given().null(3)), Given().null(3))
    np.testing.assert_array_equal(run(wide, params, {"channels": channels}), expected)
    # Trained, they count as further channels of x.
    trained = {**params, "condition_patches": {"kernel": jax.random.normal(jax.random.key(2), (2, 2, 3, 16))}}
    kernel = jnp.concatenate([params["patch_embed"]["kernel"], trained["condition_patches"]["kernel"]], axis=2)
    joined = {**of_parts(params, plain, Given().null(3)), "patch_embed": {**params["patch_embed"], "kernel": kernel}}
    out = jnp.concatenate([params["final_layer"]["dense"]["kernel"].reshape(16, 4, 2), jnp.zeros((16, 4, 3))], axis=2)
    bias = jnp.concatenate([params["final_layer"]["dense"]["bias"].reshape(4, 2), jnp.zeros((4, 3))], axis=1)
    final = {**params["final_layer"], "dense": {"kernel": out.reshape(16, 20), "bias": bias.reshape(20)}}
    both = run(plain, {**joined, "final_layer": final}, Given().null(3), jnp.concatenate([X, channels], axis=-1))
    found = run(wide, trained, {"channels": channels})
    assert jnp.abs(found - expected).max() > 0.1
    np.testing.assert_allclose(found, both[..., :2], atol=1e-5 * jnp.abs(both).max())


def test_class_tokens_are_tokens_of_the_vector():
    network, params = make_network(ClassCondition(), class_tokens=2, rope=1)
    labels = jnp.array([0, 2, 3])
    vector = params["label_embed"]["Embed_0"]["embedding"][labels]
    given = DiT(DiTConfig(**SIZES, rope=1), condition=Given(("vector", "tokens")))
    same = {name: part for name, part in params.items() if name not in ("label_embed", "class_positions")}
    condition = {"vector": vector, "tokens": vector[:, None] + params["class_positions"]}
    np.testing.assert_allclose(run(network, params, labels), run(given, same, condition), atol=1e-5)

    # Where none of them is there, positions of the image are what they are without any.
    masked = DiT(DiTConfig(**SIZES, rope=1), condition=Given(("vector", "tokens", "mask")))
    alone = DiT(DiTConfig(**SIZES, rope=1), condition=Given(("vector",)))
    expected = run(alone, same, {"vector": vector})
    assert jnp.abs(run(given, same, condition) - expected).max() > 0.01
    found = run(masked, same, {**condition, "mask": jnp.zeros((3, 2), bool)})
    np.testing.assert_allclose(found, expected, atol=1e-5 * jnp.abs(expected).max())


def test_what_is_recomputed_changes_no_gradient():
    network, params = make_network(TokensCondition(4, 5), token_mode="cross")
    params = with_outputs(params)
    tokens = make_tokens(4, np.eye(3, 4, dtype=bool))

    def gradient(network):
        def loss(params):
            return jnp.square(network.apply({"params": params}, X, T, tokens)).sum()

        return jax.jit(jax.grad(loss))(params)

    expected = gradient(network)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected["token_embed"]))
    found = gradient(network.clone(remat="dots"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max())), found, expected)


@pytest.mark.parametrize("settings", [{"token_mode": "context", "class_tokens": 0}, {"token_mode": "cross"}])
def test_flops_and_parameters_count_what_tokens_cost(settings):
    wide = {"hidden_size": 256, "num_heads": 4, "mlp_ratio": 4.0, "num_classes": 1}
    network = DiT(DiTConfig(**{**SIZES, **wide, **settings}), condition=TokensCondition(40, 256))
    arguments = (X, T, network.condition.null(3))
    params = jax.eval_shape(network.init, jax.random.key(0), *arguments)
    counted = jax.jit(network.apply).lower(params, *arguments).cost_analysis()["flops"]
    of_embedder = 2 * 3 * 40 * 256 * 256
    assert 3 * network.count_flops((8, 8, 2)) + of_embedder == pytest.approx(counted, rel=0.1)
    sizes = {path: leaf.size for path, leaf in flatten_dict(params["params"]).items() if path[0] != "token_embed"}
    assert network.config.count_parameters((8, 8, 2)) == pytest.approx(sum(sizes.values()), rel=0.03)


# --- Other runs, and files ---


@pytest.mark.parametrize(("class_names", "row"), [(("a", "b", "c"), 3), (("image",), 0)])
def test_a_run_from_one_of_classes_starts_as_its_no_label(class_names, row):
    """Bit for bit where the tokens are attended to across; of one class, as that class."""
    parent, source = make_network(ClassCondition(class_names), num_classes=len(class_names))
    network, fresh = make_network(TokensCondition(4, 5), token_mode="cross")
    adapted = adapt_params(source, fresh, network.config, class_names, ())
    saved = {"dataset": {"class_names": class_names}, "model": {"class_dropout_prob": 0.1}}
    params = jax.tree.map(jnp.asarray, keep_null_vector(source, adapted.params, adapted.new, saved))
    expected = run(parent, source, jnp.full(3, row))
    np.testing.assert_array_equal(run(network, params, make_tokens(4, np.ones((3, 4), bool))), expected)
    with pytest.raises(UserError, match=r"--model.token_mode=cross: .* --lora_rank adds none; use context"):
        frozen_beside_lora(tuple(params), adapted.new)

    # And back: every class starts as what has stood for none.
    again = adapt_params(params, source, parent.config, (), class_names)
    labelled = keep_null_vector(params, again.params, again.new, {"dataset": {}, "model": {}})
    table = labelled["label_embed"]["Embed_0"]["embedding"]
    np.testing.assert_array_equal(table, np.broadcast_to(params["base_vector"], table.shape))


def test_lora_has_factors_across_and_trains_what_embeds_the_condition():
    _, params = make_network(TokensCondition(4, 5), token_mode="cross")
    parts = add_lora(params, 2, jax.random.key(0))
    assert set(parts["lora"]["block_0"]["cross_attention"]) == {"query", "key_value", "out"}
    assert {"token_embed", "base_vector"}.isdisjoint(frozen_beside_lora(tuple(parts), ()))
    assert "block_0" in frozen_beside_lora(tuple(parts), ())


@pytest.mark.parametrize("settings", [{"token_mode": "cross", "norm": "rms"}, {"qk_norm": 1}])
def test_exported_parameters_are_read_again_bit_for_bit(settings):
    condition = TokensCondition(4, 5)
    network, params = make_network(condition, **settings)
    state = export_published(params, network.config, (8, 8, 2), condition)
    again = import_published(state, network.config, (8, 8, 2), condition)
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, params))
    assert state["condition.token_embed.positions"].shape == (5, 16)


def test_settings_about_what_a_condition_does_not_bring_are_refused():
    mesh = make_mesh()
    with pytest.raises(UserError, match=r"^--model.token_mode=cross: the data's condition has no tokens; use context$"):
        build_dit(DiTConfig(**SIZES, token_mode="cross"), "none", mesh, ClassCondition(("a",)))
    with pytest.raises(UserError, match=r"^--model.class_tokens=8: .* neither classes nor vectors; use 0$"):
        build_dit(DiTConfig(**SIZES, class_tokens=8), "none", mesh, TokensCondition(4, 5))
