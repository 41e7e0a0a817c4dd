"""The metrics of samples against reference statistics. One more is one function and one line of METRICS."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from utils.metrics.fid import frechet_distance
from utils.metrics.inception_score import SPLIT_SIZE as INCEPTION_SCORE_PART
from utils.metrics.kid import SUBSET_SIZE, kid
from utils.metrics.mind import mind
from utils.metrics.prdc import DENSITY_NEIGHBOURS, prdc
from utils.metrics.reference import ReferenceStatistics
from utils.metrics.statistics import MAX_SAMPLE_FEATURES, ImageStatistics


def compute_fid(samples: ImageStatistics, reference: ReferenceStatistics) -> dict[str, float]:
    pool = samples.pool
    return {"fid": frechet_distance(pool.mu, pool.sigma, reference.mu, reference.sigma, reference.root)}


def compute_sfid(samples: ImageStatistics, reference: ReferenceStatistics) -> dict[str, float]:
    """FID of the spatial features (Nash et al., arXiv:2103.03841), where the reference has their statistics."""
    spatial, mu, sigma = samples.spatial, reference.spatial_mu, reference.spatial_sigma
    if mu is None or sigma is None:
        return {}
    return {"sfid": frechet_distance(spatial.mu, spatial.sigma, mu, sigma, reference.spatial_root)}


def compute_kid(samples: ImageStatistics, reference: ReferenceStatistics) -> dict[str, float]:
    """Without `kid_error` where a set has fewer than four rows."""
    if reference.features is None:
        return {}
    mean, error = kid(samples.features, reference.features)
    return {"kid": mean} | ({} if error is None else {"kid_error": error})


def compute_mind(samples: ImageStatistics, reference: ReferenceStatistics) -> dict[str, float]:
    if reference.features is None:
        return {}
    distance, error = mind(samples.features, reference.features)
    return {"mind": distance, "mind_error": error}


def compute_prdc(samples: ImageStatistics, reference: ReferenceStatistics) -> dict[str, float]:
    """Where both sides have features of more images than there are neighbours to look at."""
    if reference.features is None or min(len(reference.features), len(samples.features)) <= DENSITY_NEIGHBOURS:
        return {}
    return prdc(reference.features, samples.features)


def compute_inception_score(samples: ImageStatistics, reference: ReferenceStatistics) -> dict[str, float]:
    if samples.logits is None:
        return {}
    mean, std = samples.inception_score.mean_and_std
    return {"inception_score": mean, "inception_score_std": std}


def explain_few(name: str, num_features: int, num_samples: int) -> str | None:
    if num_samples >= num_features:
        return None
    return f"{name}: {num_samples} samples are fewer than the {num_features} features, it comes out far too high"


def explain_neighbours(num_samples: int, reference: ReferenceStatistics) -> str | None:
    num_reference = 0 if reference.features is None else len(reference.features)
    if not num_reference or min(num_samples, num_reference) >= MAX_SAMPLE_FEATURES:
        return None
    return (
        f"precision, recall, density and coverage: of {min(num_samples, MAX_SAMPLE_FEATURES)} samples and "
        f"{num_reference} images, comparable with the same numbers alone"
    )


def explain_kid(num_samples: int, reference: ReferenceStatistics) -> str | None:
    if reference.features is None or min(num_samples, len(reference.features)) >= SUBSET_SIZE:
        return None
    return f"KID: {num_samples} samples and {len(reference.features)} images are few: unbiased, but uncertain"


class Metric(NamedTuple):
    """`compute` returns {} where the statistics at hand do not allow it; `columns` are {result: title in tables}.
    `explain` says what is to be known about so few samples, or None."""

    compute: Callable[[ImageStatistics, ReferenceStatistics], dict[str, float]]
    columns: Mapping[str, str]
    explain: Callable[[int, ReferenceStatistics], str | None] = lambda num_samples, reference: None


METRICS = (  # in the order of the tables' columns
    Metric(compute_fid, {"fid": "FID"}, lambda n, reference: explain_few("FID", reference.mu.size, n)),
    Metric(
        compute_sfid,
        {"sfid": "sFID"},
        lambda n, reference: None if (mu := reference.spatial_mu) is None else explain_few("sFID", mu.size, n),
    ),
    Metric(compute_kid, {"kid": "KID"}, explain_kid),
    Metric(compute_mind, {"mind": "MIND"}),
    Metric(compute_prdc, {name: name for name in ("precision", "recall", "density", "coverage")}, explain_neighbours),
    Metric(compute_inception_score, {"inception_score": "IS"}),
)
COLUMNS = {name: title for metric in METRICS for name, title in metric.columns.items()}


def caveats(num_samples: int, reference: ReferenceStatistics, has_logits: bool) -> list[str]:
    """What has to be known about metrics of so few samples."""
    found = [metric.explain(num_samples, reference) for metric in METRICS]
    if has_logits and num_samples < INCEPTION_SCORE_PART:
        found.append(f"Inception Score: it grows with the number of samples, up to {INCEPTION_SCORE_PART}")
    return [text for text in found if text]


def compute_metrics(samples: ImageStatistics, reference: ReferenceStatistics) -> dict[str, float]:
    """{name: value} of every metric that the two allow."""
    results = {}
    for metric in METRICS:
        results |= metric.compute(samples, reference)
    return results
