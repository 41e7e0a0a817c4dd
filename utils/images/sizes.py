"""Sizes of images as users write them: 256 for a square, 24x40 for 24 rows of 40 pixels."""

import re
from collections.abc import Sequence
from typing import Any

MAX_SIDE = 2**13

Size = tuple[int, int]  # height, width


def parse_size(value: Any) -> int | str:
    """Returns a size as settings and config.json hold it: the side of a square as an integer, else 'HEIGHTxWIDTH'.

    `value` is either of them, as it is or as text, or (height, width). Raises ValueError for any other value.
    """
    words = [str(side) for side in value] if isinstance(value, (list, tuple)) else str(value).lower().split("x")
    # The pattern keeps out what int() would take: signs, spaces, underscores, digits of other scripts.
    sides = [int(word) for word in words if re.fullmatch(r"[0-9]{1,9}", word)]
    if len(sides) != len(words) or len(sides) not in (1, 2) or not all(1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"use the side of a square, such as 256, or rows x columns, such as 24x40, up to {MAX_SIDE}")
    return write_size((sides[0], sides[-1]))


def read_size(value: int | str | Sequence[int]) -> Size:
    """Returns (height, width) of a size in any form. Raises the ValueError of `parse_size`."""
    height, _, width = str(parse_size(value)).partition("x")
    return int(height), int(width or height)


def write_size(size: Sequence[int]) -> int | str:
    """Returns (height, width) as it is written: 256, or '24x40'."""
    height, width = size
    return height if height == width else f"{height}x{width}"
