"""The feature networks by name, and the names of their features.

A new one is a function, a record of its features and a line of EXTRACTORS (docs/change_this.md).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Sharding
from jaxtyping import Array, Float, UInt8

from utils.base.messages import UserError
from utils.base.settings import check_made, unknown_name
from utils.metrics.inception import INCEPTION_SHA256, NUM_FEATURES, NUM_SPATIAL, load_inception

# The network of FID: its arrays have names of their own in statistics files (reference.array_names).
DEFAULT_EXTRACTOR = "inception"

# Images -> {feature: its rows}, on the devices.
Extract = Callable[[UInt8[Array, "b h w 3"]], Mapping[str, Float[Array, "b _"]]]


class Extractor(NamedTuple):
    """A feature network with its preprocessing.

    `features` are {feature: width}. The first is the main one: its rows are kept beside its moments, for KID, MIND,
    precision and the like. `load(weights, convention, sharding)` returns the function from images to
    features, with its weights placed by `sharding`; `weights` is a local copy of them, or None; `convention` is
    Inception's (see utils/metrics/inception.py), None for every other network.
    """

    features: Mapping[str, int]
    load: Callable[[str | Path | None, str | None, Sharding | None], Extract]
    sha256: str | None = None  # of the weights

    @property
    def main_feature(self) -> str:
        return next(iter(self.features))


EXTRACTORS: dict[str, Extractor] = {
    DEFAULT_EXTRACTOR: Extractor({"pool": NUM_FEATURES, "spatial": NUM_SPATIAL}, load_inception, INCEPTION_SHA256),
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


def feature_widths(names: Iterable[str]) -> dict[FeatureKey, int]:
    """Returns the widths of all features of these extractors, the main one of each first."""
    return {FeatureKey(name, feature): width for name in names for feature, width in EXTRACTORS[name].features.items()}


def load_extractors(
    names: Iterable[str] = (DEFAULT_EXTRACTOR,),
    weights: str | Path | None = None,
    convention: str | None = None,
    sharding: Sharding | None = None,
) -> dict[str, Extract]:
    """Returns {name: function from images to features}.

    `weights`: local copy of Inception's weights. `convention`: one of Inception's `CONVENTIONS`. `sharding`: where the
    weights live, the default device if None. Raises UserError for an unknown name or convention, and for weights that
    cannot be had or are not the published ones.
    """
    loaded = {}
    for name in check_extractors(names):
        # --inception_weights and --convention are about Inception alone.
        options = (weights, convention) if name == DEFAULT_EXTRACTOR else (None, None)
        extract = EXTRACTORS[name].load(*options, sharding)
        check_made(extract, Callable, f"the loader of --extractor={name}")
        loaded[name] = _checking(name, extract)
    return loaded


def _checking(name: str, extract: Extract) -> Extract:
    """Returns `extract` of the extractor `name`, which raises UserError for features that it does not declare."""
    widths = EXTRACTORS[name].features

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
