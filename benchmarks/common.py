"""Shared by the benchmarks: interleaved measurements, the rate of plain matmuls, tables."""

import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch its part of a GPU
import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusion_transformer import DiT, DiTConfig
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.flags.definitions import define_path
from utils.kernels.ops import choose_attention_for
from utils.training.progress import PEAK_TFLOPS

ROOT = Path(__file__).resolve().parents[1]
# Hidden size, depth, heads: DiT-S to DiT-XL of arXiv:2212.09748, table 1, and two small ones.
SIZES = {
    "debug": (64, 2, 2),
    "small": (128, 4, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
LATENT_SHAPE = (32, 32, 4)
NUM_CLASSES = 1000

Work = Callable[[], Any]  # does one unit of work; what it returns is waited for


def define_model_flags() -> None:
    """Registers the model to `compare`."""
    flags.DEFINE_enum("model", "B", list(SIZES), "Size of the DiT.")
    flags.DEFINE_integer("patch_size", 2, "Side of its patches, of latents of 32x32x4.", lower_bound=1)
    flags.DEFINE_float("peak_tflops", None, "Of one device, where its kind is not known, for the MFU.", lower_bound=0)


def define_measurement_flags(batch: int, repeats: int = 1) -> None:
    """Registers what every benchmark has."""
    flags.DEFINE_integer("batch", batch, "Images at a time, over all devices.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Measurements of each row; their median is shown.", lower_bound=1)
    flags.DEFINE_integer("repeats", repeats, "Units of work in a measurement; more on fast devices.", lower_bound=1)
    flags.DEFINE_list("rows", [], "Rows to measure, by the names of the table; default: all.")
    define_path("json", None, "File for the figures.")


def make_model(config: ConfigDict, dtype: str, remat: str = "none", **settings: Any) -> DiT:
    """The network, with further fields of DiTConfig as `settings`."""
    hidden, depth, heads = SIZES[config.model]
    dit_config = DiTConfig(
        patch_size=config.patch_size,
        hidden_size=hidden,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=NUM_CLASSES,
        dtype=dtype,
        **settings,
    )
    form = choose_attention_for(make_mesh(), hidden // heads, dtype)
    return DiT(dit_config, remat, form)


def describe_device() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"


def choose(known: Iterable[str], requested: Sequence[str]) -> list[str]:
    """The known rows that --rows gives, all if it gives none; UserError for one that is not known."""
    known = list(known)
    unknown = [name for name in requested if name not in known]
    if unknown:
        raise UserError(f"--rows={unknown[0]} is not measured here; there are {', '.join(known)}")
    return [name for name in known if not requested or name in requested]


def measure_interleaved(works: Mapping[str, Work], rounds: int, repeats: int = 1) -> dict[str, float]:
    """Median seconds of each work over `rounds`. Interleaved, so that what slows the machine slows all of them.

    Each is done once beforehand, uncounted, to compile. A measurement is of `repeats` dispatched one after the other.
    """
    seconds = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            for _ in range(repeats if number else 1):
                done = work()
            jax.block_until_ready(done)
            elapsed = time.perf_counter() - started
            if number:
                seconds[name].append(elapsed / repeats)
            print(f"{name}: {elapsed:.3f} s{'' if number else ', the first time'}", file=sys.stderr)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_flops(dtype: str, rows: int, width: int) -> float:
    """Operations a second of (rows, width) x (width, 4 width), a DiT's largest matmul, summed in float32."""
    x = jnp.ones((rows, width), dtype)
    y = jnp.ones((width, 4 * width), dtype)
    matmul = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    (seconds,) = measure_interleaved({f"{dtype} matmul": lambda: matmul(x, y)}, rounds=10, repeats=10).values()
    return 2 * rows * width * 4 * width / seconds


def has_torch() -> bool:
    """Whether PyTorch can be compared with; says so if not."""
    found = importlib.util.find_spec("torch") is not None
    if not found:
        print("PyTorch is not installed: its rows are left out (pip install torch)", file=sys.stderr)
    return found


def compare(
    title: str, works: Mapping[str, tuple[str, Work]], flops: float, config: ConfigDict, reference: str
) -> None:
    """Measures works, each (compute dtype, work) of `flops` operations a time on --batch images, and reports them.

    "roofline" is the time that the operations would take at the rate of one plain matmul of the compute dtype, measured
    in the same run; "fraction" is that over the work's time; "ratio" is the time of row `reference` over the row's.
    """
    tokens = config.batch * LATENT_SHAPE[0] * LATENT_SHAPE[1] // config.patch_size**2
    rates = {dtype: matmul_flops(dtype, tokens, SIZES[config.model][0]) for dtype, _ in works.values()}
    seconds = measure_interleaved({name: work for name, (_, work) in works.items()}, config.rounds, config.repeats)
    peak = config.peak_tflops or PEAK_TFLOPS.get(jax.devices()[0].device_kind)
    rows = []
    for name, (dtype, work) in works.items():
        row = {
            "": name,
            "ms": 1e3 * seconds[name],
            "images/s": config.batch / seconds[name],
            "TFLOP/s": flops / seconds[name] / 1e12,
            "roofline ms": 1e3 * flops / rates[dtype],
            "fraction": f"{flops / rates[dtype] / seconds[name]:.0%}",
            "ratio": seconds[reference] / seconds[name] if reference in seconds else None,
        }
        if peak:
            row["MFU"] = f"{flops / seconds[name] / peak / 1e12:.0%}"
        rows.append(row | getattr(work, "metadata", {}))
    report(title, rows, config.json)


def report(title: str, rows: Sequence[Mapping[str, Any]], path: str | None) -> None:
    """Prints rows as a Markdown table, numbers to three digits, and writes them as JSON."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"{title}; {describe_device()}\n")
    print("| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 1))
    for row in rows:
        print("| " + " | ".join(_to_text(row.get(name)) for name in columns) + " |")
    if path:
        content = {"title": title, "device": describe_device(), "rows": list(rows)}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _to_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
