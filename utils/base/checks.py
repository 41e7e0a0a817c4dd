"""Refusals of impossible requests, before anything compiles: each names the value, the flag and the fix."""

from ml_collections import ConfigDict

from utils.base.devices import total_memory
from utils.base.errors import UserError


def check_model(model: ConfigDict, latent_shape: tuple[int, int, int]) -> None:
    """Raises UserError where no model of this configuration can be trained on latents (h, w, c)."""
    if model.get("network", "dit") == "dit":
        check_sizes(model, latent_shape)
        _check_memory(model, latent_shape)
    scale = model.get("cfg_scale", 1.0)  # an imported model has none
    if scale < 0 and scale != -1:
        raise UserError(f"--model.cfg_scale={scale}: use a scale of 0 or more, or -1 for no guidance")
    for beta in ("beta1", "beta2"):
        if model.get(beta, 0.0) >= 1:
            raise UserError(f"--model.{beta}={model[beta]} must be below 1; use 0.99, for example")


def check_sizes(model: ConfigDict, latent_shape: tuple[int, int, int]) -> None:
    """Raises UserError where the sizes of a DiT for latents (h, w, c) do not fit each other."""
    height, width, _ = latent_shape
    patch = model.patch_size
    if height % patch or width % patch:
        fits = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
        raise UserError(
            f"--model.patch_size={patch} does not divide the {height}x{width} input of the model; "
            f"use one of {', '.join(map(str, fits))}"
        )
    if model.hidden_size % model.num_heads:
        raise UserError(
            f"--model.num_heads={model.num_heads} does not divide --model.hidden_size={model.hidden_size}; "
            f"use {_nearest_divisor(model.hidden_size, model.num_heads)} heads, for example"
        )
    if model.hidden_size % 4:
        raise UserError(
            f"--model.hidden_size={model.hidden_size} must be a multiple of 4 (sines and cosines of two axes); "
            f"use {-(-model.hidden_size // 4) * 4}"
        )
    head_dim = model.hidden_size // model.num_heads
    if model.get("rope") and head_dim % 4:
        raise UserError(
            f"--model.rope=1: the width of a head, {head_dim}, must be a multiple of 4 (sines and cosines of two "
            f"axes); use another --model.num_heads than {model.num_heads}, or --model.rope 0"
        )
    width = int(model.mlp_ratio * model.hidden_size)
    if (int(2 / 3 * width) if model.get("mlp") == "swiglu" else width) < 1:
        raise UserError(f"--model.mlp_ratio={model.mlp_ratio} leaves the MLP no width; use 4, for example")


def _check_memory(model: ConfigDict, latent_shape: tuple[int, int, int]) -> None:
    num_params = count_parameters(model, latent_shape)
    limit = total_memory()
    if 16 * num_params > limit:  # float32 parameters, EMA and two moments
        raise UserError(
            f"a model of --model.hidden_size={model.hidden_size}, --model.depth={model.depth}, --model.mlp_ratio="
            f"{model.mlp_ratio:g} and --model.num_classes={model.num_classes} has {num_params:,} parameters; with "
            f"optimizer they need {16 * num_params / 2**30:,.0f} GiB, of which there are {limit / 2**30:,.0f}; use less"
        )


def count_parameters(model: ConfigDict, latent_shape: tuple[int, int, int]) -> int:
    """Parameters of the DiT, but for biases; and its table of positions, a constant as large as a parameter."""
    height, width, channels = latent_shape
    d = model.hidden_size
    p = model.patch_size
    block = (10 + 2 * model.mlp_ratio) * d * d
    ends = (3 * d + 256 + 2 * p * p * channels + model.num_classes) * d
    return int(model.depth * block + ends + (height // p) * (width // p) * d)


def _nearest_divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))
