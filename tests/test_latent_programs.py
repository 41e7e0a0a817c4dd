"""Training on latents as a user does it: encoded on the fly, encoded once and killed on the way, evaluated."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import edit
import likelihood
import make_pairs
import sample
from tests.conftest import GOLDEN, Program, run_program, xla_flags
from utils.base.messages import UserError
from utils.codecs.kl import KLCodec, KLConfig
from utils.sampling.editing import read_images
from utils.trackers.trackers import read_metrics

pytestmark = pytest.mark.xdist_group("latents")
MODEL = """
    --model.hidden_size 32 --model.depth 1 --model.num_heads 2 --model.patch_size 2 --model.lr 1e-3 --batch_size 8
    --wandb.mode disabled --log_interval 1
""".split()  # noqa: SIM905 (a command line, as one types it)
STEPS = 8


@pytest.fixture(scope="module")
def vae():
    return GOLDEN / "vae_tiny"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Flags of a data set: 40 pieces of scikit-learn's two photographs, at 64x64."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for number in range(20):
            top, left = 100 * (number // 5), 120 * (number % 5)
            piece = Image.fromarray(photograph[top : top + 100, left : left + 120])
            piece.save(folder / f"{name}_{number:02d}.jpg", quality=95)
    return ["--dataset_name", f"folder:{folder}", "--image_size", 64]


@pytest.fixture(scope="module")
def encoding(photographs, vae):
    return ["encode_latents.py", *photographs, "--vae", vae, "--batch_size", 4, "--shard_size", 6]


@pytest.fixture(scope="module")
def latents(encoding, tmp_path_factory):
    """A folder of latents that was made without a break."""
    folder = tmp_path_factory.mktemp("latents")
    done = run_program(*encoding, "--out", folder)
    assert f"--dataset_name latents:{folder}" in done.stdout
    return folder


@pytest.fixture(scope="module")
def cached_run(latents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    args = ["--dataset_name", f"latents:{latents}", *MODEL, "--max_steps", STEPS, "--model.denoise_timesteps", 4]
    run_program("train_flow.py", *args, "--save_dir", folder)
    return folder


def losses(folder) -> np.ndarray:
    lines = read_metrics(folder / "metrics.jsonl")
    return np.array(
        [(line["training/l2_loss"], line["validation/l2_loss"]) for line in lines if "training/l2_loss" in line]
    )


def shards(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.array_record")}


def test_killed_and_started_again_encodes_the_same_bytes(encoding, latents, tmp_path):
    process = Program([*map(str, encoding), "--out", str(tmp_path)], {"XLA_FLAGS": xla_flags(1)})
    deadline = time.monotonic() + 120
    while not shards(tmp_path):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    expected = shards(latents)
    finished = {name: (tmp_path / name).stat().st_mtime_ns for name in shards(tmp_path)}
    assert 0 < len(finished) < len(expected)
    run_program(*encoding, "--out", tmp_path)
    assert shards(tmp_path) == expected
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in finished} == finished  # not made again


def test_two_devices_encode_what_one_does(encoding, latents, tmp_path):
    run_program(*encoding, "--out", tmp_path, devices=2)
    ours, theirs = (
        np.concatenate([np.frombuffer(content[-4096:], np.float16) for _, content in sorted(shards(folder).items())])
        for folder in (tmp_path, latents)
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


def test_cached_latents_give_the_losses_of_encoding_on_the_fly(photographs, vae, cached_run, tmp_path):
    args = [*photographs, "--vae", vae, *MODEL, "--max_steps", STEPS, "--eval_interval", 0, "--save_dir", tmp_path]
    run_program("train_flow.py", *args)
    assert losses(tmp_path).shape == (STEPS, 2)
    np.testing.assert_allclose(losses(cached_run), losses(tmp_path), rtol=1e-3)  # float16 has eleven bits


def test_photographs_of_latents_are_decoded(cached_run):
    for name in ("reconstruction_n", "sample_cfg_4", "sample_N_32"):
        assert (cached_run / "images" / name / f"{STEPS:08d}.png").stat().st_size > 20_000  # noise of 64x64 in colour


@pytest.mark.slow
def test_a_run_on_latents_is_evaluated_through_the_same_vae(cached_run, weights, tmp_path):
    args = ["--load_dir", cached_run, "--fid_stats", "data/fid_stats_digits.npz", "--num_samples", 4]
    args += ["--batch_size", 4, "--denoise_timesteps", 2, "--out", tmp_path, "--inception_weights", weights]
    args += ["--wandb.mode", "disabled"]
    run_program("eval_fid.py", *args, "--save_samples", tmp_path / "samples.npz")
    samples = np.load(tmp_path / "samples.npz")["arr_0"]
    assert samples.shape == (4, 64, 64, 3)
    assert samples.std() > 5


@pytest.mark.slow
def test_a_run_on_latents_is_filmed_filled_and_measured(cached_run, photographs, read_flags, tmp_path, capsys):
    folder, out = photographs[1].removeprefix("folder:"), tmp_path / "out"

    def draw(program, *words):
        words = ["--load_dir", cached_run, "--out", out, "--num_samples", 2, *words]
        program.main(read_flags(program, list(map(str, words))))

    draw(sample, "--film", "--denoise_timesteps", 1)  # one step: noise and image alone
    with Image.open(out / "film.webp") as film:
        assert film.size == Image.open(out / "grid.png").size
    is_hole = np.zeros((64, 64), bool)
    is_hole[10:30, 20:50] = True
    Image.fromarray(is_hole).save(tmp_path / "mask.png")
    draw(edit, "--inpaint", folder, "--mask", tmp_path / "mask.png", "--denoise_timesteps", 2, "--save_samples",
         tmp_path / "filled.npz")  # fmt: skip
    filled, (images, _) = np.load(tmp_path / "filled.npz")["arr_0"], read_images(folder, (64, 64, 3), 2)
    np.testing.assert_array_equal(filled[:, ~is_hole], images[:, ~is_hole])
    assert (filled[:, is_hole] != images[:, is_hole]).mean() > 0.5
    capsys.readouterr()
    words = ["--load_dir", str(cached_run), "--num_images", "1", "--json", "-", "--batch_size", "1"]
    likelihood.main(read_flags(likelihood, [*words, "--solver", "midpoint", "--denoise_timesteps", "2"]))
    (result,) = json.loads(capsys.readouterr().out)
    assert 0.5 < result["nats_per_latent_element"] < 5  # standard normal latents have 1.42
    assert "bits_per_dim" not in result


def refused(*args) -> str:
    done = run_program(*args, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return error


def test_another_vae_is_refused_everywhere(encoding, latents, cached_run, weights, read_flags, tmp_path):
    KLCodec.random(0, KLConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)).save(tmp_path)
    before = shards(latents)
    assert "holds latents with vae_sha256" in refused(*encoding, "--vae", tmp_path, "--out", latents)
    assert shards(latents) == before
    train = ["train_flow.py", "--dataset_name", f"latents:{latents}", *MODEL, "--save_dir", tmp_path / "run"]
    assert re.search(r"--codec=kl:.* is another VAE", refused(*train, "--vae", tmp_path))
    evaluate = ["eval_fid.py", "--load_dir", cached_run, "--fid_stats", "data/fid_stats_digits.npz", "--num_samples", 4]
    assert re.search(r"--codec=kl:.* is another VAE", refused(*evaluate, "--vae", tmp_path))
    for program, words in ((sample, []), (likelihood, []), (make_pairs, ["--out", tmp_path / "pairs"])):
        words = map(str, ["--load_dir", cached_run, "--vae", tmp_path, *words])
        with pytest.raises(UserError, match=r"--codec=kl:.* is another VAE"):
            program.main(read_flags(program, list(words)))
    assert "leave the flag out" in refused(*train, "--use_stable_vae", 0)


def test_latents_are_no_images(latents, tmp_path):
    for program in ("encode_latents.py", "compute_fid_stats.py"):
        words = ["--dataset_name", f"latents:{latents}", "--out", tmp_path / "out"]
        assert "give " in refused(program, *words)


def test_the_moved_vae_is_named_by_a_flag(latents, cached_run, vae, tmp_path):
    """Latents and runs remember where their VAE was; a copy elsewhere does as well, identified by its hash."""
    copy = shutil.copytree(vae, tmp_path / "copy")
    args = [
        "--dataset_name",
        f"latents:{latents}",
        *MODEL,
        "--save_dir",
        cached_run,
        "--vae",
        copy,
        "--max_steps",
        STEPS,
    ]
    assert "nothing to do" in run_program("train_flow.py", *args).stdout
