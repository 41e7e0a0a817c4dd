"""Which flag has no effect beside which other settings: one table, read before anything compiles."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from utils.flags.reading import refuse_ignored


class Rule(NamedTuple):
    """Flags without effect where `applies` to the values of all flags and the facts that a program adds.

    `reason` completes "--flag=value has no effect ..."; {names} in it are values of flags or facts.
    """

    flags: tuple[str, ...]
    reason: str
    applies: Callable[[Any], bool]


def _has_no_wandb(values: Any) -> bool:
    return "wandb" not in values.trackers


# {program: its rules}, in the order in which they are looked at.
RULES: dict[str, tuple[Rule, ...]] = {
    "sample": (
        Rule(("labels",), "beside --classes", lambda given: given.classes is not None),
        Rule(("film_frames", "film_format"), "without --film", lambda given: not given.film),
    ),
    "edit": (
        Rule(("labels",), "beside --classes", lambda given: given.classes is not None),
        Rule(("between",), "without --interpolate", lambda given: given.interpolate is None),
        Rule(
            ("save_samples",),
            "with --interpolate, which draws rows of images alone",
            lambda given: given.interpolate is not None,
        ),
        Rule(("edit",), "without --invert", lambda given: given.invert is None),
        Rule(
            ("cfg_scale", "cfg_interval", "cfg_channels", "save_samples"),
            "with --invert but without --edit: it is without guidance",
            lambda given: given.invert is not None and given.edit is None,
        ),
        Rule(("seed",), "with --invert, which draws no noise", lambda given: given.invert is not None),
        Rule(("labels",), "on images of your own; --classes names theirs", lambda given: given.interpolate is None),
        Rule(
            ("batch_size",),
            "on images of your own, which are one batch; --num_samples limits them",
            lambda given: given.interpolate is None,
        ),
        Rule(("mask", "inpaint_repeats"), "without --inpaint", lambda given: given.inpaint is None),
    ),
    "likelihood": (
        Rule(
            ("rtol", "atol"),
            "with --solver=midpoint, which takes --denoise_timesteps",
            lambda given: given.solver == "midpoint",
        ),
        Rule(
            ("denoise_timesteps",),
            "with --solver={solver}, which chooses its steps",
            lambda given: given.solver != "midpoint",
        ),
    ),
    # Of every program with --trackers.
    "trackers": (
        Rule(
            tuple(f"wandb.{name}" for name in ("mode", "offline", "project", "entity", "group", "notes", "tags")),
            "without wandb among --trackers",
            _has_no_wandb,
        ),
        # A training's folder is named after it, unless --save_dir names that.
        Rule(
            ("wandb.name",),
            "without wandb among --trackers",
            lambda values: _has_no_wandb(values) and bool(getattr(values, "save_dir", True)),
        ),
    ),
}


def check_effects(rules: Iterable[Rule], config: ConfigDict, **facts: Any) -> None:
    """Raises UserError for a flag that the user gave although it has no effect.

    `facts` are what a program knows beside its flags, such as is_latent=True; rules read them as `values.is_latent`.
    """
    known = {**config.to_dict(), **facts}
    values = SimpleNamespace(**known)
    for rule in rules:
        if rule.applies(values):
            refuse_ignored(rule.flags, rule.reason.format(**known))
