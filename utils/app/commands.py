"""The commands of sample.py and edit.py that do what a request asks for."""

import shlex
from pathlib import Path
from typing import Any

from utils.app.model import Served, hide_folders
from utils.app.requests import Ask, write_classes
from utils.base.commands import write_command
from utils.sampling.samplers import FLAGS, guidance_scale
from utils.sampling.solvers import SamplerConfig

# What a user has to put in the place of an image that came with the request.
FOLDER = "FOLDER"
MASK = "MASK.png"


def write_request(served: Served, ask: Ask) -> str | None:
    """Returns the command line that draws what `ask` asks for; None where its conditions cannot be written in one.

    Absolute paths are left out but for their last name: an answer says nothing about the machine.
    """
    edits = write_classes(ask.edits, served.generator.condition) if ask.edits else ""
    if ask.words is None or edits is None:
        return None
    program = "sample.py" if ask.task == "sample" else "edit.py"
    words: list[Any] = ["--load_dir", hide_folders(served.load_dir), *map(hide_folders, served.options)]

    # The task.
    if ask.task == "interpolate":
        words += ["--interpolate", ask.columns, *(["--between", ask.between] if ask.between != "noise" else [])]
    elif ask.task == "invert":
        words += ["--invert", FOLDER, *(["--edit", edits] if edits else [])]
    elif ask.task == "inpaint":
        words += [
            "--inpaint",
            FOLDER,
            "--mask",
            MASK,
            *(["--inpaint_repeats", ask.repeats] if ask.repeats != 5 else []),
        ]

    # Conditions, and how many samples there are of them.
    words += ask.words
    if ask.task in ("sample", "interpolate"):
        words += ["--num_samples", ask.num_samples]
    # An inversion draws no noise, and is guided only where it draws other classes.
    if ask.task != "invert":
        words += ["--seed", ask.seed]
    words += write_sampler(ask.sampler, has_guidance=ask.task != "invert" or bool(ask.edits))
    if ask.sampler.is_model_guided:
        words += map(hide_folders, served.guide)
    if ask.frames:
        words += ["--film", "--film_frames", ask.frames]

    # The program as it is started here, without the folders in which it lies.
    start = len(shlex.split(write_command(program)))
    python, *others = shlex.split(write_command(program, *words))
    names = [Path(word).name if Path(word).is_absolute() else word for word in (python, *others[: start - 1])]
    return shlex.join([*names, *others[start - 1 :]])


def write_sampler(sampler: SamplerConfig, has_guidance: bool = True) -> list[str]:
    """Returns the flags of a sampler: steps and guidance always, as the programs have defaults of their own for them;
    of the others, those that are not the default. Without `has_guidance`, no flag about it is written."""
    if not has_guidance:
        words = write_sampler(sampler.without_guidance())
        place = words.index("--cfg_scale")
        return words[:place] + words[place + 2 :]
    default = SamplerConfig(0, None)
    is_guided = guidance_scale(sampler.cfg_scale) is not None
    words: list[str] = []
    for name, value in sampler._asdict().items():
        needs_guidance = name.startswith("cfg_") and name != "cfg_scale"
        if name == "num_steps" and sampler.is_adaptive:
            continue
        if (needs_guidance and not is_guided) or (
            name not in ("cfg_scale", "num_steps") and value == getattr(default, name)
        ):
            continue
        flag, _, start = FLAGS[name].partition("=")
        value = (1 if name == "cfg_scale" else "") if value is None else value
        values = value if isinstance(value, tuple) else (value,)
        words += [flag, start + ",".join(_write(number) for number in values)]
    return words


def _write(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value!r}".removesuffix(".0") if isinstance(value, float) else str(value)
