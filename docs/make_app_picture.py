"""Takes docs/app.png, a picture of app.py's page with digits: `python docs/make_app_picture.py runs/demo`.

It needs the extras `app` and `dev`, and a Chromium, as tests/test_app_page.py does.
"""

import os
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.app.model import Served  # noqa: E402
from utils.app.server import bind, make_server  # noqa: E402
from utils.runs.opening import load_generator  # noqa: E402

SIZE = {"width": 1280, "height": 800}


def take_picture(url: str, path: Path) -> None:
    """Draws threes and sevens by clicks, and writes what the page shows then."""
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(url)
        for name in ("3", "7"):
            page.locator("#classes .chips label", has_text=name).click()
        page.locator("#num_samples").fill("24")
        page.locator("#cfg_scale").fill("2")
        page.get_by_role("button", name="Draw").click()
        page.locator("#status", has_text="Drawn").wait_for(timeout=120_000)
        page.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    listening = bind("127.0.0.1", 0)
    server = make_server(Served(load_generator(sys.argv[1]), sys.argv[1]), "127.0.0.1")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    take_picture(f"http://127.0.0.1:{listening.getsockname()[1]}", ROOT / "docs" / "app.png")
    server.should_exit = True
    thread.join()
