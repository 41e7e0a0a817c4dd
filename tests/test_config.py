"""Flags, presets and the refusals of impossible values, each naming value, flag and fix."""

import copy
import dataclasses
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import pytest

import compute_fid_stats
import encode_latents
import eval_fid
import train_flow
from utils.base.files import check_free_space, prepare_output_folder
from utils.base.mesh import check_batch_size, make_mesh
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.codecs.codecs import CodecSpec, describe_codec
from utils.conditions.classes import ClassCondition
from utils.data.dataset import DataOptions
from utils.flags import reading
from utils.flags.effects import RULES, check_effects
from utils.flags.run import read_run_config
from utils.networks.models import init_params, make_model
from utils.networks.network import NetworkConfig
from utils.networks.state import EmaSchedule
from utils.objectives.flow_matching import FlowMatching
from utils.runs.config import RunConfig
from utils.runs.saved_config import read_config
from utils.sampling.generator import RECIPE_BATCH_SIZE
from utils.sampling.samplers import can_guide, guidance_scale
from utils.sampling.solvers import SamplerConfig
from utils.training.configure import translate_spellings
from utils.training.start import check_settings

DIT_B = "--model.depth 12 --model.hidden_size 768 --model.patch_size 2 --model.num_heads 16 --model.mlp_ratio 4"


@pytest.fixture
def parse(read_flags):
    """parse('--flag value ...') -> configuration of train_flow, or of another program."""
    return lambda line, program=train_flow: read_flags(program, line.split())


@pytest.fixture
def config_of(configure):
    """config_of('--flag value ...') -> the configuration of that run."""
    return lambda line: configure(line.split())


def count_parameters(model: NetworkConfig) -> int:
    """Counted of one block and of two: the others are like the second."""
    one, two = (count_shallow(dataclasses.replace(model, depth=depth)) for depth in (1, 2))
    return one + (model.depth - 1) * (two - one)


def count_shallow(model: NetworkConfig, shape=(32, 32, 4)) -> int:
    image_model = make_model(model, FlowMatching(), PixelCodec(), make_mesh(), shape, ClassCondition(("a",)))
    shapes = jax.eval_shape(lambda key: init_params(image_model, key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_defaults_are_the_recipe(config_of, parse):
    config = config_of("")
    recipe = {
        "dataset_name": "imagenet256", "log_interval": 1000, "eval_interval": 50_000, "save_interval": 200_000,
        "batch_size": 256, "max_steps": 1_000_000,
    }  # fmt: skip
    recipe_model = {
        "lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "hidden_size": 64, "patch_size": 8, "depth": 2, "num_heads": 2,
        "mlp_ratio": 1, "class_dropout_prob": 0.1, "num_classes": 1000, "denoise_timesteps": 32, "cfg_scale": 4.0,
        "target_update_rate": 0.9999, "t_sampler": "logit_normal", "t_conditioning": 1, "preset": "debug",
        "use_stable_vae": 1,
    }  # fmt: skip
    assert recipe.items() <= config.to_json().items()
    assert recipe_model.items() <= config.to_json()["model"].items()
    assert config.wandb.project == "flow"
    assert config.wandb.name == "flow_imagenet256"
    assert {"use_cfg": 1, "num_samples": 50_000}.items() <= parse("", eval_fid).to_dict().items()
    assert RECIPE_BATCH_SIZE == 128
    assert reading.read_samplers(parse("", eval_fid), 0.1) == [SamplerConfig(500, 4.0)]


# Width, patch, depth, heads, MLP ratio of the recipe and of arXiv:2212.09748, table 1, with that table's millions of
# parameters (on latents of 32x32x4; theirs includes a learned sigma).
@pytest.mark.parametrize(
    ("preset", "sizes", "millions"),
    [
        ("debug", (64, 8, 2, 2, 1), None),
        ("big", (768, 2, 12, 12, 4), 130),
        ("semilarge", (1024, 2, 22, 16, 4), None),
        ("large", (1024, 2, 24, 16, 4), 458),
        ("xlarge", (1152, 2, 28, 16, 4), 675),
        ("DiT-S/2", (384, 2, 12, 6, 4), 33),
        ("DiT-B/4", (768, 4, 12, 12, 4), 130),
        ("DiT-L/8", (1024, 8, 24, 16, 4), 459),
        ("DiT-XL/2", (1152, 2, 28, 16, 4), 675),
    ],
)
def test_presets(config_of, preset, sizes, millions):
    model = config_of(f"--model.preset {preset}").model
    assert (model.hidden_size, model.patch_size, model.depth, model.num_heads, model.mlp_ratio) == sizes
    if millions:
        assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_big_preset_has_the_recipes_parameters(config_of):
    """But for the position table, which jax-flow counts and which is a constant here."""
    assert count_parameters(config_of("--model.preset big").model) == 130_500_112 - 196_608


def test_explicit_flags_win_over_the_preset_whatever_their_order(config_of):
    for line in ("--model.preset big --model.depth 3", "--model.depth 3 --model.preset big"):
        model = config_of(line).model
        assert (model.depth, model.hidden_size, model.num_heads) == (3, 768, 12)
    # Also where the value given is the flag's default.
    assert config_of("--model.preset big --model.depth 2").model.depth == 2


def test_recipe_commands_are_dit_b(config_of):
    model = config_of(f"--dataset_name imagenet256 --wandb.name DiT-B {DIT_B} --batch_size 512").model
    assert count_parameters(model) == 130_500_112 - 196_608
    pixels = config_of(f"{DIT_B.replace('patch_size 2', 'patch_size 8')} --use_stable_vae 0")
    assert pixels.codec.text == "pixels"
    assert pixels.model.patch_size == 8


def test_spellings_of_the_codec(config_of):
    for line in ("--codec pixels", "--use_stable_vae 0", "--model.use_stable_vae=0 --use_stable_vae=0"):
        content = config_of(line).to_json()
        assert (content["codec"], content["vae"], content["model"]["use_stable_vae"]) == ("pixels", None, 0)
    for line in ("--codec kl:x", "--vae x", "--codec kl --vae x", "--use_stable_vae 1 --codec kl:x"):
        content = config_of(line).to_json()
        assert (content["codec"], content["vae"], content["model"]["use_stable_vae"]) == ("kl:x", "x", 1)
    for line, message in {
        "--codec pixels --use_stable_vae 1": "--use_stable_vae=1 contradicts --codec=pixels; give one",
        "--codec kl:x --model.use_stable_vae 0": "--model.use_stable_vae=0 contradicts --codec=kl:x; give one",
        "--vae kl:y": "--vae=kl:y: --vae takes what follows kl: in --codec; give --vae y",
        "--codec kl:x --vae y": "--vae=y contradicts --codec=kl:x; give one",
        "--codec pixels --vae y": "--vae=y contradicts --codec=pixels; give one",
        "--codec pixles": "--codec=pixles is unknown; did you mean pixels?",
        "--codec pixels:x": "--codec=pixels:x: use pixels",
        "--codec kl:": "--codec=kl:: use kl:PATH_OR_HUB",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            config_of(line)
    with pytest.raises(UserError, match="contradicts"):
        config_of("--model.use_stable_vae 0 --use_stable_vae 1")


def test_wandb_mode(config_of, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert config_of("").wandb.mode == "online"
    assert config_of("--wandb.offline").wandb.mode == "offline"
    assert config_of("--wandb.mode disabled").wandb.mode == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert config_of("").wandb.mode == "offline"
    assert config_of("--wandb.mode disabled").wandb.mode == "disabled"
    with pytest.raises(UserError, match="contradicts"):
        config_of("--wandb.offline --wandb.mode online")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--model.depht 3", ["model.depht", "model.depth"]),
        ("--batch_sise 3", ["batch_sise", "batch_size"]),
        ("--model.depth three", ["model.depth", "three"]),
        ("--model.depth 0", ["model.depth", "0"]),
        ("--model.preset huge", ["model.preset", "huge", "xlarge"]),
        ("--model.t_sampler cosine", ["t_sampler", "cosine", "uniform"]),
        ("--model.class_dropout_prob 1.5", ["class_dropout_prob", "1.5"]),
        ("--model.dtype float16", ["model.dtype", "float16", "bfloat16"]),
        ("--sharding pp", ["sharding", "pp", "fsdp"]),
        ("digits", ["digits", "--name value"]),
    ],
)
def test_unreadable_flags_are_refused_in_one_line(parse, line, words):
    with pytest.raises(UserError) as error:
        parse(line)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--model.patch_size 3", ["--model.patch_size=3", "32x32", "1, 2, 4, 8, 16, 32"]),
        ("--model.hidden_size 64 --model.num_heads 5", ["--model.num_heads=5", "--model.hidden_size=64", "4 heads"]),
        ("--model.hidden_size 66 --model.num_heads 2", ["--model.hidden_size=66", "68"]),
        ("--model.cfg_scale -2", ["--model.cfg_scale=-2", "-1"]),
        ("--model.mlp_ratio 0", ["--model.mlp_ratio=0"]),
        ("--model.beta2 1", ["--model.beta2=1"]),
    ],
)
def test_impossible_models_are_refused(config_of, line, words):
    with pytest.raises(UserError) as error:
        config_of(line).model.check((32, 32, 4))
    assert all(word in str(error.value) for word in words), error.value


def test_options_of_the_data_are_those_of_the_flags(config_of, parse):
    line = "--data_dir x --image_size 24x40 --image_mode L --broken_images skip --max_megapixels 3 --random_flip 0"
    line += " --check_images 0 --dataset_weights 1,2"
    expected = DataOptions(
        "x", "24x40", "skip", 3.0, False, image_mode="L", check_images=False, dataset_weights=(1.0, 2.0)
    )
    data = config_of(f"--dataset_name folder:x --dataset_name zip:y {line}").data
    assert (data.dataset_name, data.options) == ("folder:x + zip:y", expected)
    assert reading.read_data_options(parse("--data_dir x", compute_fid_stats)) == DataOptions("x")


def test_batch_size_must_divide():
    with pytest.raises(UserError, match=r"--batch_size=10 does not divide over 4 devices; use a multiple of 4"):
        check_batch_size(10, 4)
    check_batch_size(12, 4)


def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--save_dir"):
        prepare_output_folder(tmp_path / "file" / "run", "save_dir")


def test_files_larger_than_the_free_space_are_refused_before_work(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_free_space(tmp_path / "x.npz", "out", free // 2)
    with pytest.raises(UserError, match=r"--out=.*x.npz takes up to [\d,]+ bytes, but [\d,]+ are free there; make"):
        check_free_space(tmp_path / "x.npz", "out", 2 * free)


def test_processes_that_look_at_one_folder_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: prepare_output_folder(tmp_path / "run", "save_dir"), range(400)))
    assert not os.listdir(tmp_path / "run")


def test_run_folder_is_named_after_the_run(config_of):
    assert str(config_of("--dataset_name folder:/data/cats").folder) == "runs/flow_folder_data_cats"
    assert str(config_of("--save_dir /tmp/x").folder) == "/tmp/x"


def test_legacy_values_end_at_the_flags():
    assert guidance_scale(-1) is None
    assert guidance_scale(1) is None
    assert guidance_scale(0) == 0
    assert EmaSchedule.of_run({"model": {"target_update_rate": 0.9999}}) == EmaSchedule(0.9999, has_warmup=False)
    assert EmaSchedule.of_run({"model": {"target_update_rate": 1}, "ema_warmup": 1}) == EmaSchedule(
        0.0, has_warmup=True
    )


def test_sweeps_are_every_scale_and_step_count_once(parse):
    line = "--denoise_timesteps 20,5,20 --cfg_scale 1,4,-1 --solver heun --cfg_interval 0.1,0.9"
    common = {"cfg_interval": (0.1, 0.9), "solver": "heun"}
    expected = [SamplerConfig(steps, scale, **common) for scale in (None, 4.0) for steps in (20, 5)]
    assert reading.read_samplers(parse(line, eval_fid), 0.1) == expected
    assert reading.read_samplers(parse("--use_cfg 0 --cfg_scale 4", eval_fid), 0.1) == [SamplerConfig(500, None)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--denoise_timesteps 20,x", "--denoise_timesteps=20,x: give numbers separated by commas, such as 100,20,5"),
        ("--denoise_timesteps 20,0", "--denoise_timesteps=0: use a whole number from 1"),
        ("--cfg_scale 1,-3", "--cfg_scale=-3: use a scale from 0 to 1000"),
        ("--cfg_interval 0.5", "--cfg_interval=0.5: give first and last time"),
        ("--cfg_interval 0.9,0.1", "--cfg_interval=0.9,0.1: give first and last time"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(parse, line, message):
    with pytest.raises(UserError, match=message):
        reading.read_samplers(parse(line, eval_fid), 0.1)


def test_a_tilde_is_expanded_once_in_every_path(parse, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ("save_dir", "load_dir", "data_dir", "vae", "profile", "fid_stats", "inception_weights", "dataset_name")
    config = parse(" ".join(f"--{name}=~/x" for name in paths))
    assert {config[name] for name in paths} == {f"{tmp_path}/x"}
    assert parse("--codec=kl:~/x").codec == f"kl:{tmp_path}/x"
    for prefix in ("folder", "latents"):
        assert parse(f"--dataset_name={prefix}:~/x").dataset_name == f"{prefix}:{tmp_path}/x"
    for program, names in {
        eval_fid: ("load_dir", "samples", "fid_stats", "out", "save_samples", "inception_logits", "inception_weights"),
        compute_fid_stats: ("images", "out", "inception_weights", "data_dir"),
        encode_latents: ("out", "vae", "data_dir"),
    }.items():
        config = parse(" ".join(f"--{name} ~/x" for name in names), program)
        assert {config[name] for name in names} == {f"{tmp_path}/x"}
    assert parse("--dataset_name folder:~/a:b").dataset_name == f"folder:{tmp_path}/a:b"
    assert parse("--save_dir runs/a~b --dataset_name tfds:x").save_dir == "runs/a~b"
    with pytest.raises(UserError, match=r"--save_dir=~nobody-here/x: there is no home folder for ~nobody-here"):
        parse("--save_dir ~nobody-here/x")


@pytest.mark.parametrize(
    ("program", "line", "message"),
    [
        (eval_fid, "--load_dir x --model.cfg_scale 2", "--model.cfg_scale=2.0 has no effect .*--cfg_scale says it"),
        (
            eval_fid,
            "--load_dir x --model.denoise_timesteps 2",
            "--model.denoise_timesteps=2 .*--denoise_timesteps",
        ),
        (eval_fid, "--samples x --cfg_scale 2,4", "--cfg_scale=2,4 has no effect on --samples"),
        (eval_fid, "--samples x --model.depth 2", "--model.depth=2 has no effect on --samples"),
        (eval_fid, "--samples x --seed 2", "--seed=2 has no effect on --samples"),
        (eval_fid, "--load_dir x --fid_stats y --dataset_name z", "--dataset_name=z has no effect beside --fid_stats"),
        (train_flow, "--fid_samples 10", "--fid_samples=10 has no effect without --fid_stats"),
        (train_flow, "--convention adm", "--convention=adm has no effect without --fid_stats"),
        (train_flow, "--use_stable_vae 0 --vae x", "--vae=x has no effect on pixels"),
        (train_flow, "--dataset_name digits --broken_images skip", "--broken_images=skip has no effect on digits"),
    ],
)
def test_flags_without_effect_are_refused(parse, program, line, message):
    config = parse(line, program)
    refuse = read_run_config if program is train_flow else partial(check_effects, RULES[program.__name__])
    with pytest.raises(UserError, match=message):
        refuse(config)


@pytest.mark.parametrize(
    ("name", "is_said"), [("digits", True), ("npz:x", True), ("tfds:x", False), ("cifar10", False)]
)
def test_a_data_dir_that_nothing_reads_is_said(parse, name, is_said, capfd):
    parse(f"--dataset_name {name} --data_dir /x")
    reading.check_data_flags(name)
    assert (f"--data_dir=/x has no effect on {name}" in capfd.readouterr().err) == is_said


@pytest.mark.parametrize(
    "line", ["--model.depth 3", "--model.lr 1", "--model.t_conditioning 0", "--model.preset big", "--use_stable_vae 0"]
)
def test_eval_takes_the_models_values_from_the_run(config_of, parse, line):
    saved = config_of("").to_json()["model"]
    parse(line, eval_fid)
    with pytest.raises(UserError, match=f"{line.replace(' ', '=')}.*, but the run of --load_dir has .*; leave "):
        reading.override_model(saved)
    parse("--model.dtype float32 --model.depth 2", eval_fid)
    assert reading.override_model(saved).dtype == "float32"


def test_guidance_needs_both_kinds_of_labels(parse, capsys):
    assert [can_guide(prob) for prob in (0, 0.1, 1)] == [False, True, False]
    assert reading.read_samplers(parse("", eval_fid), 0) == [SamplerConfig(500, None)]
    assert "drawn without guidance" in capsys.readouterr().out
    assert reading.read_samplers(parse("--cfg_scale 1,-1", eval_fid), 1) == [SamplerConfig(500, None)]
    with pytest.raises(UserError, match=r"--cfg_scale=4: with --model.class_dropout_prob=0 the model"):
        reading.read_samplers(parse("--cfg_scale 1,4", eval_fid), 0)


# What a run keeps for its life (but for --model.network, of which there is one), with another value of each.
KEPT = """
    model.patch_size=4 model.hidden_size=128 model.depth=5 model.num_heads=4 model.mlp_ratio=2
    model.class_dropout_prob=0.9 model.num_classes=7 model.t_conditioning=0 model.timestep_scale=1
    model.step_conditioning=1 model.learned_positions=1 model.learn_sigma=1 model.norm=rms model.mlp=swiglu model.rope=1
    model.qk_norm=1 codec=pixels model.t_sampler=uniform objective.distill=1 batch_size=8 seed=1
    debug_overfit=1 freeze=blocks lora_rank=2 warmup_steps=3 weight_decay=0.1 grad_clip=1 lr_schedule=cosine
    optimizer=muon
""".split()  # noqa: SIM905 (flags, as one types them)


@pytest.fixture
def record(parse):
    """record('--flag value ...', name=value) -> what a run of that command line saves, with such a data set."""

    def make(line, **data):
        values = reading.flatten(parse(line))
        given = {name: value for name, value in values.items() if reading.is_explicit(name) and value is not None}
        config = RunConfig.from_settings(translate_spellings(given))
        facts = {
            "name": "x",
            "image_shape": [64, 64, 3],
            "class_names": ["a"],
            **describe_codec(config.codec.spec, None),
        }
        return config.to_json() | {"dataset": facts | data}

    return make


@pytest.mark.parametrize("flag", KEPT)
def test_what_a_run_keeps_cannot_be_another_when_it_resumes(record, tmp_path, flag):
    saved, changed = (record(line) for line in ("--save_dir x", f"--save_dir x --{flag}"))
    name = re.escape(flag.partition("=")[0])
    what = rf"(with --{name}=\S+, not \S+: give that value|without --{name}, not \S+: leave it out)"
    with pytest.raises(UserError, match=f"holds a run {what}"):
        check_settings(changed, saved, tmp_path)
    with pytest.raises(UserError, match=f"--{name}="):  # and back
        check_settings(saved, changed, tmp_path)


@pytest.mark.parametrize("flag", ["objective.distill=1", *KEPT[KEPT.index("freeze=blocks") :]])
def test_a_run_from_before_a_flag_keeps_its_default(record, tmp_path, flag):
    saved, changed = (record(line) for line in ("--save_dir x", f"--save_dir x --{flag}"))
    group, _, name = flag.partition("=")[0].rpartition(".")
    before = copy.deepcopy(saved)
    del (before[group] if group else before)[name]
    before = read_config(before)
    assert check_settings(saved, before, tmp_path) == {}
    with pytest.raises(UserError, match=f"--{re.escape(flag.partition('=')[0])}[=,]"):  # with another, or without
        check_settings(changed, before, tmp_path)


def test_another_objective_source_or_vae_does_not_resume(record, tmp_path):
    vae = describe_codec(CodecSpec("kl", "some/vae"), "0")
    saved = record("--save_dir x", **vae)
    check_settings(record("--save_dir x --max_steps 5 --model.lr 1", **vae), saved, tmp_path)
    same = "--model.timestep_scale 10000 --model.step_conditioning 0"  # of which a shortcut model has other defaults
    for line, name in (
        (f"--objective.name shortcut {same}", "objective.name=flow_matching, not shortcut"),
        ("--load_dir another/run", "load_dir=another/run"),
    ):
        with pytest.raises(UserError, match=name):
            check_settings(record(line, **vae), saved, tmp_path)
    with pytest.raises(UserError, match="--codec=kl:some/vae, not kl:other/vae"):
        check_settings(record("--save_dir x", **describe_codec(CodecSpec("kl", "other/vae"), "1")), saved, tmp_path)
    check_settings(record("", **describe_codec(CodecSpec("kl", "copy"), "0")), saved, tmp_path)


def samplers(words: str, parse):
    config = parse(words, eval_fid)
    return reading.read_samplers(config, 0.1)


def test_adaptive_solvers_and_time_grids_are_read(parse):
    (adaptive,) = samplers("--solver dopri5 --rtol 1e-3 --cfg_scale 2 --cfg_channels 3", parse)
    assert (adaptive.is_adaptive, adaptive.rtol, adaptive.cfg_channels, adaptive.nfe) == (True, 1e-3, 3, None)
    (shifted,) = samplers("--time_grid shift:3 --denoise_timesteps 8", parse)
    assert (shifted.time_shift, shifted.nfe) == (3, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--solver dopri5 --denoise_timesteps 8", r"--denoise_timesteps=8 has no effect with --solver=dopri5"),
        ("--rtol 1e-3", r"--rtol=0.001 has no effect with --solver=euler"),
        ("--cfg_scale 1 --cfg_channels 3", r"--cfg_channels=3 has no effect without guidance"),
        ("--time_grid shift", r"--time_grid=shift: use uniform, or shift:S"),
        ("--time_grid shift:0", r"--time_grid=shift:0: use uniform"),
    ],
)
def test_flags_of_other_solvers_are_refused(parse, words, message):
    with pytest.raises(UserError, match=message):
        samplers(words, parse)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr 1e-3", r"--lr is not a flag here: the learning rate is --model.lr"),
        ("--epochs=3", r"--epochs .* use --max_steps"),
        ("--learning-rate 1", r"--model.lr"),
        ("--nowandb", r"use --wandb.mode online, offline or disabled"),
        ("--depth 3", r"--depth is not a flag here: use --model.depth"),
        ("--resume", r"the same command again continues a run"),
        ("--max_steps 1.5", r"1.5 is no whole number"),
        ("--max_steps many", r"many is no whole number"),
        ("--max_steps 1e300", r"1e300 is no whole number"),
        ("--batch_size True", r"True is no whole number"),
        ("--model.depht 3", r"--model.depht is not a flag here; did you mean --model.depth\? \(--help lists"),
    ],
)
def test_what_others_call_it_is_answered_with_the_flag(parse, words, message):
    with pytest.raises(UserError, match=message):
        parse(words)


def test_numbers_are_understood_as_people_write_them(parse):
    config = parse("--max_steps 1e3 --debug_overfit True --use_stable_vae False --random_flip=false")
    assert (config.max_steps, config.debug_overfit, config.use_stable_vae, config.random_flip) == (1000, 1, 0, 0)
    assert [sampler.num_steps for sampler in samplers("--denoise_timesteps 1e2,20", parse)] == [100, 20]


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_by_topic_and_hides_what_is_only_refused(read_flags, capsys, word):
    with pytest.raises(SystemExit) as end:
        read_flags(eval_fid, [word])
    assert end.value.code == 0
    output = capsys.readouterr().out
    titles = re.findall(r"^(\w.*):$", output, re.MULTILINE)
    assert titles[:5] == ["What is scored", "Reference", "Memorisation", "Output", "Sampling"]
    assert "--model.dtype:" in output
    assert "--model.lr:" not in output
    assert max(map(len, output.splitlines())) <= 120


def test_a_loaded_run_is_the_same_however_it_is_written(parse, tmp_path):
    recorded = {"dataset": describe_codec(CodecSpec("kl"), None)}
    saved = parse("--load_dir runs/a").to_dict() | recorded
    for same in ("runs/a/", "runs/a/checkpoints", "./runs/a"):
        assert check_settings(parse(f"--load_dir {same}").to_dict() | recorded, saved, tmp_path) == {}
    with pytest.raises(UserError, match="did not start from there"):
        check_settings(parse("--load_dir runs/a/checkpoints/20").to_dict() | recorded, saved, tmp_path)
