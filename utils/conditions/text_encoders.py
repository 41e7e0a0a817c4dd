"""Text encoders by name, as --text_encoder says them: texts -> tokens, and which of them are there.

One of your own is a line `TEXT_ENCODERS["name"] = TextEncoderKind(lambda source: TextEncoder(encode), "...")`.
"""

import functools
import hashlib
import importlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from utils.base.messages import UserError, are_bars_silent, one_line, progress_bar
from utils.base.settings import unknown_name

WORD_WIDTH = 64  # numbers of a word's token
BATCH = 64  # texts that a network encodes at a time
CHUNK = 4096  # texts that are counted at a time
Tokens = tuple[Float[np.ndarray, "n l d"], Bool[np.ndarray, "n l"]]


class TextEncoder(NamedTuple):
    """A function (texts) -> (tokens, which of them are there), as many as the longest text has, a text's own first.

    `count` says how many the longest has, where that is cheaper to know than the tokens. `sha256` is that of weights: a
    run is sampled and resumed only with the same ones.
    """

    encode: Callable[[Sequence[str]], Tokens]
    count: Callable[[Sequence[str]], int] | None = None
    sha256: str | None = None


class TextEncoderKind(NamedTuple):
    """How the encoders of one name are loaded: `load(source)`, which is None for a kind without `placeholder`."""

    load: Callable[[Any], TextEncoder]
    help: str
    placeholder: str = ""  # what follows the colon of --text_encoder NAME:SOURCE; empty: nothing does
    is_slow: bool = False  # captions are then encoded once, before the training, rather than when they are read


# --- Words ---


def split_words(text: str) -> list[str]:
    """Returns the words of a text, without case and punctuation."""
    return re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold())


@functools.lru_cache(maxsize=2**16)
def word_token(word: str) -> Float[np.ndarray, " 64"]:
    """Returns the token of a word: 64 numbers of mean 0 and variance 1 that depend on its letters alone.

    They are uniform, from the bytes of a hash, so that they are the same on every machine and under every version of
    NumPy. Two words have tokens that are almost orthogonal; what they mean is for the network to learn.
    """
    numbers = np.frombuffer(hashlib.shake_256(word.encode()).digest(2 * WORD_WIDTH), "<u2")
    token = ((numbers.astype(np.float64) + 0.5) / 2**15 - 1) * np.sqrt(3)
    return token.astype(np.float32)


def encode_words(texts: Sequence[str]) -> Tokens:
    """Encodes texts by their words in order."""
    rows = [split_words(text) for text in texts]
    tokens = np.zeros((len(rows), max(map(len, rows), default=0), WORD_WIDTH), np.float32)
    mask = np.zeros(tokens.shape[:2], bool)
    for row, is_there, words in zip(tokens, mask, rows, strict=True):
        is_there[: len(words)] = True
        for place, word in enumerate(words):
            row[place] = word_token(word)
    return tokens, mask


def _count_words(texts: Sequence[str]) -> int:
    return max((len(split_words(text)) for text in texts), default=0)


# --- Networks of Hugging Face's transformers ---

# {kind of model: its class}, of models of two parts: the part that reads texts.
READERS = {
    "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel", "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}  # fmt: skip


def load_transformers(source: str) -> TextEncoder:
    """Returns the text encoder of a folder or a hub id: CLIP's text model, T5's encoder, or another network.

    Raises UserError where the extra is not installed or `source` cannot be loaded.
    """
    shown = f"--text_encoder=transformers:{source}"
    try:
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(f"{shown} needs {error.name}, of the extra text: pip install torch transformers") from None
    if are_bars_silent():
        transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        kind = transformers.AutoConfig.from_pretrained(source).model_type
        name = READERS.get(kind, "AutoModel")
        model = getattr(transformers, name).from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{shown} cannot be loaded: {one_line(error)}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)

    def tokenize(texts, **options):
        return tokenizer(list(texts), padding="longest", truncation=True, **options)

    def encode(texts):
        batches = [tokenize(texts[start : start + BATCH], return_tensors="pt") for start in range(0, len(texts), BATCH)]
        # Batches are as long as their longest text.
        length = max(batch["input_ids"].shape[1] for batch in batches)
        tokens = np.zeros((len(texts), length, model.config.hidden_size), np.float32)
        mask = np.zeros((len(texts), length), bool)
        for number, batch in enumerate(batches):
            rows = slice(number * BATCH, (number + 1) * BATCH), slice(batch["input_ids"].shape[1])
            of_model = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                tokens[rows] = model(**of_model).last_hidden_state.float().cpu().numpy()
            mask[rows] = batch["attention_mask"].numpy()
        return tokens, mask

    def count(texts):
        return len(tokenize(texts)["input_ids"][0])

    return TextEncoder(encode, count, _hash_model(model, tokenizer, torch.uint8))


def _hash_model(model: Any, tokenizer: Any, bytes_type: Any) -> str:
    """Returns the SHA-256 of a model's arrays and of its vocabulary."""
    digest = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(bytes_type).numpy().tobytes())
    return digest.hexdigest()


# --- By name ---

TEXT_ENCODERS: dict[str, TextEncoderKind] = {
    "words": TextEncoderKind(
        lambda source: TextEncoder(encode_words, _count_words),
        "a fixed random token for each word, for small vocabularies",
    ),
    "transformers": TextEncoderKind(
        load_transformers, "CLIP's or T5's, of the extra `text`", placeholder="PATH_OR_HUB", is_slow=True
    ),
}


def list_text_encoders() -> list[str]:
    """Returns the values of --text_encoder as a user writes them: words, transformers:PATH_OR_HUB."""
    return [f"{name}:{kind.placeholder}" if kind.placeholder else name for name, kind in TEXT_ENCODERS.items()]


def find_text_encoder(spec: str) -> TextEncoderKind:
    """Returns the kind of NAME or NAME:SOURCE. Raises UserError for others."""
    name, colon, source = spec.partition(":")
    if name not in TEXT_ENCODERS:
        raise unknown_name(f"--text_encoder={spec}", name, list_text_encoders())
    kind = TEXT_ENCODERS[name]
    if bool(colon) != bool(kind.placeholder) or bool(colon) != bool(source):
        raise UserError(f"--text_encoder={spec}: use {name}{f':{kind.placeholder}' if kind.placeholder else ''}")
    return kind


@functools.lru_cache(maxsize=4)
def load_text_encoder(spec: str) -> TextEncoder:
    """Returns the encoder of NAME or NAME:SOURCE, loaded once. Raises UserError where it cannot be."""
    return find_text_encoder(spec).load(spec.partition(":")[2] or None)


def encode_texts(spec: str, texts: Sequence[str], sha256: str | None = None) -> Tokens:
    """Returns (tokens (n, l, d) float32, which of them are there (n, l)) of texts.

    `sha256` is that of the weights by which a run was trained. Raises UserError for an encoder that has others, or that
    returns something else.
    """
    encoder = load_text_encoder(spec)
    if sha256 is not None and encoder.sha256 != sha256:
        raise UserError(
            f"--text_encoder={spec} has other weights (sha256 {str(encoder.sha256)[:12]}...) than those that encoded "
            f"the run's captions ({sha256[:12]}...); give those"
        )
    tokens, mask = (np.asarray(x) for x in encoder.encode(list(texts)))
    if tokens.ndim != 3 or mask.dtype != bool or tokens.shape[:2] != mask.shape or len(mask) != len(texts):
        raise UserError(
            f"--text_encoder={spec} returns {tokens.shape} and {mask.shape} {mask.dtype} for {len(texts)} texts, not "
            "tokens (n, l, d) and a mask (n, l) of bool"
        )
    return tokens.astype(np.float32, copy=False), mask


def longest_text(spec: str, texts: Sequence[str]) -> int:
    """Returns the number of tokens of the text that has most."""
    count = load_text_encoder(spec).count or (lambda texts: int(encode_texts(spec, texts)[1].sum(axis=1).max()))
    starts = progress_bar(range(0, len(texts), CHUNK), "counting tokens", unit=f"{CHUNK} texts", delay=5)
    return max((count(texts[start : start + CHUNK]) for start in starts), default=0)
