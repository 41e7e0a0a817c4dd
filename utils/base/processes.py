"""The processes of one run: how they find each other, and the signals that ask one to end.

Under srun or mpirun, JAX by itself gives a process one device, that of its number on the host. Here a process that is
alone on its host takes all devices, and several share them. At a signal, training saves first; the other programs
remove their temporary files.
"""

import contextlib
import errno
import glob
import hashlib
import itertools
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from utils.base.devices import start_devices
from utils.base.messages import UserError

TIMEOUT = 300  # seconds, JAX's own
REMINDERS = (3, 60, 120, 180, 240)  # seconds of waiting at which a line says so
GUIDE = "docs/clusters.md"  # where errors send the user
BY_HAND = "give HOST:PORT of process 0 with --num_processes and --process_id"
# Variables of (number of processes, rank, processes on this host, rank on this host).
LAUNCHERS = (
    ("torchrun", ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")),
    ("mpirun", tuple(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"))),
    ("mpirun", tuple(f"MV2_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"))),
    ("mpirun", ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID")),
)
EXIT_STOPPED = 75  # by a signal, and saved: EX_TEMPFAIL of sysexits.h, "try again"
# A closed terminal, a scheduler's notice (SLURM's --signal=USR1@90), `ulimit -t`, kill.
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# A shell without job control starts `command &` with these two ignored, whatever the program is; they are taken anyway,
# as nobody sends one to a program that is meant to go on.
KEYBOARD_SIGNALS = (signal.SIGINT, signal.SIGQUIT)


class Interrupted(Exception):
    """Raised by a signal where StopRequest allows it."""


def handle_signals(numbers: tuple[signal.Signals, ...], handler: Any) -> None:
    """Calls `handler` on each signal that is not ignored: nohup and `trap '' HUP` keep their meaning."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave_time_to_save() -> None:
    """Moves the soft limit of CPU time below the hard one, so that SIGXCPU comes before the kernel kills.

    `ulimit -t` sets both to one value. A tenth of the limit is kept for saving, at most a minute of all cores.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY:
        latest = hard - min(max(1, hard // 10), 60 * (os.cpu_count() or 1))
        if soft == resource.RLIM_INFINITY or soft > latest:
            resource.setrlimit(resource.RLIMIT_CPU, (latest, hard))


class StopRequest:
    """Remembers a signal that asks for an end; a second Ctrl-C interrupts at once.

    Make it before the processes of a run join: JAX then takes SIGTERM over, and tells all processes of one that reaches
    any. The other signals, which often reach a single process, are passed on as SIGTERM.
    """

    def __init__(self):
        self.signal = None  # the last one that came
        self.is_interruptible = False  # see `interrupting`
        self.is_shared = False  # whether signals are passed on
        self.num_asked = 0  # of `is_due`, by which all processes count alike
        self.is_agreed = False  # once true, it stays so
        handle_signals(END_SIGNALS, self._note)
        for number in KEYBOARD_SIGNALS:
            signal.signal(number, self._note)
        leave_time_to_save()

    def _note(self, number, frame):
        is_first = self.signal is None
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C raises KeyboardInterrupt
        if is_first and self.is_shared:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells all processes of
        if self.is_interruptible:
            self.is_interruptible = False  # SIGXCPU comes once a second
            raise Interrupted

    def share(self) -> None:
        """Passes signals on to the other processes, which have joined, from now on; an earlier signal, too."""
        self.is_shared = jax.process_count() > 1
        if not self.is_shared:
            signal.signal(signal.SIGTERM, self._note)  # JAX has taken it if this process has joined only itself
        elif self.signal is not None:
            os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Lets a signal raise Interrupted in the block; not in a run of several processes, which have to agree."""
        self.is_interruptible = jax.process_count() == 1
        if self.is_interruptible and self.signal is not None:
            raise Interrupted  # it came before the block
        try:
            yield
        finally:
            self.is_interruptible = False

    def is_due(self) -> bool:
        """Returns whether to stop, the same on all processes of the run; each has to ask as often as the others."""
        if jax.process_count() == 1:
            return self.signal is not None
        self.num_asked += 1
        self.is_agreed = self.is_agreed or multihost_utils.reached_preemption_sync_point(self.num_asked)
        return self.is_agreed


class Launch(NamedTuple):
    """The place of this process among those that a launcher has started."""

    launcher: str  # srun, mpirun or torchrun
    num_processes: int
    process_id: int
    num_local: int  # processes on this host
    local_id: int  # number of this one among them


class Address(NamedTuple):
    """Address of process 0, and the processes that are expected there."""

    flag: str  # --coordinator_address=..., as errors name it
    host_port: str | None  # None: JAX finds out
    num_processes: int | None
    process_id: int | None


def initialize_processes(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    stop: StopRequest | None = None,
) -> None:
    """Joins the processes of one run, before any device is touched; does nothing for a run of one process.

    Raises UserError if the flags or the launcher's variables do not make a run. Ends the program with one line after
    TIMEOUT seconds of waiting for the others, or at once at a signal.
    """
    launch = find_launch()
    if coordinator_address is None:
        refuse_single(launch, num_processes, process_id)
        return

    # Where process 0 is: as the flags say, as SLURM's variables say, or as JAX finds it, whose own detection of a
    # cluster is on in that last case alone.
    flag = f"--coordinator_address={coordinator_address}"
    devices = choose_local_devices(launch)
    keywords: dict[str, Any] = {"local_device_ids": devices, "cluster_detection_method": "deactivate"}
    if coordinator_address != "auto":
        check_numbers(flag, num_processes, process_id, launch)
        check_address(flag, coordinator_address)
        address = Address(flag, coordinator_address, num_processes, process_id)
    elif num_processes is not None or process_id is not None:
        raise UserError(f"--num_processes and --process_id have no effect with {flag}; leave them out")
    elif launch is not None and launch.launcher == "torchrun":
        raise UserError(f"{flag} does not know torchrun's processes; {BY_HAND}, without torchrun ({GUIDE})")
    elif launch is not None and launch.launcher == "srun":
        address = Address(flag, find_slurm_coordinator(), launch.num_processes, launch.process_id)
    else:
        address = Address(flag, None, None, None)
        # [] is all devices too, but keeps JAX from choosing one of them.
        keywords = {"local_device_ids": (devices or []) if launch else None}

    if address.process_id == 0:
        check_port(address)
    join(address, keywords, stop)
    start_devices()  # no earlier: once JAX knows its devices, nothing can join


def refuse_single(launch: Launch | None, num_processes: int | None, process_id: int | None) -> None:
    """Raises UserError if a launcher has started several processes, or flags ask for several, without an address."""
    if process_id is not None or num_processes not in (None, 1):
        raise UserError("--num_processes and --process_id need --coordinator_address host:port")
    if launch is None or launch.num_processes == 1 or num_processes == 1:
        return
    address = "auto" if launch.launcher == "srun" else "HOST:PORT --num_processes N --process_id I"
    raise UserError(
        f"this is process {launch.process_id} of {launch.num_processes} that {launch.launcher} has started, each of "
        f"which would train alone: for one run give --coordinator_address {address} ({GUIDE}), for independent runs "
        "--num_processes 1"
    )


def warn_of_copies(program: str, where: str = "") -> None:
    """Warns if a launcher has started several copies of a program that works in one process, always or `where`."""
    launch = find_launch()
    if launch is not None and launch.num_processes > 1:
        _say(
            f"note: {launch.launcher} has started {launch.num_processes} processes, but {program} works in "
            f"one{where}: each does all of it"
        )


def check_numbers(flag: str, num_processes: int | None, process_id: int | None, launch: Launch | None) -> None:
    """Raises UserError if --num_processes and --process_id do not number this process."""
    if num_processes is None or process_id is None:
        raise UserError(f"{flag} needs --num_processes and --process_id")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} is not one of the numbers 0 to --num_processes={num_processes} - 1")
    if launch and launch.num_processes == num_processes and process_id == 0 < launch.process_id:
        raise UserError(
            f"--process_id=0, but this is process {launch.process_id} of {num_processes} that {launch.launcher} has "
            "started: a batch script puts its own number, 0, for $SLURM_PROCID; use --coordinator_address auto"
        )


def check_address(flag: str, address: str) -> None:
    """Raises UserError if the address is no HOST:PORT that can be found."""
    host, _, port = address.rpartition(":")
    try:
        if not 1 <= int(port) < 2**16:
            raise ValueError(port)
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (ValueError, OSError):
        raise UserError(f"{flag} is no host:port that can be found; give that of process 0") from None


def check_port(address: Address) -> None:
    """Raises UserError if process 0 cannot listen; JAX would end in a segmentation fault."""
    assert address.host_port is not None
    bind_address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or address.host_port
    host, _, port = bind_address.rpartition(":")
    hosts = ["::", "0.0.0.0"] if bind_address == address.host_port else [host.strip("[]")]  # as JAX does
    reason = ""
    for host in hosts:
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as after a run that has just ended
                listener.bind((host, int(port)))
            return
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
                break  # rather than try without IPv6
    way = "give all processes another port"
    if address.flag.endswith("auto"):
        way = "set JAX_COORDINATOR_PORT to a free one on all hosts"
    raise UserError(
        f"{address.flag}: process 0 cannot listen on port {port} ({reason}), which another program or another run may "
        f"have taken; {way}"
    )


def join(address: Address, keywords: dict[str, Any], stop: StopRequest | None) -> None:
    """Calls jax.distributed.initialize, and says what it waits for.

    JAX says nothing, cannot be interrupted, and aborts the program if it fails: so it waits in a thread, longer than
    this function.
    """
    failures: list[Exception] = []

    def initialize():
        arguments = address[1:] if address.host_port else ()
        try:
            jax.distributed.initialize(*arguments, **keywords, initialization_timeout=2 * TIMEOUT)
        except Exception as error:  # JAX's, its cluster detection's and its RPC library's
            failures.append(error)

    thread = threading.Thread(target=initialize, daemon=True)  # never waited for at the end
    thread.start()
    started = time.monotonic()
    reminders = list(REMINDERS)
    while thread.is_alive():
        thread.join(0.1)  # seconds, between looks at signals and the clock
        waited = time.monotonic() - started
        if stop is not None and stop.signal is not None:
            _end(f"stopped by {stop.signal.name} before the processes had met; nothing is to be saved", EXIT_STOPPED)
        if waited > TIMEOUT:
            _end(f"error: {address.flag}: {describe_wait(address)} ({TIMEOUT} s); {explain_failure(address)}", 1)
        if reminders and waited > reminders[0]:
            reminders.pop(0)
            _say(f"{describe_wait(address)}; up to {TIMEOUT - waited:.0f} s more ...")
    # JAX has returned. Its errors name no flag.
    if not failures:
        return
    reason = " ".join(str(failures[0]).split())[:200]
    if address.host_port is None and "defined" in reason:
        raise UserError(f"{address.flag}: {explain_no_cluster()}") from failures[0]
    raise UserError(f"{address.flag}: the processes of the run could not find each other ({reason})") from failures[0]


def describe_wait(address: Address) -> str:
    """Says who waits, and for whom."""
    if address.host_port is None:
        return "waiting for the other processes of the run"
    waiting = f"process {address.process_id} of {address.num_processes} is waiting at {address.host_port}"
    if address.process_id == 0:
        return f"{waiting} for the others"
    answer = "answers" if _answers(address.host_port) else "does not answer"
    return f"{waiting} for the others; process 0 {answer}"


def explain_failure(address: Address) -> str:
    """Says what to check if the others have not come."""
    if address.process_id == 0:
        return f"start them with the same address, and see that they reach this port of {socket.gethostname()}"
    return "see that all were started with the same address, process 0 on that host, and that its port is open"


def explain_no_cluster() -> str:
    """Says why 'auto' finds nothing."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"this is within SLURM job {job}, but no task of srun; start it by `srun python ...` ({GUIDE})"
    found = "no TPU pod, no task of srun or mpirun, no Kubernetes job was found"
    return f"{found}; {BY_HAND}, or leave the flag out ({GUIDE})"


def _answers(host_port: str) -> bool:
    host, _, port = host_port.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
    except OSError:
        return False


def _say(text: str) -> None:
    """Prints a line, whatever the number of this process: JAX does not know it yet."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _end(text: str, status: int) -> NoReturn:
    _say(text)
    os._exit(status)  # an ordinary end would wait for JAX's thread


def find_launch() -> Launch | None:
    """Returns the place that a launcher gives this process; None without one, as in a shell within a SLURM job."""
    slurm = _find_slurm_task()
    # If srun has started torchrun or mpirun, these number the processes; they set all four variables.
    launches = [(launcher, *map(_number, names)) for launcher, names in LAUNCHERS]
    for launcher, count, rank, num_local, local in launches:
        is_whole = not (count is None or rank is None or num_local is None or local is None)
        if is_whole and (slurm is None or slurm.num_processes != count):
            return Launch(launcher, count, rank, num_local, local)
    if slurm is not None:
        return slurm
    # Variables are missing: the process is taken to be alone on its host.
    for launcher, count, rank, num_local, local in launches:
        if not (count is None or rank is None):
            return Launch(launcher, count, rank, num_local or 1, local or 0)
    return None


def _find_slurm_task() -> Launch | None:
    """Returns the place of this process among the tasks of srun; None outside of a step."""
    count, rank, local = map(_number, ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"))
    count = _number("SLURM_STEP_NUM_TASKS") or count  # an interactive step has one, whatever the job has
    # A batch script has a rank too, 0, but no step.
    is_task = any(name.startswith("SLURM_STEP") for name in os.environ) or rank or local
    if count is None or rank is None or local is None or "SLURM_JOB_ID" not in os.environ or not is_task:
        return None
    return Launch("srun", count, rank, max(_count_slurm_tasks_here(count, rank), local + 1), local)


def _number(name: str) -> int | None:
    """Returns a variable of the environment as a number; None if it is not set, or is no number."""
    text = os.environ.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else None


def _count_slurm_tasks_here(num_tasks: int, rank: int) -> int:
    """Counts the tasks of the step on this host; SLURM writes 8(x2),4 for two hosts of 8 and one of 4."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or ""
    counts = []
    for count, _, repeats in re.findall(r"(\d+)(\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeats or 1)
    if not counts:
        num_hosts = _number("SLURM_STEP_NUM_NODES") or _number("SLURM_NNODES") or 1
        return -(-num_tasks // num_hosts)  # evenly, rounded up
    host = _number("SLURM_NODEID")
    if host is None:  # tasks are numbered host by host
        host = sum(total <= rank for total in itertools.accumulate(counts))
    return counts[min(host, len(counts) - 1)]


def find_slurm_coordinator() -> str:
    """Returns host:port of task 0 of the step: the first host of its list, and a port made of job and step."""
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or socket.gethostname()
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", hosts).split(",")[0]  # node[003-007,9] begins with node003
    job = _number("SLURM_JOB_ID") or 0
    step = _number("SLURM_STEP_ID") or 0
    port = os.environ.get("JAX_COORDINATOR_PORT") or 61440 + (job + 257 * step) % 4096  # above the ephemeral ports
    return f"{host}:{port}"


def choose_local_devices(launch: Launch | None) -> list[int] | None:
    """Returns the numbers of the GPUs that this process takes; None for all that it sees.

    Several processes of a host share its GPUs evenly. Where the launcher has left each its own, as SLURM does for
    --gpus-per-task, these are all that a process sees, and are numbered from 0.
    """
    if launch is None or launch.num_local == 1 or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    visible = count_visible_gpus()
    if visible is None:  # one for each process, as JAX does
        return [launch.local_id]
    per_task = re.findall(r"\d+$", os.environ.get("SLURM_GPUS_PER_TASK", ""))
    # Its own: fewer than the host has, or as many as SLURM gives a task.
    is_own = visible < (_number("SLURM_GPUS_ON_NODE") or 0) or per_task == [str(visible)]
    if is_own or visible < launch.num_local:
        return None
    share = visible // launch.num_local  # GPUs that remain are left idle
    return list(range(launch.local_id * share, (launch.local_id + 1) * share))


def count_visible_gpus() -> int | None:
    """Counts the GPUs that JAX will see, without asking it: nothing can join after that. None if not known."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in os.environ:
            visible = os.environ[name].split(",")
            return len(list(itertools.takewhile(lambda entry: entry not in ("", "-1", "NoDevFiles"), visible)))
    return _number("SLURM_GPUS_ON_NODE") or len(glob.glob("/dev/nvidia[0-9]*")) or None


def describe_processes() -> str:
    """Returns a line on the processes, hosts and devices of the run; all processes have to call it."""
    count = jax.process_count()
    num_hosts = 1
    if count > 1:
        digest = hashlib.sha256(socket.gethostname().encode()).digest()[:4]  # gathered as a number
        hosts = multihost_utils.process_allgather(np.frombuffer(digest, np.int32))
        num_hosts = len(np.unique(hosts))
    each = f", {jax.local_device_count()} in each process" if count > 1 else ""
    return (
        f"{count} process{'es' * (count > 1)} on {num_hosts} host{'s' * (num_hosts > 1)}, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}{each}"
    )
