"""Published checkpoints of the DiT family: their tensors by name, as parameters of this project's DiT, and back.

DiT (arXiv:2212.09748), SiT (arXiv:2401.08740) and LightningDiT (arXiv:2501.01423) share one layout; diffusers' names
are rewritten to it first. One table of names serves both directions.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from diffusion_transformer import DiT, DiTConfig, position_table, rope_angles
from utils.base.external import BadFileError
from utils.base.messages import progress_bar
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import Condition

# {width: number of heads} of the published sizes: no tensor of DiT or SiT tells the heads.
HEADS = {preset["hidden_size"]: preset["num_heads"] for name, preset in DiTConfig.PRESETS.items() if "/" in name}
MAX_TOKENS = 2**14  # of an image whose table of positions is computed
TABLE_TOLERANCE = 1e-5  # up to which a position table is the constant one
# Tensors that LightningDiT alone has: of its MLP, of its normalisation.
LIGHTNINGDIT = {"blocks.0.mlp.w12.weight", "blocks.0.norm1.weight"}
LABELS = "y_embedder.embedding_table.weight"  # which only models of classes have
EXTRA = "condition."  # starts the names of what no published model has: the parts that embed other conditions
State = Mapping[str, np.ndarray]


class Family(NamedTuple):
    """Facts about a family of models that their tensors do not tell."""

    title: str
    objective: dict[str, Any]  # --objective.* of a run
    settings: dict[str, Any]  # --model.* of a run
    vae: str | None  # hub id of the one that made the latents; None: the user has to name it
    keeps_sigma: bool  # whether the second half of the outputs is used
    guidance: tuple[Any, ...] = ("--cfg_scale", 1.5, "--cfg_channels", 3)  # of its samples of latents


JAX_FLOW = "jax-flow"  # whose checkpoints have names of their own (utils/convert/jax_flow_files.py)
# {--family: how its published models were trained}
FAMILIES = {
    "sit": Family(
        "SiT",
        {"name": "flow_matching"},
        {"timestep_scale": 1.0, "t_sampler": "uniform"},
        "stabilityai/sd-vae-ft-ema",
        keeps_sigma=False,
    ),
    "dit": Family(
        "DiT",
        {"name": "diffusion", "diffusion_timesteps": 1000},
        {"timestep_scale": 1.0},
        "stabilityai/sd-vae-ft-ema",
        keeps_sigma=True,
    ),
    "lightningdit": Family(
        "LightningDiT",
        {"name": "flow_matching"},
        {"timestep_scale": 1.0, "t_sampler": "logit_normal"},
        None,
        keeps_sigma=False,
    ),
    JAX_FLOW: Family(
        "jax-flow",
        {"name": "flow_matching"},
        {"timestep_scale": 10_000.0, "t_sampler": "logit_normal"},
        "stabilityai/sd-vae-ft-mse",
        keeps_sigma=False,
        guidance=("--cfg_scale", 4),
    ),
}


class Tensor(NamedTuple):
    """A tensor of a published file, and the parameter that it becomes."""

    name: str
    path: tuple[str, ...]
    load: Callable[[np.ndarray], np.ndarray]  # from the file's layout to this project's
    store: Callable[[np.ndarray], np.ndarray]  # its inverse


def _same(value: np.ndarray) -> np.ndarray:
    return value


# PyTorch's linear layers are (out, in), Flax's (in, out).
def _transposed(value: np.ndarray) -> np.ndarray:
    return value.T


# Kernels (d, c, p, p) of a convolution there, (p, p, c, d) here.
def _load_patches(value: np.ndarray) -> np.ndarray:
    return value.transpose(2, 3, 1, 0)


def _store_patches(value: np.ndarray) -> np.ndarray:
    return value.transpose(3, 2, 0, 1)


def _linear(name: str, *path: str) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (*path, "kernel"), _transposed, _transposed)
    yield Tensor(f"{name}.bias", (*path, "bias"), _same, _same)


def tensor_table(config: DiTConfig) -> list[Tensor]:
    """Lists the tensors of a model, without `pos_embed`, which is a constant in most."""
    # The embeddings.
    table = [
        Tensor(f"{_patches_name(config)}.weight", ("patch_embed", "kernel"), _load_patches, _store_patches),
        *_linear("t_embedder.mlp.0", "timestep_embed", "dense_0"),
        *_linear("t_embedder.mlp.2", "timestep_embed", "dense_1"),
        Tensor(LABELS, ("label_embed", "Embed_0", "embedding"), _same, _same),
    ]
    if config.bottleneck:
        table += _linear("x_embedder.proj2", "patch_embed", "out")
    else:
        table.append(Tensor("x_embedder.proj.bias", ("patch_embed", "bias"), _same, _same))

    # The blocks.
    for i in range(config.depth):
        theirs = f"blocks.{i}"
        ours = f"block_{i}"
        table += _linear(f"{theirs}.attn.qkv", ours, "attention", "qkv")
        table += _linear(f"{theirs}.attn.proj", ours, "attention", "out")
        for name, layer in zip(_mlp_names(config), ("dense_0", "dense_1"), strict=True):
            table += _linear(f"{theirs}.mlp.{name}", ours, "mlp", layer)
        table += _linear(f"{theirs}.adaLN_modulation.1", ours, "ada_ln", "dense")
        table += [_scale(f"{theirs}.{norm}", ours, norm) for norm in ("norm1", "norm2") if config.norm == "rms"]
        if config.qk_norm:
            table += [_scale(f"{theirs}.attn.{norm}", ours, "attention", norm) for norm in ("q_norm", "k_norm")]

    # The output.
    table += _linear("final_layer.adaLN_modulation.1", "final_layer", "ada_ln", "dense")
    table += _linear("final_layer.linear", "final_layer", "dense")
    if config.norm == "rms":
        table.append(_scale("final_layer.norm_final", "final_layer", "norm"))
    return table


def _patches_name(config: DiTConfig) -> str:
    """Returns the name of the layer that reads patches; with a bottleneck, it is the first of two (as in JiT)."""
    return "x_embedder.proj1" if config.bottleneck else "x_embedder.proj"


def _scale(name: str, *path: str) -> Tensor:
    return Tensor(f"{name}.weight", (*path, "scale"), _same, _same)


def _mlp_names(config: DiTConfig) -> tuple[str, str]:
    return ("w12", "w3") if config.mlp == "swiglu" else ("fc1", "fc2")


# --- From a file to parameters ---


def import_published(
    state: State, config: DiTConfig, latent_shape: tuple[int, int, int], condition: Condition | None = None
) -> PyTree:
    """Returns the parameters (float32 NumPy arrays) of a checkpoint in the published names.

    `config` and `latent_shape` (h, w, c) are those of `find_config`; the condition is the class by default. Raises
    BadFileError, naming it, for a tensor that is missing, left over or misshapen, or that holds NaN or infinity.
    """
    # Sizes and names first: nothing large is made for a file that is refused.
    state = dict(state)
    height, width, channels = latent_shape
    pos_embed = _take(state, "pos_embed", 3)
    del state["pos_embed"]
    p = config.patch_size
    d = config.hidden_size
    _check_shape("pos_embed", pos_embed, (1, height * width // p**2, d))
    patches = f"{_patches_name(config)}.weight"
    _check_shape(patches, _take(state, patches, 4), (config.bottleneck or d, channels, p, p))
    if config.rope:
        _drop_rope_table(state, config, height * width // config.patch_size**2)
    table = tensor_table(config)
    _check_missing(state, [tensor.name for tensor in table if tensor.name != LABELS])
    shapes = _find_shapes(config, latent_shape, condition or ClassCondition())
    table = [tensor for tensor in table if tensor.path in shapes]
    table += [_extra(path) for path in shapes.keys() - {tensor.path for tensor in table} - {("pos_embed",)}]
    _check_missing(state, [tensor.name for tensor in table])
    surplus = sorted(state.keys() - {tensor.name for tensor in table})
    if surplus:
        raise BadFileError(f"it has a tensor {surplus[0]} that no such model has ({len(surplus)} are left over)")

    # Each tensor as the parameter that it becomes.
    outputs = channels * (2 if config.learn_sigma else 1)
    flat = {}
    for tensor in progress_bar(table, "reading the tensors", unit="tensor", delay=2):
        value = _to_float32(tensor.name, state[tensor.name])
        if value.ndim != len(shapes[tensor.path].shape):  # before it is transposed
            raise BadFileError(f"its tensor {tensor.name} has the shape {value.shape}")
        value = tensor.load(value)
        if tensor.path[:2] == ("final_layer", "dense"):
            # Outputs are (row, column, channel) of a patch. The second half is left out where nothing uses it.
            if value.shape[-1] % p**2:
                raise BadFileError(f"its tensor {tensor.name} has the shape {state[tensor.name].shape}")
            value = value.reshape(*value.shape[:-1], p**2, -1)[..., :outputs]
            value = value.reshape(*value.shape[:-2], -1)
        if tensor.path[0] == "label_embed" and len(value) == config.num_classes:
            value = np.concatenate([value, np.zeros_like(value[:1])])  # "no label", unknown to this model
        flat[tensor.path] = value
    if config.learned_positions:
        flat[("pos_embed",)] = _to_float32("pos_embed", pos_embed)
    for path, shape in shapes.items():
        if flat[path].shape != shape.shape:
            raise BadFileError(f"its {'/'.join(path)} has the shape {flat[path].shape}, not {shape.shape}")
    return unflatten_dict(flat)


def find_config(
    state: State, family: str, num_heads: int | None = None, num_classes: int | None = None
) -> tuple[DiTConfig, tuple[int, int, int]]:
    """Returns (configuration, latent shape (h, w, c)) of a checkpoint in the published names, by its tensors' shapes.

    `family` is a key of FAMILIES. `num_heads` defaults to that of the published model of this width. By `num_classes`,
    a table of labels with a row for "no label" is told from one of a model trained without label dropout. Raises
    BadFileError for a tensor that is needed here and missing, by its name, and for what does not fit the family.
    """
    # Sizes, and the family.
    kernel = _take(state, "x_embedder.proj.weight", 4)
    hidden_size, channels, patch_size, _ = kernel.shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if not LIGHTNINGDIT.isdisjoint(state):
        if family != "lightningdit":
            raise BadFileError("it is a LightningDiT's (it has its norms and MLP); use --family lightningdit")
    elif family == "lightningdit":
        raise BadFileError("it is no LightningDiT's, which has blocks.0.mlp.w12 or blocks.0.norm1")

    # The MLP, the classes and the output.
    is_swiglu = "blocks.0.mlp.w12.weight" in state
    mlp_width = _take(state, f"blocks.0.mlp.{'w3' if is_swiglu else 'fc2'}.weight", 2).shape[1]

    # A table as long as the classes has no row for "no label"; without `num_classes` it is taken to have one.
    num_rows = len(_take(state, "y_embedder.embedding_table.weight", 2))
    has_no_label = num_rows != num_classes
    num_outputs = len(_take(state, "final_layer.linear.weight", 2)) // patch_size**2
    if num_outputs not in (channels, 2 * channels):
        raise BadFileError(f"it has {num_outputs} output channels for {channels} of its input")
    rows, columns = _grid_of(state)

    # What no tensor tells is the family's.
    config = DiTConfig(
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=_choose_heads(state, hidden_size, num_heads),
        mlp_ratio=find_mlp_ratio(hidden_size, mlp_width, is_swiglu),
        class_dropout_prob=0.1 if has_no_label else 0.0,
        num_classes=num_rows - 1 if has_no_label else num_rows,
        timestep_scale=FAMILIES[family].settings["timestep_scale"],
        learned_positions=int(_has_moved(state, rows, columns, hidden_size)),
        learn_sigma=int(FAMILIES[family].keeps_sigma and num_outputs == 2 * channels),
        dtype="float32",
        norm="rms" if "blocks.0.norm1.weight" in state else "layer",
        mlp="swiglu" if is_swiglu else "gelu",
        rope=int("feat_rope.freqs_cos" in state),
        qk_norm=int("blocks.0.attn.q_norm.weight" in state),
    )
    return config, (rows * patch_size, columns * patch_size, channels)


def _take(state: State, name: str, ndim: int) -> np.ndarray:
    if name not in state:
        raise BadFileError(f"it has no tensor {name}, which every model of these families has")
    if state[name].ndim != ndim or 0 in state[name].shape:
        raise BadFileError(f"its tensor {name} has the shape {state[name].shape}")
    return state[name]


def _grid_of(state: State) -> tuple[int, int]:
    """Returns (rows, columns) of patches, by the table of positions, which `rename_diffusers` adds to diffusers' files.

    Raises BadFileError where the table is missing or not that of a square image.
    """
    tokens = state["pos_embed"].shape[1] if "pos_embed" in state and state["pos_embed"].ndim == 3 else 0
    side = round(tokens**0.5)
    if side == 0 or side**2 != tokens:
        raise BadFileError("it has no pos_embed (1, tokens, width) of a square image, from which its size is read")
    return side, side


def _has_moved(state: State, rows: int, columns: int, width: int) -> bool:
    """Returns whether the table of positions differs from the constant one."""
    table = state["pos_embed"]
    if width % 4:
        raise BadFileError(f"its tensors are {width} wide, which is no multiple of 4 (sines and cosines of two axes)")
    _check_shape("pos_embed", table, (1, rows * columns, width))
    return bool(
        np.abs(np.asarray(table[0], np.float32) - position_table(rows, columns, width)).max() >= TABLE_TOLERANCE
    )


def _choose_heads(state: State, hidden_size: int, num_heads: int | None) -> int:
    # Some tensors are as wide as a head; otherwise the width of the model says it, or the user.
    if "blocks.0.attn.q_norm.weight" in state:
        found = hidden_size // _take(state, "blocks.0.attn.q_norm.weight", 1).size
    elif "feat_rope.freqs_cos" in state:
        found = hidden_size // _take(state, "feat_rope.freqs_cos", 2).shape[1]
    else:
        found = HEADS.get(hidden_size)
    if found == 0:
        raise BadFileError(f"its heads are wider than its width {hidden_size}")
    heads = num_heads or found
    if heads is None:
        raise BadFileError(f"no published model is {hidden_size} wide: give the number of heads with --num_heads")
    if hidden_size % heads:
        raise BadFileError(f"--num_heads={heads} does not divide its width {hidden_size}")
    return heads


def find_mlp_ratio(hidden_size: int, width: int, is_swiglu: bool) -> float:
    """Returns the ratio that gives an MLP of this width (see `DiTConfig.mlp_width`)."""
    # 4 first, which nearly all models have; then the exact ratio, and one a bit above it: widths are rounded down.
    scale = 1.5 if is_swiglu else 1.0
    candidates = (4.0, scale * width / hidden_size, scale * (width + 0.5) / hidden_size)
    for ratio in candidates:
        mlp = "swiglu" if is_swiglu else "gelu"
        if DiTConfig(hidden_size=hidden_size, mlp_ratio=ratio, mlp=mlp).mlp_width == width:
            return ratio
    raise BadFileError(f"its MLP is {width} wide, which no --model.mlp_ratio gives")


def _drop_rope_table(state: dict[str, np.ndarray], config: DiTConfig, num_tokens: int) -> None:
    """Removes RoPE's tables of angles, which are constants. Raises BadFileError for those of another image size."""
    for name in ("feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        table = state.pop(name, None)
        if table is not None and table.shape != (num_tokens, config.hidden_size // config.num_heads):
            raise BadFileError(f"its tensor {name} has the shape {table.shape}, which is of another image size")


def _check_missing(state: State, expected: list[str]) -> None:
    missing = [name for name in expected if name not in state]
    if missing:
        raise BadFileError(f"it has no tensor {missing[0]} ({len(missing)} are missing)")


def _check_shape(name: str, value: np.ndarray, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise BadFileError(f"its tensor {name} has the shape {value.shape}, not {expected}")


def _find_shapes(config: DiTConfig, latent_shape: tuple, condition: Condition) -> dict[tuple[str, ...], Any]:
    """Returns {path: shape} of the network's parameters, which are only described, not made."""
    network = DiT(config, condition=condition)
    arguments = (jnp.zeros((1, *latent_shape)), jnp.zeros(1), network.condition.null(1))
    return flatten_dict(jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"])


def _extra(path: tuple[str, ...]) -> Tensor:
    return Tensor(f"{EXTRA}{'.'.join(path)}", path, _same, _same)


def _to_float32(name: str, value: np.ndarray) -> np.ndarray:
    # NumPy files bfloat16 under "V", as it is not a type of its own.
    value = np.asarray(value)
    if value.dtype.kind != "f" and value.dtype.name != "bfloat16":
        raise BadFileError(f"its tensor {name} holds {value.dtype}")
    value = value.astype(np.float32, copy=False)
    if not np.isfinite(value).all():
        raise BadFileError(f"its tensor {name} holds NaN or infinity")
    return value


# --- From parameters to a file ---


def export_published(
    params: PyTree, config: DiTConfig, latent_shape: tuple[int, int, int], condition: Condition | None = None
) -> dict[str, np.ndarray]:
    """Returns {published name: tensor} of parameters: the inverse of `import_published`, bit for bit.

    `latent_shape` is (h, w, c); the condition is the class by default. What embeds another one has names of its own.
    Raises ValueError for other parameters that no published model has.
    """
    # The table of positions, which is a parameter in some models only.
    flat = flatten_dict(params)
    height, width, _ = latent_shape
    p = config.patch_size
    table = flat.pop(("pos_embed",), None)
    if table is None:
        table = position_table(height // p, width // p, config.hidden_size)[None]
    state = {"pos_embed": np.asarray(table, np.float32)}

    # All others. Without label dropout, "no label" is a row that was never trained: the file goes without it.
    table = [tensor for tensor in tensor_table(config) if tensor.path in flat or tensor.path[0] != "label_embed"]
    if others := flat.keys() - {tensor.path for tensor in table}:
        shapes = _find_shapes(config, latent_shape, condition or ClassCondition())
        table += [_extra(path) for path in others if path in shapes]
    for tensor in progress_bar(table, "renaming the tensors", unit="tensor", delay=2):
        value = np.asarray(flat.pop(tensor.path), np.float32)  # of a run with JAX_ENABLE_X64=1, float64
        if tensor.path[0] == "label_embed" and config.class_dropout_prob == 0:
            value = value[: config.num_classes]
        state[tensor.name] = np.ascontiguousarray(tensor.store(value))

    # LightningDiT's files hold its angles too, though they are constants.
    if flat:
        raise ValueError(f"no published model has {'/'.join(min(flat))}")
    if config.rope:
        angles = rope_angles(height // p, width // p, config.hidden_size // config.num_heads)
        state["feat_rope.freqs_cos"] = np.cos(angles)
        state["feat_rope.freqs_sin"] = np.sin(angles)
    return state
