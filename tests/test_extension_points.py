"""The five extension points together: kinds from outside (the blocks of docs/change_this.md) in one run, from training
to evaluation. Each is tested by itself in a file of its own."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compute_fid_stats
import convert_checkpoint
import edit
import eval_fid
import likelihood
import make_pairs
import sample
from tests.test_change_this import run  # noqa: F401 (a fixture)
from tests.test_trackers import started  # noqa: F401 (a fixture)
from utils.base.messages import UserError
from utils.codecs.codecs import CODECS
from utils.conditions.condition import CONDITIONS
from utils.data.loaders import load_dataset
from utils.images.pixels import images_to_uint8
from utils.runs.opening import load_generator
from utils.sampling.solvers import SamplerConfig
from utils.trackers.trackers import metrics_of, read_metrics

SETTINGS = {
    "dataset_name": "ramps",  # the loader, of directions
    "codec": "blocks",  # latents (4, 4, 4)
    "trackers": ["diary", "toy", "broken"],
    "batch_size": 64,
    "log_interval": 1,
    "eval_interval": 150,
    "model.hidden_size": 32,
    "model.depth": 1,
    "model.num_heads": 2,
    "model.patch_size": 2,
    "model.denoise_timesteps": 2,
    "model.lr": 3e-3,
    "model.target_update_rate": 0.9,
}


SAMPLE = "--load_dir RUN --out RUN/x"
REFUSALS = (
    (edit, f"{SAMPLE} --invert x", "--invert is for runs that are conditioned on classes; --load_dir=.*run is not"),
    (sample, f"{SAMPLE} --classes 3", "--classes=3: the run's conditions are no classes; give --condition_file"),
    (sample, f"{SAMPLE} --labels balanced", "--labels=balanced: the run's .* drawn uniform; use --labels uniform"),
    (eval_fid, f"{SAMPLE} --labels dataset", "--labels=dataset: the run's .* drawn uniform; use --labels uniform"),
    (make_pairs, f"{SAMPLE} --labels balanced", "--labels=balanced: the run's .* drawn uniform; use --labels uniform"),
    (eval_fid, f"{SAMPLE} --extractor colours", "no statistics ship for ramps; .* --extractor colours --out stats.npz"),
)


@pytest.mark.usefixtures("signal_handlers")
def test_kinds_from_outside_are_trained_sampled_scored_and_resumed(
    run,  # noqa: F811
    started,  # noqa: F811
    read_flags,
    tmp_path,
    monkeypatch,
    capfd,
):
    names = run("condition", "codec", "extractor", "tracker", "loop")
    folder = tmp_path / "run"

    # Trained, with the panels of an evaluation.
    generator = names["fit"](str(folder), 150, **SETTINGS)
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["training/l2_loss"] for line in lines if "training/l2_loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert "validation_loss_t/mean" in lines[-1]

    # Tracked, though one of the trackers fails.
    diary = (folder / "diary.txt").read_text().splitlines()
    assert diary[:2] == ["from step 0", f"step 1: loss {losses[0]:.3f}"]
    toy, broken = started
    assert toy.numbers == [(line["step"], metrics_of(line)) for line in lines]
    assert {"reconstruction_n", "sample_cfg_1", "sample_N/4"} <= {name for _, name, _ in toy.images}
    assert {file for _, _, file in toy.images} == set((folder / "images").rglob("*.png"))
    assert (toy.num_closed, toy.run.first_step, toy.run.settings["batch_size"]) == (1, 0, 64)
    assert broken.calls == ["log", "log"]
    assert capfd.readouterr().err.count("broken: the line is dead; nothing more is logged there") == 1

    # Recorded.
    record = json.loads((folder / "config.json").read_text())["dataset"]
    assert record["condition"] == {"kind": "direction", "arrays": [[[2], "float32"]]}
    assert record["codec"] == {"name": "blocks", "source": None, "sha256": None}
    assert (record["image_shape"], record["latent_shape"]) == ([8, 8, 1], [4, 4, 4])

    # Sampled under guidance: bright on the right, and below.
    assert generator.condition == names["Direction"]()
    images = generator.sample(conditions=[[1, 0], [0, 1]], num_steps=8, cfg_scale=2.0).astype(float)
    right = (images[:, :, 4:] - images[:, :, :4]).mean((1, 2, 3))
    below = (images[:, 4:] - images[:, :4]).mean((1, 2, 3))
    assert right[0] > abs(right[1]) + 10
    assert below[1] > abs(below[0]) + 10
    drawn = generator.conditions(range(3))
    np.testing.assert_array_equal(generator.conditions([2]), drawn[2:])
    images = generator.sample(conditions=drawn, num_steps=2)
    np.testing.assert_array_equal(images, generator.sample(num_samples=3, num_steps=2))
    latents = generator.sample_latents(generator.noise(range(3)), drawn, SamplerConfig(2, None))
    np.testing.assert_array_equal(images, images_to_uint8(names["Blocks"]().decode(latents)))
    with pytest.raises(UserError, match=r"conditions=\[\[1, 0, 0\]\]: the shape is \(1, 3\), not \(n, 2\)"):
        generator.sample(conditions=[[1, 0, 0]])

    # Sampled by the program; not every edit is for every condition.
    words = f"--load_dir {folder} --out {tmp_path} --denoise_timesteps 2 --num_samples 4".split()
    sample.main(read_flags(sample, [*words, "--save_samples", str(tmp_path / "s.npz")]))
    with np.load(tmp_path / "s.npz") as saved:
        np.testing.assert_array_equal(saved["arr_1"], generator.conditions(range(4)))
    assert (tmp_path / "grid.png").exists()
    for program, line, message in REFUSALS:
        with pytest.raises(UserError, match=message):
            program.main(read_flags(program, line.replace("RUN", str(folder)).split()))

    # Measured, and each image is named by its condition.
    line = f"--load_dir {folder} --num_images 3 --batch_size 4 --solver midpoint --denoise_timesteps 1"
    likelihood.main(read_flags(likelihood, [*line.split(), "--per_image", str(tmp_path / "images.csv")]))
    rows = list(csv.DictReader((tmp_path / "images.csv").open()))
    validation = names["load_ramps"]("ramps", "validation", None)
    angles = np.stack([example["angle"] for example in validation.source[:3]])
    assert [row["label"] for row in rows] == validation.condition.titles(angles)

    # Its pairs have its conditions, and what is exported is imported again.
    line = f"--load_dir {folder} --num_pairs 100 --denoise_timesteps 1 --params raw --out {tmp_path / 'pairs'}"
    make_pairs.main(read_flags(make_pairs, line.split()))
    pairs = load_dataset(f"pairs:{tmp_path / 'pairs'}")
    assert pairs.condition == names["Direction"]()
    examples = [pairs.row(i, False) for i in range(len(pairs.source))]
    numbers = [int(example["pair"][1]) for example in examples]
    np.testing.assert_array_equal([example["condition"] for example in examples], generator.conditions(numbers))
    for words_of_it in (f"--load_dir {folder}", f"--source {tmp_path / 'hub'}"):
        out = tmp_path / ("hub" if "load_dir" in words_of_it else "imported")
        line = f"{words_of_it} --out {out}"
        convert_checkpoint.main(read_flags(convert_checkpoint, line.split()))
    assert "(the condition direction)" in (tmp_path / "hub" / "README.md").read_text()
    imported = load_generator(tmp_path / "imported")
    for ours, theirs in zip(
        *(jax.tree.leaves(each.params) for each in (load_generator(folder), imported)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)

    # Scored: the distance is as between the means and covariances of the samples' and the data's colours.
    stats = tmp_path / "stats.npz"
    features = ["--extractor", "colours"]
    measure = ["--dataset_name", "ramps", "--out", str(stats), *features]
    compute_fid_stats.main(read_flags(compute_fid_stats, measure))
    eval_fid.main(read_flags(eval_fid, [*words, "--fid_stats", str(stats), "--trackers", "diary", *features]))
    (row,) = json.loads((tmp_path / "fid.json").read_text())["cells"]
    dataset = names["load_ramps"]("ramps", "train", None)
    data = np.stack([example["image"] for example in dataset.source])
    samples = generator.sample(num_samples=4, num_steps=2, cfg_scale=4.0)
    greys = [images.mean((1, 2, 3)) / 255 for images in (data, samples)]  # thrice, as colours
    mean_difference = greys[0].mean() - greys[1].mean()
    deviation_difference = greys[0].std(ddof=1) - greys[1].std(ddof=1)
    assert row["fd_colours"] == pytest.approx(3 * (mean_difference**2 + deviation_difference**2), rel=1e-3)
    assert (tmp_path / "samples_2_4.png").exists()

    # Resumed, but under no other condition or codec; and known only where they are registered.
    capfd.readouterr()
    names["fit"](str(folder), 151, **SETTINGS | {"eval_interval": 0})
    assert "resuming" in "".join(capfd.readouterr())
    continued = read_metrics(folder / "metrics.jsonl")
    assert continued[: len(lines)] == lines
    assert continued[-1]["step"] == 151
    assert [line["seconds"] for line in continued] == sorted(line["seconds"] for line in continued)
    assert "from step 150" in (folder / "diary.txt").read_text().splitlines()
    resumed = started[2]
    assert (resumed.run.first_step, len(resumed.run.lines)) == (150, len(lines))
    assert {step for step, _ in resumed.numbers} == {151}
    with pytest.raises(UserError, match="holds a run with --codec=blocks, not pixels"):
        names["fit"](str(folder), 152, **SETTINGS | {"codec": "pixels"})
    with pytest.raises(UserError, match="--codec=pixels has no effect on a run with --codec blocks"):
        load_generator(folder, codec="pixels")
    with monkeypatch.context() as patch:
        patch.setattr(names["Direction"], "spec", jax.ShapeDtypeStruct((3,), jnp.float32))
        with pytest.raises(UserError, match=r"has arrays \[\[\[2\], 'float32'\]\], but 'direction' is"):
            load_generator(folder)
    codec = CODECS.pop("blocks")
    known = r"pixels, kl:PATH_OR_HUB, tiny:PATH_OR_HUB\."
    with pytest.raises(UserError, match=f"--codec=blocks is unknown; known are {known} Register it first"):
        load_generator(folder)
    CODECS["blocks"] = codec
    del CONDITIONS["direction"]
    with pytest.raises(UserError, match=r"the run's condition 'direction' is unknown; known are class, .*Register it"):
        load_generator(folder)
