"""Sampling side by side: ours, the jax-flow baseline, PyTorch where it is installed; interleaved in one run.

    python benchmarks/sample.py --model B --batch 4 --steps 8

Columns as in train_step.py. Nothing is decoded: all rows end with latents (ours as pixels of a PixelCodec).
"""

from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import jax_flow_baseline
from absl import flags
from ml_collections import ConfigDict

from utils.base.mesh import make_mesh
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition
from utils.flags import program
from utils.networks.models import ImageModel, init_params
from utils.objectives.flow_matching import FlowMatching
from utils.sampling.generator import ImageGenerator
from utils.sampling.solvers import SamplerConfig

BASELINE = "jax-flow baseline"
OURS = {"ours": "bfloat16", "ours: float32": "float32"}
TORCH = {"PyTorch": "bfloat16", "PyTorch: float32": "float32"}


def define_flags() -> None:
    common.define_model_flags()
    common.define_measurement_flags(batch=4)
    flags.DEFINE_integer("steps", 8, "Euler steps, guided.", lower_bound=1)
    flags.DEFINE_float("cfg_scale", 4.0, "Guidance scale.")


def our_sampler(config: ConfigDict, dtype: str) -> common.Work:
    classes = ClassCondition(tuple(map(str, range(common.NUM_CLASSES))))
    model = common.make_model(config, dtype).clone(condition=classes)
    image_model = ImageModel(model, FlowMatching(), PixelCodec(), make_mesh(), common.LATENT_SHAPE)
    params = jax.jit(lambda key: init_params(image_model, key))(jax.random.key(0))
    generator = ImageGenerator(image_model, params, seed=0)
    sampler = SamplerConfig(config.steps, config.cfg_scale)
    return lambda: [batch.images for batch in generator.generate(sampler, config.batch, config.batch)]


def baseline_sampler(config: ConfigDict) -> common.Work:
    model = common.make_model(config, "float32")
    params = jax_flow_baseline.create_params(model, common.LATENT_SHAPE)
    noise = jax.random.normal(jax.random.key(0), (config.batch, *common.LATENT_SHAPE))
    labels = jnp.zeros(config.batch, jnp.int32)
    return lambda: jax_flow_baseline.sample(params, noise, labels, config.cfg_scale, config.steps, model=model)


def torch_sampler(config: ConfigDict, dtype: str) -> common.Work:
    import torch_dit

    run = torch_dit.Run(common.make_model(config, "float32"), common.LATENT_SHAPE, config.batch, dtype)
    return lambda: run.sample(config.steps, config.cfg_scale)


def make_works(config: ConfigDict) -> dict[str, tuple[str, Callable[[], Any]]]:
    makers = {BASELINE: ("float32", lambda: baseline_sampler(config))}
    makers |= {name: (dtype, lambda dtype=dtype: our_sampler(config, dtype)) for name, dtype in OURS.items()}
    if common.has_torch():
        makers |= {name: (dtype, lambda dtype=dtype: torch_sampler(config, dtype)) for name, dtype in TORCH.items()}
    return {name: (makers[name][0], makers[name][1]()) for name in common.choose(makers, config.rows)}


def main(config: ConfigDict) -> None:
    works = make_works(config)
    model = common.make_model(config, "float32")
    flops = config.steps * 2 * config.batch * model.count_flops(common.LATENT_SHAPE)
    title = f"DiT-{config.model}/{config.patch_size}, batch {config.batch}, {config.steps} guided Euler steps"
    common.compare(title, works, flops, config, reference=BASELINE)


if __name__ == "__main__":
    program.run_program(define_flags, main)
