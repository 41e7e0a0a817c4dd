"""The rows and cells of the ablation: which flags stand beside the recipe's, and how samples are guided."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

RECIPE = """
    --codec pixels --model.patch_size 7 --model.hidden_size 128 --model.depth 4 --model.num_heads 4 --model.mlp_ratio 4
    --model.num_classes 10 --model.class_dropout_prob 0.1 --model.dtype float32 --model.lr 1e-3
    --model.target_update_rate 0.995 --batch_size 64
"""
UNSEEN = "--eval_interval 0 --log_interval 100 --wandb.mode disabled --keep_last 9 --save_minutes 0"
BEST = "--objective.prediction data --objective.t_mean -0.4 --model.inner_head 2"

STEP_COUNTS = (50, 8, 2, 1)
CHOICE_STEPS = 25  # at which guidance is chosen
CHOICE_SEED = 1
GUIDE_FRACTION = 4  # a guide has had a quarter of the steps
ROUND_STEPS = 50  # to a multiple of which steps of equal time are rounded

# {field of a sampler, `params`, or the share of zero steps: values}; scales of 1 are no guidance.
ZERO_FRACTION = "cfg_zero_fraction"
CFG = {"cfg_scale": (1, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)}
INNER = CFG | {"inner_scale": (1, 1.3, 1.6, 2.0, 2.5)}


class Row(NamedTuple):
    """Flags beside the recipe's, and the settings among which those of its samples are chosen."""

    flags: str = ""
    axes: Mapping[str, Sequence[Any]] = CFG  # values of each setting, among which one is chosen
    trained_as: str | None = None  # the row whose training it shares
    is_guided_by_itself: bool = False  # by an earlier checkpoint of its own training
    is_only_at_equal_steps: bool = False


ROWS = {
    "recipe": Row(),
    "best": Row(BEST, INNER),
    "data": Row("--objective.prediction data"),
    "data + t mean -0.4": Row("--objective.prediction data --objective.t_mean -0.4"),
    "t mean -0.4": Row("--objective.t_mean -0.4"),
    "inner head": Row("--model.inner_head 2", INNER),
    "autoguidance": Row("", {"guide_scale": (1, 1.25, 1.5, 2.0, 2.5, 3.0)}, "recipe", is_guided_by_itself=True),
    "Muon": Row("--optimizer muon"),
    "minibatch OT": Row("--coupling minibatch --coupling_rows 512"),
    "semidiscrete OT": Row("--coupling semidiscrete"),
    "RMSNorm + SwiGLU + RoPE + QK-norm": Row("--model.norm rms --model.mlp swiglu --model.rope 1 --model.qk_norm 1"),
    "8 class tokens": Row("--model.class_tokens 8"),
    "post-hoc EMA": Row(
        "--ema_profiles 0.05,0.1",
        {"cfg_scale": CFG["cfg_scale"], "params": ("ema:0.03", "ema:0.05", "ema:0.08", "ema:0.1", "ema:0.15")},
    ),
    "CFG-Zero*": Row(
        "",
        {"cfg_scale": CFG["cfg_scale"][1:], "cfg_zero_star": (True,), ZERO_FRACTION: (0, 0.04, 0.08)},
        trained_as="recipe",
    ),
    "best + autoguidance": Row(
        BEST,
        {"guide_scale": (1, 1.25, 1.5, 2.0, 2.5), "inner_scale": INNER["inner_scale"]},
        trained_as="best",
        is_guided_by_itself=True,
    ),
    "best + Muon": Row(f"{BEST} --optimizer muon", INNER),
    # The second table: what patches of other sizes change.
    "patch 4": Row("--model.patch_size 4", is_only_at_equal_steps=True),
    "patch 4 + data": Row("--model.patch_size 4 --objective.prediction data", is_only_at_equal_steps=True),
    "patch 14": Row("--model.patch_size 14", is_only_at_equal_steps=True),
    "patch 14 + data": Row("--model.patch_size 14 --objective.prediction data", is_only_at_equal_steps=True),
}
PATCHES = {4: ("patch 4", "patch 4 + data"), 7: ("recipe", "data"), 14: ("patch 14", "patch 14 + data")}
SPREAD = ("recipe", "best")  # trained from several seeds
SAMPLED = ("recipe", "best")  # scored by Inception, too
START = {"cfg_scale": 2.5, "inner_scale": 1, "guide_scale": 1.5, "params": "ema:0.08", ZERO_FRACTION: 0.04}


class Cell(NamedTuple):
    """A row trained from a seed, to be scored at equal `time` or `steps`, or by `inception`."""

    row: str
    seed: int
    budget: str


def parse_flags(words: str) -> dict[str, Any]:
    """Returns {setting: value} of `--name value ...`; values are numbers, texts, or several texts with commas."""

    def parse(word: str) -> Any:
        if "," in word:
            return tuple(word.split(","))
        try:
            return ast.literal_eval(word)
        except (SyntaxError, ValueError):
            return word

    parts = words.split()
    return {name.removeprefix("--"): parse(word) for name, word in zip(parts[::2], parts[1::2], strict=True)}
