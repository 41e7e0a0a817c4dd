"""Pairs of noise and sample, training on them, and how straight paths are."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import make_pairs
from tests.conftest import GOLDEN, run_program
from tests.test_generate import run as golden_run  # noqa: F401 (fixture)
from utils.base.messages import UserError, WriteError
from utils.data import pairs
from utils.data.dataset import DataOptions
from utils.data.loaders import load_dataset
from utils.objectives.flow_matching import expand_times
from utils.runs.opening import load_generator
from utils.sampling.generator import ImageGenerator
from utils.sampling.paths import straightness
from utils.sampling.solvers import SamplerConfig, sample
from utils.trackers.trackers import read_metrics

MEAN, STD = 0.4, 0.5
reflow = pytest.mark.xdist_group("reflow")


def marginal_velocity(x, t, t_next):
    """Returns the exact velocity for Gaussian data N(MEAN, STD^2)."""
    t = expand_times(t, x)
    return MEAN + (t * STD**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * STD**2) * (x - t * MEAN)


def straight_velocity(x, t, t_next):
    """Returns the velocity for the same data after reflow."""
    t = expand_times(t, x)
    return MEAN + (STD - 1) * (x - t * MEAN) / (1 + (STD - 1) * t)


def test_straightness_is_that_of_theory():
    with jax.enable_x64(True):
        noise = jax.random.normal(jax.random.key(0), (20, 3, 1))
        # Euler's steps are of order 1: two extrapolations leave the third power of their size.
        coarse, middle, fine = (straightness(marginal_velocity, noise, count) for count in (1000, 2000, 4000))
        found = (8 * fine - 6 * middle + coarse) / 3
        expected = STD * (2 - np.pi / 2) * jnp.square(noise).mean((1, 2))  # whose mean is that of the paper
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert np.abs(straightness(straight_velocity, noise)).max() < 1e-12
        np.testing.assert_allclose(sample(straight_velocity, noise, 1), MEAN + STD * noise, atol=1e-9)


def test_straightness_equals_the_closed_form_of_few_steps():
    golden = {
        name: value for name, value in np.load(GOLDEN / "closed_form.npz").items() if name.startswith("gaussian/")
    }
    mean, std = (jnp.asarray(golden[f"gaussian/{name}"], jnp.float32) for name in ("mean", "std"))

    def velocity(x, t, t_next):
        t = t[:, None]
        return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2) * (x - t * mean)

    noise = jnp.asarray(golden["gaussian/x_0"], jnp.float32)
    for steps in (1, 2, 4, 16):
        found = straightness(velocity, noise, steps) * noise.shape[1]
        np.testing.assert_allclose(found, golden[f"gaussian/euler{steps}_straightness_sum"], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "run"
    line = f"""
        --dataset_name digits --use_stable_vae 0 --save_dir {folder} --model.patch_size 2 --model.num_classes 10
        --model.hidden_size 32 --model.depth 1 --batch_size 32 --max_steps 20 --eval_interval 0 --wandb.mode disabled
        --model.dtype float32 --model.lr 1e-2 --model.target_update_rate 0.5
    """
    run_program("train_flow.py", *line.split())
    return folder


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "pairs"
    words = f"--load_dir {run} --num_pairs 110 --shard_size 50 --batch_size 32 --denoise_timesteps 4 --out {out}"
    run_program("make_pairs.py", *words.split())
    return out, words


@reflow
def test_a_pair_is_a_sample_and_its_noise(run, made):
    generator = load_generator(run)
    labels = np.arange(110) % 10
    expected = generator.sample_latents(generator.noise(range(110)), labels, SamplerConfig(4, None))
    source = pairs.Pairs(made[0], pairs.load_pairs_manifest(made[0]))
    for i in (0, 49, 50, 109):
        example = source[i]
        np.testing.assert_allclose(example["x_1"], expected[i], atol=1e-5)
        assert (example["label"], example["pair"].tolist()) == (labels[i], [0, i])
        noise = pairs.pair_noise(jnp.asarray(example["pair"])[None], (8, 8, 1))
        np.testing.assert_array_equal(noise, generator.noise([i]))
    splits = [load_dataset(f"pairs:{made[0]}", split, DataOptions()) for split in ("train", "validation")]
    assert [len(dataset.source) for dataset in splits] == [108, 2]


def test_noise_is_drawn_as_it_was(tmp_path):
    made = {
        "dataset_name": "pairs of run", "params_sha256": "0" * 64, "sampler": "euler", "seed": 0, "num_pairs": 100,
        "shard_size": 50, "image_shape": [8, 8, 1], "latent_shape": [8, 8, 1], "class_names": ["a", "b"], "vae": None,
        "vae_sha256": None, "format": 1, "jax_variables": ["JAX_RANDOM_SEED_OFFSET=3"],
    }  # fmt: skip
    (tmp_path / pairs.MANIFEST).write_text(json.dumps(made))
    for offset, message in ((0, "now there are none"), (3, "is missing|make_pairs.py")):
        jax.config.update("jax_random_seed_offset", offset)
        try:
            with pytest.raises(UserError, match=message):
                load_dataset(f"pairs:{tmp_path}", "train", DataOptions())
        finally:
            jax.config.update("jax_random_seed_offset", 0)
    prints = [pairs.load_pairs_manifest(tmp_path).fingerprint("train", 98).sha256]
    (tmp_path / pairs.MANIFEST).write_text(json.dumps(made | {"jax_variables": []}))
    assert pairs.load_pairs_manifest(tmp_path).fingerprint("train", 98).sha256 != prints[0]


def test_classes_without_images_come_along_and_change_no_fingerprint(tmp_path):
    """Pairs of before are the same pairs, so that a run on them resumes."""
    older = {
        "dataset_name": "pairs of run", "params_sha256": "0" * 64, "sampler": "euler", "seed": 0, "num_pairs": 100,
        "shard_size": 50, "image_shape": [8, 8, 1], "latent_shape": [8, 8, 1], "class_names": ["a", "b"], "vae": None,
        "vae_sha256": None, "format": 1,
    }  # fmt: skip
    expected = hashlib.sha256(json.dumps(["train", older], sort_keys=True).encode()).hexdigest()
    for content, empty_classes in ((older, ()), (older | {"empty_classes": [1]}, (1,))):
        (tmp_path / pairs.MANIFEST).write_text(json.dumps(content))
        manifest = pairs.load_pairs_manifest(tmp_path)
        assert manifest.empty_classes == empty_classes
        assert manifest.fingerprint("train", 98).sha256 == expected
    (tmp_path / pairs.MANIFEST).write_text(json.dumps(older | {"empty_classes": [2]}))
    with pytest.raises(UserError, match="not a valid manifest of pairs"):
        pairs.load_pairs_manifest(tmp_path)


@reflow
def test_making_pairs_goes_on_after_the_last_file(made, tmp_path):
    out, words = made
    files = sorted(out.glob("*.array_record"))
    content = [file.read_bytes() for file in files]
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    with pytest.raises(UserError, match="is not complete: 1 of its 3 files are missing"):
        load_dataset(f"pairs:{out}", "train", DataOptions())
    run_program("make_pairs.py", *words.split())
    assert [file.read_bytes() for file in files] == content
    assert [file.stat().st_mtime_ns for file in files][::2] == times[::2]
    done = run_program("make_pairs.py", *words.split(), "--seed", 1, check=False)
    assert "holds pairs of another model or sampler" in done.stderr
    done = run_program("make_pairs.py", *words.split(), "--solver", "sde", check=False)
    assert "--solver=sde draws noise on the way" in done.stderr


@reflow
def test_a_full_disk_says_how_many_files_of_pairs_are_finished(made, read_flags, tmp_path, full_disk):
    out, words = made
    shutil.copytree(out, tmp_path / "pairs")
    (tmp_path / "pairs" / "pairs-00001-of-00003.array_record").unlink()
    full_disk(4096)
    message = (
        r"pairs-00001-of-00003\.array_record could not be written \(File too large\); 2 of 3 files are finished, and "
        "kept; raise the limit"
    )
    with pytest.raises(WriteError, match=message):
        make_pairs.main(read_flags(make_pairs, words.replace(str(out), str(tmp_path / "pairs")).split()))
    assert len(list((tmp_path / "pairs").glob("*.array_record"))) == 2
    assert not list((tmp_path / "pairs").glob(".*.tmp"))


@reflow
@pytest.mark.parametrize("distill", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_is_straightened_by_its_pairs(run, made, tmp_path, distill):
    line = f"""
        --dataset_name pairs:{made[0]} --load_dir {run} --save_dir {tmp_path / "run"} --use_stable_vae 0 --batch_size 32
        --max_steps 30 --log_interval 1 --eval_interval {0 if distill else 30} --model.denoise_timesteps 2
        --wandb.mode disabled
        --model.dtype float32 --model.lr 1e-2 --model.target_update_rate 0.5 --objective.distill {distill}
    """
    run_program("train_flow.py", *line.split())
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [line["training/l2_loss"] for line in lines if "training/l2_loss" in line]
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    if not distill:  # which learns t = 0 alone
        (straight,) = [line["straightness"] for line in lines if "straightness" in line]
        assert straight < load_generator(run).straightness()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["objective"]["distill"] == distill


def test_pairs_are_those_of_the_flags(golden_run, read_flags, tmp_path, monkeypatch):  # noqa: F811
    shards = {}

    def write(path, pairs, kind):
        shards[path.name] = [int(label) for label, _ in pairs]

    def sample_latents(self, noise, labels, sampler):
        calls.append((self, np.asarray(noise), sampler))
        return noise

    calls = []
    monkeypatch.setattr(make_pairs.pairs, "write_pairs", write)
    monkeypatch.setattr(ImageGenerator, "sample_latents", sample_latents)
    words = "--num_pairs 110 --shard_size 60 --batch_size 30 --seed 5 --labels uniform --params raw --dtype float32"
    words += " --cfg_scale 2 --denoise_timesteps 3 --time_grid shift:3 --solver heun --cfg_interval 0,0.5"
    words += f" --load_dir {golden_run} --out {tmp_path}"
    jax.config.update("jax_random_seed_offset", 3)
    try:
        make_pairs.main(read_flags(make_pairs, words.split()))
        like = load_generator(golden_run, params="raw", seed=5)
    finally:
        jax.config.update("jax_random_seed_offset", 0)
    generator, noise, sampler = calls[0]
    assert sampler == SamplerConfig(3, 2.0, (0.0, 0.5), "heun", time_shift=3.0)
    assert generator.model.network.config.dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, generator.params, like.params)
    np.testing.assert_array_equal(noise, like.noise(range(30)))
    assert [*shards.values()] == [like.conditions(rows).tolist() for rows in (range(60), range(60, 110))]
    manifest = pairs.load_pairs_manifest(tmp_path)
    assert (manifest.seed, manifest.jax_variables) == (5, ("JAX_RANDOM_SEED_OFFSET=3",))


def test_bad_input_is_one_line(read_flags, tmp_path):
    cases = {
        "": "--load_dir is not given",
        "--load_dir /no/such": "--out is not given",
        f"--load_dir /no/such --out {tmp_path}": "--load_dir=/no/such holds no checkpoint",
    }
    for line, message in cases.items():
        with pytest.raises(UserError, match=message):
            make_pairs.main(read_flags(make_pairs, line.split()))
    with pytest.raises(UserError, match="holds no pairs; make them"):
        load_dataset(f"pairs:{tmp_path}", "train", DataOptions())
    for content in ("", "{}", '{"seed": 1}', "[]"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="is not a valid manifest of pairs"):
            load_dataset(f"pairs:{tmp_path}", "train", DataOptions())
