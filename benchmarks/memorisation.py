"""Time and memory of memorisation at the size of ImageNet: synthetic samples against synthetic training rows.

    python benchmarks/memorisation.py --num_samples 1000 --num_rows 100000

Rows are normal and are drawn block by block, so that they take no memory; a hundred samples are noisy copies. Prints a
line of the result, its time and the largest memory of the process.
"""

import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.base.messages import progress_bar
from utils.metrics.memorisation import measure

BLOCK = 4096
NUM_COPIES = 100


def main(_) -> None:
    sizes = flags.FLAGS

    def draw(seed: int, count: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((count, sizes.dimensions), np.float32)

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, sizes.num_rows, BLOCK):
            rows = draw(start, min(BLOCK, sizes.num_rows - start))
            yield start, rows[:, None]
            bar.update(len(rows))

    # Passes as in an evaluation without held-out images: neighbours, their rows, and their own neighbours.
    samples = draw(1, sizes.num_samples)
    count = min(NUM_COPIES, sizes.num_samples, BLOCK)
    samples[:count] = draw(0, BLOCK)[:count] + 0.01 * draw(2, count)
    start = time.monotonic()
    with progress_bar(total=3 * sizes.num_rows, unit="row") as bar:
        found = measure(samples, None, blocks)
    seconds = time.monotonic() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{sizes.num_samples:,} samples, {sizes.num_rows:,} rows of {sizes.dimensions:,}: {seconds / 60:.1f} min, "
        f"{memory:.2f} GiB; memorised {found.results['memorised']:.2f} % of {100 * count / len(samples):.2f} %, "
        f"{found.neighbours.num_repaired} queries repaired"
    )


if __name__ == "__main__":
    flags.DEFINE_integer("num_samples", 10_000, "Samples.", lower_bound=2)
    flags.DEFINE_integer("num_rows", 1_281_167, "Training rows: ImageNet's.", lower_bound=BLOCK)
    flags.DEFINE_integer("dimensions", 1024, "Numbers in a row.", lower_bound=1)
    app.run(main)
