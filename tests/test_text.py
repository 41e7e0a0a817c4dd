"""Tokens and texts as conditions: encoders, what a run records, what users give."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import sample
from tests.runs import train_and_repeat
from utils.base.messages import UserError
from utils.conditions.condition import CONDITIONS, number_rows, record_condition, restore_condition
from utils.conditions.text_encoders import TEXT_ENCODERS, TextEncoder, TextEncoderKind, encode_texts, word_token
from utils.conditions.tokens import TextCondition, TokensCondition
from utils.runs.opening import load_generator

CAPTIONS = ["a 3 left of a 7", "A red, RED wine!", "", "he\u0301llo"]


def test_words_have_the_same_tokens_everywhere():
    """Golden numbers; they are of mean 0 and variance 1, and those of two words are independent."""
    golden = np.float32([-0.68628180, -0.40296292, -0.17213206, -1.5617688])
    np.testing.assert_array_equal(word_token("red")[:4], golden)

    table = np.stack([word_token(str(number)) for number in range(1000)])
    assert abs(table.mean()) < 0.02
    assert table.var() == pytest.approx(1, abs=0.02)
    alike = table @ table.T / 64 - np.eye(1000)
    assert alike.std() == pytest.approx(1 / 8, rel=0.05)


def test_a_text_is_its_words_in_order():
    tokens, mask = encode_texts("words", CAPTIONS)
    assert mask.sum(axis=1).tolist() == [6, 4, 0, 1]
    words = [["a", "3", "left", "of", "a", "7"], ["a", "red", "red", "wine"], [], ["he\u0301llo"]]
    for row, texts in zip(tokens, words, strict=True):
        expected = [word_token("h\u00e9llo" if text.startswith("he") else text) for text in texts]
        np.testing.assert_array_equal(row, np.stack([*expected, *[np.zeros(64)] * (6 - len(expected))]))


def test_texts_from_the_shell_python_and_data_are_the_same_arrays():
    condition = TextCondition.of_captions(CAPTIONS)
    assert (condition.length, condition.width) == (6, 64)
    given = condition.check(CAPTIONS[:2])
    written = condition.from_fields([{"text": text} for text in CAPTIONS[:2]])
    read = [condition.read({"caption": text}) for text in CAPTIONS[:2]]
    tokens, mask = encode_texts("words", CAPTIONS[:1])
    read[0] = condition.read({"caption": CAPTIONS[0], "tokens": tokens[0], "token_mask": mask[0]})
    read = jax.tree.map(lambda *rows: np.stack(rows), *read)
    for other in (written, read, condition.check(given)):
        jax.tree.map(np.testing.assert_array_equal, other, given)
    spec = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), condition.spec)
    assert jax.tree.map(lambda rows: (rows.shape[1:], rows.dtype), given) == spec
    assert condition.titles(given) == CAPTIONS[:2]
    assert condition.titles(condition.null(1)) == ["no text"]
    assert condition.titles(condition.check("ä" * 200)) == ["ä" * 128]  # cut between letters
    places, titles = number_rows(condition, condition.check([CAPTIONS[1], CAPTIONS[0], CAPTIONS[1]]))
    assert [titles[place] for place in places] == [CAPTIONS[1], CAPTIONS[0], CAPTIONS[1]]


def test_a_longer_text_is_cut_and_said():
    condition = TextCondition.of_captions(CAPTIONS)
    long = condition.check(["one two three four five six seven", "one"])
    np.testing.assert_array_equal(long["value"][0, 5], word_token("six"))
    (remark,) = condition.remarks(long)
    assert remark.startswith("'one two three four five six seven' has more than the 6 tokens")
    for values in (5, [5], []):
        with pytest.raises(UserError, match="give a text for each image"):
            condition.check(values)
    (remark,) = condition.remarks(condition.check(["?!", "one"]))
    assert remark == "'?!' has no token of --text_encoder=words: it is drawn as no text"


def test_tokens_are_given_with_or_without_a_mask():
    condition = TokensCondition(3, 2)
    tokens = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    found = condition.check(tokens)
    np.testing.assert_array_equal(found["value"], np.pad(tokens, ((0, 0), (0, 1), (0, 0))))
    np.testing.assert_array_equal(found["mask"], [[True, True, False]] * 2)
    tokens[1, 1] = np.nan
    masked = condition.check({"value": tokens, "mask": [[1, 1], [1, 0]]})
    np.testing.assert_array_equal(masked["value"][1], [[4, 5], [0, 0], [0, 0]])
    assert condition.titles(masked) == ["2 tokens", "1 token"]
    assert condition.titles(condition.null(1)) == ["no condition"]
    with pytest.raises(UserError, match="some tokens are NaN or infinite; leave them out by the mask"):
        condition.check(tokens)


@pytest.mark.parametrize("condition", [TokensCondition(3, 2), TextCondition(6, 64), TextCondition(2, 8, "x:y", "abc")])
def test_a_run_records_and_restores_them(condition):
    record = json.loads(json.dumps(record_condition(condition)))
    assert restore_condition(record) == condition
    assert CONDITIONS[record["condition"]["kind"]] is type(condition)
    name = record["condition"]["kind"]
    for bad in (None, 3, {}, {**record[name], "length": 0}, {**record[name], "width": 1e300}, {**record[name], "x": 1}):
        with pytest.raises(UserError, match=r"^the run's condition, .*, is no record of tokens$"):
            restore_condition({**record, name: bad})


@pytest.mark.parametrize(
    ("encoder", "captions", "message"),
    [
        ("word", ["a"], r"^--text_encoder=word is unknown; .*words"),
        ("words:x", ["a"], r"^--text_encoder=words:x: use words$"),
        ("transformers", ["a"], r"^--text_encoder=transformers: use transformers:PATH_OR_HUB$"),
        ("words", ["!", ""], r"^no caption has any token of --text_encoder=words$"),
        ("words", ["a " * 5000], r"^a caption has 5,000 tokens of --text_encoder=words; 4,096 is the most$"),
        (
            "broken",
            ["a"],
            r"^--text_encoder=broken returns \(1, 3\) and \(1, 3\) bool for 1 texts, not tokens ",
        ),
    ],
)
def test_encoders_that_cannot_be_are_refused(encoder, captions, message, monkeypatch):
    broken = TextEncoder(lambda texts: (np.zeros((1, 3)), np.zeros((1, 3), bool)))
    monkeypatch.setitem(TEXT_ENCODERS, "broken", TextEncoderKind(lambda source: broken, ""))
    with pytest.raises(UserError, match=message):
        TextCondition.of_captions(captions, encoder)


def test_conditions_that_cannot_be_are_refused():
    condition = TextCondition.of_captions(CAPTIONS)
    with pytest.raises(UserError, match=r"give a text for each image$"):
        condition.check([3])
    with pytest.raises(UserError, match=r"words has other weights \(sha256 None.*\) than .* \(abc.*\); give those"):
        dataclasses.replace(condition, sha256="abc").check(["a"])
    with pytest.raises(UserError, match="--text_encoder=words: tokens have 64 numbers, not 8"):
        dataclasses.replace(condition, width=8).check(["a"])
    tokens = TokensCondition(3, 2)
    with pytest.raises(UserError, match=r"tokens and mask are \(1, 2, 5\) and \(1, 2\), not \(n, l, 2\) and \(n, l\)"):
        tokens.check(np.zeros((1, 2, 5)))
    with pytest.raises(UserError, match="4 tokens, but the run was trained on up to 3"):
        tokens.check(np.zeros((1, 4, 2)))


def test_a_network_of_transformers_encodes_texts(tmp_path):
    """A tiny CLIP, made here: its hidden states, and nothing of the padding."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, **{f"{letter}</w>": 2 + i for i, letter in enumerate("abc")}}
    (tmp_path / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPTextConfig(vocab_size=5, max_position_embeddings=9, **sizes, **ends)
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(config).eval()
    model.save_pretrained(tmp_path)

    condition = TextCondition.of_captions(["a b", "c"], f"transformers:{tmp_path}")
    assert (condition.length, condition.width) == (4, 8)
    found = condition.check(["c", "a b"])
    assert found["mask"].sum(axis=1).tolist() == [3, 4]
    with torch.inference_mode():
        alone = model(input_ids=torch.tensor([[0, 4, 1]])).last_hidden_state.numpy()
    np.testing.assert_allclose(found["value"][0, :3], alone[0], atol=1e-5)
    assert not found["value"][0, 3].any()
    with pytest.raises(UserError, match=r"--text_encoder=transformers:.* has other weights"):
        dataclasses.replace(condition, sha256="0" * 64).check(["a"])
    with pytest.raises(UserError, match=r"^--text_encoder=transformers:.*missing cannot be loaded"):
        TextCondition.of_captions(["a"], f"transformers:{tmp_path}/missing")


# --- A run ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs of four steps: `whole`, and `stopped`, which goes on from step 2."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    captions = [f"a {'dark' if level < 128 else 'light'} image of level {level}" for level in range(0, 256, 8)]
    images = np.repeat(np.arange(0, 256, 8, dtype=np.uint8), 64).reshape(32, 8, 8, 1) ^ rng.integers(
        8, size=(32, 8, 8, 1), dtype=np.uint8
    )
    np.savez(folder / "data.npz", images=images, captions=np.array(captions))
    settings = {
        "dataset_name": f"npz:{folder / 'data.npz'}", "codec": "pixels", "model.hidden_size": 32, "model.depth": 1,
        "model.patch_size": 4, "model.class_dropout_prob": 0.5, "batch_size": 8, "eval_interval": 0,
        "model.target_update_rate": 0.5, "model.lr": 1e-2, "wandb.mode": "disabled",
    }  # fmt: skip
    train_and_repeat(folder, settings)
    return folder


def test_a_run_of_texts_goes_on_exactly(runs):
    whole, stopped = (load_generator(runs / name, params="raw") for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, stopped.params)
    # Whatever a text is embedded by has been learned.
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(whole.params["token_embed"]))


def test_prompts_in_the_shell_are_those_in_python(runs, tmp_path, read_flags):
    prompts = ["a dark image of level 0", "a light image, of level 7; and of 8"]
    saved = tmp_path / "samples.npz"
    words = f"--load_dir {runs / 'whole'} --denoise_timesteps 2 --cfg_scale 2 --num_samples 4 --out {tmp_path}".split()
    text = f'{prompts[0]}; "{prompts[1]}"'
    sample.main(read_flags(sample, [*words, "--prompt", text, "--save_samples", str(saved)]))
    found = np.load(saved)
    generator = load_generator(runs / "whole")
    np.testing.assert_array_equal(found["arr_0"], generator.sample(conditions=prompts * 2, num_steps=2, cfg_scale=2))
    assert found["captions"].tolist() == prompts * 2
    # Another text is another picture.
    other = generator.sample(conditions=["a light image of level 248"] * 4, num_steps=2, cfg_scale=2)
    assert (other != found["arr_0"]).any(axis=(1, 2, 3)).all()
