"""The table of metrics of samples against a reference. A new metric is one function and one line of METRICS."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from utils.metrics.extractors import POOL, SPATIAL, FeatureKey
from utils.metrics.reference import FeatureReference, ReferenceStatistics
from utils.metrics.scores import DENSITY_NEIGHBOURS, INCEPTION_SCORE_PART, KID_SUBSET, frechet_distance, kid, mind, prdc
from utils.metrics.statistics import MAX_SAMPLE_ROWS, FeatureStatistics, ImageStatistics

# (samples, reference) of the feature that a metric needs -> {result: value}, empty where they do not allow it.
Compute = Callable[[FeatureStatistics, FeatureReference], dict[str, float]]


def frechet_metric(name: str) -> Compute:
    """Returns a metric's `compute` that calls the Fréchet distance `name`."""
    return lambda samples, reference: {
        name: frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma, reference.root)
    }


def compute_kid(samples: FeatureStatistics, reference: FeatureReference) -> dict[str, float]:
    """Returns `kid` and its standard error; no `kid_error` where a set has fewer than four rows."""
    if samples.rows is None or reference.rows is None:
        return {}
    mean, error = kid(samples.rows, reference.rows)
    return {"kid": mean} | ({} if error is None else {"kid_error": error})


def compute_mind(samples: FeatureStatistics, reference: FeatureReference) -> dict[str, float]:
    if samples.rows is None or reference.rows is None:
        return {}
    distance, error = mind(samples.rows, reference.rows)
    return {"mind": distance, "mind_error": error}


def compute_prdc(samples: FeatureStatistics, reference: FeatureReference) -> dict[str, float]:
    """Returns precision, recall, density and coverage where both sides have more rows than neighbours to look at."""
    if samples.rows is None or reference.rows is None:
        return {}
    if min(len(reference.rows), len(samples.rows)) <= DENSITY_NEIGHBOURS:
        return {}
    return prdc(reference.rows, samples.rows)


def compute_inception_score(samples: FeatureStatistics, reference: FeatureReference) -> dict[str, float]:
    # It compares nothing with the reference; without --inception_logits there are no class probabilities.
    if samples.logits is None:
        return {}
    mean, std = samples.inception_score.mean_and_std
    return {"inception_score": mean, "inception_score_std": std}


# Caveats: results of few samples are computed all the same, and say what they are worth.
def explain_few(name: str, num_features: int, num_samples: int) -> str | None:
    if num_samples >= num_features:
        return None
    return f"{name}: {num_samples} samples are fewer than the {num_features} features, it comes out far too high"


def explain_neighbours(num_samples: int, reference: FeatureReference) -> str | None:
    # These metrics depend on both numbers: balls shrink as sets grow.
    num_reference = 0 if reference.rows is None else len(reference.rows)
    if not num_reference or min(num_samples, num_reference) >= MAX_SAMPLE_ROWS:
        return None
    return (
        f"precision, recall, density and coverage: of {min(num_samples, MAX_SAMPLE_ROWS)} samples and "
        f"{num_reference} images, comparable with the same numbers alone"
    )


def explain_kid(num_samples: int, reference: FeatureReference) -> str | None:
    if reference.rows is None or min(num_samples, len(reference.rows)) >= KID_SUBSET:
        return None
    return f"KID: {num_samples} samples and {len(reference.rows)} images are few: unbiased, but uncertain"


class Metric(NamedTuple):
    """A metric of one feature of one extractor, which `needs` names.

    `compute` is given that feature's statistics of the samples and of the reference; it returns {} where they do not
    allow it. `columns` are {result: title in tables}. `explain(num_samples, reference)` returns a caveat about so few
    samples, or None.
    """

    compute: Compute
    columns: Mapping[str, str]
    needs: FeatureKey = POOL
    explain: Callable[[int, FeatureReference], str | None] = lambda num_samples, reference: None


# Of each, results are computed where both sides have what it `needs`; errors and deviations have no columns.
METRICS = [  # in the order of the tables' columns
    Metric(
        frechet_metric("fid"),
        {"fid": "FID"},
        explain=lambda num_samples, reference: explain_few("FID", reference.mu.size, num_samples),
    ),
    Metric(  # Nash et al., arXiv:2103.03841
        frechet_metric("sfid"),
        {"sfid": "sFID"},
        SPATIAL,
        lambda num_samples, reference: explain_few("sFID", reference.mu.size, num_samples),
    ),
    Metric(compute_kid, {"kid": "KID"}, explain=explain_kid),
    Metric(compute_mind, {"mind": "MIND"}),
    Metric(
        compute_prdc,
        {name: name for name in ("precision", "recall", "density", "coverage")},
        explain=explain_neighbours,
    ),
    Metric(compute_inception_score, {"inception_score": "IS"}),
]


def metric_columns() -> dict[str, str]:
    """Returns {result: title in tables} of all metrics."""
    return {name: title for metric in METRICS for name, title in metric.columns.items()}


def caveats(num_samples: int, reference: ReferenceStatistics, has_logits: bool) -> list[str]:
    """Returns what a reader has to know about metrics of so few samples, a line each; empty where there are enough."""
    # A metric that the reference does not allow needs no caveat.
    found = [metric.explain(num_samples, reference[metric.needs]) for metric in METRICS if metric.needs in reference]
    if has_logits and num_samples < INCEPTION_SCORE_PART:
        found.append(f"Inception Score: it grows with the number of samples, up to {INCEPTION_SCORE_PART}")
    return [text for text in found if text]


def compute_fid(samples: ImageStatistics, reference: ReferenceStatistics) -> float:
    """Returns the FID alone, as it is logged while a model is trained."""
    # The first line of the table.
    return METRICS[0].compute(samples[POOL], reference[POOL])["fid"]


def compute_metrics(samples: ImageStatistics, reference: ReferenceStatistics) -> dict[str, float]:
    """Returns {name: value} of every metric that the two allow."""
    results: dict[str, float] = {}
    for metric in METRICS:
        # sFID, for one, is missing where a file holds the moments of `pool` alone.
        if metric.needs in samples and metric.needs in reference:
            results |= metric.compute(samples[metric.needs], reference[metric.needs])
    return results
