"""The configuration of the Diffusion Transformer: sizes, presets, and checks before anything compiles."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from utils.base.devices import total_memory
from utils.base.messages import UserError
from utils.base.settings import setting
from utils.conditions.condition import Embedded
from utils.networks import dit_arrays
from utils.networks.network import NetworkConfig

# {size: (width, depth, heads)}: table 1 of the DiT paper (arXiv:2212.09748).
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def _preset(hidden_size: int, patch_size: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
    }


@dataclasses.dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """The architecture: --model.* flags, presets and the resume check derive from the fields.

    `patch_size` divides the image sides, `num_heads` divides `hidden_size`, and `hidden_size` is a multiple of 4 (sines
    and cosines of two axes).
    """

    # The recipe's own (jax-flow), then the paper's sizes at three patch sizes, DiT-S/2 to DiT-XL/8.
    PRESETS: ClassVar = {
        "debug": _preset(64, 8, 2, 2, 1.0),
        "big": _preset(768, 2, 12, 12),
        "semilarge": _preset(1024, 2, 22, 16),
        "large": _preset(1024, 2, 24, 16),
        "xlarge": _preset(1152, 2, 28, 16),
    } | {
        f"DiT-{name}/{patch}": _preset(width, patch, depth, heads)
        for name, (width, depth, heads) in _SIZES.items()
        for patch in (2, 4, 8)
    }

    TAKES_AUGMENTATION: ClassVar = True
    TAKES_INNER_HEAD: ClassVar = True

    # Sizes.
    patch_size: int = setting(8, "Side of a patch.", 1, 2**12)
    hidden_size: int = setting(64, "Width of the transformer.", 4, 2**16)
    bottleneck: int = setting(
        0, "Width of a layer between patches and tokens, without bias (JiT: 128); 0: none.", 0, 2**16
    )
    depth: int = setting(2, "Transformer blocks.", 1, 1000)
    num_heads: int = setting(2, "Attention heads.", 1, 2**16)
    mlp_ratio: float = setting(1.0, "MLP width divided by --model.hidden_size.", 0, 100)
    # Conditioning on time, positions, and a second output.
    t_conditioning: int = setting(1, "0: the model is not conditioned on t.", 0, 1)
    timestep_scale: float = setting(
        10_000.0, "Factor of the time before its sinusoids: 10000 as jax-flow has it, 1 as SiT and DiT.", 1e-3, 1e6
    )
    learned_positions: int = setting(0, "1: the position table is a parameter, as jax-flow has it.", 0, 1)
    learn_sigma: int = setting(0, "1: as many outputs again, the variance of a DiT's diffusion.", 0, 1)
    # How conditions other than vectors enter.
    token_mode: str = setting(
        "context",
        "context: tokens of the condition, such as a text's, join the sequence; cross: it attends to them.",
        choices=("context", "cross"),
    )
    class_tokens: int = setting(0, "So many tokens of the sequence are the condition's vector, too (JiT: 32).", 0, 4096)
    # Variants of the block, as published checkpoints have them.
    norm: str = setting(
        "layer", "layer: LayerNorm; rms: RMSNorm with a scale (LightningDiT).", choices=("layer", "rms")
    )
    mlp: str = setting("gelu", "gelu, or swiglu of as many parameters (LightningDiT).", choices=("gelu", "swiglu"))
    rope: int = setting(0, "1: rotary positions in attention, too (LightningDiT).", 0, 1)
    qk_norm: int = setting(0, "1: queries and keys are RMS-normalised.", 0, 1)

    @property
    def mlp_width(self) -> int:
        """Returns the width of an MLP's hidden layer; two thirds for SwiGLU, whose third matrix takes the rest."""
        width = int(self.mlp_ratio * self.hidden_size)
        return int(2 / 3 * width) if self.mlp == "swiglu" else width

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def describe(self) -> str:
        return (
            f"{self.network} {self.hidden_size} wide, {self.depth} deep, {self.num_heads} heads, "
            f"patch {self.patch_size}"
        )

    def hints(self, latent_shape: tuple[int, int, int]) -> list[str]:
        height, width, channels = latent_shape
        hints = []
        # One token attends to nothing but itself: trained, but hardly meant.
        if self.patch_size == height == width:
            hints.append(
                f"--model.patch_size={self.patch_size} makes one token of each {height}x{width} input, which leaves "
                "attention nothing to attend to; use a smaller one"
            )
        # Two matrices whose product is any matrix.
        narrowest = min(self.patch_size**2 * channels, self.hidden_size)
        if self.bottleneck >= narrowest:
            hints.append(
                f"--model.bottleneck={self.bottleneck} is no narrower than a patch or the model, {narrowest}; use "
                "less, or 0"
            )
        return hints

    def check(self, latent_shape: tuple[int, int, int]) -> None:
        """Raises UserError where the sizes do not fit each other, latents (h, w, c) or the machine's memory."""
        self.check_sizes(latent_shape)
        num_params = self.count_parameters(latent_shape)
        limit = total_memory()
        # 16 bytes each: parameters, EMA and Adam's two moments, all float32. A refusal names flags; a kill would not.
        if 16 * num_params > limit:
            raise UserError(
                f"a model of --model.hidden_size={self.hidden_size}, --model.depth={self.depth}, --model.mlp_ratio="
                f"{self.mlp_ratio:g} and --model.num_classes={self.num_classes} has {num_params:,} parameters; with "
                f"optimizer they need {16 * num_params / 2**30:,.0f} GiB, of which there are {limit / 2**30:,.0f}; use "
                "less"
            )

    def check_condition(self, brought: Embedded) -> None:
        """Raises UserError for settings about what a condition does not bring."""
        if self.token_mode == "cross" and brought.tokens is None:
            raise UserError("--model.token_mode=cross: the data's condition has no tokens; use context")
        if self.class_tokens and brought.vector is None:
            raise UserError(
                f"--model.class_tokens={self.class_tokens}: the data's condition has neither classes nor vectors; use 0"
            )

    def fit_array(
        self, path: tuple[str, ...], array: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, str] | None:
        return dit_arrays.fit_array(path, array, shape, self.patch_size)

    def count_matrices(self, path: tuple[str, ...], shape: tuple[int, ...]) -> int:
        # The layers by which images and conditions enter, and the last layer, are Adam's.
        is_inside = path[0].startswith("block_") or path[0] in ("timestep_embed", "step_embed") or "ada_ln" in path
        if path[-1] != "kernel" or not is_inside:
            return 0
        if "ada_ln" in path:  # shifts, scales and gates
            return shape[1] // shape[0]
        if path[-3:-1] == ("mlp", "dense_0"):  # of SwiGLU, gate and values
            return 2 if self.mlp == "swiglu" else 1
        return {"qkv": 3, "key_value": 2}.get(path[-2], 1)

    def check_sizes(self, latent_shape: tuple[int, int, int]) -> None:
        """Raises UserError where the sizes do not fit each other or latents (h, w, c)."""
        # Patches cover the latents.
        height, width, _ = latent_shape
        patch = self.patch_size
        if height % patch or width % patch:
            fits = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
            raise UserError(
                f"--model.patch_size={patch} does not divide the {height}x{width} input of the model; "
                f"use one of {', '.join(map(str, fits))}"
            )
        # Heads share the width.
        if self.hidden_size % self.num_heads:
            divisors = [d for d in range(1, self.hidden_size + 1) if self.hidden_size % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - self.num_heads))
            raise UserError(
                f"--model.num_heads={self.num_heads} does not divide --model.hidden_size={self.hidden_size}; "
                f"use {nearest} heads, for example"
            )
        # Positions are sines and cosines of two axes.
        if self.hidden_size % 4:
            raise UserError(
                f"--model.hidden_size={self.hidden_size} must be a multiple of 4 (sines and cosines of two axes); "
                f"use {-(-self.hidden_size // 4) * 4}"
            )

        # After the last block comes the output itself.
        if self.inner_head and self.inner_head >= self.depth:
            raise UserError(
                f"--model.inner_head={self.inner_head} has to come before the last of --model.depth={self.depth} "
                f"blocks; use less than {self.depth}, or 0 for none"
            )

        # Rotary positions turn each head by itself, half of its channels by an axis.
        if self.rope and self.head_dim % 4:
            raise UserError(
                f"--model.rope=1: the width of a head, {self.head_dim}, must be a multiple of 4 (sines and cosines of "
                f"two axes); use another --model.num_heads than {self.num_heads}, or --model.rope 0"
            )

        # A ratio near zero rounds to no hidden channel at all.
        if self.mlp_width < 1:
            raise UserError(f"--model.mlp_ratio={self.mlp_ratio} leaves the MLP no width; use 4, for example")

    def count_embedding(self, channels: int) -> int:
        """Returns the number of parameters, without biases, that turn a patch of `channels` channels into a token."""
        inputs = self.patch_size**2 * channels
        n = self.bottleneck
        return n * (inputs + self.hidden_size) if n else inputs * self.hidden_size

    def count_parameters(self, latent_shape: tuple[int, int, int]) -> int:
        """Returns the number of parameters for latents (h, w, c), without biases.

        The table of positions counts: where it is not learned, it is a constant that takes as much memory.
        """
        height, width, channels = latent_shape
        d, p = self.hidden_size, self.patch_size
        # A block: 4 d^2 of attention, as much across, 6 d^2 of modulation, and the MLP's two matrices.
        block = (10 + 4 * (self.token_mode == "cross") + 2 * self.mlp_ratio) * d * d
        inner = (2 * d + p * p * channels) * d if self.inner_head else 0
        # Final modulation and second layer of the time embedding, 3 d^2; its first layer; final patches; labels.
        ends = (3 * d + 256 + p * p * channels + self.num_classes + self.class_tokens) * d
        ends += self.count_embedding(channels)
        return int(self.depth * block + ends + inner + (height // p) * (width // p) * d)
