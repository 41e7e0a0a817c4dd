"""The programs as a user runs them: subprocesses on real digits, killed, continued, on one device and eight."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval_fid
from tests.conftest import ROOT, run_program
from tests.runs import SCALARS, assert_close, kill_and_continue, losses, start, wait_for_step
from utils.base.messages import WriteError
from utils.base.processes import END_SIGNALS, KEYBOARD_SIGNALS
from utils.images.samples import SampleWriter
from utils.metrics.extractors import POOL, SPATIAL
from utils.metrics.reference import load_statistics
from utils.metrics.scores import frechet_distance
from utils.runs import run_evaluation, scoring
from utils.trackers.trackers import read_metrics

TINY = """
    --dataset_name digits --use_stable_vae 0 --model.hidden_size 32 --model.depth 1 --model.num_heads 2
    --model.patch_size 2 --model.num_classes 10 --model.denoise_timesteps 8 --batch_size 64 --model.lr 1e-3
""".split()  # noqa: SIM905 (a command line, as one types it)
STEPS = {1: 60, 8: 12}  # by devices: eight virtual ones are slow, one is too fast to be killed in 12 steps
# In float32, so that one device and eight, say, differ by rounding that is small enough to tell from a fault.
SHORT = [*TINY, "--model.dtype", "float32", "--log_interval", "1", "--save_interval", "4", "--eval_interval", "0"]
SHORT += ["--wandb.mode", "disabled"]
NO_SAVES = ["--save_interval", "1000"]  # but that at the end


# Tests that share a run stay on one worker, so that it is made once.
eight_devices = pytest.mark.xdist_group("eight devices")
one_device = pytest.mark.xdist_group("one device")
finished_run = pytest.mark.xdist_group("finished run")


def two_processes() -> list:
    """The options of both, up to the number of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return ["--coordinator_address", address, "--num_processes", 2, "--process_id"]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """{devices: folder} of runs of SHORT that nothing disturbed."""
    folders = {}

    def run(devices: int):
        if devices not in folders:
            folders[devices] = tmp_path_factory.mktemp(f"devices{devices}")
            args = [*SHORT, *NO_SAVES, "--max_steps", STEPS[devices], "--save_dir", folders[devices]]
            run_program("train_flow.py", *args, devices=devices)
        return folders[devices]

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, weights):
    """(folder, output) of a run with every picture and a FID, on wandb offline."""
    folder = tmp_path_factory.mktemp("finished")
    done = run_program(
        "train_flow.py", *TINY, "--max_steps", 20, "--log_interval", 10, "--eval_interval", 50,
        "--wandb.mode", "offline", "--save_dir", folder,
        "--fid_stats", ROOT / "data" / "fid_stats_digits.npz", "--fid_samples", 16, "--inception_weights", weights,
        "--profile", folder / "profile", "--peak_tflops", 1,
    )  # fmt: skip
    return folder, done.stdout + done.stderr


@finished_run
def test_every_metric_and_picture_of_the_recipe_is_there(finished):
    folder, _ = finished
    scalars = [f"{split}/{name}" for split in ("training", "validation") for name in SCALARS]
    times = [*(f"{i / 10:.1f}" for i in range(11)), "mean"]
    scalars += [f"{split}_loss_t/{t}" for split in ("training", "validation") for t in times] + ["fid"]
    scalars += [f"training/{name}" for name in ("images_per_second", "tflops_per_second", "mfu", "data_wait_fraction")]
    images = ["reconstruction_n", *(f"sample_cfg_{s}" for s in ("0", "0.1", "1", "4", "10"))]
    images += [f"sample_N/{n}" for n in (1, 4, 32)] + ["sample_raw_cfg_4"]  # the EMA is mostly initial parameters
    lines = read_metrics(folder / "metrics.jsonl")
    logged = {name for line in lines for name in line}
    assert set(scalars) <= logged
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert [line["step"] for line in lines if "training/l2_loss" in line] == [1, 10, 20]
    for name in images:
        assert (folder / "images" / name.replace("/", "_") / "00000020.png").stat().st_size > 2000
    (run_file,) = [path for path in (folder / "wandb").rglob("*.wandb") if not path.parent.is_symlink()]
    content = run_file.read_bytes()
    assert [name for name in scalars + images if name.encode() not in content] == []
    by_time = [line for line in lines if "training_loss_t/0.0" in line][-1]
    mean = np.mean([by_time[f"training_loss_t/{i / 10:.1f}"] for i in range(1, 10)])
    assert by_time["training_loss_t/mean"] == pytest.approx(mean)


@finished_run
def test_the_run_says_what_it_does(finished):
    folder, output = finished
    assert "data: digits, 1,500 images to train on and 297 held out, 8x8x1, 10 classes, 23.4 steps per epoch" in output
    assert "the EMA, of which 100% is initial parameters at the first evaluation (step 20)" in output
    assert re.search(r"[\d,]+ parameters, [\d.,]+ GFLOP per step", output)
    rates = r"loss \d\.\d+, [\d,.]+ images/s, .* TFLOP/s \(\d+% MFU\), \d+% waiting for data"
    assert re.search(r"20/20 .*s(tep)?/s(tep)?, " + rates, output)
    stages = "".join(rf"{name} [\d.]+,? ?" for name in ("imports", "data", "model", "compilation", "first step"))
    assert re.search(rf"the first step ended after [\d.]+ s: {stages}", output)
    assert re.search(r"compiled in [\d.]+ s; it needs [\d.]+ MiB of [\d.]+ GiB per device", output)
    assert re.search(r"settings: .*--batch_size=64 .*--model.hidden_size=32 .*all are in .*config.json", output)
    assert "--model.beta1" not in output
    assert f"done: images, metrics.jsonl and checkpoints are in {folder}" in output
    assert re.search(r"wandb sync .*/wandb/offline-run-", output)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["model"]["hidden_size"] == 32
    recorded = {"name": "digits", "image_shape": [8, 8, 1], "class_names": list("0123456789")}
    recorded |= {"vae": None, "vae_sha256": None, "codec": {"name": "pixels", "source": None, "sha256": None}}
    assert recorded.items() <= saved["dataset"].items()
    train, validation = (saved["dataset"]["splits"][split] for split in ("train", "validation"))
    assert (train["format"], train["num_examples"], validation["num_examples"]) == ("arrays", 1500, 297)
    (start,) = (folder / "configs").iterdir()
    assert json.loads(start.read_text()) == saved


@finished_run
def test_the_trace_is_one_that_perfetto_and_xprof_read(finished):
    (folder,) = (finished[0] / "profile" / "plugins" / "profile").iterdir()
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert any("train_step" in name for name in names)
    assert list(folder.glob("*.xplane.pb"))


@finished_run
def test_the_same_command_again_has_nothing_to_do(finished):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    done = run_program("train_flow.py", *TINY, "--max_steps", 20, "--wandb.mode", "offline", "--save_dir", folder)
    assert "nothing to do" in done.stdout
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    "devices", [pytest.param(1, marks=one_device), pytest.param(8, marks=[eight_devices, pytest.mark.slow])]
)
def test_killed_and_started_again_equals_uninterrupted(uninterrupted, tmp_path, devices):
    step = random.randint(5, STEPS[devices] * 2 // 3)
    kill_and_continue(tmp_path, step, *SHORT, "--max_steps", STEPS[devices], devices=devices)
    expected = losses(uninterrupted(devices))
    assert list(expected) == list(range(1, STEPS[devices] + 1))
    assert losses(tmp_path) == expected  # bit for bit


@pytest.mark.slow
@eight_devices
@pytest.mark.parametrize("options", ["", "--sharding fsdp --grad_accum 4 --remat blocks", "--sharding zero"])
def test_eight_devices_give_the_losses_of_one(uninterrupted, tmp_path, options):
    if options:
        args = [*SHORT, *NO_SAVES, "--max_steps", STEPS[8], *options.split(), "--save_dir", tmp_path]
        run_program("train_flow.py", *args, devices=8)
    folder = tmp_path if options else uninterrupted(8)
    assert_close(losses(folder), losses(uninterrupted(1)), STEPS[8])


@one_device
def test_every_sharding_goes_on_with_the_state_of_another(uninterrupted, tmp_path):
    for number, mode in enumerate(("fsdp", "hybrid --num_shards 2", "zero", "dp"), 1):
        args = [*SHORT, *NO_SAVES, "--max_steps", 3 * number, "--sharding", *mode.split(), "--save_dir", tmp_path]
        done = run_program("train_flow.py", *args, devices=4)
        assert (", hybrid (2 x 2 shards), " in done.stdout + done.stderr) == ("hybrid" in mode)
    assert_close(losses(tmp_path), losses(uninterrupted(1)), 12)


@pytest.mark.slow
@one_device
def test_what_saves_memory_changes_no_loss(uninterrupted, tmp_path):
    options = ["--remat", "dots", "--grad_accum", 4]
    run_program("train_flow.py", *SHORT, *NO_SAVES, "--max_steps", 12, *options, "--save_dir", tmp_path)
    assert_close(losses(tmp_path), losses(uninterrupted(1)), 12)


@one_device
def test_two_processes_give_the_losses_of_one_and_obey_a_signal_to_either(uninterrupted, tmp_path):
    """As two tasks of srun on this host; JAX gives each the device of its number, of which CPUs have one."""
    args = [*SHORT, "--max_steps", 100_000, "--save_interval", 100_000, "--save_dir", tmp_path]
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    step["JAX_COORDINATOR_PORT"] = two_processes()[1].partition(":")[2]
    tasks = [{**step, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(2)]
    processes = [start(*args, "--coordinator_address", "auto", env=task) for task in tasks]
    wait_for_step(processes[0], tmp_path, 12)
    processes[random.randrange(2)].send_signal(random.choice([*END_SIGNALS, *KEYBOARD_SIGNALS]))
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs[0][-2000:] + outputs[1][-2000:]
    assert "\n2 processes on 1 host, 2 x cpu, 1 in each process\ndata: " in outputs[0]
    assert "parameters" in outputs[0]
    assert not re.search("parameters|processes", outputs[1])  # process 0 speaks for both
    (step,) = re.findall(r"stopped at step (\d+) and saved", outputs[0])
    assert os.listdir(tmp_path / "checkpoints") == [step]
    logged = losses(tmp_path)
    assert_close({step: logged[step] for step in range(1, 13)}, losses(uninterrupted(1)), 12)


@pytest.mark.slow
@one_device
def test_two_processes_killed_in_one_sharding_go_on_in_another(uninterrupted, tmp_path):
    """With four devices each, killed in every sharding; then dp on eight devices of one process."""
    for mode in ("fsdp", "hybrid --num_shards 4", "zero"):
        args = [*SHORT, "--max_steps", 100_000, "--sharding", *mode.split(), "--save_interval", 3]
        args += ["--save_dir", tmp_path, *two_processes()]
        processes = [start(*args, each, devices=4) for each in range(2)]
        wait_for_step(processes[0], tmp_path, max(losses(tmp_path), default=0) + 4)
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    last = max(losses(tmp_path)) + 4
    run_program("train_flow.py", *SHORT, *NO_SAVES, "--max_steps", last, "--save_dir", tmp_path, devices=8)
    assert_close(losses(tmp_path), losses(uninterrupted(1)), last)


@pytest.mark.slow
def test_one_of_two_processes_that_is_killed_ends_the_other_with_one_line(tmp_path):
    args = [*SHORT, "--max_steps", 100_000, "--save_dir", tmp_path, *two_processes()]
    processes = [start(*args, number) for number in range(2)]
    wait_for_step(processes[0], tmp_path, 5)
    processes[1].kill()
    output, _ = processes[0].communicate(timeout=60)
    processes[1].wait()
    assert processes[0].returncode == 1
    assert "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "process 0 of the run has lost another one" in error


@pytest.mark.slow
def test_a_streamed_run_continues_as_if_it_had_not_stopped(shared, tmp_path):
    args = [*SHORT, "--dataset_name", "cifar10", "--data_dir", shared / "data" / "tfds", "--model.patch_size", 4]
    args += ["--max_steps", 6, "--save_interval", 3, "--save_dir"]
    run_program("train_flow.py", *args, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "back")
    shutil.rmtree(tmp_path / "back" / "checkpoints" / "6")
    done = run_program("train_flow.py", *args, tmp_path / "back")
    assert "from step 3" in done.stdout
    assert losses(tmp_path / "back") == losses(tmp_path / "whole")
    assert list(losses(tmp_path / "whole")) == [1, 2, 3, 4, 5, 6]


def test_divergence_ends_the_run_with_a_way_on(tmp_path):
    done = run_program("train_flow.py", *SHORT, "--model.lr", "1e30", "--save_dir", tmp_path, check=False)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "no longer finite" in error
    assert "--model.lr" in error
    assert "Traceback" not in done.stderr


def test_updates_that_are_not_finite_are_left_out_until_there_are_too_many(tmp_path):
    words = ["--model.lr", "1e30", "--skip_nonfinite", 3, "--log_interval", 1]
    done = run_program("train_flow.py", *SHORT, *words, "--save_dir", tmp_path, check=False)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "--skip_nonfinite=3: the last 3 updates were not finite; at step 3 the loss is " in error
    assert re.search(r"the largest gradient that of [\w/]+ \(norm ", error)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["training/skipped_updates"] for line in lines] == [1, 2]
    assert len({line["training/param_norm"] for line in lines}) == 1  # nothing has changed


@one_device
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGHUP,
        *(pytest.param(number, marks=pytest.mark.slow) for number in (*END_SIGNALS[2:], *KEYBOARD_SIGNALS)),
    ],
)
def test_signals_save_and_exit_cleanly(uninterrupted, tmp_path, number):
    process = start(*SHORT, "--max_steps", 100_000, "--save_interval", 100_000, "--save_dir", tmp_path)
    wait_for_step(process, tmp_path, 4)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    (step,) = re.findall(r"stopped at step (\d+) and saved", output)
    assert os.listdir(tmp_path / "checkpoints") == [step]
    expected = losses(uninterrupted(1))
    assert {k: v for k, v in losses(tmp_path).items() if k in expected} == {
        k: expected[k] for k in expected if k <= int(step)
    }


@pytest.mark.slow
@finished_run
def test_load_dir_starts_from_another_runs_parameters(finished, tmp_path):
    folder, _ = finished
    args = [*TINY, "--max_steps", 2, "--log_interval", 1, "--wandb.mode", "disabled", "--save_dir", tmp_path]
    done = run_program("train_flow.py", *args, "--load_dir", folder)
    assert f"starting from {folder}, step 20: " in done.stdout
    param_norm = SCALARS.index("param_norm")
    assert losses(tmp_path)[1][param_norm] == pytest.approx(losses(folder)[20][param_norm], rel=1e-3)


@pytest.mark.slow
def test_overfitting_one_batch(tmp_path):
    args = [*SHORT, *NO_SAVES, "--debug_overfit", 1, "--batch_size", 8, "--max_steps", 60, "--model.lr", "3e-3"]
    run_program("train_flow.py", *args, "--save_dir", tmp_path)
    values = [line[0] for line in losses(tmp_path).values()]
    assert np.mean(values[-10:]) < 0.8 * np.mean(values[:10])


REFUSED = {
    "unknown data set": (["--dataset_name", "digit"], ["--dataset_name=digit", "digits"]),
    "data set not there": (
        ["--dataset_name", "imagenet256"],
        ["--dataset_name=imagenet256", "download_and_prepare", "make demo"],
    ),
    "unknown flag": (["--model.depht", "3"], ["model.depht", "model.depth"]),
    "batch size": (["--batch_size", "10"], ["--batch_size=10", "4 devices", "multiple of 4"]),
    "patch size": (["--model.patch_size", "3"], ["--model.patch_size=3", "8x8", "1, 2, 4, 8"]),
    "heads": (["--model.num_heads", "5"], ["--model.num_heads=5", "--model.hidden_size=32"]),
    "too few classes": (["--model.num_classes", "5"], ["--model.num_classes=5", "10"]),
    "no statistics": (
        ["--eval_interval", "4", "--fid_stats", "none.npz"],
        ["--fid_stats=none.npz", "compute_fid_stats.py"],
    ),
    "statistics of the wrong shape": (
        ["--eval_interval", "4", "--fid_stats", "WRONG"],
        ["--fid_stats=", "2048", "compute_fid_stats.py"],
    ),
    "corrupted weights": (
        ["--eval_interval", "4", "--fid_stats", "data/fid_stats_digits.npz", "--inception_weights", "LICENSE"],
        ["LICENSE has sha256", "--inception_weights"],
    ),
    "no run to load": (["--load_dir", "no/run"], ["--load_dir=no/run", "no checkpoint"]),
    "folder": (["--save_dir", "README.md/run"], ["--save_dir=README.md/run", "cannot be written"]),
    "VAE of grey images": (["--use_stable_vae", "1"], ["--codec=kl", "the images are grey", "--codec pixels"]),
    "processes": (["--num_processes", "2"], ["--coordinator_address"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_refused_in_one_line_before_compilation(case, tmp_path):
    args, words = REFUSED[case]
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(64), sigma=np.eye(64))
    args = [tmp_path / "wrong.npz" if arg == "WRONG" else arg for arg in args]
    folder = [] if case == "folder" else ["--save_dir", tmp_path / "run"]
    done = run_program("train_flow.py", *SHORT, *folder, *args, devices=4, check=False)
    assert_refused(done, words)


def assert_refused(done, words) -> None:
    assert done.returncode == 1, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in errors[0]] == [], errors[0]
    assert "compiling" not in done.stdout


def rows(folder) -> dict[tuple, dict]:
    """{(steps, guidance): row} of a fid.json."""
    found = json.loads((folder / "fid.json").read_text())["cells"]
    return {(row["num_steps"], row["cfg_scale"]): row for row in found}


@pytest.mark.slow
@finished_run
def test_a_sweep_of_a_run_and_its_samples_scored_again(finished, weights, read_flags, tmp_path, capsys):
    folder, _ = finished
    common = ["--num_samples", 7, "--batch_size", 8, "--wandb.mode", "disabled", "--inception_weights", weights]

    def evaluate(*words) -> str:
        """Returns the output of the program; in this process, which compiles the Inception network once."""
        capsys.readouterr()
        eval_fid.main(read_flags(eval_fid, [str(word) for word in (*common, *words)]))
        return capsys.readouterr().out

    sweep = ["--load_dir", folder, "--denoise_timesteps", 2, "--cfg_scale", "4,1", "--out", tmp_path / "sweep"]
    printed = evaluate(*sweep)
    found = rows(tmp_path / "sweep")
    assert list(found) == [(2, 4), (2, None)]
    recorded = {"num_samples": 7, "seed": 0, "checkpoint_step": 20, "labels": "uniform", "solver": "euler"}
    assert all(recorded.items() <= row.items() and len(row["fid_stats_sha256"]) == 64 for row in found.values())
    assert f"| 2 | 4 | 7 | {found[2, 4]['fid']:.3f} |" in printed
    assert f"| 2 | none | 7 | {found[2, None]['fid']:.3f} |" in printed
    assert all(row["fid"] > 1 for row in found.values())
    names = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert {"fid.csv", "fid.png", "samples_2_4.png", "samples_2_none.png"} <= names
    assert len((tmp_path / "sweep" / "fid.csv").read_text().splitlines()) == 3

    # The last row by itself is the sweep's; its samples score the same from a file and as PNGs.
    common += ["--out", tmp_path / "single"]

    def score(*words) -> dict:
        evaluate(*words)
        return json.loads((tmp_path / "single" / "fid.json").read_text())["cells"][-1]

    single = ["--load_dir", folder, "--denoise_timesteps", 2, "--use_cfg", 0]
    alone = score(*single, "--save_samples", tmp_path / "samples.npz")["fid"]
    assert alone == pytest.approx(found[2, None]["fid"], rel=1e-3)
    samples = np.load(tmp_path / "samples.npz")
    assert (samples["arr_0"].shape, samples["arr_0"].dtype, samples["arr_1"].shape) == ((7, 8, 8, 1), np.uint8, (7,))
    with SampleWriter(tmp_path / "pngs", 7) as writer:
        writer.write(samples["arr_0"], samples["arr_1"])
    of_file = score("--samples", tmp_path / "samples.npz", "--fid_stats", "data/fid_stats_digits.npz")
    assert of_file["fid"] == pytest.approx(alone, rel=1e-4)
    # The reference may be images: here the samples themselves.
    of_pngs = score("--samples", tmp_path / "pngs", "--fid_stats", tmp_path / "samples.npz")
    assert of_pngs["fid"] == pytest.approx(0, abs=1e-3)
    assert (of_pngs["precision"], of_pngs["recall"], of_pngs["coverage"]) == (1, 1, 1)


def features_of_pixels(images) -> dict[str, jax.Array]:
    """In place of Inception's: pool (b, 2048) and spatial (b, 2023), mostly zeros."""
    pixels = jnp.asarray(images[:, :8, :8, 0], jnp.float32).reshape(len(images), -1)
    return {name: jnp.pad(pixels, ((0, 0), (0, size - 64))) for name, size in (("pool", 2048), ("spatial", 2023))}


@finished_run
def test_an_interrupted_sweep_does_not_score_a_row_twice(finished, read_flags, tmp_path, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.setattr(scoring, "load_extractors", lambda *names, **options: {"inception": features_of_pixels})
    monkeypatch.setattr(scoring, "compute_metrics", lambda samples, *_: {"fid": float(samples[POOL].mu.sum())})
    words = ["--load_dir", str(folder), "--num_samples", "8", "--batch_size", "8", "--wandb.mode", "disabled"]
    words += ["--denoise_timesteps", "3,2,1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        evaluate = run_evaluation.RunEvaluation.evaluate
        patch.setattr(run_evaluation.RunEvaluation, "evaluate", stop_at_second(evaluate))
        with pytest.raises(KeyboardInterrupt):
            eval_fid.main(read_flags(eval_fid, words))
    before = rows(tmp_path)
    assert list(before) == [(3, 4)]
    stamp = (tmp_path / "samples_3_4.png").stat().st_mtime_ns
    eval_fid.main(read_flags(eval_fid, words))
    after = rows(tmp_path)
    assert list(after) == [(3, 4), (2, 4), (1, 4)]
    assert after[3, 4] == before[3, 4]
    assert (tmp_path / "samples_3_4.png").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out.count("| 4 | 8 |") == 3


@finished_run
@pytest.mark.parametrize("limit", [4000, 100], ids=["samples and grid", "fid.json too"])
def test_scores_are_printed_before_a_full_disk_ends_an_evaluation(
    finished, read_flags, tmp_path, monkeypatch, capsys, full_disk, limit
):
    folder, _ = finished
    monkeypatch.setattr(scoring, "load_extractors", lambda *names, **options: {"inception": features_of_pixels})
    monkeypatch.setattr(scoring, "compute_metrics", lambda samples, *_: {"fid": float(samples[POOL].mu.sum())})
    measure = run_evaluation.measure_images

    def fill_disk(*arguments):
        full_disk(limit)
        measure(*arguments)

    monkeypatch.setattr(run_evaluation, "measure_images", fill_disk)
    words = ["--load_dir", str(folder), "--num_samples", "64", "--batch_size", "32", "--wandb.mode", "disabled"]
    words += ["--denoise_timesteps", "1", "--out", str(tmp_path / "out"), "--save_samples", str(tmp_path / "s.npz")]
    with pytest.raises(WriteError, match=r"s\.npz could not be written \(File too large\); the scores are above; "):
        eval_fid.main(read_flags(eval_fid, words))
    assert "| 1 | 4 | 64 |" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()} - {".fid.json.lock"}
    assert names == ({"fid.json", "fid.csv"} if limit == 4000 else set())


def stop_at_second(evaluate):
    calls = []

    def evaluate_once(self, sampler):
        calls.append(sampler)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(self, sampler)

    return evaluate_once


@pytest.mark.slow
def test_shipped_statistics_are_made_again(weights, tmp_path):
    args = ["--dataset_name", "digits", "--out", tmp_path / "stats.npz", "--batch_size", 25, "--compact", 1]
    run_program("compute_fid_stats.py", *args)
    made = load_statistics(tmp_path / "stats.npz")
    shipped = load_statistics(ROOT / "data" / "fid_stats_digits.npz")
    pool, shipped_pool = made[POOL], shipped[POOL]
    np.testing.assert_allclose(pool.mu, shipped_pool.mu, atol=1e-4)
    np.testing.assert_allclose(pool.sigma, shipped_pool.sigma, atol=1e-4)
    np.testing.assert_allclose(pool.rows, shipped_pool.rows, atol=1e-2)
    np.testing.assert_allclose(made[SPATIAL].mu, shipped[SPATIAL].mu, atol=1e-4)
    assert frechet_distance(pool.mu, pool.sigma, shipped_pool.mu, shipped_pool.sigma) < 1e-2
    recorded = ("num_images", "convention", "dataset")
    assert [getattr(made, name) for name in recorded] == [getattr(shipped, name) for name in recorded]


@finished_run
def test_evaluation_refuses_wrong_input(finished, weights, tmp_path):
    folder, _ = finished
    bad_statistics, bad_weights, broken = tmp_path / "bad.npz", tmp_path / "bad.pt", tmp_path / "broken"
    np.savez(bad_statistics, mu=np.zeros(64), sigma=np.eye(64))
    with np.load(ROOT / "data" / "fid_stats_digits.npz") as shipped:
        without_counts = tmp_path / "without_counts.npz"
        np.savez(without_counts, features=shipped["features"], num_images=1500, convention="adm")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    bad_weights.write_bytes(content)
    shutil.copytree(folder / "checkpoints", broken / "checkpoints")
    for path in (broken / "checkpoints" / "20" / "ema_params").rglob("*"):
        if path.is_file() and "d" in path.parts[-2:]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    cases = [
        (["--load_dir", tmp_path], ["--load_dir", "no checkpoint"]),
        (["--load_dir", broken], [str(broken / "checkpoints" / "20"), "is damaged"]),
        (["--load_dir", folder, "--fid_stats", bad_statistics], ["--fid_stats", "2048", "compute_fid_stats.py"]),
        (["--load_dir", folder, "--inception_weights", bad_weights], [str(bad_weights), "sha256"]),
        (["--load_dir", folder, "--model.depth", 7], ["--model.depth=7", "leave the flag out"]),
        (["--load_dir", folder, "--batch_size", 0], ["--batch_size=0"]),
        ([], ["--load_dir", "--samples"]),
        (
            ["--load_dir", folder, "--labels", "dataset", "--fid_stats", without_counts],
            ["--labels=dataset", "compute_fid_stats.py"],
        ),
        (["--samples", "none.npz", "--fid_stats", "data/fid_stats_digits.npz"], ["--samples=none.npz"]),
        (["--samples", bad_statistics], ["--samples=", "float64", "uint8"]),
        (["--load_dir", folder, "--save_samples", folder], ["--save_samples=", "no sample"]),
    ]
    for args, words in cases:
        args = [*args, "--num_samples", 4, "--out", tmp_path, "--wandb.mode", "disabled"]
        assert_refused(run_program("eval_fid.py", *args, check=False), words)
