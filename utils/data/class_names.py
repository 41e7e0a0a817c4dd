"""Names of classes that data sets do not bring themselves."""

from pathlib import Path

IMAGENET_LABELS = Path(__file__).resolve().parents[2] / "data" / "imagenet_labels.txt"


def imagenet_class_names() -> tuple[str, ...]:
    """English names of the 1,000 classes in the order of their WordNet ids, which is that of the labels."""
    return tuple(IMAGENET_LABELS.read_text(encoding="utf-8").splitlines())
