"""The parts that all evaluations share: samples are scored against a reference; each evaluation is a row of fid.json.

A row's settings include everything that its numbers depend on; a finished row is found again by them.
"""

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from utils.base.devices import check_batch_memory, free_memory
from utils.base.files import atomic_write, prepare_output_folder
from utils.base.hosts import broadcast, is_first
from utils.base.mesh import check_batch_size, make_mesh, replicated
from utils.base.messages import UserError, WriteError, log, show_result, warn, with_urls
from utils.images.pixels import ImageBatch
from utils.images.samples import Samples, content_sha256, holds_images, open_samples
from utils.metrics.extractors import (
    DEFAULT_EXTRACTOR,
    PIXELS,
    ExtractorOptions,
    check_extractors,
    configure_extractors,
    feature_widths,
    load_extractors,
)
from utils.metrics.inception import DEFAULT_CONVENTION, load_logits
from utils.metrics.measure import measure_images, most_images, pad_and_shard
from utils.metrics.metrics import (
    Metric,
    caveats,
    choose_metrics,
    compute_metrics,
    leave_out,
    needed_extractors,
    sees_pixels,
    why_no_features,
    why_no_moments,
    why_no_picture,
)
from utils.metrics.pixels import MAX_IMAGE_BYTES, PixelStatistics
from utils.metrics.reference import (
    Convention,
    ReferenceStatistics,
    check_details,
    find_convention,
    has_statistics,
    load_statistics,
    warn_of_other_shape,
)
from utils.metrics.statistics import MAX_SAMPLE_ROWS, ImageStatistics
from utils.metrics.statistics_files import save_statistics
from utils.runs.memorising import Memorising, SampleImages, choose_features, open_training
from utils.runs.results import to_markdown, write_json_rows
from utils.sampling.generator import RECIPE_BATCH_SIZE, hash_params

FILES = ("fid.json", "fid.csv", "fid.png", "by_step.png", "by_ema.png")  # beside grids of samples
MAX_LISTED = 12  # figures named at the end
LARGE_IMAGE_BYTES = 2**22  # without --batch_size, batches of larger images take LARGE_BATCH_BYTES at most
LARGE_BATCH_BYTES = 2**28


class Scoring:
    """The parts that all evaluations share: the reference, the extractors, and where results go.

    `config` holds the values of eval_fid.py's flags; without a `reference`, --memorisation is all that is computed.
    Wrong input ends in the constructor, before anything compiles.
    """

    def __init__(
        self,
        config: ConfigDict,
        reference: Path | None,
        image_shape: tuple[int, ...],
        num_samples: int,
        default_out: Path,
        dtype: str = "uint8",  # of the samples
        saved: dict[str, Any] | None = None,  # configuration of the run whose samples they are
    ):
        self.config = config
        self.mesh = make_mesh()
        self.metrics, self.extractor_names = self._choose_metrics(reference is not None, image_shape, dtype)
        self.options = ExtractorOptions.of(config)
        self.records = configure_extractors(self.extractor_names, self.options) if self.extractor_names else {}
        self.out = Path(config.out or default_out)
        self.failure: WriteError | None = None  # the first one; see `going_on`
        self.figures: list[str] = []  # names of those written
        prepare_output_folder(self.out, "out", names=FILES)
        if config.json and Path(config.json).resolve() in [(self.out / name).resolve() for name in FILES]:
            raise UserError(f"--json={config.json} is the evaluation's own record of its rows; name another file")
        self.batch_size = self._choose_batch_size(num_samples, image_shape)
        if self.extractor_names:
            # What Inception takes: images in float32, and the outputs of its first layers.
            check_batch_memory(self.batch_size, (299, 299, 3), copies=40)
        self.memorising = self._open_memorising(image_shape, dtype, saved) if config.memorisation else None
        self.logits = load_logits(config.inception_logits) if config.inception_logits else None
        self.reference = self._load_reference(reference)
        if self.reference is not None:
            self._check_reference(self.reference, image_shape, dtype, num_samples)
        self.settings = self._describe_reference()

    def _choose_metrics(
        self, has_reference: bool, image_shape: tuple[int, ...], dtype: str
    ) -> tuple[tuple[Metric, ...], tuple[str, ...]]:
        """Returns the metrics of such images, and the names of the networks that they and --memorisation need."""
        names = check_extractors(self.config.extractor)
        if not has_reference:
            # The network whose features --memorisation compares is all that is needed; for pixels there is none.
            known = names if dtype == "uint8" and image_shape[-1] in (1, 3) else ()
            compared = choose_features(self.config.memorisation_features, image_shape, known)
            return (), () if compared == PIXELS else (compared.extractor,)
        metrics = choose_metrics(self.config.metrics, names)
        metrics = leave_out(metrics, lambda metric: why_no_picture(metric, image_shape, dtype))
        return metrics, needed_extractors(metrics) if self.config.metrics else names

    def _check_reference(
        self, reference: ReferenceStatistics, image_shape: tuple[int, ...], dtype: str, num_samples: int
    ) -> None:
        """Leaves out metrics that the reference does not allow, and says what the others are worth."""
        self.metrics = leave_out(self.metrics, lambda metric: why_no_moments(metric, reference, image_shape, dtype))
        has_logits = self.logits is not None
        if self.config.metrics:  # of a network's own scores, those that the file allows are meant
            self.metrics = leave_out(self.metrics, lambda metric: why_no_features(metric, reference, has_logits))
        if self.extractor_names:
            warn_of_other_shape(reference, image_shape)
        for caveat in caveats(num_samples, reference, has_logits, self.metrics):
            log(f"note: {caveat}")

    def _choose_batch_size(self, num_samples: int, image_shape: tuple[int, ...]) -> int:
        """Returns --batch_size or the recipe's, but no more than the samples need, and less for large images."""
        num_devices = self.mesh.size
        default = most_images(self.records, num_devices, free_memory()) or RECIPE_BATCH_SIZE
        requested = default if self.config.batch_size is None else self.config.batch_size
        if self.config.batch_size is not None:
            check_batch_size(requested, num_devices)
        elif math.prod(image_shape) > LARGE_IMAGE_BYTES:
            requested = max(1, LARGE_BATCH_BYTES // math.prod(image_shape))
        batch_size = -(-min(requested, num_samples) // num_devices) * num_devices  # every device has as many
        check_batch_memory(batch_size, tuple(image_shape))
        return batch_size

    def _open_memorising(self, image_shape: tuple[int, ...], dtype: str, saved: dict[str, Any] | None) -> Memorising:
        """Opens the training images with which samples are compared, before anything compiles."""
        features = choose_features(self.config.memorisation_features, image_shape, self.extractor_names)
        training = open_training(self.config.train_images, saved, image_shape, dtype)
        return Memorising(training, features, self.batch_size, self.mesh, self.out, self.records)

    def _load_reference(self, path: Path | None) -> ReferenceStatistics | None:
        """Loads the networks, and the statistics from a file; those that a file of images lacks are measured."""
        has_pixels = sees_pixels(self.metrics)
        images = None
        stated = None
        if path is not None and holds_images(path, has_pixels):
            images = open_samples(path, "fid_stats", is_any=has_pixels)
        if path is not None and (images is None or has_statistics(path)):
            stated = load_statistics(path, feature_widths(self.records))
            check_details(stated, self.records, self.options)

        # Both sides enter Inception alike: a score across conventions measures the resizing as well.
        requested = self.config.convention
        self.convention: Convention | None = None
        if DEFAULT_EXTRACTOR in self.extractor_names:
            if stated is not None:
                self.convention = find_convention(stated, requested)
            else:  # both sides are measured here
                source = "flag" if requested else "default"
                self.convention = Convention(requested or DEFAULT_CONVENTION, source)
        self.extractors = {}
        if self.extractor_names:
            self.extractors = load_extractors(
                self.records,
                weights=self.config.inception_weights,
                convention=self.convention and self.convention.name,
                sharding=replicated(self.mesh),
            )
        if images and (stated is None or not stated.has_rows or (has_pixels and stated.pixels is None)):
            assert path is not None
            return self._measure_reference(path, images, stated)
        return stated

    def _measure_reference(
        self, path: Path, images: Samples, stated: ReferenceStatistics | None
    ) -> ReferenceStatistics:
        """Returns the statistics `stated` in the images' file, with the images' rows, or all measured from the images.
        What is measured is kept in --out."""
        sha256 = content_sha256(path)
        others = [
            word for name in self.records if name != DEFAULT_EXTRACTOR for word in (name, *self.records[name].words)
        ]
        parts = [sha256[:12], *([self.convention.name] if self.convention else []), *others]
        parts += ["pixels"] if sees_pixels(self.metrics) else []
        measured_path = self.out / f"reference_{'_'.join(parts)}.npz"
        if broadcast(measured_path.exists()):  # of the same bytes and networks: they are in its name
            measured = load_statistics(measured_path, feature_widths(self.records))
        else:
            measured = self._measure_images(path, images, measured_path)
        if measured.pixels is not None:
            # The first of them, for metrics that compare images with images.
            size = math.prod(images.image_shape) * np.dtype(images.dtype).itemsize
            first = next(images.read(max(1, min(MAX_SAMPLE_ROWS, MAX_IMAGE_BYTES // size))))
            measured = dataclasses.replace(measured, pixels=dataclasses.replace(measured.pixels, images=first))
        if stated is None:
            return dataclasses.replace(measured, sha256=sha256, path=path)
        return stated.with_rows(measured)

    def _measure_images(self, path: Path, images: Samples, measured_path: Path) -> ReferenceStatistics:
        statistics = ImageStatistics(pixels=self._new_pixels())
        self.measure_samples(images, statistics, f"images of {path.name}")
        widths = feature_widths(self.records)
        save = functools.partial(
            save_statistics,
            statistics=statistics,
            convention=self.convention and self.convention.name,
            dataset=str(path),
            extractors=self.records,
            image_shape=images.image_shape,
        )
        if is_first():
            with self.going_on():
                save(measured_path)
                return load_statistics(measured_path, widths)
        # For this once, where --out has no room, or another process writes there.
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder) / measured_path.name)
            return load_statistics(Path(folder) / measured_path.name, widths)

    def _describe_reference(self) -> dict[str, Any]:
        """Returns the settings that all rows of this evaluation share."""
        is_default = self.extractor_names == (DEFAULT_EXTRACTOR,)
        sha256s = {name: record.sha256 for name, record in self.records.items()}
        settings: dict[str, Any] = {
            "fid_stats": self.reference and with_urls(str(self.reference.path)),
            "fid_stats_sha256": self.reference and self.reference.sha256,
            "convention": self.convention and self.convention.name,
            "convention_source": self.convention and self.convention.source,
            "inception_sha256": sha256s.get(DEFAULT_EXTRACTOR),
            "inception_logits_sha256": None if self.logits is None else hash_params(self.logits),
        }
        # Only where it is not Inception alone: rows of older versions are found again.
        if not is_default:
            settings["extractor"] = list(sha256s)
            settings["extractor_sha256"] = list(sha256s.values())
        for record in self.records.values():
            settings |= record.details
        if self.config.metrics:
            settings["metrics"] = list(map(str, choose_metrics(self.config.metrics)))
        if self.memorising:
            settings |= self.memorising.settings
        return settings

    def measure_samples(
        self,
        samples: Samples,
        statistics: ImageStatistics,
        title: str,
        flag: str | None = None,
        on_batch: Callable[[ImageBatch], None] | None = None,
    ) -> None:
        """Adds all samples to `statistics`; `flag` is that of their number."""
        batches = pad_and_shard(samples.read(self.batch_size), self.batch_size, self.mesh)
        measure_images(self.extractors, batches, statistics, samples.num_samples, title, on_batch, flag)

    def new_statistics(self) -> ImageStatistics:
        # Single features are kept only where there are some to compare with.
        has_reference_rows = self.reference is not None and self.reference.has_rows
        has_rows = has_reference_rows or (self.memorising is not None and self.memorising.key != PIXELS)
        return ImageStatistics(MAX_SAMPLE_ROWS if has_rows else 0, self.logits, self._new_pixels())

    def new_images(self, num_samples: int, image_shape: Sequence[int], dtype: str) -> SampleImages | None:
        """Returns room for the images of an evaluation, where training images are compared with them."""
        if self.memorising is None:
            return None
        return SampleImages(num_samples, image_shape, dtype, self.out)

    def _new_pixels(self) -> PixelStatistics | None:
        return PixelStatistics() if sees_pixels(self.metrics) else None

    def compute(
        self, statistics: ImageStatistics, images: SampleImages | None = None, figure_name: str = ""
    ) -> dict[str, float]:
        """Returns the metrics; with the `images`, what they have of the training's too, and the figure of that name.

        Of several processes, the first does; the others help where features are computed, and return nothing.
        """
        if not is_first():
            if self.memorising is not None and images is not None:
                self.memorising.help(images.num_samples, self.extractors)
            return {}
        results: dict[str, float] = {}
        if self.reference is not None:
            log("computing the distances ...")
            results = compute_metrics(statistics, self.reference, self.metrics)
        if self.memorising is not None and images is not None:
            key = self.memorising.key
            rows = None if key == PIXELS else statistics[key].rows
            found, figure = self.memorising.compute(np.asarray(images.images), rows, self.extractors)
            self.save_figure(figure, figure_name)
            results |= found
        return results

    def save_figure(self, figure: Figure, name: str) -> None:
        if not is_first():
            return
        with self.going_on():
            with atomic_write(self.out / name) as temporary:
                figure.savefig(temporary, format="png")
            self.figures.append(name)

    def describe_files(self) -> str:
        """Returns which files were written, in words; rows that were found again have no new figures."""
        listed = self.figures if len(self.figures) <= MAX_LISTED else [f"{len(self.figures)} pictures"]
        return f"written in {self.out}: {', '.join(['fid.json', 'fid.csv', *listed])}"

    def show_rows(self, rows: list[dict[str, Any]]) -> None:
        """Prints the rows as a table, or as JSON for --json -; --json FILE is written."""
        if self.config.json != "-":
            show_result(to_markdown(rows))
        if self.config.json:
            write_json_rows(self.config.json, rows)

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Keeps a WriteError for `finish`: scores are printed before a full disk ends the program."""
        try:
            yield
        except WriteError as error:
            self.failure = self.failure or error
            warn(f"{error.path} could not be written ({error.strerror}); the scores come nevertheless")

    def finish(self) -> None:
        """Raises the first WriteError, if there was one, after the scores are printed."""
        if self.failure:
            raise WriteError(self.failure.path, self.failure.error, "the scores are above")
