"""Changed images for a training on few (EDM, arXiv:2206.00364, appendix F.2): how each is changed, and the change.

The network is told how (utils/conditions/augmented.py), so that its samples are like images as they are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from utils.conditions.augmented import AUGMENTATIONS

# Standard deviations in the paper.
SHIFT = 1 / 8  # of the width and of the height of an image
SCALE = 0.2  # of the logarithm, to base 2, of the factor by which it is enlarged


def draw_augmentation(
    keys: Key[Array, " b"], names: tuple[str, ...], prob: float | Float[Array, ""]
) -> Float[Array, "b 6"]:
    """Returns how images are changed: each by each of `names` with probability `prob`, independently.

    The parameters are 1 for a mirror image, cosine - 1 and sine of a turn by any angle (clockwise), the shift to the
    right and down in units of SHIFT, and the enlargement in units of SCALE; all are zero where nothing is changed.
    """

    def draw(key):
        chance_key, angle_key, size_key = jax.random.split(key, 3)
        # All are drawn, whatever the names, so that one does not depend on the others.
        chances = jax.random.uniform(chance_key, (len(AUGMENTATIONS),))
        angle = jax.random.uniform(angle_key, minval=-jnp.pi, maxval=jnp.pi)
        right, down, size = jax.random.normal(size_key, (3,))
        values = {
            "flip": (1.0,),
            "rotate": (jnp.cos(angle) - 1, jnp.sin(angle)),
            "translate": (right, down),
            "scale": (size,),
        }
        drawn = [
            jnp.where((chance < prob) & (name in names), value, 0.0)
            for chance, name in zip(chances, AUGMENTATIONS, strict=True)
            for value in values[name]
        ]
        return jnp.stack(drawn)

    return jax.vmap(draw)(keys)


def warp(images: Float[Array, "b h w c"], parameters: Float[Array, "b 6"]) -> Float[Array, "b h w c"]:
    """Returns the images mirrored, then enlarged, turned and shifted, see `draw_augmentation`.

    Images of the same scene in any resolution are changed alike. Pixels are interpolated linearly, and what comes into
    view is the image mirrored at its outermost pixels. An image whose parameters are zero stays the same, bit for bit.
    """
    warped = jax.vmap(_warp_image)(images, parameters)
    return jnp.where((parameters != 0).any(axis=1)[:, None, None, None], warped, images)


def _warp_image(image: Float[Array, "h w c"], parameters: Float[Array, "6"]) -> Float[Array, "h w c"]:
    flip, cosine, sine, right, down, size = parameters
    cosine = 1 + cosine
    height, width, _ = image.shape

    # Where each pixel comes from, as seen from the centre: the changes undone in reverse order.
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(height) - middle_y, jnp.arange(width) - middle_x, indexing="ij")
    y -= SHIFT * height * down
    x -= SHIFT * width * right
    shrink = jnp.exp2(-SCALE * size)
    y, x = shrink * (cosine * y - sine * x), shrink * (cosine * x + sine * y)
    y, x = y + middle_y, jnp.where(flip > 0, -x, x) + middle_x

    # The mean of the four pixels around, by their distance.
    top, left = jnp.floor(y), jnp.floor(x)
    below, beside = ((part - whole)[..., None] for part, whole in ((y, top), (x, left)))
    rows = [_reflect(top.astype(jnp.int32) + i, height) for i in (0, 1)]
    columns = [_reflect(left.astype(jnp.int32) + i, width) for i in (0, 1)]
    upper, lower = (image[row, columns[0]] * (1 - beside) + image[row, columns[1]] * beside for row in rows)
    return upper * (1 - below) + lower * below


def _reflect(places: Int[Array, "h w"], count: int) -> Int[Array, "h w"]:
    """Returns places on a line of `count` pixels, mirrored at the first and at the last as often as it takes."""
    period = max(2 * (count - 1), 1)
    places = places % period
    return jnp.minimum(places, period - places)
