"""Rules for samplers: which steps, guidance and solver suit a model. The flags and the Python interface share them."""

import difflib
import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from utils.base.messages import UserError
from utils.objectives.objective import Objective, has_guidance
from utils.sampling.solvers import ADAPTIVE_SOLVERS, ODE_SOLVERS, SOLVERS, SPACINGS, SamplerConfig

# Bounds that no one reaches but by a typing error.
MAX_STEPS = 10**6
MAX_SCALE = 1000

# How a command line writes the fields of a SamplerConfig, up to the value.
FLAGS = {name: f"--{name}=" for name in SamplerConfig._fields}
FLAGS |= {"num_steps": "--denoise_timesteps=", "time_shift": "--time_grid=shift:", "spacing": "--time_grid="}


def guidance_scale(cfg_scale: float | None) -> float | None:
    """Returns None (no guidance, one pass a step) for -1 and for 1, which equals it; otherwise the scale."""
    return None if cfg_scale in (-1, 1) else cfg_scale


def check_sampler(
    sampler: SamplerConfig,
    objective: Objective | None = None,
    *,
    class_dropout_prob: float | None = None,
    num_channels: int | None = None,
    inner_head: int | None = None,
    has_guide: bool | None = None,
    names: Mapping[str, str] | None = None,
) -> None:
    """Raises UserError for a sampler that a model cannot be sampled with, or that has impossible values.

    `objective` None stands for flow matching. `class_dropout_prob`, `num_channels` and `inner_head` are the model's;
    `has_guide` says whether another guides it. None leaves out what depends on them. `names` say how messages write the
    fields: FLAGS for a command line, by default as in Python.
    """
    # Lazily, the solver first: a later rule may look up what an earlier one has found to exist.
    problems = itertools.chain(
        _check_solver(sampler, objective),
        _check_steps(sampler, objective),
        _check_times(sampler, objective),
        _check_guidance(sampler, objective, class_dropout_prob, num_channels),
        _check_zero_star(sampler),
        _check_other_guidance(sampler, inner_head, has_guide),
    )
    for field, fix in problems:  # the first: what follows may not make sense beside it
        value = getattr(sampler, field)
        text = ",".join(map(_write, value)) if isinstance(value, tuple) else _write(value)
        if field in ("num_steps", "cfg_channels"):  # 4.0 is refused, and must not be shown as 4
            text = repr(value)
        raise UserError(f"{(names or {}).get(field, f'{field}=')}{text}: {fix}")


BAD_INTERVAL = "give first and last time from 0 to 1, such as 0.1,0.9"
Problems = Iterator[tuple[str, str]]  # (field, the fix)


def _check_solver(sampler: SamplerConfig, objective: Objective | None) -> Problems:
    known = (*SOLVERS, *ADAPTIVE_SOLVERS)
    if sampler.solver not in known:
        near = difflib.get_close_matches(str(sampler.solver), known, n=1)
        yield "solver", f"{f'did you mean {near[0]}? ' if near else ''}Solvers are {', '.join(known)}"
    # An objective names its solvers where not all fit. Those of diffusions need noise levels.
    fitting = getattr(objective, "SOLVERS", (*ODE_SOLVERS, "sde", *ADAPTIVE_SOLVERS))
    if sampler.solver not in fitting:
        is_of_diffusion = not sampler.is_adaptive and SOLVERS[sampler.solver].grid == "objective"
        reason = "is of models trained as diffusions" if is_of_diffusion else "does not fit what the model learned"
        yield "solver", f"it {reason}; use one of {', '.join(fitting)}"


def _check_steps(sampler: SamplerConfig, objective: Objective | None) -> Problems:
    # An adaptive solver takes tolerances in place of a number of steps.
    if sampler.is_adaptive:
        for field in ("rtol", "atol"):
            if not _is_number(getattr(sampler, field), 1e-7, 1):
                yield field, "use a tolerance from 1e-7 to 1"
        return

    # The bounds of the solver, of the objective, and of its noise levels.
    grid = SOLVERS[sampler.solver].grid
    fewest = 2 if grid == "sde" else 1
    if not is_integer(sampler.num_steps, fewest, MAX_STEPS):
        of_solver = f" with solver {sampler.solver}" if fewest > 1 else ""
        yield "num_steps", f"use a whole number from {fewest} to {MAX_STEPS:,}{of_solver}"
    if problem := getattr(objective, "check_steps", lambda _: "")(sampler.num_steps):
        yield "num_steps", problem
    most = getattr(objective, "max_grid_steps", None)
    if grid == "objective" and most is not None and sampler.num_steps > most:
        yield "num_steps", f"the model has {most} noise levels, the most that {sampler.solver} can take"


def _check_times(sampler: SamplerConfig, objective: Objective | None) -> Problems:
    # A shift far from 1 puts all steps at one end.
    if not _is_number(sampler.time_shift, 0.01, 100):
        yield "time_shift", "use a shift from 0.01 to 100; 1 is the uniform grid"
    if sampler.time_shift != 1 and getattr(objective, "NEEDS_UNIFORM_STEPS", False):
        yield "time_shift", "the model learned steps of equal length; use the uniform grid"
    if sampler.spacing not in SPACINGS:
        yield "spacing", f"use one of {', '.join(SPACINGS)}"


def _check_guidance(
    sampler: SamplerConfig, objective: Objective | None, class_dropout_prob: float | None, num_channels: int | None
) -> Problems:
    scale = sampler.cfg_scale
    interval = sampler.cfg_interval
    # -1 is how a command line says None.
    if not (scale is None or _is_number(scale, -1, -1) or _is_number(scale, 0, MAX_SCALE)):
        yield "cfg_scale", f"use a scale from 0 to {MAX_SCALE}, or -1 for no guidance"
    if guidance_scale(scale) is not None:
        if objective is not None and not has_guidance(objective):
            yield "cfg_scale", "guidance is part of what the model has learned; use 1"
        if class_dropout_prob is not None and not can_guide(class_dropout_prob):
            yield "cfg_scale", f"{explain_no_guidance(class_dropout_prob)}; use 1"

    # Interval and channels, which matter only where there is guidance, are checked all the same.
    if not _is_interval(interval):
        yield "cfg_interval", BAD_INTERVAL
    most = num_channels or MAX_STEPS
    if sampler.cfg_channels is not None and not is_integer(sampler.cfg_channels, 1, most):
        yield "cfg_channels", f"the model has {most} channels; use 1 to {most}" if num_channels else "use 1 or more"


def _check_zero_star(sampler: SamplerConfig) -> Problems:
    if sampler.cfg_zero_star and guidance_scale(sampler.cfg_scale) is None:
        yield "cfg_zero_star", "it has no effect without guidance; give a cfg_scale other than 1, or leave it out"
    if not sampler.cfg_zero_steps:
        return
    if not sampler.cfg_zero_star:
        yield "cfg_zero_steps", "it has no effect without cfg_zero_star; give both, or neither"
    # Steps are counted from the start, and a stochastic solver would have to add noise in those that are left out.
    if sampler.is_adaptive or SOLVERS[sampler.solver].is_stochastic:
        yield "cfg_zero_steps", f"{sampler.solver} has no steps to leave out; use 0, or one of {', '.join(ODE_SOLVERS)}"
    if not is_integer(sampler.cfg_zero_steps, 0, sampler.num_steps - 1):
        yield "cfg_zero_steps", f"use a whole number below the {sampler.num_steps} steps; 4 % of them are usual"


def _check_other_guidance(sampler: SamplerConfig, inner_head: int | None, has_guide: bool | None) -> Problems:
    for kind in ("inner", "guide"):
        if not _is_number(getattr(sampler, f"{kind}_scale"), 0, MAX_SCALE):
            yield f"{kind}_scale", f"use a scale from 0 to {MAX_SCALE}; 1 is no guidance"
        if not _is_interval(getattr(sampler, f"{kind}_interval")):
            yield f"{kind}_interval", BAD_INTERVAL
    if sampler.is_inner_guided and inner_head == 0:
        yield "inner_scale", "the model has no inner head (it was trained without --model.inner_head); use 1"
    if sampler.is_model_guided and has_guide is False:
        yield "guide_scale", "there is no model to guide by; name one as the guide, or use 1"


def largest_steps(num_steps: int, objective: Objective) -> int:
    """Returns the most steps, up to `num_steps`, that a model of the objective can take."""
    check = getattr(objective, "check_steps", lambda _: "")
    return next(count for count in range(num_steps, 0, -1) if not check(count))


def _write(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: Any, low: float, high: float) -> bool:
    try:
        # True is a number to Python, but none to a user.
        return not isinstance(value, bool) and bool(math.isfinite(value) and low <= value <= high)
    except TypeError:
        return False


def _is_interval(value: Any) -> bool:
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    return is_pair and all(_is_number(t, 0, 1) for t in value) and value[0] <= value[1]


def is_integer(value: Any, low: int, high: int) -> bool:
    """Whether a value is a whole number, of Python or NumPy, from `low` to `high`."""
    try:
        return not isinstance(value, bool) and low <= operator.index(value) <= high
    except TypeError:
        return False


def can_guide(class_dropout_prob: float) -> bool:
    """Whether a model trained with this dropout knows both sides of guidance: labels given, and labels dropped."""
    return 0 < class_dropout_prob < 1


def explain_no_guidance(class_dropout_prob: float) -> str:
    what = 'has no meaning for "no label"' if class_dropout_prob == 0 else "knows no labels"
    return f"with --model.class_dropout_prob={class_dropout_prob:g} the model {what}, which guidance needs"
