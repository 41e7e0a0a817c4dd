"""Imports the parameters of jax-flow's checkpoints (docs/jax_flow.md)."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, PyTree

from diffusion_transformer import position_table


def import_jax_flow_params(flat: Mapping[str, Array | np.ndarray]) -> PyTree:
    """Returns this project's DiT parameters for a jax-flow checkpoint {'DiTBlock_0/Dense_0/kernel': array, ...}.

    Query, key and value become one kernel. jax-flow trained its table of positions, which is a constant here: a
    `pos_embed` that differs from the constant stays a parameter, which DiT then uses, so that the imported model
    computes what the old one did. Raises ValueError for a tree that is not a jax-flow DiT's.
    """
    # Each tensor is taken once: what is left at the end has no counterpart.
    left = {name: np.asarray(value) for name, value in flat.items()}
    depth = sum(name.startswith("DiTBlock_") and name.endswith("/MlpBlock_0/Dense_0/kernel") for name in left)

    def take(path):
        return {leaf: left.pop(f"{path}/{leaf}") for leaf in ("kernel", "bias")}

    def take_pair(path):
        return {f"dense_{i}": take(f"{path}/Dense_{i}") for i in range(2)}

    def take_block(path):
        attention = f"{path}/MultiHeadDotProductAttention_0"
        query, key, value, out = (take(f"{attention}/{name}") for name in ("query", "key", "value", "out"))
        width = len(query["kernel"])  # kernels are (width, heads, width of a head)
        return {
            "ada_ln": {"dense": take(f"{path}/Dense_0")},
            "attention": {
                "qkv": {
                    "kernel": np.concatenate([part["kernel"].reshape(width, width) for part in (query, key, value)], 1),
                    "bias": np.concatenate([part["bias"].reshape(width) for part in (query, key, value)]),
                },
                "out": {"kernel": out["kernel"].reshape(width, width), "bias": out["bias"]},  # (heads, head, width)
            },
            "mlp": take_pair(f"{path}/MlpBlock_0"),
        }

    try:
        params = {
            "patch_embed": take("PatchEmbed_0/Conv_0"),
            "timestep_embed": take_pair("TimestepEmbedder_0"),
            "label_embed": {"Embed_0": {"embedding": left.pop("LabelEmbedder_0/Embed_0/embedding")}},
            **{f"block_{i}": take_block(f"DiTBlock_{i}") for i in range(depth)},
            "final_layer": {
                "ada_ln": {"dense": take("FinalLayer_0/Dense_0")},
                "dense": take("FinalLayer_0/Dense_1"),
            },
        }
    except KeyError as error:
        raise ValueError(f"not the parameter tree of a jax-flow DiT: {error.args[0]} is missing") from None
    if "TimestepEmbedder_1/Dense_0/kernel" in left:  # of shortcut models and MeanFlow
        params["step_embed"] = take_pair("TimestepEmbedder_1")

    # The table of positions, if it has been trained.
    pos_embed = left.pop("pos_embed", None)
    if left:
        raise ValueError(f"not the parameter tree of a jax-flow DiT: {sorted(left)[0]} has no counterpart")
    if pos_embed is not None:
        _, tokens, width = pos_embed.shape
        side = int(tokens**0.5)  # its images are square
        if np.abs(pos_embed[0] - position_table(side, side, width)).max() > 1e-5:
            params["pos_embed"] = pos_embed
    return params
