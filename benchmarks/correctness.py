"""Whether what this machine's devices compute is right, before anything is said about how fast.

    python benchmarks/correctness.py

Golden numbers of the published networks, at the highest precision of matmuls; bfloat16 against float32; and the form of
attention that is chosen here against the formula in float64, forward and backward. Ends with status 1 where one of them
is off.
"""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_transformer import DiT, DiTConfig
from utils.base.mesh import make_mesh
from utils.convert.jax_flow import import_jax_flow_params
from utils.flags import program
from utils.kernels.ops import choose_attention_for, packed_attention
from utils.kernels.tpu_attention import split_heads
from utils.networks.models import model_fn
from utils.objectives.flow_matching import FlowMatching
from utils.objectives.mean_flow import MeanFlow

GOLDEN = common.ROOT / "tests" / "golden"
FIELDS = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")
HEADS = ((12, 64), (16, 72), (8, 96), (8, 128))  # number, channels


class Check(NamedTuple):
    """A largest difference, relative to the largest value, and what it may be."""

    name: str
    error: float
    tolerance: float


def relative_error(found: Any, expected: Any) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def load_golden(name: str, **changes: Any) -> tuple[dict[str, np.ndarray], DiT, Any]:
    """(numbers, network in float32, parameters) of a golden file."""
    numbers = dict(np.load(GOLDEN / f"{name}.npz"))
    config = DiTConfig(**{field: int(numbers[f"meta/{field}"]) for field in FIELDS}, dtype="float32", **changes)
    flat = {key.removeprefix("params/"): value for key, value in numbers.items() if key.startswith("params/")}
    form = choose_attention_for(make_mesh(), config.hidden_size // config.num_heads, "float32")
    return numbers, DiT(config, attention_form=form), import_jax_flow_params(flat)


def check_golden() -> Iterator[Check]:
    with jax.default_matmul_precision("highest"):
        for name in ("dit_latent_small", "dit_pixel_patch4"):
            numbers, network, params = load_golden(name)
            model = jax.jit(model_fn(network, params))
            found = model(*(jnp.asarray(numbers[key]) for key in ("x_t", "t", "labels")))
            yield Check(f"velocity of {name}", relative_error(found, numbers["v_pred"]), 2e-4)

        numbers, network, params = load_golden("meanflow_small", step_conditioning=1, timestep_scale=1.0)
        plain = model_fn(network, params)
        x, t, h, v, labels = (
            jnp.asarray(numbers[key]) if isinstance(key, str) else jnp.asarray(key)
            for key in ("z_t", 1 - numbers["t"], numbers["t"] - numbers["r"], "none/v_g", "labels")
        )
        # The file's network is of time 1 at noise, and its velocity of the other sign.
        derivative = jax.jit(
            lambda x, t, h, v: MeanFlow().derivative(
                lambda x, t, labels, h: -plain(x, 1 - t, labels, h), x, t, h, labels, -v
            )
        )
        yield Check("du/dt of MeanFlow", relative_error(derivative(x, t, h, v)[1], numbers["none/du_dt"]), 1e-4)


def check_dtypes(config: ConfigDict) -> Iterator[Check]:
    """A network of the size of --model in bfloat16 and float32: loss and gradients."""
    rng = np.random.default_rng(0)
    x_1 = jnp.asarray(rng.standard_normal((config.batch, *common.LATENT_SHAPE)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, common.NUM_CLASSES, config.batch), jnp.int32)
    draws = FlowMatching().draw(jax.random.key(1), jax.random.key(2), config.batch)
    found = {}
    for dtype in ("float32", "bfloat16"):
        network = common.make_model(config, dtype)
        if not found:
            params = jax.jit(network.init)(jax.random.key(0), x_1[:1], jnp.zeros(1), labels[:1])["params"]
            # Zero-initialised kernels would hide all that comes before them.
            params = jax.tree.map(
                lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params
            )

        def loss(params, network=network):
            function = model_fn(network, params)
            return FlowMatching().loss(function, function, x_1, labels, draws)[0].mean()

        with jax.default_matmul_precision("highest"):
            found[dtype] = jax.jit(jax.value_and_grad(loss))(params)
    yield Check("loss, bfloat16 of float32", relative_error(found["bfloat16"][0], found["float32"][0]), 0.01)
    for part in ("patch_embed", "block_0", "final_layer"):
        low, high = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found[dtype][1][part])])
            for dtype in ("bfloat16", "float32")
        )
        difference = float(np.linalg.norm(low - high) / np.linalg.norm(high))
        yield Check(f"gradient of {part}, bfloat16 of float32", difference, 0.05)


def check_attention(config: ConfigDict) -> Iterator[Check]:
    mesh = make_mesh()
    for num_heads, head_dim in HEADS:
        form = choose_attention_for(mesh, head_dim, "bfloat16")
        rng = np.random.default_rng(0)
        width = num_heads * head_dim
        qkv, cotangent = (
            rng.standard_normal((config.batch, 256, factor * width)).astype(jnp.bfloat16) for factor in (3, 1)
        )
        found, pull = jax.vjp(lambda qkv, n=num_heads, form=form: packed_attention(qkv, n, form), jnp.asarray(qkv))
        gradient = pull(jnp.asarray(cotangent))[0]
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):

            def formula(qkv, n=num_heads):
                query, key, value = split_heads(qkv, n)
                scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
                output = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
                return output.reshape(*qkv.shape[:2], -1)

            expected, pull = jax.vjp(formula, jnp.asarray(qkv, jnp.float64))
            expected_gradient = pull(jnp.asarray(cotangent, jnp.float64))[0]
        name = form if isinstance(form, str) else type(form).__name__
        yield Check(f"attention {name}, heads of {head_dim}", relative_error(found, expected), 2**-6)
        yield Check(f"its gradient, heads of {head_dim}", relative_error(gradient, expected_gradient), 2**-6)


def define_flags() -> None:
    common.define_model_flags()
    common.define_measurement_flags(batch=8)


def main(config: ConfigDict) -> None:
    checks = [*check_golden(), *check_attention(config), *check_dtypes(config)]
    rows = [
        {
            "": check.name,
            "error": check.error,
            "may be": check.tolerance,
            "is": "right" if check.error < check.tolerance else "OFF",
        }
        for check in checks
    ]
    common.report("Relative errors", rows, config.json)
    if any(row["is"] == "OFF" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    program.run_program(define_flags, main)
