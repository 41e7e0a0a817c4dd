"""Captions of a data set whose encoder is slow, encoded once for all rather than where each is read."""

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from utils.base.devices import format_bytes
from utils.base.external import BadFileError, map_npy
from utils.base.files import atomic_write, cache_folder
from utils.base.messages import UserError, progress_bar
from utils.conditions.condition import RECORDED
from utils.conditions.text_encoders import find_text_encoder
from utils.conditions.tokens import TextCondition
from utils.data.dataset import Example, RandomAccess

MAX_BYTES = 2**31  # of tokens that stay in memory
CHUNK = 1024  # captions encoded between two lines of progress


@dataclasses.dataclass(frozen=True)
class EncodedCaptions:
    """A source of examples, each with the tokens of its caption; tokens of equal captions are kept once.

    The first number of a token is 1 where there is a token, the others are the token.
    """

    source: RandomAccess
    rows: Float32[np.ndarray, "m l more"]
    places: tuple[int, ...]  # of each example's caption among them

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return {**self.source[index], **self._encoded(index)}

    def read_condition(self, index: int) -> Example:
        """Returns an example without its image, where the source can leave it out."""
        return {**read_condition(self.source, index), **self._encoded(index)}

    def _encoded(self, index: int) -> Example:
        row = np.asarray(self.rows[self.places[index]])
        return {"tokens": row[:, 1:], "token_mask": row[:, 0] > 0}


def read_condition(source: RandomAccess, index: int) -> Example:
    """Returns an example, without its image where the source can leave that out."""
    return getattr(source, "read_condition", source.__getitem__)(index)


def encode_captions(source: RandomAccess, condition: TextCondition, what: str) -> RandomAccess:
    """Returns the source with the tokens of its captions, if their encoder is slow, and as it is otherwise.

    Those of an encoder with weights are kept in a file of the cache folder, where later starts find them. Raises
    UserError, which begins with `what`, where tokens fit neither into memory nor there.
    """
    if not find_text_encoder(condition.encoder).is_slow:
        return source
    if len(source) and {"tokens", RECORDED} & read_condition(source, 0).keys():
        return source  # data may bring them
    indices = progress_bar(range(len(source)), "reading the captions", unit="caption", delay=5)
    examples = [read_condition(source, index) for index in indices]
    captions = [str(example["caption"]) for example in examples]
    distinct = list(dict.fromkeys(captions))  # the same text is encoded once
    numbers = {caption: number for number, caption in enumerate(distinct)}
    rows = _encode_distinct(distinct, condition, what)
    return EncodedCaptions(source, rows, tuple(numbers[caption] for caption in captions))


def _encode_distinct(captions: Sequence[str], condition: TextCondition, what: str) -> Float32[np.ndarray, "m l more"]:
    """Returns the rows of captions, from an earlier start's file if there is one."""
    shape = (len(captions), condition.length, 1 + condition.width)
    num_bytes = 4 * int(np.prod(shape))
    tokens = f"{what}: tokens of {len(captions):,} captions by --text_encoder={condition.encoder} take "
    # Without weights an encoder is a function, which may become another one under the same name.
    if condition.sha256 is None:
        if num_bytes > MAX_BYTES:
            raise UserError(
                f"{tokens}{format_bytes(num_bytes)}, of which {format_bytes(MAX_BYTES)} are kept in memory; use an "
                "encoder of narrower tokens, or shorter captions"
            )
        return np.concatenate(list(_encode_chunks(captions, condition, what)))

    key = hashlib.sha256("\0".join([condition.sha256, str(shape), *captions]).encode(errors="surrogatepass"))
    file = cache_folder() / f"tokens-{key.hexdigest()[:32]}.npy"
    with contextlib.suppress(BadFileError, OSError):
        return map_npy(file)[1]
    elsewhere = "make room, or set XDG_CACHE_HOME to another folder"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(file.parent).free
    except OSError as error:
        raise UserError(f"{what}: {file.parent}, where tokens are kept: {error.strerror}; {elsewhere}") from None
    if free < num_bytes:
        raise UserError(
            f"{tokens}{format_bytes(num_bytes)}, but {format_bytes(free)} are free in {file.parent}; {elsewhere}"
        )
    with atomic_write(file) as temporary, temporary.open("wb") as output:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(output, header)
        for rows in _encode_chunks(captions, condition, what):
            output.write(rows.astype("<f4").tobytes())
    return map_npy(file)[1]


def _encode_chunks(captions: Sequence[str], condition: TextCondition, what: str) -> Iterator[np.ndarray]:
    """Yields the rows of so many captions at a time, float32 (n, l, 1 + d)."""
    with progress_bar(total=len(captions), desc="encoding the captions, once", unit="caption") as bar:
        for start in range(0, len(captions), CHUNK):
            chunk = captions[start : start + CHUNK]
            found = condition.encode(chunk)
            yield np.concatenate([found["mask"][..., None], found["value"]], axis=-1, dtype=np.float32)
            bar.update(len(chunk))
