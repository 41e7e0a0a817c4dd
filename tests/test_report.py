"""The page of report.py: curves thinned with their extremes, pictures in a budget, tables, texts that stay texts."""

import base64
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

import report
from tests.conftest import run_program
from tests.test_plot_metrics import write_run
from utils.base.messages import UserError
from utils.report import data as report_data
from utils.report import images as report_images
from utils.report.curves import MAX_POINTS, clock_curve, loss_frames, split_curves, spread, thin_curve
from utils.report.images import PanelFile, PictureStore, find_panels, rank_steps

HOSTILE = '</script><script>alert("1")</script> & <b>🐱</b>'


def read_page(path) -> dict:
    """The JSON in a page, found as a browser finds it: up to the first end of a script element."""
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script', path.read_text(), re.DOTALL | re.IGNORECASE
    )
    return json.loads(found[1])


def picture(path, colour=(255, 0, 0), size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def make_report(read_flags, tmp_path):
    """make_report(words) -> the data in the page that the program writes."""

    def make_report(*words):
        out = tmp_path / "pages" / "report.html"
        report.main(read_flags(report, ["--out", str(out), *map(str, words)]))
        return read_page(out)

    return make_report


# --- Curves ---


def test_a_thinned_curve_keeps_its_ends_and_every_extreme():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(5000)
    values[[1234, 4321]] = 99, -99
    curve = {1000 * (i + 1): float(value) for i, value in enumerate(values)}
    thinned = thin_curve(curve)
    assert len(thinned["steps"]) <= MAX_POINTS + 2
    assert thinned["steps"][0] == 1000
    assert thinned["steps"][-1] == 5_000_000
    assert max(thinned["values"]) == 99
    assert min(thinned["values"]) == -99
    # Each section of 12 or 13 points has its own lowest and highest.
    for section in np.array_split(np.arange(5000), MAX_POINTS // 2):
        inside = [v for s, v in zip(thinned["steps"], thinned["values"], strict=True) if s // 1000 - 1 in set(section)]
        assert min(inside) == pytest.approx(values[section].min(), rel=1e-5)
        assert max(inside) == pytest.approx(values[section].max(), rel=1e-5)
    assert thinned["section"] == 12.5
    assert np.average(thinned["means"]) == pytest.approx(values.mean(), abs=0.05)


def test_a_short_curve_is_left_as_it_is_and_nan_is_a_gap():
    assert thin_curve({1: 0.123456789, 5: math.nan, 9: math.inf}) == {
        "steps": [1, 5, 9],
        "values": [0.123457, None, None],
    }


def test_nan_hides_no_extreme_of_its_section():
    values = np.linspace(0, 1, 4000)
    values[7] = math.nan
    values[8] = 5
    thinned = thin_curve(dict(enumerate(values.tolist())))
    assert max(value for value in thinned["values"] if value is not None) == 5


def test_the_clock_of_a_run():
    lines = [
        {"step": 1, "seconds": 2.04},
        {"step": 1, "seconds": 3},
        {"step": 2, "seconds": 1},
        {"step": 3, "seconds": 9},
    ]
    assert clock_curve(lines) == {"steps": [1, 3], "seconds": [3.0, 9.0]}  # seconds never fall
    assert clock_curve([{"step": 1, "loss": 2.0}]) == {"steps": [], "seconds": []}  # of an older run


def test_losses_by_t_are_apart_and_their_mean_is_a_curve():
    curves = {
        "training/l2_loss": {1: 2.0},
        "a_loss_t/0.5": {1: 3.0},
        "a_loss_t/0.25": {1: 4.0, 2: 5.0},
        "a_loss_t/mean": {1: 6.0},
    }
    over_steps, by_t = split_curves(curves)
    assert set(over_steps) == {"training/l2_loss", "a_loss_t/mean"}
    frames = loss_frames(by_t, 8)
    assert frames == [
        {"step": 1, "losses": {"a_loss_t": {"t": [0.25, 0.5], "values": [4.0, 3.0]}}},
        {"step": 2, "losses": {"a_loss_t": {"t": [0.25], "values": [5.0]}}},
    ]
    many = {"a_loss_t": {0.5: dict.fromkeys(range(1000), 1.0)}}
    assert [frame["step"] for frame in loss_frames(many, 3)] == [0, 500, 999]


@pytest.mark.parametrize(("count", "limit"), [(0, 3), (1, 3), (3, 3), (1000, 7)])
def test_spread_numbers(count, limit):
    numbers = spread(count, limit)
    assert len(numbers) == min(count, limit)
    assert not count or (numbers[0], numbers[-1]) == (0, count - 1)


# --- Pictures ---


def test_panels_are_found_by_their_steps(tmp_path):
    for name in (
        "images/a/00000002.png",
        "images/a/00000010.png",
        "images/a/notes.png",
        "images/b/1.png",
        "samples/c/1.png",
    ):
        picture(tmp_path / name)
    assert [(file.panel, file.step) for file in find_panels(tmp_path)] == [("a", 2), ("a", 10), ("b", 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 33])
def test_any_beginning_of_the_ranked_steps_is_spread_over_all(count):
    steps = list(range(0, 100 * count, 100))
    ranked = rank_steps(steps)
    assert sorted(ranked) == steps
    assert ranked[0] == steps[-1]
    for shown in range(2, count + 1):
        gaps = np.diff(sorted(ranked[:shown]))
        assert gaps.max() <= 2 * gaps.min() + 100


def test_pictures_that_do_not_fit_are_the_less_telling_ones(tmp_path, capsys, monkeypatch):
    noise = np.random.default_rng(0)
    files = []
    for step in range(1, 6):
        path = picture(tmp_path / f"images/p/{step}.png")
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        files.append(PanelFile("p", step, path))
    everything = PictureStore(10**7).choose({"r": files})["r"]["p"]
    assert sorted(everything) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out == ""
    size = max(map(len, everything.values()))
    chosen = PictureStore(3 * size).choose({"r": files, "empty": []})
    assert sorted(chosen["r"]["p"]) == [1, 3, 5]
    assert chosen["empty"] == {}
    assert "3 of 5 pictures fit" in capsys.readouterr().out


def test_large_pictures_are_reduced_until_some_evaluations_of_every_panel_fit(tmp_path):
    noise = np.random.default_rng(0)
    runs = {name: [] for name in "ab"}
    for name, files in runs.items():
        for step in (1, 2, 3, 4):
            path = picture(tmp_path / name / f"images/p/{step}.png")
            Image.fromarray(noise.integers(0, 256, (1000, 1300, 3), np.uint8)).save(path)
            files.append(PanelFile("p", step, path))
    chosen = PictureStore(2_000_000).choose(runs)
    assert min(len(panels["p"]) for panels in chosen.values()) >= report_images.MIN_EVALUATIONS
    content = base64.b64decode(chosen["a"]["p"][4].partition(",")[2])
    assert max(Image.open(io.BytesIO(content)).size) in report_images.SIDES[1:]


def test_a_picture_is_encoded_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    calls = []
    original = report_images._to_url
    monkeypatch.setattr(report_images, "_to_url", lambda *args: calls.append(args) or original(*args))
    path = picture(tmp_path / "images/p/1.png")
    store = PictureStore(10**6)
    first = store.choose({"r": find_panels(tmp_path)})
    assert store.choose({"r": find_panels(tmp_path)}) == first
    assert len(calls) == 1
    picture(path, (0, 0, 255), (65, 48))
    assert store.choose({"r": find_panels(tmp_path)}) != first
    assert len(calls) == 2


def test_a_damaged_picture_is_left_out_with_a_warning(tmp_path, capsys):
    picture(tmp_path / "images/p/1.png")
    (tmp_path / "images/p/2.png").write_bytes(b"\x89PNG no more")
    assert list(PictureStore(10**6).choose({"r": find_panels(tmp_path)})["r"]["p"]) == [1]
    printed = capsys.readouterr()
    assert "2.png cannot be read" in printed.err
    assert printed.out == ""  # no advice to make room for it


# --- The page ---


@pytest.fixture
def runs(tmp_path):
    """runs/a and runs/b of 40 steps, b's values twice a's; a picture of a, scores of both."""
    folder = tmp_path / "runs"
    for scale, name in ((1, "a"), (2, "b")):
        lines = [
            {"step": s, "seconds": 90.0 * s, "memory": scale * 2**30, "training/l2_loss": scale * 100 / s}
            for s in range(1, 41)
        ]
        path = write_run(folder / name, *lines, {"step": 40, "fid": 10.0 * scale, "validation_loss_t/0.5": 0.25})
        row = {
            "checkpoint_step": 40,
            "num_steps": 8,
            "cfg_scale": 2.0,
            "num_samples": 50,
            "fid": 10.0 * scale,
            "precision": 0.1 * scale,
        }
        (path / "fid.json").write_text(json.dumps({"cells": [row]}))
        (path / "checkpoints" / "40 #").mkdir(parents=True)
        (path / "checkpoints" / "40").mkdir()
    picture(folder / "a" / "images" / "sample_cfg_4" / "00000040.png")
    return folder


def column(table, title) -> list[dict]:
    place = table["columns"].index(title)
    return [row[place] for row in table["rows"]]


def test_the_tables_of_two_runs(runs, make_report):
    found = make_report("--runs", runs / "*")
    assert [run["name"] for run in found["runs"]] == ["a", "b"]
    facts = found["tables"]["runs"]
    assert [cell["text"] for cell in column(facts, "time")] == ["1 hour", "1 hour"]
    assert [cell["text"] for cell in column(facts, "memory")] == ["1.00 GiB", "2.00 GiB"]
    assert [cell.get("best") for cell in column(facts, "lowest training/l2_loss")] == [True, False]
    assert [cell["links"] for cell in column(facts, "checkpoints")] == [
        [{"text": "40", "href": f"../runs/{name}/checkpoints/40/"}] for name in "ab"
    ]
    scores = found["tables"]["scores"]
    assert [(cell["text"], cell["best"]) for cell in column(scores, "FID")] == [("10.000", True), ("20.000", False)]
    assert [(cell["text"], cell["best"]) for cell in column(scores, "precision")] == [("0.100", False), ("0.200", True)]
    assert [cell["best"] for cell in column(scores, "steps")] == [False, False]


def test_what_a_report_says_of_a_saved_run(demo_like, make_report):
    found = make_report("--runs", demo_like)
    facts = found["tables"]["runs"]
    (data,) = column(facts, "data")
    assert data["text"] == "digits, 1,500 images, 8x8x1, 10 classes"
    assert found["runs"][0]["batch_size"] == 16
    (parameters,) = column(facts, "parameters")
    assert parameters["value"] > 100


@pytest.fixture(scope="module")
def demo_like(tmp_path_factory):
    from tests.test_compatibility import unpack

    return unpack("run", tmp_path_factory.mktemp("saved")) / "run"


def test_without_room_there_are_no_pictures(runs, make_report):
    assert make_report("--runs", runs / "a")["panels"] == ["sample_cfg_4"]
    assert make_report("--runs", runs / "a", "--image_megabytes", "0")["panels"] == []


def test_settings_that_cannot_be_read_are_left_out(runs, make_report, capsys):
    (runs / "a" / "config.json").write_text('{"model": 3}')
    found = make_report("--runs", runs / "a")
    assert "data" not in found["tables"]["runs"]["columns"]
    assert "config.json" in capsys.readouterr().err


def test_hostile_texts_cannot_end_the_script(tmp_path, make_report):
    name = HOSTILE.replace("/", "")
    run = write_run(tmp_path / "runs" / name, {"step": 1, HOSTILE: 1.0, "training/l2_loss": 1.0})
    picture(run / "images" / name / "1.png")
    found = make_report("--runs", tmp_path / "runs" / "*")
    assert found["runs"][0]["name"] == name
    assert HOSTILE in found["metrics"]
    assert found["panels"] == [name]


def test_the_page_of_a_long_run_is_small(tmp_path, make_report):
    rng = np.random.default_rng(0)
    names = [f"training/{i}" for i in range(20)]
    lines = [
        {"step": s, "seconds": s / 10, **dict(zip(names, rng.random(20).tolist(), strict=True))}
        for s in range(1000, 1_000_001, 500)
    ]
    run = write_run(tmp_path / "runs" / "long", *lines)
    found = make_report("--runs", run)
    assert max(len(curve["steps"]) for curve in found["runs"][0]["curves"].values()) <= MAX_POINTS + 2
    assert len(json.dumps(found)) < 10**6


def test_metrics_and_panels_are_in_a_readers_order():
    names = ["sample_cfg_10", "sample_cfg_4", "sample_cfg_0.1", "reconstruction_n"]
    assert sorted(names, key=report_data.natural_order) == [
        "reconstruction_n",
        "sample_cfg_0.1",
        "sample_cfg_4",
        "sample_cfg_10",
    ]


@pytest.mark.parametrize(
    ("machine", "text"),
    [
        (
            {"kind": "NVIDIA H100", "devices": 8, "cores": 64, "memory": 2**40},
            "8 x NVIDIA H100, 64 cores, 1,024.00 GiB, JAX ?",
        ),
        ({"kind": "TPU v5", "devices": 1, "cores": 4, "jax": "1"}, "TPU v5, 4 cores, JAX 1"),
        (None, ""),
        ({"kind": 3}, ""),
        ("a machine", ""),
    ],
)
def test_machines_in_words(machine, text):
    assert report_data.describe_machine(machine) == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--runs is not given"),
        (["--runs", "a,"], "--runs=a, has an empty name"),
        (["--runs", "nowhere"], "--runs=nowhere is not there"),
        (["--runs", "{runs}/a", "--out", "x.png"], "--out=x.png: name a .html file"),
        (["--runs", "{runs}/a", "--out", "{runs}"], "--out={runs}: name a .html file, such as {runs}/report.html"),
        (["--runs", "{runs}/a", "--watch_seconds", "3"], "--watch_seconds"),
    ],
)
def test_refusals(words, message, runs, read_flags):
    with pytest.raises(UserError) as error:
        report.main(read_flags(report, [word.replace("{runs}", str(runs)) for word in words]))
    assert str(error.value).startswith(message.replace("{runs}", str(runs)))


def test_watching_writes_again_what_has_changed_until_the_end(runs, read_flags, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    written = []
    original = report.write_page
    monkeypatch.setattr(report, "write_page", lambda *args: written.append(1) or original(*args))
    looks = []

    def sleep(seconds):
        assert seconds == 7
        looks.append((len(written), read_page(out)["watch"]))
        if len(looks) == 2:  # nothing has changed in the first
            with (runs / "a" / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 41, "training/l2_loss": 0.5}) + "\n")
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        report.main(
            read_flags(report, ["--runs", str(runs / "*"), "--out", str(out), "--watch", "--watch_seconds", "7"])
        )
    counts = [count for count, _ in looks]
    assert counts[1] == counts[0]
    assert counts[2] == counts[0] + 1
    assert {seconds for _, seconds in looks} == {7}
    # The last page holds the last line, and does not load itself again.
    found = read_page(out)
    assert found["watch"] == 0
    assert found["runs"][0]["curves"]["training/l2_loss"]["values"][-1] == 0.5


# --- Films ---


def test_a_film_of_a_panel_has_a_frame_a_step(runs, read_flags, capsys):
    for step, colour in ((10, (255, 0, 0)), (20, (0, 255, 0)), (40, (0, 0, 255))):
        picture(runs / "a" / "images" / "sample_cfg_4" / f"{step:08d}.png", colour)
    report.main(read_flags(report, ["--runs", str(runs / "a"), "--film", "sample_cfg_4", "--film_seconds", "3"]))
    film = runs / "a" / "films" / "sample_cfg_4.webp"
    large = runs / "large.gif"
    report.main(
        read_flags(report, ["--runs", str(runs / "a"), "--film", "sample_cfg_4", "--out", str(large), "--scale", "3"])
    )
    assert Image.open(large).width >= 3 * 64
    assert capsys.readouterr().out.splitlines() == [str(film), str(large)]
    with Image.open(film) as opened:
        found = []
        for frame in range(opened.n_frames):
            opened.seek(frame)
            pixels = np.asarray(opened.convert("RGB"))
            found.append((pixels[-20, pixels.shape[1] // 2], opened.info["duration"]))
    for (colour, duration), expected in zip(found, np.eye(3) * 255, strict=True):
        assert np.abs(colour - expected).max() < 12
        assert duration == 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--film sample_cfg_3", "--film=sample_cfg_3: a has no such panel; it has sample_cfg_4"),
        ("--film sample_cfg_4 --out x.png", "--out=x.png: name a .webp or .gif or .mp4 file"),
        ("--film sample_cfg_4,x --out x.gif", "--out=x.gif holds one film, but there are 2"),
        ("--film sample_cfg_4 --watch", "--watch"),
        ("--scale 2", "--scale=2.0 has no effect without --film"),
        ("--film sample_cfg_4", "{runs}/a/films/sample_cfg_4.webp: a film needs two images"),
    ],
)
def test_refusals_of_films(words, message, runs, read_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        report.main(read_flags(report, ["--runs", str(runs / "a"), *words.split()]))
    assert str(error.value).startswith(message.replace("{runs}", str(runs)))


# --- The program ---


def test_the_program_says_where_the_page_is(runs, tmp_path):
    out = tmp_path / "new folder" / "report.html"
    done = run_program("report.py", "--runs", runs / "*", "--out", out)
    assert done.stdout.splitlines() == [str(out)]
    assert read_page(out)["runs"][1]["name"] == "b"
