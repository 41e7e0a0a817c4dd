"""Local metrics and images, and wandb in its three modes."""

import contextlib
import io
import json
import logging
import os
import re
import resource
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from matplotlib.figure import Figure
from PIL import Image

import train_flow
from utils.base.messages import UserError
from utils.images import films, plotting
from utils.trackers import trackers as tracking
from utils.trackers import wandb_tracker


def config(mode: str, *names: str) -> dict[str, Any]:
    wandb = {"mode": mode, "project": "flow", "entity": None, "group": None, "name": "x", "notes": None, "tags": []}
    return {"seed": 0, "wandb": wandb, "trackers": list(names or ["wandb"])}


def test_lines_of_steps_that_run_again_are_dropped(tmp_path):
    trackers = tracking.Trackers(tmp_path, config("disabled"), 0)
    for step in (1, 2, 3):
        trackers.log(step, {"training/l2_loss": np.float32(step)})
    trackers.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "training/l2_l')  # cut short by a kill
    trackers = tracking.Trackers(tmp_path, config("disabled"), 2)
    trackers.log(3, {"training/l2_loss": 30})
    trackers.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["training/l2_loss"]) for line in lines] == [(1, 1), (2, 2), (3, 30)]


def test_damaged_lines_stop_nothing(tmp_path, capfd):
    good = [{"step": step, "training/l2_loss": float(step)} for step in (1, 2, 3)]
    lines = [json.dumps(line).encode() for line in good]
    damaged = [lines[0], b"\0" * 30, lines[1], b"\xff\xfe", b"[1]", b'{"no": 1}', b'{"step": "2"}', lines[2], b"\0\0\0"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(damaged))
    assert tracking.read_metrics(tmp_path / "metrics.jsonl") == good
    assert "left out 5 damaged lines" in capfd.readouterr().err
    trackers = tracking.Trackers(tmp_path, config("disabled"), 2)
    trackers.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join([*lines[:2], b""])


def test_lines_that_no_tracker_writes_are_damaged(tmp_path, capfd):
    nested = b'{"step": 1, "fid": ' + b"[" * 100_000
    lines = [
        b'{"step": 1, "fid": ' + b"9" * 400 + b"}", b'{"step": ' + b"9" * 400 + b"}", b'{"step": 1, "fid": [2]}',
        nested,
        b'{"step": true}', b'{"step": 1, "fid": ' + b"9" * 5000 + b"}", b" " * (tracking.MAX_LINE_BYTES - 1),
    ]  # fmt: skip
    good = {"step": 2, "fid": "low", "kid": None, "x": 1e308, "y": float("-inf")}
    content = b"\n".join([*lines, json.dumps(good).encode(), b""])
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert tracking.read_metrics(tmp_path / "metrics.jsonl") == [good]
    assert "left out 6 damaged lines" in capfd.readouterr().err
    curves = tracking.read_curves(tmp_path, "runs")
    assert curves.keys() == {"x", "y"}
    assert np.isnan([curves[name][2] for name in curves]).all()
    tracking.Trackers(tmp_path, config("disabled"), 2).close()
    assert tracking.read_metrics(tmp_path / "metrics.jsonl") == [good]


def test_named_pipes_are_not_waited_on(tmp_path, capfd):
    os.mkfifo(tmp_path / "metrics.jsonl")
    for read in (
        lambda: tracking.read_curves(tmp_path, "runs"),
        lambda: tracking.Trackers(tmp_path, config("disabled"), 2),
    ):
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be read \(it is no regular file\)"):
            read()
    os.mkfifo(tmp_path / "wandb_id.txt")
    assert wandb_tracker._read_wandb_id(tmp_path / "wandb_id.txt") is None
    assert (tmp_path / "wandb_id.txt.damaged1").is_fifo()


@pytest.mark.parametrize("content", [b"", b"\0\0\0\0", b"\xff\xfe", b"two words"])
def test_a_damaged_wandb_id_starts_a_new_curve(tmp_path, content, monkeypatch):
    (tmp_path / "wandb_id.txt").write_bytes(content)
    trackers = tracking.Trackers(tmp_path, config("offline"), 0)
    trackers.close()
    first = (tmp_path / "wandb_id.txt").read_text()
    assert re.fullmatch(r"[\w-]+", first)
    assert (tmp_path / "wandb_id.txt.damaged1").read_bytes() == content
    trackers = tracking.Trackers(tmp_path, config("offline"), 0)
    trackers.close()
    assert (tmp_path / "wandb_id.txt").read_text() == first


def test_while_the_disk_is_full_lines_wait(tmp_path, capsys):
    trackers = tracking.Trackers(tmp_path, config("disabled"), 0)
    trackers.log(1, {"a": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))  # in the middle of the second line
    try:
        trackers.log(2, {"a": 2})
        trackers.log(3, {"a": 3})
        trackers.log_figure(3, "x", Figure())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    trackers.log(4, {"a": 4})
    trackers.close()
    assert [line["a"] for line in tracking.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("its lines wait until it can") == 1
    assert not list((tmp_path / "images").rglob("*.png"))


def test_a_resumed_offline_run_has_all_steps_in_its_newest_folder(tmp_path, capfd):
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        settings = config("offline") | {"dataset": {"name": "digits"}}
        trackers = tracking.Trackers(tmp_path, settings, first, axis="epoch")
        for step in steps:
            trackers.log(step, {f"loss_{step}": step})
        trackers.log_table("scores", [{"fid": 3.5}, {"steps": 4}])
        trackers.close()
        output = capfd.readouterr()
    (folder,) = re.findall(r"wandb sync (\S+)`", output.out)
    assert output.err == ""
    (file,) = Path(folder).glob("*.wandb")
    assert_written(file, "loss_1", "loss_2", "loss_3", "loss_4", "digits", "scores", "epoch")


def assert_written(file: Path, *names: str) -> None:
    """wandb's own process may write a moment behind."""
    missing = names
    deadline = time.monotonic() + 30
    while missing and time.monotonic() < deadline:
        content = file.read_bytes()
        missing = [name for name in missing if name.encode() not in content]
    assert not missing


@pytest.fixture(autouse=True)
def no_account(monkeypatch):
    """wandb's environment is that of nobody in particular."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("mode", ["disabled", "offline", "online"])
def test_modes(tmp_path, mode, monkeypatch, capfd):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))  # no account is set up
    (tmp_path / "run").mkdir()
    trackers = tracking.Trackers(tmp_path / "run", config(mode), 0)
    trackers.log(1, {"training/l2_loss": 1.5})
    trackers.log_figure(1, "sample_N/4", Figure())
    trackers.close()
    (line,) = tracking.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (line["step"], tracking.metrics_of(line)) == (1, {"training/l2_loss": 1.5})
    assert (tmp_path / "run" / "images" / "sample_N_4" / "00000001.png").stat().st_size > 0
    said = capfd.readouterr().out.splitlines()
    assert [line for line in said if "no account is set up" in line] == said[: mode == "online"]
    run_files = list((tmp_path / "run").rglob("*.wandb"))
    if mode == "disabled":
        assert not run_files
        assert not (tmp_path / "run" / "wandb").exists()
    else:
        assert_written(run_files[0], "training/l2_loss", "sample_N/4")


def test_a_key_that_wandb_refuses_means_offline(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    monkeypatch.setattr(wandb_tracker.urllib.request, "urlopen", lambda url, timeout: io.BytesIO())
    trackers = tracking.Trackers(tmp_path, config("online"), 0)
    trackers.log(1, {"training/l2_loss": 1.5})
    trackers.close()
    first, last = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"wandb: .*API key must have 40.*; logging offline under .*/wandb", first)
    assert "wandb sync" in last
    assert list(tmp_path.rglob("*.wandb"))


def set_server(monkeypatch, base_url: str) -> None:
    """wandb reads its environment once in a process."""
    settings = SimpleNamespace(base_url=base_url, http_proxy=None, https_proxy=None)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))


@pytest.mark.parametrize("server", ["refuses", "is silent", "has no address"])
def test_without_a_network_a_run_is_offline_within_seconds(tmp_path, monkeypatch, capfd, server):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_tracker, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        name = f"127.0.0.1:{listener.getsockname()[1]}"
        if server == "refuses":
            listener.close()
        elif server == "has no address":
            name = "wandb.invalid"
            # The system may take its time over this.
            monkeypatch.setattr(wandb_tracker.urllib.request, "urlopen", lambda url, timeout: time.sleep(20))
        set_server(monkeypatch, f"http://{name}")
        started = time.monotonic()
        problem = wandb_tracker.explain_offline()
    assert time.monotonic() - started < 5
    assert problem.startswith(f"http://{name} does not answer (")
    monkeypatch.setattr(wandb_tracker, "explain_offline", lambda: problem)
    trackers = tracking.Trackers(tmp_path, config("online"), 0)
    trackers.close()
    assert capfd.readouterr().out.startswith(f"wandb: {problem}; logging offline under {tmp_path}/wandb\n")


def test_a_server_that_answers_anything_is_there(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)

    def refuse(url, timeout):
        raise wandb_tracker.urllib.error.HTTPError(url, 404, "Not Found", {}, None)

    set_server(monkeypatch, "http://wandb.example")
    monkeypatch.setattr(wandb_tracker.urllib.request, "urlopen", refuse)
    assert wandb_tracker.explain_offline() == ""


class Broken:
    """A wandb run whose own process has gone."""

    offline = False
    dir = "/run/wandb/run-x/files"

    def __init__(self, log: bool):
        self.num_calls = 0
        self.breaks = log

    def log(self, values, step=None):
        self.num_calls += 1
        if self.breaks:
            raise BrokenPipeError("the service has died\nat length")

    def finish(self):
        raise TimeoutError("not all was uploaded")


def test_what_wandb_raises_ends_no_run(tmp_path, monkeypatch, capsys):
    run = Broken(log=True)
    monkeypatch.setattr(wandb_tracker, "start_wandb", lambda *arguments: run)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    trackers = tracking.Trackers(tmp_path, config("online"), 0)
    for step in (1, 2):
        trackers.log(step, {"loss": step})
        trackers.log_figure(step, "sample", Figure())
    trackers.log_table("scores", [{"fid": 3.5}])
    trackers.close()
    assert [line["loss"] for line in tracking.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert run.num_calls == 1
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("wandb: the service has died at length; nothing more is logged there")
    monkeypatch.setattr(wandb_tracker, "start_wandb", lambda *arguments: Broken(log=False))
    tracking.Trackers(tmp_path, config("online"), 0).close()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == "wandb: not all was uploaded; upload what is missing with `wandb sync /run/wandb/run-x`"


def test_a_run_goes_on_where_wandb_cannot_start_at_all(tmp_path, monkeypatch, capsys):
    def fail(**options):
        raise OSError("no room for the service")

    monkeypatch.setattr(wandb, "init", fail)
    trackers = tracking.Trackers(tmp_path, config("offline"), 0, axis="epoch")
    trackers.log(1, {"loss": 1})
    trackers.close()
    assert "wandb: no room for the service; nothing is logged there" in capsys.readouterr().err


def test_a_full_disk_under_the_log_of_wandb_shows_no_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(wandb, "init", lambda **options: Broken(log=False))
    monkeypatch.setattr(Broken, "id", "x", raising=False)
    monkeypatch.setattr(Broken, "url", "here", raising=False)
    wandb_tracker.start_wandb(tmp_path, config("offline"))
    with open("/dev/full", "w", encoding="utf-8") as full:
        logging.StreamHandler(full).handle(logging.makeLogRecord({"msg": "debug"}))
        with contextlib.suppress(OSError):
            full.close()
    assert "Traceback" not in capsys.readouterr().err


def test_variables_of_wandb_count_where_flags_are_not_given(configure, monkeypatch, tmp_path):
    for name, value in {
        "MODE": "dryrun", "PROJECT": "cats", "ENTITY": "team", "RUN_GROUP": "sweep", "NOTES": "why", "TAGS": "a,b",
        "NAME": "a title",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)
    started = []
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or Broken(log=False))
    monkeypatch.setattr(Broken, "id", "x", raising=False)
    monkeypatch.setattr(Broken, "url", "here", raising=False)
    for words in (
        [],
        ["--wandb.project", "dogs", "--wandb.name", "mine", "--wandb.tags", "c", "--wandb.mode", "offline"],
    ):
        config = configure(words)
        assert config.folder == Path("runs") / ("mine" if words else "flow_imagenet256")
        wandb_tracker.start_wandb(tmp_path, config.to_json())
    names = ("mode", "project", "entity", "group", "notes", "tags", "name")
    assert [tuple(options[name] for name in names) for options in started] == [
        ("offline", "cats", "team", "sweep", "why", ["a", "b"], "a title"),
        ("offline", "dogs", "team", "sweep", "why", ["c"], "mine"),
    ]


@pytest.mark.parametrize(
    ("variables", "words", "mode"),
    [
        ({"WANDB_DISABLED": "true"}, "", "disabled"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "", "disabled"),
        ({"WANDB_DISABLED": "false"}, "", "online"),
        ({"WANDB_DISABLED": "true"}, "--wandb.mode offline", "offline"),
        ({"WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_MODE": ""}, "", "online"),
        ({"WANDB_MODE": "disabled"}, "--wandb.offline", "offline"),
    ],
)
def test_the_mode_of_the_environment(read_flags, monkeypatch, variables, words, mode):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_flags(train_flow, words.split()).wandb.mode == mode


def test_what_wandb_shows_is_what_the_flags_say(read_flags, tmp_path, monkeypatch):
    import wandb

    asked = {}

    def init(**options):
        asked.update(options)
        return SimpleNamespace(offline=True, id="x1")

    monkeypatch.setattr(wandb, "init", init)
    named = {"project": "faces", "entity": "lab", "group": "sweep", "name": "third", "notes": "why"}
    words = [word for name, value in named.items() for word in (f"--wandb.{name}", value)]
    words += ["--wandb.tags", "a,b", "--wandb.mode", "offline", "--seed", "7"]
    settings = read_flags(train_flow, words).to_dict() | {"dataset": {"name": "digits"}}
    wandb_tracker.start_wandb(tmp_path, settings)
    expected = named | {"tags": ["a", "b"], "mode": "offline", "dir": tmp_path}
    assert {name: asked[name] for name in expected} == expected
    assert (asked["config"]["seed"], asked["config"]["dataset"]) == (7, {"name": "digits"})


def test_an_account_in_netrc_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb_tracker.has_wandb_account("https://wandb.example")
    (tmp_path / "netrc").write_text("machine wandb.example login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_tracker.has_wandb_account("https://wandb.example")
    assert not wandb_tracker.has_wandb_account("https://other.example")


def render(figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (130, 130)])
def test_figures_show_every_image_and_every_title(channels, height, width):
    colours = np.random.default_rng(0).integers(0, 256, (3, 5, 1, 1, channels), np.uint8)
    images = np.broadcast_to(colours, (3, 5, height, width, channels))
    figure = plotting.image_table(images, ("a", "b", "c"), [f"t = {i}" for i in range(5)], "title", ["x", "y"])
    assert texts(figure) == [*(f"t = {i}" for i in range(5)), "a", "b", "c", "x", "y", "title"]
    drawn = render(figure)
    cell = plotting._Cell.fit(height, width)
    for row in range(3):  # from the lower right, where the margins are one gap
        bottom = drawn.shape[0] - plotting.GAP - (2 - row) * (cell.height + plotting.GAP)
        for column in range(5):
            right = drawn.shape[1] - plotting.GAP - (4 - column) * (cell.width + plotting.GAP)
            shown = drawn[bottom - cell.height // 2 : bottom, right - cell.width // 2 : right]
            np.testing.assert_array_equal(shown, np.broadcast_to(images[row, column, 0, 0], shown.shape))
    assert drawn[-1].min() == drawn[:, -1].min() == 255  # the gaps


def test_pixels_are_enlarged_by_a_whole_factor():
    images = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 32, 3), np.uint8)
    gap = plotting.GAP
    drawn = render(plotting.image_table(images))
    np.testing.assert_array_equal(drawn[-gap - 128 : -gap, -gap - 128 : -gap][::4, ::4], images[0, 0])


def test_grid_is_ordered_by_label_and_titled():
    images = (40 * np.arange(5, dtype=np.uint8))[:, None, None, None] * np.ones((1, 16, 16, 1), np.uint8)
    figure = plotting.sample_grid(images, np.array([2, 0, 1, 2, 0]), ("zero", "one", "two"))
    assert texts(figure) == ["zero"] * 2 + ["one", "two", "two"]
    cell = plotting._Cell.fit(16, 16)
    gap = plotting.GAP
    drawn = render(figure)
    bottoms = [drawn.shape[0] - gap - row * (cell.height + gap) - 5 for row in (1, 0)]
    rights = [drawn.shape[1] - gap - column * (cell.width + gap) - 5 for column in (2, 1, 0)]
    shown = [[int(drawn[bottom, right, 0]) for right in rights] for bottom in bottoms]
    assert shown == [[40, 160, 80], [0, 120, 255]]


def test_a_film_without_labels_has_all_images_in_their_order(tmp_path):
    colours = (40 * np.arange(6, dtype=np.uint8)).reshape(2, 3, 1, 1, 1)
    films.save_film(tmp_path / "film.webp", np.broadcast_to(colours, (2, 3, 16, 16, 3)), "webp", seconds=1)
    cell = plotting._Cell.fit(16, 16)
    gap = plotting.GAP
    with Image.open(tmp_path / "film.webp") as film:
        for frame in range(2):
            film.seek(frame)
            shown = np.asarray(film.convert("RGB")).astype(int)
            ends = [(2, 2), (2, 1), (1, 2)]  # rows from below, columns from the right
            found = [shown[-gap - (row - 1) * (cell.height + gap) - 9, -gap - (column - 1) * (cell.width + gap) - 9, 0]
                     for row, column in ends]  # fmt: skip
            np.testing.assert_allclose(found, colours[frame, :, 0, 0, 0], atol=6)
