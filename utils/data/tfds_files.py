"""Where TFDS has prepared a data set, in which format, and how to prepare it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from utils.base.errors import UserError
from utils.base.external import parse_json, read_json
from utils.base.files import refuse_url

PACKAGES = "tensorflow-datasets importlib_resources"  # the second is imported by the first, which does not say so
PREPARATIONS = {  # of data sets that TFDS cannot fetch by itself
    "imagenet2012": "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {root}/downloads/manual and run "
    "{command}",
    "celebahq256": "run `python data/celebahq256.py --source korexyz/celeba-hq-256x256 --data_dir {root}`",
}
FEATURE_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.[\w.]+")


def is_remote(path: os.PathLike | str) -> bool:
    return "://" in os.fspath(path)


def _read_json(path: epath.Path) -> dict[str, Any]:
    """BadFileError or OSError where it is no JSON object."""
    return parse_json(path.read_bytes()) if is_remote(path) else read_json(Path(path))


def check_features(flag: str, folder: epath.Path) -> None:
    """UserError where features.json names a class outside of TFDS's own features: it would import that module."""

    def names(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (str(value[key]) for key in ("pythonClassName", "type") if isinstance(value.get(key), str))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from names(item)

    try:
        content = _read_json(folder / "features.json")
        other = next((name for name in names(content) if "." in name and not FEATURE_CLASS.fullmatch(name)), None)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {folder}/features.json is damaged ({error}); prepare the data set again") from None
    if other is not None:
        raise UserError(
            f"{flag}: {folder}/features.json names {other[:100]}, which is no feature of TFDS; it is not read"
        )


def find_prepared(flag: str, data_dir: str | os.PathLike | None, builder: str) -> tuple[epath.Path, str]:
    """(folder of the newest version of `builder`, 'array_record' where it is prepared as that, else 'tfrecord')."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    refuse_url(data_dir, "data_dir")
    root = epath.Path(data_dir).expanduser()
    root = root if "://" in str(root) else root.absolute()
    path, _, version = builder.partition(":")
    try:
        folders = [file.parent for file in (root / path).glob(f"{version or '[0-9]*'}/dataset_info.json")]
    except Exception as error:  # of the network's file systems, which share no type
        raise UserError(f"--data_dir={root} cannot be read: {str(error).splitlines()[0]}") from error
    if not folders:
        how = PREPARATIONS.get(path, "run {command}").format(root=root, command=_prepare_command(builder, root))
        raise UserError(
            f"{flag}: no data set {builder} under --data_dir={root}; {how}. "
            "`make demo` (--dataset_name digits) shows the suite at work now"
        )
    folder = max(folders, key=lambda folder: [int(number) for number in re.findall(r"\d+", folder.name)])
    try:
        info = _read_json(folder / "dataset_info.json")
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"{flag}: {folder}/dataset_info.json is damaged ({error}); prepare the data set again"
        ) from None
    known = [name for name in ("array_record", "tfrecord") if name in formats]
    if not known:
        raise UserError(
            f"{flag}: {folder} is prepared as {formats[0]}, which is not read here; add array_record to it: "
            f"{convert_command(folder)}"
        )
    return folder, known[0]


def _prepare_command(builder: str, root: os.PathLike[str]) -> str:
    # Not `tfds build`, which does not start without apache-beam and mlcroissant.
    return (
        f'`python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{builder}', data_dir='{root}').download_and_prepare(file_format='array_record')\"` "
        "(without the last argument: as tfrecord)"
    )


def convert_command(folder: Any) -> str:
    return (
        f"`pip install {PACKAGES} apache-beam mlcroissant && "
        f"tfds convert_format --dataset_version_dir {folder} --out_file_format array_record`"
    )
