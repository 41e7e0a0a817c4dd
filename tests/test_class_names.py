"""Classes as users write them."""

import pytest

from utils.base.messages import UserError
from utils.conditions.classes import find_class, read_classes

NAMES = ("tench", "goldfish", "great white shark", "tiger shark")


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("goldfish, 3,Tench", NAMES, [1, 3, 0]),
        ("3,1", ("3", "2", "1"), [0, 2]),  # names go before numbers
        ("A,a,B,b", ("A", "B", "a", "b"), [0, 2, 1, 3]),  # exact spelling goes first
        ("straße,ÉTÉ", ("STRASSE", "été"), [0, 1]),
        ("É,x,e\u0301", ("e\u0301", " X "), [0, 1, 0]),  # composed or not, spaces in a name
        ("e\u0301,é", ("é", "e\u0301"), [1, 0]),
        ("hen, a bird,2,hen", ("hen", "hen, a bird", "egg"), [1, 2, 0]),  # names with commas
    ],
)
def test_classes_are_named_by_names_and_numbers(text, names, labels):
    assert read_classes(text, names) == labels


@pytest.mark.parametrize(
    ("word", "names", "message"),
    [
        ("goldfsh", NAMES, r"'goldfsh' is no class of this run; did you mean goldfish"),
        ("4", NAMES, r"there is no class 4; use 0 to 3"),
        ("-1", NAMES, r"there is no class -1"),
        ("", NAMES, r"'' is no class"),
        ("²", NAMES, r"'²' is no class"),
        ("٣", NAMES, r"'٣' is no class"),
        ("9" * 400, NAMES, r"'9+' is no class"),
        ("cat", ("Cat", "CAT", "dog"), r"'cat' may be any of the classes 0 \(Cat\), 1 \(CAT\); give its number"),
        ("crane", ("crane", "hen", "crane"), r"'crane' may be any of the classes 0 \(crane\), 2 \(crane\)"),
    ],
)
def test_what_is_no_class_or_several_is_refused(word, names, message):
    with pytest.raises(UserError, match=message):
        find_class(word, names)
