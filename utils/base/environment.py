"""JAX as its environment variables set it: whether programs can work so, and what of it enters the numbers of a run."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax

from utils.base.errors import UserError

# What enters shapes, types and random numbers, with JAX's defaults, which are assumed of runs that did not record them.
RECORDED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_default_matmul_precision": None,
}
RANDOM = tuple(name for name in RECORDED if name != "jax_default_matmul_precision")  # by which numbers are drawn
# Under these nothing here runs: arrays of two types or ranks are added everywhere, and steps are compiled in advance.
UNSUPPORTED = {
    "jax_numpy_dtype_promotion": ("strict",),
    "jax_numpy_rank_promotion": ("raise",),
    "jax_disable_jit": (True,),
}


def _value(name: str) -> Any:
    """A setting of JAX as JSON has it."""
    value = jax.config.values.get(name, RECORDED.get(name))  # of another JAX, one setting may be gone
    value = getattr(value, "value", value)  # of an enumeration
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def jax_settings() -> dict[str, Any]:
    """Returns the settings that are recorded with a run."""
    return {name: _value(name) for name in RECORDED}


def changed_variables(names: Collection[str] = RECORDED) -> list[str]:
    """Lists the settings that are not JAX's default, as environment variables: ["JAX_RANDOM_SEED_OFFSET=3"]."""
    return [f"{name.upper()}={_show(_value(name))}" for name in names if _value(name) != RECORDED[name]]


def compare_jax_settings(found: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Lists the differences between what two runs recorded, by environment variables; a setting that one lacks has
    JAX's default."""
    pairs = {name: (saved.get(name, default), found.get(name, default)) for name, default in RECORDED.items()}
    return [
        f"{name.upper()}={_show(new)}, was {_show(old)}: the numbers are others from here on"
        for name, (old, new) in pairs.items()
        if old != new
    ]


def _show(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def check_jax_settings() -> None:
    """UserError for a setting of JAX with which the programs cannot run."""
    for name, values in UNSUPPORTED.items():
        if _value(name) in values:
            raise UserError(f"{name.upper()}={_show(_value(name))}: the programs do not run so; unset it")


def find_devices() -> list[jax.Device]:
    """All devices of all processes. UserError, naming JAX_PLATFORMS, where it asks for one that is not there."""
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        reason = re.sub(r" \((set JAX_PLATFORMS|you may need).*", "", first_line)[:200]
        reason = f" ({reason})" if reason else ""
        name = "jax_platform_name" if first_line.startswith("Unknown backend") else "jax_platforms"
        if platform := _value(name):
            raise UserError(
                f"{name.upper()}={platform}: there is no such device here{reason}; unset it, or set JAX_PLATFORMS=cpu"
            ) from None
        raise UserError(f"JAX finds no device{reason}; JAX_PLATFORMS=cpu computes on the CPU") from None
