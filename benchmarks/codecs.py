"""Encoding and decoding images: the tiny autoencoder against a KL autoencoder of Stable Diffusion's size.

    python benchmarks/codecs.py --image_size 128 --batch 4

Both have random weights, TAESD's and Stable Diffusion's sizes, and images are random. "ratio" is the KL autoencoder's
time over the row's, in the same direction.
"""

import common
import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from utils.codecs.kl import KLCodec
from utils.codecs.tiny import TinyCodec
from utils.flags import program


def define_flags() -> None:
    common.define_measurement_flags(batch=4)
    flags.DEFINE_integer("image_size", 128, "Side of the images, a multiple of 8.", lower_bound=8)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")


def main(config: ConfigDict) -> None:
    size = config.image_size
    key = jax.random.key(0)
    images = jax.random.uniform(key, (config.batch, size, size, 3), minval=-1, maxval=1)
    codecs = {"kl": KLCodec.random(0, dtype=jnp.dtype(config.dtype))}
    codecs["tiny"] = TinyCodec.random(0, dtype=jnp.dtype(config.dtype))

    # Weights are arguments, as in the programs.
    works: dict[str, common.Work] = {}
    for name, codec in codecs.items():
        latents = jax.random.normal(key, (config.batch, *codec.latent_shape((size, size, 3))))
        encode = jax.jit(lambda codec, images: codec.encode(key, images))
        decode = jax.jit(lambda codec, latents: codec.decode(latents))
        works[f"{name}: encode"] = lambda run=encode, codec=codec: run(codec, images)
        works[f"{name}: decode"] = lambda run=decode, codec=codec, latents=latents: run(codec, latents)

    # Ratios are within a direction.
    works = {name: works[name] for name in common.choose(works, config.rows)}
    seconds = common.measure_interleaved(works, config.rounds, config.repeats)
    rows = []
    for name, value in seconds.items():
        reference = seconds.get(f"kl: {name.partition(': ')[2]}")
        row = {"codec": name, "ms": 1e3 * value, "images/s": config.batch / value}
        rows.append(row | {"ratio": reference / value if reference else None})
    common.report(f"images of {size}x{size}, batch {config.batch}, {config.dtype}", rows, config.json)


if __name__ == "__main__":
    program.run_program(define_flags, main)
