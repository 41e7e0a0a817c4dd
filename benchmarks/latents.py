"""Training on cached latents against encoding on the fly: images per second of both, interleaved in one run.

    python benchmarks/latents.py --model.preset big --batch_size 4

The VAE has the size of Stable Diffusion's and random weights; images are random, at --image_size. Reading from disk is
left out on both sides, so that the ratio is that of the two training steps.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.base.mesh import check_batch_size, make_mesh, replicated, shard_batch
from utils.codecs.kl import KLCodec
from utils.conditions.classes import ClassCondition
from utils.data.dataset import PixelBatch
from utils.data.latents import LatentBatch
from utils.flags import program
from utils.flags.definitions import define_model_flags
from utils.networks.models import init_params, make_model
from utils.networks.optimizers import make_optimizer
from utils.networks.state import EmaSchedule, create_train_state
from utils.objectives.flow_matching import FlowMatching
from utils.training.step import train_step


def define_flags() -> None:
    flags.DEFINE_integer("batch_size", 4, "Images a step, over all devices.", lower_bound=1)
    flags.DEFINE_integer("image_size", 256, "Side of the images.", lower_bound=8)
    flags.DEFINE_integer("rounds", 5, "Times that each of the two is measured.", lower_bound=1)
    flags.DEFINE_integer("steps", 1, "Steps a measurement.", lower_bound=1)
    define_model_flags()


def main(config: ConfigDict) -> None:
    mesh = make_mesh()
    size = config.image_size
    check_batch_size(config.batch_size, mesh.size)
    codec = jax.device_put(KLCodec.random(1), replicated(mesh))
    names = tuple(map(str, range(config.model.num_classes)))
    image_model = make_model(config.model, FlowMatching(), codec, mesh, (size, size, 3), ClassCondition(names))
    optimizer = make_optimizer(config.model.lr, config.model.beta1, config.model.beta2)
    key = jax.random.key(0)
    state = create_train_state(init_params(image_model, key), optimizer, key)
    state = jax.device_put(state, replicated(mesh))
    static = {
        "model": image_model.network,
        "optimizer": optimizer,
        "objective": image_model.objective,
        "ema": EmaSchedule(0.9999),
        "grad_accum": 1,
    }
    step = jax.jit(partial(train_step, **static), donate_argnums=0)

    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(names), config.batch_size, dtype=np.int32)
    images = rng.integers(0, 256, (config.batch_size, size, size, 3), dtype=np.uint8)
    moments = rng.normal(size=(config.batch_size, 2, *image_model.latent_shape)).astype(np.float16)
    batches = {
        "encoding on the fly": shard_batch(PixelBatch(condition=labels, image=images), mesh),
        "cached latents": shard_batch(LatentBatch(condition=labels, moments=moments), mesh),
    }

    seconds = {name: [] for name in batches}
    for round_number in range(config.rounds + 1):  # the first compiles
        for name, batch in batches.items():
            started = time.perf_counter()
            for _ in range(config.steps):
                state, metrics = step(state, batch, codec)
            jax.block_until_ready(metrics)
            if round_number:
                seconds[name].append((time.perf_counter() - started) / config.steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slowest = max(medians.values())
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"DiT of {count:,} parameters, batch {config.batch_size}, {mesh.size} x {jax.devices()[0].device_kind}")
    print("| step | ms | images/s | ratio |\n|---|---:|---:|---:|")
    for name, value in medians.items():
        print(f"| {name} | {value * 1e3:,.0f} | {config.batch_size / value:,.2f} | {slowest / value:.2f} |")
    assert jnp.isfinite(metrics["l2_loss"])


if __name__ == "__main__":
    program.run_program(define_flags, main)
