"""The commands that messages tell the user to type."""

import shlex
import shutil
import sys
from pathlib import Path

PROGRAMS = Path(__file__).resolve().parents[2]


def write_command(program: str, *words: object) -> str:
    """Returns the command line of a program of this project, such as sample.py, as this process would start it from the
    current folder, quoted for a shell."""
    # "python" where that is this one, as in an activated environment; else its path.
    python = sys.executable
    found = shutil.which("python")
    if found and Path(found).absolute().parent == Path(python).absolute().parent:
        python = "python"

    # A script that has registered pieces of its user's is needed for the other programs, too.
    starter = find_starter()
    start = [*starter, Path(program).stem] if starter else [str(PROGRAMS / program)]
    here = f"{Path.cwd()}/"
    return shlex.join([*(word.removeprefix(here) for word in (python, *start)), *map(str, words)])


def find_starter() -> list[str]:
    """Returns the words that name the script through which this program was started: mine.py, where that has taken the
    program's name from the words of `python mine.py train_flow --seed 1` (docs/change_this.md); else none."""
    # The word that `sys.argv` lacks; what else a script does to its words is not known.
    place = len(sys.orig_argv) - len(sys.argv)
    is_taken = place > 0 and sys.orig_argv[place + 1 :] == sys.argv[1:]
    programs = {path.stem for path in PROGRAMS.glob("*.py")}  # the word may be a whole program, after `python -c`
    if is_taken and sys.orig_argv[place] in programs:
        return sys.orig_argv[1:place]
    return []
