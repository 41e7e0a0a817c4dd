"""The codec of a latent model whose VAE is not at hand: everything of latents works, images do not."""

from typing import NoReturn

import flax.struct
from jaxtyping import Array, Float, Key

from utils.base.errors import UserError


class AbsentVAE(flax.struct.PyTreeNode):
    """Raises `reason`, a UserError's message, where it is asked for images or for their latents."""

    reason: str = flax.struct.field(pytree_node=False)
    shape: tuple[int, int, int] = flax.struct.field(pytree_node=False)  # of the latents

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w c"]) -> NoReturn:
        raise UserError(self.reason)

    def decode(self, latents: Float[Array, "b h w c"]) -> NoReturn:
        raise UserError(self.reason)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return self.shape

    @property
    def sha256(self) -> None:
        """It has no weights."""
        return None
