"""The DINOv2 vision transformer (Oquab et al., arXiv:2304.07193), whose class token FD-DINOv2 compares.

Stein et al. (arXiv:2306.04675) found distances of these features closer to people's judgement than those of Inception.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, PyTree, UInt8

from utils.base.external import BadFileError, open_safetensors, read_start
from utils.base.mesh import place
from utils.base.messages import UserError
from utils.base.torch_files import read_torch_file
from utils.metrics.resizing import map_on_host, resize_on_device, resize_pil, resize_pil_float
from utils.storage.staging import local_copy

WEIGHTS_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"

# Sides of an image and of a patch, in pixels; of the table of positions, in patches of pretraining's 518 pixels.
IMAGE_SIZE = 224
PATCH = 14
TABLE_SIDE = 37
HEADS = {384: 6, 768: 12, 1024: 16}  # by width: ViT-S, B and L
LAYER_NORM_EPSILON = 1e-6
# ImageNet's mean and deviation by channel, of pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

# The way of a uint8 image to 224x224, whatever its aspect, still in grey levels 0 to 255. The first is the default.
PREPROCESSING: dict[str, Callable[[UInt8[Array, "b h w 3"], int], Any]] = {
    # EDM2 (arXiv:2312.02696): antialiased bicubic (a = -1/2) of floats, neither rounded nor clipped.
    "edm2": resize_on_device,
    # dgm-eval (arXiv:2306.04675): Pillow's bicubic of bytes, which rounds after each axis.
    "dgm_eval": lambda images, side: map_on_host(resize_pil, images, side),
    # The same with --clean_resize: Pillow's bicubic of floats, clipped and not rounded.
    "dgm_clean": lambda images, side: map_on_host(resize_pil_float, images, side),
}
DTYPES = ("float32", "bfloat16")

# Tensors of a block by their official names, with their shapes in units of the width d.
BLOCK = {
    "norm1.weight": (1,), "norm1.bias": (1,), "attn.qkv.weight": (3, 1), "attn.qkv.bias": (3,),
    "attn.proj.weight": (1, 1), "attn.proj.bias": (1,), "ls1.gamma": (1,),
    "norm2.weight": (1,), "norm2.bias": (1,), "mlp.fc1.weight": (4, 1), "mlp.fc1.bias": (4,),
    "mlp.fc2.weight": (1, 4), "mlp.fc2.bias": (1,), "ls2.gamma": (1,),
}  # fmt: skip
# Names of transformers, old and new, and what stands in official ones for them. `query`, `key` and `value` are joined.
TRANSFORMERS = (
    (r"^dinov2\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)


# --- The network ---


def _dense(x: Float[Array, "... i"], layer: Mapping[str, Array]) -> Float[Array, "... o"]:
    # Sums are float32's under both dtypes. A GPU would else multiply float32 as TF32, ten bits.
    kernel = layer["kernel"]
    product = jnp.matmul(
        x.astype(kernel.dtype), kernel, precision=_precision(kernel), preferred_element_type=jnp.float32
    )
    return product + layer["bias"]


def _precision(kernel: Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else None


def layer_norm(x: Float[Array, "... d"], layer: Mapping[str, Array]) -> Float[Array, "... d"]:
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * layer["scale"] + layer["bias"]


def embed_patches(params: PyTree, pixels: Float[Array, "b 224 224 3"]) -> Float[Array, "b 257 d"]:
    """Returns the class token and 16x16 patches, row by row, each with its position."""
    side = IMAGE_SIZE // PATCH
    patches = pixels.reshape(-1, side, PATCH, side, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    tokens = _dense(patches.reshape(-1, side**2, PATCH**2 * 3), params["patch"])
    classes = jnp.broadcast_to(params["class_token"], (len(tokens), 1, tokens.shape[-1]))
    return jnp.concatenate([classes, tokens], axis=1) + params["positions"]


def apply_block(x: Float[Array, "b n d"], block: PyTree, num_heads: int) -> Float[Array, "b n d"]:
    """Returns x after attention and MLP, each scaled by channel (LayerScale) and added."""
    # Attention over all tokens. Its weights are float32's, as is x; only the products have the dtype of the kernels.
    dtype, precision = block["qkv"]["kernel"].dtype, _precision(block["qkv"]["kernel"])
    qkv = _dense(layer_norm(x, block["norm1"]), block["qkv"])
    qkv = qkv.reshape(*x.shape[:2], 3, num_heads, -1).astype(dtype)
    q, k, v = (qkv[:, :, i] for i in range(3))
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(product("bqhc,bkhc->bhqk", q, k) * q.shape[-1] ** -0.5, axis=-1)
    mixed = product("bhqk,bkhc->bqhc", weights.astype(dtype), v).reshape(x.shape)
    x = x + block["scale1"] * _dense(mixed, block["proj"])

    # The MLP, whose GELU is the exact one.
    hidden = jax.nn.gelu(_dense(layer_norm(x, block["norm2"]), block["fc1"]), approximate=False)
    return x + block["scale2"] * _dense(hidden, block["fc2"])


def apply_dinov2(params: PyTree, pixels: Float[Array, "b 224 224 3"], num_heads: int) -> Float[Array, "b 257 d"]:
    """Returns the normalised tokens of the last layer, float32; the first is the class token, the feature.

    `pixels` are in grey levels, 0 to 255 but for what a resize overshoots. Matmuls have the dtype of the kernels.
    """
    x = embed_patches(params, (pixels / 255 - jnp.array(MEAN)) / jnp.array(DEVIATION))
    # A loop over the blocks, so that one is compiled instead of 24.
    x, _ = jax.lax.scan(lambda x, block: (apply_block(x, block, num_heads), None), x, params["blocks"])
    return layer_norm(x, params["norm"])


@functools.partial(jax.jit, static_argnames="num_heads")
def _extract(params: PyTree, pixels: Array, num_heads: int) -> Float[Array, "b d"]:
    return apply_dinov2(params, pixels.astype(jnp.float32), num_heads)[:, 0]


# --- Its weights ---


def read_weights(path: Path) -> dict[str, Float[np.ndarray, "..."]]:
    """Returns the tensors of a file of PyTorch or safetensors under official names, as float32.

    Reads the official names, timm's (the same without mask_token) and transformers'. Raises BadFileError for a file of
    another kind, and for tensors other than those of DINOv2 without registers and with a plain MLP.
    """
    # The content, whose first bytes tell its kind: safetensors has JSON after a length.
    is_safetensors = read_start(path, 9)[8:9] == b"{"
    content = open_safetensors(path).tensors if is_safetensors else read_torch_file(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, np.ndarray) for value in content.values()):
        raise BadFileError("it is no plain dictionary of tensors by name")

    # One set of names. The mask token is of pretraining alone.
    found = {_official_name(str(name)): tensor for name, tensor in content.items()}
    found.pop("mask_token", None)
    found = _join_qkv(found)
    _check_tensors(found)
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in sorted(found.items())}


def _official_name(name: str) -> str:
    for pattern, replacement in TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


def _join_qkv(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Joins queries, keys and values, which transformers keeps apart, into attn.qkv."""
    joined = dict(tensors)
    for name in tensors:
        parts = [name.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        if ".attn.q." in name and all(part in joined for part in parts):
            joined[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate([joined.pop(part) for part in parts])
    return joined


def _check_tensors(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises BadFileError unless these are all tensors of a network of a known width, finite, and no others."""
    # What other networks of the family have, by name: the message can say which one it is.
    for pattern, kind in {"register_tokens|reg_token": "registers", r"\.mlp\.(w\d|weights_|gate_)": "SwiGLU"}.items():
        if name := next((name for name in tensors if re.search(pattern, name)), None):
            raise BadFileError(f"it is a network with {kind} ({name}); ViT-S, B and L without them are read")

    # Sizes follow from two tensors: the width, and the number of blocks by their names.
    if "pos_embed" not in tensors or not tensors["pos_embed"].ndim:
        raise BadFileError("it has no tensor pos_embed")
    width = tensors["pos_embed"].shape[-1]
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d{1,3}\.", name)), default=-1)
    if width not in HEADS or not depth:
        widths = ", ".join(map(str, HEADS))
        raise BadFileError(f"it has {depth} blocks and the width {width}; DINOv2's are {widths} wide")
    expected = {
        "cls_token": (1, 1, width), "pos_embed": (1, 1 + TABLE_SIDE**2, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    for i in range(depth):
        for name, shape in BLOCK.items():
            expected[f"blocks.{i}.{name}"] = tuple(width * size for size in shape)

    # Exactly these, each in its shape, and numbers throughout.
    for name, shape in expected.items():
        if name not in tensors:
            raise BadFileError(f"it has no tensor {name}")
        if tensors[name].shape != shape:
            raise BadFileError(f"its tensor {name} has the shape {tensors[name].shape}, not {shape}")
        if not np.isfinite(tensors[name].astype(np.float32)).all():
            raise BadFileError(f"its tensor {name} holds NaN or infinity")
    if surplus := sorted(tensors.keys() - expected):
        raise BadFileError(f"its tensor {surplus[0][:100]} is none of DINOv2's")


def position_table(table: Float[np.ndarray, "n d"], side: int) -> Float[np.ndarray, "m d"]:
    """Returns the positions of 1 + side^2 tokens from those of 1 + 37^2, bicubically and in float64; the class token's
    is kept.

    As the published code has it: PyTorch's bicubic (a = -3/4, no antialiasing, indices clamped to the border), with
    scale factors of (side + 0.1) / 37, so that output i is read at (i + 1/2) 37 / (side + 0.1) - 1/2.
    """
    # The four neighbours of each place, and their weights: Keys' kernel with a = -3/4.
    place = (np.arange(side) + 0.5) * TABLE_SIDE / (side + 0.1) - 0.5
    neighbours = np.floor(place).astype(int)[:, None] + np.arange(-1, 3)
    distance = np.abs(place[:, None] - neighbours)
    a = -0.75
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = np.where(distance <= 1, near, far)

    # One matrix for both axes. At the border several neighbours are one pixel, hence the sum.
    matrix = np.zeros((side, TABLE_SIDE))
    np.add.at(matrix, (np.arange(side)[:, None], neighbours.clip(0, TABLE_SIDE - 1)), weights)
    grid = table[1:].astype(np.float64).reshape(TABLE_SIDE, TABLE_SIDE, -1)
    resized = np.einsum("pi,qj,ijd->pqd", matrix, matrix, grid, optimize=True).reshape(side**2, -1)
    return np.concatenate([table[:1], resized]).astype(np.float32)


def to_params(tensors: Mapping[str, Float[np.ndarray, "..."]], dtype: str) -> PyTree:
    """Returns the parameters of `apply_dinov2`, kernels (in, out) in `dtype` and the rest in float32; those of the
    blocks are stacked."""
    kernel_type = jnp.dtype(dtype)
    depth = sum(name.endswith(".ls1.gamma") for name in tensors)
    stacked = {name: np.stack([tensors[f"blocks.{i}.{name}"] for i in range(depth)]) for name in BLOCK}

    def dense(name: str) -> dict[str, np.ndarray]:
        kernel = np.swapaxes(stacked[f"{name}.weight"], 1, 2)
        return {"kernel": kernel.astype(kernel_type), "bias": stacked[f"{name}.bias"]}

    def norm(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
        return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}

    # The patches' convolution is a matmul over (row, column, channel).
    patch = tensors["patch_embed.proj.weight"]
    return {
        "patch": {
            "kernel": patch.transpose(2, 3, 1, 0).reshape(-1, len(patch)).astype(kernel_type),
            "bias": tensors["patch_embed.proj.bias"],
        },
        "class_token": tensors["cls_token"][0],
        "positions": position_table(tensors["pos_embed"][0], IMAGE_SIZE // PATCH),
        "blocks": {
            "norm1": norm(stacked, "norm1"),
            "qkv": dense("attn.qkv"),
            "proj": dense("attn.proj"),
            "scale1": stacked["ls1.gamma"],
            "norm2": norm(stacked, "norm2"),
            "fc1": dense("mlp.fc1"),
            "fc2": dense("mlp.fc2"),
            "scale2": stacked["ls2.gamma"],
        },
        "norm": norm(tensors, "norm"),
    }


# --- The extractor ---


class DINOv2(NamedTuple):
    """Weights of a file, and how images meet them."""

    tensors: Mapping[str, np.ndarray]  # by official names, float32
    preprocessing: str
    dtype: str

    @property
    def width(self) -> int:
        return self.tensors["cls_token"].shape[-1]

    @property
    def image_bytes(self) -> int:
        """The bytes that a device needs for each image at work, as float32."""
        # Beside the tokens, of width d: normalised, queries, keys and values, mixed, and the MLP's of 4 d twice. Then
        # attention between all of them twice, and pixels before and after their scaling.
        tokens = 1 + (IMAGE_SIZE // PATCH) ** 2
        values = tokens * self.width * 14 + 2 * HEADS[self.width] * tokens**2 + 2 * IMAGE_SIZE**2 * 3
        return 4 * values

    @property
    def sha256(self) -> str:
        """The hash of the numbers as float32: of one network it is the same in any of the files that hold it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.shape}\n".encode())
            digest.update(tensor.data)
        return digest.hexdigest()

    def load(
        self, sharding: Sharding | None = None
    ) -> Callable[[UInt8[Array, "b h w 3"]], dict[str, Float[Array, "b d"]]]:
        """Returns the function from uint8 images (RGB, any size) to {"cls": (b, d)}, float32, with its weights placed
        by `sharding`; it raises ValueError for images of another dtype or shape."""
        params = to_params(self.tensors, self.dtype)
        params = jax.device_put(params) if sharding is None else jax.tree.map(lambda x: place(x, sharding), params)
        resize = PREPROCESSING[self.preprocessing]

        def extract(images):
            if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
                raise ValueError(
                    f"images are {images.dtype} {images.shape}, not uint8 (n, h, w, 3); repeat grey to RGB"
                )
            return {"cls": _extract(params, resize(images, IMAGE_SIZE), HEADS[self.width])}

        return extract


def read_dinov2(weights: str | Path | None, preprocessing: str | None = None, dtype: str | None = None) -> DINOv2:
    """Reads the weights of --extractor_weights. `preprocessing` and `dtype` are one of PREPROCESSING and DTYPES, the
    first if None. Raises UserError for weights that are missing or of another network, and for unknown names."""
    preprocessing = preprocessing or next(iter(PREPROCESSING))
    dtype = dtype or DTYPES[0]
    for flag, value, known in (("preprocessing", preprocessing, PREPROCESSING), ("extractor_dtype", dtype, DTYPES)):
        if value not in known:
            raise UserError(f"--{flag}={value} is unknown; use {' or '.join(known)}")
    source = f"ViT-L/14 as FD-DINOv2 takes it (1.2 GB, Apache 2 licence) is {WEIGHTS_URL}"
    if weights is None:
        raise UserError(f"--extractor_weights is not given: dinov2 needs a file of its weights; {source}")
    try:
        return DINOv2(read_weights(local_copy(weights, "extractor_weights").expanduser()), preprocessing, dtype)
    except BadFileError as error:
        raise UserError(f"--extractor_weights={weights} holds no weights of DINOv2 ({error}); {source}") from None


def load_dinov2(
    weights: str | Path | None = None, convention: str | None = None, sharding: Sharding | None = None
) -> Callable[[UInt8[Array, "b h w 3"]], dict[str, Float[Array, "b d"]]]:
    """Returns `DINOv2.load` of the weights in a file, under the default options. `convention` is Inception's."""
    return read_dinov2(weights).load(sharding)
