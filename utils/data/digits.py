"""1,797 real handwritten digits, 8x8 and grey, shipped with scikit-learn (UCI, CC BY 4.0)."""

import hashlib

import numpy as np

from utils.data.dataset import SPLITS, ArraySource, DataOptions, ImageDataset, check_own_size, hold_out
from utils.data.fingerprint import Fingerprint

NUM_HELD_OUT = 297


def load_digits(name: str, split: str, options: DataOptions) -> ImageDataset:
    from sklearn import datasets  # slow to import

    check_own_size(name, 8, options)
    digits = datasets.load_digits()  # 16 levels of ink, 0 .. 16
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    rows = hold_out([str(row) for row in range(len(images))], NUM_HELD_OUT)[SPLITS.index(split)]
    source = ArraySource(images[rows], digits.target[rows].astype(np.int32))
    digest = hashlib.sha256(source.images.tobytes() + source.labels.tobytes()).hexdigest()
    fingerprint = Fingerprint("arrays", len(source), digest)
    return ImageDataset(name, split, source, (8, 8, 1), tuple("0123456789"), False, fingerprint)
