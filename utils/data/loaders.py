"""Loaders: a record for each source of data that --dataset_name can name. One more source is one line of LOADERS."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from utils.base.effects import refuse_ignored
from utils.base.files import expand_home
from utils.base.messages import UserError, warn
from utils.base.settings import check_made, unknown_name
from utils.conditions.condition import record_condition
from utils.conditions.tokens import TextCondition
from utils.data.arrays import load_array_file, load_digits
from utils.data.captions import encode_captions
from utils.data.dataset import SPLITS, DataOptions, ImageDataset, RandomAccess, check_own_size, warn_of_range
from utils.data.image_folder import load_archive, load_folder, sharing_listings
from utils.data.joined import SEPARATOR, join
from utils.data.latents import load_latents
from utils.data.pairs import load_pairs
from utils.data.tfds import load_celebahq, load_imagenet, load_tfds
from utils.images.pixels import UINT8
from utils.storage.hub import open_hub
from utils.storage.parquet_files import open_parquet
from utils.storage.remote import fetch
from utils.storage.remote_tree import fetch_folder
from utils.storage.tar_files import open_tar
from utils.storage.tree import Tree
from utils.storage.urls import is_url, refuse_url
from utils.storage.zip_files import open_zip


@dataclasses.dataclass(frozen=True)
class Loader:
    """A source of data: how a split of it is loaded, and what its name and the flags mean to it.

    `load(name, split, options)` gets the name as the user wrote it (tfds:NAME), with a `~` in a path expanded.
    """

    load: Callable[[str, str, DataOptions], ImageDataset]
    help: str = ""
    argument: str | None = None  # word for what follows a colon in the name; None: the name stands alone
    is_path: bool = False  # whether the argument is a path, or a URL of object storage
    needs_files: bool = False  # whether its files are mapped: those in object storage are fetched first
    options: tuple[str, ...] = ()  # fields of DataOptions that `load` uses; random_flip is applied to every source
    default_size: int | None = None  # side of the images unless --image_size gives another; None: their own
    flips: bool = False  # whether training mirrors half of the images unless --random_flip says otherwise
    holds: str = "images"  # or what is made of the images of another data set: 'latents', 'pairs'

    @property
    def is_derived(self) -> bool:
        """Whether the data are made from another data set, whose name they bear in a run's configuration."""
        return self.holds != "images"

    @property
    def is_resizable(self) -> bool:
        """Whether any size fits its images: they are resized, and no data set of a known size is meant."""
        return "image_size" in self.options and self.argument is not None


_TFDS = ("data_dir", "image_size")
_FILES = (
    *("image_size", "image_mode", "broken_images", "max_megapixels", "check_images"),
    *("condition_columns", "text_encoder"),
)


def _archive_loader(open_tree: Callable[[str], Tree], help: str, argument: str, is_path: bool = True) -> Loader:
    """Returns the loader of image files that are not files of their own; `open_tree` opens what holds them."""
    load = functools.partial(load_archive, open_tree=open_tree)
    return Loader(load, help, argument, is_path=is_path, options=_FILES, default_size=256, flips=True)


LOADERS: dict[str, Loader] = {
    # By a name alone.
    "digits": Loader(load_digits, "1,797 real handwritten digits, 8x8, grey, shipped with scikit-learn"),
    "imagenet256": Loader(
        functools.partial(load_imagenet, size=256), "ImageNet in square crops", options=("data_dir",), flips=True
    ),
    "imagenet128": Loader(
        functools.partial(load_imagenet, size=128), "ImageNet in square crops", options=("data_dir",), flips=True
    ),
    "celebahq256": Loader(load_celebahq, "CelebA-HQ, 256x256", options=("data_dir",)),
    "cifar10": Loader(functools.partial(load_tfds, builder="cifar10"), "CIFAR-10, 32x32", options=_TFDS, flips=True),
    # By a kind, and what follows the colon.
    "folder": Loader(
        load_folder,
        "image files, in a folder for each class or in one folder",
        "PATH",
        is_path=True,
        options=_FILES,
        default_size=256,
        flips=True,
    ),
    "zip": _archive_loader(open_zip, "the same in a zip, also as EDM and StyleGAN write it", "FILE"),
    "tar": _archive_loader(open_tar, "the same in tars, also as WebDataset writes them", "GLOB"),
    "parquet": _archive_loader(open_parquet, "images in a column of parquet files", "GLOB"),
    "hf": _archive_loader(
        open_hub, "those of a data set on the Hugging Face hub", "USER/NAME[:CONFIG[:SPLIT]]", is_path=False
    ),
    "npz": Loader(
        load_array_file,
        "images and labels in NumPy's files",
        "FILE",
        is_path=True,
        needs_files=True,
        options=("value_range", "condition_columns", "text_encoder"),
    ),
    "tfds": Loader(load_tfds, "any labelled images of TensorFlow Datasets", "NAME", options=_TFDS),
    # Made from the images of another data set.
    "latents": Loader(
        load_latents,
        "what encode_latents.py made of one of these",
        "DIR",
        is_path=True,
        needs_files=True,
        holds="latents",
    ),
    "pairs": Loader(
        load_pairs,
        "samples of a model, and their noise, made by make_pairs.py",
        "DIR",
        is_path=True,
        needs_files=True,
        holds="pairs",
    ),
}


def load_dataset(name: str, split: str = "train", options: DataOptions | None = None) -> ImageDataset:
    """Returns the `split` ('train' or 'validation') of the data set `name`, one of LOADERS; only 'train' ever flips.

    Raises UserError, with what to do, if the data are missing, the name is unknown, or `options` ask for what the
    source cannot do: another size, or mirror images of what is not kept as images.
    """
    if split not in SPLITS:
        raise UserError(f"--split={split} is unknown; use train or validation")

    # The loader of the name, with its defaults for what was left unset.
    name = expand_name(name)
    loader = get_loader(name)
    options = options or DataOptions()
    if options.image_size is None:
        options = dataclasses.replace(options, image_size=loader.default_size)
    local = _fetch(name, loader)
    dataset = loader.load(local, split, options)
    check_made(dataset, ImageDataset, f"the loader of --dataset_name={name}")
    if dataset.name == local:
        dataset = dataclasses.replace(dataset, name=name)
    check_own_size(name, dataset.image_shape, options)  # of loaders that have no use for the option
    text = dataset.condition.find_part(TextCondition)
    if text is not None:
        source = encode_captions(cast(RandomAccess, dataset.source), text, f"--dataset_name={name}")
        dataset = dataclasses.replace(dataset, source=source)
    elif options.text_encoder is not None:
        fix = (
            "ask for them by --condition_columns text, or leave it out"
            if "condition_columns" in loader.options
            else "leave it out"
        )
        raise UserError(f"--text_encoder={options.text_encoder}: {name} has no captions; {fix}")
    if split == "train":  # a data set is warned of once
        warn_of_range(dataset, "value_range" in loader.options)

    # Mirror images, in training alone. Pairs would need their noise mirrored, latents cannot be mirrored afterwards.
    flips = options.random_flip
    if flips is None or split != "train":
        # An angle turns with its image, and a text says what is on the left: only classes stay as they are.
        flips = dataset.random_flip or (loader.flips and dataset.own_condition is None)
    elif flips and dataset.pair_shape:
        raise UserError(
            f"--random_flip=1: {name} holds samples with their noise, which cannot be mirrored; leave it out"
        )
    elif flips and dataset.latents and not dataset.random_flip:
        raise UserError(
            f"--random_flip=1: {name} holds no latents of mirrored images; make them with encode_latents.py "
            "--random_flip 1, or leave the flag out"
        )
    return dataclasses.replace(dataset, random_flip=flips and split == "train")


def _fetch(name: str, loader: Loader) -> str:
    """Returns the name of a data set, of a local copy where its files are mapped, and lie in object storage."""
    prefix, _, path = name.partition(":")
    if not (loader.needs_files and is_url(path)):
        return name
    return f"{prefix}:{fetch_folder(path, 'dataset_name') if loader.is_derived else fetch(path, 'dataset_name')}"


def load_splits(name: str, options: DataOptions | None = None) -> dict[str, ImageDataset]:
    """Returns both splits of a data set, see `load_dataset`; files that they share are listed once."""
    with sharing_listings():
        return {split: load_dataset(name, split, options) for split in SPLITS}


def split_names(name: str) -> list[str]:
    """Returns the names of data sets that are joined in `name`; `name` alone where these are not all known."""
    names = name.split(SEPARATOR)
    return names if len(names) > 1 and all(map(find_loader, names)) else [name]


def _load_joined(name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns a split of several data sets as one, see `join`. Raises UserError, too, for as many weights as there are
    no names."""
    names = split_names(name)
    weights = options.dataset_weights
    if weights and len(weights) != len(names):
        given = ",".join(f"{weight:g}" for weight in weights)
        raise UserError(f"--dataset_weights={given}: give {len(names)} numbers, one for each --dataset_name")
    options = dataclasses.replace(options, dataset_weights=None)
    return join(name, [load_dataset(each, split, options) for each in names], weights if split == "train" else None)


def _joined_loader(loaders: Sequence[Loader]) -> Loader:
    """Returns the loader of several data sets as one, with what all of them have."""
    sizes = {loader.default_size for loader in loaders}
    options = [name for name in loaders[0].options if all(name in loader.options for loader in loaders)]
    return Loader(
        _load_joined,
        argument="",
        options=(*options, "dataset_weights"),
        default_size=sizes.pop() if len(sizes) == 1 else None,
        flips=all(loader.flips for loader in loaders),
        holds=next((loader.holds for loader in loaders if loader.is_derived), "images"),
    )


def find_loader(name: str) -> Loader | None:
    """Returns the loader of the data set `name`, or of several joined by ' + '; None if no loader has this name."""
    if SEPARATOR in name and all(found := [find_loader(each) for each in name.split(SEPARATOR)]):
        return _joined_loader(cast(list[Loader], found))
    prefix, _, argument = name.partition(":")
    # A name in full, or a kind with something after its colon.
    exact = LOADERS.get(name)
    loader = LOADERS.get(prefix)
    if exact and exact.argument is None:
        return exact
    return loader if loader and loader.argument and argument else None


def get_loader(name: str) -> Loader:
    """Returns the loader of the data set `name`. Raises UserError, which lists the known ones, if there is none."""
    loader = find_loader(name)
    if loader is None:
        # Of several, the first that is none.
        name = next((each for each in name.split(SEPARATOR) if find_loader(each) is None), name)
        # A path without its prefix is the usual slip.
        kind = "folder" if Path(name).is_dir() else Path(name).suffix[1:] if Path(name).is_file() else None
        guess = f"{kind}:{name}" if kind in LOADERS else None
        raise unknown_name(f"--dataset_name={name}", name, list_names(), guess)
    return loader


def list_names(is_meant: Callable[[Loader], bool] = lambda loader: True) -> list[str]:
    """Returns the names of the loaders for which `is_meant` holds, as a user writes them: digits, folder:PATH."""
    return [
        f"{name}:{loader.argument}" if loader.argument else name for name, loader in LOADERS.items() if is_meant(loader)
    ]


def check_data_settings(dataset_name: str, given: Mapping[str, Any]) -> None:
    """Raises UserError for a setting of data among `given`, {name: value}, that has no effect on the data set.

    data_dir is only warned of: scripts may give it for every data set.
    """
    loader = find_loader(dataset_name)
    if loader is None:  # refused where the data are loaded
        return
    # Only loaders of image files decode, and may meet broken files; others have no captions, or no floats.
    for name in (*_FILES[1:], "value_range"):
        if name not in loader.options:
            takers = ", ".join(list_names(lambda loader, name=name: name in loader.options))
            refuse_ignored((name,), given, f"on {dataset_name}, only on {takers}")

    if "dataset_weights" not in loader.options:
        refuse_ignored(("dataset_weights",), given, "on one data set, only where --dataset_name is given several times")

    # A script that loops over data sets may always name it.
    if "data_dir" in given and "data_dir" not in loader.options:
        warn(f"--data_dir={given['data_dir']} has no effect on {dataset_name}, which TFDS does not prepare")


def expand_name(name: str) -> str:
    """Returns the name of a data set with a leading ~ or ~user of its path replaced.

    Raises UserError if there is no such home, and for URLs that are not supported.
    """
    if len(names := split_names(name)) > 1:
        return SEPARATOR.join(map(expand_name, names))
    setting = f"--dataset_name={name}"
    loader = find_loader(name)
    prefix, _, path = name.partition(":")
    if loader is not None and loader.is_path and is_url(path):
        return name
    refuse_url(name, "dataset_name")
    if loader is None:  # a path without its prefix, perhaps, which is guessed from it
        return expand_home(name, setting)
    return f"{prefix}:{expand_home(path, setting)}" if loader.is_path else name


def describe_data(datasets: Mapping[str, ImageDataset]) -> dict[str, Any]:
    """Returns a run's record of its data, {split: data set}.

    It is enough to sample without them, and to tell whether they are the same when the run is continued (see
    utils/data/fingerprint.py). Only images that are not uint8 have their format in it.
    """
    dataset = datasets["train"]
    return {
        "name": dataset.name,
        "image_shape": list(dataset.image_shape),
        **record_condition(dataset.condition),
        **({} if dataset.pixels == UINT8 else {"pixels": dataset.pixels.to_json()}),
        "splits": {split: dataset.fingerprint.to_json() for split, dataset in datasets.items()},
    }


def summarize_data(datasets: Mapping[str, ImageDataset], batch_size: int) -> str:
    """Sums up the data in a line, to see at once whether they are those that were meant."""
    train, validation = (datasets[split] for split in SPLITS)
    num_images = len(train.source)
    condition = train.condition.summary()
    return (
        f"data: {train.name}, {num_images:,} image{'s' * (num_images != 1)} to train on and "
        f"{len(validation.source):,} held out, "
        f"{'x'.join(map(str, train.image_shape))}, {condition}{', ' * bool(condition)}"
        f"{num_images / batch_size:,.1f} steps per epoch, {'half of them' if train.random_flip else 'none'} mirrored"
    )
