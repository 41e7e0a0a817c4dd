"""Draws users' texts, such as names of classes, in fonts of the system that have their characters; characters that no
font has are spelled in Latin letters."""

import functools
import re
import unicodedata
from typing import Any

import numpy as np
from jaxtyping import UInt32
from matplotlib import ft2font
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font

from utils.base.messages import printable

OWN_FAMILY = "DejaVu Sans"  # comes with Matplotlib
# Fonts that draw a box for any character.
PLACEHOLDERS = re.compile(r"last.?resort|adobe.?blank|fallback sil", re.IGNORECASE)
CAN_SHAPE = hasattr(ft2font, "__libraqm_version__")  # Matplotlib 3.11: right to left, joined letters


def draw_text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Draws a text, with dollar signs as they are, at (x, y) in fractions of the figure."""
    text, families = make_legible(text)
    figure.text(x, y, text, fontfamily=families, parse_math=False, **style)


def make_legible(text: str) -> tuple[str, list[str]]:
    """Returns the text, with characters that no font has spelled out, and the families of the fonts that draw it."""
    text = "".join(" " if unicodedata.category(c) == "Cc" and c != "\n" else c for c in printable(text))

    # The usual case: Matplotlib's own font has all of it.
    lacking = frozenset(c for c in text if c != "\n" and OWN_FAMILY not in _families_of(c))
    if not lacking:
        return text, [OWN_FAMILY]

    # One font for all the other characters, if there is one; else the first for each.
    candidates = [_families_of(c) for c in sorted(lacking)]
    shared = [family for family in candidates[0] if all(family in families for families in candidates)]
    families = shared[:1] or list(dict.fromkeys(found[0] for found in candidates if found))
    unknown = {c for c in lacking if not _families_of(c)}
    return (spell(text, unknown) if unknown else text), [OWN_FAMILY, *families]


def count_columns(text: str) -> int:
    """Returns the columns that a text takes: two for a wide character, none for a combining or invisible one."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def shorten(text: str, width: int) -> str:
    """Returns as much of a text as fits into `width` columns. If something is left out, it ends with an ellipsis."""
    if count_columns(text) <= width:
        return text
    end = next(end for end in range(len(text), -1, -1) if count_columns(text[:end]) < width)
    return text[:end] + "…"


def wrap(text: str, width: int, max_lines: int) -> str:
    """Returns a text in lines of at most `width` columns, broken at spaces. If something is left out, the last of
    `max_lines`, or the line that was too long, ends with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and count_columns(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        # The value below a name that is long: it says more.
        name, equals, value = word.partition("=")
        lines += [name + equals, value] if value and count_columns(word) > width else [word]
    if len(lines) > max_lines:
        lines[max_lines - 1 :] = [" ".join(lines[max_lines - 1 :])]
    return "\n".join(shorten(line, width) for line in lines)


@functools.cache
def _families_of(character: str) -> list[str]:
    """Returns the families of fonts that have a character: Matplotlib's own first, then those of the system."""
    if not CAN_SHAPE and unicodedata.bidirectional(character) in ("R", "AL"):
        return []
    families = [family for family, code_points in _fonts() if ord(character) in code_points]
    return list(dict.fromkeys(families))


@functools.cache
def _fonts() -> list[tuple[str, UInt32[np.ndarray, " n"]]]:
    """Returns (family, its code points) for every upright font of regular weight: those that Matplotlib finds by the
    family alone."""
    found = []
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name != OWN_FAMILY, font.name)):
        is_regular = font.style == "normal" and font.weight in (400, "normal", "regular")
        if not is_regular or PLACEHOLDERS.search(font.name):
            continue
        try:
            found.append((font.name, np.array(list(FT2Font(font.fname).get_charmap()), np.uint32)))
        except (OSError, RuntimeError):  # removed or damaged since Matplotlib listed it
            continue
    return found


def spell(text: str, unknown: set[str]) -> str:
    """Returns the text with each `unknown` character in Latin letters, by its name in Unicode: a letter by its sound,
    a symbol by its name, an ideograph by its number (U+732B)."""
    spelled = ""
    for character in text:
        if unicodedata.category(character) in ("Cf", "Sk"):  # joiners, skin tones
            continue
        if character not in unknown:
            spelled += character
            continue

        # Forms of Latin letters: full-width, circled, ligatures.
        plain = unicodedata.normalize("NFKD", character)
        if plain != character and not set(plain) & unknown and plain.isascii():
            spelled += plain
            continue

        # Names such as "DEVANAGARI LETTER KA" and "HIRAGANA LETTER SMALL A" end with the sound.
        name = unicodedata.name(character, "")
        category = unicodedata.category(character)
        _, is_letter, letter = name.partition(" LETTER ")
        sound = re.sub(r" (WITH .*|MARBUTA|MAKSURA)", "", letter or name).rpartition(" ")[2].lower()
        if " VOWEL SIGN " in name:  # it replaces the vowel that a consonant has by itself
            spelled = spelled.removesuffix("a") + sound
        elif "VIRAMA" in name:
            spelled = spelled.removesuffix("a")
        elif is_letter and unicodedata.bidirectional(character) in ("R", "AL"):  # consonants with words for names
            spelled += re.split("[aeiou]", sound)[0] or sound[:1]
        elif is_letter or " SYLLABLE " in name:
            spelled += sound
        elif category.startswith("S") and name:
            spelled += f" {name.lower()} "
        elif not category.startswith("M"):
            spelled += f" U+{ord(character):04X} "
    return "\n".join(" ".join(line.split()) for line in spelled.split("\n"))
