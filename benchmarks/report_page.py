"""Times report.py on long runs, and its page in headless Chromium: `python benchmarks/report_page.py [--runs 4]`.

Runs of 1,000,000 steps are made up, logged every 1,000, with 40 metrics; losses by t and FID every 10,000.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from playwright.sync_api import sync_playwright  # noqa: E402

from report import open_runs  # noqa: E402
from utils.report.data import gather  # noqa: E402
from utils.report.images import PictureStore  # noqa: E402
from utils.report.page import write_page  # noqa: E402

STEPS = 1_000_000
NAMES = [
    f"{group}/{name}"
    for group in ("training", "validation")
    for name in ("l2_loss", *map("metric_{}".format, range(19)))
]
# Milliseconds of a change until the browser has painted it.
TIMED = """async (change) => {
  const start = performance.now();
  const control = document.getElementById(change.id);
  if (change.property) control[change.property] = change.value;
  control.dispatchEvent(new Event("input"));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - start;
}"""
CHANGES = {
    "smoothing": {"id": "smooth", "property": "value", "value": 5},
    "hours": {"id": "axis", "property": "value", "value": "hours"},
    "log y": {"id": "log-y", "property": "checked", "value": True},
}


def make_run(folder: Path, rng: random.Random) -> None:
    """Writes the log of a made-up run, with a peak of one step in each curve."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1000, STEPS + 1, 1000):
            values = {name: math.exp(-step / 3e5) + 0.1 * rng.random() + 9 * (step == 333_000) for name in NAMES}
            file.write(json.dumps({"step": step, "seconds": step / 100, **values}) + "\n")
            if step % 10_000 == 0:
                losses = {f"validation_loss_t/{i / 10}": rng.random() for i in range(11)}
                file.write(json.dumps({"step": step, "fid": rng.random(), **losses}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        # The page.
        rng = random.Random(0)
        for number in range(options.runs):
            make_run(Path(folder) / f"runs/{number}", rng)
        out = Path(folder) / "report.html"
        start = time.monotonic()
        runs, curves = open_runs([f"{folder}/runs/*"])
        content = gather(runs, curves, out, PictureStore(2**22), 0)
        write_page(out, content)
        print(f"made in {time.monotonic() - start:.1f} s, {out.stat().st_size / 1e6:.1f} MB")
        peaks = {max(filter(None, run["curves"][name]["values"])) > 9 for run in content["runs"] for name in NAMES}
        print(f"every peak of one step is there: {peaks == {True}}")

        # In the browser: from opening it to the first charts, then changes that draw all visible ones again.
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        start = time.monotonic()
        page.goto(out.as_uri())
        while not page.evaluate("!!(document.querySelector('#curves .chart') || {}).data"):
            page.wait_for_timeout(10)
        print(f"opened in {time.monotonic() - start:.1f} s")
        for name, change in CHANGES.items():
            print(f"{name}: {page.evaluate(TIMED, change):.0f} ms for all visible charts")
        browser.close()


if __name__ == "__main__":
    main()
