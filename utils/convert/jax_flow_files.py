"""Reads jax-flow's checkpoints, pickles of {model: parameters, model_eps: their EMA, config: --model.* values}.

Arrays are NumPy's or JAX's, trees may be Flax's FrozenDict, and the configuration may be a ConfigDict or be missing.
The pickle is read as data (utils/base/pickles.py): what asks to run anything else is refused by name.
"""

import dataclasses
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from diffusion_transformer import TIMESTEP_FEATURES, DiTConfig, position_table
from utils.base.external import BadFileError
from utils.base.files import open_regular
from utils.base.messages import log
from utils.base.pickles import Function, SafeUnpickler, jax_stand_ins, numpy_stand_ins, read_safely
from utils.convert.jax_flow import import_jax_flow_params
from utils.convert.published import FAMILIES, JAX_FLOW, TABLE_TOLERANCE, find_mlp_ratio
from utils.objectives.flow_matching import LEGACY_T_SAMPLERS

START = re.compile(rb"\x80[\x02-\x05]")  # of pickles of the protocols 2 to 5
LAYOUT = "a jax-flow checkpoint is {'model': parameters, 'model_eps': their EMA, 'config': its --model.* values}"
DTYPES = ("f2", "f4", "f8", "i4", "i8", "u4")  # of parameters, and of counters and keys beside them
MAX_SHARING = 4  # bytes of all arrays over those of the file
# Entries of the configuration that training goes on with, and those that the parameters' shapes tell.
TAKEN = ("lr", "beta1", "beta2", "denoise_timesteps", "cfg_scale", "target_update_rate", "t_sampler")
SIZES = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")

Flat = Mapping[str, np.ndarray]


class JaxFlowCheckpoint(NamedTuple):
    """The content of a checkpoint: trees flattened to {'DiTBlock_0/Dense_0/kernel': array, ...}."""

    params: dict[str, np.ndarray]
    ema_params: dict[str, np.ndarray]
    config: dict[str, Any]  # {} where there is none


# --- The pickle ---


class _ConfigDict(dict):
    """Stands for ml_collections' ConfigDict, whose state has its fields beside its own settings."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state["_fields"])


def _unfrozen(tree: Any) -> dict:
    """Stands for flax's FrozenDict, which pickles as a call with a dictionary."""
    if not isinstance(tree, dict):
        raise BadFileError("it holds a FrozenDict that is made of no dictionary")
    return tree


class _Unpickler(SafeUnpickler):
    containers = (dict, list, tuple)
    max_opcodes = 10**6  # some fifty for each array
    max_values = 10**5


def read_jax_flow(path: Path) -> JaxFlowCheckpoint:
    """Reads a checkpoint, in memory of the order of the file.

    Raises BadFileError for any other file, naming what it asks for, or the entries that it has.
    """
    # Mapped, as a checkpoint may have gigabytes: only what is kept of it is copied.
    try:
        with open_regular(path) as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # no such file, or an empty one
        raise BadFileError(f"{getattr(error, 'strerror', None) or error}") from None

    # The value. Names are those under which its writers' classes are pickled.
    allowed = {
        **numpy_stand_ins(len(content), DTYPES),
        **jax_stand_ins(),
        ("flax.core.frozen_dict", "FrozenDict"): Function(_unfrozen),
        ("ml_collections.config_dict.config_dict", "ConfigDict"): _ConfigDict,
    }
    try:
        entries = read_safely(_Unpickler(content, allowed))
    except BadFileError as error:
        raise BadFileError(f"{error}; {LAYOUT}") from None

    # The entries by name. Others, such as a step, are of no use here.
    if not isinstance(entries, dict):
        raise BadFileError(f"it holds {type(entries).__name__}; {LAYOUT}")
    if missing := [name for name in ("model", "model_eps") if name not in entries]:
        found = ", ".join(entries)[:300] or "none"
        raise BadFileError(f"it has no entry {' and no '.join(missing)}, but {found}; {LAYOUT}")
    config = {} if entries.get("config") is None else entries["config"]
    if not isinstance(config, dict):
        raise BadFileError(f"its config is {type(config).__name__}, no dictionary of --model.* values")
    config = {name: _plain(value) for name, value in config.items()}
    trees = [_flatten(name, entries[name]) for name in ("model", "model_eps")]
    if sum(array.nbytes for tree in trees for array in tree.values()) > MAX_SHARING * len(content):
        raise BadFileError("its arrays share their bytes with each other")
    return JaxFlowCheckpoint(*trees, config)


def _plain(value: Any) -> Any:
    """Returns a number for an array that is one."""
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _flatten(entry: str, tree: Any) -> dict[str, np.ndarray]:
    """Returns {name: array} of a tree of parameters, perhaps within Flax's {'params': tree}."""
    if isinstance(tree, dict) and tree.keys() == {"params"}:
        tree = tree["params"]
    if not isinstance(tree, dict) or not tree:
        found = "empty" if isinstance(tree, dict) else type(tree).__name__
        raise BadFileError(f"its {entry} is {found}, no tree of parameters; {LAYOUT}")
    flat = flatten_dict(tree, sep="/")
    for name, value in flat.items():
        if not isinstance(value, np.ndarray):
            raise BadFileError(f"its {entry} has {name[:100]}, which is {type(value).__name__} and no array")
    return flat


# --- What the parameters are of ---


def find_jax_flow_config(
    checkpoint: JaxFlowCheckpoint, num_heads: int | None = None
) -> tuple[DiTConfig, tuple[int, int, int]]:
    """Returns (configuration, latent shape (h, w, c)) of a checkpoint, by the shapes of its parameters.

    Every parameter of both sets is there then, finite, of its shape, and nothing else is. `num_heads` is for the user
    to say what the kernels tell. Raises BadFileError, naming it, for what is missing, left over or misshapen.
    """
    # Sizes, each from the parameter that has it.
    ema = checkpoint.ema_params
    patch, _, channels, width = _shape_of(ema, "PatchEmbed_0/Conv_0/kernel", 4)
    _, heads, _ = _shape_of(ema, "DiTBlock_0/MultiHeadDotProductAttention_0/query/kernel", 3)
    _, mlp_width = _shape_of(ema, "DiTBlock_0/MlpBlock_0/Dense_0/kernel", 2)
    num_rows, _ = _shape_of(ema, "LabelEmbedder_0/Embed_0/embedding", 2)
    _, tokens, _ = _shape_of(ema, "pos_embed", 3)
    depth = len({name.split("/")[0] for name in ema if name.startswith("DiTBlock_")})
    side = round(tokens**0.5)
    if side**2 != tokens or width % 4 or width % heads or num_rows < 2:
        raise BadFileError(
            f"its parameters are of {tokens} patches, {width} wide, {heads} heads and {num_rows} labels, which no "
            "jax-flow model has"
        )
    if num_heads not in (None, heads):
        raise BadFileError(f"its kernels have {heads} heads, not --num_heads={num_heads}; leave the flag out")

    # Both sets are of these sizes, all of them.
    shapes = _shapes(patch, channels, width, heads, mlp_width, num_rows, tokens, depth)
    for entry, tree in (("model", checkpoint.params), ("model_eps", ema)):
        _check_tree(entry, tree, shapes)
    table = position_table(side, side, width)
    has_moved = any(np.abs(tree["pos_embed"][0] - table).max() > TABLE_TOLERANCE for tree in (checkpoint.params, ema))

    # What no shape tells is in the configuration, or has jax-flow's defaults.
    dropout, is_conditioned = (checkpoint.config.get(name) for name in ("class_dropout_prob", "t_conditioning"))
    config = DiTConfig(
        patch_size=patch,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=find_mlp_ratio(width, mlp_width, is_swiglu=False),
        num_classes=num_rows - 1,
        timestep_scale=FAMILIES[JAX_FLOW].settings["timestep_scale"],
        learned_positions=int(has_moved),
        dtype="float32",
        class_dropout_prob=0.1 if dropout is None else dropout,
        t_conditioning=1 if is_conditioned is None else is_conditioned,
    )
    return config, (side * patch, side * patch, channels)


def _shape_of(tree: Flat, name: str, ndim: int) -> tuple[int, ...]:
    if name not in tree:
        raise BadFileError(f"its model_eps has no {name}, but {', '.join(sorted(tree)[:5])}"[:400])
    if tree[name].ndim != ndim or 0 in tree[name].shape:
        raise BadFileError(f"its model_eps has {name} of shape {tree[name].shape}")
    return tree[name].shape


def _shapes(
    patch: int, channels: int, width: int, heads: int, mlp_width: int, num_rows: int, tokens: int, depth: int
) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of the parameters of a jax-flow DiT."""
    dense = {
        "TimestepEmbedder_0/Dense_0": (TIMESTEP_FEATURES, width),
        "TimestepEmbedder_0/Dense_1": (width, width),
        "FinalLayer_0/Dense_0": (width, 2 * width),
        "FinalLayer_0/Dense_1": (width, patch**2 * channels),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, width),
        "PatchEmbed_0/Conv_0/kernel": (patch, patch, channels, width),
        "PatchEmbed_0/Conv_0/bias": (width,),
        "LabelEmbedder_0/Embed_0/embedding": (num_rows, width),
    }
    head = width // heads
    for i in range(depth):
        block = f"DiTBlock_{i}"
        dense |= {
            f"{block}/Dense_0": (width, 6 * width),
            f"{block}/MlpBlock_0/Dense_0": (width, mlp_width),
            f"{block}/MlpBlock_0/Dense_1": (mlp_width, width),
        }
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for name in ("query", "key", "value"):
            shapes[f"{attention}/{name}/kernel"] = (width, heads, head)
            shapes[f"{attention}/{name}/bias"] = (heads, head)
        shapes[f"{attention}/out/kernel"] = (heads, head, width)
        shapes[f"{attention}/out/bias"] = (width,)
    for name, shape in dense.items():
        shapes |= {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}
    return shapes


def _check_tree(entry: str, tree: Flat, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(shapes.keys() - tree.keys()):
        raise BadFileError(f"its {entry} has no {missing[0]} ({len(missing)} parameters are missing)")
    if surplus := sorted(tree.keys() - shapes.keys()):
        raise BadFileError(
            f"its {entry} has {surplus[0][:100]}, which no jax-flow DiT has ({len(surplus)} are left over)"
        )
    for name, shape in shapes.items():
        if tree[name].shape != shape:
            raise BadFileError(f"its {entry} has {name} of shape {tree[name].shape}, not {shape}")
        if tree[name].dtype.kind != "f" or not np.isfinite(tree[name]).all():
            raise BadFileError(f"its {entry} has {name}, which is not of finite floats")


def training_settings(config: Mapping[str, Any], network: DiTConfig) -> dict[str, Any]:
    """Returns the --model.* values in a checkpoint's configuration that training goes on with, and says which sizes in
    it are not those of the parameters."""
    for name in SIZES:
        found = getattr(network, name)
        if isinstance(config.get(name), (int, float)) and config[name] != found:
            log(f"its config has {name} {config[name]}, but its parameters {found:g}, which counts")
    settings = {name: config[name] for name in TAKEN if config.get(name) is not None}
    if (sampler := settings.get("t_sampler")) in LEGACY_T_SAMPLERS:
        settings["t_sampler"] = LEGACY_T_SAMPLERS[sampler]
    return settings


def keep_classes(checkpoint: JaxFlowCheckpoint, network: DiTConfig, count: int) -> tuple[JaxFlowCheckpoint, DiTConfig]:
    """Returns checkpoint and configuration with the first `count` labels and "no label" alone: jax-flow's table has
    1,000 by default, whatever the data have. Their numbers are those of the whole table."""
    name = "LabelEmbedder_0/Embed_0/embedding"

    def cut(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**tree, name: np.concatenate([tree[name][:count], tree[name][-1:]])}

    log(f"its table has rows for {network.num_classes} labels: the first {count}, which are named, are kept")
    checkpoint = checkpoint._replace(params=cut(checkpoint.params), ema_params=cut(checkpoint.ema_params))
    return checkpoint, dataclasses.replace(network, num_classes=count)


def import_jax_flow(checkpoint: JaxFlowCheckpoint, network: DiTConfig) -> tuple[PyTree, PyTree]:
    """Returns (EMA, parameters) of this project's DiT, float32, for a checkpoint that `find_jax_flow_config` took."""

    def convert(flat: Flat) -> PyTree:
        params = import_jax_flow_params(flat)
        params.pop("pos_embed", None)
        if network.learned_positions:
            params["pos_embed"] = flat["pos_embed"]
        return jax.tree.map(lambda array: np.asarray(array, np.float32), params)

    return convert(checkpoint.ema_params), convert(checkpoint.params)
