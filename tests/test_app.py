"""app.py's JSON: the same pixels as the commands that it shows, refusals in one line, and the queue of its requests."""

import asyncio
import base64
import contextlib
import io
import json
import re
import shlex
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from anyio.from_thread import start_blocking_portal
from ml_collections import ConfigDict
from PIL import Image
from starlette.testclient import TestClient

import app
import edit
import sample
from tests.conftest import ROOT, Program
from tests.known_models import Given, make_generator
from tests.test_edit import tables  # noqa: F401 (a fixture)
from tests.test_generate import generator, run  # noqa: F401 (fixtures)
from utils.app import server as pages
from utils.app.commands import write_sampler
from utils.app.jobs import JobCancelledError, JobQueue, QueueFullError
from utils.app.model import MAX_UPLOAD_BYTES, Limits, Served, hide_folders, hide_paths, name_run
from utils.app.requests import parse_request, read_conditions, write_classes
from utils.base.messages import UserError
from utils.conditions.classes import ClassCondition
from utils.conditions.images import ImageCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.tokens import TextCondition
from utils.conditions.vector import VectorCondition
from utils.conditions.words import parse_rows, write_rows, write_texts
from utils.flags import conditions, drawing
from utils.sampling.solvers import SamplerConfig

URL = "http://127.0.0.1:7860"
QUICK = {"num_steps": 2, "cfg_scale": 2}


@pytest.fixture(scope="module")
def served(generator, run):  # noqa: F811
    return Served(generator, str(run), ("--codec", "pixels"))


@pytest.fixture(scope="module")
def client(served):
    with TestClient(pages.Server(served).app, base_url=URL) as client:
        yield client


def to_text(pixels, size=None) -> str:
    """An image as a request holds it."""
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    (picture if size is None else picture.resize(size)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def to_pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def pictures(answer) -> np.ndarray:
    """The images (n, h, w) of an answer."""
    assert answer.status_code == 200, answer.text
    return np.stack([to_pixels(image["png"]) for image in answer.json()["images"]])


@pytest.fixture
def type_command(read_flags, run, tmp_path):  # noqa: F811
    """type_command(answer, {word: what stands in its place}) runs the command that an answer shows."""

    def type_words(answer, places=None, saves=True):
        _, program, *words = shlex.split(answer.json()["command"])
        places = {run.name: str(run), **(places or {})}
        words = [places.get(word, word) for word in words] + ["--out", str(tmp_path / "out")]
        main = {"sample.py": sample, "edit.py": edit}[program.rpartition("/")[2]]
        words += ["--save_samples", str(tmp_path / "samples.npz")] if saves else []
        main.main(read_flags(main, words))
        return tmp_path / "samples.npz"

    return type_words


# --- The same pixels as the programs draw ---


@pytest.mark.parametrize(
    "more",
    [
        {"classes": [3, "7"], "num_samples": 3, "seed": 3},
        {"num_samples": 3, "time_shift": 1.5, "frames": 2},
    ],
)
def test_the_command_of_an_answer_draws_the_very_same_pixels(client, type_command, more):
    answer = client.post("/api/sample", json=QUICK | more)
    found = pictures(answer)
    with np.load(type_command(answer)) as expected:
        np.testing.assert_array_equal(found, expected["arr_0"][..., 0])
        titles = [image["title"] for image in answer.json()["images"]]
        assert titles == [str(label) for label in expected["arr_1"]]
        files = client.get(f"/api/results/{answer.json()['result']}/samples.npz")
        for content in (files.content, client.post("/api/sample", json=QUICK | more | {"format": "npz"}).content):
            with np.load(io.BytesIO(content)) as saved:
                np.testing.assert_array_equal(saved["arr_0"], expected["arr_0"])
                np.testing.assert_array_equal(saved["arr_1"], expected["arr_1"])
    if "frames" in more:
        strips = [to_pixels(text).reshape(-1, 8, 8) for text in answer.json()["films"]]
        np.testing.assert_array_equal([strip[-1] for strip in strips], found)
        assert answer.json()["frames"] == len(strips[0]) == 3


def test_the_figure_is_that_of_the_program(client, type_command, tmp_path):
    answer = client.post("/api/sample", json=QUICK | {"num_samples": 3})
    type_command(answer)
    grid = client.get(f"/api/results/{answer.json()['result']}/grid.png")
    assert grid.headers["content-disposition"] == 'attachment; filename="grid.png"'
    found, expected = (np.asarray(Image.open(file)) for file in (io.BytesIO(grid.content), tmp_path / "out/grid.png"))
    np.testing.assert_array_equal(found, expected)


def test_images_between_two_samples_are_those_of_the_command(client, type_command, tables):  # noqa: F811
    answer = client.post("/api/interpolate", json=QUICK | {"classes": [3, 7], "columns": 3})
    found = pictures(answer)
    assert answer.json()["columns"] == 3
    type_command(answer, saves=False)
    ((table, titles),) = tables
    np.testing.assert_array_equal(found, table[0, ..., 0])
    assert [image["title"] for image in answer.json()["images"]] == titles * 3


def test_own_images_are_changed_as_by_the_command(client, type_command, tables, tmp_path):  # noqa: F811
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    (tmp_path / "own").mkdir()
    Image.fromarray(pixels).save(tmp_path / "own/a.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    places = {"FOLDER": str(tmp_path / "own"), "MASK.png": str(tmp_path / "mask.png")}

    more = {"image": to_text(pixels), "classes": [5], "num_steps": 2, "cfg_scale": 1}
    inverted = client.post("/api/invert", json=more | {"edit": [1, "8"]})
    assert [image["title"] for image in inverted.json()["images"]] == ["image", "its noise", "again", "1", "8"]
    filled = client.post("/api/inpaint", json=more | {"mask": to_text(mask), "repeats": 2})
    image, hole, result = pictures(filled)
    assert (hole[:4] == 127).all()
    np.testing.assert_array_equal(result[4:], image[4:])
    assert (result[:4] != image[:4]).any()
    for answer in (inverted, filled):
        type_command(answer, places)
        np.testing.assert_array_equal(pictures(answer), tables.pop()[0][0, ..., 0])


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(64, 4.0),
        SamplerConfig(3, None),
        SamplerConfig(32, 1.5, (0.125, 0.75), "heun", cfg_channels=1, time_shift=2.5),
        SamplerConfig(16, 3.0, cfg_zero_star=True, cfg_zero_steps=2),
        SamplerConfig(0, 2.0, solver="dopri5"),
    ],
)
def test_a_sampler_is_written_as_it_is_read(generator, read_flags, sampler):  # noqa: F811
    assert drawing.read_sampler(read_flags(sample, write_sampler(sampler)), generator.model) == sampler


# --- What can be asked, and what is refused ---


def test_the_model_is_described_by_what_it_can_do(client, run):  # noqa: F811
    answer = client.get("/api/model")
    found = answer.json()
    assert (found["run"], found["image"]) == (run.name, {"height": 8, "width": 8, "channels": 1})
    assert [*found["tasks"]] == ["sample", "interpolate", "invert", "inpaint"]
    assert "sde" in found["tasks"]["sample"]["solvers"]
    assert {"sde", "dopri5"}.isdisjoint(found["tasks"]["inpaint"]["solvers"])
    assert all("ddim" not in task["solvers"] for task in found["tasks"].values())
    assert found["fields"] == [{"name": "class", "classes": [*"0123456789"], "empty": []}]
    assert (found["can_guide"], found["can_guide_by_inner_head"], found["can_guide_by_model"]) == (True, False, False)
    assert str(run.parent) not in answer.text


OWN = {"image": to_text(np.zeros((8, 8), np.uint8))}
BAD = [
    ("sample", {"num_steps": 0}, "num_steps=0: use a whole number"),
    ("sample", {"num_steps": 257}, "num_steps=257: up to 256 steps"),
    ("sample", {"num_steps": "4"}, "num_steps=4 is no number"),
    ("sample", {"num_steps": True}, "num_steps=True is no number"),
    ("sample", {"num_samples": 65}, "num_samples=65: use a whole number from 1 to 64"),
    ("sample", {"num_samples": 1.5}, "num_samples=1.5: use a whole number"),
    ("sample", {"frames": 65}, "frames=65: use a whole number from 0 to 64"),
    ("sample", {"seed": -1}, "seed=-1: use a whole number from 0"),
    ("sample", {"seed": "x"}, "seed=x: use a whole number from 0"),
    ("sample", {"cfg_scale": 1e9}, "cfg_scale=1e.09: use a scale"),
    ("sample", {"cfg_scale": []}, r"cfg_scale=\[\] is no number"),
    ("sample", {"cfg_interval": [1, 0]}, "cfg_interval=1,0: give first and last"),
    ("sample", {"cfg_zero_steps": ""}, "cfg_zero_steps= is no number"),
    ("sample", {"solver": "eular"}, "solver=eular: did you mean euler"),
    ("sample", {"solver": {}}, r"solver=\{\} is no text"),
    ("sample", {"solver": "ddpm"}, "solver=ddpm: it is of models trained as diffusions"),
    ("sample", {"rtol": 1e-7}, "'rtol' is no field of sample"),
    ("sample", {"inner_scale": 2}, "inner_scale=2: the model has no inner head"),
    ("sample", {"guide_scale": 2}, "guide_scale=2: there is no model to guide by"),
    ("sample", {"num_step": 4}, "'num_step' is no field of sample; did you mean num_steps"),
    ("sample", {"image": "x"}, "'image' is no field of sample"),
    ("sample", {"classes": [10]}, "classes: there is no class 10; use 0 to 9"),
    ("sample", {"classes": []}, "classes: give a list of 1 to 64"),
    ("sample", {"classes": [True]}, "classes: a class is a number or a name"),
    ("sample", {"classes": ["cat"]}, "'cat' is no class of this run"),
    ("sample", {"classes": [3], "conditions": [{"class": 3}]}, "classes and conditions: give one"),
    ("sample", {"conditions": {}}, "conditions: give a list"),
    ("sample", {"conditions": [{"angle": 1}]}, "conditions: each gives class, once; found angle"),
    ("sample", {"conditions": [{"class": None}]}, "class is neither a number nor a text"),
    ("sample", {"condition_images": []}, "the model's condition is no image"),
    ("sample", {"format": "gif"}, "format: use png or npz"),
    ("interpolate", {"solver": "sde"}, "solver=sde cannot interpolate"),
    ("interpolate", {"columns": 1}, "columns=1: use a whole number from 2 to 64"),
    ("interpolate", {"between": "x"}, "between: use noise or conditions"),
    ("interpolate", {"between": "conditions", "classes": [3]}, "one condition alone is given"),
    ("invert", {}, "image: give an image file in base64"),
    ("invert", {"image": "!"}, "image: give an image file in base64"),
    ("invert", {"image": "AAAA"}, "image is not a readable image"),
    ("invert", OWN | {"edit": [11]}, "edit: there is no class 11"),
    ("invert", OWN | {"cfg_zero_star": 1, "cfg_zero_steps": 1}, "steps that are left out cannot invert"),
    ("inpaint", OWN, "mask: give an image file"),
    ("inpaint", OWN | {"mask": OWN["image"]}, "mask is black throughout"),
    ("inpaint", OWN | {"mask": to_text(np.eye(4, dtype=np.uint8))}, "mask is 4x4, but the images of the run are 8x8"),
    ("inpaint", OWN | {"solver": "dopri5"}, "solver=dopri5 cannot inpaint"),
    ("dream", {}, "the model cannot dream"),
]


@pytest.mark.parametrize(("task", "body", "message"), BAD)
def test_bad_requests_are_refused_in_one_line(client, task, body, message):
    answer = client.post(f"/api/{task}", json=body)
    assert answer.status_code == 422
    assert [*answer.json()] == ["error"]
    with pytest.raises(ValueError, match=message):
        raise ValueError(answer.json()["error"])
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (b"[1]", "no JSON object"),
        (b'{"seed": NaN}', "NaN is no number"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"classes": ["\\ud800"]}', "half of a surrogate pair"),
        (b"\xff", "no JSON"),
    ],
    ids=range(7),
)
def test_what_is_no_json_is_refused(client, content, message):
    answer = client.post("/api/sample", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, message in answer.json()["error"]) == (422, True)


def test_sizes_are_bounded(client, served):
    large = {"content": b" " * (MAX_UPLOAD_BYTES + 1), "headers": {"content-type": "application/json"}}
    assert client.post("/api/sample", **large).status_code == 413
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    answer = client.post("/api/invert", json={"image": base64.b64encode(bomb.getvalue()).decode()})
    assert "image: 9000x9000 are above 64 megapixels" in answer.json()["error"]
    wide = Served(served.generator.with_seed(0), "x")
    wide.generator.model = served.generator.model._replace(image_shape=(2048, 2048, 1))
    with pytest.raises(UserError, match="10 images of 2048x2048 are more than an answer holds, 4; take fewer frames"):
        parse_request("sample", {"num_samples": 2, "frames": 4}, wide)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"origin": URL}, 200),
        ({"host": "evil.example:7860"}, 403),  # a name that has been pointed at 127.0.0.1
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:7860"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
    ],
)
def test_other_sites_cannot_ask(client, headers, status):
    answer = client.get("/api/model", headers=headers)
    assert answer.status_code == status
    assert "'none'" in answer.headers["content-security-policy"]


def test_a_public_server_answers_to_any_name_and_is_shown_in_a_space(served):
    public = TestClient(pages.Server(served, is_local=False).app, base_url="https://user-name.hf.space")
    answer = public.get("/")
    assert answer.status_code == 200
    assert "frame-ancestors 'self' https://huggingface.co" in answer.headers["content-security-policy"]
    assert public.post("/api/sample", content="{}").status_code == 415  # so that forms of other sites cannot ask
    assert [pages.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "name")] == [
        *[True] * 3,
        *[False] * 3,
    ]


@pytest.mark.parametrize("path", ["/nothing", "/api/results/x/grid.png", "/api/results/../../app.py", "/api/sample"])
def test_what_is_not_there_is_said_in_json(client, path):
    answer = client.get(path)
    assert answer.status_code in (404, 405)
    assert [*answer.json()] == ["error"]


def test_faults_of_the_code_are_told_to_the_terminal_alone(client, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("/secret/path")

    for name in ("draw", "parse_request"):
        with monkeypatch.context() as patch:
            patch.setattr(pages, name, fail)
            answer = client.post("/api/sample", json={})
            lines = client.post("/api/sample", json={"stream": True}).text.splitlines()
        assert (answer.status_code, answer.json()) == (500, {"error": pages.FAULT})
        assert json.loads(lines[-1])["error"] == pages.FAULT
        assert "/secret/path" in capsys.readouterr().err


def test_exhausted_memory_is_one_line(client, monkeypatch):
    import jax

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of /some/path")

    monkeypatch.setitem(__import__("utils.app.drawing", fromlist=["TASKS"]).TASKS, "sample", fail)
    answer = client.post("/api/sample", json={})
    assert answer.status_code == 422
    assert "out of memory: the request needs more than there is" in answer.json()["error"]
    assert "fewer samples" in answer.json()["error"]


# --- Conditions ---

VECTOR = VectorCondition.of_rows(np.array([[0, 1], [1, 3]], np.float32), ["angle", "mass"])
TEXT = TextCondition.of_captions(["a red 3", "a blue 7 above it"])


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (VECTOR, [{"angle": 0.25, "mass": 2}, {"angle": "0.1", "mass": 1}]),
        (TEXT, [{"text": "a red 3"}, {"text": "one, two; three"}]),
        (SeveralCondition((("vector", VECTOR), ("text", TEXT))), [{"angle": 0.3, "mass": 1.5, "text": "red, 3"}]),
    ],
    ids=["numbers", "texts", "several"],
)
def test_conditions_are_those_of_the_command(generator, kind, rows):  # noqa: F811
    model = generator.model._replace(network=generator.model.network.clone(condition=kind))
    other = generator.with_seed(0)
    other.model = model
    found, words = read_conditions({"conditions": rows}, Served(other, "x"))
    flag, text = words
    config = ConfigDict({"num_samples": 2, "condition": None} | {flag.removeprefix("--"): text})
    expected = conditions.read_conditions(config, model)
    import jax

    jax.tree.map(np.testing.assert_array_equal, found, expected)
    fields = {field["name"]: field for field in Served(other, "x").describe()["fields"]}
    assert [*fields] == list(kind.fields)
    if "angle" in fields:
        assert fields["angle"] == {"name": "angle", "low": 0, "high": 1, "typical": 0.5}


def test_classes_are_written_by_numbers_unless_others_are_called_so():
    assert write_classes([1, 0], ClassCondition(("a, b", "cat"))) == "1,0"
    assert write_classes([1, 2], ClassCondition(("2", "1", "0"))) == "1,0"
    assert write_classes([2], ClassCondition(("2", "x", "x, 2"))) == "x, 2"
    assert write_classes([2], ClassCondition(("2", "x", "x,2 "))) is None


def test_conditions_that_a_command_cannot_hold_have_none():
    rows = [{"a": "1;2", "b": " x "}, {"a": "3", "b": "4,5"}]
    assert parse_rows(write_rows(rows), ["a", "b"]) == rows
    assert write_rows([{"a": 'say "x"'}]) == 'a=say "x"'
    assert write_rows([{"a": 'an inch"; b'}]) is None
    assert write_texts(["a 3", 'an inch"; b']) is None
    assert write_texts(["a, b", "c; d"]) == '"a, b"; "c; d"'


def test_an_answer_names_no_folder(run):  # noqa: F811
    assert hide_folders("/home/me/runs/a") == "a"
    assert hide_folders("/home/me/runs/a/checkpoints/500") == "a/checkpoints/500"
    assert hide_folders(str(Path.cwd() / "runs" / "a")) == "runs/a"
    assert hide_folders("s3://bucket/runs/a") == "s3://bucket/runs/a"
    assert hide_folders("/a:b/c\nd") == "c\nd"
    assert hide_folders("kl:/home/me/vae") == "kl:vae"
    assert hide_folders("runs/a") == "runs/a"
    assert hide_folders("hf:me/name") == "hf:me/name"
    assert name_run("/home/me/runs/a") == "a"
    assert name_run("/home/me/runs/a/checkpoints/500") == "a, step 500"
    assert name_run("hf:me/name") == "hf:me/name"
    assert hide_paths("--text_encoder=transformers:/home/me/clip (of /home/me) is no 1/2") == (
        "--text_encoder=transformers:clip (of me) is no 1/2"
    )
    assert hide_paths("see https://huggingface.co/docs") == "see https://huggingface.co/docs"


def test_images_are_conditions(served):
    vector = VectorCondition.of_rows(np.array([[0], [1]], np.float32), ["angle"])
    kind = SeveralCondition((("vector", vector), ("image", ImageCondition((8, 8, 1)))))
    other = Served(make_generator(Given, kind, {}), "x")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8)
    body = {"condition_images": list(map(to_text, pixels)), "conditions": [{"angle": 2}], "num_samples": 3}
    body |= {"num_steps": 2, "cfg_scale": 1}
    with TestClient(pages.Server(other).app, base_url=URL) as client:
        assert client.get("/api/model").json()["condition_image"] == [8, 8, 1]
        answer = client.post("/api/sample", json=body)
        np.testing.assert_array_equal(pictures(answer), pixels[[0, 1, 0]])
        assert "--condition_images FOLDER --condition angle=2 " in answer.json()["command"]
        assert answer.json()["remarks"] == ["angle=2 is outside of the training data, 0 to 1"]
        few = client.post("/api/sample", json=body | {"num_samples": 1})
        assert few.json()["remarks"][-1] == "2 conditions are given; only the first are drawn: 1"
        for changes, message in (
            ({"condition_images": ["!"]}, "condition_images: give an image file in base64"),
            ({"conditions": [{"angle": 1}] * 3}, "conditions: give angle once, or for each image"),
            ({"conditions": None}, "conditions: give angle once, or for each image"),
        ):
            refused = client.post("/api/sample", json=body | changes)
            assert (refused.status_code, refused.json()["error"]) == (422, message)
        assert client.post("/api/sample", json=QUICK).status_code == 422  # there are none to be drawn


# --- The queue ---


def test_jobs_are_computed_one_after_another_and_can_be_left():
    running, go = threading.Event(), threading.Event()
    order = []

    def work(name):
        def compute(job):
            running.set()
            go.wait(5)
            job.report("steps", 1, 2)
            order.append(name)
            return name

        return compute

    async def use():
        queue = JobQueue(2)
        jobs = [queue.submit(work(name)) for name in "abc"]
        with pytest.raises(QueueFullError):
            queue.submit(work("d"))
        follower = queue.follow(jobs[2])
        assert await anext(follower) == {"state": "waiting", "place": 2}
        # The second leaves while it waits: the third moves up, and there is room again.
        jobs[1].cancel()
        assert await anext(follower) == {"state": "waiting", "place": 1}
        jobs.append(queue.submit(work("d")))
        # The first leaves while it is computed: it ends at its next report.
        await asyncio.to_thread(running.wait, 5)
        jobs[0].cancel()
        go.set()
        updates = [update async for update in follower]
        assert updates[-1] == {"state": "finished", "result": "c"}
        with pytest.raises(JobCancelledError):
            jobs[0].future.result()
        assert [update async for update in queue.follow(jobs[3])][-1]["result"] == "d"
        assert queue.jobs == []
        queue.close()

    with start_blocking_portal() as portal:  # the browser's tests have a loop in this thread
        portal.call(use)
    assert order == ["c", "d"]


@contextlib.contextmanager
def serving(served):
    """The URL of a server in a thread of this process."""
    listening = pages.bind("127.0.0.1", 0)
    server = pages.make_server(served, "127.0.0.1")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def test_a_client_that_leaves_ends_its_request_and_the_next_is_served(served, monkeypatch):
    reports = {}
    draw = pages.draw

    def draw_slowly(served, ask, job):
        if ask.seed == 0:
            return draw(served, ask, job)
        reports[ask.seed] = []
        for done in range(1000):
            try:
                job.report("steps", done, 1000)
            except JobCancelledError:
                reports[ask.seed].append("cancelled")
                raise
            threading.Event().wait(0.01)

    monkeypatch.setattr(pages, "draw", draw_slowly)
    small = Served(served.generator, served.load_dir, limits=Limits(queue=1))
    with serving(small) as url, httpx.Client(base_url=url, timeout=20) as client:
        with client.stream("POST", "/api/sample", json={"seed": 1, "stream": True}) as first:
            lines = map(json.loads, first.iter_lines())
            assert next(lines)["state"] == "working"
            with client.stream("POST", "/api/sample", json={**QUICK, "num_samples": 3, "stream": True}) as second:
                others = map(json.loads, second.iter_lines())
                assert next(others) == {"state": "waiting", "place": 1}
                full = client.post("/api/sample", json={"seed": 2})
                assert (full.status_code, "1 requests are waiting already" in full.json()["error"]) == (503, True)
                first.close()
                assert list(others)[-1]["state"] == "finished"
        # Without a stream, a client that has left is noticed as well.
        with pytest.raises(httpx.ReadTimeout):
            client.post("/api/sample", json={"seed": 3}, timeout=0.3)
        assert client.post("/api/sample", json={**QUICK, "num_samples": 3}).status_code == 200
    assert reports == {1: ["cancelled"], 3: ["cancelled"]}


# --- The program ---


def test_the_space_starts_the_program(read_flags):
    text = (ROOT / "examples" / "space.Dockerfile").read_text()
    (command,) = re.findall(r"^CMD exec (.*)$", text, flags=re.MULTILINE)
    python, program, *words = shlex.split(command)
    config = read_flags(app, words)
    assert (python, program, config.host) == (".venv/bin/python", "app.py", "0.0.0.0")
    assert f"EXPOSE {config.port}" in text
    assert config.load_dir == "$MODEL"
    extra = re.search(r"EXTRAS=(\w+)", text)[1]
    assert (ROOT / "requirements" / f"{extra}.txt").exists()


def test_the_program_serves_until_it_is_interrupted(run):  # noqa: F811
    program = Program(["app.py", "--load_dir", str(run), "--port", "0"], {}, is_apart=True)
    deadline = time.monotonic() + 60
    while not (url := program.outputs()[0].strip()):
        assert program.poll() is None, program.outputs()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert httpx.get(f"{url}/api/model").json()["run"] == run.name
    # In the midst of a request, which is told so.
    with httpx.stream("POST", f"{url}/api/sample", json={"num_steps": 256, "stream": True}, timeout=30) as answer:
        lines = map(json.loads, answer.iter_lines())
        assert next(lines)["state"] == "working"
        program.send_signal(signal.SIGINT)
        assert list(lines)[-1] == {"state": "failed", "error": "the server has been ended"}
    output, errors = program.communicate(20)
    assert (program.returncode, output.strip(), errors.splitlines()[-1]) == (128 + signal.SIGINT, url, "interrupted")
    assert "Traceback" not in errors


def test_the_program_refuses_what_it_cannot_serve(read_flags, run, monkeypatch):  # noqa: F811
    def refuse(words, message):
        with pytest.raises(UserError, match=message):
            app.main(read_flags(app, words.split()))

    refuse("", "--load_dir is not given")
    refuse("--load_dir runs/no/such --port 0", "--load_dir=runs/no/such holds no checkpoint")
    refuse(f"--load_dir {run} --host nowhere.invalid", "--host=nowhere.invalid is no address of this machine")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refuse(f"--load_dir {run} --port {port}", f"--port={port}: Address already in use .*; name another port")
    monkeypatch.setattr(app, "PACKAGES", ("starlette", "no_such_package"))
    refuse(f"--load_dir {run}", "needs the package no_such_package, .*; make setup EXTRAS=app")
