"""The KL autoencoder of latent diffusion (Rombach et al., arXiv:2112.10752) as a codec.

Stable Diffusion's, SDXL's, SD3's, FLUX's and FLUX.2's are read from the Hugging Face layout: config.json and
diffusion_pytorch_model.safetensors. Those of latent diffusion's own layout (CompVis, VA-VAE) are one file.
"""

from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Key, PyTree

from utils.base.files import file_sha256
from utils.base.messages import UserError
from utils.codecs.codec import latent_sides
from utils.codecs.kl_config import Flux2Config, KLConfig, read_kl_config
from utils.codecs.kl_files import arrange_params, draw_params, find_files, read_config, read_params, write_files
from utils.codecs.kl_network import AutoencoderKL
from utils.codecs.ldm_files import parse_source, read_ldm


class KLCodec(flax.struct.PyTreeNode):
    """KL autoencoder as a codec. Parameters are float32, `dtype` is the compute dtype, results are float32."""

    SURPLUS = ()  # integers in the weights file with which nothing is computed
    # Only the parameters are leaves; the rest is what functions are compiled for.
    params: PyTree
    config: KLConfig = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    sha256: str = flax.struct.field(pytree_node=False)  # of the weights file; empty for random weights
    source: str = flax.struct.field(pytree_node=False, default="random weights")  # the folder or hub id it came from

    @classmethod
    def load(cls, path: str, dtype: Any = jnp.float32) -> "KLCodec":
        """Loads the VAE in a folder (or in its subfolder `vae`), in a file of latent diffusion's own layout
        (FILE[,stats=FILE2][,scale=NUMBER]), else of that id on the Hugging Face hub.

        Raises UserError, naming --codec=kl:PATH and what to do, where it cannot be found, is broken, or has another
        architecture.
        """
        shown = f"--codec=kl:{path}"
        if (source := parse_source(str(path), shown)) is not None:
            tensors, config, sha256 = read_ldm(source, shown)
            params = arrange_params(tensors, _check_sizes(config, source.file, shown), source.file, shown)
            return cls(params, config, jnp.dtype(dtype), sha256, str(path))

        # The configuration first: a small file, which says what the weights must be.
        config_file, weights_file = find_files(path, shown)
        content = read_config(config_file, shown, "kl", path)
        config = read_kl_config(content, str(config_file), shown)
        kind = Flux2Codec if isinstance(config, Flux2Config) else cls
        params = read_params(weights_file, _check_sizes(config, config_file, shown), shown, ignored=kind.SURPLUS)
        if "bn" in params and (np.asarray(params["bn"]["running_var"]) < 0).any():
            raise UserError(f"{shown}: {weights_file} has a negative variance in bn.running_var; fetch it again")
        return kind(params, config, jnp.dtype(dtype), file_sha256(weights_file), path)

    @classmethod
    def random(cls, seed: int, config: KLConfig | None = None, dtype: Any = jnp.float32) -> "KLCodec":
        """Returns a codec with random weights that keep the variance of their inputs, for tests and measurements.

        `config` defaults to the sizes of Stable Diffusion's VAE.
        """
        config = config or KLConfig()
        kind = Flux2Codec if isinstance(config, Flux2Config) else cls
        return kind(draw_params(seed, _param_shapes(config)), config, jnp.dtype(dtype), "")

    def save(self, folder: Path) -> None:
        """Writes the codec in the Hugging Face layout, which `load` and diffusers read."""
        write_files(folder, self.config.to_dict(), self.params, self.SURPLUS)

    def encode_moments(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b h2 w2 c"], Float[Array, "b h2 w2 c"]]:
        """Returns (mean, log-variance) of the posterior of images in [-1, 1], neither scaled nor shifted."""
        moments = self._apply(images, "encode").astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        # The bounds of the reference implementation, so that the deviation is finite.
        return mean, jnp.clip(logvar, -30, 20)

    def sample_latents(
        self, key: Key[Array, "*b"], mean: Float[Array, "b h w c"], logvar: Float[Array, "b h w c"]
    ) -> Float[Array, "b h2 w2 c2"]:
        """Returns a sample of the posterior, scaled to about unit variance.

        `key` is one for each example, or one to be split among them.
        """
        # Moments from a cache are float16.
        mean = mean.astype(jnp.float32)
        logvar = logvar.astype(jnp.float32)

        # Noise by example, whatever the batch that it is encoded in.
        keys = key if key.ndim else jax.random.split(key, len(mean))
        z = mean + jnp.exp(logvar / 2) * jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return self.normalise(z)

    def normalise(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Returns the network's latents as a model learns them, of about unit variance."""
        return (z - self.config.shift) * self.config.scale

    def denormalise(self, latents: Float[Array, "b h2 w2 c2"]) -> Float[Array, "b h w c"]:
        """Returns the network's latents, the reverse of `normalise`."""
        return latents / self.config.scale + self.config.shift

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        """Returns scaled latents of images in [-1, 1]; `key` as `sample_latents` takes it."""
        return self.sample_latents(key, *self.encode_moments(images))

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Returns images, about in [-1, 1], of scaled latents."""
        return self._apply(self.denormalise(latents), "decode").astype(jnp.float32)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns (h / f, w / f, c), where f is `downsampling`. Raises UserError for images that do not fit."""
        height, width = latent_sides(image_shape, self.config.in_channels, self.config.downsampling)
        return height, width, self.config.latent_channels

    def _apply(self, x, method):
        return AutoencoderKL(self.config, self.dtype).apply({"params": self.params}, x, method=method)


class Flux2Codec(KLCodec):
    """FLUX.2's autoencoder as a codec: latents are the posterior's mean, in patches of 2x2, each number of a patch
    normalised by the running statistics that the weights file holds."""

    IS_DETERMINISTIC = True  # the posterior's deviation is not used
    SURPLUS = ("bn.num_batches_tracked",)

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        """Returns normalised latents of images in [-1, 1]; `key` is not used."""
        mean, _ = self.encode_moments(images)
        return self.normalise(mean)

    def normalise(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        # A patch's numbers by channel, then row, then column.
        b, h, w, c = z.shape
        patches = z.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, h // 2, w // 2, 4 * c)
        return (patches - self.params["bn"]["running_mean"]) / self._deviation

    def denormalise(self, latents: Float[Array, "b h2 w2 c2"]) -> Float[Array, "b h w c"]:
        b, h, w, c = latents.shape
        patches = latents * self._deviation + self.params["bn"]["running_mean"]
        return patches.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)

    @property
    def _deviation(self) -> Float[Array, " c"]:
        assert isinstance(self.config, Flux2Config)
        return jnp.sqrt(self.params["bn"]["running_var"] + self.config.batch_norm_eps)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        height, width, channels = super().latent_shape(image_shape)
        return height, width, 4 * channels


def _check_sizes(config: KLConfig, file: Path, shown: str) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Returns the shapes of the parameters. Raises UserError, before weights are read, for sizes in the `file` that
    contradict each other."""
    try:
        np.broadcast_to(config.scale * config.shift, config.latent_channels)
        return _param_shapes(config)
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{shown}: no VAE has the sizes in {file} ({reason}); fetch it again") from None


def _param_shapes(config: KLConfig) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    # The smallest image there is: shapes of parameters do not depend on its sides. Nothing is computed.
    image = jnp.zeros((1, config.downsampling, config.downsampling, config.in_channels))
    init = partial(AutoencoderKL(config, jnp.float32).init, jax.random.key(0))
    shapes = flatten_dict(jax.eval_shape(init, image)["params"])
    # Beside the network: statistics of each number of a patch.
    if isinstance(config, Flux2Config):
        statistic = jax.ShapeDtypeStruct((4 * config.latent_channels,), jnp.float32)
        shapes |= {("bn", "running_mean"): statistic, ("bn", "running_var"): statistic}
    return shapes
