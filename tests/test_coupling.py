"""Optimal transport between noise and data: its mathematics, what it leaves of both, and runs that use it."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import kstest
from threadpoolctl import threadpool_limits

from tests.conftest import GOLDEN, run_program
from tests.data_sets import load
from tests.runs import assert_close, kill_and_continue, losses, train_and_repeat
from utils.base.messages import UserError
from utils.codecs.kl import KLCodec
from utils.codecs.kl_config import KLConfig
from utils.conditions.classes import ClassCondition
from utils.conditions.images import ImageCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.tokens import TokensCondition
from utils.conditions.vector import VectorCondition
from utils.data.batches import training_batches
from utils.data.coupled import MinibatchCoupling, Space, split_condition
from utils.data.coupling import (
    TESTING,
    Cells,
    chi_squared,
    cosine_distances,
    couple,
    draw_block,
    draw_rows,
    find_weight,
    squared_distances,
)
from utils.data.fingerprint import Fingerprint
from utils.data.latents import LatentBatch, LatentsManifest
from utils.data.semidiscrete import FILE, fit_potentials
from utils.objectives.flow_matching import draw_noise
from utils.training import build_run, make_config, train
from utils.training.data import find_x_1
from utils.training.step import VALIDATION, draw_examples

pytestmark = pytest.mark.xdist_group("coupling")

TINY = {
    "dataset_name": "digits", "codec": "pixels", "model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2,
    "model.patch_size": 4, "model.num_classes": 10, "model.dtype": "float32", "batch_size": 64, "model.lr": 1e-3,
    "log_interval": 1, "eval_interval": 0, "wandb.mode": "disabled",
}  # fmt: skip


@pytest.fixture(scope="module")
def ot(shared):
    return np.load(shared / "golden" / "more" / "ot_small.npz")


def make_run(folder, **settings):
    return build_run(make_config({**TINY, "save_dir": str(folder), **settings}))


def take(run, folder, count=1):
    """The first batches of a run, once its coupling is ready."""
    run.coupling.prepare(folder, is_new=True)
    batches = run.training_batches()
    return [next(batches) for _ in range(count)]


def read_on(run, place):
    """The first batch that process `place` of two reads."""
    hosts = {"process_index": place, "process_count": 2}
    return next(training_batches(run.datasets["train"], 64, 0, **hosts, coupling=run.coupling))


def total_cost(x_1, x_0, perm):
    return np.square(x_1 - x_0[perm], dtype=np.float64).sum()


# --- Within a batch ---


def test_assignments_are_those_of_the_golden_arrays(ot):
    x_0, x_1, labels = (ot[f"mb/{name}"] for name in ("x0", "x1", "labels"))
    for perm, name in ((couple(x_1, x_0), ""), (couple(x_1, x_0, labels), "_by_class")):
        np.testing.assert_array_equal(perm, ot[f"mb/perm{name}"])
        np.testing.assert_allclose(total_cost(x_1, x_0, perm) / len(x_1), ot[f"mb/cost{name}"], rtol=1e-6)
    np.testing.assert_allclose(
        total_cost(x_1, x_0, np.arange(len(x_1))) / len(x_1), ot["mb/cost_independent"], rtol=1e-6
    )
    for weight in (1, 20):
        perm = couple(x_1, x_0, None, ot["c2ot/conditions"], weight)
        np.testing.assert_array_equal(perm, ot[f"c2ot/perm_w{weight}"])


def test_no_permutation_costs_less():
    rng = np.random.default_rng(0)
    x_1, x_0 = rng.normal(size=(2, 6, 3))
    conditions = rng.normal(size=(6, 2))
    np.testing.assert_allclose(squared_distances(x_1, x_0), np.square(x_1[:, None] - x_0).sum(axis=2))
    everyone = [np.array(perm) for perm in itertools.permutations(range(6))]
    best = min(everyone, key=lambda perm: total_cost(x_1, x_0, perm))
    np.testing.assert_array_equal(couple(x_1, x_0), best)
    np.testing.assert_array_equal(couple(x_1, 3 * x_0), best)  # however the noise is scaled
    labels = np.array([0, 1, 0, 1, 1, 0])
    own = [perm for perm in everyone if (labels[perm] == labels).all()]
    np.testing.assert_array_equal(couple(x_1, x_0, labels), min(own, key=lambda perm: total_cost(x_1, x_0, perm)))

    # With conditions: by hand, and between those without them and those of equal conditions alone.
    units = conditions / np.linalg.norm(conditions, axis=1)[:, None]

    def cost(perm):
        return total_cost(x_1, x_0, perm) + 5 * (1 - (units * units[perm]).sum(axis=1)).sum()

    np.testing.assert_array_equal(couple(x_1, x_0, None, conditions, 5.0), min(everyone, key=cost))
    np.testing.assert_array_equal(couple(x_1, x_0, None, conditions, 0.0), best)
    np.testing.assert_array_equal(couple(x_1, x_0, None, conditions, 1e9), np.arange(6))


def test_the_weight_leaves_a_fifth_of_the_pairs_below_their_own_cost():
    rng = np.random.default_rng(1)
    x_1, x_0 = rng.normal(size=(2, 40, 8))
    cost = squared_distances(x_1, x_0)
    distance = cosine_distances(rng.normal(size=(40, 3)))
    weight = find_weight(cost, distance)
    share = [(cost + factor * weight * distance <= np.diagonal(cost)[:, None]).mean() for factor in (0.999, 1.001)]
    assert share[0] >= 0.2 > share[1] >= 0.2 - 2 / cost.size
    assert find_weight(cost, np.zeros_like(distance)) == 0  # no conditions to tell apart
    assert find_weight(cost + 10 * (1 - np.eye(40)), distance) == 0  # fewer than a fifth cost less anyway


def test_noise_is_a_function_of_seed_step_and_row():
    noise = draw_rows(3, 5, range(8), (4, 4, 1))
    np.testing.assert_array_equal(noise[2:5], draw_rows(3, 5, range(2, 5), (4, 4, 1)))
    others = [draw_rows(3, 6, range(8), (4, 4, 1)), draw_rows(4, 5, range(8), (4, 4, 1)), noise[::-1]]
    assert not any((noise == other).any() for other in others)
    assert (draw_rows(-1, 5, range(8), (4, 4, 1)) != draw_rows(-2, 5, range(8), (4, 4, 1))).all()
    many = np.concatenate([draw_rows(0, step, range(64), (100,)) for step in range(40)])
    assert kstest(many.ravel(), "norm").pvalue > 0.001
    # Rows, steps and places are independent of each other.
    assert abs(np.corrcoef(many, rowvar=False) - np.eye(100)).max() < 5 / np.sqrt(len(many))
    assert abs((many[1:] * many[:-1]).mean()) < 5 / np.sqrt(many.size)


class Labels:
    """Batches of two classes that lie far apart, 4 numbers each."""

    def __init__(self, condition):
        self.condition = condition

    def read(self, indices, flips):
        labels = np.array(indices) % 2
        points = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)[indices] + 4 * labels[:, None]
        return LatentBatch(condition=np.int32(labels), moments=points[:, None, None, None])


@pytest.mark.parametrize("group", [16, 64, 256])
def test_noise_stays_standard_normal_given_the_label(group):
    space = Space(lambda batch: np.asarray(batch.moments)[:, 0, 0, 0], (4,), 0, 1.0)
    order = np.random.default_rng(1)
    orders = [order.permutation(64).tolist() for _ in range(64)]

    def coupled(condition):
        coupling = MinibatchCoupling(space, condition, group, 64, None)
        read = coupling.reader(range(64), lambda step: (orders[step], [False] * 64), Labels(condition).read)
        return [read(step) for step in range(64)]

    batches = coupled(ClassCondition(("a", "b")))
    noise, labels = (
        np.concatenate([np.asarray(getattr(batch, name)) for batch in batches]) for name in ("x_0", "condition")
    )
    for label in (0, 1):
        assert all(kstest(numbers, "norm").pvalue > 1e-4 for numbers in noise[labels == label].T)
        np.testing.assert_allclose(np.cov(noise[labels == label].T), np.eye(4), atol=0.15)
    # The noise itself is that of the rows in another order, and nearer to the data than by chance.
    plain = np.concatenate([draw_rows(0, step, range(64), (4,)) for step in range(64)])
    np.testing.assert_array_equal(np.sort(noise, axis=0), np.sort(plain, axis=0))
    data = np.concatenate([np.asarray(batch.data.moments)[:, 0, 0, 0] for batch in batches])
    assert np.square(noise - data).sum(axis=1).mean() < np.square(plain - data).sum(axis=1).mean() - 4
    # Across labels it would not be.
    mixed = np.concatenate([np.asarray(batch.x_0) for batch in coupled(ClassCondition(("all",)))])
    assert mixed[labels == 1].mean() - mixed[labels == 0].mean() > 0.5


# --- Between all noise and points ---


def test_winners_and_potentials_are_those_of_the_golden_arrays(ot):
    x_0 = ot["sd/x0"].reshape(40, -1)
    for name, points, labels in (
        ("sd", ot["sd/data"], ot["sd/labels"]),
        ("sd_grid", ot["sd_grid/data"], np.zeros(12, int)),
    ):
        noise_labels = ot["sd/x0_labels"] if name == "sd" else np.zeros(40, int)
        for label in np.unique(labels):
            (rows,), (noises,) = np.nonzero(labels == label), np.nonzero(noise_labels == label)
            cells = Cells(points.reshape(len(points), -1)[rows])
            cells.set_potentials(ot[f"{name}/g"][rows])
            np.testing.assert_array_equal(rows[cells.find_winners(x_0[noises])], ot[f"{name}/index"][noises])
            found = fit_potentials(cells, 6000 * 64, tolerance=-np.inf).potentials
            expected = ot[f"{name}/g"][rows]
            np.testing.assert_allclose(found, expected - expected.mean(), atol=0.02)
    cells = Cells(ot["lp/data"])
    cells.set_potentials(ot["lp/g"])
    np.testing.assert_array_equal(cells.find_winners(ot["lp/x0"]), ot["lp/index"])
    cells = Cells(np.float32(ot["sd_line/points"])[:, None])
    found = fit_potentials(cells, 6000 * 64, weights=ot["sd_line/weights"], tolerance=-np.inf).potentials
    np.testing.assert_allclose(found, ot["sd_line/g"] - ot["sd_line/g"].mean(), atol=0.02)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_each_point_wins_its_share(scale):
    """On a line the cells are intervals of the same probability, whose limits give the potentials."""
    points = np.array([-2.0, -0.5, 0.0, 1.5, 3.0])
    limits = scale * ndtri(np.arange(1, 5) / 5)
    steps = (np.square(points[1:]) - np.square(points[:-1])) / 2 - limits * np.diff(points)
    expected = np.concatenate([[0], np.cumsum(steps)])
    cells = Cells(np.float32(points)[::-1, None].copy(), scale)
    fit = fit_potentials(cells, 2**17, tolerance=-np.inf)
    np.testing.assert_allclose(fit.potentials[::-1], expected - expected.mean(), atol=0.03)
    # Without potentials, or with those of the wrong sign, points are far from their share.
    noise = draw_block(7, TESTING, 0, 0, (20_000, 1))
    chi2 = []
    for potentials in (fit.potentials, 0 * fit.potentials, -fit.potentials):
        cells.set_potentials(potentials)
        chi2.append(chi_squared(np.bincount(cells.find_winners(noise), minlength=5), np.full(5, 0.2)))
    assert chi2[0] < 0.02
    assert chi2[2] > chi2[1] > 0.3


def test_winners_are_exact_and_fits_the_same_numbers_on_any_machine():
    rng = np.random.default_rng(2)
    # Far from the origin, in pairs that float32 hardly tells apart.
    points = np.float32(rng.normal(size=(120, 30)) + 5)
    points[60:] = points[:60] + np.float32(1e-6) * np.float32(rng.normal(size=(60, 30)))
    cells = Cells(points)
    potentials = np.tile(rng.normal(size=60), 2) * 0.1 + np.square(points, dtype=np.float64).sum(axis=1) / 2
    cells.set_potentials(potentials)
    noise = draw_block(0, TESTING, 0, 0, (3000, 30))
    exact = (noise.astype(np.float64) @ cells.directions.T.astype(np.float64) + cells.offsets).argmax(axis=1)
    np.testing.assert_array_equal(cells.find_winners(noise), exact)
    np.testing.assert_array_equal(np.concatenate([cells.find_winners(row[None]) for row in noise[:50]]), exact[:50])
    # Potentials follow from counts of winners alone, whatever multiplies the matrices.
    fits = []
    for threads in (1, 2):
        with threadpool_limits(threads, "blas"):
            fits.append(fit_potentials(Cells(points), 2**13, seed=1, part=2).potentials)
    np.testing.assert_array_equal(*fits)
    assert not np.array_equal(fits[0], fit_potentials(Cells(points), 2**13, seed=1, part=3).potentials)


# --- Runs ---


def test_a_batch_brings_noise_of_its_own_images_and_validation_that_of_an_uncoupled_run(tmp_path):
    run, plain = (make_run(tmp_path / name, coupling=name) for name in ("minibatch", "none"))
    (batch,) = take(run, tmp_path)
    expected = next(plain.training_batches())
    np.testing.assert_array_equal(batch.data.image, expected.image)
    np.testing.assert_array_equal(batch.condition, expected.condition)
    noise = draw_rows(0, 0, range(64), (8, 8, 1))
    x_1 = np.asarray(expected.to_latents(run.model.codec, jax.random.key(0)))
    np.testing.assert_array_equal(batch.x_0, noise[couple(x_1, noise, expected.condition)])

    # The step's own noise, given by the batch.
    key = jax.random.fold_in(jax.random.key(0), VALIDATION)
    draws = draw_examples(key, plain.validation_batch, plain.model.objective, 0.0)["draws"]
    x_0 = draw_noise(draws, jnp.zeros((64, 8, 8, 1)))
    np.testing.assert_allclose(run.validation_batch.x_0, x_0, atol=1e-6)
    np.testing.assert_array_equal(run.validation_batch.data.image, plain.validation_batch.image)
    assert plain.coupling is None
    assert not hasattr(plain.validation_batch, "x_0")


def test_groups_may_be_smaller_or_larger_than_a_batch(tmp_path):
    run = make_run(tmp_path, coupling="minibatch", coupling_rows=192)
    batches = take(run, tmp_path, 4)
    x_1 = np.concatenate([batch.data.image for batch in batches]) / 127.5 - 1
    labels = np.concatenate([batch.condition for batch in batches])
    noise = np.concatenate([draw_rows(0, step, range(64), (8, 8, 1)) for step in range(4)])
    np.testing.assert_array_equal(
        np.concatenate([batch.x_0 for batch in batches[:3]]), noise[:192][couple(x_1[:192], noise[:192], labels[:192])]
    )
    # Any batch by itself is the same one: a run that is continued in the midst of a group goes on exactly.
    again = run.training_batches()
    again.set_state({"next_index": 2})
    np.testing.assert_array_equal(next(again).x_0, batches[2].x_0)
    half = make_run(tmp_path, coupling="minibatch", coupling_rows=32)
    part = slice(32, 64)
    (batch,) = take(half, tmp_path)
    np.testing.assert_array_equal(batch.x_0[part], noise[part][couple(x_1[part], noise[part], labels[part])])
    # Of two processes, each reads its own groups.
    for place in (0, 1):
        own = read_on(half, place)
        np.testing.assert_array_equal(own.x_0, batch.x_0[32 * place : 32 * place + 32])


def test_conditions_that_are_no_classes_have_a_part_in_the_cost(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (80, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, conditions=rng.normal(size=(80, 2)) * (1, 100) + 50)
    settings = {"dataset_name": f"npz:{tmp_path / 'data.npz'}", "model.num_classes": 1, "coupling": "minibatch"}
    for weight in (None, 1e9):
        run = make_run(tmp_path / "run", **settings, coupling_weight=weight)
        (batch,) = take(run, tmp_path)
        kind = run.datasets["train"].condition
        x_1 = batch.data.image / 127.5 - 1
        noise = draw_rows(0, 0, range(64), (8, 8, 1))
        vectors = (batch.condition["value"] - np.array(kind.means)) / np.array(kind.stds)
        np.testing.assert_array_equal(batch.x_0, noise[couple(x_1, noise, None, vectors, weight)])
    # So large a weight leaves each noise where it was.
    np.testing.assert_array_equal(batch.x_0, noise)


def test_parts_of_a_condition_are_labels_and_vectors():
    tokens = TokensCondition(length=2, width=3)
    numbers = VectorCondition(("a", "b"), (1.0, 2.0), (2.0, 4.0), (0.0, 0.0), (9.0, 9.0))
    several = SeveralCondition((("class", ClassCondition(("x", "y"))), ("tokens", tokens), ("vector", numbers)))
    values = {
        "class": np.array([1, 0]),
        "tokens": {
            "value": np.float32([[[3, 4, 0], [9, np.nan, 9]], [[0, 0, 1], [0, 0, 1]]]),
            "mask": np.array([[True, False], [True, True]]),
        },
        "vector": {"value": np.float32([[7, 18], [5, 5]]), "is_given": np.array([True, False])},
    }  # fmt: skip
    labels, vectors = split_condition(several, values)
    np.testing.assert_array_equal(labels, [1, 0])
    np.testing.assert_allclose(vectors, [[0.6, 0.8, 0, 0.6, 0.8], [0, 0, 1, 0, 0]], atol=1e-6)
    assert split_condition(ClassCondition(("only",)), np.zeros(2, int)) == (None, None)
    with pytest.raises(UserError, match="tells classes, numbers, tokens and texts apart, not "):
        split_condition(ImageCondition(shape=(4, 4, 1)), {})


def test_the_cost_of_latents_is_taken_where_the_network_sees_them():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(KLConfig(), latent_channels=2, scaling_factor=0.5, shift_factor=0.25)
    codec = KLCodec({}, config, jnp.float32, "")  # of which no network is asked
    for arrays in (1, 2):
        counts = {"train": 9, "validation": 9}
        manifest = LatentsManifest("x", (32, 32, 3), (4, 4, 2), ("a",), counts, counts, 9, "", "", num_arrays=arrays)
        dataset = dataclasses.replace(load("digits"), latents=manifest, batch_type=LatentBatch)
        batch = moments(3, arrays, rng)
        batch.moments[:, 1:] = -60  # no deviation: the mean itself
        x_1 = jax.tree.map(jnp.asarray, batch).to_latents(codec, jax.random.split(jax.random.key(0), 3))
        np.testing.assert_allclose(find_x_1("minibatch", dataset, codec)(batch), x_1, atol=1e-5)


def moments(count, arrays, rng):
    return LatentBatch(condition=np.zeros(count, int), moments=np.float16(rng.normal(size=(count, arrays, 4, 4, 2))))


def test_semidiscrete_batches_are_of_winners_of_the_rows_labels(tmp_path):
    run = make_run(tmp_path, coupling="semidiscrete", random_flip=1, coupling_draws=1)
    batches = take(run, tmp_path, 9)
    plain = make_run(tmp_path, random_flip=1).training_batches()
    dataset = run.datasets["train"]
    images = np.stack([dataset.row(i, False)["image"] for i in range(len(dataset.source))])
    points = np.concatenate([images, images[:, :, ::-1]]) / np.float32(127.5) - 1
    labels = np.tile(dataset.source.labels, 2)
    potentials = np.load(tmp_path / FILE)["potentials"]
    scores = potentials - np.square(points).sum((1, 2, 3)) / 2
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.x_0, draw_rows(0, step, range(64), (8, 8, 1)))
        np.testing.assert_array_equal(batch.condition, next(plain).condition)
        all_scores = batch.x_0.reshape(64, -1) @ points.reshape(len(points), -1).T + scores
        winners = np.where(labels == batch.condition[:, None], all_scores, -np.inf).argmax(axis=1)
        np.testing.assert_allclose(batch.data.image / np.float32(127.5) - 1, points[winners], atol=1e-6)
    for place in (0, 1):
        own = read_on(run, place)
        np.testing.assert_array_equal(own.x_0, batches[0].x_0[32 * place : 32 * place + 32])
        np.testing.assert_array_equal(own.data.image, batches[0].data.image[32 * place : 32 * place + 32])
    # Every image is about as frequent as any other of its class.
    counts = [np.bincount(run.coupling.cells[3].find_winners(draw_block(1, TESTING, 0, 0, (20_000, 64))))]
    assert chi_squared(counts[0], np.full(len(counts[0]), 1 / len(counts[0]))) < 0.05


def test_a_run_is_continued_with_its_own_potentials(tmp_path):
    settings = {**TINY, "coupling": "semidiscrete", "coupling_draws": 1, "model.dtype": "bfloat16"}
    train_and_repeat(tmp_path, settings)
    folder = tmp_path / "whole"
    assert losses(tmp_path / "stopped") == losses(folder)
    recorded = json.loads((folder / "config.json").read_text())["dataset"]["coupling_sha256"]
    path = folder / FILE
    kept = path.read_bytes()
    with pytest.raises(UserError, match="holds a run with --coupling=semidiscrete, not minibatch: give that value"):
        train(make_run(folder, coupling="minibatch", max_steps=5))

    # Missing, the same numbers come again; those of another machine would be refused.
    coupling = make_run(folder, **settings).coupling
    path.unlink()
    with pytest.raises(UserError, match="fitting it again gives other numbers: bring the file back"):
        coupling.prepare(folder, False, "0" * 64)
    assert not path.exists()
    assert coupling.prepare(folder, False, recorded) == recorded
    assert path.read_bytes() == kept
    # Damaged, or of something else.
    for damage in (kept[:-100], b"", kept[:300] + bytes([kept[300] ^ 255]) + kept[301:]):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"coupling\.npz cannot be read .*move it away"):
            coupling.prepare(folder, False, recorded)
    path.write_bytes(kept)
    coupling.num_draws = 2
    with pytest.raises(UserError, match=r"another coupling \(its draws: 1, not 2\): give the data and settings"):
        coupling.prepare(folder, False, recorded)
    coupling.num_draws = 1
    coupling.dataset = dataclasses.replace(coupling.dataset, fingerprint=Fingerprint("arrays", 1500, "other"))
    with pytest.raises(UserError, match=r"its data: .*, not other\)"):
        coupling.prepare(folder, False, recorded)
    # A run that has not saved anything yet fits what it needs.
    assert coupling.prepare(folder, True) == recorded
    assert path.read_bytes() != kept


def test_killed_and_spread_over_devices_a_run_stays_the_same(tmp_path):
    words = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    words += ["--coupling", "semidiscrete", "--coupling_draws", 1]
    whole, killed, split = (tmp_path / name for name in ("whole", "killed", "split"))
    run_program("train_flow.py", *words, "--max_steps", 24, "--save_dir", whole)
    kill_and_continue(killed, 9, *words, "--max_steps", 24, "--save_interval", 8)
    assert losses(killed) == losses(whole)
    run_program("train_flow.py", *words, "--max_steps", 3, "--grad_accum", 2, "--save_dir", split, devices=8)
    assert_close(losses(split), losses(whole), 3)
    assert (split / FILE).read_bytes() == (whole / FILE).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"codec": f"kl:{GOLDEN / 'vae_tiny'}", "dataset_name": "COLOUR", "model.patch_size": 1},
            r"encodes images on the devices.*encode_latents",
        ),
        ({"objective.name": "diffusion"}, "--objective.name=diffusion needs noise that is independent"),
        ({"augment": ["rotate"]}, "--augment=rotate changes images after they are coupled"),
        ({"coupling_rows": 48}, r"--coupling_rows=48 has to divide the batch \(--batch_size=64\), or be a multiple"),
        ({"coupling_weight": 1.0}, "--coupling_weight=1: classes are coupled each by itself"),
        ({"coupling_draws": 5}, "--coupling_draws=5 has no effect with --coupling=minibatch, only with semidiscrete"),
        ({"coupling": "semidiscrete", "coupling_rows": 8}, "--coupling_rows=8 has no effect with --coupling=semidisc"),
        ({"coupling": "none", "coupling_weight": 1.0}, "--coupling_weight=1.0 has no effect with --coupling=none"),
        (
            {"coupling": "semidiscrete", "dataset_name": "NUMBERS"},
            "images of a class, but the data have conditions c0, c1",
        ),
    ],
)
def test_what_cannot_be_coupled_is_refused(tmp_path, settings, message):
    rng = np.random.default_rng(0)
    arrays = {
        "COLOUR": {"images": rng.integers(0, 255, (20, 16, 16, 3), np.uint8)},
        "NUMBERS": {"images": rng.integers(0, 255, (90, 8, 8, 1), np.uint8), "conditions": rng.normal(size=(90, 2))},
    }.get(settings.get("dataset_name"))
    if arrays:
        np.savez(tmp_path / "data.npz", **arrays)
        settings = {**settings, "dataset_name": f"npz:{tmp_path / 'data.npz'}", "model.num_classes": 1}
    with pytest.raises(UserError, match=message):
        make_run(tmp_path / "run", **{"coupling": "minibatch", **settings})
