"""Names of diffusers' DiT, rewritten to the published ones."""

import re

import numpy as np

from diffusion_transformer import position_table
from utils.base.external import BadFileError
from utils.convert.published import MAX_TOKENS, State

# {pattern of a whole name, without .weight and .bias: the published name}
_DIFFUSERS = {
    r"pos_embed\.proj": "x_embedder.proj",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"blocks.\1.adaLN_modulation.1",
    r"transformer_blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.attn.proj",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"blocks.\1.mlp.fc1",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"blocks.\1.mlp.fc2",
    r"proj_out_1": "final_layer.adaLN_modulation.1",
    r"proj_out_2": "final_layer.linear",
}
# diffusers' files repeat these in every block.
_DIFFUSERS_EMBEDDINGS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}


def rename_diffusers(state: State, sample_size: int, hidden_size: int, patch_size: int) -> dict[str, np.ndarray]:
    """Returns the tensors of diffusers' DiTTransformer2DModel under the published names.

    The table of positions, which its files lack, is added. Raises BadFileError where a block's copy of the embeddings
    differs from the first one's, and where the sizes in a config.json are not those of the tensors.
    """
    # The sizes of the config.json.
    kernel = state.get("pos_embed.proj.weight", np.zeros(0))
    if kernel.ndim != 4 or (len(kernel), *kernel.shape[2:]) != (hidden_size, patch_size, patch_size):
        raise BadFileError(
            f"its config.json says width {hidden_size} and patch_size {patch_size}, but its pos_embed.proj.weight has "
            f"the shape {kernel.shape}"
        )
    if sample_size % patch_size or (sample_size // patch_size) ** 2 > MAX_TOKENS:
        raise BadFileError(f"its config.json has sample_size {sample_size}, which no model of patches {patch_size} has")

    # Names. Queries, keys and values are collected, and the copies of the embeddings compared.
    renamed: dict[str, np.ndarray] = {}
    projections: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, value in state.items():
        stem, _, leaf = name.rpartition(".")
        if match := re.fullmatch(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)", stem):
            published = f"{_DIFFUSERS_EMBEDDINGS.get(match[2], match[2])}.{leaf}"
            if published in renamed and not np.array_equal(renamed[published], value):
                raise BadFileError(f"its tensor {name} is another than that of the first block")
            renamed[published] = value
        elif match := re.fullmatch(r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])", stem):
            projections.setdefault((match[1], leaf), {})[match[2]] = value
        else:
            for pattern, replacement in _DIFFUSERS.items():
                stem = re.sub(f"^{pattern}$", replacement, stem)
            renamed[f"{stem}.{leaf}"] = value

    # Queries, keys and values are one tensor.
    for (block, leaf), parts in projections.items():
        if parts.keys() != set("qkv"):
            raise BadFileError(f"it has no whole to_q, to_k and to_v of block {block}")
        renamed[f"blocks.{block}.attn.qkv.{leaf}"] = np.concatenate([parts[part] for part in "qkv"])

    # Its position table is a constant.
    side = sample_size // patch_size
    renamed["pos_embed"] = position_table(side, side, hidden_size)[None]
    return renamed
