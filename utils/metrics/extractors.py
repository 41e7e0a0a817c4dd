"""The feature networks by name, and the names of their features.

A new one is a function, a record of its features and a line of EXTRACTORS (docs/change_this.md).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Sharding
from jaxtyping import Array, Float, UInt8

from utils.base.messages import UserError
from utils.base.settings import check_made, unknown_name
from utils.metrics.dinov2 import load_dinov2, read_dinov2
from utils.metrics.inception import INCEPTION_SHA256, NUM_FEATURES, NUM_SPATIAL, load_inception

# The network of FID: its arrays have names of their own in statistics files (reference.array_names).
DEFAULT_EXTRACTOR = "inception"

# Images -> {feature: its rows}, on the devices.
Extract = Callable[[UInt8[Array, "b h w 3"]], Mapping[str, Float[Array, "b _"]]]


class ExtractorOptions(NamedTuple):
    """The flags of networks whose weights the user names, each by its name; None where it is not given."""

    extractor_weights: str | Path | None = None
    preprocessing: str | None = None
    extractor_dtype: str | None = None

    @classmethod
    def of(cls, settings: Any) -> "ExtractorOptions":
        """Returns the options among the attributes of `settings`, flags or a group of a run's settings."""
        return cls(*(getattr(settings, name) for name in cls._fields))


class Extractor(NamedTuple):
    """A feature network with its preprocessing.

    `features` are {feature: width}. The first is the main one: its rows are kept beside its moments, for KID, MIND,
    precision and the like. `load(weights, convention, sharding)` returns the function from images to
    features, with its weights placed by `sharding`; `weights` is a local copy of them, or None; `convention` is
    Inception's (see utils/metrics/inception.py), None for every other network.

    `configure(options)` returns the record of the weights that the options name, with their widths and hash, and the
    options that its features depend on as `details`, by the names of their flags. `image_bytes` is what a device needs
    for each image at work, by which batches are chosen; 0: whatever the batch, it is small.
    """

    features: Mapping[str, int]
    load: Callable[[str | Path | None, str | None, Sharding | None], Extract]
    sha256: str | None = None  # of the weights
    configure: Callable[[ExtractorOptions], "Extractor"] | None = None
    details: Mapping[str, str] = {}
    image_bytes: int = 0

    @property
    def main_feature(self) -> str:
        return next(iter(self.features))

    @property
    def words(self) -> list[str]:
        """Returns what tells one configuration from another in the name of a file; empty where there is one."""
        return [*self.details.values(), f"{self.sha256:.12}"] if self.details else []


def configure_dinov2(options: ExtractorOptions) -> Extractor:
    """Reads DINOv2's weights. Raises UserError where they are missing or of another network."""
    network = read_dinov2(*options)
    return Extractor(
        {"cls": network.width},
        lambda weights, convention, sharding: network.load(sharding),  # both are about Inception
        network.sha256,
        details={"preprocessing": network.preprocessing, "extractor_dtype": network.dtype},
        image_bytes=network.image_bytes,
    )


EXTRACTORS: dict[str, Extractor] = {
    DEFAULT_EXTRACTOR: Extractor({"pool": NUM_FEATURES, "spatial": NUM_SPATIAL}, load_inception, INCEPTION_SHA256),
    "dinov2": Extractor({"cls": 1024}, load_dinov2, configure=configure_dinov2),
}


class FeatureKey(NamedTuple):
    """One feature of one extractor: the key of statistics, in memory and in files."""

    extractor: str
    feature: str

    @property
    def is_main(self) -> bool:
        """Whether rows of this feature are kept, beside their moments."""
        return self != PIXELS and EXTRACTORS[self.extractor].main_feature == self.feature


# Inception's: FID and most metrics read `pool`, sFID reads `spatial` (utils/metrics/metrics.py).
POOL = FeatureKey(DEFAULT_EXTRACTOR, "pool")
SPATIAL = FeatureKey(DEFAULT_EXTRACTOR, "spatial")
# DINOv2's class token, which FD-DINOv2 reads.
CLASS_TOKEN = FeatureKey("dinov2", "cls")
# The images themselves, for which there is no network.
PIXELS = FeatureKey("pixels", "images")


def check_extractors(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names, each once. Raises UserError for an unknown name and for an empty list."""
    # In the order given, which a set would lose.
    text = ",".join(names)
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in EXTRACTORS:
            which = "" if name == text else f": {name or 'an empty name'}"
            raise unknown_name(f"--extractor={text}{which}", name, EXTRACTORS)
    return names


def takes_options(names: Iterable[str]) -> bool:
    """Returns whether one of these extractors has the options of ExtractorOptions."""
    return any(EXTRACTORS[name].configure for name in names)


def configure_extractors(names: Iterable[str], options: ExtractorOptions) -> dict[str, Extractor]:
    """Returns {name: record}, of those that take options with the weights that the options name.

    Raises UserError for an unknown name, and for weights that are missing or of another network.
    """
    extractors = {name: EXTRACTORS[name] for name in check_extractors(names)}
    return {name: found.configure(options) if found.configure else found for name, found in extractors.items()}


def _records(extractors: Iterable[str] | Mapping[str, Extractor]) -> Mapping[str, Extractor]:
    return extractors if isinstance(extractors, Mapping) else {name: EXTRACTORS[name] for name in extractors}


def feature_widths(extractors: Iterable[str] | Mapping[str, Extractor]) -> dict[FeatureKey, int]:
    """Returns the widths of all features of these extractors, given by name or configured, the main one of each
    first."""
    records = _records(extractors)
    return {FeatureKey(name, feature): width for name in records for feature, width in records[name].features.items()}


def load_extractors(
    extractors: Iterable[str] | Mapping[str, Extractor] = (DEFAULT_EXTRACTOR,),
    weights: str | Path | None = None,
    convention: str | None = None,
    sharding: Sharding | None = None,
) -> dict[str, Extract]:
    """Returns {name: function from images to features} of extractors, given by name or configured.

    `weights`: local copy of Inception's weights. `convention`: one of Inception's `CONVENTIONS`. `sharding`: where the
    weights live, the default device if None. Raises UserError for an unknown name or convention, and for weights that
    cannot be had or are not the published ones.
    """
    check_extractors(extractors)
    loaded = {}
    for name, extractor in _records(extractors).items():
        # --inception_weights and --convention are about Inception alone.
        options = (weights, convention) if name == DEFAULT_EXTRACTOR else (None, None)
        extract = extractor.load(*options, sharding)
        check_made(extract, Callable, f"the loader of --extractor={name}")
        loaded[name] = _checking(name, extractor, extract)
    return loaded


def _checking(name: str, extractor: Extractor, extract: Extract) -> Extract:
    """Returns `extract` of an extractor, which raises UserError for features that its record does not declare."""
    widths = extractor.features

    # Statistics of other widths would be refused only where they are read, after all of the work.
    def extract_checked(images):
        features = extract(images)
        found = {feature: tuple(rows.shape) for feature, rows in features.items()}
        if found != {feature: (len(images), width) for feature, width in widths.items()}:
            declared = ", ".join(f"{feature} (b, {width})" for feature, width in widths.items())
            made = ", ".join(f"{feature} {shape}" for feature, shape in found.items())
            raise UserError(
                f"--extractor={name} makes {made} of {len(images)} images, but its record declares {declared}; "
                "correct one of the two (docs/change_this.md)"
            )
        return features

    return extract_checked
