"""Help on flags: --help by topic, and the flag to use where the name of another tool's flag was typed."""

import contextlib
import math
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping

from absl import flags

from utils.base.commands import write_command
from utils.base.messages import UserError
from utils.base.settings import suggest_name

FLAGS = flags.FLAGS
WIDTH = 100  # columns of --help

TOPIC, HIDDEN = "topic", "hidden"  # an attribute of flags, and one of its values

# Names that users of other tools type, separated by spaces, and the answers to each of them, of which the first is
# given whose flags the program has.
_MEANINGS = {
    "lr learning_rate": ("the learning rate is --model.lr",),
    "steps num_steps iterations": ("use --max_steps", "use --denoise_timesteps"),
    "epochs": ("training counts steps, of which an epoch has images / batch_size: use --max_steps",),
    "resume restore continue": (
        "the same command again continues a run from its newest checkpoint, up to --max_steps",
        "name the run's folder with --load_dir",
    ),
    "ckpt checkpoint load run load_dir": ("name the run's folder with --load_dir", "name folders of runs with --runs"),
    "output output_dir outdir workdir": ("use --save_dir", "use --out"),
    "guidance guidance_scale cfg": ("use --cfg_scale", "use --model.cfg_scale"),
    "dataset data data_path": ("use --dataset_name; folder:PATH is a folder of images",),
    "batch bs": ("use --batch_size, the global one",),
    "ema ema_decay ema_rate": ("the EMA's decay is --model.target_update_rate", "use --params ema"),
    "model arch preset": ("use --model.preset, such as DiT-B/2",),
    "class class_labels prompt": ("use --classes",),
    "gpus devices num_gpus": ("all devices are used; CUDA_VISIBLE_DEVICES chooses among GPUs",),
    "wandb no_wandb nowandb": ("use --wandb.mode online, offline or disabled",),
    "tensorboard tracker logger report_to": ("use --trackers wandb,tensorboard",),
}
HABITS = {name: answers for names, answers in _MEANINGS.items() for name in names.split()}


@contextlib.contextmanager
def topic(title: str) -> Iterator[None]:
    """Puts the flags that are registered in the block under `title` in --help."""
    before = set(FLAGS)
    yield
    for name in set(FLAGS) - before:
        _set_topic(name, title)


def hide(names: Iterable[str]) -> None:
    """Leaves flags out of --help: they exist to be refused with a reason."""
    for name in names:
        setattr(FLAGS[name], TOPIC, HIDDEN)


def is_hidden(name: str) -> bool:
    return get_topic(name) == HIDDEN


def get_topic(name: str) -> str:
    return getattr(FLAGS[name], TOPIC, "General")


def _set_topic(name: str, title: str) -> None:
    if not hasattr(FLAGS[name], TOPIC):  # the innermost is the topic
        setattr(FLAGS[name], TOPIC, title)


def refuse_habits(words: Iterable[str], names: Iterable[str]) -> None:
    """Raises UserError, naming the flag to use, for a flag of another tool, or one that is typed without its group.

    `names` are the program's own flags.
    """
    shown = sorted(name for name in names if not is_hidden(name))
    for word in words:
        # Other tools write dashes within names.
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        if word.startswith("-") and name not in FLAGS and (answer := find_answer(name, shown)):
            raise UserError(f"--{name} is not a flag here: {answer} (--help lists the flags)")


def find_answer(name: str, shown: Collection[str]) -> str | None:
    """Returns what to type instead of --`name` in a program that has the flags `shown`."""
    # A known habit goes first, as it says more than --model.depth for --depth.
    grouped = [f"use --{flag}" for flag in shown if flag.endswith(f".{name}")]
    for answer in (*HABITS.get(name, ()), *grouped):
        if all(flag in shown for flag in re.findall(r"--([\w.]+)", answer)):
            return answer
    # wandb has many settings, of which other programs take other ones.
    of_wandb = [f"--{flag}" for flag in shown if flag.startswith("wandb.")]
    return f"of wandb's settings there are {', '.join(of_wandb)}" if name.startswith("wandb.") and of_wandb else None


def explain_unknown(name: str, names: Iterable[str]) -> str:
    """Returns the message about --`name`, with the most similar one of the program's own flags, `names`."""
    shown = [flag for flag in names if not is_hidden(flag)]
    return f"--{name} is not a flag here{suggest_name(name, shown, '--')} (--help lists the flags)"


def define_moved_flags(names: Iterable[str]) -> None:
    """Registers flags that are another program's now, for `refuse_moved_flags`; --help leaves them out."""
    for name in names:
        flags.DEFINE_string(name, None, "A flag of another program.")
    hide(names)


def refuse_moved_flags(needs: Mapping[str, Mapping[str, str]], program: str, but: Iterable[str] = ()) -> None:
    """Raises UserError, with the command to type, for a flag that belongs to `program` now.

    `needs` has these flags, and for each the flags that it does nothing without, with a word for their values. The
    command repeats all flags that the user gave, except those of `but`, which that program lacks.
    """
    given = [name for name in needs if FLAGS[name].present]
    if not given:
        return

    # What is left to fill in; `used` grows as what is needed has needs itself.
    missing: dict[str, str] = {}
    used = list(given)
    for name in used:
        missing |= {flag: value for flag, value in needs[name].items() if flag not in used}
        used += [flag for flag in needs[name] if flag not in used]

    # The user's whole command, ready to paste: the run, the moved flags, then the others.
    others = [name for name in FLAGS if FLAGS[name].present and name not in {*given, *but, "load_dir"}]
    words = [word for name in ("load_dir", *given) if FLAGS[name].present for word in _spell_flag(name)]
    words += [word for name, value in missing.items() for word in (f"--{name}", value)]
    words += [word for name in others for word in _spell_flag(name)]
    first = "=".join(_spell_flag(given[0]))
    beside = f", beside {' and '.join(f'--{name}' for name in missing)}" if missing else ""
    raise UserError(f"{first} is a flag of {program}{beside}: {write_command(program, *words)}")


def _spell_flag(name: str) -> list[str]:
    """Returns the words of a given flag: --name value; --name of a switch; --name=-1 if the value looks like a flag."""
    text = FLAGS[name].serialize()
    spelled, is_valued, value = text.partition("=")
    return [spelled, value] if is_valued and value and not value.startswith("-") else [text]


def to_switch(value: str | int) -> int:
    """Returns the value of a flag that is 0 or 1, also written False or True. Raises ValueError for other texts."""
    text = str(value).strip().lower()
    return int(text == "true") if text in ("true", "false") else to_integer(value)


def to_integer(value: str | int) -> int:
    """Returns the value of an integer flag, which may be written 1e3. Raises ValueError for other texts."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    # Plain digits first: they are exact, however many.
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= 2**53 or number % 1 != 0:  # beyond 2^53 digits would be made up
        raise ValueError(f"{value} is no whole number")
    return int(number)


def show_help(names: Iterable[str]) -> None:
    """Prints the docstring of the program, and its flags by topic, both in the order of definition."""
    print(sys.modules["__main__"].__doc__ or "")
    # Topics stand in the order of their first flags, although a topic may be opened more than once.
    by_topic: dict[str, list[str]] = {}
    for name in (name for name in names if not is_hidden(name)):
        by_topic.setdefault(get_topic(name), []).append(name)
    for title, members in by_topic.items():
        print(f"{title}:")
        for name in members:
            print(textwrap.fill(_describe(name), WIDTH, initial_indent="  ", subsequent_indent="      "))
        print()


def _describe(name: str) -> str:
    flag = FLAGS[name]
    is_switch = isinstance(flag, flags.BooleanFlag)
    default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    # Defaults that say nothing are left out: None, an empty text, a switch that is off.
    shown = "" if default is None or (is_switch and not default) or default == "" else f" (default: {default})"
    return f"--{'[no]' * is_switch}{name}: {flag.help}{shown}"
