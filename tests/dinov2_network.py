"""DINOv2 with random weights, as each library names them, and its features by NumPy in float64."""

import numpy as np
import scipy

WIDTH, NUM_HEADS = 24, 3


def make_tensors(depth: int = 2, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random weights under official names."""
    d = WIDTH
    block = {
        "norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d), "attn.proj.bias": (d,), "ls1.gamma": (d,), "norm2.weight": (d,),
        "norm2.bias": (d,), "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,), "mlp.fc2.weight": (d, 4 * d),
        "mlp.fc2.bias": (d,), "ls2.gamma": (d,),
    }  # fmt: skip
    shapes = {
        "cls_token": (1, 1, d), "pos_embed": (1, 1 + 37 * 37, d), "mask_token": (1, d), "norm.weight": (d,),
        "norm.bias": (d,), "patch_embed.proj.weight": (d, 3, 14, 14), "patch_embed.proj.bias": (d,),
        **{f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()},
    }  # fmt: skip
    rng = np.random.default_rng(0)
    return {name: (rng.normal(size=shape) * 0.3).astype(np.float16).astype(dtype) for name, shape in shapes.items()}


def to_transformers(tensors, *, is_old: bool) -> dict[str, np.ndarray]:
    """Names of Dinov2Model: as the hub's files have them, and as transformers 5 has them in memory."""
    renamed = {}
    for name, tensor in tensors.items():
        new = name.replace("blocks.", "encoder.layer.").replace("patch_embed.proj", "patch_embeddings.projection")
        new = new.replace("pos_embed", "position_embeddings").replace("ls1.gamma", "layer_scale1.lambda1")
        new = new.replace("ls2.gamma", "layer_scale2.lambda1")
        new = f"layernorm.{new[5:]}" if new.startswith("norm.") else new
        new = new.replace("attn.proj", "attention.output.dense" if is_old else "attention.o_proj")
        if not new.startswith(("encoder", "layernorm")):
            new = f"embeddings.{new}"
        if "attn.qkv" not in new:
            renamed[new] = tensor
            continue
        letters = ("attention.query", "attention.key", "attention.value") if is_old else ("q_proj", "k_proj", "v_proj")
        for letter, part in zip(letters, np.split(tensor, 3), strict=True):
            renamed[new.replace("attn.qkv", f"attention.{letter}")] = part
    return renamed


def numpy_features(tensors, pixels: np.ndarray, num_heads: int = NUM_HEADS) -> np.ndarray:
    """Class tokens (b, d) of pixels (b, 224, 224, 3) in grey levels."""
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = (pixels.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    tokens = [np.broadcast_to(weights["cls_token"][0], (len(x), 1, WIDTH))]
    for row in range(16):
        for column in range(16):
            patch = x[:, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            embedded = np.einsum("brsc,dcrs->bd", patch, weights["patch_embed.proj.weight"])
            tokens.append((embedded + weights["patch_embed.proj.bias"])[:, None])
    x = np.concatenate(tokens, axis=1) + numpy_table(weights["pos_embed"][0])
    for i in range(sum("ls1" in name for name in weights)):
        block = {name.removeprefix(f"blocks.{i}."): tensor for name, tensor in weights.items()}
        qkv = norm(x, block, "norm1") @ block["attn.qkv.weight"].T + block["attn.qkv.bias"]
        q, k, v = (part.reshape(*x.shape[:2], num_heads, -1) for part in np.split(qkv, 3, axis=-1))
        logits = np.einsum("bqhc,bkhc->bhqk", q, k) / np.sqrt(q.shape[-1])
        mixed = np.einsum("bhqk,bkhc->bqhc", scipy.special.softmax(logits, axis=-1), v).reshape(x.shape)
        x = x + block["ls1.gamma"] * (mixed @ block["attn.proj.weight"].T + block["attn.proj.bias"])
        hidden = norm(x, block, "norm2") @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"]
        hidden = hidden * scipy.stats.norm.cdf(hidden)
        x = x + block["ls2.gamma"] * (hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"])
    return norm(x, weights, "norm")[:, 0]


def norm(x, weights, name):
    variance = x.var(axis=-1, keepdims=True)
    normalised = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    return normalised * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def numpy_table(table: np.ndarray) -> np.ndarray:
    """Positions of 16x16 patches, pixel by pixel, by the kernel of torch.nn.functional.interpolate."""
    grid = table[1:].reshape(37, 37, -1)

    def taps(i):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        near = int(np.floor(place))
        t = place - near
        a = -0.75
        inner = [(a + 2) * s**3 - (a + 3) * s**2 + 1 for s in (t, 1 - t)]
        outer = [a * s**3 - 5 * a * s**2 + 8 * a * s - 4 * a for s in (1 + t, 2 - t)]
        weights = (outer[0], *inner, outer[1])
        return [(min(max(near + i, 0), 36), weight) for i, weight in enumerate(weights, start=-1)]

    rows = [sum(wr * wc * grid[r, c] for r, wr in taps(i) for c, wc in taps(j)) for i in range(16) for j in range(16)]
    return np.stack([table[0], *rows])


def numpy_bicubic(images: np.ndarray, side: int = 224) -> np.ndarray:
    """Keys' bicubic (a = -1/2), its support widened where images shrink, in float64."""
    for axis in (1, 2):
        size = images.shape[axis]
        scale = max(1, size / side)
        distance = np.abs((np.arange(side)[:, None] + 0.5) * size / side - 0.5 - np.arange(size)) / scale
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
        weights /= weights.sum(axis=1, keepdims=True)
        images = np.moveaxis(np.tensordot(weights, images, (1, axis)), 0, axis)
    return images
