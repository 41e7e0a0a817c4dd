"""Power-function EMAs: golden numbers, training steps, snapshots on disk, and EMAs of other widths made of them."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

import eval_fid
import sample
from diffusion_transformer import DiTConfig
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition
from utils.convert.sources import read_source
from utils.data.dataset import PixelBatch
from utils.images import plotting
from utils.networks import posthoc_ema
from utils.networks.lora import add_lora, merge_lora
from utils.networks.models import Network
from utils.networks.posthoc_ema import (
    expected_error,
    fit_average,
    fit_weights,
    gamma_of,
    inner_product,
    parse_params,
    parse_profiles,
    update_profiles,
)
from utils.networks.state import EmaSchedule, create_train_state, young_ema_hint
from utils.objectives.flow_matching import FlowMatching
from utils.runs import ema_snapshots, run_evaluation
from utils.runs.checkpoint import Checkpoints
from utils.runs.ema_snapshots import EmaSnapshots, list_snapshots, reconstruct, snapshot_interval
from utils.runs.export import export_run
from utils.runs.opening import load_generator
from utils.runs.results import Results
from utils.sampling.generator import ImageGenerator
from utils.training import build_run, make_config, train
from utils.training.start import check_settings
from utils.training.step import train_step

WIDTHS = ("0.05", "0.1")


def distance(a, b) -> float:
    return float(np.sqrt(sum(np.square(x - y).sum() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))))


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- Formulas ---


@pytest.fixture(scope="module")
def posthoc(shared):
    return dict(np.load(shared / "golden" / "more" / "posthoc_small.npz"))


# Errors over the EMA's distance from the last parameters, as the reference has them.
@pytest.mark.parametrize(
    ("width", "error"), [("0.05", 1e-14), ("0.075", 6e-4), ("0.1", 1e-14), ("0.15", 1e-3), ("0.2", 3e-3)]
)
def test_golden_reconstructions(posthoc, width, error):
    steps, gammas = posthoc["snapshot_steps"].astype(float), posthoc["snapshot_gammas"]
    gamma, expected, reconstructed, direct = (
        posthoc[f"sigma_{width}/{name}"] for name in ("gamma", "weights", "reconstructed", "direct")
    )
    assert gamma_of(float(width)) == pytest.approx(gamma, rel=1e-12)
    weights = fit_weights(steps, gammas, 2048, gamma_of(float(width)))
    np.testing.assert_allclose(weights, expected, atol=1e-9)
    np.testing.assert_allclose(weights @ posthoc["snapshots"], reconstructed, atol=1e-9)
    last = posthoc["theta"][-1]
    assert distance(weights @ posthoc["snapshots"], direct) <= error * distance(direct, last)
    np.testing.assert_allclose(weights @ posthoc["snapshots"], direct, atol=1e-9 if error < 1e-9 else 0.01)


def test_profiles_are_updated_as_the_reference_has_them(posthoc):
    with jax.enable_x64(True):
        theta = jnp.asarray(posthoc["theta"])

        def update(profiles, step):
            profiles = update_profiles(profiles, theta[step], step)
            return profiles, profiles

        # They start anywhere: the first update replaces that.
        start = dict.fromkeys(WIDTHS, jnp.zeros(8, theta.dtype))
        _, run = jax.lax.scan(update, start, jnp.arange(1, 2049))
        for place, (step, gamma) in enumerate(zip(posthoc["snapshot_steps"], posthoc["snapshot_gammas"], strict=True)):
            width = WIDTHS[0] if gamma > 10 else WIDTHS[1]
            np.testing.assert_allclose(run[width][step - 1], posthoc["snapshots"][place], rtol=1e-10)


@pytest.mark.parametrize("step", [1, 2, 1000, 10**6])
def test_float32_updates_late_in_a_run_are_exact(step):
    (ema,) = update_profiles({"0.05": jnp.float32(0)}, jnp.float32(1), jnp.int32(step)).values()
    gamma = np.longdouble(gamma_of(0.05))
    assert float(ema) == pytest.approx(float(1 - (1 - np.longdouble(1) / step) ** (gamma + 1)), rel=1e-6)


@pytest.mark.parametrize(
    ("t_a", "g_a", "t_b", "g_b"), [(1.0, 17.0, 2.0, 7.0), (3.0, 2.0, 2.0, 17.0), (2.0, 7.0, 2.0, 7.0)]
)
def test_inner_products_are_integrals_over_the_steps_of_both(t_a, g_a, t_b, g_b):
    times = (np.arange(200_000) + 0.5) * 4 / 200_000
    profiles = [np.where(times < t, (g + 1) * times**g / t ** (g + 1), 0) for t, g in ((t_a, g_a), (t_b, g_b))]
    expected = np.prod(profiles, axis=0).sum() * 4 / 200_000
    assert inner_product(t_a, g_a, t_b, g_b) == pytest.approx(expected, rel=1e-3)


def test_what_does_not_change_is_its_own_average_at_every_width():
    steps = np.repeat(np.arange(1.0, 17), 2)
    gammas = np.tile([gamma_of(0.05), gamma_of(0.1)], 16)
    for width in (0.03, 0.07, 0.2, 0.28):
        assert fit_average(steps, gammas, 16, gamma_of(width)).sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(fit_average(steps, gammas, 16, gamma_of(0.1)), np.eye(32)[-1], atol=1e-9)


def test_the_expected_error_is_that_of_parameters_that_walk_at_random():
    steps = np.repeat(np.arange(64.0, 513, 64), 2)
    gammas = np.tile([gamma_of(0.05), gamma_of(0.1)], 8)
    walk = np.random.default_rng(0).standard_normal((513, 4000)).cumsum(0)
    n = np.arange(1, 513)

    def average(end, gamma):  # the weights of all parameters up to `end`
        weights = np.diff((np.arange(end + 1) / end) ** (gamma + 1))
        return weights @ walk[n[:end]]

    snapshots = np.array([average(int(end), gamma) for end, gamma in zip(steps, gammas, strict=True)])
    for width in (0.03, 0.07, 0.2):
        weights = fit_average(steps, gammas, 512, gamma_of(width))
        direct = average(512, gamma_of(width))
        error = distance(weights @ snapshots, direct) / distance(direct, walk[-1])
        assert expected_error(steps, gammas, weights, 512, gamma_of(width)) == pytest.approx(error, rel=0.15)


def test_widths_have_one_spelling():
    assert parse_profiles("0.10,0.05,.1") == parse_profiles(["0.1", "5e-2"]) == ("0.05", "0.1")
    assert parse_profiles("") == parse_profiles(()) == ()
    assert (parse_params("ema"), parse_params("raw"), parse_params("ema:.080")) == ("ema", "raw", "ema:0.08")
    for value in (0.1, None, [0.1], {"0.1": 1}, "0.1;0.2", ["0.4"]):
        with pytest.raises(ValueError, match="use"):
            parse_profiles(value)
    for text in ("ema:", "ema:0", "ema:-0.1", "ema:0.3", "ema:nan", "ema:x", "raw:0.1", "emas", ""):
        with pytest.raises(ValueError, match="use"):
            parse_params(text)


# --- Training steps ---


class Sums(Network):
    """A network whose output is its input times the sum of its parameters; NaN for the class 9."""

    config = DiTConfig(class_dropout_prob=0.0, num_classes=10)
    condition = ClassCondition(num_classes=10)

    def apply(self, variables, x_t, t, labels):
        total = sum(leaf.sum() for leaf in jax.tree.leaves(variables["params"]))
        return x_t * jnp.where(labels == 9, jnp.nan, total)[:, None, None, None]


PARAMS = {"a": {"w": jnp.array([1.0, -2.0])}, "b": {"w": jnp.full(2**17 + 1, 0.01)}}  # one is packed, one is not


def run_steps(classes, frozen):
    """The states after each step, whose batches are of these classes."""
    optimizer = optax.sgd(0.1)
    static = {"model": Sums(), "objective": FlowMatching(), "optimizer": optimizer, "grad_accum": 1, "frozen": frozen}
    static |= {"ema": EmaSchedule(0.9), "skips_nonfinite": True}
    step = jax.jit(partial(train_step, **static))
    states = [create_train_state(PARAMS, optimizer, jax.random.key(0), WIDTHS, frozen)]
    for label in classes:
        batch = PixelBatch(condition=jnp.full(4, label), image=jnp.zeros((4, 2, 2, 1), jnp.uint8))
        states.append(step(states[-1], batch, PixelCodec(), False)[0])
    kept, _ = step(states[-1], batch, PixelCodec(), True)
    assert_equal(kept.ema_profiles, states[-1].ema_profiles)  # validation changes nothing
    return states[1:]


@pytest.mark.parametrize(("classes", "frozen"), [((1, 9, 9, 1, 1), ()), ((9, 1), ("b",))])
def test_a_step_averages_the_trained_parts_over_all_steps(classes, frozen):
    # A step that is left out, of class 9, counts with the parameters that it has kept.
    states = run_steps(classes, frozen)
    last = states[-1].ema_profiles
    assert set(last) == set(WIDTHS)
    for width, ema in last.items():
        assert set(ema) == {"a", "b"} - set(frozen)
        weights = np.diff((np.arange(len(states) + 1) / len(states)) ** (gamma_of(float(width)) + 1))
        for part in ema:
            trajectory = np.array([state.params[part]["w"] for state in states], np.float64)
            np.testing.assert_allclose(ema[part]["w"], weights @ trajectory, rtol=1e-5)


def test_without_profiles_the_state_and_the_step_have_nothing_of_them():
    state = create_train_state(PARAMS, optax.sgd(0.1), jax.random.key(0))
    assert jax.tree.leaves(state.ema_profiles) == []
    assert len(jax.tree.leaves(state)) == 6


# --- Snapshots ---


def test_the_interval_doubles_where_there_would_be_too_many():
    found = {step: snapshot_interval(step, 4) for step in (1, 200, 201, 400, 401, 800, 10**6)}
    assert found == {1: 50, 200: 50, 201: 100, 400: 100, 401: 200, 800: 200, 10**6: 50 * 2**13}
    for step in range(1, 3000, 7):
        assert 8 < step / snapshot_interval(step, 16) <= 16 or step <= 16 * 50


@pytest.fixture
def each_step(monkeypatch):
    monkeypatch.setattr(ema_snapshots, "FIRST_INTERVAL", 1)


def test_those_that_the_longer_interval_leaves_out_are_dropped(each_step, tmp_path):
    snapshots = EmaSnapshots(tmp_path, 4, 0)
    kept = {}
    for step in range(1, 14):
        if snapshots.is_due(step):
            snapshots.save({"0.1": {"w": np.full(3, step, np.float32)}}, step)
        snapshots.wait()
        kept[step] = list(list_snapshots(tmp_path))
    assert kept[4] == [1, 2, 3, 4]
    assert kept[5] == [1, 2, 3, 4]  # no file is dropped before its successor is there
    assert kept[6] == [2, 4, 6]
    assert kept[13] == [4, 8, 12]
    assert EmaSnapshots(tmp_path, 0, 0).is_due(4) is False

    # A run that goes on from step 8 takes the later steps again.
    (tmp_path / ema_snapshots.FOLDER / "notes.txt").touch()
    EmaSnapshots(tmp_path, 4, 8)
    assert list(list_snapshots(tmp_path)) == [4, 8]


def test_float16_keeps_eleven_bits_whatever_the_range(tmp_path):
    x = np.float32([1e-30, -3.3e-31, 5e-33, 0])
    for scale in (1, 1e35, 1e65):
        arrays = {"0.1/w": np.float32(x.astype(np.float64) * scale)}
        ema_snapshots.write_snapshot(tmp_path / "x.safetensors", arrays)
        stored = ema_snapshots.StoredSnapshot.open(tmp_path / "x.safetensors", {"0.1/w": (4,)})
        np.testing.assert_allclose(stored.read("0.1/w"), arrays["0.1/w"], rtol=2**-11)


def test_a_full_disk_ends_no_training(each_step, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ema_snapshots, "write_snapshot", fail)
    snapshots = EmaSnapshots(tmp_path, 4, 0)
    snapshots.save({"0.1": {"w": np.ones(3, np.float32)}}, 1)
    snapshots.wait()
    assert "No space left on device; training goes on without this snapshot" in capsys.readouterr().out


# --- A run ---

SETTINGS = {
    **{"dataset_name": "digits", "codec": "pixels", "batch_size": 8, "max_steps": 12, "save_interval": 6},
    **{"model.hidden_size": 8, "model.depth": 1, "model.num_heads": 1, "model.patch_size": 4, "model.num_classes": 10},
    **{"model.dtype": "float32", "model.lr": 1e-2, "eval_interval": 0, "wandb.mode": "disabled", "keep_last": 9},
    **{"ema_profiles": "0.1,0.05,0.075", "ema_snapshots": 8},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema_snapshots, "FIRST_INTERVAL", 1)
        train(build_run(make_config({**SETTINGS, "save_dir": folder})))
    return folder


def read_profiles(run_dir, step=12):
    checkpoints = Checkpoints(run_dir)
    return jax.tree.map(np.asarray, checkpoints.restore_stored(step, "ema_profiles"))


def test_a_resumed_run_has_the_profiles_and_snapshots_of_an_uninterrupted_one(run_dir, each_step, tmp_path):
    assert list(list_snapshots(run_dir)) == [2, 4, 6, 8, 10, 12]
    again = shutil.copytree(run_dir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "12")
    for file in list_snapshots(again).values():  # those after the checkpoint are of a run that went on otherwise
        if int(file.stem) > 6:
            file.write_bytes(b"")
    train(build_run(make_config({**SETTINGS, "save_dir": again})))
    assert_equal(read_profiles(again), read_profiles(run_dir))
    for (step, ours), theirs in zip(list_snapshots(again).items(), list_snapshots(run_dir).values(), strict=True):
        assert ours.read_bytes() == theirs.read_bytes(), step


def test_generators_have_any_width(run_dir, capsys):
    profiles = read_profiles(run_dir)
    raw = load_generator(run_dir, params="raw").params
    for width in ("0.05", "0.1", "0.10"):
        assert_equal(load_generator(run_dir, params=f"ema:{width}").params, profiles[f"{float(width):g}"])
    assert "error of about" not in capsys.readouterr().err

    # From the other two, the third.
    others = {width: profiles[width] for width in WIDTHS}
    read = ema_snapshots.StoredSnapshot.open
    shapes = {name: x.shape for name, x in flatten_dict(profiles, sep="/").items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema_snapshots.StoredSnapshot, "open", lambda path, _: read(path, shapes))
        made = reconstruct(run_dir, 12, 0.075, others, raw)
    assert distance(made, profiles["0.075"]) < 0.02 * distance(profiles["0.075"], raw)

    # Of an earlier checkpoint, from the snapshots before it alone.
    early = load_generator(run_dir / "checkpoints" / "6", params="ema:0.15").params
    with pytest.MonkeyPatch.context() as patch:
        files = list_snapshots(run_dir)
        patch.setattr(ema_snapshots, "list_snapshots", lambda _: {step: files[step] for step in (2, 4)})
        assert_equal(load_generator(run_dir / "checkpoints" / "6", params="ema:0.15").params, early)

    # Far from the profiles, users are told of the error.
    load_generator(run_dir, params="ema:0.02")
    assert "--params ema:0.02 at step 12: 5 snapshots in" in capsys.readouterr().err


def test_wiring_of_programs(run_dir, read_flags, tmp_path, monkeypatch, capsys):
    expected = load_generator(run_dir, params="ema:0.08").params
    seen = []

    def stop(generator, *_, **__):
        seen.append(generator.params)
        raise UserError("stop")

    monkeypatch.setattr(ImageGenerator, "conditions", stop)
    words = ["--load_dir", str(run_dir), "--params", "ema:.080", "--denoise_timesteps", "1", "--cfg_scale", "1"]
    with pytest.raises(UserError, match="stop"):
        sample.main(read_flags(sample, words))
    assert_equal(seen[0], expected)

    # An export is of one set of parameters, and knows of no profiles.
    (file,) = export_run(str(run_dir), tmp_path / "x.safetensors", "ema:0.08")
    export_run(str(run_dir), tmp_path / "raw.safetensors", "raw")
    published = read_source(str(file))
    np.testing.assert_array_equal(published.state["pos_embed"].size > 0, True)
    bias = "final_layer.linear.bias"
    np.testing.assert_array_equal(published.state[bias], expected["final_layer"]["dense"]["bias"])
    assert published.run["ema_profiles"] == []


def test_rows_of_several_widths_and_their_curve(run_dir, read_flags, tmp_path, monkeypatch):
    np.savez(tmp_path / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8))
    scored = []
    monkeypatch.setattr(
        run_evaluation.RunEvaluation,
        "evaluate",
        lambda self, sampler: scored.append(self.snapshot.params) or {"fid": len(scored), "nfe": 1},
    )
    drawn = []
    monkeypatch.setattr(plotting, "metric_curves", lambda points, **titles: drawn.append((points, titles)) or Figure())
    words = ["--load_dir", run_dir, "--fid_stats", tmp_path / "images.npz", "--metrics", "moments", "--out", tmp_path]
    words += ["--num_samples", 8, "--batch_size", 8, "--denoise_timesteps", 1, "--use_cfg", 0]
    words += ["--wandb.mode", "disabled", "--params", "ema:0.1,raw,ema:.05,ema"]
    for _ in range(2):  # the second call finds its rows again
        eval_fid.main(read_flags(eval_fid, list(map(str, words))))
    rows = Results(tmp_path).rows
    assert scored == ["ema:0.1", "raw", "ema:0.05", "ema"]
    assert [row.get("params") for row in rows] == ["ema:0.1", "raw", "ema:0.05", None]
    assert len({row["params_sha256"] for row in rows}) == 4
    assert drawn[0] == ({"FID": {"no guidance": [(0.05, 3), (0.1, 1)]}}, {"x_title": "width of the EMA"})
    assert (tmp_path / "by_ema.png").exists()
    for flag in ("ema:0.05,ema:.05", "ema:0.05,x"):
        with pytest.raises(UserError, match=r"--params=ema:0.05,"):
            eval_fid.read_params(flag.split(","))


def test_bad_input_ends_in_one_line(run_dir, configure, tmp_path):
    # Flags.
    words = ["--dataset_name", "digits", "--use_stable_vae", "0", "--save_dir", tmp_path / "new"]
    with pytest.raises(UserError, match=r"--ema_snapshots=8 has no effect without --ema_profiles"):
        configure([*words, "--ema_snapshots", "8"])
    with pytest.raises(
        UserError, match=r"--ema_profiles=.*0.4 is no width of an EMA; use one above 0 and up to 0\.289"
    ):
        make_config({**SETTINGS, "ema_profiles": ["0.4"]})
    with pytest.raises(UserError, match=r"--params=ema:x: 'x' is no width of an EMA; use a number such as 0.1"):
        load_generator(run_dir, params="ema:x")

    # A new run takes those of another's file.
    config = configure(["--config", run_dir / "config.json", "--save_dir", tmp_path / "new"])
    assert config.optimizer.ema_profiles == ("0.05", "0.075", "0.1")

    # A run is resumed with the profiles that it has.
    run = build_run(make_config({**SETTINGS, "save_dir": run_dir, "max_steps": 20}))
    without = "without --ema_profiles, not 0.05,0.075,0.1: leave it out"
    other = "with --ema_profiles=0.05, not 0.05,0.075,0.1: give that value"
    for theirs, said in (([], without), (["0.05"], other)):
        saved = {**run.record, "ema_profiles": theirs}
        with pytest.raises(UserError, match=f"holds a run {said}"):
            check_settings(run.record, saved, run_dir)

    # Files.
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    profiles, raw = read_profiles(copy), load_generator(copy, params="raw").params
    file = list_snapshots(copy)[10]
    content = file.read_bytes()
    for broken in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"snapshot .*10.safetensors is damaged .*restore it from a copy"):
            reconstruct(copy, 12, 0.12, profiles, raw)
    file.unlink()
    reconstruct(copy, 12, 0.12, profiles, raw)
    files = list_snapshots(copy) | {10: file}  # as where a training drops it while it is looked for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema_snapshots, "list_snapshots", lambda _: files)
        reconstruct(copy, 12, 0.12, profiles, raw)


def test_a_run_without_profiles_says_so_and_a_young_ema_names_them(run_dir):
    saved = Checkpoints(run_dir).restore_config(12)
    assert "; --params ema:0.1 takes an EMA that forgets them" in young_ema_hint(saved, 12)
    with pytest.raises(UserError, match=r"--params=ema:0.08: .* was trained without --ema_profiles"):
        ema_snapshots.take_average({}, "ema:0.08", Checkpoints(run_dir), 12, {**saved, "ema_profiles": []})
    assert posthoc_ema.width_of("raw") is posthoc_ema.width_of("ema") is None


def test_fine_tuned_factors_are_averaged_and_merged(run_dir, tmp_path):
    # As a run with LoRA has saved: profiles of what is trained alone.
    run = build_run(make_config({**SETTINGS, "save_dir": tmp_path}))
    params = add_lora(Checkpoints(run_dir).restore_stored(12, "params"), 2, jax.random.key(0))
    profiles = {width: {"lora": jax.tree.map(lambda x: x + float(width), params["lora"])} for width in WIDTHS}  # noqa: B023
    checkpoints = Checkpoints(tmp_path)
    items = {"params": params, "ema_params": params, "ema_profiles": profiles}
    checkpoints._save(3, items, {"config": {**run.record, "ema_profiles": list(WIDTHS), "lora_rank": 2}})
    checkpoints.wait()
    for width, expected in (("0.1", profiles["0.1"]), ("0.08", reconstruct(tmp_path, 3, 0.08, profiles, params))):
        made = load_generator(tmp_path, params=f"ema:{width}").params
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), made, merge_lora({**params, **expected}))
