"""Names of classes: those that data sets do not bring themselves, and classes as users write them."""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from utils.base.errors import UserError

IMAGENET_LABELS = Path(__file__).resolve().parents[2] / "data" / "imagenet_labels.txt"


def imagenet_class_names() -> tuple[str, ...]:
    """English names of the 1,000 classes in the order of their WordNet ids, which is that of the labels."""
    return tuple(IMAGENET_LABELS.read_text(encoding="utf-8").splitlines())


def find_class(word: str, class_names: Sequence[str]) -> int:
    """The label of a class that a user writes by name or number.

    A name in its exact spelling goes first, then a number (classes may be named by digits), then the only name that is
    the same but for case, spaces around it and Unicode composition (macOS writes é as e and an accent). UserError,
    listing the candidates, where none is or several are.
    """
    exact = [label for label, name in enumerate(class_names) if name == word]
    alike = exact or [label for label, name in enumerate(class_names) if _fold(name) == _fold(word)]
    number = int(word) if re.fullmatch(r"-?[0-9]{1,18}", word) else None
    if not exact and number is not None:
        if 0 <= number < len(class_names):
            return number
        raise UserError(f"there is no class {word}; use 0 to {len(class_names) - 1}, or names")
    if len(alike) == 1:
        return alike[0]
    if alike:
        listed = ", ".join(f"{label} ({class_names[label]})" for label in alike)
        raise UserError(f"{word!r} may be any of the classes {listed}; give its number")
    by_folded = {_fold(name): name for name in class_names}
    near = difflib.get_close_matches(_fold(word), by_folded, n=3, cutoff=0.4)
    hint = f"there are {', '.join(class_names[:5])}, ..."
    if near:
        hint = f"did you mean {' or '.join(by_folded[name] for name in near)}?"
    raise UserError(f"{word!r} is no class of this run; {hint}")


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def read_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """The labels of classes separated by commas, each as `find_class` reads it. A name may hold commas itself."""
    words, labels, start = text.split(","), [], 0
    while start < len(words):
        # The longest run of words that is a name.
        runs = ((",".join(words[start:stop]).strip(), stop) for stop in range(len(words), start + 1, -1))
        name, stop = next((run for run in runs if run[0] in class_names), (words[start].strip(), start + 1))
        labels.append(find_class(name, class_names))
        start = stop
    return labels
