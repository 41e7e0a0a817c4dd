"""Whether samples have the conditions that they were asked for: what they show is read by something that has never
seen a sample. The programs are run as a user types them; figures are a line of JSON.

    python benchmarks/conditions.py vector runs/turned   # data, training, samples, figures: some ten minutes
    python benchmarks/conditions.py text runs/scenes
    python benchmarks/conditions.py fields runs/fields --steps 500
    python benchmarks/conditions.py image runs/small
    python benchmarks/conditions.py augmentation runs/few

Flags that are none of its own go to train_flow.py. The exit status is 1 where a figure is worse than it should be.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.ndimage import rotate, zoom
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import r2_score
from sklearn.svm import SVC

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.data.dataset import PixelBatch  # noqa: E402
from utils.runs.opening import load_generator  # noqa: E402
from utils.training.step import draw_examples, example_losses  # noqa: E402

TRAIN = """--codec pixels --model.hidden_size 128 --model.depth 4 --model.num_heads 4 --model.mlp_ratio 4
    --model.lr 1e-3 --model.target_update_rate 0.998 --batch_size 128 --eval_interval 0 --wandb.mode disabled"""


class Job(NamedTuple):
    """Where a case is run, and how its network is trained."""

    folder: Path
    train: Sequence[str]  # flags of train_flow.py


def run(*words: Any) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def train(job: Job, data: Path, *words: Any, name: str = "run") -> Path:
    """Trains the demo's network on npz:`data`, and returns the run's folder, of this name."""
    folder = job.folder / name
    flags = [*TRAIN.split(), "--dataset_name", f"npz:{data}", *words, *job.train, "--save_dir", folder]
    run("train_flow.py", *flags)
    return folder


def draw(job: Job, name: str, count: int, scale: float, *words: Any) -> np.ndarray:
    """Returns `count` samples of the run at a guidance scale, as sample.py writes them to FOLDER/name.npz."""
    saved = job.folder / f"{name}.npz"
    flags = ["--num_samples", count, "--cfg_scale", scale, "--denoise_timesteps", 32, "--save_samples", saved]
    run("sample.py", "--load_dir", job.folder / "run", *flags, *words)
    with np.load(saved) as samples:
        return samples["images" if "images" in samples else "arr_0"]


# --- Numbers: the fours of scikit-learn, turned by up to 90 degrees either way ---

DIGIT = 4
NUM_HELD_OUT = 40  # originals
TURNS = 24  # of each


def turn(images: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Returns images (n, h, w) turned, as uint8."""
    turned = [rotate(image, angle, reshape=False, order=1) for image, angle in zip(images, degrees, strict=True)]
    return np.clip(np.round(turned), 0, 255).astype(np.uint8)


def make_turned(path: Path) -> dict[str, np.ndarray]:
    """Writes the turned digits as npz:FILE reads them, and returns the arrays."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    originals = rng.permutation(digits.images[digits.target == DIGIT]) * (255 / 16)
    arrays: dict[str, np.ndarray] = {"condition_names": np.array(["cos", "sin"])}
    for prefix, part in (("", originals[NUM_HELD_OUT:]), ("validation_", originals[:NUM_HELD_OUT])):
        angles = rng.uniform(-90, 90, len(part) * TURNS)
        arrays[f"{prefix}images"] = turn(np.repeat(part, TURNS, axis=0), angles)[..., None]
        radians = np.deg2rad(angles)
        arrays[f"{prefix}conditions"] = np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
    np.savez(path, **arrays)
    return arrays


def angle_of(vectors: np.ndarray) -> np.ndarray:
    """Returns the angles, in radians, of vectors (n, 2)."""
    return np.arctan2(vectors[:, 1], vectors[:, 0])


def check_vector(job: Job) -> dict[str, Any]:
    """The angle of samples, read by a kernel ridge regression: R^2 above 0.9, and higher with guidance."""
    data = make_turned(job.folder / "turned.npz")

    # What reads angles has seen real images alone; its own error is that of images it has not seen.
    flat = {name: data[name].reshape(len(data[name]), -1) / 255 for name in ("images", "validation_images")}
    reader = KernelRidge(kernel="rbf", alpha=0.01, gamma=0.1).fit(flat["images"], data["conditions"])
    truth = angle_of(data["validation_conditions"])
    figures = {"real": r2_score(truth, angle_of(reader.predict(flat["validation_images"])))}

    # A sample for each held-out condition.
    train(job, job.folder / "turned.npz", "--model.patch_size", 2)
    np.savez(job.folder / "asked.npz", conditions=data["validation_conditions"])
    for scale in (1, 2):
        asked = ["--condition_file", job.folder / "asked.npz"]
        images = draw(job, f"guidance_{scale}", len(truth), scale, *asked)
        found = angle_of(reader.predict(images.reshape(len(images), -1) / 255))
        figures[f"guidance {scale}"] = r2_score(truth, found)
    run("sample.py", "--load_dir", job.folder / "run", "--sweep", "sin=-1:1:9", "--cfg_scale", 2, "--num_samples", 9)
    return {**figures, "passes": bool(figures["guidance 2"] > figures["guidance 1"] > 0.9)}


# --- Texts: canvases of two digits, and captions of which digit is where ---

SIDE = 8  # of a digit; canvases have twice that
NUM_CANVASES = 20_000
HELD_OUT_DIGITS = 297
SAMPLES_PER_CAPTION = 3
# {relation: rows and columns of the first corner of the digit that is named first}; the other one is opposite.
CORNERS = {"left of": (4, 0), "right of": (4, 8), "above": (0, 4), "below": (8, 4)}
CAPTIONS = [(a, relation, b) for a in range(10) for relation in CORNERS for b in range(10)]


def words_of(caption: tuple[int, str, int]) -> str:
    """Returns `a 3 left of a 7`."""
    first, relation, second = caption
    return f"a {first} {relation} a {second}"


def corners_of(relation: str) -> list[tuple[int, int]]:
    """Returns the first row and column of each digit's cell, in the order of the caption."""
    row, column = CORNERS[relation]
    return [(row, column), (SIDE - row, SIDE - column)]


def make_scenes(
    digits: np.ndarray, labels: np.ndarray, captions: Sequence[tuple[int, str, int]], rng: np.random.Generator
) -> np.ndarray:
    """Returns a canvas (16, 16, 1) for each caption, of digits (m, 8, 8) of these labels taken at random."""
    images = np.zeros((len(captions), 2 * SIDE, 2 * SIDE, 1), np.uint8)
    for image, caption in zip(images, captions, strict=True):
        for digit, (row, column) in zip(caption[::2], corners_of(caption[1]), strict=True):
            image[row : row + SIDE, column : column + SIDE, 0] = digits[rng.choice(np.flatnonzero(labels == digit))]
    return images


def positions_right(classifier: SVC, images: np.ndarray, captions: Sequence[tuple[int, str, int]]) -> np.ndarray:
    """Returns whether each position of each canvas has the digit of its caption, bool (n, 2)."""
    right = []
    for image, caption in zip(images, captions, strict=True):
        corners = corners_of(caption[1])
        cells = [image[row : row + SIDE, column : column + SIDE].reshape(-1) for row, column in corners]
        right.append(classifier.predict(np.array(cells) * (16 / 255)) == np.array(caption[::2]))
    return np.array(right)


def check_text(job: Job) -> dict[str, Any]:
    """Digits of canvases where their caption has them: over 95 % with guidance 2, by a classifier of real digits."""
    # Originals are of training or held out; so are captions, of which a tenth has no canvas in training.
    rng = np.random.default_rng(0)
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = rng.permutation(len(images))
    held, rest = order[:HELD_OUT_DIGITS], order[HELD_OUT_DIGITS:]
    places = rng.permutation(len(CAPTIONS))
    is_new = np.isin(np.arange(len(CAPTIONS)), places[: len(CAPTIONS) // 10])
    known = [CAPTIONS[place] for place in np.flatnonzero(~is_new)]
    captions = [known[place] for place in rng.integers(len(known), size=NUM_CANVASES)]
    scenes = make_scenes(images[rest], digits.target[rest], captions, rng)
    np.savez(job.folder / "scenes.npz", images=scenes, captions=np.array([words_of(caption) for caption in captions]))

    # scikit-learn's own example of a classifier, on the originals of training; its error is that on the others.
    classifier = SVC(gamma=0.001).fit(digits.data[rest], digits.target[rest])
    asked = CAPTIONS * SAMPLES_PER_CAPTION
    real = positions_right(classifier, make_scenes(images[held], digits.target[held], asked, rng), asked)
    figures = {"real": real.mean()}

    # Each caption as a prompt, in turn.
    columns = ["--condition_columns", "text", "--text_encoder", "words"]
    train(job, job.folder / "scenes.npz", *columns, "--model.patch_size", 4)
    prompts = "; ".join(map(words_of, CAPTIONS))
    for scale in (1, 2):
        samples = draw(job, f"guidance_{scale}", len(asked), scale, "--prompt", prompts)
        right = positions_right(classifier, samples, asked)
        figures[f"guidance {scale}"] = right.mean()
        figures[f"guidance {scale}, captions without a canvas"] = right[np.tile(is_new, SAMPLES_PER_CAPTION)].mean()
    return {**figures, "passes": bool(figures["guidance 2"] > 0.95)}


# --- Fields: floats of four channels by a formula of two numbers, scored by their moments ---

FIELD_SHAPE = (24, 40, 4)
NUM_FIELDS = 2000
NUM_SCORED = 500
MAX_CYCLES = 9
LEAST_RADII = 8  # of the power spectrum, above 1 % of its peak


def make_fields(numbers: np.ndarray) -> np.ndarray:
    """Returns the field, float32 (24, 40, 4), of each row (angle, strength) of `numbers`.

    Two textures of up to 9 cycles over 24 pixels are mixed by cosine and sine of `angle`, and saturate the more, the
    larger `strength` is.
    """
    rows, columns, _ = FIELD_SHAPE
    frequencies = (np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns))
    radius = rows * np.hypot(*frequencies)
    amplitude = ((radius > 0.5) & (radius < MAX_CYCLES)) / np.sqrt(1 + radius)
    noise = np.random.default_rng(1).normal(size=(2, *FIELD_SHAPE))
    textures = np.fft.irfft2(np.fft.rfft2(noise, axes=(1, 2)) * amplitude[..., None], s=FIELD_SHAPE[:2], axes=(1, 2))
    textures /= textures.std()
    fields = [
        np.tanh(strength * (np.cos(angle) * textures[0] + np.sin(angle) * textures[1])) for angle, strength in numbers
    ]
    return (300 + 20 * np.array(fields)).astype(np.float32)


def draw_numbers(count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns rows (angle in radians, strength), float32 (n, 2)."""
    return rng.uniform((0, 0.7), (np.pi, 1.2), (count, 2)).astype(np.float32)


def score(job: Job, name: str, *words: Any) -> dict[str, float]:
    """Returns the row of eval_fid.py's moments."""
    rows = job.folder / f"{name}.json"
    flags = ["--fid_stats", job.folder / "moments.npz", "--metrics", "moments", "--num_samples", NUM_SCORED]
    run("eval_fid.py", *words, *flags, "--json", rows, "--out", job.folder / name, "--wandb.mode", "disabled")
    (row,) = json.loads(rows.read_text(encoding="utf-8"))
    return {key: row[key] for key in ("mean_error", "std_error", "spectrum_error", "spectrum_worst")}


def check_fields(job: Job) -> dict[str, Any]:
    """The power spectrum of unguided samples: within 10 % of the data's wherever that has 1 % of its peak."""
    rng = np.random.default_rng(0)
    numbers = draw_numbers(NUM_FIELDS, rng)
    data = f"npz:{job.folder / 'fields.npz'}"
    fields = make_fields(numbers)
    names = np.array(["angle", "strength"])
    np.savez(job.folder / "fields.npz", images=fields, conditions=numbers, condition_names=names)
    run("compute_fid_stats.py", "--dataset_name", data, "--metrics", "moments", "--out", job.folder / "moments.npz")
    with np.load(job.folder / "moments.npz") as moments:
        spectrum = moments["pixels.spectrum"]
    num_radii = int((spectrum >= 0.01 * spectrum.max(axis=0)).all(axis=1).sum())
    assert num_radii >= LEAST_RADII, num_radii

    # What other fields of the same formula reach.
    others = draw_numbers(NUM_SCORED, rng)
    np.savez(job.folder / "others.npz", images=make_fields(others))
    figures: dict[str, Any] = {"radii": num_radii, "real": score(job, "real", "--samples", job.folder / "others.npz")}

    # Samples whose numbers are rows of the data, and samples of numbers that no field had.
    train(job, job.folder / "fields.npz", "--model.patch_size", 4, "--lr_schedule", "cosine", "--batch_size", 64)
    # Euler's steps lose power where conditions leave much to chance.
    steps = ["--cfg_scale", 1, "--denoise_timesteps", 32, "--solver", "heun"]
    figures["samples"] = score(job, "samples", "--load_dir", job.folder / "run", *steps)
    np.savez(job.folder / "asked.npz", conditions=others)
    samples = draw(job, "drawn", NUM_SCORED, 1, "--condition_file", job.folder / "asked.npz")
    is_inside = samples.dtype == np.float32 and fields.min() <= samples.min() and samples.max() <= fields.max()
    figures["R^2 of values"] = r2_score(make_fields(others).ravel(), samples.ravel())
    sweep = ["--sweep", "angle=0:3:9", "--cfg_scale", 1, "--num_samples", 9, "--out", job.folder / "pictures"]
    run("sample.py", "--load_dir", job.folder / "run", *sweep)
    return {**figures, "passes": bool(is_inside and figures["samples"]["spectrum_worst"] < 10)}


# --- Images: digits of 8x8 from their means over 2x2 ---

NUM_SMALL_HELD_OUT = 297
DRAWS = 16  # of each


def shrink(images: np.ndarray) -> np.ndarray:
    """Returns the means over 2x2 of images (..., 8, 8, 1)."""
    return images.reshape(*images.shape[:-3], 4, 2, 4, 2, 1).mean(axis=(-4, -2))


def decibels(images: np.ndarray, truth: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of images in [0, 1]."""
    return float(-10 * np.log10(np.square(images - truth).mean()))


def check_image(job: Job) -> dict[str, Any]:
    """Digits drawn from small ones: nearer to the truth than linear interpolation, by 1 dB and, in the mean of sixteen,
    4 dB; made small again, they are what was given, to 0.03."""
    digits = np.random.default_rng(0).permutation(load_digits().images)
    images = np.round(digits * (255 / 16)).astype(np.uint8)[..., None]
    small = np.round(shrink(images)).astype(np.uint8)
    truth, given = images[:NUM_SMALL_HELD_OUT] / 255, small[:NUM_SMALL_HELD_OUT]
    arrays = {"images": images[NUM_SMALL_HELD_OUT:], "validation_images": images[:NUM_SMALL_HELD_OUT]}
    np.savez(job.folder / "plain.npz", **arrays)
    both = {"condition_images": small[NUM_SMALL_HELD_OUT:], "validation_condition_images": given}
    np.savez(job.folder / "pairs.npz", **arrays, **both)
    np.savez(job.folder / "asked.npz", condition_images=given)

    # From a run that knows digits, but has never been given one.
    source = train(job, job.folder / "plain.npz", "--model.patch_size", 2, name="plain")
    train(job, job.folder / "pairs.npz", "--model.patch_size", 2, "--load_dir", source)
    asked = ["--condition_file", job.folder / "asked.npz", "--batch_size", 528]
    found = draw(job, "drawn", DRAWS * len(given), 1, *asked).reshape(DRAWS, *truth.shape) / 255

    linear = zoom(given / 255, (1, 2, 2, 1), order=1, grid_mode=True, mode="nearest")
    figures = {"linear, dB": decibels(linear, truth), "one, dB": decibels(found[0], truth)}
    figures |= {"mean, dB": decibels(found.mean(axis=0), truth)}
    figures |= {"given back": float(np.sqrt(np.square(shrink(found) - given / 255).mean()))}
    is_near = figures["one, dB"] > figures["linear, dB"] + 1 and figures["mean, dB"] > figures["linear, dB"] + 4
    return {**figures, "passes": is_near and figures["given back"] < 0.03}


# --- Few images: 150 fours in two poses, changed in training ---

NUM_FOURS = 150  # originals in training; the other 31 are held out
POSES = (0, 10)  # degrees
FAR = 30  # degrees: further than any four of the data is turned, to the eye of what reads angles
NUM_FEW_DRAWN = 500
NUM_LOSSES = 160  # for each image


def measure_loss(folder: Path, images: np.ndarray) -> float:
    """Returns the loss of a run's EMA on images without classes, a mean over times and noise drawn anew."""
    generator = load_generator(folder)
    model = generator.model
    batch = PixelBatch(condition=np.zeros(len(images), np.int32), image=images)

    @jax.jit
    def compute(params, key):
        examples = draw_examples(key, batch, model.objective, class_dropout_prob=0.0)
        static = {"model": model.network, "objective": model.objective}
        return example_losses(params, params, model.codec, examples, **static)[0].mean()

    return float(np.mean([compute(generator.params, jax.random.key(i)) for i in range(NUM_LOSSES)]))


def check_augmentation(job: Job) -> dict[str, Any]:
    """A validation loss that ends lower with changed images, of which samples show nothing: how far they are turned is
    read as of the turned digits."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    originals = rng.permutation(digits.images[digits.target == DIGIT]) * (255 / 16)
    parts = {"images": originals[:NUM_FOURS], "validation_images": originals[NUM_FOURS:]}
    posed = {name: turn(np.repeat(part, 2, axis=0), np.tile(POSES, len(part))) for name, part in parts.items()}
    np.savez(job.folder / "fours.npz", **posed)

    # What reads angles knows them all.
    angles = {name: rng.uniform(-180, 180, len(part) * TURNS) for name, part in parts.items()}
    flat = {
        name: turn(np.repeat(part, TURNS, axis=0), angles[name]).reshape(-1, 64) / 255 for name, part in parts.items()
    }
    radians = np.deg2rad(angles["images"])
    reader = KernelRidge(kernel="rbf", alpha=0.01, gamma=0.1)
    reader.fit(flat["images"], np.stack([np.cos(radians), np.sin(radians)], axis=1))

    def read(images: np.ndarray) -> np.ndarray:
        return np.rad2deg(angle_of(reader.predict(images.reshape(len(images), -1))))

    def describe(images: np.ndarray) -> dict[str, float]:
        found = read(images / 255)
        return {"spread, degrees": found.std(), "turned far": (np.abs(found) > FAR).mean()}

    errors = (read(flat["validation_images"]) - angles["validation_images"] + 180) % 360 - 180
    error = np.sqrt(np.square(errors).mean())
    figures: dict[str, Any] = {"error, degrees": error, "real": describe(posed["validation_images"])}
    for name, words in (("plain", []), ("augmented", ["--augment", "rotate,translate,scale"])):
        part = job._replace(folder=job.folder / name)
        folder = train(part, job.folder / "fours.npz", "--model.patch_size", 2, *words)
        figures[name] = {
            "held-out loss": measure_loss(folder, posed["validation_images"][..., None]),
            "loss": measure_loss(folder, posed["images"][..., None]),
        }
        figures[name] |= describe(draw(part, "samples", NUM_FEW_DRAWN, 1))

    plain, augmented, real = figures["plain"], figures["augmented"], figures["real"]
    is_upright = augmented["spread, degrees"] < real["spread, degrees"] + error
    return {**figures, "passes": bool(is_upright and augmented["held-out loss"] < plain["held-out loss"])}


class Case(NamedTuple):
    check: Callable[[Job], dict[str, Any]]
    steps: int


CASES = {
    "vector": Case(check_vector, 2500),
    "text": Case(check_text, 4000),
    "fields": Case(check_fields, 3200),
    "image": Case(check_image, 1500),
    "augmentation": Case(check_augmentation, 4000),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int)
    options, further = parser.parse_known_args()
    case = CASES[options.case]
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    figures = case.check(Job(folder, ["--max_steps", str(options.steps or case.steps), *further]))
    print(json.dumps({"case": options.case, **figures}, default=float))
    sys.exit(not figures["passes"])


if __name__ == "__main__":
    main()
