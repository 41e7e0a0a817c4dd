"""Object storage: files, runs and outputs at URLs, against fsspec's memory and fakes of S3 and GCS on loopback."""

import io
import json
import logging
import re
import signal
import socket
import threading
import time

import fsspec
import jax
import numpy as np
import pytest

import compute_fid_stats
import eval_fid
import plot_metrics
import report
import sample
from tests.conftest import run_program
from tests.runs import losses, start
from tests.test_report import read_page
from utils.base.background import in_background
from utils.base.messages import UserError, with_urls
from utils.runs import remote_run
from utils.runs.checkpoint import Checkpoints
from utils.runs.opening import load_generator
from utils.runs.remote_run import MARKER, find_remote_run, is_run_file
from utils.runs.retention import Retention
from utils.storage import lease, remote, staging
from utils.storage.lease import Lease
from utils.storage.remote import RemoteError
from utils.training import build_run, make_config, train

pytestmark = pytest.mark.xdist_group("remote")

SETTINGS = {
    "dataset_name": "digits", "codec": "pixels", "model.patch_size": 4, "model.hidden_size": 8, "model.depth": 1,
    "model.num_heads": 1, "model.num_classes": 10, "model.dtype": "float32", "batch_size": 8, "max_steps": 60,
    "log_interval": 5, "save_interval": 20, "keep_last": 1, "eval_interval": 0, "wandb.mode": "disabled",
}  # fmt: skip


URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Gives this process the cache of a machine of its own, and of another one with each call."""
    number = iter(range(100))

    def change():
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine{next(number)}"))
        find_remote_run.cache_clear()

    change()
    yield change
    fsspec.filesystem("memory").store.clear()
    staging._outputs.clear()
    find_remote_run.cache_clear()


def fit(place, **settings):
    return train(build_run(make_config({**SETTINGS, "save_dir": str(place), **settings})))


def objects(url: str) -> dict[str, bytes]:
    """{name below the URL: content}."""
    return {file.url.removeprefix(f"{url}/"): remote.read_bytes(file.url) for file in remote.list_files(url)}


def words(place):
    """The flags of such a run."""
    return [word for name, value in SETTINGS.items() for word in (f"--{name}", value)] + ["--save_dir", place]


def arrays(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A local run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run_program("train_flow.py", *words(folder))
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(the changes that a run makes in storage, in order, each a URL and its content, None where an object is removed;
    the run's last parameters)."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("recorded")))
        find_remote_run.cache_clear()
        write, remove = remote.write_bytes, remote.remove

        def write_and_record(url, content, flag=None):
            write(url, content, flag)
            made.append((url, content))

        def remove_and_record(url):
            remove(url)
            made.append((url, None))

        patch.setattr(remote, "write_bytes", write_and_record)
        patch.setattr(remote, "remove", remove_and_record)
        params = arrays(fit("memory://bucket/run").params)
        find_remote_run.cache_clear()
    return made, params


@pytest.fixture(scope="module")
def changes(recorded):
    return recorded[0]


def state_after(changes) -> dict[str, bytes]:
    """The objects that there are after these changes."""
    state = {}
    for url, content in changes:
        if content is None:
            state.pop(url, None)
        else:
            state[url] = content
    return state


# --- Files ---


def test_objects_are_found_listed_and_read():
    for name in ("a/b", "a/c/d", "ab/c", "a/../c"):
        remote.write_bytes(f"memory://bucket/{name}", name.encode())
    assert remote.find_file("memory://bucket/a/b").size == 3
    assert remote.find_file("memory://bucket/a") is None
    assert remote.find_file("memory://bucket/x") is None
    # Of names that begin alike, those below alone, and none that leads out of a local folder.
    for url in ("memory://bucket/a", "memory://bucket/a/"):
        assert [file.url for file in remote.list_files(url)] == ["memory://bucket/a/b", "memory://bucket/a/c/d"]
    assert remote.list_files("memory://bucket/x") == []
    assert remote.match_files("memory://bucket/*/b") == ["memory://bucket/a/b"]
    assert remote.list_files("memory://bucket/a/b") == []  # an object, and none below it
    assert remote.read_bytes("memory://bucket/a/c/d", 2, 4) == b"c/"
    with pytest.raises(RemoteError, match=r"^memory://bucket/x: there is no such object; check the name$"):
        remote.read_bytes("memory://bucket/x")
    for _ in range(2):
        remote.remove("memory://bucket/a/b")
    assert remote.find_file("memory://bucket/a/b") is None


def test_an_object_is_fetched_once_and_anew_when_it_changes(monkeypatch):
    url = "memory://bucket/stats.npz"
    remote.write_bytes(url, b"first")
    path = remote.fetch(url)
    assert (path.name, path.read_bytes()) == ("stats.npz", b"first")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "download", None)
        assert remote.fetch(url) == path
    remote.write_bytes(url, b"other")
    assert remote.fetch(url).read_bytes() == b"other"
    assert not path.exists()
    with pytest.raises(
        RemoteError, match=r"^--fid_stats=memory://bucket/none: there is no such object; check the name"
    ):
        staging.local_copy("memory://bucket/none", "fid_stats")


def test_a_large_file_is_uploaded_in_parts_and_equal(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "LARGE", 10)
    (tmp_path / "x").write_bytes(bytes(range(100)))
    remote.upload(tmp_path / "x", "memory://bucket/x")
    assert remote.read_bytes("memory://bucket/x") == bytes(range(100))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("Install s3fs"), "the package s3fs is not installed; make setup EXTRAS=cloud"),
        (PermissionError("Access Denied"), "these credentials do not allow it; docs/storage.md says"),
        (OSError("Forbidden: b/o\nno"), "these credentials do not allow it"),
        (type("NoCredentialsError", (Exception,), {})("Unable to"), "no credentials were found; docs/storage.md says"),
        (type("EndpointConnectionError", (Exception,), {})("not\nthere"), "its storage cannot be reached .not there"),
        (TimeoutError(), "its storage cannot be reached .no answer within 10 seconds.; try again"),
        (remote.NoBucketError(), "there is no bucket b; check the name"),
        (ValueError("a\nb"), "its storage answered: a b"),
    ],
)
def test_answers_of_storage_are_one_line(monkeypatch, error, message):
    def refuse(bucket):
        raise error

    monkeypatch.setattr(remote, "_meet", refuse)
    with pytest.raises(RemoteError, match=f"^--save_dir=s3://b/run: {message}") as caught:
        remote.write_bytes("s3://b/run", b"", "save_dir")
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_uploaded_stays_here(monkeypatch):
    path = staging.stage_output("memory://bucket/results/x.npz", "out")
    path.write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "upload", lambda path, url, bar=None: (_ for _ in ()).throw(RemoteError(url, "no room")))
        with pytest.raises(UserError) as error:
            staging.upload_outputs(is_run_file)
    last = f"the local copy is whole and lies in {path.parent}; copy it there"
    assert str(error.value) == f"memory://bucket/results/x.npz could not be written (no room); {last}"
    assert with_urls(str(error.value)) == str(error.value)
    # Another time it works, and nothing is left here.
    assert staging.stage_output("memory://bucket/results/x.npz", "out") == path
    staging.upload_outputs(is_run_file)
    assert objects("memory://bucket") == {"results/x.npz": b"x"}
    assert not path.parent.exists()


# --- Runs ---


def test_a_run_in_storage_is_that_of_a_local_folder(changes, whole):
    start = "memory://bucket/run/"
    names = {url.removeprefix(start) for url in state_after(changes)}
    local = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    # Beside the local ones, what identifies the run; without locks. Some files have random names.
    random = {name for name in names | local if "/d/" in name or name.startswith("configs/")}
    assert names - random == {name for name in local - random if not name.startswith(".")} | {remote_run.IDENTITY}
    assert f"checkpoints/60/{MARKER}" in names


def test_whenever_it_is_killed_each_marked_checkpoint_is_whole_and_logged(changes):
    start = "memory://bucket/run/checkpoints/"
    final = {step: {url for url, _ in changes if url.startswith(f"{start}{step}/")} for step in (20, 40, 60)}
    assert all(len(urls) > 10 for urls in final.values())
    seen = set()
    for count in range(len(changes) + 1):
        state = state_after(changes[:count])
        marked = [step for step in final if f"{start}{step}/{MARKER}" in state]
        seen |= set(marked)
        assert not seen or marked, "no checkpoint is left"
        for step in marked:
            assert final[step] <= state.keys()
            lines = state["memory://bucket/run/metrics.jsonl"].decode().splitlines()
            assert step in [json.loads(line)["step"] for line in lines]
    assert marked == [60]  # --keep_last 1
    assert {url for url in state if url.startswith(start)} == final[60]
    assert f"memory://bucket/run/{lease.NAME}" not in state


def test_a_run_killed_elsewhere_is_continued_bit_for_bit(recorded, tmp_path):
    # As the process was killed while it uploaded its second checkpoint: everything but the marker is there.
    changes, params = recorded
    marker = f"{URL}/checkpoints/40/{MARKER}"
    cut = next(number for number, (url, content) in enumerate(changes) if url == marker and content is not None)
    for url, content in state_after(changes[:cut]).items():
        remote.write_bytes(url, content)
    # It has been silent for long, on another machine.
    silent = json.dumps({"id": "other", "machine": "other", "pid": 1, "time": 0.0}).encode()
    remote.write_bytes(f"{URL}/{lease.NAME}", silent)

    state = fit(URL)
    jax.tree.map(np.testing.assert_array_equal, arrays(state.params), params)
    logs = {tmp_path / "ours": remote.read_bytes(f"{URL}/metrics.jsonl"), tmp_path / "theirs": None}
    logs[tmp_path / "theirs"] = state_after(changes)[f"{URL}/metrics.jsonl"]
    for folder, content in logs.items():
        folder.mkdir()
        (folder / "metrics.jsonl").write_bytes(content)
    assert losses(tmp_path / "ours") == losses(tmp_path / "theirs")
    steps = {name.split("/")[1] for name in objects(URL) if name.startswith("checkpoints/")}
    assert steps == {"60"}


def save(checkpoints, *steps):
    """Saves checkpoints that hold a configuration alone."""
    for step in steps:
        checkpoints._save(step, {}, {"config": {"step": step}})
    checkpoints.wait()


def open_run(url=URL, keep_last=None):
    """A run in a process of its own, and its checkpoints, as a training has them."""
    find_remote_run.cache_clear()
    run = find_remote_run(url)
    run.pull_run("save_dir")
    checkpoints = Checkpoints(run.folder, keep_last, remote=run)
    run.keep = checkpoints.retention.kept
    return run, checkpoints


def read_config(checkpoints):
    """(step, configuration) of the newest checkpoint that is whole."""
    steps = checkpoints.steps()
    return checkpoints.restore_newest(lambda step: checkpoints._read(step, {}, ("config",))["config"], steps)


def test_what_was_saved_but_not_uploaded_is_uploaded_by_the_next_start(monkeypatch, capsys):
    upload = remote.upload

    def fail(path, url, flag=None, bar=None):
        if "/checkpoints/" in url:
            raise RemoteError(url, "its storage cannot be reached")
        upload(path, url, flag, bar)

    run, checkpoints = open_run()
    with monkeypatch.context() as patch:
        patch.setattr(remote, "upload", fail)
        with pytest.raises(UserError) as error, run.in_use("save_dir"):
            save(checkpoints, 1, 2)
    last = f"the local copy is whole and lies in {run.folder}; the same command uploads it"
    assert str(error.value) == f"{URL} could not be written (its storage cannot be reached); {last}"
    assert "the run goes on, and the next save uploads what is missing" in capsys.readouterr().out
    assert not [name for name in objects(URL) if name.endswith(f"/{MARKER}")]

    run, checkpoints = open_run()
    with run.in_use("save_dir"):
        assert read_config(checkpoints) == (2, {"step": 2})
    assert find_remote_run(URL).steps == {1, 2}


def test_a_save_waits_until_the_one_before_it_is_uploaded(monkeypatch):
    run, checkpoints = open_run(keep_last=1)
    is_reachable = threading.Event()
    push = run.push_run
    monkeypatch.setattr(run, "push_run", lambda: (is_reachable.wait(), push()))
    with run.in_use("save_dir"):
        save(checkpoints, 1)
        finish = in_background(lambda: save(checkpoints, 2))
        time.sleep(0.3)
        assert run.local_steps() == {1}
        is_reachable.set()
        finish()
    assert run.local_steps() == run.steps == {2}


def test_a_copy_of_what_is_no_longer_there_is_no_start(capsys):
    run, checkpoints = open_run()
    with run.in_use("save_dir"):
        save(checkpoints, 1)
    for file in remote.list_files(URL):
        remote.remove(file.url)
    run, checkpoints = open_run()
    assert (
        f"{URL} is not the run of which this machine has a copy: that is in {run.folder}.old1"
        in capsys.readouterr().out
    )
    assert checkpoints.steps() == []
    assert (run.folder.with_name(f"{run.folder.name}.old1") / "checkpoints" / "1").is_dir()


@pytest.mark.parametrize("last", [4, 9])
def test_another_machine_takes_over_and_the_first_returns(machine, monkeypatch, last):
    monkeypatch.setattr(lease, "PATIENCE", 0.0)
    run, checkpoints = open_run(keep_last=2)
    with run.in_use("save_dir"):
        save(checkpoints, 1, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(run, "push_run", lambda: None)  # killed before it has uploaded
        save(checkpoints, last)
        checkpoints.wait()
        run.wait()
    first = run.folder
    machine()
    run, checkpoints = open_run(keep_last=2)
    assert run.local_steps() == {3}  # what is needed
    assert checkpoints.steps() == [3, 2]
    with run.in_use("save_dir"):
        save(checkpoints, 5, 6)
    assert run.steps == {5, 6}
    # What the first has saved last is of a run that has gone another way.
    (first / "config.json").write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(first.parents[3]))
    run, checkpoints = open_run(keep_last=2)
    with run.in_use("save_dir"):
        assert run.folder == first
        assert Checkpoints(run.folder, remote=run).steps() == [6, 5]
    assert {name.split("/")[1] for name in objects(URL) if name.startswith("checkpoints/")} == {"5", "6"}


def test_a_folder_copied_by_hand_is_a_run(whole, machine):
    for path in whole.rglob("*"):
        if path.is_file():
            remote.upload(path, f"{URL}/{path.relative_to(whole).as_posix()}")
    generator = load_generator(f"{URL}/checkpoints/60", params="raw")
    jax.tree.map(np.testing.assert_array_equal, generator.params, load_generator(whole, params="raw").params)
    with pytest.raises(UserError, match=r"--load_dir=memory://bucket/run/checkpoints/4 holds no such .*found steps 60"):
        load_generator(f"{URL}/checkpoints/4")
    machine()
    # It goes on under its own configuration, and is marked from then on.
    assert make_config({"save_dir": URL}).training.batch_size == SETTINGS["batch_size"]
    run, checkpoints = open_run()
    with run.in_use("save_dir"):
        save(checkpoints, 80)
    assert run.steps == {60, 80}
    assert f"checkpoints/60/{MARKER}" in objects(URL)


def test_a_damaged_checkpoint_in_storage_is_passed_over(machine, capsys):
    run, checkpoints = open_run()
    with run.in_use("save_dir"):
        save(checkpoints, 1, 2)
    name = "checkpoints/2/config/metadata"
    remote.write_bytes(f"{URL}/{name}", b'{"step": 3}')
    machine()
    run, checkpoints = open_run()
    assert read_config(checkpoints) == (1, {"step": 1})
    assert "is damaged: config is not what was written; going back to the one before it" in capsys.readouterr().out
    checkpoints.set_aside(2)
    with run.in_use("save_dir"):
        save(checkpoints, 2)
    assert json.loads(objects(URL)[name]) == {"step": 2}
    assert f"checkpoints/2/{MARKER}" in objects(URL)


def test_the_rules_of_storage_are_those_of_the_folder(tmp_path):
    best = type("Best", (), {"find": lambda self, steps: {3: 0.5} if 3 in steps else {}})()
    assert Retention().kept([5, 1, 3]) == {1, 3, 5}
    assert Retention(2).kept([5, 1, 3, 4]) == {4, 5}
    assert Retention(1, 4, best).kept(range(1, 8)) == {3, 4, 7}
    checkpoints = Checkpoints(tmp_path, 1, 2)
    for step in range(5):
        checkpoints._save(step, {}, {"config": {}})
        checkpoints.wait()
    assert set(checkpoints.steps()) == Retention(1, 2).kept(range(5))
    checkpoints.close()


# --- The lease ---


def test_a_holder_that_is_alive_keeps_others_away(monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL", 0.02)
    monkeypatch.setattr(lease, "PATIENCE", 5.0)
    first = Lease("memory://bucket/run")
    first.acquire("save_dir")
    with pytest.raises(
        UserError, match=r"--save_dir=memory://bucket/run is in use by process \d+ on .*; wait for it or"
    ):
        Lease("memory://bucket/run").acquire("save_dir")
    first.release()
    second = Lease("memory://bucket/run")
    second.acquire("save_dir")
    assert first.problem is None
    second.release()
    assert remote.find_file(f"memory://bucket/run/{lease.NAME}") is None


def test_one_that_is_silent_is_replaced_and_notices(monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL", 0.3)
    first = Lease("memory://bucket/run")
    first.acquire("save_dir")
    monkeypatch.setattr(lease, "PATIENCE", 0.05)
    second = Lease("memory://bucket/run")
    second.acquire("save_dir")  # before the first gives a sign
    deadline = time.monotonic() + 10
    while first.problem is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run = find_remote_run("memory://bucket/run")
    run.lease = first
    with pytest.raises(UserError, match=r"memory://bucket/run has been taken over by process .*; this process stops"):
        run.push_run()
    first.release()
    assert remote.find_file(f"memory://bucket/run/{lease.NAME}") is not None  # that of the second
    second.release()


# --- Programs ---


def run(read_flags, program, *words):
    """Runs a program in this process, to the upload of its outputs."""
    program.main(read_flags(program, list(map(str, words))))
    staging.upload_outputs(is_run_file)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def s3(monkeypatch):
    """A fake of S3 with a bucket; the environment that leads there."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    remote.filesystem("s3").mkdir("bucket")
    yield environment
    forget_clients()
    server.stop()


def forget_clients():
    remote.filesystem.cache_clear()
    remote._meet.cache_clear()


def test_a_run_on_s3_is_killed_continued_sampled_and_scored(s3, whole, tmp_path, machine, read_flags, capsys):
    # Killed when it has uploaded its first checkpoint.
    url = "s3://bucket/runs/a"
    process = start(*words(url), env={**s3, "XDG_CACHE_HOME": str(tmp_path / "killed")})
    deadline = time.monotonic() + 120
    while remote.find_file(f"{url}/checkpoints/20/{MARKER}") is None:
        assert process.poll() is None, process.outputs()[0][-3000:]
        assert time.monotonic() < deadline
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert remote.find_file(f"{url}/checkpoints/60/{MARKER}") is None

    # On another machine, at once: the holder of the lease was a process of this one, which is gone.
    done = run_program("train_flow.py", *words(url), env={**s3, "XDG_CACHE_HOME": str(tmp_path / "other")})
    assert re.search(r"resuming s3://bucket/runs/a from step [24]0\n", done.stdout)
    remote.download(f"{url}/metrics.jsonl", tmp_path / "metrics.jsonl")
    assert losses(tmp_path) == losses(whole)
    params = [load_generator(place, params="raw").params for place in (url, whole)]
    jax.tree.map(np.testing.assert_array_equal, *params)

    # Sampled and scored on a third one, and once more on a fourth, where the row is found again.
    machine()
    run(read_flags, compute_fid_stats, "--dataset_name", "digits", "--metrics", "moments", "--out", "s3://bucket/s.npz")
    drawn = ["--load_dir", url, "--denoise_timesteps", 1, "--cfg_scale", 1, "--params", "raw"]
    run(read_flags, sample, *drawn, "--num_samples", 2, "--save_samples", "s3://bucket/two.npz")
    assert f"{url}/samples/grid.png\ns3://bucket/two.npz" in capsys.readouterr().out
    scored = [*drawn, "--fid_stats", "s3://bucket/s.npz", "--metrics", "moments", "--num_samples", 4]
    for is_new in (True, False):
        run(read_flags, eval_fid, *scored, "--out", "s3://bucket/scores", "--wandb.mode", "disabled")
        assert ("computing the distances" in capsys.readouterr().err) is is_new
        machine()
    found = objects("s3://bucket")
    assert found["runs/a/samples/grid.png"].startswith(b"\x89PNG")
    assert len(np.load(io.BytesIO(found["two.npz"]))["arr_0"]) == 2
    run(read_flags, plot_metrics, "--runs", url, "--metrics", "training/l2_loss", "--table")
    assert re.search(r"^\| a ", capsys.readouterr().out, re.MULTILINE)
    # A report fetches pictures, too, and what it writes there is uploaded.
    remote.write_bytes(f"{url}/images/p/00000001.png", found["runs/a/samples/grid.png"])
    run(read_flags, report, "--runs", url, "--out", "s3://bucket/report.html")
    (tmp_path / "report.html").write_bytes(objects("s3://bucket")["report.html"])
    (shown,) = read_page(tmp_path / "report.html")["runs"]
    assert (shown["name"], [step for step, _ in shown["panels"]["p"]]) == ("a", [1])
    (row,) = json.loads(found["scores/fid.json"])["cells"]
    assert (row["fid_stats"], row["checkpoint"]) == ("s3://bucket/s.npz", url)


@pytest.fixture
def gcs(monkeypatch):
    """A fake of GCS with a bucket."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    forget_clients()
    yield
    forget_clients()
    server.stop()


def test_gcs_holds_files_and_checkpoints(gcs, machine, monkeypatch, tmp_path):
    url = "gs://bucket/runs/a"
    run, checkpoints = open_run(url, keep_last=1)
    with run.in_use("save_dir"):
        (run.folder / "config.json").write_text("{}")
        save(checkpoints, 1, 2)
    machine()
    run, checkpoints = open_run(url)
    assert (run.folder / "config.json").read_text() == "{}"
    assert read_config(checkpoints) == (2, {"step": 2})
    assert checkpoints.steps() == [2]
    # Files in parts, absent ones, and a bucket that is not there.
    monkeypatch.setattr(remote, "LARGE", 10)
    (tmp_path / "x").write_bytes(bytes(1000))
    remote.upload(tmp_path / "x", "gs://bucket/x")
    assert remote.fetch("gs://bucket/x").read_bytes() == bytes(1000)
    assert remote.find_file("gs://bucket/y") is None
    with pytest.raises(RemoteError, match=r"^--out=gs://other/x: there is no bucket other; check the name$"):
        remote.check_writable("gs://other/x", "out")
