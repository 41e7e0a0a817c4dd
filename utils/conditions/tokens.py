"""Tokens as the condition of a model: rows of numbers beside an image, or a text as a text encoder gives it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from utils.base.messages import UserError
from utils.conditions.condition import CONDITIONS, Condition, Embedded
from utils.conditions.text_encoders import encode_texts, find_text_encoder, load_text_encoder, longest_text
from utils.kernels.layers import Dense

MAX_LENGTH = 4096  # tokens of a condition
MAX_WIDTH = 2**16  # numbers of a token
TEXT_BYTES = 256  # of a text, kept for titles
SHOWN = 40  # characters of a text in a message


class TokensEmbed(nn.Module):
    """Tokens {"value": (b, l, k), "mask": (b, l)} -> tokens (b, 1 + l, d) and which of them are there.

    The first is learned and always there: it stands alone where there is no condition. The others are a linear map of
    the values, and all have learned positions.
    """

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, condition):
        # Zeros where no token is, so that nothing can come from there: not even NaN.
        mask = condition["mask"]
        value = jnp.where(mask[..., None], condition["value"], 0)
        tokens = Dense(self.width, self.dtype, nn.initializers.xavier_uniform(), name="dense")(value)
        tokens = jnp.pad(tokens, ((0, 0), (1, 0), (0, 0)))
        positions = self.param("positions", nn.initializers.normal(0.02), tokens.shape[1:])
        return Embedded(
            tokens=tokens + positions.astype(self.dtype), mask=jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        )


@dataclasses.dataclass(frozen=True)
class TokensCondition(Condition):
    """Up to `length` tokens of `width` numbers, {"value": float32 (n, l, k), "mask": bool (n, l)}.

    The mask says which of them are there; none means "no condition". What the values of the others are does not matter.
    """

    DRAWS_ROWS: ClassVar = True

    length: int
    width: int

    # --- Arrays ---

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "value": jax.ShapeDtypeStruct((self.length, self.width), jnp.float32),
            "mask": jax.ShapeDtypeStruct((self.length,), jnp.bool_),
        }

    def read(self, example: Mapping[str, Any]) -> dict[str, Any]:
        tokens = np.asarray(example["tokens"])[None]
        mask = np.asarray(example.get("token_mask", np.ones(tokens.shape[1])), bool)
        return {name: rows[0] for name, rows in self._padded(tokens, mask.reshape(1, -1)).items()}

    def null(self, count: int) -> dict[str, Array]:
        return {name: jnp.zeros((count, *leaf.shape), leaf.dtype) for name, leaf in self.spec.items()}

    def embedder(self, width: int, dtype: Any = jnp.float32) -> TokensEmbed:
        return TokensEmbed(width, dtype, name="token_embed")

    def check(self, values: Any) -> dict[str, np.ndarray]:
        """Returns conditions of tokens (n, l, k), all of them there, or of {"value", "mask"}; fewer than `length` are
        padded. Raises UserError for others, and for NaN."""
        if not isinstance(values, Mapping):
            values = {"value": values, "mask": np.ones(np.shape(values)[:2], bool)}
        try:
            tokens = np.asarray(values["value"], np.float32)
            mask = np.asarray(values["mask"], bool)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"conditions: {error}; give tokens (n, l, {self.width})") from None
        if tokens.ndim != 3 or tokens.shape[2] != self.width or mask.shape != tokens.shape[:2] or not len(tokens):
            raise UserError(
                f"conditions: tokens and mask are {tokens.shape} and {mask.shape}, not (n, l, {self.width}) and (n, l)"
            )
        if tokens.shape[1] > self.length:
            raise UserError(f"conditions: {tokens.shape[1]} tokens, but the run was trained on up to {self.length}")
        if not np.isfinite(tokens[mask]).all():
            raise UserError("conditions: some tokens are NaN or infinite; leave them out by the mask")
        return self._padded(tokens, mask)

    def _padded(self, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Returns arrays of the length of the run: tokens beyond it are left out, and missing ones masked."""
        tokens = np.where(mask[..., None], tokens, 0)[:, : self.length]
        mask = mask[:, : self.length]
        room = self.length - mask.shape[1]
        return {
            "value": np.pad(tokens, ((0, 0), (0, room), (0, 0))).astype(np.float32),
            "mask": np.pad(mask, ((0, 0), (0, room))),
        }

    def to_columns(self, condition: Any) -> dict[str, np.ndarray]:
        return {"tokens": np.asarray(condition["value"]), "token_mask": np.asarray(condition["mask"])}

    # --- Words ---

    def titles(self, condition: Any) -> list[str]:
        counts = np.asarray(condition["mask"]).sum(axis=1).tolist()
        return [f"{count} token{'s' * (count != 1)}" if count else "no condition" for count in counts]

    def summary(self) -> str:
        return f"up to {self.length} token{'s' * (self.length != 1)} of {self.width} numbers"

    # --- A run ---

    def to_json(self) -> dict[str, Any]:
        return {self.record_name: dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TokensCondition":
        """Returns the recorded condition. Raises UserError for a record that no training can have written."""
        record = data.get(cls.record_name)
        try:
            found = cls(**record)  # ty: ignore[invalid-argument-type]
            found.check_record()
        except (TypeError, ValueError):
            raise UserError(f"the run's condition, {str(record)[:100]}, is no record of tokens") from None
        return found

    # The name of its facts in a run's record, beside those of other kinds.
    record_name: ClassVar[str] = "tokens"

    def check_record(self) -> None:
        """Raises ValueError for values that no training can have."""
        sizes = ((self.length, MAX_LENGTH), (self.width, MAX_WIDTH))
        if any(type(size) is not int or not 1 <= size <= most for size, most in sizes):
            raise ValueError


@dataclasses.dataclass(frozen=True)
class TextCondition(TokensCondition):
    """A text as the tokens that a text encoder gives it, and the text itself, {"text": uint8 (n, 256)}, for titles.

    `encoder` is as --text_encoder says it, `sha256` that of its weights.
    """

    record_name: ClassVar[str] = "text"

    encoder: str = "words"
    sha256: str | None = None

    @classmethod
    def of_captions(cls, captions: Sequence[str], encoder: str = "words") -> "TextCondition":
        """Returns the condition whose training data are `captions`: as long as the longest of them.

        Raises UserError for an encoder that cannot be loaded, and where no caption has a token.
        """
        find_text_encoder(encoder)
        length = longest_text(encoder, captions)
        if not length:
            raise UserError(f"no caption has any token of --text_encoder={encoder}")
        if length > MAX_LENGTH:
            raise UserError(f"a caption has {length:,} tokens of --text_encoder={encoder}; {MAX_LENGTH:,} is the most")
        width = encode_texts(encoder, captions[:1])[0].shape[2]
        return cls(length, width, encoder, load_text_encoder(encoder).sha256)

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {**super().spec, "text": jax.ShapeDtypeStruct((TEXT_BYTES,), jnp.uint8)}

    def read(self, example: Mapping[str, Any]) -> dict[str, Any]:
        # What has been encoded before lies beside the caption (utils/data/captions.py).
        caption = str(example["caption"])
        if "tokens" in example:
            return {**super().read(example), "text": _to_bytes(caption)}
        return {name: rows[0] for name, rows in self.encode([caption]).items()}

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns conditions of texts; one that has more tokens than any of training loses what is too much."""
        tokens, mask = encode_texts(self.encoder, texts, self.sha256)
        if tokens.shape[2] != self.width:
            raise UserError(f"--text_encoder={self.encoder}: tokens have {tokens.shape[2]} numbers, not {self.width}")
        return {**self._padded(tokens, mask), "text": np.stack([_to_bytes(text) for text in texts])}

    def check(self, values: Any) -> dict[str, np.ndarray]:
        """Returns conditions of texts, or of the arrays of `spec`. Raises UserError for others."""
        if isinstance(values, Mapping):
            return {**super().check(values), "text": Condition.check(self, values)["text"]}
        texts = [values] if isinstance(values, str) else list(values) if isinstance(values, Iterable) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"conditions={values!r}: give a text for each image")
        return self.encode(texts)

    def accepts(self, other: Condition) -> bool:
        # The encoder may lie elsewhere: its weights say what it is.
        is_alike = isinstance(other, TextCondition) and self.spec == other.spec and self.sha256 == other.sha256
        return is_alike and (self.sha256 is not None or self.encoder == other.encoder)

    def to_columns(self, condition: Any) -> dict[str, np.ndarray]:
        return {"captions": np.array(self.titles(condition))}

    # --- Words ---

    @property
    def fields(self) -> tuple[str, ...]:
        return ("text",)

    def from_fields(self, rows: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
        return self.encode([row["text"] for row in rows])

    def remarks(self, condition: Any) -> list[str]:
        """Returns a remark for each text of more tokens than any of training, and for each without any."""
        found = []
        for text in self.titles(condition):
            length = longest_text(self.encoder, [text])
            if length > self.length:
                found.append(
                    f"{text[:SHOWN]!r} has more than the {self.length} tokens of the longest caption in training: the "
                    "rest is left out"
                )
            elif not length:
                found.append(f"{text[:SHOWN]!r} has no token of --text_encoder={self.encoder}: it is drawn as no text")
        return found

    def titles(self, condition: Any) -> list[str]:
        texts = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in np.asarray(condition["text"]))
        return [text or "no text" for text in texts]

    def summary(self) -> str:
        return f"captions of up to {self.length} token{'s' * (self.length != 1)} by {self.encoder}"

    def check_record(self) -> None:
        super().check_record()
        if not isinstance(self.encoder, str) or not (self.sha256 is None or isinstance(self.sha256, str)):
            raise ValueError


def _to_bytes(text: str) -> np.ndarray:
    """Returns the UTF-8 bytes of a text, or of its beginning, as uint8 (256,), zeros behind it."""
    content = text.encode(errors="replace")[:TEXT_BYTES]
    return np.frombuffer(content.ljust(TEXT_BYTES, b"\0"), np.uint8)


CONDITIONS["tokens"] = TokensCondition
CONDITIONS["text"] = TextCondition
