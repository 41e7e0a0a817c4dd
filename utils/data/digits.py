"""1,797 real handwritten digits, 8x8 and grey, shipped with scikit-learn (UCI, CC BY 4.0)."""

import numpy as np

from utils.data.dataset import DataOptions, ImageDataset, array_dataset, check_own_size, split_rows

NUM_HELD_OUT = 297


def load_digits(name: str, split: str, options: DataOptions) -> ImageDataset:
    from sklearn import datasets  # slow to import

    check_own_size(name, (8, 8), options)
    digits = datasets.load_digits()  # 16 levels of ink, 0 .. 16
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    rows = split_rows(len(images), split, NUM_HELD_OUT)
    return array_dataset(name, images[rows], digits.target[rows], tuple("0123456789"), split)
