"""Captions of data: from a table to tokens, and encoded once where that is slow."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import sample
from utils.base.messages import UserError
from utils.conditions.classes import ClassCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.text_encoders import TEXT_ENCODERS, TextEncoder, TextEncoderKind, encode_words
from utils.conditions.tokens import TextCondition
from utils.data import captions
from utils.data.captions import EncodedCaptions, encode_captions
from utils.data.dataset import DataOptions
from utils.data.loaders import load_dataset
from utils.flags.conditions import read_prompts
from utils.runs.opening import load_generator
from utils.training import build_run, make_config, train

CAPTIONS = ["a b", "c", "a b", "d e f", "c"]


def test_captions_of_a_slow_encoder_are_encoded_once(monkeypatch):
    seen = []

    def encode(texts):
        seen.extend(texts)
        return encode_words(texts)

    monkeypatch.setitem(TEXT_ENCODERS, "slow", TextEncoderKind(lambda _: TextEncoder(encode), "", is_slow=True))
    monkeypatch.setattr(captions, "CHUNK", 2)
    source = [{"image": number, "caption": text} for number, text in enumerate(CAPTIONS)]
    condition = TextCondition(3, 64, "slow")
    encoded = encode_captions(source, condition, "x")
    assert sorted(seen) == sorted(set(CAPTIONS))
    for number, text in enumerate(CAPTIONS):
        found, expected = condition.read(encoded[number]), condition.read({"caption": text})
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert encoded.read_condition(number)["image"] == number
    assert encode_captions(source, dataclasses.replace(condition, encoder="words"), "x") is source
    monkeypatch.setattr(captions, "MAX_BYTES", 3 * 3 * 65 * 4 - 1)
    with pytest.raises(UserError, match=r"^x: tokens of 3 captions by --text_encoder=slow take 0 MiB, of which 0 "):
        encode_captions(source, condition, "x")


def test_tokens_of_weights_are_kept_for_later_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = []

    def encode(texts):
        seen.extend(texts)
        return encode_words(texts)

    kind = TextEncoderKind(lambda _: TextEncoder(encode, sha256="ab"), "", is_slow=True)
    monkeypatch.setitem(TEXT_ENCODERS, "late", kind)
    source = [{"image": number, "caption": text} for number, text in enumerate(CAPTIONS)]
    condition = TextCondition(3, 64, "late", "ab")
    first = encode_captions(source, condition, "x")
    assert len(seen) == 3
    monkeypatch.setattr(captions, "MAX_BYTES", 0)  # of memory, which they do not take
    again = encode_captions(source, condition, "x")
    assert len(seen) == 3
    for number, text in enumerate(CAPTIONS):
        expected = condition.read({"caption": text})
        for encoded in (first, again):
            jax.tree.map(np.testing.assert_array_equal, condition.read(encoded[number]), expected)
    # Other captions, other weights and a damaged file are encoded anew.
    seen.clear()
    encode_captions(source[:2], condition, "x")
    assert len(seen) == 2
    (whole,) = [file for file in (tmp_path / "jax-flow-matching").iterdir() if file.stat().st_size > 2000]
    whole.write_bytes(whole.read_bytes()[:-1])
    encode_captions(source, condition, "x")
    assert len(seen) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(whole))  # a file
    with pytest.raises(UserError, match=r"^x: .*, where tokens are kept: .*; make room, or set XDG_CACHE_HOME to"):
        encode_captions(source[1:2], condition, "x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(captions.shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
    with pytest.raises(UserError, match=r"^x: tokens of 1 captions by --text_encoder=late take .* are free in "):
        encode_captions(source[1:2], condition, "x")


@pytest.mark.parametrize("is_slow", [False, True])
def test_captions_of_a_table_are_encoded_as_the_flag_says(tmp_path, monkeypatch, is_slow):
    monkeypatch.setitem(TEXT_ENCODERS, "own", TextEncoderKind(lambda _: TextEncoder(encode_words), "", is_slow=is_slow))
    rows = [{"file_name": f"{number}.png", "caption": text} for number, text in enumerate(CAPTIONS)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for number in range(len(CAPTIONS)):
        Image.new("L", (4, 4), 10 * number).save(tmp_path / f"{number}.png")
    options = DataOptions(image_size=4, condition_columns="text:caption", text_encoder="own")
    for split in ("train", "validation"):
        dataset = load_dataset(f"folder:{tmp_path}", split, options)
        assert isinstance(dataset.source, EncodedCaptions) == is_slow
        assert (dataset.condition.encoder, dataset.random_flip, dataset.class_names) == ("own", False, ())
        for number in range(len(dataset.source)):
            row = dataset.row(number, False)
            text = CAPTIONS[row["image"].max() // 10]
            jax.tree.map(np.testing.assert_array_equal, row["condition"], dataset.condition.read({"caption": text}))
    with pytest.raises(
        UserError, match=r"^--condition_columns=text:caption: --text_encoder=word is unknown; did you mean"
    ):
        load_dataset(f"folder:{tmp_path}", "train", dataclasses.replace(options, text_encoder="word"))
    with pytest.raises(UserError, match=r"^--text_encoder=words: digits has no captions; leave it out$"):
        load_dataset("digits", "train", DataOptions(text_encoder="words"))


@pytest.mark.slow
@pytest.mark.usefixtures("signal_handlers")
def test_prompts_of_the_shell_are_those_of_python(read_flags, tmp_path):
    """And the encoder is that of --text_encoder, here one whose captions are encoded beforehand."""
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
    texts = np.array([f"a {number % 3} left" for number in range(40)])
    np.savez(tmp_path / "set.npz", images=images, captions=texts)
    TEXT_ENCODERS["late"] = TEXT_ENCODERS["words"]._replace(is_slow=True)
    small = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 2, "token_mode": "cross", "lr": 0.01}
    settings = {"dataset_name": f"npz:{tmp_path / 'set.npz'}", "text_encoder": "late", "codec": "pixels"}
    settings |= {"batch_size": 8, "eval_interval": 0, "max_steps": 3, "wandb.mode": "disabled"}
    settings |= {f"model.{name}": value for name, value in small.items()}
    try:
        train(build_run(make_config({**settings, "save_dir": str(tmp_path / "run")})))
        generator = load_generator(tmp_path / "run", params="raw")
        words = f"--load_dir {tmp_path / 'run'} --out {tmp_path} --num_samples 2 --denoise_timesteps 2 --cfg_scale 2"
        flags = [*words.split(), "--params", "raw", "--save_samples", str(tmp_path / "s.npz")]
        sample.main(read_flags(sample, [*flags, "--prompt", "a 0 left; a 1 left"]))
        images = generator.sample(conditions=["a 0 left", "a 1 left"], num_steps=2, cfg_scale=2.0)
    finally:
        del TEXT_ENCODERS["late"]
    assert generator.condition == TextCondition(3, 64, "late")
    with np.load(tmp_path / "s.npz") as saved:
        np.testing.assert_array_equal(saved["arr_0"], images)
        assert saved["captions"].tolist() == ["a 0 left", "a 1 left"]
    assert generator.condition.titles(generator.conditions(range(2))) != ["no text"] * 2


def test_prompts_stand_beside_other_conditions():
    condition = TextCondition(3, 64)
    with pytest.raises(UserError, match=r"^there are 2 texts, but 3 of --condition; give one, or as many$"):
        read_prompts("a; b", "class=1; class=2; class=3", with_class(condition))
    with pytest.raises(UserError, match=r"^give class by --condition$"):
        read_prompts("a; b", None, with_class(condition))
    with pytest.raises(UserError, match=r"^the run has no captions; give class by --condition$"):
        read_prompts("a", None, with_class(condition).parts[0][1])
    found = read_prompts('a; "b; c"', "class=1", with_class(condition))
    assert with_class(condition).titles(found) == ["1, a", "1, b; c"]


def with_class(condition):
    return SeveralCondition((("class", ClassCondition(("0", "1", "2"))), ("text", condition)))
