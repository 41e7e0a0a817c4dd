"""Files of statistics: names of their arrays, and how they are written; reference.py reads them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from utils.base.files import atomic_write
from utils.metrics.extractors import (
    DEFAULT_EXTRACTOR,
    EXTRACTORS,
    POOL,
    SPATIAL,
    Extractor,
    FeatureKey,
    feature_widths,
)
from utils.metrics.pixels import pixel_arrays
from utils.metrics.statistics import ImageStatistics

# Scalars beside the arrays; a file may lack any of them.
METADATA = ("num_images", "convention", "dataset", "image_shape")

# {array: its shape}, as the headers of a file state them.
Shapes = Mapping[str, tuple[int, ...]]


class ArrayNames(NamedTuple):
    """Names of one feature's arrays in a statistics file."""

    mu: str
    sigma: str
    rows: str


# The names that TTUR, pytorch-fid and ADM's evaluator gave to Inception's, so that files can be exchanged with them.
_INCEPTION_NAMES = {
    POOL: ArrayNames("mu", "sigma", "features"),
    SPATIAL: ArrayNames("mu_s", "sigma_s", "features_s"),
}


def array_names(key: FeatureKey) -> ArrayNames:
    """Returns the names of a feature's arrays: EXTRACTOR.FEATURE.mu and so on; Inception's have shorter ones."""
    prefix = ".".join(key)
    return _INCEPTION_NAMES.get(key) or ArrayNames(f"{prefix}.mu", f"{prefix}.sigma", f"{prefix}.rows")


def format_shape(image_shape: Sequence[int]) -> str:
    """Returns (height, width, channels) as in '32x32x3'."""
    return "x".join(map(str, image_shape))


def statistics_bytes(
    num_rows: int,
    extractors: Iterable[str] | Mapping[str, Extractor] = (DEFAULT_EXTRACTOR,),
    image_shape: Sequence[int] = (0,),
) -> int:
    """Returns the most bytes that `save_statistics` writes with `num_rows` rows of each main feature, and moments of
    images of `image_shape`."""
    widths = feature_widths(extractors)
    # As if nothing were compressed: float32 for both, and 1 MB for means and metadata.
    covariances = 4 * sum(width**2 for width in widths.values())
    rows = 4 * num_rows * sum(width for key, width in widths.items() if key.is_main)
    moments = 3 * 8 * math.prod(image_shape)  # mean, deviation, and no more for the spectrum
    return covariances + rows + moments + 2**20


def save_statistics(
    path: str | Path,
    statistics: ImageStatistics,
    *,
    convention: str | None,
    dataset: str,
    extractors: Mapping[str, Extractor] = EXTRACTORS,
    split: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    label_counts: Int[np.ndarray, " classes"] | None = None,
    is_compact: bool = False,
    total_images: int | None = None,
) -> None:
    """Writes statistics and where they come from as a compressed npz; the file appears whole or not at all.

    `convention` is Inception's, None without it. `extractors` are the records of what made the features, configured
    where they can be. `total_images` is the number of images of the data, of which fewer may
    have been taken. `is_compact` leaves out the mean and covariance, which follow from the rows where those of all
    images are kept; other suites do not read such a file.

    Means are float64. Covariances are float32, half the size: that moves an FID by less than 1e-6 of itself where there
    are more samples than features; with fewer, where an FID says little anyway, rounding fills the null space and moves
    it by up to 1e-3. Raises UserError below two samples.
    """
    content: dict[str, Any] = {}
    # The arrays of every feature.
    for key, kept in statistics.by_feature.items():
        names = array_names(key)
        # A compact file needs the rows of all images: fewer do not give their moments.
        if not (is_compact and key.is_main and kept.num_samples <= kept.max_rows):
            content |= {names.mu: kept.mu, names.sigma: kept.sigma.astype(np.float32)}
        if kept.rows is not None:
            content[names.rows] = kept.rows
    if statistics.pixels is not None:
        content |= pixel_arrays(statistics.pixels)

    # Where they come from: the convention above all, without which an FID cannot be trusted.
    if label_counts is not None:
        content["label_counts"] = label_counts
    content |= {"num_images": statistics.num_samples, "dataset": dataset, "split": split or ""}
    if convention is not None:
        content["convention"] = convention
    for name in dict.fromkeys(key.extractor for key in statistics.by_feature):
        recorded = "inception_sha256" if name == DEFAULT_EXTRACTOR else f"{name}.sha256"
        content[recorded] = extractors[name].sha256 or ""
        content |= {f"{name}.{detail}": value for detail, value in extractors[name].details.items()}
    if total_images is not None:
        content["total_images"] = total_images
    if image_shape is not None:
        content["image_shape"] = format_shape(image_shape)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **content)
