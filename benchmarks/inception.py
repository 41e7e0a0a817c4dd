"""Features of images a second: ours, the weights as constants as in the recipe, the published network in PyTorch.

    python benchmarks/inception.py --batch 8 --image_size 256

"bfloat16" has parameters and activations of half the size, the resize before them in float32. "PyTorch" runs the very
file that our weights are read from. The largest difference is that of the pool features from "ours", which is float32,
as a fraction of the largest of these.
"""

from collections.abc import Callable
from pathlib import Path

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, UInt8
from ml_collections import ConfigDict

from utils.flags import program
from utils.flags.definitions import define_path
from utils.metrics import inception

REFERENCE = "ours"
BFLOAT16 = "ours: bfloat16"
CONSTANTS = "ours: weights as constants"
TORCH = "PyTorch"

Extract = Callable[[UInt8[Array, "n h w 3"]], dict[str, Array]]


def define_flags() -> None:
    common.define_measurement_flags(batch=8)
    flags.DEFINE_integer("image_size", 256, "Side of the images, which are random.", lower_bound=1)
    define_path("inception_weights", None, "Local copy of the Inception weights.")


def bfloat16_extractor(path: Path) -> Extract:
    params = inception._read_params(path.read_bytes())
    params = jax.device_put(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))

    def cast(call, args, kwargs, context):
        is_network = isinstance(context.module, inception.InceptionV3)
        return call(*(x.astype(jnp.bfloat16) if is_network else x for x in args), **kwargs)

    def extract(images):
        with nn.intercept_methods(cast):
            return inception._extract(params, images, inception.CONVENTIONS["adm"])

    return extract


def torch_work(path: Path, images: np.ndarray) -> common.Work:
    import torch
    from torch.nn import functional as F

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # As StyleGAN's metrics do; a GPU would else multiply float32 as TF32, and not compute what ours does.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    network = torch.jit.load(path, map_location=device).eval()
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    # The file holds the layers alone. Before them StyleGAN reads pixel i of 299 at i * size / 299, half a pixel of both
    # sizes away from where an affine grid has it.
    shift = 1 / images.shape[-1] - 1 / inception.IMAGE_SIZE
    theta = torch.tensor([[1, 0, shift], [0, 1, shift]], device=device).expand(len(images), -1, -1)

    shape = (len(images), 3, inception.IMAGE_SIZE, inception.IMAGE_SIZE)

    @torch.inference_mode()
    def work():
        grid = F.affine_grid(theta, shape, align_corners=False)
        x = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        return network((x - 128) / 128).cpu().numpy()  # to numpy: JAX cannot wait for PyTorch's GPU

    return work


def main(config: ConfigDict) -> None:
    path = inception.inception_weights_path(config.inception_weights)
    ours = inception.load_inception(path)
    shape = (config.batch, config.image_size, config.image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    on_device = jax.device_put(images)

    def work_of(extract: Extract) -> common.Work:
        return lambda: extract(on_device)["pool"]

    makers = {
        REFERENCE: lambda: work_of(ours),
        BFLOAT16: lambda: work_of(bfloat16_extractor(path)),
        CONSTANTS: lambda: work_of(jax.jit(lambda images: ours(images))),
    }
    if common.has_torch():
        makers[TORCH] = lambda: torch_work(path, images)
    works = {name: makers[name]() for name in common.choose(makers, config.rows)}
    seconds = common.measure_interleaved(works, config.rounds, config.repeats)

    reference = np.asarray(ours(on_device)["pool"])
    slowest = max(seconds.values())
    rows = []
    for name, work in works.items():
        difference = None
        if name != REFERENCE:
            difference = float(np.abs(np.asarray(work(), np.float32) - reference).max() / np.abs(reference).max())
        row = {"network": name, "ms": 1e3 * seconds[name], "images/s": config.batch / seconds[name]}
        rows.append(row | {"ratio": slowest / seconds[name], "largest difference": difference})
    size = config.image_size
    common.report(f"Inception features of {size}x{size} images, batch {config.batch}", rows, config.json)


if __name__ == "__main__":
    program.run_program(define_flags, main)
