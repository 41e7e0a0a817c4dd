"""The metrics of samples against reference statistics. One more is one function and one line of METRICS."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from utils.metrics.fid import frechet_distance
from utils.metrics.kid import kid
from utils.metrics.prdc import DENSITY_NEIGHBOURS, prdc
from utils.metrics.reference import ReferenceStatistics
from utils.metrics.statistics import ImageStatistics


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
    if reference.features is None:
        return {}
    mean, error = kid(samples.features, reference.features)
    return {"kid": mean, "kid_error": error}


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


class Metric(NamedTuple):
    """`compute` returns {} where the statistics at hand do not allow it; `columns` are {result: title in tables}."""

    compute: Callable[[ImageStatistics, ReferenceStatistics], dict[str, float]]
    columns: Mapping[str, str]


METRICS = (  # in the order of the tables' columns
    Metric(compute_fid, {"fid": "FID"}),
    Metric(compute_sfid, {"sfid": "sFID"}),
    Metric(compute_kid, {"kid": "KID"}),
    Metric(compute_prdc, {name: name for name in ("precision", "recall", "density", "coverage")}),
    Metric(compute_inception_score, {"inception_score": "IS"}),
)
COLUMNS = {name: title for metric in METRICS for name, title in metric.columns.items()}


def compute_metrics(samples: ImageStatistics, reference: ReferenceStatistics) -> dict[str, float]:
    """{name: value} of every metric that the two allow."""
    results = {}
    for metric in METRICS:
        results |= metric.compute(samples, reference)
    return results
