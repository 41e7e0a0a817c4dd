"""Data sets for the tests."""

from utils.data.dataset import DataOptions, ImageDataset
from utils.data.loaders import load_dataset


def load(
    name: str, split: str = "train", data_dir=None, image_size=None, broken_images="refuse", **options
) -> ImageDataset:
    """`load_dataset` with its options as arguments."""
    return load_dataset(name, split, DataOptions(data_dir, image_size, broken_images, **options))
