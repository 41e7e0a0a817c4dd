"""Statistics of pixels themselves: mean, standard deviation and radial power spectrum, of images of any shape and
format. No network is needed."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import scipy  # whose parts are imported when they are used
from jaxtyping import Float, Int

from utils.base.external import BadFileError
from utils.base.messages import UserError
from utils.images.pixels import Images

MAX_IMAGE_BYTES = 2**28  # of images that are kept for metrics which look at them
MAX_MODES_AT_ONCE = 2**24  # 128 MB of complex64
MAX_ELEMENTS = 2**26  # of an image, in files of statistics
MIN_SIDE = 8  # pixels of a side that is worth cycles of its own
MIN_POWER = 0.01  # of the peak: below it, a relative deviation says little

# Names in a statistics file, and the fields that they are.
NAMES = {f"pixels.{name}": name for name in ("mean", "std", "spectrum", "num_images", "dtype")}


@dataclasses.dataclass(frozen=True)
class PixelReference:
    """Moments of the reference's images, in the units of the data; see `PixelStatistics`."""

    mean: Float[np.ndarray, "h w c"]
    std: Float[np.ndarray, "h w c"]
    spectrum: Float[np.ndarray, "radii c"]
    num_images: int
    dtype: str  # of the images: uint8 or float32
    images: Images | None = None  # the first of them; None where the reference is a file of statistics


def mode_radii(height: int, width: int) -> Int[np.ndarray, "h w2"]:
    """Returns the radius of each mode of numpy.fft.rfft2: whole cycles over the shorter side, at least 1 but for the
    mean, which has 0. A side below 8 pixels is no measure: then it is the longer one."""
    side = min(height, width) if min(height, width) >= MIN_SIDE else max(height, width)
    cycles = side * np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    radii = np.maximum(1, np.rint(cycles)).astype(int)
    radii[0, 0] = 0
    return radii


def radial_power(power: Float[np.ndarray, "h w2 c"], width: int) -> Float[np.ndarray, "radii c"]:
    """Returns the mean over the modes of each radius 1, 2, ... of what is given for those of numpy.fft.rfft2."""
    height, half, channels = power.shape
    # Modes between the first column and the last of an even width stand for their mirror images too.
    weights = np.full((height, half), 2.0)
    weights[:, 0] = 1
    if width % 2 == 0:
        weights[:, -1] = 1
    radii = mode_radii(height, width).reshape(-1)
    weights = weights.reshape(-1)
    sums = [np.bincount(radii, weights * power[..., c].reshape(-1)) for c in range(channels)]
    return (np.stack(sums, axis=1) / np.maximum(1, np.bincount(radii, weights))[:, None])[1:]


class PixelStatistics:
    """Moments of the images seen so far, in the units of their values (uint8: 0 .. 255).

    `mean` and `std` are those of each pixel and channel, in float64. `spectrum` is the mean power |F|^2 / (h w) of each
    channel at the radii of `mode_radii`; the mean of each image has no part in it. Memory does not grow with the number
    of images, but for the first `max_bytes` of the `images` themselves.
    """

    def __init__(self, max_bytes: int = MAX_IMAGE_BYTES):
        self.num_images = 0
        self.dtype = ""  # of the images
        self.room = max_bytes
        self._images: list[np.ndarray] = []
        # The shape is known with the first images.
        self._mean: np.ndarray = np.zeros(())
        self._squares = np.zeros(())  # sum of (x - mean)^2
        self._power = np.zeros(())  # sum of |F|^2 by mode

    def update(self, images: Images) -> None:
        """Adds images (n, h, w, c). Raises UserError where values are NaN or infinite, ValueError for another shape;
        nothing is added then."""
        images = np.asarray(images)
        if images.ndim != 4 or (self.num_images and images.shape[1:] != self._mean.shape):
            raise ValueError(f"images have shape {images.shape}, expected (n, *{self._mean.shape})")
        is_broken = images.dtype.kind == "f" and ~np.isfinite(images).all(axis=(1, 2, 3))
        if broken := np.count_nonzero(is_broken):
            raise UserError(
                f"{broken} of {len(images)} images after sample {self.num_images} have values that are NaN or infinite"
            )

        # The first of them, as they are.
        self.dtype = str(images.dtype)
        if len(kept := images[: self.room // max(1, images[:1].nbytes)]):
            self._images.append(kept.copy())
        self.room = self.room - kept.nbytes if len(kept) == len(images) else 0
        size = max(1, MAX_MODES_AT_ONCE // max(1, math.prod(images.shape[1:])))
        for start in range(0, len(images), size):
            self._merge(images[start : start + size])

    def _merge(self, images: Images) -> None:
        # Moments of both parts merged: each about its own mean, plus the distance between the means.
        mean = images.mean(axis=0, dtype=np.float64)
        shift = mean - self._mean
        total = self.num_images + len(images)
        differences = images - mean
        squares = np.einsum("nhwc,nhwc->hwc", differences, differences)
        self._squares = self._squares + squares + np.square(shift) * (self.num_images * len(images) / total)
        self._mean = self._mean + shift * (len(images) / total)
        self.num_images = total

        # In float32, which takes half the time, once an image is without its mean. That is rounded: the rest of it is
        # the same for all pixels, and has no part in any other mode.
        centred = images - images.mean(axis=(1, 2), keepdims=True, dtype=np.float64).astype(np.float32)
        modes = scipy.fft.rfft2(centred, axes=(1, 2))
        self._power = self._power + np.einsum("nhwc,nhwc->hwc", modes, modes.conj()).real.astype(np.float64)

    @property
    def mean(self) -> Float[np.ndarray, "h w c"]:
        return self._mean

    @property
    def std(self) -> Float[np.ndarray, "h w c"]:
        """Standard deviation (divisor n - 1). Raises UserError below two images."""
        if self.num_images < 2:
            raise UserError(
                f"the deviation of {self.num_images} samples is not defined; --num_samples must be 2 or more"
            )
        return np.sqrt(self._squares / (self.num_images - 1))

    @property
    def spectrum(self) -> Float[np.ndarray, "radii c"]:
        height, width = self._mean.shape[:2]
        return radial_power(self._power / (self.num_images * height * width), width)

    @property
    def images(self) -> Images | None:
        """The first images (n, h, w, c), as many as `max_bytes` hold; None where it holds none."""
        return np.concatenate(self._images) if self._images else None


Moments = PixelStatistics | PixelReference


def compute_moments(samples: PixelStatistics | PixelReference, reference: Moments) -> dict[str, float]:
    """Returns the distances between moments: `mean_error` and `std_error`, root mean squares over pixels and channels,
    in the units of the data; `spectrum_error` and `spectrum_worst`, mean and largest deviation of the power from the
    reference's, in percent of it, over the radii and channels at which it has 1 % of its peak."""
    results = {
        "mean_error": float(np.sqrt(np.mean(np.square(samples.mean - reference.mean)))),
        "std_error": float(np.sqrt(np.mean(np.square(samples.std - reference.std)))),
    }
    if explain_spectrum(reference):
        return results

    # Each channel has a peak of its own, and counts as much as any other.
    expected = reference.spectrum
    is_strong = (expected > 0) & (expected >= MIN_POWER * expected.max(axis=0))
    deviations = 100 * np.abs(samples.spectrum[is_strong] / expected[is_strong] - 1)
    weights = (is_strong / np.maximum(1, is_strong.sum(axis=0)))[is_strong]
    return results | {
        "spectrum_error": float(np.average(deviations, weights=weights)),
        "spectrum_worst": float(deviations.max()),
    }


def explain_spectrum(reference: Moments) -> str | None:
    """Returns why images like the reference's have no spectrum, or None."""
    if not reference.spectrum.size:
        height, width, _ = reference.mean.shape
        return f"spectrum: images of {height}x{width} have none"
    if not reference.spectrum.any():
        return "spectrum: each image of the reference is of one value"
    return None


def explain_moments(num_samples: int, reference: Moments) -> str | None:
    """Returns what chance does to the moments of so many samples, and why there is no spectrum if there is none."""
    # The variance of the difference of two means.
    variance = np.mean(np.square(reference.std)) * (1 / num_samples + 1 / reference.num_images)
    by_chance = (
        f"mean error: {np.sqrt(variance):.2g} by chance, of {num_samples} samples and {reference.num_images} images"
    )
    return "; ".join(filter(None, [by_chance, explain_spectrum(reference)]))


# --- In files of statistics ---


def pixel_arrays(statistics: PixelStatistics) -> dict[str, Any]:
    """Returns what a file keeps of the moments."""
    return {stored: getattr(statistics, name) for stored, name in NAMES.items()}


def check_pixel_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError where the shapes that a file states for its moments are not those of images."""
    found = {name: shapes.get(stored) for stored, name in NAMES.items()}
    mean = found["mean"]
    if mean is None:
        return
    is_image = len(mean) == 3 and 0 < math.prod(mean) <= MAX_ELEMENTS
    radii = int(mode_radii(*mean[:2]).max()) if is_image else 0
    expected = {"mean": mean, "std": mean, "spectrum": (radii, *mean[2:]), "num_images": (), "dtype": ()}
    if not is_image or found != expected:
        raise ValueError(f"its `pixels.*` have the shapes {', '.join(map(str, found.values()))}, not those of moments")


def read_pixels(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[Iterable[str]], Mapping[str, np.ndarray]]
) -> PixelReference | None:
    """Returns the moments in a file, whose shapes are checked; None where it has none. Raises ValueError or
    BadFileError for values that no moments have."""
    if "pixels.mean" not in shapes:
        return None
    content = read(NAMES)
    if any(content[stored].dtype.kind not in ("U" if name == "dtype" else "fiu") for stored, name in NAMES.items()):
        raise BadFileError("its `pixels.*` are not numbers and the name of a dtype")
    arrays = {name: content[f"pixels.{name}"].astype(np.float64) for name in ("mean", "std", "spectrum")}
    num_images = int(content["pixels.num_images"])
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("it holds NaN or infinity")
    if (arrays["std"] < 0).any() or (arrays["spectrum"] < 0).any() or num_images < 2:
        raise ValueError("its `pixels.*` are negative, or of fewer than 2 images")
    return PixelReference(**arrays, num_images=num_images, dtype=str(content["pixels.dtype"]))
