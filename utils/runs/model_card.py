"""The model card of an exported folder: what the model is, a picture, its scores, and how it is sampled.

The hub shows it as a page, and reads the metadata before it: https://huggingface.co/docs/hub/model-cards. Names of data
sets, columns and runs may hold anything, and are shown as text. No folder of this machine is named.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.conditions.condition import Condition, recorded_kind, restore_condition
from utils.conditions.images import ImageCondition
from utils.convert.sources import HUB_ID
from utils.data.joined import SEPARATOR
from utils.data.loaders import split_names
from utils.images.pixels import PixelFormat
from utils.objectives.objective import has_guidance
from utils.objectives.objectives import OBJECTIVES
from utils.runs.results import score_columns, to_markdown
from utils.sampling.samplers import can_guide

TASK = "unconditional-image-generation"  # of the hub's tasks, the one of models that draw without a prompt
EXAMPLE_STEPS = 64
EXAMPLE_SCALE = 2.0  # of guidance
# Settings of a row that the hub's table has beside each score.
ROW_SETTINGS = (
    "solver", "num_steps", "cfg_scale", "num_samples", "seed", "labels", "convention", "extractor",
    "fid_stats_sha256",
)  # fmt: skip


class Extras(NamedTuple):
    """Parts of a card that a configuration does not tell."""

    picture: str | None = None  # name of the file beside the card
    caption: str = ""
    rows: Sequence[Mapping[str, Any]] = ()  # of fid.json, of these parameters
    licence: str | None = None  # by the hub's name, such as mit


NO_EXTRAS = Extras()


def model_card(config: Mapping[str, Any], hub_id: str, step: int, extras: Extras = NO_EXTRAS) -> str:
    """Returns the README.md of the hub repository `hub_id` for a run's configuration and the step of its export."""
    # What the text needs, as words.
    model = config["model"]
    data = config["dataset"]
    objective = config["objective"]["name"]
    scale = f"{model['timestep_scale']:g}"
    unusual = "".join(f", {words}" for words in describe_unusual(config))
    shape = "x".join(map(str, data["image_shape"]))
    codec = _find_codec(data)
    latents = f", as latents {'x'.join(map(str, data['latent_shape']))} of {codec.title}" if codec else ""
    condition = restore_condition(data)
    summary = as_text(condition.summary() or f"the condition {recorded_kind(data)}")
    licence = f"Licence: {as_code(extras.licence)}." if extras.licence else "No licence is given for the model."

    # The parts, one after the other.
    name = hub_id.rpartition("/")[2]
    parts = [
        f"---\n{_metadata(config, name, extras)}---",
        f"# {as_text(name)}",
        _picture(extras),
        f"A diffusion transformer, {model['hidden_size']} wide, {model['depth']} deep, {model['num_heads']} heads,\n"
        f"patch {model['patch_size']}, trained with the objective {as_code(objective)} on images {shape} of "
        f"{as_code(public_name(data['name']))}\n({summary}){latents}. These are the parameters of step {step:,}.",
        f"`model.safetensors` has the tensor names of DiT and SiT. Its network takes the time times {scale}{unusual}.",
        _scores(extras.rows),
        _usage(config, condition, hub_id),
        f"## Licence\n\n{licence} That of the data is not known here.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def describe_unusual(config: Mapping[str, Any]) -> list[str]:
    """Returns, in words, what the network of a run's configuration does differently from a SiT."""
    objective = config["objective"]
    scale = objective.get("noise_scale") or 1
    bottleneck = config["model"].get("bottleneck", 0)
    words = {
        "predicts the data instead of the velocity": objective.get("prediction") == "data",
        f"starts from noise of standard deviation {scale:g}": scale != 1,
        f"reads patches through a bottleneck of {bottleneck} channels": bottleneck > 0,
    }
    return [text for text, is_so in words.items() if is_so]


def is_guided(config: Mapping[str, Any]) -> bool:
    """Returns whether the examples of a card guide the model: they are to run as they stand."""
    objective = OBJECTIVES.get(config["objective"]["name"])
    return can_guide(config["model"]["class_dropout_prob"]) and has_guidance(objective)


def example_fields(condition: Condition) -> dict[str, str]:
    """Returns a value for each field of a condition, as a user would write it; {} where it cannot be written."""
    known = {**condition.typical, "class": "0", "text": "a text"}
    is_written = condition.find_part(ImageCondition) is None and set(condition.fields) <= known.keys()
    # A name with a line break would need a shell's own spelling.
    return {name: known[name] for name in condition.fields} if is_written and "".join(known).isprintable() else {}


# --- Metadata ---


def _metadata(config: Mapping[str, Any], name: str, extras: Extras) -> str:
    """Returns the YAML that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    # Scores in the hub's `model-index`, each with the settings that it depends on.
    data = public_name(config["dataset"]["name"])
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=data,
            dataset_name=data,
            metric_type=score,
            metric_name=title,
            metric_value=float(f"{row[score]:.6g}"),
            metric_args={key: row[key] for key in ROW_SETTINGS if row.get(key) is not None} | _reference(row),
        )
        for row in extras.rows
        for score, title in score_columns().items()
        if isinstance(row.get(score), float | int) and math.isfinite(row[score])
    ]
    hub_data = [each.removeprefix("hf:") for each in split_names(data) if re.fullmatch(f"hf:{HUB_ID}", each)]
    card = ModelCardData(
        library_name="jax-flow-matching",
        pipeline_tag=TASK,
        tags=["diffusion-transformer", config["objective"]["name"].replace("_", "-")],
        license=extras.licence,
        datasets=hub_data or None,
        model_name=clean(name) or "model" if results else None,
        eval_results=results or None,
    )
    return f"{card.to_yaml()}\n"


def _reference(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the name of the statistics of a row, without the folders of this machine."""
    path = row.get("fid_stats")
    return {"statistics": clean(Path(path).name)} if isinstance(path, str) else {}


# --- Parts of the page ---


def _picture(extras: Extras) -> str:
    if extras.picture is None:
        return ""
    caption = f"\n\n*{as_text(extras.caption)}*" if extras.caption else ""
    return f"![Samples]({extras.picture}){caption}"


def _scores(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the tables of scores, one for each reference and feature network."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        # A score means something only beside the images and the network by which it was measured.
        names = row.get("extractor") or (["inception"] if row.get("inception_sha256") else ["pixels"])
        features = " and ".join(map(str, names if isinstance(names, list) else [names]))
        convention = f" ({as_code(str(row['convention']))})" if row.get("convention") else ""
        statistics = _reference(row).get("statistics")
        sha256 = clean(str(row.get("fid_stats_sha256")))[:12]
        against = f"Against {as_code(statistics)} (sha256 {as_text(sha256)}), features" if statistics else "Features"
        title = f"{against} of {as_code(features)}{convention}:"
        groups.setdefault(title, []).append({**row, "solver": as_text(str(row.get("solver", "euler")))})
    tables = [f"{title}\n\n{to_markdown(group, {'solver': 'solver'})}" for title, group in groups.items()]
    return "\n\n".join(["## Scores", *tables]) if tables else ""


def _usage(config: Mapping[str, Any], condition: Condition, hub_id: str) -> str:
    """Returns how the model is sampled: in a shell, and from Python. Every line runs as it stands."""
    # Rows of the data, from which conditions other than classes are drawn, are not published: the example gives one.
    data = config["dataset"]
    place = f"hf:{clean(hub_id)}"
    shape = ", ".join(map(str, data["image_shape"]))
    returned = f"{PixelFormat.from_record(data).dtype} (1, {shape})"
    wanted = "labels=[0]" if "class_names" in data else "num_samples=1"
    words: list[str] = []
    lines = ""
    if condition.DRAWS_ROWS:
        fields = example_fields(condition)
        wanted = "conditions=conditions"
        words = ["--condition", ",".join(f"{name}={text}" for name, text in fields.items())]
        lines = f"conditions = generator.condition.from_fields([{fields}])\n"
        if not fields:
            words = ["--condition_file", "FILE.npz"]
            lines = f"conditions = ...  # of each sample: {clean(condition.summary())}\n"
    guidance = f", cfg_scale={EXAMPLE_SCALE}" if is_guided(config) else ""
    scale = ["--cfg_scale", f"{EXAMPLE_SCALE:g}"] if guidance else []

    codec = _find_codec(data)
    missing = ""
    if codec is not None and not codec.is_public:
        flag = f"{codec.name}:FILE"
        missing = "\n\nIts autoencoder is not part of this. Where it is not found, name its file: "
        missing += f'`--codec {flag}`, in Python `codec="{flag}"`.'
    command = shlex.join(["--load_dir", place, *scale, *words])
    return f"""## Use

You need the code of jax-flow-matching, installed as its README says (`make setup`):

    export PYTHONPATH=/path/to/jax-flow-matching
    python $PYTHONPATH/sample.py {command}
    python $PYTHONPATH/train_flow.py {shlex.join(["--load_dir", place])} --dataset_name folder:PATH

In Python:

```python
from utils.runs.opening import load_generator

generator = load_generator({json.dumps(place, ensure_ascii=False)})
{lines}images = generator.sample({wanted}, num_steps={EXAMPLE_STEPS}{guidance})  # {returned}
```{missing}"""


# --- Text ---


def clean(text: str) -> str:
    """Returns a text in one line, with spaces in place of what is not printed: controls, and marks of direction."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def as_text(text: str) -> str:
    """Returns Markdown that shows a text as it stands."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$@])", r"\\\1", clean(text))


def as_code(text: str) -> str:
    """Returns Markdown that shows a text as it stands, as code: between more backticks than it has in a row."""
    text = clean(text)
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " * (ticks != "`")
    return f"{ticks}{space}{text}{space}{ticks}"


def public_name(dataset_name: str) -> str:
    """Returns the name of a data set without the folders of a path in it; data on the hub have no such folders."""
    if len(names := split_names(dataset_name)) > 1:
        return SEPARATOR.join(map(public_name, names))
    if re.match(f"hf:{HUB_ID}", dataset_name):
        return dataset_name
    kind, colon, path = dataset_name.partition(":")
    return clean(f"{kind}{colon}{Path(path).name}" if colon else Path(dataset_name).name)


class _Codec(NamedTuple):
    """The autoencoder of a model's latents, as a card names it."""

    name: str  # as --codec says it
    title: str
    is_public: bool  # on the hub


def _find_codec(data: Mapping[str, Any]) -> _Codec | None:
    """Returns the codec that a run has recorded; None of pixels."""
    vae = {"name": "kl", "source": data["vae"], "sha256": data["vae_sha256"]} if data["vae"] else {"name": "pixels"}
    codec = data.get("codec") or vae
    name = codec["name"]
    source = codec.get("source")
    if name == "pixels":
        return None
    # "a/b" may be a hub id or a relative path; a folder of that name decides. A hash identifies what lies in a folder.
    if source and re.fullmatch(HUB_ID, source) and not Path(source).exists():
        return _Codec(name, as_code(source), True)
    title = "a VAE" if name == "kl" else f"the codec {as_code(name)}"
    return _Codec(name, f"{title} with sha256 {codec['sha256']}" if codec.get("sha256") else title, False)
