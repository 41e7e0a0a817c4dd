"""Data sets by name. One more is one loader and one line of DATASETS or PREFIXES."""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from pathlib import Path

from utils.base.errors import UserError
from utils.base.files import refuse_url
from utils.data.array_file import load_array_file
from utils.data.dataset import SPLITS, DataOptions, ImageDataset, check_own_size
from utils.data.digits import load_digits
from utils.data.image_folder import load_folder
from utils.data.latents import load_latents
from utils.data.pairs import load_pairs
from utils.data.tfds import load_celebahq, load_imagenet, load_tfds

Loader = Callable[[str, str, DataOptions], ImageDataset]
DATASETS: dict[str, Loader] = {
    "digits": load_digits,
    "imagenet256": functools.partial(load_imagenet, size=256),
    "imagenet128": functools.partial(load_imagenet, size=128),
    "celebahq256": load_celebahq,
    "cifar10": functools.partial(load_tfds, builder="cifar10", flip=True),
}
PREFIXES: dict[str, Loader] = {
    "folder": load_folder,
    "npz": load_array_file,
    "tfds": load_tfds,
    "latents": load_latents,
    "pairs": load_pairs,
}
PLACEHOLDERS = {"folder": "PATH", "npz": "FILE", "tfds": "NAME", "latents": "DIR", "pairs": "DIR"}


def load_dataset(name: str, split: str = "train", options: DataOptions | None = None) -> ImageDataset:
    """The `split` ('train' or 'validation') of data set `name`; only 'train' ever flips.

    digits          1,797 real handwritten digits, 8x8, grey, shipped with scikit-learn
    imagenet256     ImageNet in square crops; imagenet128 likewise
    celebahq256     CelebA-HQ, 256x256
    cifar10         CIFAR-10, 32x32
    tfds:NAME       any labelled images of TensorFlow Datasets, such as tfds:oxford_flowers102
    folder:PATH     image files, in a folder for each class or in one folder
    npz:FILE        images and labels in one NumPy file
    latents:DIR     what encode_latents.py made of one of these
    pairs:DIR       samples of a model, and their noise, that make_pairs.py made

    imagenet256, celebahq256, cifar10 and tfds:NAME are read from what TFDS prepared, in any version: array_record at
    random and without TensorFlow, else tfrecord as a stream. Sizes of folder:PATH default to 256, of cifar10 and
    tfds:NAME to the images' own.
    UserError, with what to do, where the data are missing or the name is unknown.
    """
    if split not in SPLITS:
        raise UserError(f"--split={split} is unknown; use train or validation")
    refuse_url(name, "dataset_name")
    prefix, colon, rest = name.partition(":")
    load = DATASETS.get(name) or (PREFIXES.get(prefix) if colon and rest else None)
    if load is None:
        raise UserError(_unknown_name(name))
    options = options or DataOptions()
    dataset = load(name, split, options)
    check_own_size(name, dataset.image_shape, options)  # of loaders that have no use for the option
    if options.random_flip is None or split != "train":
        return dataset
    if options.random_flip and dataset.pair_shape:
        raise UserError(
            f"--random_flip=1: {name} holds samples with their noise, which cannot be mirrored; leave it out"
        )
    if options.random_flip and dataset.latents and not dataset.random_flip:
        raise UserError(
            f"--random_flip=1: {name} holds no latents of mirrored images; make them with encode_latents.py "
            "--random_flip 1, or leave the flag out"
        )
    return dataclasses.replace(dataset, random_flip=options.random_flip)


def _unknown_name(name: str) -> str:
    known = [*sorted(DATASETS), *(f"{prefix}:{word}" for prefix, word in PLACEHOLDERS.items())]
    guess = [f"folder:{name}"] if Path(name).is_dir() else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {guess[0]}?" if guess else "."
    return f"--dataset_name={name} is unknown{hint} Known are {', '.join(known)}"
