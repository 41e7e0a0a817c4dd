"""The page of report.py in a browser: values under the pointer, the slider, the legend, sorting, keys, reloads."""

import json
import re
import time

import pytest

import report
from tests.test_plot_metrics import write_run
from tests.test_report import HOSTILE, picture

pytestmark = pytest.mark.xdist_group("browser")  # one process has it

RED, GREEN, BLUE = (255, 0, 0), (0, 160, 0), (0, 0, 255)
NAMES = ("1st", HOSTILE.replace("/", "") + "n" * 60)
# The colour in the middle of each picture on the page.
COLOURS = """() => [...document.querySelectorAll("#side img")].map((image) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d");
  context.drawImage(image, image.naturalWidth / 2, image.naturalHeight / 2, 1, 1, 0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
})"""
# The place on the screen of a step on the x axis of the first chart.
PLACE = """([step, log]) => {
  const chart = document.querySelector("#curves .chart");
  const { xaxis, _size } = chart._fullLayout;
  const box = chart.getBoundingClientRect();
  return [box.left + _size.l + xaxis.d2p(step), box.top + _size.t + 60];
}"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of 10 steps, one of a hostile name: losses 1 / step and 2 / step, pictures and losses by t at two."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    for scale, name in enumerate(NAMES, 1):
        lines = [{"step": s, "seconds": 360.0 * s, "training/l2_loss": scale / s} for s in range(1, 11)]
        evaluated = [{"step": s, "validation_loss_t/0.5": s / 8, "fid": 10.0 - s} for s in (5, 10)]
        path = write_run(folder / name, *lines, *evaluated, {"step": 10, HOSTILE: 3.0})
        row = {"checkpoint_step": 10, "num_steps": 8, "cfg_scale": 2.0, "num_samples": 50, "fid": 30.0 / scale}
        (path / "fid.json").write_text(json.dumps({"cells": [row]}))
        picture(path / "images" / "sample_cfg_4" / "5.png", RED)
        picture(path / "images" / "sample_cfg_4" / "10.png", (GREEN, BLUE)[scale - 1])
        picture(path / "images" / HOSTILE.replace("/", "") / "5.png")
    return folder


@pytest.fixture(scope="module")
def page_file(runs):
    from utils.report.images import PictureStore

    found, curves = report.open_runs([str(runs / "*")])
    out = runs.parent / "report.html"
    report.write_page(out, report.gather(found, curves, out, PictureStore(10**6), 0))
    return out


@pytest.fixture(scope="module")
def page(browser, page_file):
    """The page, opened from disk in a window of 1280x800; tests leave it as they found it. Errors of its script,
    dialogs and requests fail the last test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    wrong = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    opened.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
    opened.goto(page_file.as_uri())
    wait(opened, "!!document.querySelector('#curves .chart').data")
    yield opened
    context.close()
    assert wrong == []


def wait(page, expression):
    """Waits until a JavaScript expression is true. Playwright's own waiting would evaluate a string in the page, which
    the page's policy forbids."""
    end = time.monotonic() + 10
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def hover(page, step) -> str:
    page.mouse.move(0, 0)
    page.mouse.move(*page.evaluate(PLACE, [step, False]))
    page.wait_for_selector("#curves .chart .hoverlayer .legend", timeout=3000)
    return page.evaluate("document.querySelector('#curves .chart .hoverlayer').textContent")


def button(page, name):
    return page.locator("#legend button", has_text=name)


def test_the_values_under_the_pointer_are_those_that_were_logged(page):
    text = hover(page, 4)
    # 1 / 4 and 2 / 4; the other run's name stands as it is, none of it taken for a tag, and is cut where it is long.
    assert re.search(r"1st : 0\.25<script>.*… : 0\.5$", text)
    assert "& <b>🐱<b>nn" in text
    assert re.search(r"1st : 0\.1<script>.*… : 0\.2$", hover(page, 10))


def test_no_button_sends_a_chart_anywhere(page):
    titles = page.evaluate("[...document.querySelectorAll('.chart .modebar-btn')].map((b) => b.dataset.title)")
    assert set(titles) == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}


def test_the_axis_of_hours_and_smoothing(page):
    page.select_option("#axis", "hours")
    traces = page.evaluate("document.querySelector('#curves .chart').data.map((t) => [t.x, t.y])")
    assert traces[0][0] == pytest.approx([s / 10 for s in range(1, 11)])  # 360 s a step
    page.select_option("#axis", "steps")
    page.locator("#smooth").press("ArrowRight")
    raw, mean, *_ = page.evaluate("document.querySelector('#curves .chart').data.map((t) => t.y)")
    assert raw == pytest.approx([1 / s for s in range(1, 11)], rel=1e-5)
    assert mean == pytest.approx([1, *[(1 / s + 1 / (s - 1)) / 2 for s in range(2, 11)]], rel=1e-5)
    assert page.inner_text("#smooth-text") == "mean of 2"
    page.locator("#smooth").press("Home")


def test_the_slider_changes_the_pictures(page):
    assert page.evaluate(COLOURS) == [pytest.approx(colour, abs=8) for colour in (GREEN, BLUE)]
    page.locator("#step").press("Home")
    wait(page, "document.getElementById('step-text').textContent === '5'")
    assert page.evaluate(COLOURS) == [pytest.approx(RED, abs=8)] * 2
    page.get_by_role("button", name="loss by t").click()
    assert (
        page.evaluate("document.querySelector('#side .chart').data.map((t) => [t.x[0], t.y[0]])") == [[0.5, 0.625]] * 2
    )
    page.locator("#step").press("End")
    assert page.evaluate("document.querySelector('#side .chart').data.map((t) => t.y[0])") == [1.25] * 2
    page.get_by_role("button", name="sample_cfg_4").click()


def test_a_button_of_the_legend_hides_its_run_everywhere(page):
    assert page.evaluate("document.querySelector('#curves .chart').data.length") == 2
    button(page, "1st").click()
    assert button(page, "1st").get_attribute("aria-pressed") == "false"
    assert page.evaluate("document.querySelector('#curves .chart').data.map((t) => t.y[0])") == [2]
    assert page.evaluate(COLOURS) == [pytest.approx(BLUE, abs=8)]
    assert page.locator("#scores tbody tr:visible").count() == 1
    button(page, "1st").press("Enter")
    assert page.evaluate("document.querySelector('#curves .chart').data.length") == 2


def test_tables_are_sorted_and_the_best_is_bold(page):
    assert page.locator("#scores td.best").all_inner_texts() == ["15.000"]
    assert page.evaluate("getComputedStyle(document.querySelector('#scores td.best')).fontWeight") == "700"
    column = page.locator("#scores th", has_text="FID")
    for direction, values in (("ascending", ["15.000", "30.000"]), ("descending", ["30.000", "15.000"])):
        column.get_by_role("button").click()
        assert column.get_attribute("aria-sort") == direction
        assert page.locator("#scores tbody td:nth-child(5)").all_inner_texts() == values


def test_the_arrow_keys_step_through_a_charts_values(page):
    chart = page.locator("#curves .chart").first
    chart.focus()
    for _ in range(3):
        chart.press("ArrowRight")
    said = page.inner_text("#said")
    assert said.startswith("step 3: 1st 0.33333, ")
    assert "0.66667" in said


def test_hostile_names_are_text(page):
    for details in page.locator("#curves details").all():
        details.evaluate("(d) => { d.open = true; }")
    page.wait_for_timeout(200)
    assert page.locator("script:not(head *):not(body > script)").count() == 0
    assert page.locator("img[onerror], #legend b, #curves b, table b").count() == 0
    assert page.locator("#legend bdi").nth(1).inner_text() == NAMES[1]
    assert page.evaluate("window.alerted") is None


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 800, "light"), (390, 844, "dark")])
def test_nothing_overlaps_or_scrolls_sideways(page, width, height, scheme):
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=scheme)
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Controls, charts and pictures: no two of them share a pixel.
    boxes = page.evaluate(
        """[...document.querySelectorAll(".controls > *, .charts > *, figure, summary, #legend button, h2, .scroll")]
          .filter((e) => e.checkVisibility()).map((e) => e.getBoundingClientRect())
          .map((b) => [b.left, b.top, b.right, b.bottom])"""
    )
    assert len(boxes) > 20
    # The legend lies over what scrolls below it: at the top of the page it covers nothing.
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert min(a[2], b[2]) - max(a[0], b[0]) < 1 or min(a[3], b[3]) - max(a[1], b[1]) < 1
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_page_that_is_rewritten_loads_itself_and_stays_as_it_was_looked_at(browser, runs, tmp_path):
    from utils.report.images import PictureStore

    out = tmp_path / "report.html"
    found, curves = report.open_runs([str(runs / "*")])

    def write(seconds):
        report.write_page(out, report.gather(found, curves, out, PictureStore(10**6), seconds))

    write(1)
    context = browser.new_context()
    page = context.new_page()
    page.goto(out.as_uri())
    page.select_option("#axis", "hours")
    button(page, "1st").click()
    curves["1st"]["training/l2_loss"][11] = 0.0625
    write(0)
    page.wait_for_event("load", timeout=5000)
    assert page.evaluate("data.runs[0].curves['training/l2_loss'].values.at(-1)") == 0.0625
    assert page.input_value("#axis") == "hours"
    assert button(page, "1st").get_attribute("aria-pressed") == "false"
    context.close()
