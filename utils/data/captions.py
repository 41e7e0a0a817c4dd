"""Captions of a data set whose encoder is slow, encoded once for all rather than where each is read."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32

from utils.base.messages import UserError, log
from utils.conditions.text_encoders import find_text_encoder
from utils.conditions.tokens import TextCondition
from utils.data.dataset import Example, RandomAccess

MAX_BYTES = 2**31  # of the tokens of a split, which stay in memory
CHUNK = 1024  # captions encoded between two lines of progress


@dataclasses.dataclass(frozen=True)
class EncodedCaptions:
    """A source of examples, each with the tokens of its caption; tokens of equal captions are kept once."""

    source: RandomAccess
    tokens: Float32[np.ndarray, "m l d"]
    mask: Bool[np.ndarray, "m l"]
    places: tuple[int, ...]  # of each example's caption among them

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return {**self.source[index], **self._encoded(index)}

    def read_condition(self, index: int) -> Example:
        """Returns an example without its image, where the source can leave it out."""
        return {**read_condition(self.source, index), **self._encoded(index)}

    def _encoded(self, index: int) -> Example:
        place = self.places[index]
        return {"tokens": self.tokens[place], "token_mask": self.mask[place]}


def read_condition(source: RandomAccess, index: int) -> Example:
    """Returns an example, without its image where the source can leave that out."""
    return getattr(source, "read_condition", source.__getitem__)(index)


def encode_captions(source: RandomAccess, condition: TextCondition, what: str) -> RandomAccess:
    """Returns the source with the tokens of its captions, if their encoder is slow, and as it is otherwise.

    Raises UserError, which begins with `what`, where they do not fit into memory.
    """
    if not find_text_encoder(condition.encoder).is_slow:
        return source
    examples = [read_condition(source, index) for index in range(len(source))]
    if any("tokens" in example for example in examples[:1]):
        return source  # data may bring them
    captions = [str(example["caption"]) for example in examples]
    distinct = list(dict.fromkeys(captions))
    num_bytes = len(distinct) * condition.length * condition.width * 4
    if num_bytes > MAX_BYTES:
        raise UserError(
            f"{what}: tokens of {len(distinct):,} captions by --text_encoder={condition.encoder} take "
            f"{num_bytes / 2**30:.1f} GiB, of which {MAX_BYTES / 2**30:.0f} are kept in memory; use an encoder of "
            "narrower tokens, or shorter captions"
        )

    # The same text is encoded once.
    tokens = np.zeros((len(distinct), condition.length, condition.width), np.float32)
    mask = np.zeros(tokens.shape[:2], bool)
    for start in range(0, len(distinct), CHUNK):
        found = condition.encode(distinct[start : start + CHUNK])
        tokens[start : start + CHUNK] = found["value"]
        mask[start : start + CHUNK] = found["mask"]
        log(f"{what}: {min(start + CHUNK, len(distinct)):,} of {len(distinct):,} captions encoded")
    numbers = {caption: number for number, caption in enumerate(distinct)}
    return EncodedCaptions(source, tokens, mask, tuple(numbers[caption] for caption in captions))
