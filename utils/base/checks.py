"""Refusals of impossible requests, before anything compiles: each names the value, the flag and the fix."""

import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from utils.base.errors import NO_ROOM, UserError
from utils.base.files import remove_temporaries
from utils.base.memory import total_memory


def check_model(model: ConfigDict, latent_shape: tuple[int, int, int]) -> None:
    """Raises UserError where no model of this configuration can be trained on latents (h, w, c)."""
    if model.get("network", "dit") == "dit":
        check_sizes(model, latent_shape)
        _check_memory(model, latent_shape)
    scale = model.get("cfg_scale", 1.0)  # an imported model has none
    if scale < 0 and scale != -1:
        raise UserError(f"--model.cfg_scale={scale}: use a scale of 0 or more, or -1 for no guidance")
    for beta in ("beta1", "beta2"):
        if model.get(beta, 0.0) >= 1:
            raise UserError(f"--model.{beta}={model[beta]} must be below 1; use 0.99, for example")


def check_sizes(model: ConfigDict, latent_shape: tuple[int, int, int]) -> None:
    """Raises UserError where the sizes of a DiT for latents (h, w, c) do not fit each other."""
    height, width, _ = latent_shape
    patch = model.patch_size
    if height % patch or width % patch:
        fits = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
        raise UserError(
            f"--model.patch_size={patch} does not divide the {height}x{width} input of the model; "
            f"use one of {', '.join(map(str, fits))}"
        )
    if model.hidden_size % model.num_heads:
        raise UserError(
            f"--model.num_heads={model.num_heads} does not divide --model.hidden_size={model.hidden_size}; "
            f"use {_nearest_divisor(model.hidden_size, model.num_heads)} heads, for example"
        )
    if model.hidden_size % 4:
        raise UserError(
            f"--model.hidden_size={model.hidden_size} must be a multiple of 4 (sines and cosines of two axes); "
            f"use {-(-model.hidden_size // 4) * 4}"
        )
    head_dim = model.hidden_size // model.num_heads
    if model.get("rope") and head_dim % 4:
        raise UserError(
            f"--model.rope=1: the width of a head, {head_dim}, must be a multiple of 4 (sines and cosines of two "
            f"axes); use another --model.num_heads than {model.num_heads}, or --model.rope 0"
        )
    width = int(model.mlp_ratio * model.hidden_size)
    if (int(2 / 3 * width) if model.get("mlp") == "swiglu" else width) < 1:
        raise UserError(f"--model.mlp_ratio={model.mlp_ratio} leaves the MLP no width; use 4, for example")


def _check_memory(model: ConfigDict, latent_shape: tuple[int, int, int]) -> None:
    num_params, limit = count_parameters(model, latent_shape), total_memory()
    if 16 * num_params > limit:  # float32 parameters, EMA and two moments
        raise UserError(
            f"a model of --model.hidden_size={model.hidden_size}, --model.depth={model.depth}, --model.mlp_ratio="
            f"{model.mlp_ratio:g} and --model.num_classes={model.num_classes} has {num_params:,} parameters; with "
            f"optimizer they need {16 * num_params / 2**30:,.0f} GiB, of which there are {limit / 2**30:,.0f}; use less"
        )


def count_parameters(model: ConfigDict, latent_shape: tuple[int, int, int]) -> int:
    """Parameters of the DiT, but for biases; and its table of positions, a constant as large as a parameter."""
    height, width, channels = latent_shape
    d, p = model.hidden_size, model.patch_size
    block = (10 + 2 * model.mlp_ratio) * d * d
    ends = (3 * d + 256 + 2 * p * p * channels + model.num_classes) * d
    return int(model.depth * block + ends + (height // p) * (width // p) * d)


def check_batch_memory(batch_size: int, image_shape: tuple[int, ...], copies: int = 6) -> None:
    """UserError where the machine cannot hold that many images: a batch, those prefetched, and work on it."""
    needed, limit = copies * batch_size * math.prod(image_shape) // jax.process_count(), total_memory()
    if needed > limit:
        raise UserError(
            f"--batch_size={batch_size} of {'x'.join(map(str, image_shape))} images needs {needed / 2**30:,.0f} GiB, "
            f"but there are {limit / 2**30:,.0f}; use a smaller one"
        )


def _nearest_divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))


def check_batch_size(batch_size: int, num_devices: int, grad_accum: int = 1, period: int = 1) -> None:
    """Raises UserError where a global batch cannot be sharded evenly over the devices of all processes, in every one of
    `grad_accum` microbatches, by `period` rows at a time."""
    divisor = num_devices * grad_accum * period
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size}: use {divisor} or a multiple of it")
    if batch_size % divisor:
        microbatches = f" in --grad_accum={grad_accum} microbatches" if grad_accum > 1 else ""
        if period > 1:
            microbatches += f" by the {period} rows of which the objective treats one apart"
        raise UserError(
            f"--batch_size={batch_size} does not divide over {num_devices} device{'s' * (num_devices > 1)}"
            f"{microbatches}; "
            f"use a multiple of {divisor}"
        )


def check_writable(
    folder: Path, flag: str, file: Path | None = None, creates: bool = True, names: Iterable[str] = ()
) -> None:
    """Creates `folder` and proves that files, or the one of --`flag`, can be written there, `names` among them; removes
    what killed writers have left. Without `creates` it leaves nothing: it looks at the folder, or the first above it
    that exists. UserError otherwise."""
    for name in names:
        if (folder / name).is_dir():
            raise UserError(f"--{flag}={folder} holds a folder {name}, where a file is to be; choose another folder")
    try:
        if creates:
            folder.mkdir(parents=True, exist_ok=True)
        place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        with tempfile.TemporaryFile(dir=place) as probe:  # of no name: the processes of a run try at the same time
            probe.write(bytes(4096))
    except OSError as error:
        fix = f"{NO_ROOM[error.errno]}, or choose" if error.errno in NO_ROOM else "choose"
        kind = "file" if file else "folder"
        raise UserError(
            f"--{flag}={file or folder} cannot be written ({error.strerror}); {fix} another {kind}"
        ) from None
    if creates:
        remove_temporaries(folder, file.name if file else "")


def check_file_writable(path: Path, flag: str, example: str, inputs: Mapping[str, str | None] | None = None) -> None:
    """Creates the folder of the file of --`flag`, named like `example`, and proves that it can be written. UserError
    where it cannot be, is a folder or no regular file, or is one of the `inputs`, {flag: path}."""
    if path.is_dir():
        raise UserError(f"--{flag}={path} is a folder; name the file to write, such as {path / example}")
    if path.exists() and not path.is_file():
        raise UserError(f"--{flag}={path} is no regular file; name another")
    for name, value in (inputs or {}).items():
        if value and Path(value).resolve() == path.resolve():
            raise UserError(f"--{flag}={path} is the file of --{name}, which would be lost; name another file")
    check_writable(path.parent, flag, path)


def check_free_space(path: Path, flag: str, num_bytes: int) -> None:
    """UserError where the file system of a file to be written has less room than that: work for it would be lost."""
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise UserError(
            f"--{flag}={path} takes up to {num_bytes:,} bytes, but {free:,} are free there; make room, or choose "
            "another place"
        )


def can_guide(class_dropout_prob: float) -> bool:
    """Whether a model trained so knows both sides of classifier-free guidance: the label dropped, and given."""
    return 0 < class_dropout_prob < 1


def explain_no_guidance(class_dropout_prob: float) -> str:
    what = 'has no meaning for "no label"' if class_dropout_prob == 0 else "knows no labels"
    return f"with --model.class_dropout_prob={class_dropout_prob:g} the model {what}, which guidance needs"
