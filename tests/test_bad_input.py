"""Bad input to every program: one line that names the flag and the value, before anything compiles. In-process, so that
a line of the tables costs next to nothing: add yours."""

import importlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags

import app
import compute_fid_stats
import convert_checkpoint
import encode_latents
import eval_fid
import likelihood
import make_pairs
import plot_metrics
import sample
import train_flow
from utils.base import devices
from utils.base.files import write_json
from utils.base.messages import UserError
from utils.data import pairs
from utils.data.dataset import DataOptions
from utils.data.loaders import load_dataset
from utils.flags import reading
from utils.flags.help import HABITS, find_answer, is_hidden, refuse_habits
from utils.runs.given import expand_path
from utils.runs.opening import load_generator
from utils.storage.urls import TAKE_REMOTE

PROGRAMS = {
    "train": (train_flow, "--dataset_name digits --use_stable_vae 0 --model.patch_size 2 --model.num_classes 10"),
    "eval": (eval_fid, ""),
    "encode": (encode_latents, "--out OUT --dataset_name digits"),
    "stats": (compute_fid_stats, "--out OUT/s.npz --dataset_name digits"),
    "plot": (plot_metrics, "--out OUT/curves.png"),
    "sample": (sample, "--load_dir x"),
    "app": (app, "--load_dir x"),
    "likelihood": (likelihood, "--load_dir x"),
    "pairs": (make_pairs, "--load_dir x --out OUT"),
    "export": (convert_checkpoint, "--load_dir x"),
    "import": (convert_checkpoint, "--source x"),
}
FLOATS = ("lr", "beta1", "beta2", "target_update_rate", "class_dropout_prob", "mlp_ratio", "cfg_scale")
COUNTS = ("hidden_size", "patch_size", "depth", "num_heads", "num_classes", "denoise_timesteps")
NO_FLOATS = ("nan", "inf", "-inf", "x")
NO_COUNTS = (0, -1, 3_000_000_000, "x")

BAD = [
    *(("train", f"--model.{name} {value}", f"model.{name}") for name in FLOATS for value in NO_FLOATS),
    *(("train", f"--model.{name} {value}", f"model.{name}") for name in COUNTS for value in NO_COUNTS),
    *(("train", f"--{name} nan", name) for name in ("save_minutes", "peak_tflops")),
    *(("app", f"--{name} -1", f"--{name}=-1") for name in ("port", "max_samples", "max_steps", "max_frames", "queue")),
    *(("app", f"--{name} 1000000", f"--{name}=1000000") for name in ("port", "max_samples", "max_steps", "max_frames")),
    ("app", "--host not.an.address.invalid", "--host=not.an.address.invalid is no address of this machine"),
    ("app", "--port 0", "--load_dir=x holds no checkpoint"),
    ("app", "--port 0 --params mean", "--params=mean"),
    ("app", "--dtype float16", "--dtype"),
    *(("train", f"--{name} 0", name) for name in ("log_interval", "save_interval", "keep_last", "grad_accum")),
    ("train", "--batch_size 0", "--batch_size=0: use 1"),
    *(("train", f"--{name} 2147483648", name) for name in ("max_steps", "batch_size", "save_interval", "fid_samples")),
    ("train", "--seed -1", "--seed=-1"),
    ("train", "--seed 4294967296", "--seed=4294967296: use a number from 0 to 4294967295"),
    ("train", "--batch_size 2000000000", "--batch_size=2000000000 of 8x8x1 images needs"),
    ("train", "--batch_size -4", "--batch_size=-4: use 1"),
    ("train", "--model.hidden_size 65536 --model.depth 1000", "--model.hidden_size=65536.*GiB"),
    ("train", "--model.num_classes 100000000 --model.hidden_size 4096", "--model.num_classes=100000000 has .*GiB"),
    ("train", "--model.mlp_ratio 0", "--model.mlp_ratio=0"),
    ("train", "--model.mlp_ratio -3", "model.mlp_ratio"),
    ("train", "--wandb.name ..", "--wandb.name=.. is no name for a folder"),
    ("train", "--wandb.name .", "--wandb.name=. is no name"),
    ("train", f"--wandb.name {'n' * 300}", "--wandb.name=n+ is no name"),
    ("train", f"--save_dir /tmp/{'n' * 300}", "--save_dir=/tmp/n+: a name of 1 to 255 bytes"),
    ("train", "--save_dir=", "--save_dir=: a name of 1"),
    ("train", "--save_dir /proc/x/y", "--save_dir=/proc/x/y cannot be written"),
    ("train", "--load_dir /no/such", "--load_dir=/no/such holds no checkpoint"),
    ("train", "--dataset_name folder:/no/such", "there is no folder"),
    ("train", "--dataset_name latents:/no/such", "holds no cached latents"),
    ("train", "--dataset_name tfds:no_such --data_dir /no/such", "no data set no_such under --data_dir=/no/such"),
    ("train", "--dataset_name npz:/no/such", "there is no file /no/such; name an npz with images"),
    ("train", "--dataset_name folder", "--dataset_name=folder is unknown"),
    ("train", "--image_size 16", "--image_size=16: the images of digits are 8x8"),
    ("train", "--image_size 100000", "image_size"),
    ("train", "--fid_stats /no/such", "--fid_stats=/no/such is not a file"),
    ("train", "--fid_stats OUT", "--fid_stats=.* is not a file"),
    ("train", "--vae x", "--vae=x has no effect on pixels"),
    *(("train", f"--save_dir {url}", f"--save_dir={url} is a URL, which is not supported; give a path on")
      for url in ("GS://bucket/run", "s3:/bucket/run", "s3:///run", "abfss://a@b.c/run", "file:///tmp/run")),
    ("train", "--fid_stats memory://bucket/none", "--fid_stats=memory://bucket/none: there is no such object"),
    ("sample", "--condition_file memory://bucket/a.npz", "--condition_file=memory://bucket/a.npz: there is no such"),
    ("sample", "--load_dir memory://bucket/none", "--load_dir=memory://bucket/none holds no checkpoint"),
    ("sample", "--out memory://bucket", "--out=memory://bucket: name an object or a folder in the bucket, such"),
    ("train", "--data_dir s3://bucket/tfds", "--data_dir=s3://bucket/tfds is a URL, .*, or gs://BUCKET/FOLDER"),
    ("train", "--load_dir hf://user/name", "--load_dir=hf://user/name is a URL, .*, or hf:USER/NAME"),
    ("train", "--dataset_name folder:hdfs://bucket/cats", "--dataset_name=folder:hdfs://bucket/cats is a URL"),
    ("train", "--dataset_name npz:https://example.com/a.npz", "--dataset_name=npz:https://example.com/a.npz is a URL"),
    ("train", "--model.preset huge", "model.preset"),
    ("train", "--sharding x", "sharding"),
    ("train", "--objective.finest_steps 8", "--objective.finest_steps=8 has no effect with --objective.name=flow"),
    ("train", "--objective.name diffusion --model.t_sampler uniform", "--model.t_sampler=uniform has no effect with"),
    ("train", "--model.step_conditioning 1", "--model.step_conditioning=1: --objective.name=flow_matching gives"),
    ("train", "--objective.name mean_flow --model.step_conditioning 0", "step_conditioning=0: .*mean_flow needs it"),
    (
        "train",
        "--objective.name mean_flow --objective.guidance_start 0.9 --objective.guidance_end 0.1",
        "--objective.guidance_start=0.9 is after --objective.guidance_end=0.1",
    ),
    ("train", "--objective.distill 1", "--objective.distill=1 learns one step from pairs, not from --dataset_name=dig"),
    ("train", "--debug_overfit 1 --random_flip 1", "--random_flip=1 has no effect with --debug_overfit=1"),
    ("train", "--plan 1 --profile OUT/trace", "--profile=.*trace has no effect with --plan"),
    ("train", "--ema_warmup 1 --model.target_update_rate 1", "--ema_warmup=1 has no effect with --model.target_up"),
    *((name, "--dataset_name npz:GOOD --broken_images skip", "--broken_images=skip has no effect on npz:.*good.npz")
      for name in ("train", "encode", "stats")),
    ("train", "--lr_schedule cosine --max_steps 0", "--lr_schedule=cosine has no effect with --max_steps=0"),
    ("train", "--no_such_flag 3", "no_such_flag"),
    ("plot", "--run LOG", "--run is not a flag here: name folders of runs with --runs .--help lists the flags"),
    ("plot", "--load_dir LOG", "--load_dir is not a flag here: name folders of runs with --runs"),
    ("sample", "--steps 9", "--steps is not a flag here: use --denoise_timesteps"),
    ("sample", "--depth 9", "--depth is not a flag here .--help"),
    ("train", "--wandb.exp_descriptor x", "--wandb.exp_descriptor is not a flag here: of wandb's settings there are "),
    ("train", "word", "unexpected argument 'word'"),
    ("eval", "", "give one of --load_dir .* and --samples"),
    ("eval", "--load_dir /no/such", "--load_dir=/no/such holds no checkpoint"),
    ("eval", "--load_dir x --samples y", "give one of"),
    ("eval", "--samples /no/such --fid_stats STATS", "--samples=/no/such is neither a file nor a folder"),
    ("eval", "--samples OUT --fid_stats STATS", "holds no images"),
    ("eval", "--samples GOOD", "--fid_stats is not given"),
    ("eval", "--samples GOOD --num_samples 99 --fid_stats x", "--num_samples=99"),
    ("eval", "--samples GOOD --fid_stats /no/such", "--fid_stats=/no/such"),
    ("eval", "--samples GOOD --fid_stats STATS --out README.md", "--out=README.md cannot be written"),
    ("eval", "--samples GOOD --fid_stats STATS --out OUT --json OUT/fid.json", "is the evaluation.s own record"),
    ("eval", "--samples GOOD --fid_stats STATS --batch_size 0 --out OUT", "--batch_size=0"),
    ("eval", "--samples GOOD --fid_stats STATS --inception_weights /no --out OUT", "--inception_weights=/no"),
    ("eval", "--samples GOOD --fid_stats STATS --inception_logits /no --out OUT", "--inception_logits=/no"),
    *(("eval", f"--num_samples {value}", "num_samples") for value in (0, 1, -5, 3_000_000_000, "x")),
    ("eval", "--seed -1", "--seed=-1"),
    ("eval", "--solver rk4", "solver"),
    ("eval", "--labels all", "labels"),
    ("eval", "--use_cfg 2", "use_cfg"),
    ("encode", "", "give|grey"),
    ("encode", "--batch_size 0", "--batch_size=0"),
    ("encode", "--shard_size 0", "shard_size"),
    ("encode", "--out=", "--out=: a name"),
    ("encode", "--dataset_name nothing", "--dataset_name=nothing is unknown"),
    ("encode", "--dataset_name folder:/no/such", "there is no folder"),
    ("stats", "--out OUT", "--out=.* is a folder"),
    ("stats", "--out /proc/x/y.npz", "--out=/proc/x/y.npz cannot be written"),
    ("stats", "--batch_size 0", "--batch_size=0"),
    ("stats", "--batch_size 1500", "--batch_size=1500 of 299x299x3 images needs"),
    ("stats", "--num_features 2000000", "num_features"),
    ("stats", "--images /no/such", "has no effect with --images|neither a file"),
    ("stats", "--inception_weights /no/such", "--inception_weights=/no/such is not a file"),
    ("stats", "--split test", "split"),
    ("stats", "--dataset_name npz:GOOD --split validation", "good.npz, validation holds 1 image; statistics are of 2"),
    ("plot", "", "--runs is not given: name run folders"),
    ("plot", "--runs LOG,", "--runs=.*, has an empty name"),
    ("plot", "--runs /no/such", "--runs=/no/such is not there; give the folder of a run"),
    ("plot", "--runs OUT", "--runs=.*out holds no metrics; give .*: there are .*logged"),
    ("plot", "--runs LOG/metrics.json", "metrics.json is not there; "),
    ("plot", "--runs README.md", "--runs=README.md holds no metrics"),
    ("plot", "--runs ~no_such_user/x", "--runs=~no_such_user/x: there is no home folder"),
    ("plot", "--runs LOG,hdfs://bucket/run", "--runs=hdfs://bucket/run is a URL"),
    ("plot", "--runs LOG --metrics l2_loss", "--metrics=l2_loss matches no .*; there are fid, training/l2_loss, x_t/*"),
    ("plot", "--runs LOG --metrics fid,f?", "--metrics=f.? matches no logged metric"),
    ("plot", "--runs LOG --metrics=", "--metrics= matches no"),
    ("plot", "--runs LOG --smooth 0", "smooth"),
    ("plot", "--runs OUT/no*such", r"--runs=.*/no\*such matches no run; .*out has none; name folders of runs"),
    ("plot", "--runs /no/such/*", r"--runs=/no/such/\* matches no run; /no/such has none; name folders of runs"),
    ("plot", "--runs LOG,OUT --table", "--runs=.*out holds no metrics; give .*: there are .*logged"),
    ("plot", "--runs LOG README.md", "unexpected argument 'README.md': .* --name value, a . in quotes"),
    ("plot", "--runs LOG --table --smooth 3", "--smooth=3 has no effect on a table, which has the values; leave it"),
    ("plot", "--runs LOG --table --log_y", "--log_y=True has no effect on a table"),
    ("plot", "--runs LOG --table --out OUT/t.md --metrics kid", "--metrics=kid matches no logged metric; there"),
    ("plot", "--runs LOG --table --out OUT/a.png", "--out=.*a.png: name a .md or .csv file, such as table.md"),
    ("plot", "--runs LOG --table --out OUT/t.txt", "--out=.*t.txt: name a .md or .csv file"),
    ("plot", "--runs LOG --out=", "--out=: a name of 1"),
    ("plot", "--runs LOG --out OUT", "--out=.*out: name a .png or .pdf or .svg file, such as .*curves.png"),
    ("plot", "--runs LOG --out OUT/curves.jpg", "--out=.*curves.jpg: name a .png or"),
    ("plot", "--runs LOG --out /proc/x/y.png", "--out=/proc/x/y.png cannot be written"),
    ("encode", "--dataset_name pairs:PAIRS", "--dataset_name=pairs:.* holds pairs already"),
    ("stats", "--dataset_name pairs:PAIRS", "--dataset_name=pairs:.* holds no images"),
    # Nothing waits on a named pipe.
    ("train", "--dataset_name npz:PIPE", "there is no file|no regular file"),
    ("train", "--dataset_name folder:PIPES", "a.png .no regular file"),
    ("train", "--dataset_name latents:PIPES --use_stable_vae 1", "not a valid latents manifest .it is no regular"),
    ("train", "--dataset_name pairs:PIPES", "manifest.json is not a valid manifest of pairs .it is no regular file"),
    ("eval", "--samples PIPE --fid_stats STATS", "--samples=.*pipe is neither a file nor a folder"),
    ("eval", "--samples PIPES --fid_stats STATS", "--samples=.*: a.png is not a readable image .it is no regular file"),
    ("eval", "--samples GOOD --fid_stats PIPE --out OUT", "--fid_stats=.*pipe is not a file"),
    ("eval", "--samples GOOD --fid_stats STATS --inception_weights PIPE --out OUT", "--inception_weights=.* is not a"),
    ("eval", "--samples GOOD --fid_stats STATS --inception_logits PIPE --out OUT", "--inception_logits=.*no regular"),
    ("stats", "--inception_weights PIPE", "--inception_weights=.*pipe is not a file"),
    ("plot", "--runs PIPES", "--runs=.*metrics.jsonl cannot be read .it is no regular file"),
]  # fmt: skip
# Where results go: refused before the run, which there is none of, is looked for.
OUTPUTS = [
    ("eval", "--load_dir x --json OUT", "--json=.*out is a folder; name the file to write"),
    ("eval", "--load_dir x --json README.md/a.json", "--json=README.md/a.json cannot be written"),
    ("eval", "--load_dir x --json /dev/null", "--json=/dev/null is no regular file"),
    ("eval", "--samples GOOD --fid_stats STATS --json GOOD", "--json=.*good.npz is the file of --samples"),
    ("eval", "--samples GOOD --fid_stats STATS --out TAKEN", "--out=.*taken holds a folder fid.csv"),
    ("likelihood", "--json OUT", "--json=.*out is a folder; name the file to write, such as .*out/result.json"),
    ("likelihood", "--per_image OUT", "--per_image=.*out is a folder; name .* such as .*out/images.csv"),
    ("likelihood", "--per_image OUT/a --json OUT/a", "--json=.*a is the file of --per_image, which would be lost"),
    ("likelihood", "--json /proc/x/a.json", "--json=/proc/x/a.json cannot be written"),
    ("eval", "--load_dir x --out README.md/x", "--out=README.md/x cannot be written"),
    *(("sample", f"--film_seconds {value}", "film_seconds") for value in ("0", "nan", "-1", "1e9", "x")),
    *(("sample", f"--scale {value}", "scale") for value in ("0", "nan", "inf", "-1", "65", "x")),
    *(
        ("sample", f"--film_{flag}", f"--film_{flag.replace(' ', '=')} has no effect without --film")
        for flag in ("seconds 4.0", "title x", "format mp4", "frames 9")
    ),
    ("sample", "--film --film_format avi", "film_format"),
    ("sample", "--out README.md", "--out=README.md cannot be written"),
    ("sample", "--save_samples README.md", "--save_samples=README.md is a file"),
    ("sample", "--save_samples README.md/x.npz", "--save_samples=README.md/x.npz cannot be written"),
    ("sample", "--save_samples README.md/pngs", "--save_samples=README.md/pngs cannot be written"),
    ("stats", "--images GOOD --out GOOD", "--out=.*good.npz is the file of --images, which would be lost"),
    ("export", "--out TAKEN/a.safetensors", "--out=.*a.safetensors is a folder; name the file to write"),
    ("export", "--out README.md/a.safetensors", "--out=README.md/a.safetensors cannot be written"),
    ("export", "--out README.md", "--out=README.md cannot be written"),
    ("export", "--out TAKEN", "--out=.*taken holds a folder README.md, where a file is to be"),
    ("import", "--out README.md", "--out=README.md cannot be written"),
    ("encode", "--dataset_name x --out README.md", "--out=README.md cannot be written"),
    ("train", "--dataset_name x --save_dir README.md/x", "--save_dir=README.md/x cannot be written"),
    ("train", "--dataset_name x --profile README.md", "--profile=README.md cannot be written"),
    ("pairs", "--out README.md", "--out=README.md cannot be written"),
    ("pairs", "--num_pairs 2000000 --shard_size 1", "--shard_size=1: --num_pairs=2000000 would be .* use 2 or more"),
    ("pairs", "--num_pairs 1000000000 --shard_size 999", "--shard_size=999: .*1,001,002 files.* use 1000 or more"),
]
SWEEPS = [
    ("--denoise_timesteps 3000000000", "--denoise_timesteps=3000000000: use a whole number"),
    ("--denoise_timesteps 1.5", "--denoise_timesteps=1.5: give numbers"),
    ("--denoise_timesteps=", "--denoise_timesteps= is empty|give numbers"),
    ("--cfg_scale 1,inf", "--cfg_scale=inf: use a scale"),
    ("--cfg_scale 1e30", r"--cfg_scale=1e\+30: use a scale"),
    ("--cfg_interval nan,1", "--cfg_interval=nan,1"),
    ("--cfg_interval 0,2", "--cfg_interval=0,2"),
    ("--cfg_interval -1,1", "--cfg_interval=-1,1"),
]
PROCESSES = [
    ("--coordinator_address auto --num_processes 2", "--num_processes and --process_id have no effect with"),
    ("--num_processes 2", "need --coordinator_address"),
    ("--process_id 0", "need --coordinator_address"),
    ("--coordinator_address localhost:1", "needs --num_processes and --process_id"),
    ("--coordinator_address localhost:1 --num_processes 0 --process_id 0", "--process_id=0 is not one of"),
    ("--coordinator_address localhost:1 --num_processes 2 --process_id 2", "--process_id=2 is not one of"),
    ("--coordinator_address localhost:1 --num_processes 2 --process_id -1", "--process_id=-1 is not one of"),
    ("--coordinator_address localhost --num_processes 2 --process_id 0", "no host:port"),
    ("--coordinator_address localhost:x --num_processes 2 --process_id 0", "no host:port"),
    ("--coordinator_address localhost:70000 --num_processes 2 --process_id 0", "no host:port"),
    ("--coordinator_address no.such.host.invalid:1 --num_processes 2 --process_id 0", "no host:port"),
]


def write_pairs(folder):
    """Four pairs of 8x8 pixels."""
    folder.mkdir()
    manifest = pairs.PairsManifest("few", "0" * 64, "euler", 0, 4, 4, (8, 8, 1), (8, 8, 1), ("a",), None, None)
    write_json(folder / pairs.MANIFEST, manifest.to_json())
    ((name, rows),) = manifest.shards()
    pairs.write_pairs(folder / name, ((0, np.zeros((8, 8, 1), np.float32)) for _ in rows))
    return folder


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Paths for the words of the tables; programs neither start on wandb nor take the signals over."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(train_flow, "StopRequest", lambda: None)
    monkeypatch.setattr(devices, "host_memory", lambda: 2**33)  # batches that are too large here are so everywhere
    (tmp_path / "out").mkdir()
    (tmp_path / "logged").mkdir()
    line = {"step": 1, "training/l2_loss": 1.5, "x_t/0.1": 1.0, "x_t/0.2": 1.0, "fid": 2}
    (tmp_path / "logged" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for name in ("a.safetensors", "fid.csv", "README.md"):
        (tmp_path / "taken" / name).mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipes").mkdir()
    for name in ("a.png", "manifest.json", "metrics.jsonl", "config.json"):
        os.mkfifo(tmp_path / "pipes" / name)
    np.savez(tmp_path / "good.npz", np.zeros((4, 8, 8, 3), np.uint8))
    return {
        "STATS": "data/fid_stats_digits.npz",
        "OUT": str(tmp_path / "out"),
        "GOOD": str(tmp_path / "good.npz"),
        "TAKEN": str(tmp_path / "taken"),
        "RUN": str(tmp_path / "run"),
        "LOG": str(tmp_path / "logged"),
        "PAIRS": str(write_pairs(tmp_path / "few")),
        "PIPES": str(tmp_path / "pipes"),
        "PIPE": str(tmp_path / "pipe"),
    }


def run(read_flags, files, name, line) -> None:
    program, common = PROGRAMS[name]
    words = [*common.split(), *(["--save_dir", "RUN"] if name == "train" and "wandb.name" not in line else [])]
    if "--dataset_name" in line:  # which would be joined with that of the common words
        words = re.sub(r"--dataset_name \S+", "", " ".join(words)).split()
    for word, path in files.items():
        line = line.replace(word, path)
        words = [each.replace(word, path) for each in words]
    program.main(read_flags(program, [*words, *line.split()]))


@pytest.mark.parametrize(("name", "line", "message"), [*BAD, *OUTPUTS])
def test_bad_input_is_one_line(read_flags, files, name, line, message):
    with pytest.raises(UserError, match=message) as error:
        run(read_flags, files, name, line)
    assert "\n" not in str(error.value)


MODULES = ("train_flow", "eval_fid", "sample", "edit", "app", "likelihood", "encode_latents", "compute_fid_stats",
           "make_pairs", "convert_checkpoint", "plot_metrics", "report")  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_answers_to_unknown_flags_name_flags_that_the_program_lists(read_flags, capsys, module):
    program = importlib.import_module(module)
    with pytest.raises(SystemExit):
        read_flags(program, ["--help"])
    listed = set(re.findall(r"^  --(?:\[no\])?([\w.]+):", capsys.readouterr().out, re.MULTILINE))
    defined = [name for name in flags.FLAGS if name in listed or is_hidden(name)]
    for name in (*HABITS, "depth", "t_sampler"):
        answer = find_answer(name, listed) or ""
        assert set(re.findall(r"--([\w.]+)", answer)) <= listed
        if answer and name not in defined:
            with pytest.raises(UserError, match=f"^--{name} is not a flag here: {re.escape(answer)}"):
                refuse_habits([f"--{name}=x"], defined)
    # absl's own flags, such as --log_dir, are not proposed.
    with pytest.raises(UserError, match=r"^--lod_dir is not a flag here(; did you mean --(\w+)\?)? \(--help ") as error:
        read_flags(program, ["--lod_dir", "x"])
    assert set(re.findall(r"mean --(\w+)", str(error.value))) <= listed


PATHS = ("dir", "out", "vae", "json", "stats", "samples", "images", "invert", "inpaint", "mask", "source", "weights",
         "logits", "profile", "per_image", "class_names", "dataset_name")  # fmt: skip


def test_no_program_takes_a_url_for_a_path(read_flags):
    """Flags are found by the ends of their names, so that a new one that is not registered as a path is seen.

    None takes one of HDFS; those that take S3's are listed."""
    found = set()
    for program in map(importlib.import_module, MODULES):
        names = set(read_flags(program, [])) & set(flags.FLAGS)
        texts = [name for name in names if type(flags.FLAGS[name].parser) is flags.ArgumentParser]
        for name in (name for name in sorted(texts) if name.endswith(PATHS)):
            if (program, name) == (eval_fid, "dataset_name") or is_hidden(name):  # the name of statistics; no path here
                continue
            if name == "dataset_weights":  # numbers
                continue
            with pytest.raises(UserError, match=f"--{name}=hdfs://bucket/x is a URL"):
                read_flags(program, [f"--{name}", "hdfs://bucket/x"])
            if name not in TAKE_REMOTE:
                with pytest.raises(UserError, match=f"--{name}=s3://bucket/x is a URL"):
                    read_flags(program, [f"--{name}", "s3://bucket/x"])
            found.add((program.__name__, name))
    assert len(found) > 30
    assert read_flags(train_flow, ["--data_dir", "gs://bucket/tfds"]).data_dir == "gs://bucket/tfds"
    assert read_flags(train_flow, ["--load_dir", "hf:user/name"]).load_dir == "hf:user/name"


@pytest.mark.parametrize("run", ["hdfs://bucket/run", Path("s3://bucket/run")])
def test_urls_are_refused_from_python_too(run, monkeypatch):
    with pytest.raises(UserError, match=r"--load_dir=(hdfs|s3):/+bucket/run is a URL"):
        load_generator(run)
    with pytest.raises(UserError, match="--dataset_name=folder:hdfs://bucket/cats is a URL"):
        load_dataset("folder:hdfs://bucket/cats")
    with pytest.raises(UserError, match=r"--data_dir=(hdfs|s3):/+bucket/run is a URL"):
        load_dataset("tfds:x", options=DataOptions(run))
    monkeypatch.setenv("TFDS_DATA_DIR", "s3://bucket/tfds")
    with pytest.raises(UserError, match="--data_dir=s3://bucket/tfds is a URL"):
        load_dataset("cifar10")


def test_a_local_folder_that_an_earlier_version_named_after_a_url_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:/bucket/run").mkdir(parents=True)
    assert expand_path("s3:/bucket/run", "save_dir") == "s3:/bucket/run"
    assert expand_path("s3://bucket/run", "save_dir") == "s3://bucket/run"


@pytest.mark.parametrize(("line", "message"), SWEEPS)
def test_bad_sweeps_are_one_line(read_flags, line, message):
    with pytest.raises(UserError, match=message):
        reading.read_samplers(read_flags(eval_fid, line.split()), 0.1)


@pytest.mark.parametrize(("line", "message"), PROCESSES)
def test_bad_processes_are_one_line(read_flags, files, line, message):
    with pytest.raises(UserError, match=message):
        run(read_flags, files, "train", line)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"format": 1}', b'{"shard_size": NaN}'])
def test_damaged_manifests_are_one_line(read_flags, files, tmp_path, content):
    (tmp_path / "out" / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="not a valid latents manifest"):
        run(read_flags, files, "train", f"--dataset_name latents:{files['OUT']} --use_stable_vae 1")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'"text"', b"null"])
def test_damaged_tfds_metadata_are_one_line(read_flags, files, tmp_path, file, content):
    pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    folder = tmp_path / "tfds" / "x" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "array_record", "name": "x", "version": "1.0.0"}')
    (folder / "features.json").write_text("{}")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=r"--dataset_name=tfds:x: .*prepare"):
        run(read_flags, files, "train", f"--dataset_name tfds:x --data_dir {tmp_path / 'tfds'}")


def test_features_of_other_modules_are_not_imported(read_flags, files, tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    folder = tmp_path / "tfds" / "x" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "array_record", "name": "x", "version": "1.0.0"}')
    for key in ("pythonClassName", "type"):
        features = {"featuresDict": {"features": {"image": {key: "antigravity.Image"}}}}
        (folder / "features.json").write_text(json.dumps(features))
        with pytest.raises(UserError, match=r"names antigravity\.Image, which is no feature of TFDS"):
            run(read_flags, files, "train", f"--dataset_name tfds:x --data_dir {tmp_path / 'tfds'}")


def test_statistics_that_a_disk_has_no_room_for_are_refused_before_work(read_flags, files, monkeypatch):
    """Means, covariances of 2048 and 2023 features in float32, and 1,500 rows of features: 46 MB."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=40 * 2**20))
    with pytest.raises(UserError, match=r"--out=\S+s.npz takes up to 46,[0-9,]+ bytes, but 41,943,040 are free there"):
        run(read_flags, files, "stats", "")
