"""The network of a golden file: the configuration in `meta/`, the parameters in `params/`."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_transformer import DiT, DiTConfig
from tests.conftest import GOLDEN
from utils.convert.jax_flow import import_jax_flow_params

SIZES = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")


def error(found, expected):
    """The largest deviation, relative to the largest value."""
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def load_golden(name, **changes):
    """(numbers, network, parameters) of tests/golden/NAME.npz, with these changes to the configuration."""
    numbers = {key: jnp.asarray(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    values = {"dtype": "float32", "timestep_scale": 1.0} | {key: int(numbers[f"meta/{key}"]) for key in SIZES}
    flat = {key.removeprefix("params/"): value for key, value in numbers.items() if key.startswith("params/")}
    params = jax.tree.map(jnp.asarray, import_jax_flow_params(flat))
    return SimpleNamespace(numbers=numbers, network=DiT(DiTConfig(**(values | changes))), params=params)
