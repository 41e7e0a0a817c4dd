"""URLs among paths: those of object storage, where they are taken, and all others, which are refused by name."""

import os
import re

from utils.base.messages import UserError

SCHEMES = ("s3", "gs", "memory")  # of object storage: utils/storage/remote.py
REMOTE = re.compile(rf"(?:{'|'.join(SCHEMES)})://[^/]")
# Settings that take them. Others are names of local files and folders alone.
TAKE_REMOTE = (
    "save_dir", "load_dir", "guide", "runs", "out", "save_samples", "json", "per_image",
    "fid_stats", "inception_weights", "inception_logits", "extractor_weights", "source", "class_names",
    "condition_file",
)  # fmt: skip
# Schemes of storage that users may expect to work here.
STORAGE_SCHEMES = "s3a?|r2|gcs?|gs|oss|cos|az|abfss?|wasbs?|adls?|hdfs|dbfs|viewfs|oci|swift|minio|https?|s?ftp|file|hf"
# A URL, perhaps of a data set (folder:s3://...); as a Path, which has lost a slash, only of the schemes above.
URL = re.compile(rf"(?:[a-z]+:)?(?:[a-z][a-z0-9+.-]*://|(?:{STORAGE_SCHEMES}):/)", re.IGNORECASE)
LOCAL = "a path on this machine"  # what an error about a URL offers instead
OBJECTS = "gs://BUCKET/NAME or s3://BUCKET/NAME"
BESIDE_URLS = {  # for flags that take more than a path
    "data_dir": f"{LOCAL}, or gs://BUCKET/FOLDER",
    "dataset_name": "folder:PATH, zip:s3://BUCKET/FILE and the like, or tfds:NAME with --data_dir gs://BUCKET/FOLDER",
    "load_dir": f"{LOCAL}, {OBJECTS}, or hf:USER/NAME",
    "source": f"{LOCAL}, {OBJECTS}, or a hub id such as USER/NAME",
    "train_images": f"{LOCAL}, or a data set such as folder:s3://BUCKET/FOLDER",
    "vae": f"{LOCAL}, or a hub id such as USER/NAME",
    "preview": f"tiny: and {LOCAL}, or a hub id such as USER/NAME",
    "codec": f"kl: and {LOCAL}, or a hub id such as USER/NAME",
}


def is_url(path: str | os.PathLike) -> bool:
    """Returns whether `path` is a URL of object storage, such as gs://BUCKET/NAME."""
    return REMOTE.match(os.fspath(path)) is not None


def refuse_url(path: str | os.PathLike, flag: str) -> None:
    """Raises UserError for a URL that --`flag` does not take, which would otherwise be the name of a local folder."""
    path = os.fspath(path)
    # TFDS reads gs:// itself. A Path has lost a slash, and a local folder may be called hf:.
    if (flag in TAKE_REMOTE and is_url(path)) or (flag == "data_dir" and path.startswith("gs://")):
        return
    if URL.match(path) and ("://" in path or not os.path.exists(path)):
        offered = BESIDE_URLS.get(flag, f"{LOCAL}, {OBJECTS}" if flag in TAKE_REMOTE else LOCAL)
        raise UserError(f"--{flag}={path} is a URL, which is not supported; give {offered}")
