"""Names of classes in figures: in any script, with any sign, without a missing glyph."""

import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontEntry, fontManager

from utils.images import fonts, plotting


@pytest.fixture
def only_own_font(monkeypatch):
    """Hides all fonts but Matplotlib's own."""
    own = [font for font in fontManager.ttflist if font.name == fonts.OWN_FAMILY]
    monkeypatch.setattr(fontManager, "ttflist", own)
    for cached in (fonts._fonts, fonts._families_of, fontManager._findfont_cached):
        cached.cache_clear()
    yield own
    for cached in (fonts._fonts, fonts._families_of, fontManager._findfont_cached):
        cached.cache_clear()


@pytest.fixture
def cat_font(only_own_font, tmp_path):
    """Builds a font that draws the character for cat, its only one, as a black square."""
    pen = TTGlyphPen(None)
    for i, point in enumerate(((0, 0), (0, 800), (800, 800), (800, 0))):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": square, "cat": square})
    builder.setupHorizontalMetrics({".notdef": (900, 0), "cat": (900, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Cats", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "cats.ttf")
    only_own_font.append(FontEntry(str(tmp_path / "cats.ttf"), name="Cats", weight=400, size="scalable"))


def draw(names: list[str]) -> np.ndarray:
    """Returns the pixels of a table of white images with titles on every side. Any warning is an error."""
    images = np.full((len(names), len(names), 8, 8, 3), 255, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plotting.image_table(images, names, names, names[0], names)
        canvas = plotting.FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chien, собака, σκύλος", "chien, собака, σκύλος"),
        ("猫 A", "U+732B A"),
        ("ねこ", "neko"),
        ("고양이", "goyangi"),
        ("दिल्ली", "dillii"),  # vowels and their absence are signs on the consonants
        ("🦒 (zoo)", "giraffe face (zoo)"),
        ("\uff23\uff41\uff54", "Cat"),  # full-width
        ("\U000f0000", "U+F0000"),
        ("tab\tand\x07bell", "tab and bell"),
        ("latin\udce9", r"latin\xe9"),
    ],
)
def test_what_no_font_has_is_spelled(only_own_font, text, expected):
    assert fonts.make_legible(text) == (expected, [fonts.OWN_FAMILY])


def test_letters_from_right_to_left_are_spelled_by_their_consonants(only_own_font, monkeypatch):
    assert fonts.spell("قطة", set("قطة")) == "qtt"
    assert fonts.spell("שלום", set("שלום")) == "shlvm"
    monkeypatch.setattr(fonts, "CAN_SHAPE", False)  # Matplotlib before 3.11 would draw them backwards
    fonts._families_of.cache_clear()
    assert fonts.make_legible("שלום") == ("shlvm", [fonts.OWN_FAMILY])


def test_a_font_of_the_system_draws_what_matplotlibs_lacks(cat_font):
    assert fonts.make_legible("猫 x") == ("猫 x", [fonts.OWN_FAMILY, "Cats"])
    assert fonts.make_legible("猫犬") == ("猫 U+72AC", [fonts.OWN_FAMILY, "Cats"])
    drawn = draw(["猫"])
    empty = draw([" "])
    assert (drawn < 50).all(axis=-1).sum() > (empty < 50).all(axis=-1).sum() + 100


def test_names_of_any_kind_are_drawn_without_a_warning(only_own_font):
    drawn = draw(["猫犬鳥魚"])  # spelled, four times as long
    assert drawn[:, 0].min() == 255, "the row's title is cut by the edge"
    draw(["猫", "$x$ and $", r"$\nonsense$", "_hidden", "कुत्ता", "🐱", "x\udcff", "two\nlines", ""])


def test_names_are_cut_to_a_width_at_which_wide_characters_count_twice():
    assert [fonts.shorten(text, 5) for text in ("abcde", "abcdef", "猫猫", "猫猫猫", "é" * 6)] == [
        "abcde", "abcd…", "猫猫", "猫猫…", "éééé…"
    ]  # fmt: skip


def test_texts_are_broken_at_spaces_or_else_behind_a_name():
    assert fonts.wrap("fox, cos=0.637, mass=1.25", 15, 3) == "fox, cos=0.637,\nmass=1.25"
    assert fonts.wrap("fox, cos=0.637, mass=1.25", 10, 2) == "fox,\ncos=0.637…"
    assert fonts.wrap("a parameter_3=-0.818", 12, 3) == "a\nparameter_3=\n-0.818"
    assert [fonts.wrap(text, 4, 3) for text in ("", "猫 猫 猫", "abcdef")] == ["", "猫\n猫\n猫", "abc…"]


def test_what_a_figure_says_of_its_images_is_not_cut():
    """Numbers of a condition are in the titles, on the images and in the margin, and within the figure."""
    images = np.full((2, 3, 16, 16, 1), 255, np.uint8)
    name = "parameter_3=-0.818, mass=1.25"
    title = ", ".join(f"parameter_{i}=-0.0416" for i in range(12))
    figure = plotting.image_table(images, [name] * 2, [name] * 3, title, [name] * 6)
    assert len([text for text in figure.texts if "-0.818" in text.get_text() and "1.25" in text.get_text()]) == 11
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    assert all(box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)
