"""The codec of a run. One more codec is one file, and a case of `load_codec`."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from utils.base.devices import replicated
from utils.base.errors import UserError
from utils.codecs.codec import Codec
from utils.codecs.pixels import PixelCodec
from utils.codecs.vae import StableVAE

DEFAULT_HUB_ID = "stabilityai/sd-vae-ft-mse"


def load_codec(
    use_stable_vae: bool, vae: str, mesh: Mesh, image_shape: Sequence[int], expected_sha256: str | None = None
) -> Codec:
    """The codec of a run, replicated over the mesh. UserError where the VAE does not take images of that shape, or its
    weights do not have `expected_sha256`."""
    if not use_stable_vae:
        if expected_sha256:
            raise UserError("--model.use_stable_vae=0, but the data set is of latents; leave the flag out")
        return PixelCodec()
    return load_vae(vae, mesh, image_shape, expected_sha256)


def load_vae(vae: str, mesh: Mesh, image_shape: Sequence[int], expected_sha256: str | None = None) -> StableVAE:
    """The VAE `vae` (Hub id or folder), as `load_codec` has it."""
    height, width, channels = image_shape
    if channels != 3:
        raise UserError("--model.use_stable_vae=1, but the images are grey; train on pixels with --use_stable_vae 0")
    codec = StableVAE.load(vae)
    if expected_sha256 is not None and expected_sha256 != codec.sha256:
        raise UserError(
            f"--vae={vae} is another VAE (sha256 {codec.sha256[:12]}...) than the one that made the latents "
            f"({expected_sha256[:12]}...); name that one"
        )
    codec.latent_shape((height, width, channels))
    return jax.device_put(codec, replicated(mesh))
