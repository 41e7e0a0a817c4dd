"""Reference statistics, which samples are compared with: read from files that are checked first."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num

from utils.base.commands import write_command
from utils.base.external import BadFileError, read_npz_headers
from utils.base.files import file_sha256
from utils.base.messages import UserError, warn
from utils.metrics.extractors import (
    DEFAULT_EXTRACTOR,
    EXTRACTORS,
    PIXELS,
    Extractor,
    ExtractorOptions,
    FeatureKey,
    feature_widths,
    takes_options,
)
from utils.metrics.other_files import StoredArrays, open_arrays
from utils.metrics.pixels import PixelReference, check_pixel_shapes, read_pixels
from utils.metrics.scores import check_gaussian, covariance_root
from utils.metrics.statistics import FeatureStatistics
from utils.metrics.statistics_files import METADATA, Shapes, array_names, format_shape
from utils.storage.staging import local_copy

MAX_ROWS = 50_000  # rows that a statistics file may hold: 0.4 GB of Inception's as float32
# Beside the features of an extractor, as EXTRACTOR.DETAIL: on what else they depend.
DETAILS = ("sha256", "preprocessing", "extractor_dtype")


@dataclasses.dataclass(frozen=True)
class FeatureReference:
    """Statistics of one feature over the reference's images; `rows` are the features of the first of them."""

    mu: Float[np.ndarray, " d"]
    sigma: Float[np.ndarray, "d d"]
    rows: Float[np.ndarray, "n d"] | None = None
    name: str = "covariance"  # of sigma in messages

    @functools.cached_property
    def root(self) -> Float[np.ndarray, "d r"]:
        """L with L L^T = sigma, for any number of distances. Raises ValueError where sigma is not semi-definite."""
        # Cached: of 2048 features it takes most of a second, and every distance needs it.
        return covariance_root(self.sigma, self.name)


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of the images that samples are compared with, by feature; a field is None where the file lacks it."""

    by_feature: Mapping[FeatureKey, FeatureReference]
    # Identity of the file: results record it, and `find_convention` knows some files by it.
    sha256: str
    path: Path
    # What the file says of its origin.
    num_images: int | None = None
    convention: str | None = None
    dataset: str | None = None
    image_shape: str | None = None  # such as '32x32x3'
    label_counts: Num[np.ndarray, " classes"] | None = None
    pixels: PixelReference | None = None  # moments of the images themselves
    details: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {"dinov2.sha256": ...}, see `check_details`

    def __getitem__(self, key: FeatureKey) -> Any:  # FeatureReference, of PIXELS PixelReference
        return self.pixels if key == PIXELS else self.by_feature[key]

    def __contains__(self, key: FeatureKey) -> bool:
        return self.pixels is not None if key == PIXELS else key in self.by_feature

    @property
    def has_rows(self) -> bool:
        """Whether the rows of every main feature are kept."""
        return all(reference.rows is not None for key, reference in self.by_feature.items() if key.is_main)

    def with_rows(self, others: "ReferenceStatistics") -> "ReferenceStatistics":
        """Returns these statistics with the rows of others of the same images."""
        by_feature = {
            key: dataclasses.replace(reference, rows=others[key].rows) if key.is_main else reference
            for key, reference in self.by_feature.items()
        }
        return dataclasses.replace(self, by_feature=by_feature, pixels=others.pixels)


def load_statistics(path: str | Path, widths: Mapping[FeatureKey, int] | None = None) -> ReferenceStatistics:
    """Reads reference statistics, moments as float64 and rows as float32.

    `widths` are {feature: width} of the features to read; default: Inception's. The file must have the first feature of
    each extractor; the others are read where it has them. Inception's are read from an npz with `mu` (d,) and `sigma`
    (d, d): the files of TTUR, pytorch-fid, jax-flow and EDM, ADM's VIRTUAL_*.npz (with `mu_s` and `sigma_s`), and what
    `save_statistics` writes; or from files of EDM2, clean-fid, torch-fidelity and dgm-eval (other_files.py). A file may
    instead have the rows of all images, from which both moments are computed.

    Raises UserError for a file that is missing, broken, incomplete, of another extractor or not finite.
    """
    path = local_copy(path, "fid_stats")
    widths = feature_widths([DEFAULT_EXTRACTOR]) if widths is None else widths
    fix = f"make it: {_command(widths, '--dataset_name', 'NAME')}"
    if not path.is_file():
        raise UserError(f"--fid_stats={path} is not a file; {fix}")
    try:
        # Each step trusts no more than the one before has checked: hash, headers, names, shapes, arrays.
        sha256 = file_sha256(path)
        arrays = open_arrays(path)
        shapes, read = arrays.shapes, arrays.read
        keys = _find_keys(path, shapes, widths)
        # Shapes first: nothing is read that no memory holds.
        _check_shapes(shapes, {key: widths[key] for key in keys})
        check_pixel_shapes(shapes)
        recorded = [f"{key.extractor}.{detail}" for key in keys for detail in DETAILS]
        content = read([name for name in (*METADATA, *recorded, "label_counts") if name in shapes])
        by_feature = {key: _read_feature(path, key, arrays, content, widths) for key in keys}
        counts = _read_label_counts(content)
        pixels = read_pixels(shapes, read)
    # Errors that already name the flag and the fix.
    except UserError:
        raise
    except (BadFileError, OSError, TypeError) as error:
        raise UserError(f"--fid_stats={path} is not a whole npz (or pickle) of numbers ({error}); {fix}") from error
    except ValueError as error:
        # float16 leaves eigenvalues below what rounding to float32 explains.
        hint = " (covariances need float32 at least)" if "eigenvalue" in str(error) else ""
        raise UserError(f"--fid_stats={path}: {error}{hint}; {fix}") from None

    # Scalars, by the names of the fields.
    metadata = {name: content[name].item() for name in METADATA if name in content}
    details = {name: str(content[name]) for name in recorded if name in content}
    return ReferenceStatistics(
        by_feature, sha256, path, **metadata, label_counts=counts, pixels=pixels, details=details
    )


def _has_moments(key: FeatureKey, shapes: Shapes) -> bool:
    names = array_names(key)
    return names.mu in shapes and names.sigma in shapes


def _is_compact(key: FeatureKey, shapes: Shapes) -> bool:
    """Whether a file has rows instead of their moments."""
    names = array_names(key)
    return key.is_main and names.rows in shapes and not {names.mu, names.sigma} & shapes.keys()


def _find_keys(path: Path, shapes: Shapes, widths: Mapping[FeatureKey, int]) -> list[FeatureKey]:
    """Returns the features among `widths` that a file has. Raises UserError where it lacks an extractor's main one."""
    # Secondary features, such as that of sFID, may be missing; a main one may not.
    keys = [key for key in widths if _has_moments(key, shapes) or _is_compact(key, shapes)]
    for key in widths:
        if not key.is_main or key in keys:
            continue

        # The file of another extractor needs another command than one that holds no statistics at all.
        recorded = [name for name in EXTRACTORS if _holds_extractor(name, shapes) and name != key.extractor]
        if recorded and not _holds_extractor(key.extractor, shapes):
            raise UserError(
                f"--fid_stats={path} holds statistics of {' and '.join(recorded)}, none of {key.extractor}; make them: "
                f"{_command(widths, '--dataset_name', 'NAME')}"
            )
        raise _missing_moments(path, key, widths)
    return keys


def _holds_extractor(name: str, shapes: Shapes) -> bool:
    keys = [FeatureKey(name, feature) for feature in EXTRACTORS[name].features]
    return any(_has_moments(key, shapes) or _is_compact(key, shapes) for key in keys)


def _command(widths: Mapping[FeatureKey, int], *words: object) -> str:
    """Returns the command that makes statistics of all extractors among the features `widths`; none: of pixels."""
    names = list(dict.fromkeys(key.extractor for key in widths))
    what = ["--extractor", ",".join(names)] if names else ["--metrics", "moments"]
    what += ["--extractor_weights", "WEIGHTS"] if takes_options(names) else []
    return write_command(
        "compute_fid_stats.py", *words, *(what if names != [DEFAULT_EXTRACTOR] else []), "--out", "FILE.npz"
    )


def _missing_moments(path: Path, key: FeatureKey, widths: Mapping[FeatureKey, int]) -> UserError:
    names = array_names(key)
    return UserError(
        f"--fid_stats={path} holds no `{names.mu}` and `{names.sigma}`; if it holds images, make it: "
        f"{_command(widths, '--images', path)}"
    )


def _check_shapes(shapes: Shapes, widths: Mapping[FeatureKey, int]) -> None:
    """Raises ValueError for shapes, as a file states them, that no metric could use or no memory hold."""
    for key, width in widths.items():
        # A missing array passes as expected: `_find_keys` has said which features are there.
        names = array_names(key)
        expected = {names.mu: (width,), names.sigma: (width, width)}
        found = {name: shapes.get(name, shape) for name, shape in expected.items()}
        if key.is_main and found != expected:
            described = ", ".join(f"{name} {shape}" for name, shape in found.items())
            raise ValueError(f"it is not of {width} features ({described})")
        for name, shape in expected.items():
            if found[name] != shape:
                raise ValueError(f"`{name}` has the shape {found[name]}, not {shape}")

        # Rows: at least two for a covariance, at most what memory is meant for.
        rows = shapes.get(names.rows)
        if key.is_main and rows is not None and (rows[1:] != (width,) or not 2 <= rows[0] <= MAX_ROWS):
            raise ValueError(f"`{names.rows}` has the shape {rows}, not (2 to {MAX_ROWS:,}, {width})")

    # The facts beside the features: scalars, and one count for each class.
    for name in (*METADATA, *(f"{key.extractor}.{detail}" for key in widths for detail in DETAILS)):
        if shapes.get(name, ()) != ():
            raise ValueError(f"`{name}` has the shape {shapes[name]}, not ()")
    counts = shapes.get("label_counts")
    if counts is not None and (len(counts) != 1 or not 1 <= counts[0] <= 10**6):
        raise ValueError(f"`label_counts` has the shape {counts}, not (classes,)")


def _read_feature(
    path: Path,
    key: FeatureKey,
    arrays: StoredArrays,
    content: Mapping[str, np.ndarray],
    widths: Mapping[FeatureKey, int],
) -> FeatureReference:
    """Reads the moments of one feature and, for a main one, the rows that the file has."""
    names = array_names(key)
    has_rows = key.is_main and names.rows in arrays.shapes
    if _is_compact(key, arrays.shapes):
        # The moments of some of the images would pass for those of all.
        if "num_images" not in content or int(content["num_images"]) != arrays.shapes[names.rows][0]:
            raise _missing_moments(path, key, widths)
        rows = _read_rows(arrays, names.rows)
        statistics = FeatureStatistics()
        statistics.update(rows)
        return FeatureReference(statistics.mu, statistics.sigma, rows)

    # The moments as the file has them. Text would convert to numbers without an error.
    moments = arrays.read([names.mu, names.sigma])
    for name, array in moments.items():
        if array.dtype.kind == "U":
            raise BadFileError(f"`{name}` is a text")
    mu = moments[names.mu].astype(np.float64)
    sigma = moments[names.sigma].astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("it holds NaN or infinity")
    # Checked now, rather than once all samples have been drawn.
    name = f"`{names.sigma}`"
    mu, sigma = check_gaussian(mu, sigma, name)
    found = FeatureReference(mu, sigma, _read_rows(arrays, names.rows) if has_rows else None, name)
    _ = found.root
    return found


def _read_rows(arrays: StoredArrays, name: str) -> Float[np.ndarray, "n d"]:
    """Reads rows as float32, in parts: they may take 0.4 GB. Raises ValueError unless they are finite numbers."""
    features = np.empty(arrays.shapes[name], np.float32)
    place = 0
    for rows in arrays.read_rows(name):
        # In parts too: a mask of all entries would take another 0.1 GB.
        if not np.isfinite(rows).all():
            raise ValueError("it holds NaN or infinity")
        features[place : place + len(rows)] = rows
        place += len(rows)
    return features


def _read_label_counts(content: Mapping[str, np.ndarray]) -> Float[np.ndarray, " classes"] | None:
    if "label_counts" not in content:
        return None
    if content["label_counts"].dtype.kind == "U":
        raise BadFileError("`label_counts` is a text")
    counts = content["label_counts"].astype(np.float64)
    if not np.isfinite(counts).all():
        raise ValueError("it holds NaN or infinity")
    # Whole numbers of images, at least one of them.
    if (counts < 0).any() or counts.sum() < 1 or (counts % 1).any():
        raise ValueError("`label_counts` are not numbers of images")
    return counts


def has_statistics(path: Path) -> bool:
    """Whether a file, which may be an npz of images, holds statistics too; True where its headers cannot be read."""
    if path.is_dir() or path.suffix == ".npy":
        return False
    try:
        return any(name in ("mu", "pixels.mean") or name.endswith(".mu") for name in read_npz_headers(path))
    except BadFileError:
        return True  # which `load_statistics` refuses, with the reason


def warn_of_other_shape(reference: ReferenceStatistics, image_shape: Sequence[int]) -> None:
    """Warns where samples are not of the size of the reference's images."""
    shape = format_shape(image_shape)
    if reference.image_shape not in (None, shape):
        warn(
            f"{reference.path} is of {reference.image_shape} images, the samples are {shape}: "
            "the result says nothing about a model at either size"
        )


def check_details(
    reference: ReferenceStatistics, extractors: Mapping[str, Extractor], options: ExtractorOptions
) -> None:
    """Raises UserError where statistics were made by other weights or options than those of `extractors`.

    `options` are what the user gave: a file that does not record what its features depend on needs it said.
    """
    for name, extractor in extractors.items():
        for detail, value in extractor.details.items():
            recorded = reference.details.get(f"{name}.{detail}")
            if recorded is None and detail == "preprocessing" and options.preprocessing is None:
                raise UserError(
                    f"--fid_stats={reference.path} does not record how its images entered {name}: give --preprocessing "
                    "dgm_eval for features of dgm-eval, edm2 for those of EDM2"
                )
            if recorded not in (None, value):
                raise UserError(
                    f"--{detail}={value}: --fid_stats={reference.path} was made under {recorded}; give --{detail} "
                    f"{recorded}, or make it anew"
                )
        # Weights by the hash of their numbers, whichever library saved them.
        recorded = reference.details.get(f"{name}.sha256")
        if extractor.details and recorded not in (None, "", extractor.sha256):
            raise UserError(
                f"--extractor_weights={options.extractor_weights} has other weights (sha256 {extractor.sha256:.12}..) "
                f"than those that made --fid_stats={reference.path} ({recorded:.12}..); both sides need the same"
            )


class Convention(NamedTuple):
    """The way in which images enter Inception (see inception.CONVENTIONS), and the source of this knowledge."""

    name: str
    source: str  # 'file', 'known file', 'flag' or 'default'


# Statistics in use that do not record their convention, by the SHA-256 of the file.
KNOWN_FILES = {
    # CIFAR-10's 50,000 training images, by pytorch-fid.
    "e804fcd35bc1333c1b25fdcc048ad3a96cf1b9f795a97d46cab9f4830ff7b57e": "pytorch_fid",
}


def find_convention(reference: ReferenceStatistics, requested: str | None) -> Convention:
    """Returns the convention under which statistics were made.

    Raises UserError where neither they nor the user tell, or both do and differ: under another one, the FID would be
    wrong without a sign of it.
    """
    # What the file says, or is known to be, outweighs the flag: the two may agree, not differ.
    known = KNOWN_FILES.get(reference.sha256)
    recorded = reference.convention or known
    if recorded and requested and recorded != requested:
        raise UserError(f"--convention={requested}, but {reference.path} was made under {recorded}; leave the flag out")
    if requested and not recorded:
        return Convention(requested, "flag")
    if not recorded:
        raise UserError(
            f"--fid_stats={reference.path} does not record how its images entered Inception: give --convention "
            "pytorch_fid for files that pytorch-fid made, clean for clean-fid's, adm for those of TTUR, ADM, DiT, EDM "
            "and jax-flow"
        )
    return Convention(recorded, "file" if reference.convention else "known file")
