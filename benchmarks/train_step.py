"""The training step side by side: ours, the jax-flow baseline, PyTorch where it is installed; interleaved in one run.

    python benchmarks/train_step.py --model B --batch 4

"roofline" is the time that the step's operations would take at the rate of one plain matmul in the row's compute dtype,
measured in the same run, and "fraction" is that over the step's own time: the MFU, with the measured rate as peak.
"MFU" is against the data sheet's peak, where the device is known. Operations are the model's, whatever a row
recomputes. "GiB" is the compiler's own analysis.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_flow_baseline
import numpy as np
from ml_collections import ConfigDict

from diffusion_transformer import DiT, DiTBlock, DiTConfig
from utils.base.devices import memory_needed
from utils.base.mesh import compile_step
from utils.codecs.kl import KLCodec, KLConfig
from utils.data.latents import LatentBatch
from utils.flags import program
from utils.networks.optimizers import make_optimizer
from utils.networks.state import EmaSchedule, create_train_state
from utils.objectives.diffusion import Diffusion
from utils.objectives.flow_matching import FlowMatching
from utils.objectives.mean_flow import MeanFlow
from utils.objectives.objective import Objective
from utils.objectives.shortcut import Shortcut
from utils.training.step import train_step

BASELINE = "jax-flow baseline"


class Variant(NamedTuple):
    """Settings of our step."""

    dtype: str = "bfloat16"
    remat: str = "none"
    grad_accum: int = 1
    objective: type[Objective] = FlowMatching
    optimizer: str = "adam"


VARIANTS = {
    "ours": Variant(),
    "ours: float32": Variant("float32"),
    "ours: --remat dots": Variant(remat="dots"),
    "ours: --remat blocks": Variant(remat="blocks"),
    "ours: --grad_accum 2": Variant(grad_accum=2),
    "ours: blocks scanned": Variant(),
    "ours: diffusion": Variant(objective=Diffusion),
    "ours: shortcut": Variant(objective=Shortcut),
    "ours: mean_flow": Variant(objective=MeanFlow),
    "ours: --optimizer muon": Variant(optimizer="muon"),
    "ours: float32 --optimizer muon": Variant("float32", optimizer="muon"),
}
TORCH = {"PyTorch": "bfloat16", "PyTorch: float32": "float32"}
OPTIMIZER = make_optimizer(1e-4, 0.9, 0.99)


def define_flags() -> None:
    common.define_model_flags()
    common.define_measurement_flags(batch=4)


class ScannedDiT(DiT):
    """DiT with its blocks as one that is scanned over: compiled code of one block's size."""

    def apply_blocks(self, tokens, condition, grid):
        config = self.config
        block = DiTBlock(config, grid, jnp.dtype(config.dtype), self.attention_form, name="blocks")
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": config.depth}
        scan = nn.scan(lambda block, x, c: (block(x, c), None), in_axes=nn.broadcast, **options)
        return scan(block, tokens, condition)[0]


class Step:
    """A compiled training step. Called, it takes one, from the state that it shares with others of the same model."""

    def __init__(self, function: Callable, states: dict[str, Any], kind: str, *arguments: Any, donate: bool):
        self.states = states
        self.kind = kind
        self.arguments = arguments
        started = time.perf_counter()
        step = jax.jit(function, donate_argnums=0 if donate else ())
        self.compiled = compile_step(step, states[kind], *arguments, platform=jax.default_backend())
        self.metadata = {"GiB": memory_needed(self.compiled) / 2**30, "compiled in s": time.perf_counter() - started}

    def __call__(self) -> Any:
        self.states[self.kind], metrics = self.compiled(self.states[self.kind], *self.arguments)
        return metrics


def our_step(config: ConfigDict, name: str, states: dict[str, Any], latents: np.ndarray, labels: np.ndarray) -> Step:
    variant = VARIANTS[name]
    # The network as the objective has it, without defaults of training.
    settings = {
        name: value
        for name, value in getattr(variant.objective, "MODEL_DEFAULTS", {}).items()
        if name in DiTConfig.__dataclass_fields__
    }
    model = common.make_model(config, variant.dtype, variant.remat, **settings)
    kind = f"{variant.objective.__name__} {variant.optimizer}"
    is_muon = variant.optimizer == "muon"
    optimizer = make_optimizer(1e-4, 0.9, 0.99, muon_of=model.config) if is_muon else OPTIMIZER
    if name == "ours: blocks scanned":
        model = ScannedDiT(model.config, model.remat, model.attention_form)
        kind = "scanned"

    @jax.jit
    def init(key):
        step = jnp.zeros(1) if model.config.step_conditioning else None
        params = model.init(key, latents[:1], jnp.zeros(1), labels[:1], step)["params"]
        return create_train_state(params, optimizer, key)

    if kind not in states:
        states[kind] = init(jax.random.key(0))
    # Latents come as cached moments do, of no variance.
    moments = np.stack([latents, np.full_like(latents, -30)], axis=1).astype(np.float16)
    codec = KLCodec.random(0, KLConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=8))
    step = partial(
        train_step,
        model=model,
        objective=variant.objective(),
        optimizer=optimizer,
        is_elementwise=not is_muon,
        grad_accum=variant.grad_accum,
        ema=EmaSchedule(0.9999),
    )
    return Step(step, states, kind, LatentBatch(condition=labels, moments=moments), codec, donate=True)


def baseline_step(config: ConfigDict, states: dict[str, Any], latents: np.ndarray, labels: np.ndarray) -> Step:
    model = common.make_model(config, "float32")
    states[BASELINE] = jax_flow_baseline.create_state(model, OPTIMIZER, latents.shape[1:])
    step = partial(jax_flow_baseline.train_step, model=model, optimizer=OPTIMIZER)
    return Step(step, states, BASELINE, latents, labels, donate=False)


def make_work(config: ConfigDict, name: str, states: dict[str, Any]) -> tuple[str, common.Work]:
    """(compute dtype, training step) of a row."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(config.batch, *common.LATENT_SHAPE)).astype(np.float32)
    labels = rng.integers(0, common.NUM_CLASSES, config.batch, dtype=np.int32)
    if name == BASELINE:
        return "float32", baseline_step(config, states, latents, labels)
    if name in VARIANTS:
        return VARIANTS[name].dtype, our_step(config, name, states, latents, labels)
    import torch_dit

    model = common.make_model(config, "float32")
    return TORCH[name], torch_dit.Run(model, common.LATENT_SHAPE, config.batch, TORCH[name]).train_step


def main(config: ConfigDict) -> None:
    states = {}
    names = [BASELINE, *VARIANTS, *(TORCH if common.has_torch() else ())]
    works = {name: make_work(config, name, states) for name in common.choose(names, config.rows)}
    flops = 3 * config.batch * common.make_model(config, "float32").count_flops(common.LATENT_SHAPE)
    title = f"Training step of DiT-{config.model}/{config.patch_size}, batch {config.batch}, latents of 32x32x4"
    common.compare(title, works, flops, config, reference=BASELINE)


if __name__ == "__main__":
    program.run_program(define_flags, main)
