"""The reference that a run's samples are scored against while it trains, and the metrics."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from utils.base.mesh import replicated
from utils.data.dataset import ImageDataset
from utils.images.pixels import check_pictures
from utils.metrics.extractors import (
    DEFAULT_EXTRACTOR,
    ExtractorOptions,
    configure_extractors,
    feature_widths,
    load_extractors,
)
from utils.metrics.metrics import (
    Metric,
    leave_out,
    needed_extractors,
    sees_pixels,
    training_metrics,
    why_no_features,
    why_no_moments,
    why_no_picture,
)
from utils.metrics.reference import (
    ReferenceStatistics,
    check_details,
    find_convention,
    load_statistics,
    warn_of_other_shape,
)
from utils.runs.best import check_keep_best
from utils.runs.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics that training-time samples are scored against, the networks of their features, and the metrics."""

    statistics: ReferenceStatistics
    extractors: Any
    metrics: tuple[Metric, ...]


def load_reference(config: RunConfig, mesh: Mesh, dataset: ImageDataset) -> Reference | None:
    """Returns what training-time scores need; None without --fid_stats."""
    evaluation = config.evaluation
    if not evaluation.fid_stats:
        return None
    metrics = training_metrics(evaluation.metrics, evaluation.extractor)
    if not sees_pixels(metrics):
        what = f"--fid_stats={evaluation.fid_stats}: feature networks take"
        fix = "leave it out, or use --metrics moments"
        check_pictures(dataset.pixels, dataset.image_shape, what, fix, whose="those of the data set")
    images = (dataset.image_shape, dataset.pixels.dtype)
    metrics = leave_out(metrics, lambda metric: why_no_picture(metric, *images))

    # Both sides enter Inception under one convention: the one that the statistics record.
    names = needed_extractors(metrics)
    options = ExtractorOptions.of(evaluation)
    records = configure_extractors(names, options) if names else {}
    statistics = load_statistics(evaluation.fid_stats, feature_widths(records))
    check_details(statistics, records, options)
    metrics = leave_out(metrics, lambda metric: why_no_moments(metric, statistics, *images))
    metrics = leave_out(metrics, lambda metric: why_no_features(metric, statistics))
    if config.checkpoints.keep_best:  # what is left out is not logged
        check_keep_best(config.checkpoints.keep_best, metrics, has_statistics=True)
    if not names:
        return Reference(statistics, {}, metrics)
    convention = find_convention(statistics, evaluation.convention).name if DEFAULT_EXTRACTOR in names else None
    warn_of_other_shape(statistics, dataset.image_shape)
    weights = evaluation.inception_weights
    extractors = load_extractors(records, weights=weights, convention=convention, sharding=replicated(mesh))
    return Reference(statistics, extractors, metrics)
