"""The network of KL autoencoders (Rombach et al., arXiv:2112.10752)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from utils.codecs.kl_config import KLConfig
from utils.kernels.ops import attention

# The modules below are named as the tensors in the weights file are, so that one rule converts all of them.


class KLModule(nn.Module):
    """Layers that all parts have. Normalisation takes its statistics in float32, whatever the compute dtype."""

    config: KLConfig
    dtype: Any

    def conv(self, channels: int, name: str, side: int = 3, **kwargs) -> nn.Conv:
        return nn.Conv(channels, (side, side), dtype=self.dtype, name=name, **kwargs)

    def norm(self, name: str) -> nn.GroupNorm:
        return nn.GroupNorm(self.config.norm_num_groups, epsilon=1e-6, dtype=self.dtype, name=name)


class ResnetBlock(KLModule):
    """Two convolutions beside a shortcut, (b, h, w, c) -> (b, h, w, channels)."""

    channels: int

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.channels, "conv1")(nn.silu(self.norm("norm1")(x)))
        y = self.conv(self.channels, "conv2")(nn.silu(self.norm("norm2")(y)))
        return y + (x if x.shape[-1] == self.channels else self.conv(self.channels, "conv_shortcut", side=1)(x))


class AttentionBlock(KLModule):
    """Self-attention with one head over all positions."""

    @nn.compact
    def __call__(self, x):
        # One head as wide as the channels: positions are the sequence.
        b, h, w, c = x.shape
        y = self.norm("group_norm")(x).reshape(b, h * w, 1, c)
        query, key, value = (nn.Dense(c, dtype=self.dtype, name=f"to_{name}")(y) for name in "qkv")
        y = attention(query, key, value)
        return x + nn.Dense(c, dtype=self.dtype, name="to_out_0")(y).reshape(x.shape)


class MidBlock(KLModule):
    @nn.compact
    def __call__(self, x):
        x = ResnetBlock(self.config, self.dtype, x.shape[-1], name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = AttentionBlock(self.config, self.dtype, name="attentions_0")(x)
        return ResnetBlock(self.config, self.dtype, x.shape[-1], name="resnets_1")(x)


class Downsampler(KLModule):
    @nn.compact
    def __call__(self, x):
        return self.conv(x.shape[-1], "conv", strides=2, padding=((0, 1), (0, 1)))(x)  # right and bottom only


class Upsampler(KLModule):
    @nn.compact
    def __call__(self, x):
        return self.conv(x.shape[-1], "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class Stage(KLModule):
    """A stage of `depth` residual blocks of one width, each followed by attention where the stage has it, then, if
    `resample` names one, a change of size."""

    channels: int
    depth: int
    has_attention: bool
    resample: str | None  # 'downsamplers_0' or 'upsamplers_0'

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = ResnetBlock(self.config, self.dtype, self.channels, name=f"resnets_{i}")(x)
            if self.has_attention:
                x = AttentionBlock(self.config, self.dtype, name=f"attentions_{i}")(x)
        if self.resample is None:
            return x
        kind = Downsampler if self.resample.startswith("down") else Upsampler
        return kind(self.config, self.dtype, name=self.resample)(x)


class Encoder(KLModule):
    """Images (b, h, w, 3) in [-1, 1] -> (b, h/f, w/f, 2 c): mean and log-variance before the last 1x1 convolution."""

    @nn.compact
    def __call__(self, x):
        widths = self.config.block_out_channels
        depth = self.config.layers_per_block
        has_attention = self.config.down_attention or (False,) * len(widths)
        x = self.conv(widths[0], "conv_in")(x.astype(self.dtype))
        # All stages but the last halve the sides.
        for i, width in enumerate(widths):
            resample = "downsamplers_0" if i < len(widths) - 1 else None
            x = Stage(self.config, self.dtype, width, depth, has_attention[i], resample, name=f"down_blocks_{i}")(x)
        x = MidBlock(self.config, self.dtype, name="mid_block")(x)
        return self.conv(2 * self.config.latent_channels, "conv_out")(nn.silu(self.norm("conv_norm_out")(x)))


class Decoder(KLModule):
    """Latents (b, h, w, c) -> images (b, f h, f w, 3)."""

    @nn.compact
    def __call__(self, x):
        widths = self.config.decoder_widths[::-1]
        # One block more in each stage than in the encoder, as in the reference network.
        depth = self.config.layers_per_block + 1
        has_attention = self.config.up_attention or (False,) * len(widths)
        x = self.conv(widths[0], "conv_in")(x.astype(self.dtype))
        x = MidBlock(self.config, self.dtype, name="mid_block")(x)
        # All stages but the last double the sides.
        for i, width in enumerate(widths):
            resample = "upsamplers_0" if i < len(widths) - 1 else None
            x = Stage(self.config, self.dtype, width, depth, has_attention[i], resample, name=f"up_blocks_{i}")(x)
        return self.conv(self.config.out_channels, "conv_out")(nn.silu(self.norm("conv_norm_out")(x)))


class AutoencoderKL(KLModule):
    """The network; `encode` and `decode` neither scale nor shift latents."""

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        channels = self.config.latent_channels
        self.quant_conv = self.pointwise_conv(2 * channels) if self.config.use_quant_conv else None
        self.post_quant_conv = self.pointwise_conv(channels) if self.config.use_post_quant_conv else None

    def pointwise_conv(self, channels: int) -> nn.Conv:
        return nn.Conv(channels, kernel_size=(1, 1), dtype=self.dtype)

    def encode(self, images):
        x = self.encoder(images)
        return self.quant_conv(x) if self.quant_conv else x

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z.astype(self.dtype)) if self.post_quant_conv else z)

    # For initialisation alone: it passes through every layer once.
    def __call__(self, images):
        return self.decode(jnp.split(self.encode(images), 2, axis=-1)[0])
