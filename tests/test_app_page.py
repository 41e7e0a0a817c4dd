"""app.py's page in a real browser: it draws the classes that were clicked, and lives through what visitors do."""

import io
import re
import shlex
import threading

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.recognise_digits import recognised_fraction
from tests.conftest import run_program
from tests.known_models import Levels, make_digits, make_generator
from tests.test_app import serving
from utils.app import server as pages
from utils.app.jobs import JobCancelledError
from utils.app.model import Limits, Served
from utils.conditions.classes import ClassCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.vector import VectorCondition
from utils.runs.opening import load_generator

pytestmark = pytest.mark.xdist_group("browser")  # one process has it

HOSTILE = (
    "<img src=x onerror=\"document.title='broken in'\">",
    "</script><script>document.title='broken in'</script>",
    "a, b; 'c' \"d\" `e` $(f)",
    "rocket 🚀 👩‍🚀",
    "\u202eright to left",
    "two\nlines",
    "n" * 300,
    "&lt;b&gt;",
)
# What a visitor uses: elements that reach beyond the window, and pairs of which one lies on the other.
OVERLAPS = """() => {
  const used = [...document.querySelectorAll('input, select, button, canvas, summary, legend, a.button, pre')];
  const seen = used.filter((one) => one.checkVisibility() && one.getBoundingClientRect().width > 2)
    .map((one) => ({ one, ...one.getBoundingClientRect().toJSON() }));
  const beyond = seen.filter((box) => box.right > innerWidth + 1 || box.left < -1);
  const isOn = (p, q) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1;
  const isApart = (a, b) => !a.contains(b) && !b.contains(a) && !a.closest('.chips');
  const pairs = seen.flatMap((p, i) =>
    seen.slice(i + 1).filter((q) => isApart(p.one, q.one) && isOn(p, q)).map((q) => [p, q]));
  return [beyond, pairs].map((found) => found.flat().map(({ one }) => one.outerHTML));
}"""


@pytest.fixture(scope="module")
def url():
    with serving(Served(make_digits(), "runs/digits", limits=Limits(queue=2))) as url:
        yield url


@pytest.fixture
def open_page(browser):
    """open_page(url, **context) -> a tab of its own on the page, which may log no error."""
    contexts = []
    errors = []

    def open_tab(url, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda message: message.type == "error" and errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(url)
        tab.wait_for_selector("#tasks input", state="attached")
        return tab

    open_tab.errors = errors
    yield open_tab
    for context in contexts:
        context.close()
    assert errors == []


def choose(tab, *names, box="#classes") -> None:
    for name in names:
        tab.locator(f"{box} .chips label", has_text=re.compile(f"^{re.escape(name)}$")).click()


def wait_for_status(tab, pattern: str) -> None:
    """Waits for the line about the request; the page's policy lets no test evaluate code in it while it waits."""
    tab.locator("#status", has_text=re.compile(f"^{pattern}")).wait_for()


def draw(tab, task="New images") -> None:
    tab.locator("#tasks label", has_text=task).click()
    tab.locator("#cfg_scale").fill("1")
    tab.locator("#num_steps").fill("4")
    tab.get_by_role("button", name="Draw").click()
    wait_for_status(tab, "Drawn")


def read_canvases(tab) -> np.ndarray:
    """The grey levels (n, 8, 8) of the images on the page."""
    pixels = tab.evaluate(
        "[...document.querySelectorAll('figure canvas')].map((canvas) => "
        "[...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data])"
    )
    return np.array(pixels, np.uint8).reshape(-1, 8, 8, 4)[..., 0]


def titles(tab) -> list[str]:
    return tab.locator("figcaption").all_text_contents()


def test_the_classes_that_were_clicked_are_drawn(url, open_page):
    tab = open_page(url)
    choose(tab, "3", "7", "0")
    tab.locator("#num_samples").fill("7")
    tab.locator("#frames").fill("4")
    draw(tab)
    assert titles(tab) == [*"3703703"]
    images = read_canvases(tab)
    assert recognised_fraction(images, np.array([3, 7, 0, 3, 7, 0, 3])) == 1

    # The slider goes back along the path, to noise; the player forward again.
    slider = tab.get_by_role("slider", name="From noise to image")
    shown = [images]
    for frame in (3, 0):
        slider.fill(str(frame))
        shown.append(read_canvases(tab).astype(int))
    distances = [float(np.abs(frame - images).mean()) for frame in shown]
    assert distances[0] == 0 < 3 < distances[1] < distances[2]
    tab.get_by_role("button", name="Play").click()
    while slider.input_value() != "4":
        tab.wait_for_timeout(10)
    np.testing.assert_array_equal(read_canvases(tab), images)

    # What is saved is what is shown, and so is what the command says.
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download as npz").click()
    with np.load(download.value.path()) as saved:
        np.testing.assert_array_equal(saved["arr_0"][..., 0], images)
        assert list(saved["arr_1"]) == [3, 7, 0, 3, 7, 0, 3]
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download as PNG").click()
    assert Image.open(download.value.path()).size[0] > 100
    words = shlex.split(tab.locator("#command").text_content())
    assert words[words.index("--load_dir") + 1] == "runs/digits"
    assert words[words.index("--classes") + 1] == "3,7,0"


def test_own_images_are_inverted_and_their_hole_is_filled(url, open_page):
    tab = open_page(url)
    file = io.BytesIO()
    pixels = np.full((30, 24), 200, np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    tab.locator("#tasks label", has_text="Invert").click()
    tab.locator("#file").set_input_files({"name": "own.png", "mimeType": "image/png", "buffer": file.getvalue()})
    choose(tab, "5", "8", box="#edit")
    assert tab.locator("#solver").input_value() == "heun"
    tab.locator("#solver").select_option("euler")  # Heun's would need a velocity at t = 1
    draw(tab, "Invert")
    assert titles(tab) == ["image", "its noise", "again", "5", "8"]
    images = read_canvases(tab)
    assert (images[0] == 200).all()
    assert recognised_fraction(images[3:], np.array([5, 8])) == 1

    # A hole is painted by the pointer, and widened by the keys.
    tab.locator("#tasks label", has_text="Fill a hole").click()
    tab.locator("#brush").fill("1")
    canvas = tab.locator("#own")
    box = canvas.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 16, box["y"] + box["height"] / 16)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 15 / 16, box["y"] + box["height"] / 16, steps=20)
    tab.mouse.up()
    canvas.focus()
    for key in ("ArrowDown", " "):
        tab.keyboard.press(key)
    choose(tab, "6")
    draw(tab, "Fill a hole")
    assert titles(tab) == ["image", "hole", "filled"]
    image, hole, filled = read_canvases(tab)
    expected = np.zeros((8, 8), bool)
    expected[0] = expected[5, 4] = True
    np.testing.assert_array_equal(hole == 127, expected)
    np.testing.assert_array_equal(filled != image, expected)


def test_images_between_two_classes(url, open_page):
    tab = open_page(url)
    tab.locator("#tasks label", has_text="Between two").click()
    choose(tab, "1", "4")
    tab.locator("#between").select_option("conditions")
    tab.locator("#columns").fill("3")
    draw(tab, "Between two")
    images = read_canvases(tab)
    assert recognised_fraction(images[[0, 2]], np.array([1, 4])) == 1
    np.testing.assert_allclose(images[1], (images[0].astype(float) + images[2]) / 2, atol=1)


def test_numbers_are_sliders_within_the_range_of_training(open_page):
    vector = VectorCondition.of_rows(np.array([[-0.5, 1], [0.75, 3]], np.float32), ["level", "mass"])
    kind = SeveralCondition((("vector", vector), ("class", ClassCondition(("cat", "<b>dog</b>")))))
    with serving(Served(make_generator(Levels, kind, {}), "runs/levels")) as url:
        tab = open_page(url)
        for _ in range(3):
            tab.get_by_role("button", name="Add a condition").click()
        tab.get_by_role("button", name="Remove").last.click()
        sliders = tab.get_by_role("slider", name="level")
        assert [sliders.first.get_attribute(name) for name in ("min", "max")] == ["-0.5", "0.75"]
        assert float(sliders.last.input_value()) == pytest.approx(0.125)  # the mean
        sliders.first.fill("-0.25")
        tab.locator("input[list]").last.fill("<b>dog</b>")
        tab.locator("#num_samples").fill("3")
        draw(tab)
        levels = np.round((np.array([-0.25, 0.125, -0.25]) + 1) * 127.5)
        np.testing.assert_array_equal(read_canvases(tab), np.broadcast_to(levels[:, None, None], (3, 8, 8)))
        assert titles(tab) == [
            "level=-0.25, mass=2, cat",
            "level=0.125, mass=2, <b>dog</b>",
            "level=-0.25, mass=2, cat",
        ]
        words = shlex.split(tab.locator("#command").text_content())
        assert (
            words[words.index("--condition") + 1] == "level=-0.25,mass=2,class=cat; level=0.125,mass=2,class=<b>dog</b>"
        )


def test_a_closed_tab_ends_its_request_and_a_second_client_is_served(url, open_page, monkeypatch):
    computed = pages.draw
    left = threading.Event()

    def draw_slowly(served, ask, job):
        try:
            for done in range(0 if ask.seed != 9 else 2000):
                job.report("steps", done, 2000)
                threading.Event().wait(0.01)
        except JobCancelledError:
            left.set()
            raise
        return computed(served, ask, job)

    monkeypatch.setattr(pages, "draw", draw_slowly)
    first, second = open_page(url), open_page(url)
    first.locator("#seed").fill("9")
    first.get_by_role("button", name="Draw").click()
    wait_for_status(first, r"[1-9]\d* of 2000 steps")
    choose(second, "2")
    second.get_by_role("button", name="Draw").click()
    wait_for_status(second, "Waiting: 1 request before")
    assert httpx.get(f"{url}/api/model").status_code == 200
    first.close()
    wait_for_status(second, "Drawn")
    assert left.wait(5)
    assert set(titles(second)) == {"2"}

    # A visitor may also change their mind.
    second.locator("#seed").fill("9")
    left.clear()
    second.get_by_role("button", name="Draw").click()
    second.get_by_role("button", name="Cancel").click()
    wait_for_status(second, "Cancelled$")
    assert left.wait(5)
    assert second.get_by_role("button", name="Draw").is_enabled()


def test_hostile_names_are_text_and_nothing_overlaps(open_page):
    generator = make_digits(HOSTILE)
    with serving(Served(generator, f"/home/{HOSTILE[1].replace('/', '')}", ())) as url:
        tab = open_page(url)
        elements = tab.evaluate("document.querySelectorAll('img, script').length")
        tab.locator("#classes .chips label").first.wait_for()
        assert tab.locator("#classes .chips span").all_text_contents() == list(HOSTILE)
        for chip in tab.locator("#classes .chips label").all():
            chip.click()
        tab.locator("#num_samples").fill(str(len(HOSTILE)))
        draw(tab)
        assert titles(tab) == list(HOSTILE)
        assert tab.title() == "<script><script>document.title='broken in'<script>: samples"
        assert tab.evaluate("document.querySelectorAll('img, script').length") == elements
        assert "/home" not in tab.content()
        for width, height in ((1280, 800), (390, 844)):
            tab.set_viewport_size({"width": width, "height": height})
            assert tab.evaluate(OVERLAPS) == [[], []]


def test_errors_are_shown_and_the_keyboard_is_enough(url, open_page):
    tab = open_page(url)
    tab.locator("#num_samples").fill("65")
    tab.get_by_role("button", name="Draw").click()
    assert "Samples: " in tab.locator("#status").text_content()

    # Nothing that a visitor uses is without a name.
    snapshot = tab.locator("body").aria_snapshot()
    kinds = "button|checkbox|combobox|radio|searchbox|slider|spinbutton|textbox"
    assert "radio" in snapshot
    assert re.findall(rf'- (?:{kinds})(?! ").*', snapshot) == []

    # From the top: the first class is chosen by Tab and space, and drawn by Enter.
    tab = open_page(url)
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Space")
    assert tab.locator("#classes input:checked").count() == 1
    assert tab.evaluate("document.activeElement.matches('#classes input:checked')")
    assert tab.evaluate("getComputedStyle(document.activeElement.nextSibling).outlineStyle") == "solid"
    for _ in range(10):
        tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "num_samples"
    tab.keyboard.press("Control+a")
    tab.keyboard.type("2")
    tab.keyboard.press("Enter")
    wait_for_status(tab, "Drawn")
    assert titles(tab) == ["0", "0"]


@pytest.mark.slow
def test_the_demos_model_draws_the_classes_that_were_clicked(open_page, tmp_path):
    words = "--model.patch_size 2 --model.num_classes 10 --model.depth 4 --model.hidden_size 128 --model.num_heads 4"
    words += " --model.lr 1e-3 --model.target_update_rate 0.998 --batch_size 128 --max_steps 1500 --eval_interval 0"
    run = ["--dataset_name", "digits", "--codec", "pixels", "--wandb.mode", "disabled", "--save_dir", tmp_path / "run"]
    run_program("train_flow.py", *run, *words.split(), env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"})
    with serving(Served(load_generator(tmp_path / "run"), "run")) as url:
        tab = open_page(url)
        choose(tab, *"0123456789")
        tab.locator("#num_samples").fill("60")
        tab.locator("#cfg_scale").fill("2")
        tab.get_by_role("button", name="Draw").click()
        wait_for_status(tab, "Drawn")
        assert titles(tab) == [*"0123456789"] * 6
        assert recognised_fraction(read_canvases(tab), np.arange(60) % 10) >= 0.9


def test_a_thousand_classes_are_searched(url, browser):
    description = httpx.get(f"{url}/api/model").json()
    description["fields"][0]["classes"] = [f"class {number}" for number in range(1000)]
    tab = browser.new_page()
    tab.route("**/api/model", lambda route: route.fulfill(json=description))
    tab.goto(url)
    tab.locator("#classes .chips label").first.wait_for()
    assert tab.locator("#classes .chips label").count() == 60
    tab.get_by_role("searchbox", name="Search classes").first.fill("s 98")
    assert tab.locator("#classes .chips span").all_text_contents() == ["class 98", *(f"class 98{n}" for n in range(10))]
    choose(tab, "class 987")
    tab.get_by_role("searchbox", name="Search classes").first.fill("")
    assert tab.locator("#classes .chips input:checked + span").all_text_contents() == ["class 987"]
    tab.close()
