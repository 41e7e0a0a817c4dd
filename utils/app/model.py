"""A model as a page shows it: what can be asked of it, and within which bounds."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from utils.base.messages import UserError
from utils.codecs.codec import pixel_format
from utils.conditions.classes import ClassCondition
from utils.conditions.images import ImageCondition
from utils.conditions.vector import VectorCondition
from utils.images.pixels import are_pictures
from utils.runs.checkpoint import FOLDER
from utils.runs.importing import HUB_PREFIX
from utils.runs.opening import split_load_dir
from utils.sampling.editing import fitting_solvers
from utils.sampling.generator import ImageGenerator
from utils.sampling.samplers import largest_steps
from utils.sampling.solvers import ADAPTIVE_SOLVERS, SOLVERS, SamplerConfig

TASKS = ("sample", "interpolate", "invert", "inpaint")
MAX_PIXELS = 2**24  # of all images of an answer together: 64 of 512x512
MAX_UPLOAD_BYTES = 24 * 2**20  # of a request; images in it are a third larger than as files
MAX_UPLOAD_PIXELS = 64_000_000  # of an image in it, before it is resized
MAX_TEXT = 2000  # letters of a value


class Limits(NamedTuple):
    """The most that one request may ask for, and how many requests may wait."""

    samples: int = 64
    steps: int = 256
    frames: int = 64
    queue: int = 8


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that is served: its generator, and the words by which programs load it."""

    generator: ImageGenerator
    load_dir: str
    options: tuple[str, ...] = ()  # further words of the command, such as --params raw
    guide: tuple[str, ...] = ()  # those of a guide, which only guided samples need
    limits: Limits = dataclasses.field(default_factory=Limits)

    @property
    def name(self) -> str:
        """The name of the run, without its folder."""
        return name_run(self.load_dir)

    def can(self, **fields: Any) -> bool:
        """Returns whether the model can be sampled with these fields of a SamplerConfig."""
        objective = self.generator.model.objective
        try:
            self.generator.check_sampler(SamplerConfig(largest_steps(64, objective), None)._replace(**fields))
        except UserError:
            return False
        return True

    @property
    def default_steps(self) -> int:
        return largest_steps(min(64, self.limits.steps), self.generator.model.objective)

    @property
    def default_scale(self) -> float | None:
        """The guidance scale that sample.py takes where none is given."""
        return 4.0 if self.can(cfg_scale=4.0) else None

    @property
    def tasks(self) -> list[str]:
        """Those of TASKS that suit the model: images of the user's own need classes, and pixels that files hold."""
        model = self.generator.model
        takes_images = isinstance(model.condition, ClassCondition) and are_pictures(
            pixel_format(model.codec), model.image_shape
        )
        return list(TASKS if takes_images else TASKS[:2])

    def solvers(self, task: str) -> list[str]:
        """Returns the solvers by which the model can do a task."""
        names = (*SOLVERS, *ADAPTIVE_SOLVERS) if task == "sample" else fitting_solvers(task)
        return [name for name in names if self.can(solver=name)]

    def describe(self) -> dict[str, Any]:
        """Returns what can be asked, as JSON."""
        model = self.generator.model
        height, width, channels = model.image_shape
        image = model.condition.find_part(ImageCondition)
        # Some models are of a few numbers of steps alone.
        check_steps = getattr(model.objective, "check_steps", lambda _: "")
        counts = [count for count in range(1, self.limits.steps + 1) if not check_steps(count)]
        return {
            "run": self.name,
            "image": {"height": height, "width": width, "channels": channels},
            "tasks": {task: {"solvers": self.solvers(task)} for task in self.tasks},
            "fields": [self._describe_field(name) for name in model.condition.fields],
            "is_class": isinstance(model.condition, ClassCondition),
            "condition_image": list(image.shape) if image else None,
            "step_counts": counts if len(counts) < self.limits.steps else None,
            "can_guide": self.can(cfg_scale=2.0),
            "can_guide_by_inner_head": self.can(inner_scale=2.0),
            "can_guide_by_model": self.can(guide_scale=2.0),
            "knows_no_class": model.network.config.class_dropout_prob > 0,
            "defaults": {"num_steps": self.default_steps, "cfg_scale": self.default_scale, "solver": "euler"},
            "limits": {**self.limits._asdict(), "pixels": MAX_PIXELS, "upload_bytes": MAX_UPLOAD_BYTES},
        }

    def _describe_field(self, name: str) -> dict[str, Any]:
        """Returns what a user gives as `name`: one of some classes, a number in the range of training, or a text."""
        condition = self.generator.condition
        # A kind of condition may be one of several; names of fields differ between them.
        classes = condition.find_part(ClassCondition)
        if classes is not None and name in classes.fields:
            return {"name": name, "classes": list(classes.class_names), "empty": list(classes.empty_classes)}
        vector = condition.find_part(VectorCondition)
        if vector is not None and name in vector.names:
            place = vector.names.index(name)
            return {
                "name": name,
                "low": vector.lows[place],
                "high": vector.highs[place],
                "typical": vector.means[place],
            }
        return {"name": name}


def name_run(load_dir: str) -> str:
    """Returns how a page calls a run: hf:USER/NAME, or the name of its folder or file, with the step that is asked."""
    if load_dir.startswith(HUB_PREFIX):
        return load_dir
    if Path(load_dir).is_file():
        return Path(load_dir).name
    folder, step = split_load_dir(load_dir)
    return folder.name if step is None else f"{folder.name}, step {step}"


def hide_folders(word: str) -> str:
    """Returns a word of a command, such as kl:/home/me/vae, without the folders of an absolute path in it: from the
    current folder on where it lies there, else its name alone, or RUN/checkpoints/STEP."""
    match = re.fullmatch(r"(\w+:)?(/(?!/).*)", word, flags=re.DOTALL)
    if match is None:
        return word
    path = Path(match[2])
    here = Path.cwd()
    if path.is_relative_to(here):
        path = path.relative_to(here)
    else:
        path = Path(*path.parts[-3 if path.parent.name == FOLDER else -1 :])
    return f"{match[1] or ''}{path}"


def hide_paths(text: str) -> str:
    """Returns a sentence in which absolute paths have lost their folders."""
    return re.sub(r"(^|(?<=[\s=:'\"(]))/(?:[^\s/]+/)*(?=\w)", "", text)
