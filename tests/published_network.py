"""The network of DiT and SiT in NumPy, float64, from the papers: a second implementation that reads their files."""

import math

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normalise(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)


def forward(state, x, t, labels, num_heads):
    """Outputs (n, o, h, w) of images (n, c, h, w), the times as they enter the sinusoids, and labels."""
    state = {name: np.asarray(value, np.float64) for name, value in state.items()}

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    patches = state["x_embedder.proj.weight"]
    d, c, p, _ = patches.shape
    n, _, h, w = x.shape
    cut = x.reshape(n, c, h // p, p, w // p, p).transpose(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)
    tokens = cut @ patches.reshape(d, -1).T + state["x_embedder.proj.bias"] + state["pos_embed"]

    angles = np.asarray(t, np.float64)[:, None] * np.exp(-math.log(10_000) * np.arange(128) / 128)
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    condition = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", features)))
    condition = condition + state["y_embedder.embedding_table.weight"][labels]

    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for i in range(depth):
        name = f"blocks.{i}"
        modulations = np.split(linear(f"{name}.adaLN_modulation.1", silu(condition)), 6, axis=1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (m[:, None] for m in modulations)
        y = normalise(tokens) * (1 + scale_1) + shift_1
        qkv = linear(f"{name}.attn.qkv", y).reshape(n, -1, 3, num_heads, d // num_heads)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)
        logits = query @ key.swapaxes(-1, -2) / math.sqrt(d // num_heads)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ value
        tokens = tokens + gate_1 * linear(f"{name}.attn.proj", attended.transpose(0, 2, 1, 3).reshape(n, -1, d))
        y = normalise(tokens) * (1 + scale_2) + shift_2
        tokens = tokens + gate_2 * linear(f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", y)))
    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(condition)), 2, axis=1)
    out = linear("final_layer.linear", normalise(tokens) * (1 + scale[:, None]) + shift[:, None])
    o = out.shape[-1] // p**2
    return out.reshape(n, h // p, w // p, p, p, o).transpose(0, 5, 1, 3, 2, 4).reshape(n, o, h, w)
