"""The JSON of a request -> checked values: what is not as it should be is refused in one line, before it waits."""

import base64
import binascii
import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, PyTree, UInt8

from utils.app.model import MAX_PIXELS, MAX_TEXT, MAX_UPLOAD_PIXELS, Served
from utils.base.messages import UserError
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import Condition, count_rows, number_rows
from utils.conditions.images import ImageCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.words import write_rows, write_texts
from utils.images.decoding import BrokenImageError, open_image, read_image
from utils.images.pixels import check_pictures
from utils.sampling.editing import default_labels, read_mask
from utils.sampling.samplers import guidance_scale, is_integer
from utils.sampling.solvers import SamplerConfig

# Tolerances are left out: how long a sample takes would have no bound.
SAMPLER_FIELDS = tuple(name for name in SamplerConfig._fields if name not in ("rtol", "atol"))
CONDITION_FIELDS = ("classes", "conditions", "condition_images")
COMMON_FIELDS = (*SAMPLER_FIELDS, *CONDITION_FIELDS, "seed", "format", "stream")
# {task: its own fields}.
FIELDS = {
    "sample": ("num_samples", "frames"),
    "interpolate": ("num_samples", "columns", "between"),
    "invert": ("image", "edit"),
    "inpaint": ("image", "mask", "repeats"),
}
MAX_REPEATS = 20


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request for one of TASKS, checked."""

    task: str
    sampler: SamplerConfig
    seed: int
    conditions: PyTree | None  # given ones (k, ...), in turn; None: drawn
    words: tuple[str, ...] | None  # how a command line gives them; None where it cannot
    remarks: tuple[str, ...]  # on conditions, such as numbers beyond the training data
    format: str  # of the answer, png or npz
    num_samples: int = 1
    frames: int = 0  # of a film, beside the noise
    columns: int = 8
    between: str = "noise"
    repeats: int = 5
    edits: tuple[int, ...] = ()
    image: UInt8[np.ndarray, "1 h w c"] | None = None
    is_hole: Bool[np.ndarray, "h w"] | None = None
    labels: Int[np.ndarray, " 1"] | None = None  # of the image


def parse_json(content: bytes) -> dict[str, Any]:
    """Returns the fields of a request. Raises UserError for what is no JSON object, and for texts that are no texts."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        body = json.loads(content, parse_constant=refuse)
        # Halves of surrogate pairs, which JSON can write, would fail wherever the text is written.
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else error
        raise UserError(f"the request is no JSON ({reason})") from None
    if not isinstance(body, dict):
        raise UserError('the request is no JSON object, such as {"num_samples": 4}')
    return body


def parse_request(task: str, body: Mapping[str, Any], served: Served) -> Ask:
    """Returns what a request asks for. Raises UserError, which names the field, for anything that cannot be drawn."""
    # What there is at all.
    if task not in served.tasks:
        raise UserError(f"the model cannot {task}: it can {', '.join(served.tasks)}")
    known = (*COMMON_FIELDS, *FIELDS[task])
    for name in body:
        if name not in known:
            near = difflib.get_close_matches(name[:40], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise UserError(f"{name[:40]!r} is no field of {task}{hint}")
    if body.get("format", "png") not in ("png", "npz"):
        raise UserError("format: use png or npz")
    if body.get("format") == "npz" and body.get("stream"):
        raise UserError("stream: an npz comes as a whole; leave one of the two out")

    # What all tasks have, then what each has of its own.
    sampler = read_sampler(task, body, served)
    conditions, words = read_conditions(body, served)
    remarks = () if conditions is None else tuple(served.generator.condition.remarks(conditions))
    seed = _read_count(body, "seed", 0, 0, 2**32 - 1)
    ask = Ask(task, sampler, seed, conditions, words, remarks, body.get("format", "png"))
    read = {"sample": _read_sample, "interpolate": _read_interpolation}.get(task, _read_own_image)
    return dataclasses.replace(ask, **read(ask, body, served))


def read_sampler(task: str, body: Mapping[str, Any], served: Served) -> SamplerConfig:
    """Returns the sampler of a request. Raises UserError for one that does not suit the model or the task."""
    given: dict[str, Any] = {name: body[name] for name in SAMPLER_FIELDS if name in body}
    # Types first: ranges are those of the model's own checks.
    for name, value in given.items():
        given[name] = _read_setting(name, value)
    # What is left out is as sample.py has it.
    defaults: dict[str, Any] = {"num_steps": served.default_steps, "cfg_scale": served.default_scale}
    sampler = SamplerConfig(**defaults | given)
    served.generator.check_sampler(sampler)
    if not sampler.is_adaptive and sampler.num_steps > served.limits.steps:
        raise UserError(f"num_steps={sampler.num_steps}: up to {served.limits.steps} steps are drawn here")
    if sampler.solver not in (fitting := served.solvers(task)):
        raise UserError(f"solver={sampler.solver} cannot {task}; use one of {', '.join(fitting)}")
    return sampler._replace(cfg_scale=guidance_scale(sampler.cfg_scale))


def _read_setting(name: str, value: Any) -> Any:
    """Returns the value of a field of a sampler. Raises UserError for another type; the range is checked later."""
    # JSON has no pairs, and knows 0 and 1 as well as false and true.
    if name.endswith("_interval"):
        return tuple(value) if isinstance(value, list) else value
    if name == "cfg_zero_star" and value in (0, 1):
        return bool(value)
    is_text = name in ("solver", "spacing")
    is_good = isinstance(value, str if is_text else (int, float)) and not isinstance(value, bool)
    if not is_good and not (value is None and name in ("cfg_scale", "cfg_channels")):
        raise UserError(f"{name}={str(value)[:40]} is no {'text' if is_text else 'number'}")
    return value


# --- Conditions ---


def read_conditions(body: Mapping[str, Any], served: Served) -> tuple[PyTree | None, tuple[str, ...] | None]:
    """Returns (the conditions (k, ...) of a request, or None; how a command line gives them, or None where it cannot).

    Raises UserError for what is no condition of the model.
    """
    kind = served.generator.condition
    if "classes" in body:
        if "conditions" in body:
            raise UserError("classes and conditions: give one of the two")
        labels = read_classes(body["classes"], kind, "classes", served.limits.samples)
        text = write_classes(labels, kind)
        return np.array(labels, np.int32), None if text is None else ("--classes", text)
    rows = read_rows(body.get("conditions"), served.limits.samples)
    if kind.find_part(ImageCondition) is not None:
        return _read_condition_images(body, rows, served)
    if "condition_images" in body:
        raise UserError("condition_images: the model's condition is no image; leave them out")
    if rows is None:
        return None, ()
    _check_rows(rows, kind.fields)
    return kind.from_fields(rows), _write_conditions(rows)


def read_classes(values: Any, kind: Condition, field: str, most: int) -> list[int]:
    """Returns the labels of a list of classes, each by number or name. Raises UserError, which names the field."""
    if not isinstance(kind, ClassCondition):
        raise UserError(f"{field}: the model's condition is no class; give conditions")
    if not isinstance(values, list) or not 1 <= len(values) <= most:
        raise UserError(f"{field}: give a list of 1 to {most} classes, such as [3, 7]")
    # Numbers are labels even where a class is called by another's number.
    labels = []
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(kind.class_names):
                raise UserError(f"{field}: there is no class {value}; use 0 to {len(kind.class_names) - 1}, or names")
            labels.append(value)
        elif isinstance(value, str) and len(value) <= MAX_TEXT:
            labels.append(int(kind.check([value])[0]))
        else:
            raise UserError(f"{field}: a class is a number or a name")
    return labels


def write_classes(labels: Sequence[int], kind: Any) -> str | None:
    """Returns the text by which a command line gives classes; None where their names leave none."""
    # By number, or by name where a class is called by the number.
    names = kind.class_names
    text = ",".join(names[label] if str(label) in names else str(label) for label in labels)
    try:
        return text if kind.parse(text).tolist() == list(labels) else None
    except UserError:
        return None


def read_rows(values: Any, most: int) -> list[dict[str, str]] | None:
    """Returns the texts of the list of conditions of a request, {field: text} each; None where there is none."""
    if values is None:
        return None
    if not isinstance(values, list) or not 1 <= len(values) <= most or not all(isinstance(row, dict) for row in values):
        raise UserError(f'conditions: give a list of 1 to {most} objects, such as [{{"angle": 0.3}}]')
    for row in values:
        for name, value in row.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise UserError(f"conditions: {name[:40]} is neither a number nor a text")
            if isinstance(value, str) and (len(value) > MAX_TEXT or "\0" in value):
                raise UserError(f"conditions: {name[:40]} is no text of up to {MAX_TEXT} letters")
    return [
        {name: f"{value:.9g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        for row in values
    ]


def _check_rows(rows: Sequence[Mapping[str, str]], fields: Sequence[str]) -> None:
    if not fields:
        raise UserError("conditions: those of the model cannot be written; leave them out, and they are drawn")
    for row in rows:
        if set(row) != set(fields):
            raise UserError(f"conditions: each gives {', '.join(fields)}, once; found {', '.join(row)[:80] or 'none'}")


def _write_conditions(rows: Sequence[Mapping[str, str]]) -> tuple[str, ...] | None:
    if list(rows[0]) == ["class"]:
        return (
            None if any("," in row["class"] for row in rows) else ("--classes", ",".join(row["class"] for row in rows))
        )
    is_text = list(rows[0]) == ["text"]
    text = write_texts([row["text"] for row in rows]) if is_text else write_rows(rows)
    return None if text is None else ("--prompt" if is_text else "--condition", text)


def _read_condition_images(
    body: Mapping[str, Any], rows: list[dict[str, str]] | None, served: Served
) -> tuple[PyTree | None, tuple[str, ...] | None]:
    """Returns `read_conditions` for a model that is given images, perhaps beside other conditions."""
    kind = served.generator.condition
    image: Any = kind.find_part(ImageCondition)
    uploaded = body.get("condition_images")
    if uploaded is None and rows is None:
        return None, ()
    check_pictures(image.pixels, image.shape, "condition_images: files hold", "leave them out, and they are drawn")
    if not isinstance(uploaded, list) or not 1 <= len(uploaded) <= served.limits.samples:
        raise UserError(f"condition_images: give a list of 1 to {served.limits.samples} images, in base64")
    # As training has resized them.
    chosen = image.check(np.stack([read_upload(text, "condition_images", image.shape) for text in uploaded]))
    words = ("--condition_images", "FOLDER")
    if kind is image:
        if rows is not None:
            raise UserError("conditions: the image is all of the model's condition; leave them out")
        return chosen, words

    # The other parts are written, once for all images or for each.
    assert isinstance(kind, SeveralCondition)
    name = next(name for name, part in kind.parts if part is image)
    others = SeveralCondition(tuple(pair for pair in kind.parts if pair[1] is not image))
    if rows is None or len(rows) not in (1, len(uploaded)):
        raise UserError(f"conditions: give {', '.join(others.fields)} once, or for each image")
    _check_rows(rows, others.fields)
    text = write_rows(rows)
    found = {**others.from_fields(rows * (len(uploaded) // len(rows))), name: chosen}
    return found, None if text is None else (*words, "--condition", text)


# --- What each task has of its own ---


def _read_sample(ask: Ask, body: Mapping[str, Any], served: Served) -> dict[str, Any]:
    # As many samples as conditions, unless the request says otherwise.
    limits = served.limits
    count = min(16, limits.samples) if ask.conditions is None else count_rows(ask.conditions)
    num_samples = _read_count(body, "num_samples", count, 1, limits.samples)
    frames = _read_count(body, "frames", 0, 0, limits.frames)
    frames = frames if ask.sampler.is_adaptive else min(frames, ask.sampler.num_steps)
    check_size((frames + 1) * num_samples, served, "frames, or fewer samples" if frames else "samples")
    return {"num_samples": num_samples, "frames": frames}


def _read_interpolation(ask: Ask, body: Mapping[str, Any], served: Served) -> dict[str, Any]:
    # Rows of two samples each; all of their images count as samples.
    limits = served.limits
    columns = _read_count(body, "columns", min(8, limits.samples), 2, limits.samples)
    num_samples = _read_count(body, "num_samples", 2, 2, max(2, 2 * limits.samples // columns)) // 2 * 2
    between = body.get("between", "noise")
    if between not in ("noise", "conditions"):
        raise UserError("between: use noise or conditions")
    is_given = between == "conditions" and ask.conditions is not None
    if is_given and len(number_rows(served.generator.condition, ask.conditions)[1]) == 1:
        raise UserError("between=conditions: one condition alone is given; give another")
    check_size(columns * num_samples // 2, served, "columns")
    return {"num_samples": num_samples, "columns": columns, "between": between}


def _read_own_image(ask: Ask, body: Mapping[str, Any], served: Served) -> dict[str, Any]:
    """Returns the fields of `invert` and `inpaint`: an image, its label, and what is done to it."""
    model = served.generator.model
    if ask.sampler.cfg_zero_steps:
        raise UserError(
            f"cfg_zero_steps={ask.sampler.cfg_zero_steps}: steps that are left out cannot {ask.task}; use 0"
        )
    labels = default_labels(model, 1) if ask.conditions is None else ask.conditions[:1]
    if labels is None:
        raise UserError("classes: of which class is the image? Give one")
    # The image, then what is done to it.
    found: dict[str, Any] = {"num_samples": 1, "labels": labels}
    found["image"] = read_upload(body.get("image"), "image", model.image_shape)[None]
    if ask.task == "inpaint":
        found["is_hole"] = read_mask(_decode(body.get("mask"), "mask"), model.image_shape, "mask")
        found["repeats"] = _read_count(body, "repeats", 5, 1, MAX_REPEATS)
    elif "edit" in body:
        found["edits"] = tuple(read_classes(body["edit"], model.condition, "edit", served.limits.samples))
    return found


def check_size(count: int, served: Served, fewer: str) -> None:
    """Raises UserError for more images than an answer may hold. `fewer` says of what to take fewer."""
    height, width, _ = served.generator.model.image_shape
    if count * height * width > MAX_PIXELS:
        most = MAX_PIXELS // (height * width)
        raise UserError(f"{count} images of {height}x{width} are more than an answer holds, {most}; take fewer {fewer}")


def _read_count(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name, default)
    if not is_integer(value, low, high):
        raise UserError(f"{name}={str(value)[:40]}: use a whole number from {low} to {high}")
    return value


def _decode(text: Any, name: str) -> bytes:
    """Returns the bytes of a text in base64, with or without the head of a data URL."""
    try:
        if not isinstance(text, str):
            raise ValueError
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{name}: give an image file in base64") from None


def read_upload(text: Any, name: str, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "h w c"]:
    """Returns an image that came with a request, its middle resized to `shape` as in training. Raises UserError, which
    calls it `name`, for what is no image, and for a large one, before it is decoded."""
    content = _decode(text, name)
    height, width, channels = shape
    try:
        with open_image(content, max_megapixels=math.inf) as image:  # its header alone
            if image.width * image.height > MAX_UPLOAD_PIXELS:
                most = MAX_UPLOAD_PIXELS // 10**6
                raise UserError(f"{name}: {image.width}x{image.height} are above {most} megapixels; make it smaller")
    except BrokenImageError as error:
        raise UserError(f"{name} is not a readable image ({error}); give a PNG or JPEG") from None
    return read_image(content, name, (height, width), mode="L" if channels == 1 else "RGB")
