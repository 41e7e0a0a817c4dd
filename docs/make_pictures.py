"""Takes the pictures of pages in the docs, docs/app.png, docs/report.png and those of a phone, in a headless Chromium.

    make demo && examples/sweep.sh && python docs/make_pictures.py runs/demo 'runs/sweep/*'

It needs the extras `app` and `dev`, and a Chromium, as the tests of these pages do.
"""

import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from report import open_runs  # noqa: E402
from utils.app.model import Served  # noqa: E402
from utils.app.server import bind, make_server  # noqa: E402
from utils.report.data import gather  # noqa: E402
from utils.report.images import PictureStore  # noqa: E402
from utils.report.page import write_page  # noqa: E402
from utils.runs.opening import load_generator  # noqa: E402


def show_app(page: Page, run: str) -> None:
    """Draws threes and sevens of a run of digits by clicks."""
    listening = bind("127.0.0.1", 0)
    server = make_server(Served(load_generator(run), run), "127.0.0.1")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}")
    for name in ("3", "7"):
        page.locator("#classes .chips label", has_text=name).click()
    page.locator("#num_samples").fill("24")
    page.locator("#cfg_scale").fill("2")
    page.get_by_role("button", name="Draw").click()
    page.locator("#status", has_text="Drawn").wait_for(timeout=120_000)
    server.should_exit = True
    thread.join()


def show_report(page: Page, pattern: str) -> None:
    """Opens a report of runs, with the pointer on a chart."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html"
        runs, curves = open_runs([pattern])
        write_page(out, gather(runs, curves, out, PictureStore(2**22), 0))
        page.goto(out.as_uri())
    page.get_by_role("button", name="sample_cfg_4").click()
    page.locator("#curves .chart").nth(2).locator(".main-svg").first.wait_for()
    box = page.locator("#curves .chart").nth(2).bounding_box() or {}
    # From one place to another: the first move enters the chart.
    for x in (200, 221):
        page.mouse.move(box["x"] + x, box["y"] + 130)
        page.wait_for_timeout(500)


def take(page: Page, name: str) -> None:
    """Writes docs/NAME.png of what is in sight, in 256 colours, with which it takes a third."""
    path = ROOT / "docs" / f"{name}.png"
    page.screenshot(path=path)
    drawn = Image.open(path).convert("RGB")
    drawn.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    run, pattern = sys.argv[1:]
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, height, show, argument in (("app", 800, show_app, run), ("report", 1190, show_report, pattern)):
            page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme="light")
            show(page, argument)
            take(page, name)
            # The same on a phone in the dark, from the pictures on.
            page.set_viewport_size({"width": 390, "height": 844})
            page.emulate_media(color_scheme="dark")
            page.evaluate("document.querySelector('#evaluations, form ~ #side').scrollIntoView()")
            page.wait_for_timeout(500)
            take(page, f"{name}_phone")
        browser.close()


if __name__ == "__main__":
    main()
