"""Programs compiled for accelerators that are not there: memory, estimated time by part, collectives.

    make setup EXTRAS=aot
    python benchmarks/aot.py --topology v5e:2x2 --model B --batch 256
    python benchmarks/aot.py --topology v5e:4x4 --model XL --batch 256 --sharding fsdp
    python benchmarks/aot.py --topology v6e:2x2 --model B --batch 32 --program sample

    make setup EXTRAS=cuda12
    python benchmarks/aot.py --topology h100:1 --model B --batch 256

What is compiled is what train_flow.py, sample.py and encode_latents.py run. Memory is the compiler's analysis, and
right. Every time is an estimate, and a real chip is slower. On TPUs: cycles that XLA writes beside operations (Pallas
kernels: instruction bundles of one image, times images) at the chip's clock; it knows of no stalls. On GPUs: of every
kernel its matmuls at the peak, or the bytes of its operands and output at the memory's bandwidth, whichever takes
longer. Of collectives only the bytes are known.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Before JAX is imported: no TPU is looked for, and several such programs may run at once.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")

import common
import hlo
import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_transformer import REMAT_POLICIES, DiT, DiTConfig
from utils.base.devices import GIB, memory_needed
from utils.base.mesh import (
    SHARD,
    SHARDING_MODES,
    batch_sharding,
    choose_num_shards,
    make_mesh,
    replicated,
    shape_structs,
    state_sharding,
    unsplit_fraction,
)
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.codecs.kl import KLCodec, KLConfig
from utils.data.latents import LatentBatch
from utils.flags import program
from utils.flags.definitions import define_path
from utils.kernels.ops import choose_attention_for
from utils.kernels.tpu_attention import CHUNK
from utils.networks.models import ImageModel, init_params
from utils.networks.optimizers import make_optimizer
from utils.networks.state import EmaSchedule, create_train_state
from utils.objectives.flow_matching import FlowMatching
from utils.sampling import compiled
from utils.sampling.solvers import SamplerConfig
from utils.training.progress import PEAK_TFLOPS
from utils.training.step import jit_train_step


class Chip(NamedTuple):
    """Memory and what times are estimated from; makers' data, clocks of v5p and v6e assumed."""

    gib: float
    gigahertz: float = 0.0  # of a TPU
    gigabytes_per_second: float = 0.0  # of a GPU's memory


CHIPS = {
    "TPU v4": Chip(32, 1.05),
    "TPU v5 lite": Chip(16, 1.5),
    "TPU v5": Chip(95, 1.75),
    "TPU v6 lite": Chip(32, 1.75),
    "NVIDIA H100 80GB HBM3": Chip(80, gigabytes_per_second=3352),
}
# What XLA asks of a GPU, by NVIDIA's table of compute capability 9.0 and the H100's data sheet.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  device_memory_size: 84942979072  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
}
"""


def define_flags() -> None:
    flags.DEFINE_string("topology", "v5e:2x2", "What for: v5e:4x4, v6e:2x2, v5p:2x2x1, v4:2x2x1, h100:8.")
    flags.DEFINE_enum("program", "train", ["train", "sample", "encode", "kernels"], "What is compiled.")
    flags.DEFINE_enum("model", "B", list(common.SIZES), "Size of the DiT.")
    flags.DEFINE_integer("patch_size", 2, "Side of its patches, of latents of 32x32x4.", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Compute dtype.")
    flags.DEFINE_integer("batch", 256, "Images at a time, over all devices.", lower_bound=1)
    flags.DEFINE_enum("sharding", "dp", list(SHARDING_MODES), "As in train_flow.py.")
    flags.DEFINE_integer("num_shards", None, "As in train_flow.py.", lower_bound=1)
    flags.DEFINE_enum("remat", "none", list(REMAT_POLICIES), "As in train_flow.py.")
    flags.DEFINE_integer("grad_accum", 1, "As in train_flow.py.", lower_bound=1)
    flags.DEFINE_enum("attention", "kernel", ["kernel", "xla"], "The Pallas kernel, or XLA's plain formula.")
    define_path("json", None, "File for the figures.")
    define_path("hlo", None, "File for the optimised program's text.")


# --- What is compiled ---


def describe_devices(topology: str) -> list[Any]:
    """Devices of a topology such as v5e:2x2 or h100:8; UserError where the plugin is missing or does not know it."""
    generation, _, size = topology.partition(":")
    try:
        if generation == "h100":
            options = {"target_config": H100, "topology": f"1x1x{int(size or 1)}"}
            description = topologies.get_topology_desc(platform="cuda", topology_name="", **options)
        else:
            description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        extra = "cuda12" if generation == "h100" else "aot"
        raise UserError(
            f"--topology={topology}: no such devices can be compiled for here ({reason}); make setup EXTRAS={extra}, "
            "and use v5e:2x2 or h100:1, for example"
        ) from error
    return list(description.devices)


def make_network(config: ConfigDict, mesh: Mesh) -> DiT:
    hidden, depth, heads = common.SIZES[config.model]
    dit_config = DiTConfig(
        patch_size=config.patch_size,
        hidden_size=hidden,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=common.NUM_CLASSES,
        dtype=config.dtype,
    )
    form = "xla" if config.attention == "xla" else choose_attention_for(mesh, hidden // heads, config.dtype)
    return DiT(dit_config, config.remat, form)


def make_image_model(config: ConfigDict, mesh: Mesh) -> ImageModel:
    return ImageModel(make_network(config, mesh), FlowMatching(), PixelCodec(), mesh, common.LATENT_SHAPE)


def describe_vae(mesh: Mesh, config: KLConfig) -> Any:
    """The shapes of a VAE's weights, on every device."""
    return shape_structs(jax.eval_shape(lambda: KLCodec.random(0, config)), replicated(mesh))


def lower_train_step(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """The training step on cached latents, and how much of its state is whole on every device."""
    model = make_image_model(config, mesh)
    optimizer = make_optimizer(1e-4, 0.9, 0.99)
    shapes = jax.eval_shape(lambda key: create_train_state(init_params(model, key), optimizer, key), jax.random.key(0))
    shardings = state_sharding(shapes, mesh, config.sharding)
    rows = LatentBatch(
        condition=jax.ShapeDtypeStruct((config.batch,), jnp.int32),
        moments=jax.ShapeDtypeStruct((config.batch, 2, *common.LATENT_SHAPE), jnp.float16),
    )
    # Moments are not encoded: any VAE will do.
    codec = describe_vae(mesh, KLConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=8))
    step = jit_train_step(
        shardings,
        replicated(mesh),
        model=model.network,
        objective=model.objective,
        optimizer=optimizer,
        grad_accum=config.grad_accum,
        ema=EmaSchedule(0.9999),
    )
    is_validation = jax.ShapeDtypeStruct((), bool, sharding=replicated(mesh))
    state = shape_structs(shapes, shardings)
    lowered = step.lower(state, shape_structs(rows, batch_sharding(mesh)), codec, is_validation)
    return lowered, {"state whole on every device": unsplit_fraction(shapes, shardings)}


def lower_sampler(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """A guided sampler of latents; its loop over Euler steps is counted once."""
    model = make_image_model(config, mesh)
    params = shape_structs(jax.eval_shape(partial(init_params, model), jax.random.key(0)), replicated(mesh))
    return compiled.lower_sampler(model, params, SamplerConfig(32, 4.0), config.batch), {}


def lower_encoder(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """Stable Diffusion's VAE on images of 256x256."""
    images = jax.ShapeDtypeStruct((config.batch, 256, 256, 3), jnp.float32)
    encode = jax.jit(lambda codec, images: codec.encode_moments(images))
    return encode.lower(describe_vae(mesh, KLConfig()), shape_structs(images, batch_sharding(mesh))), {}


PROGRAMS = {"train": lower_train_step, "sample": lower_sampler, "encode": lower_encoder}


# --- Pallas kernels ---


def measure_kernels(config: ConfigDict) -> dict[str, int]:
    """{"forward", "backward"}: instruction bundles of an image, compiled in a process of its own that dumps them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--program", "kernels", "--topology", config.topology]
        command += ["--model", config.model, "--patch_size", str(config.patch_size), "--dtype", config.dtype]
        arguments = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = {**os.environ, "LIBTPU_INIT_ARGS": arguments}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        paths = Path(folder).glob("*shard_map*schedule-analysis_final_bundles.txt")
        found = [re.search(r"total scheduled bundles:\s+(\d+)", path.read_text(encoding="utf-8")) for path in paths]
    forward, backward = sorted(int(match.group(1)) for match in found if match)
    tokens = (common.LATENT_SHAPE[0] // config.patch_size) ** 2
    chunks = max(1, -(-tokens // CHUNK))  # the loop over queries is in the bundles once
    return {"forward": forward * chunks, "backward": backward * chunks}


def compile_kernels(config: ConfigDict, mesh: Mesh) -> None:
    """Both kernels on one image a device."""
    width, _, heads = common.SIZES[config.model]
    tokens = (common.LATENT_SHAPE[0] // config.patch_size) ** 2
    form: Any = choose_attention_for(mesh, width // heads, config.dtype)
    rows = [
        jax.ShapeDtypeStruct((mesh.size, tokens, factor * width), config.dtype, sharding=batch_sharding(mesh))
        for factor in (3, 1)
    ]

    def both(qkv, cotangent):
        output, pull = jax.vjp(lambda qkv: form(qkv, heads), qkv)
        return output, pull(cotangent)

    jax.jit(both).lower(*rows).compile()


# --- The report ---


def estimate_gpu(kind: str, operations: list[hlo.Operation]) -> collections.Counter:
    """{part: milliseconds} of a program whose kernels each run at the matmuls' or at the memory's peak."""
    milliseconds = collections.Counter()
    for each in operations:
        seconds = max(each.flops / PEAK_TFLOPS[kind] / 1e12, each.traffic / CHIPS[kind].gigabytes_per_second / 1e9)
        milliseconds[hlo.part_of(each)] += 1e3 * seconds * each.times
    return milliseconds


def estimate_tpu(config: ConfigDict, kind: str, operations: list[hlo.Operation]) -> collections.Counter:
    """{part: milliseconds} of a program by its cycles, its Pallas kernels included."""
    cycles = collections.Counter()
    for operation in operations:
        cycles[hlo.part_of(operation)] += operation.cycles * operation.times
    # Kernels have no estimate in the text: the larger output is that of the backward pass.
    calls = [o for o in operations if o.opcode == "custom-call" and "shard_map" in o.name]
    if calls:
        bundles = measure_kernels(config)
        width = common.SIZES[config.model][0]
        for call in calls:
            rows, _, channels = (int(x) for x in re.findall(r"\[([\d,]*)\]", call.shape)[0].split(","))
            direction = "backward" if channels == 3 * width else "forward"
            cycles["attention, core"] += bundles[direction] * rows * call.times
    return collections.Counter({part: count / CHIPS[kind].gigahertz / 1e6 for part, count in cycles.items()})


def analyse(config: ConfigDict, mesh: Mesh, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """The figures of a compiled program."""
    kind = mesh.devices.flat[0].device_kind
    operations = list(hlo.read_operations(compiled.as_text()))
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    parts = estimate_gpu(kind, operations) if is_gpu else estimate_tpu(config, kind, operations)
    milliseconds = {part: value for part, value in parts.most_common() if value}
    total = sum(milliseconds.values())
    figures: dict[str, Any] = {
        "program": config.program,
        "estimated ms": milliseconds,
        "estimated ms in all": total,
        "GiB a device": memory_needed(compiled) / GIB,
        "collectives": hlo.list_collectives(operations),
    }
    if config.program != "encode":
        passes = 3 if config.program == "train" else 2  # guided
        flops = passes * config.batch * make_network(config, mesh).count_flops(common.LATENT_SHAPE) / mesh.size
        figures["estimated MFU"] = flops / (total / 1e3) / PEAK_TFLOPS[kind] / 1e12
    return figures


def describe_sharding(config: ConfigDict, mesh: Mesh) -> str:
    return f"{config.sharding} ({mesh.shape[SHARD]} shards)" if config.sharding == "hybrid" else config.sharding


def show(config: ConfigDict, mesh: Mesh, figures: dict[str, Any]) -> None:
    kind = mesh.devices.flat[0].device_kind
    total = figures["estimated ms in all"]
    how = f"{config.dtype}, {describe_sharding(config, mesh)}, remat {config.remat}"
    network = f"DiT-{config.model}/{config.patch_size}, {how}"
    what = "Stable Diffusion's VAE on 256x256" if config.program == "encode" else network
    print(f"{config.program}: {what}, batch {config.batch}, on {mesh.size} x {kind}, never run\n")
    print("| part | estimated ms | |\n|---|---:|---:|")
    for part, value in figures["estimated ms"].items():
        print(f"| {part} | {value:.2f} | {value / total:.0%} |")
    print(f"| in all | {total:.1f} | |\n")
    print(f"memory: {figures['GiB a device']:.2f} of {CHIPS[kind].gib:g} GiB a device")
    for name in ("estimated MFU", "state whole on every device"):
        if name in figures:
            print(f"{name}: {figures[name]:.1%}")
    print(f"collectives: {'; '.join(figures['collectives']) or 'none'}")
    print(f"jax {jax.__version__}, compiled in {figures['compiled in s']:.0f} s")


def main(config: ConfigDict) -> None:
    devices = describe_devices(config.topology)
    if devices[0].device_kind not in CHIPS:
        raise UserError(
            f"--topology={config.topology}: {devices[0].device_kind} is not in CHIPS of {__file__}; enter it"
        )
    mesh = make_mesh(choose_num_shards(config.sharding, config.num_shards, devices), devices)
    if config.batch % mesh.size:
        raise UserError(f"--batch={config.batch} does not divide over {mesh.size} devices; use a multiple")
    if config.program == "kernels":
        compile_kernels(config, mesh)
        return
    started = time.monotonic()
    lowered, facts = PROGRAMS[config.program](config, mesh)
    compiled = lowered.compile()
    seconds = time.monotonic() - started
    figures = analyse(config, mesh, compiled) | facts | {"compiled in s": seconds}
    show(config, mesh, figures)
    if config.hlo:
        Path(config.hlo).write_text(compiled.as_text(), encoding="utf-8")
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    program.run_program(define_flags, main)
