"""Starts the programs faster: it has imported what they import, and forks a process for every request.

A line of JSON on the standard input, {"argv", "environment", "cwd", "stdout", "stderr"}, is answered by the number of
the process, and {"wait", "is_patient"} by its exit status: null while it runs, unless one is patient. No device has
been touched and no thread started before the fork, so that each program is as new as its own process.
"""

import atexit
import json
import os
import runpy
import sys
import threading
import traceback

import jax
import scipy.linalg
import scipy.sparse.linalg
import scipy.special  # noqa: F401

import app  # noqa: F401 (for all that they import)
import compute_fid_stats  # noqa: F401
import convert_checkpoint  # noqa: F401
import edit  # noqa: F401
import encode_latents  # noqa: F401
import eval_fid  # noqa: F401
import likelihood  # noqa: F401
import make_pairs  # noqa: F401
import plot_metrics  # noqa: F401
import report  # noqa: F401
import sample  # noqa: F401
import train_flow  # noqa: F401


def run(argv: list[str]) -> int:
    """Exit status of `python ARGV...`, which must be a script."""
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))  # as Python does
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(request: dict) -> None:
    """Runs the program in the forked process; never returns."""
    null = os.open(os.devnull, os.O_RDONLY)
    outputs = [os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("stdout", "stderr")]
    for number, descriptor in enumerate([null, *outputs]):
        os.dup2(descriptor, number)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    for name, value in request["environment"].items():  # JAX, already imported, reads its own no more
        if name.lower() in jax.config.values:
            jax.config.update(name.lower(), json.loads(value))
    status = run(request["argv"])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        process, status = os.waitpid(request["wait"], 0 if request["is_patient"] else os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if process else None
    else:
        answer = os.fork()
        if answer == 0:
            start(request)
    print(json.dumps(answer), flush=True)
