"""How far the samples of each solver are from the ODE's own, and how many evaluations of the network they took.

    python benchmarks/solvers.py --load_dir runs/demo

The error is the root mean square over the samples' latents, against Heun's method with `--reference_steps`; the first
call's time beyond the second's is that of compiling.
"""

import time

import common  # noqa: F401 (puts the project on the path)
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from utils.flags import program
from utils.flags.definitions import define_path
from utils.runs.opening import load_generator
from utils.sampling.generator import ImageGenerator
from utils.sampling.solvers import SamplerConfig

FIXED = {"euler": (8, 16, 32, 64, 128, 256, 512), "heun": (4, 8, 16, 32, 64), "midpoint": (4, 8, 16, 32, 64)}
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)


def define_flags() -> None:
    define_path("load_dir", "runs/demo", "Folder of a run.")
    flags.DEFINE_float("cfg_scale", 1.0, "Guidance scale; 1: none.")
    flags.DEFINE_integer("num_samples", 32, "Samples, in one batch.", lower_bound=1)
    flags.DEFINE_integer("reference_steps", 2000, "Steps of the reference.", lower_bound=1)


def samplers(cfg_scale: float | None) -> list[SamplerConfig]:
    fixed = [SamplerConfig(steps, cfg_scale, solver=name) for name, counts in FIXED.items() for steps in counts]
    adaptive = [SamplerConfig(0, cfg_scale, solver="dopri5", rtol=rtol, atol=rtol) for rtol in TOLERANCES]
    return fixed + adaptive


def measure_nfe(generator: ImageGenerator, sampler: SamplerConfig, num_samples: int, labels: np.ndarray) -> float:
    if sampler.nfe is not None:
        return sampler.nfe
    (batch,) = generator.generate(sampler, num_samples, num_samples, labels)
    return float(np.mean(batch.nfe))


def main(config: ConfigDict) -> None:
    generator = load_generator(config.load_dir, dtype="float32")
    labels = np.arange(config.num_samples) % len(generator.class_names)
    noise = generator.noise(range(config.num_samples))
    scale = None if config.cfg_scale == 1 else config.cfg_scale

    def solve(sampler: SamplerConfig) -> tuple[Float[Array, "n h w c"], float]:
        start = time.perf_counter()
        latents = generator.sample_latents(noise, labels, sampler).block_until_ready()
        return latents, time.perf_counter() - start

    reference, _ = solve(SamplerConfig(config.reference_steps, scale, solver="heun"))
    print(
        "| solver | steps or tolerance | NFE | RMS error | first call, s | again, s |\n|---|---:|---:|---:|---:|---:|"
    )
    for sampler in samplers(scale):
        latents, first = solve(sampler)
        _, again = solve(sampler)
        error = float(jnp.sqrt(jnp.square(latents - reference).mean()))
        setting = f"{sampler.rtol:g}" if sampler.is_adaptive else sampler.num_steps
        nfe = measure_nfe(generator, sampler, config.num_samples, labels)
        print(f"| {sampler.solver} | {setting} | {nfe:.0f} | {error:.1e} | {first:.1f} | {again:.2f} |")


if __name__ == "__main__":
    program.run_program(define_flags, main)
