"""Values of settings as a user gives them: paths expanded, numbers and names checked."""

import math
from typing import Any

from utils.base.files import expand_home
from utils.base.messages import UserError
from utils.codecs.codecs import expand_codec
from utils.data.loaders import expand_name
from utils.storage.urls import is_url, refuse_url


def expand_path(path: str, flag: str) -> str:
    """Returns a path with a leading ~ or ~user replaced, also within the name of a data set (folder:~/x) or a codec.

    Raises UserError if there is no such home, and for URLs that are not supported.
    """
    if flag == "dataset_name":
        return expand_name(path)
    if flag in ("codec", "preview"):
        return expand_codec(path, flag)
    if flag == "train_images" and is_url(path.partition(":")[2]):
        return path  # a data set, such as zip:s3://BUCKET/FILE
    refuse_url(path, flag)
    return expand_home(path, f"--{flag}={path}")


def check_given(name: str, value: Any, is_path: bool) -> Any:
    """Returns the value that a user gives for setting `name`, paths expanded.

    Raises UserError for numbers that are not finite or beyond 32 bits, and for names that no file can have.
    """
    # Numbers: seeds have 32 bits, and what goes into compiled functions has 31 and a sign.
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name}={value} is no finite number; give one")
    if isinstance(value, int) and name == "seed" and not 0 <= value < 2**32:
        raise UserError(f"--seed={value}: use a number from 0 to {2**32 - 1}")
    if isinstance(value, int) and name != "seed" and abs(value) >= 2**31:
        raise UserError(f"--{name}={value} is too large; use a number below {2**31}")

    # Paths: file systems take 255 bytes between two slashes.
    if is_path and isinstance(value, str):
        value = expand_path(value, name)
        if not value or any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in value.split("/")):
            raise UserError(f"--{name}={value[:60]}: a name of 1 to 255 bytes is needed")
    return value
