"""Programs compiled for accelerators that are not there: memory, estimated time by part, collectives.

    pip install -e .[aot]
    python benchmarks/aot.py --topology v5e:2x2 --model B --batch 256
    python benchmarks/aot.py --topology v5e:4x4 --model XL --batch 256 --sharding fsdp
    python benchmarks/aot.py --topology v6e:2x2 --model B --batch 32 --program sample

What is compiled is what train_flow.py, sample.py and encode_latents.py run. Memory is the compiler's analysis, and
right. Every time is an estimate: cycles that XLA writes beside its operations (Pallas kernels: instruction bundles of
one image, times images) at the chip's clock. It knows of no stalls, and of collectives only the bytes, so that a real
chip is slower.
"""

import collections
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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
import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_transformer import REMAT_POLICIES, DiT, DiTConfig
from utils import cli, generate
from utils.codecs.pixels import PixelCodec
from utils.codecs.vae import StableVAE, VAEConfig
from utils.errors import UserError
from utils.memory import GIB, memory_needed
from utils.models import ImageModel, init_params
from utils.objectives.flow_matching import FlowMatching
from utils.ops import choose_attention_for
from utils.sampling import SamplerConfig
from utils.sharding import (
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
from utils.throughput import PEAK_TFLOPS
from utils.tpu_attention import CHUNK
from utils.train_state import EmaSchedule, create_train_state, make_optimizer
from utils.train_step import jit_train_step


class Chip(NamedTuple):
    """High-bandwidth memory and clock; makers' data, clocks of v5p and v6e assumed."""

    gib: float
    gigahertz: float


CHIPS = {
    "TPU v4": Chip(32, 1.05),
    "TPU v5 lite": Chip(16, 1.5),
    "TPU v5": Chip(95, 1.75),
    "TPU v6 lite": Chip(32, 1.75),
}
# Parts of a program by the names of its operations, the first that fits.
PARTS = {
    "attention, qkv and out": r"attention/(qkv|out)",
    "attention, core": r"attention|shard_map",
    "MLP": r"mlp",
    "optimizer, EMA, norms": r"optimizer",
    "norms, modulation, residual": r"block_\d+/(?!attention|mlp)|final_layer",
    "embeddings": r"embed",
    "VAE": r"[Ee]ncoder|[Dd]ecoder",
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def define_flags() -> None:
    flags.DEFINE_string("topology", "v5e:2x2", "Generation and shape: v5e:4x4, v6e:2x2, v5p:2x2x1, v4:2x2x1.")
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
    flags.DEFINE_string("json", None, "File for the figures.")
    flags.DEFINE_string("hlo", None, "File for the optimised program's text.")


# --- What is compiled ---


def describe_devices(topology: str) -> list[Any]:
    """Devices of a topology such as v5e:2x2; UserError where libtpu is missing or does not know it."""
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--topology={topology}: no such TPUs can be compiled for here ({reason}); pip install -e .[aot], and use "
            "v5e:2x2, for example"
        ) from error
    return list(description.devices)


def make_network(config: ConfigDict, mesh: Mesh) -> DiT:
    hidden, depth, heads = common.SIZES[config.model]
    dit_config = DiTConfig(config.patch_size, hidden, depth, heads, 4.0, 0.1, common.NUM_CLASSES, dtype=config.dtype)
    form = "xla" if config.attention == "xla" else choose_attention_for(mesh, hidden // heads, config.dtype)
    return DiT(dit_config, config.remat, form)


def make_image_model(config: ConfigDict, mesh: Mesh) -> ImageModel:
    classes = tuple(map(str, range(common.NUM_CLASSES)))
    return ImageModel(make_network(config, mesh), FlowMatching(), PixelCodec(), mesh, common.LATENT_SHAPE, classes)


def describe_vae(mesh: Mesh, config: VAEConfig) -> Any:
    """The shapes of a VAE's weights, on every device."""
    return shape_structs(jax.eval_shape(lambda: StableVAE.random(0, config)), replicated(mesh))


def lower_train_step(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """The training step on cached latents, and how much of its state is whole on every device."""
    model = make_image_model(config, mesh)
    optimizer = make_optimizer(1e-4, 0.9, 0.99)
    shapes = jax.eval_shape(lambda key: create_train_state(init_params(model, key), optimizer, key), jax.random.key(0))
    shardings = state_sharding(shapes, mesh, config.sharding)
    rows = {
        "moments": jax.ShapeDtypeStruct((config.batch, 2, *common.LATENT_SHAPE), jnp.float16),
        "label": jax.ShapeDtypeStruct((config.batch,), jnp.int32),
    }
    # Moments are not encoded: any VAE will do.
    codec = describe_vae(mesh, VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=8))
    step = jit_train_step(
        shardings,
        replicated(mesh),
        model=model.network,
        objective=model.objective,
        optimizer=optimizer,
        grad_accum=config.grad_accum,
        ema=EmaSchedule(0.9999),
    )
    lowered = step.lower(shape_structs(shapes, shardings), shape_structs(rows, batch_sharding(mesh)), codec)
    return lowered, {"state whole on every device": unsplit_fraction(shapes, shardings)}


def lower_sampler(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """A guided sampler of latents; its loop over Euler steps is counted once."""
    model = make_image_model(config, mesh)
    params = shape_structs(jax.eval_shape(partial(init_params, model), jax.random.key(0)), replicated(mesh))
    return generate.lower_sampler(model, params, SamplerConfig(32, 4.0), config.batch), {}


def lower_encoder(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """Stable Diffusion's VAE on images of 256x256."""
    images = jax.ShapeDtypeStruct((config.batch, 256, 256, 3), jnp.float32)
    encode = jax.jit(lambda codec, images: codec.encode_moments(images))
    return encode.lower(describe_vae(mesh, VAEConfig()), shape_structs(images, batch_sharding(mesh))), {}


PROGRAMS = {"train": lower_train_step, "sample": lower_sampler, "encode": lower_encoder}


# --- What the compiled text says ---


class Operation(NamedTuple):
    """One line of optimised HLO."""

    opcode: str
    name: str  # in the program, such as jvp(DiT)/block_0/mlp/...
    shape: str  # of its output
    cycles: int
    times: int  # of a loop's body
    channel: str | None  # of a collective: the same for its start, what it overlaps with, and its end
    is_overlapped: bool
    group: int  # of a collective: the devices that take part in one; 0: all


def read_computations(text: str) -> dict[str, list[str]]:
    """{name: lines} of a program."""
    computations, lines = {}, []
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
        if header:
            computations[header.group(1)] = lines = []
        elif line.strip():
            lines.append(line)
    return computations


def count_rounds(computations: dict[str, list[str]]) -> dict[str, int]:
    """{body: rounds} of the loops: what XLA states, or the bound of the condition over the steps that a body unrolls,
    of which each sends in both directions."""
    rounds = {}
    for line in (line for lines in computations.values() for line in lines if " while(" in line):
        body = re.search(r"body=%?([\w.\-]+)", line).group(1)
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        bounds = (
            re.findall(r"constant\((\d+)\)", " ".join(computations.get(condition.group(1), ()))) if condition else []
        )
        sends = sum(" collective-permute-start(" in each for each in computations.get(body, ()))
        rounds[body] = int(known.group(1)) if known else max(1, int((bounds or [1])[-1]) // max(1, sends // 2))
    return rounds


def count_group(line: str) -> int:
    """Devices in a group of a collective, from any of the forms {{0,1},{2,3}}, [groups,devices]<=[...] and
    mesh['axis'=size, ...] {'axis', ...}; 0 where none are given: all."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed.group(1).count(",") + 1
    if shaped := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(shaped.group(1))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", named.group(2)))
    return 0


def read_operations(text: str) -> Iterator[Operation]:
    """All operations of a program, those of a loop with the number of its rounds."""
    computations = read_computations(text)
    rounds = count_rounds(computations)
    for computation, lines in computations.items():
        for line in lines:
            found = re.match(r"\s+(?:ROOT )?%\S+ = (.*?) ([a-z][a-z\-]*)\(", line)
            if not found:
                continue
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            name = re.search(r'op_name="([^"]*)"', line)
            channel = re.search(r"channel_id=(\d+)", line)
            # TPUs have reduce-scatter as a fusion of an all-reduce and a slice.
            is_scattered = computation.startswith("all-reduce-scatter") and found.group(2).startswith("all-reduce")
            yield Operation(
                opcode="reduce-scatter" if is_scattered else found.group(2),
                name=name.group(1) if name else "",
                shape=found.group(1),
                cycles=int(cycles.group(1)) if cycles else 0,
                times=rounds.get(computation, 1),
                channel=channel.group(1) if channel else None,
                is_overlapped="async" in computation or found.group(2).endswith("-start"),
                group=count_group(line),
            )


def part_of(operation: Operation) -> str:
    if operation.opcode in ("copy", "transpose", "copy-start", "copy-done"):
        return "layout copies"
    return next((part for part, pattern in PARTS.items() if re.search(pattern, operation.name)), "other")


def count_bytes(shape: str) -> int:
    """Of an HLO shape, such as bf16[64,256]{1,0} or a tuple of them."""
    sizes = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
    return sum(
        sizes.get(dtype, 4) * math.prod(int(size) for size in axes.split(",") if size)
        for dtype, axes in re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
    )


def list_collectives(operations: list[Operation]) -> list[str]:
    """One line for each kind, dtype and size of group: how many, how many bytes on a device (before a reduce-scatter,
    after any other), and whether they overlap with compute."""
    found = [operation for operation in operations if operation.opcode.removesuffix("-start") in COLLECTIVES]
    # One that is overlapped appears several times, as its start, within what it overlaps with, and as its end.
    overlapped = {operation.channel: operation for operation in found if operation.is_overlapped and operation.channel}
    separate = [operation for operation in found if operation.channel not in overlapped]
    counts, sizes = collections.Counter(), collections.Counter()
    for operation in (*overlapped.values(), *separate):
        # An asynchronous one's output is a tuple of operands and results.
        parts = re.findall(r"\b[a-z]+\d*\[[\d,]*\]", operation.shape)
        parts = [part for part in parts if part not in ("u32[]", "s32[2]")] or parts
        shape = parts[-1] if operation.opcode.endswith("-start") else " ".join(parts)
        how = "overlapped" if operation.is_overlapped else "synchronous"
        key = (operation.opcode.removesuffix("-start"), shape.split("[")[0], how, operation.group)
        counts[key] += operation.times
        sizes[key] += operation.times * count_bytes(shape)
    return [
        f"{count} {kind} of {dtype}{f' over {group}' if group else ''}, "
        f"{sizes[kind, dtype, how, group] / 2**20:,.0f} MiB a device, {how}"
        for (kind, dtype, how, group), count in sorted(counts.items())
    ]


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
        found = [re.search(r"total scheduled bundles:\s+(\d+)", path.read_text()) for path in paths]
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


def count_cycles(config: ConfigDict, operations: list[Operation]) -> collections.Counter:
    """{part: cycles} of a program, its kernels included."""
    cycles = collections.Counter()
    for operation in operations:
        cycles[part_of(operation)] += operation.cycles * operation.times
    # Kernels have no estimate in the text: the larger output is that of the backward pass.
    calls = [o for o in operations if o.opcode == "custom-call" and "shard_map" in o.name]
    if calls:
        bundles, width = measure_kernels(config), common.SIZES[config.model][0]
        for call in calls:
            rows, _, channels = (int(x) for x in re.findall(r"\[([\d,]*)\]", call.shape)[0].split(","))
            kind = "backward" if channels == 3 * width else "forward"
            cycles["attention, core"] += bundles[kind] * rows * call.times
    return cycles


def analyse(config: ConfigDict, mesh: Mesh, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """The figures of a compiled program."""
    kind = mesh.devices.flat[0].device_kind
    operations = list(read_operations(compiled.as_text()))
    cycles = count_cycles(config, operations)
    milliseconds = {part: count / CHIPS[kind].gigahertz / 1e6 for part, count in cycles.most_common()}
    total = sum(milliseconds.values())
    figures: dict[str, Any] = {
        "program": config.program,
        "estimated ms": milliseconds,
        "estimated ms in all": total,
        "GiB a device": memory_needed(compiled) / GIB,
        "collectives": list_collectives(operations),
    }
    if config.program != "encode":
        passes = 3 if config.program == "train" else 2  # guided
        flops = passes * config.batch * make_network(config, mesh).count_flops(common.LATENT_SHAPE) / mesh.size
        figures["estimated MFU"] = flops / (total / 1e3) / PEAK_TFLOPS[kind] / 1e12
    return figures


def describe_sharding(config: ConfigDict, mesh: Mesh) -> str:
    return f"{config.sharding} ({mesh.shape[SHARD]} shards)" if config.sharding == "hybrid" else config.sharding


def show(config: ConfigDict, mesh: Mesh, figures: dict[str, Any]) -> None:
    kind, total = mesh.devices.flat[0].device_kind, figures["estimated ms in all"]
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
        Path(config.hlo).write_text(compiled.as_text())
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    cli.run_program(define_flags, main)
