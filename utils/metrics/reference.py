"""Reference statistics: the files samples are compared with, read with care and written whole."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from utils.base.console import warn
from utils.base.errors import UserError
from utils.base.external import BadFileError, read_npz, read_npz_headers, read_rows
from utils.base.files import atomic_write, file_sha256
from utils.base.pickles import read_pickled_arrays
from utils.metrics.fid import check_covariance, covariance_root
from utils.metrics.statistics import FeatureStatistics, ImageStatistics

# Of the network in utils/metrics/inception.py: pool3, and seven channels at 17x17 places.
POOL_FEATURES = 2048
SPATIAL_FEATURES = 2023
MAX_FEATURES = 50_000  # rows that a statistics file may hold: 0.4 GB as float32
ROWS_AT_A_TIME = 1024

# Names in a statistics file of what it may hold beside `mu` and `sigma`, by field of ReferenceStatistics.
_METADATA = ("num_images", "convention", "dataset", "image_shape")
_ARRAYS = {"spatial_mu": "mu_s", "spatial_sigma": "sigma_s", "features": "features", "label_counts": "label_counts"}


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of the images that samples are compared with; None where the file does not have them."""

    mu: Float[np.ndarray, " d"]
    sigma: Float[np.ndarray, "d d"]
    sha256: str
    path: Path
    num_images: int | None = None
    convention: str | None = None
    dataset: str | None = None
    image_shape: str | None = None  # such as '32x32x3'
    spatial_mu: Float[np.ndarray, " s"] | None = None
    spatial_sigma: Float[np.ndarray, "s s"] | None = None
    features: Float[np.ndarray, "n d"] | None = None  # pool3, of the first images
    label_counts: Num[np.ndarray, " classes"] | None = None

    @functools.cached_property
    def root(self) -> Float[np.ndarray, "d d"]:
        """Of the covariance, for any number of distances from it."""
        return covariance_root(self.sigma)

    @functools.cached_property
    def spatial_root(self) -> Float[np.ndarray, "s s"]:
        assert self.spatial_sigma is not None
        return covariance_root(self.spatial_sigma)


def load_statistics(path: str | Path, num_features: int = POOL_FEATURES) -> ReferenceStatistics:
    """Reference statistics, in float64, from an npz with `mu` (d,) and `sigma` (d, d): those of TTUR, pytorch-fid,
    jax-flow and EDM, ADM's VIRTUAL_*.npz (with `mu_s` and `sigma_s`), and what `save_statistics` writes; or from EDM2's
    pickle of {"fid": {"mu", "sigma"}}. Both follow from the features where a file has those of all images instead.

    Everything else is read where the file has it. UserError for a file that is missing, broken, incomplete, of another
    network or not finite.
    """
    path = Path(path)
    fix = "make it: compute_fid_stats.py --dataset_name NAME --out FILE.npz"
    if not path.is_file():
        raise UserError(f"--fid_stats={path} is not a file; {fix}")
    try:
        sha256 = file_sha256(path)
        content = _read_statistics(path, num_features)
        mu, sigma = (content[key].astype(np.float64) for key in ("mu", "sigma"))
        metadata = {key: content[key].item() for key in _METADATA if key in content}
        arrays = {field: content[key] for field, key in _ARRAYS.items() if key in content}
        kinds = {field: np.float32 if field == "features" else np.float64 for field in arrays}
        arrays = {field: array.astype(kinds[field], copy=False) for field, array in arrays.items()}
    except KeyError:
        fix = fix.replace("--dataset_name NAME", f"--images {path} (if it holds images)")
        raise UserError(f"--fid_stats={path} holds no `mu` and `sigma`; {fix}") from None
    except (BadFileError, OSError, TypeError) as error:
        raise UserError(f"--fid_stats={path} is not a whole npz (or pickle) of numbers ({error}); {fix}") from error
    except ValueError as error:
        raise UserError(f"--fid_stats={path}{error}; {fix}") from None
    try:
        if not all(np.isfinite(array).all() for array in (mu, sigma, *arrays.values())):
            raise ValueError("it holds NaN or infinity")
        check_covariance(mu, sigma, "`sigma`")
        _check_extras(arrays)
        if path.suffix != ".pkl" and "features" not in arrays:
            arrays |= _read_features(path)
    except ValueError as error:
        hint = " (covariances need float32 at least)" if "eigenvalue" in str(error) else ""
        raise UserError(f"--fid_stats={path}: {error}{hint}; {fix}") from None
    return ReferenceStatistics(mu, sigma, sha256, path, **metadata, **arrays)


def format_shape(image_shape: Sequence[int]) -> str:
    """(height, width, channels) as in '32x32x3'."""
    return "x".join(map(str, image_shape))


def warn_of_other_shape(reference: ReferenceStatistics, image_shape: Sequence[int]) -> None:
    """Warns where samples are not of the size of the reference's images."""
    shape = format_shape(image_shape)
    if reference.image_shape not in (None, shape):
        warn(
            f"{reference.path} is of {reference.image_shape} images, the samples are {shape}: Inception resizes both, "
            "but the result says nothing about a model at either size"
        )


def has_statistics(path: Path) -> bool:
    """Whether what holds images, an npz perhaps, holds a mean too."""
    if path.is_dir() or path.suffix == ".npy":
        return False
    try:
        return "mu" in read_npz_headers(path)
    except BadFileError:
        return True  # which `load_statistics` refuses, with the reason


def _read_statistics(path: Path, num_features: int) -> dict[str, np.ndarray]:
    """The arrays of a statistics file by their names in it, their shapes found good before any is read; `features` of
    an npz only where mean and covariance follow from them. KeyError without mean and covariance, BadFileError, or
    ValueError for other shapes."""
    if path.suffix == ".pkl":
        content = read_pickled_arrays(path)
        content = content.get("fid") if isinstance(content, dict) else None
        content = content if isinstance(content, dict) else {}
        content = {name: array for name, array in content.items() if isinstance(array, np.ndarray)}
        shapes = {name: array.shape for name, array in content.items()}
    else:
        headers = read_npz_headers(path)
        shapes = {name: header.shape for name, header in headers.items()}
    is_compact = "features" in shapes and not {"mu", "sigma"} & shapes.keys()
    if is_compact:
        shapes |= {"mu": (num_features,), "sigma": (num_features, num_features)}
    found = f"mu {shapes['mu']}, sigma {shapes['sigma']}"
    if shapes["mu"] != (num_features,) or shapes["sigma"] != (num_features, num_features):
        raise ValueError(f" is not of {num_features} features ({found})")
    _check_sizes(shapes, num_features)
    if path.suffix == ".pkl":
        return content
    names = {"mu", "sigma", *_METADATA, *_ARRAYS.values()} - {"features"}
    if not {"mu_s", "sigma_s"} <= shapes.keys():  # of no use without each other
        names -= {"mu_s", "sigma_s"}
    content = read_npz(path, {name: header for name, header in headers.items() if name in names})
    texts = [key for key in names - set(_METADATA) if key in content and content[key].dtype.kind == "U"]
    if texts:
        raise BadFileError(f"`{texts[0]}` is a text")
    if not is_compact:
        return content
    # The features must be those of all images.
    if int(content["num_images"]) != shapes["features"][0]:
        raise KeyError("sigma")
    content |= read_npz(path, {"features": headers["features"]})
    statistics = FeatureStatistics()
    statistics.update(content["features"])
    return content | {"mu": statistics.mu, "sigma": statistics.sigma}


def _read_features(path: Path) -> dict[str, np.ndarray]:
    """{'features': those of an npz, as float32} or {}; ValueError where they are not finite numbers. They are read last
    and in parts: they may take 0.4 GB."""
    header = read_npz_headers(path).get("features")
    if header is None:
        return {}
    if header.dtype.kind not in "fiub":
        raise ValueError(f"`features` holds {header.dtype}, no numbers")
    if header.is_fortran:
        features = np.asarray(read_npz(path, {"features": header})["features"], np.float32)
    else:
        features, place = np.empty(header.shape, np.float32), 0
        for rows in read_rows(path, "features", ROWS_AT_A_TIME):
            features[place : place + len(rows)] = rows
            place += len(rows)
    if not all(np.isfinite(features[i : i + ROWS_AT_A_TIME]).all() for i in range(0, len(features), ROWS_AT_A_TIME)):
        raise ValueError("it holds NaN or infinity")
    return {"features": features}


def _check_sizes(shapes: dict[str, tuple[int, ...]], num_features: int) -> None:
    """ValueError for shapes, as a file states them, of which no metric could be made, or that no memory holds."""
    for name in _METADATA:
        if shapes.get(name, ()) != ():
            raise ValueError(f": `{name}` has the shape {shapes[name]}, not ()")
    if num_features == POOL_FEATURES and {"mu_s", "sigma_s"} <= shapes.keys():
        for name, shape in {"mu_s": (SPATIAL_FEATURES,), "sigma_s": (SPATIAL_FEATURES,) * 2}.items():
            if shapes[name] != shape:
                raise ValueError(f": `{name}` has the shape {shapes[name]}, not {shape}")
    if any(math.prod(shapes.get(name, ())) > SPATIAL_FEATURES**2 for name in ("mu_s", "sigma_s")):
        raise ValueError(": `sigma_s` is of too many features")
    features, counts = shapes.get("features"), shapes.get("label_counts")
    if features is not None and (features[1:] != (num_features,) or not 2 <= features[0] <= MAX_FEATURES):
        raise ValueError(f": `features` has the shape {features}, not (2 to {MAX_FEATURES:,}, {num_features})")
    if counts is not None and (len(counts) != 1 or not 1 <= counts[0] <= 10**6):
        raise ValueError(f": `label_counts` has the shape {counts}, not (classes,)")


def _check_extras(arrays: dict[str, np.ndarray]) -> None:
    """ValueError for spatial statistics or label counts that metrics could not be made of."""
    if {"spatial_mu", "spatial_sigma"} <= arrays.keys():
        check_covariance(arrays["spatial_mu"], arrays["spatial_sigma"], "`sigma_s`")
    counts = arrays.get("label_counts")
    if counts is not None and ((counts < 0).any() or counts.sum() < 1 or (counts % 1).any()):
        raise ValueError("`label_counts` are not numbers of images")


def statistics_bytes(num_features: int) -> int:
    """The most bytes that `save_statistics` writes with so many rows of features."""
    covariances = 4 * (POOL_FEATURES**2 + SPATIAL_FEATURES**2)
    return covariances + 4 * num_features * POOL_FEATURES + 2**20


def save_statistics(
    path: str | Path,
    statistics: ImageStatistics,
    *,
    convention: str,
    dataset: str,
    split: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    label_counts: Int[np.ndarray, " classes"] | None = None,
    inception_sha256: str | None = None,
    is_compact: bool = False,
    total_images: int | None = None,
) -> None:
    """Writes statistics and where they come from as a compressed npz; the file appears whole or not at all.

    `total_images` is the number of images of the data, of which fewer may have been taken. `is_compact` leaves out the
    mean and covariance, which follow from the features where those of all images are kept; other suites do not read
    such a file.

    Means are float64. Covariances are float32, half the size: that moves an FID by less than 1e-6 of itself where there
    are more samples than features; with fewer, where an FID says little anyway, rounding fills the null space and moves
    it by up to 1e-3. UserError below two samples.
    """
    path, pool, spatial = Path(path), statistics.pool, statistics.spatial
    content: dict[str, Any] = {}
    if not (is_compact and statistics.num_samples <= statistics.max_features):
        content |= {"mu": pool.mu, "sigma": pool.sigma.astype(np.float32)}
    if spatial.num_samples and spatial.mu.size:
        content |= {"mu_s": spatial.mu, "sigma_s": spatial.sigma.astype(np.float32)}
    if statistics.max_features:
        content["features"] = statistics.features
    if label_counts is not None:
        content["label_counts"] = label_counts
    content |= {"num_images": statistics.num_samples, "convention": convention, "dataset": dataset}
    content |= {"split": split or "", "inception_sha256": inception_sha256 or ""}
    if total_images is not None:
        content["total_images"] = total_images
    if image_shape is not None:
        content["image_shape"] = format_shape(image_shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **content)
