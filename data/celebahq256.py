"""CelebA-HQ at 256x256 for TensorFlow Datasets, from Hugging Face's parquet files or from a folder of images.

    python data/celebahq256.py --source korexyz/celeba-hq-256x256

--source is a data set on the hub, or a folder: of train*.parquet and validation*.parquet with the columns image and
label (in it or in its folder `data`), or of images in folders `female` and `male`, or of images without labels; either
of the last two also below `train` and `validation`. Where validation is missing, one fifteenth of the images is held
out, the fraction of the usual split: 2,000 of 30,000.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import tensorflow_datasets as tfds
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from pyarrow.parquet import ParquetFile
from tensorflow_datasets.core import shuffle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where utils/ is, which a program in data/ does not see

from utils.base.commands import write_command
from utils.base.external import BadFileError, read_json
from utils.base.files import open_regular, prepare_output_folder, write_json
from utils.base.messages import UserError
from utils.data.tfds_files import import_tensorflow
from utils.flags import program
from utils.flags.definitions import define_path
from utils.images.decoding import UPRIGHT, BrokenImageError, open_image, read_image, read_image_file, read_orientation
from utils.images.folders import IMAGE_SUFFIXES, scan, system_message
from utils.storage.tree import LocalTree

SIZE = 256
CLASS_NAMES = ("female", "male")
SPLITS = {"train": ("train",), "validation": ("val", "validation")}  # and how they are named
HELD_OUT_FRACTION = 1 / 15
MAX_ROWS = 10**6  # of a parquet file; the set has 30,000 in all
MAX_EXPANSION = 8
SOURCE_FILE = "source.json"
INCOMPLETE_SECONDS = 24 * 3600
DEFAULT_HUB_ID = "korexyz/celeba-hq-256x256"
LAYOUT = "train*.parquet, {female,male}/IMAGE or IMAGE, the first also below data, the others below train"

Record = tuple[str, str, bytes, int]  # key, where it is from, encoded image, label
Listed = tuple[list[str], Callable[[], Iterator[Record]]]  # the keys of images, and how they are read


class Celebahq256(tfds.core.GeneratorBasedBuilder):
    """Images of 256x256 with the label female or male; splits train and validation."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    Put the parquet files of https://huggingface.co/datasets/{DEFAULT_HUB_ID}, or images in folders `female` and `male`,
    into a folder `celebahq256` in manual_dir; or name the source: `python data/celebahq256.py --source PATH_OR_HUB_ID`.
    """

    def __init__(self, *, source: str | os.PathLike | None = None, **kwargs):
        """`source`: a folder or the id of a data set on the hub; default: manual_dir/celebahq256, else manual_dir."""
        self.source = source
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIZE, SIZE, 3)),
            "label": tfds.features.ClassLabel(names=CLASS_NAMES),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="CelebA-HQ: 30,000 faces (Karras et al., 2018), at 256x256, labelled female or male.",
            homepage="https://github.com/tkarras/progressive_growing_of_gans",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        if importlib.util.find_spec("tensorflow") is None:
            shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize  # a larger split TFDS would sort in files that TensorFlow opens
        source = self.source
        if source is None:
            manual = dl_manager.manual_dir
            source = manual / self.name if (manual / self.name).is_dir() else manual
        splits = open_source(os.fspath(source))
        return {split: self._generate_examples(f"--source={source}", records) for split, records in splits.items()}

    def _generate_examples(self, flag: str, records: Iterator[Record]) -> Iterator[tuple[str, dict]]:
        for key, origin, data, label in records:
            yield key, {"image": fit(data, f"{flag}: {origin}"), "label": label}


def fit(data: bytes, name: str) -> bytes:
    """The encoded image itself where it is a JPEG or PNG of RGB, 256x256 and upright; else a PNG, brought to that.

    Raises UserError, saying `name`, where the image cannot be decoded.
    """
    pixels = read_image(data, name, (SIZE, SIZE))
    with open_image(data) as image:
        is_rgb = image.mode == "RGB" and not image.has_transparency_data
        is_upright = read_orientation(image) not in UPRIGHT
        if image.format in ("JPEG", "PNG") and is_rgb and image.size == (SIZE, SIZE) and is_upright:
            return data
    png = BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return png.getvalue()


def open_source(source: str) -> dict[str, Iterator[Record]]:
    """{split: its images} of a folder or of a data set on the hub; UserError where it is neither or not whole."""
    flag, root = f"--source={source}", local_folder(source)
    parquet = next((files for folder in (root, root / "data") if (files := sorted(folder.glob("*.parquet")))), [])
    if parquet:
        list_part = list_rows
        parts = {split: [file for file in parquet if file.name.startswith(names)] for split, names in SPLITS.items()}
    else:
        list_part = list_files
        parts = {split: root / name for split, names in SPLITS.items() for name in names if (root / name).is_dir()}
        parts = parts or {"train": root}
    if not parts.get("train"):
        raise UserError(f"{flag}: {root} has no train split; expected are {LAYOUT}")
    listed = {split: list_part(flag, part) for split, part in parts.items() if part}
    if "validation" in listed:
        return {split: read() for split, (_, read) in listed.items()}
    keys, read = listed["train"]
    held = held_out(flag, keys)
    return {
        "train": (record for record in read() if record[0] not in held),
        "validation": (record for record in read() if record[0] in held),
    }


def local_folder(source: str) -> Path:
    """The folder, or where the parquet files of a data set on the hub now are; UserError where there is neither."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise UserError(f"--source={source}: there is no such folder; give one, or a hub id such as {DEFAULT_HUB_ID}")
    patterns = [f"{folder}{name}*.parquet" for folder in ("", "data/") for names in SPLITS.values() for name in names]
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub's, its HTTP client's and the file system's have no base in common
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--source={source}: there is no such folder, and the hub gives no data set of that name ({reason}); "
            f"check the name (such as {DEFAULT_HUB_ID}) and the network, or give a folder that holds the files"
        ) from error


def held_out(flag: str, keys: list[str]) -> set[str]:
    """The keys of the images for validation. File names alone decide, not the folders they are in."""
    if len(keys) < 2:
        raise UserError(f"{flag} holds {len(keys)} image; 2 are needed, one of them to hold out")
    by_hash = sorted(keys, key=lambda key: hashlib.sha256(key.rpartition("/")[2].encode()).digest())
    return set(by_hash[: max(1, round(HELD_OUT_FRACTION * len(keys)))])


def list_rows(flag: str, files: list[Path]) -> Listed:
    """The images in parquet files; UserError where a file or column is missing."""

    @contextlib.contextmanager
    def reading(file: Path) -> Iterator[ParquetFile]:
        try:
            with open_regular(file) as opened:
                parquet = ParquetFile(opened)
                check_parquet_size(parquet, file.stat().st_size)
                yield parquet
        except (pa.ArrowException, OSError, BadFileError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
            raise UserError(f"{flag}: {file} is no readable parquet file ({reason}); fetch it again") from error

    keys = []
    for file in files:
        with reading(file) as parquet:
            types = {field.name: field.type for field in parquet.schema_arrow}
            keys += [f"{file.name}:{row}" for row in range(parquet.metadata.num_rows)]
        image, label = types.get("image", pa.null()), types.get("label", pa.null())
        if not (pa.types.is_struct(image) and image.get_field_index("bytes") >= 0 and pa.types.is_integer(label)):
            found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
            expected = "image (struct<bytes: binary, path: string>) and label (int64)"
            raise UserError(f"{flag}: {file} has the columns {found}; give files that have {expected}")
    count = re.search(r"-of-0*(\d+)\.parquet$", files[0].name)
    if count and int(count[1]) != len(files):
        missing = f"{len(files)} of the {count[1]} files that {files[0].name} is one of"
        raise UserError(f"{flag}: {files[0].parent} holds {missing}; fetch the others")

    def read() -> Iterator[Record]:
        for file in files:
            with reading(file) as parquet:
                batches = parquet.iter_batches(64, columns=["image", "label"])
                for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                    origin, label = f"row {number} of {file}", row["label"]
                    if label not in range(len(CLASS_NAMES)):
                        raise UserError(f"{flag}: {origin} has the label {label}; 0 (female) and 1 (male) are known")
                    yield f"{file.name}:{number}", origin, (row["image"] or {}).get("bytes") or b"", label

    return keys, read


def check_parquet_size(parquet: ParquetFile, num_bytes: int) -> None:
    """BadFileError where a file of so many bytes says that it holds far more: encoded images do not compress."""
    metadata = parquet.metadata
    parts = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    if metadata.num_rows > MAX_ROWS or sum(parts) > MAX_EXPANSION * num_bytes + 2**26:
        raise BadFileError(f"it says that it holds {metadata.num_rows:,} rows of {sum(parts):,} bytes")


def list_files(flag: str, folder: Path) -> Listed:
    """The image files below `female` and `male`, or those in the folder itself, labelled 0."""
    tree = LocalTree(folder)
    top = scan(tree, "", IMAGE_SUFFIXES)
    scanned = [top, *(scan(tree, below, IMAGE_SUFFIXES) for below in top.folders)]
    keys = sorted(path for each in scanned for path in each.images)
    if message := system_message(tree, [path for each in scanned for path in each.system]):
        print(f"{folder}: {message}", flush=True)
    if not keys:
        raise UserError(f"{flag}: {folder} holds neither parquet files nor images; expected are {LAYOUT}")
    classes = {key: key.rpartition("/")[0].lower() for key in keys}
    is_flat = not any(classes.values())
    if is_flat:
        print(f"{folder} has no folders female and male: labels are unknown, all are 0 (female)", flush=True)
    elif other := next((key for key, name in classes.items() if name not in CLASS_NAMES), None):
        raise UserError(f"{flag}: {folder} holds {other}, neither in female nor in male; move it away")

    def read() -> Iterator[Record]:
        for key, name in classes.items():
            path = folder / key
            try:
                content = read_image_file(path)
            except (OSError, BrokenImageError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"{flag}: {path} cannot be read ({reason}); put a good copy in its place") from None
            yield key, str(path), content, 0 if is_flat else CLASS_NAMES.index(name)

    return keys, read


def absolute(source: str) -> str:
    """A folder by its absolute path, a data set on the hub by its id."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def describe_source(builder: Celebahq256, source: str) -> str:
    """Returns a message about a prepared set whose source is not known to be `source`."""
    path = Path(builder.data_path) / SOURCE_FILE
    try:
        prepared_from = read_json(path).get("source")
    except BadFileError:  # missing, or damaged
        prepared_from = None
    if prepared_from == absolute(source):
        return ""
    origin = f"from {prepared_from}" if prepared_from else "from an unknown source"
    return f", {origin}, which was not compared with --source={source} (move it away to prepare it again)"


def remove_incomplete(builder: Celebahq256) -> None:
    """Removes what preparations that were killed have left, if nothing was written to it for a day."""
    for folder in Path(builder.data_path.parent).glob(f"incomplete.*_{builder.data_path.name}"):
        newest = max((path.stat().st_mtime for path in folder.rglob("*")), default=folder.stat().st_mtime)
        if time.time() - newest > INCOMPLETE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def define_flags() -> None:
    define_path("source", None, f"Folder, or data set on the Hugging Face hub such as {DEFAULT_HUB_ID}.")
    flags.DEFINE_string("data_dir", None, "Where to prepare it; default: $TFDS_DATA_DIR or ~/tensorflow_datasets.")
    flags.DEFINE_enum(
        "file_format", "array_record", ["array_record", "tfrecord"], "tfrecord needs TensorFlow, array_record does not."
    )


def main(config: ConfigDict) -> None:
    if config.source is None:
        raise UserError(f"--source is not given: name a folder, or a data set on the hub such as {DEFAULT_HUB_ID}")
    data_dir = config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in data_dir:
        raise UserError(f"--data_dir={data_dir} is not on this machine; prepare in a local folder and copy it there")
    data_dir = Path(data_dir).expanduser().absolute()
    words = ["--dataset_name", "celebahq256", "--data_dir", data_dir]
    train = f"train on it: {write_command('train_flow.py', *words)}"
    builder = Celebahq256(source=config.source, data_dir=data_dir)
    if builder.data_path.exists():
        found = builder.info.file_format.value if builder.is_prepared() else "something incomplete"
        if found != config.file_format:
            raise UserError(
                f"--file_format={config.file_format}: {builder.data_path} is there as {found}; move it away, or "
                "give another --data_dir"
            )
        print(f"prepared already: {builder.data_path}{describe_source(builder, config.source)}; {train}")
        return
    if config.file_format == "tfrecord":
        try:
            import_tensorflow()
        except ImportError:
            raise UserError(
                "--file_format=tfrecord needs TensorFlow: `pip install tensorflow`, or leave the flag out"
            ) from None
    prepare_output_folder(data_dir, "data_dir")
    remove_incomplete(builder)
    try:
        builder.download_and_prepare(file_format=config.file_format)
    except OSError as error:
        raise UserError(
            f"--source={config.source} cannot be prepared in --data_dir={data_dir} ({error}); "
            "check that the one can be read and that the other has space"
        ) from error
    write_json(Path(builder.data_path) / SOURCE_FILE, {"source": absolute(config.source)})
    counts = ", ".join(f"{info.num_examples} {split}" for split, info in builder.info.splits.items())
    print(f"prepared: {builder.data_path} ({config.file_format}, {counts}); {train}")


if __name__ == "__main__":
    program.run_program(define_flags, main)
