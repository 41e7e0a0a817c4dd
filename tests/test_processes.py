"""How the processes of a run find each other, and which devices each takes, by the variables of launchers."""

import os
import signal
import socket

import jax
import pytest
from jax._src import distributed

import likelihood
import sample
import train_flow
from utils.base import processes
from utils.base.messages import UserError
from utils.base.processes import StopRequest
from utils.flags.program import join_processes

LAUNCHERS = ("SLURM_", "OMPI_", "MV2_", "PMI_", "MPI_", "JAX_COORDINATOR", "JAX_LOCAL", "CUDA_VISIBLE", "HIP_", "ROCR_")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in [name for name in os.environ if name.startswith(LAUNCHERS) or name in TORCHRUN]:
        monkeypatch.delenv(name)


@pytest.fixture
def joined(monkeypatch):
    """The arguments as JAX understands them: [(address, number of processes, number of this one, visible GPUs)]."""

    class Service:
        def __init__(self, *arguments, **keywords):
            pass

        def connect(self):
            pass

    calls, visible = [], jax.config.values["jax_cuda_visible_devices"]

    def initialize(*arguments, **keywords):
        state = distributed.State()
        state.initialize(*arguments, **keywords)
        calls.append(
            (
                state.coordinator_address,
                state.num_processes,
                state.process_id,
                jax.config.values["jax_cuda_visible_devices"],
            )
        )

    monkeypatch.setattr(distributed._jax, "get_distributed_runtime_service", Service)
    monkeypatch.setattr(distributed._jax, "get_distributed_runtime_client", Service)
    monkeypatch.setattr(distributed.State, "initialize_preemption_sync_manager", lambda self: None)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes, "check_port", lambda address: None)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
    yield calls
    jax.config.update("jax_cuda_visible_devices", visible)
    jax.config.update("jax_rocm_visible_devices", visible)


def slurm(rank: int, local: int, num_tasks: int, tasks_per_node: str, **more: str) -> dict[str, str]:
    """The variables of a task of srun, in job 4100 on node01 and node02."""
    hosts = {"SLURM_NODELIST": "node[01-02]", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_STEP_ID": "0"}
    numbers = {"SLURM_JOB_ID": 4100, "SLURM_NTASKS": num_tasks, "SLURM_STEP_NUM_TASKS": num_tasks}
    numbers |= {"SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_STEP_TASKS_PER_NODE": tasks_per_node}
    return {**hosts, **{name: str(number) for name, number in numbers.items()}, **more}


SLURM = {
    "one task per node": (slurm(1, 0, 2, "1(x2)"), "all"),
    "one task per node, its GPUs listed": (slurm(1, 0, 2, "1(x2)", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7"), "all"),
    "one task": (slurm(0, 0, 1, "1"), "all"),
    "one per GPU": (slurm(11, 3, 16, "8(x2)", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7"), "3"),
    "one per GPU, GPUs not listed": (slurm(11, 3, 16, "8(x2)"), "3"),
    "one per GPU, its own": (slurm(11, 3, 16, "8(x2)", CUDA_VISIBLE_DEVICES="3", SLURM_GPUS_ON_NODE="8"), "all"),
    "two per task, by --gpus-per-task": (
        slurm(5, 1, 8, "4(x2)", CUDA_VISIBLE_DEVICES="0,1", SLURM_GPUS_ON_NODE="8", SLURM_GPUS_PER_TASK="h100:2"),
        "all",
    ),
    "four per task, which SLURM counts as all": (
        slurm(3, 1, 4, "2(x2)", CUDA_VISIBLE_DEVICES="0,1,2,3", SLURM_GPUS_ON_NODE="4", SLURM_GPUS_PER_TASK="4"),
        "all",
    ),
    "two tasks share eight": (slurm(3, 1, 4, "2(x2)", SLURM_GPUS_ON_NODE="8"), "4,5,6,7"),
    "two tasks share four of eight": (slurm(2, 0, 4, "2(x2)", CUDA_VISIBLE_DEVICES="4,5,6,7"), "0,1"),
    "by unique names": (slurm(3, 1, 4, "2(x2)", CUDA_VISIBLE_DEVICES="GPU-1a-1,GPU-2b,GPU-3c,GPU-4d"), "2,3"),
    "alone on the second node": (slurm(2, 0, 3, "2,1"), "all"),
    "the second of two on the first node": (slurm(1, 1, 3, "2,1"), "1"),
    "the second node, which SLURM numbers": (slurm(1, 0, 3, "2,1", SLURM_NODEID="1"), "all"),
    "counts that contradict the number": (slurm(1, 1, 2, "1(x2)"), "1"),
    "chosen by the user": (slurm(11, 3, 16, "8(x2)", JAX_LOCAL_DEVICE_IDS="2,5"), "2,5"),
}  # fmt: skip


@pytest.mark.parametrize("address", ["auto", "localhost:1234"])
@pytest.mark.parametrize("case", SLURM)
def test_devices_of_tasks_of_srun(joined, monkeypatch, case, address):
    variables, expected = SLURM[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    numbers = (int(variables["SLURM_NTASKS"]), int(variables["SLURM_PROCID"]))
    processes.initialize_processes(address, *((None, None) if address == "auto" else numbers))
    assert joined == [("node01:61444" if address == "auto" else address, *numbers, expected)]


def test_without_a_launcher_a_process_takes_all_devices(joined):
    processes.initialize_processes("localhost:1234", 2, 1)
    assert joined == [("localhost:1234", 2, 1, "all")]


@pytest.mark.parametrize(("local", "expected"), [((1, 0), "all"), ((8, 3), "3")])
def test_devices_of_processes_of_mpirun_whom_jax_finds(joined, monkeypatch, local, expected):
    for name, value in zip(("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"), (16, 11, *local), strict=True):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "8192000.0;tcp://10.96.0.1:34911")
    processes.initialize_processes("auto", None, None)
    assert joined == [("10.96.0.1:63440", 16, 11, expected)]


def test_torchrun_within_srun_numbers_the_processes(monkeypatch):
    for name, value in {**slurm(1, 0, 2, "1(x2)"), "WORLD_SIZE": "16", "RANK": "11"}.items():
        monkeypatch.setenv(name, value)
    assert processes.find_launch() == ("srun", 2, 1, 1, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert processes.find_launch() == ("torchrun", 16, 11, 8, 3)
    with pytest.raises(
        UserError, match=r"--coordinator_address=auto does not know torchrun's processes; give HOST:PORT"
    ):
        processes.initialize_processes("auto", None, None)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a batch script that sets them for PyTorch
    assert processes.find_launch() == ("srun", 2, 1, 1, 0)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("vm", "vm"), ("a1,b2", "a1"), ("n[003-007,9],m1", "n003"), ("r[1-2]n[4,7]", "r1n4"), ("gpu-a.b.c", "gpu-a.b.c")],
)
def test_the_coordinator_is_the_first_host_of_the_list(monkeypatch, hosts, first):
    for name, value in {**slurm(0, 0, 2, "2"), "SLURM_STEP_NODELIST": hosts, "JAX_COORDINATOR_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    assert processes.find_slurm_coordinator() == f"{first}:7"


def test_two_steps_of_a_job_have_two_ports(monkeypatch):
    ports = set()
    for step in ("0", "1", "4294967290"):
        monkeypatch.setenv("SLURM_STEP_ID", step)
        ports.add(processes.find_slurm_coordinator().partition(":")[2])
    assert len(ports) == 3
    assert all(61440 <= int(port) < 65536 for port in ports)


ALONE = {  # variables, and whether a run of one process is one of several that were meant as one
    "torchrun": ({"RANK": "1", "WORLD_SIZE": "2"}, True),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, True),
    "mpiexec": ({"PMI_SIZE": "2", "PMI_RANK": "1"}, True),
    "srun": (slurm(0, 0, 2, "1(x2)"), True),
    "the second task": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, True),
    "one process of torchrun": ({"RANK": "0", "WORLD_SIZE": "1"}, False),
    "one task": (slurm(0, 0, 1, "1"), False),
    "the shell of salloc": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2"}, False),
    "the interactive step of salloc": (slurm(0, 0, 1, "1", SLURM_NTASKS="16"), False),
    "a batch script": (
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
        False,
    ),
    "no numbers": ({"RANK": "x", "WORLD_SIZE": "2"}, False),
}


@pytest.mark.parametrize("case", ALONE)
def test_one_of_several_processes_is_told_what_is_missing(monkeypatch, case):
    variables, is_refused = ALONE[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if is_refused:
        with pytest.raises(
            UserError, match=r"process [01] of 2 .* for one run give --coordinator_address .*clusters.md"
        ):
            processes.initialize_processes(None, None, None)
    else:
        processes.initialize_processes(None, None, None)
    processes.initialize_processes(None, 1, None)  # independent runs


def test_copies_of_a_program_of_one_process_are_named(monkeypatch, read_flags, capsys):
    read_flags(likelihood, [])
    assert capsys.readouterr().err == ""
    for name, value in ALONE["srun"][0].items():
        monkeypatch.setenv(name, value)
    read_flags(likelihood, [])
    expected = "note: srun has started 2 processes, but likelihood works in one: each does all of it\n"
    assert capsys.readouterr().err == expected
    read_flags(train_flow, [])
    assert capsys.readouterr().err == ""


def test_a_program_that_can_share_its_work_is_told_the_flag(monkeypatch, read_flags, capsys):
    for name, value in ALONE["srun"][0].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["path/sample.py"])
    join_processes(read_flags(sample, []))
    expected = "note: srun has started 2 processes, but sample.py works in one without --coordinator_address: each does"
    assert capsys.readouterr().err == f"{expected} all of it\n"
    join_processes(read_flags(sample, ["--num_processes", "1"]))  # which says that it is meant
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="need --coordinator_address host:port"):
        join_processes(read_flags(sample, ["--process_id", "0"]))


def test_a_task_number_that_the_batch_script_has_filled_in_is_refused(monkeypatch):
    for name, value in slurm(1, 0, 2, "1(x2)").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--process_id=0, but this is process 1 of 2 that srun has started"):
        processes.initialize_processes("localhost:1234", 2, 0)


def test_auto_without_a_cluster_says_what_it_looks_for(joined, monkeypatch):
    with pytest.raises(UserError, match=r"--coordinator_address=auto: no TPU pod, no task of srun.* give HOST:PORT of"):
        processes.initialize_processes("auto", None, None)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(UserError, match="within SLURM job 12, but no task of srun; start it by `srun python"):
        processes.initialize_processes("auto", None, None)
    with pytest.raises(UserError, match=r"--num_processes and --process_id have no effect with .*=auto"):
        processes.initialize_processes("auto", 2, None)


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_port_in_use_is_refused(host):
    with socket.create_server((host, 0)) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = other.getsockname()[1]
        message = rf"--coordinator_address=localhost:{port}: process 0 cannot listen on port {port} \(Address already"
        with pytest.raises(UserError, match=message):
            processes.initialize_processes(f"localhost:{port}", 2, 0)


class Left(Exception):
    """Instead of the end of the program."""


@pytest.mark.parametrize("number", [0, 1])
def test_waiting_says_for_whom_and_ends_in_one_line(monkeypatch, capsys, number):
    def leave(status):
        raise Left(status)

    never = processes.threading.Event()
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **keywords: never.wait())
    monkeypatch.setattr(processes, "TIMEOUT", 0.6)
    monkeypatch.setattr(processes, "REMINDERS", (0.2,))
    monkeypatch.setattr(processes.os, "_exit", leave)
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    with pytest.raises(Left, match=r"^1$"):
        processes.initialize_processes(address, 2, number)
    never.set()
    waiting, error = capsys.readouterr().err.splitlines()
    wait = f"process {number} of 2 is waiting at {address} for the others" + "; process 0 does not answer" * number
    assert waiting.startswith(f"{wait}; up to ")
    assert error.startswith(f"error: --coordinator_address={address}: {wait} (0.6 s); ")


def test_a_signal_ends_the_waiting(monkeypatch, capsys, signal_handlers):
    def leave(status):
        raise Left(status)

    stop = StopRequest()
    signal.raise_signal(signal.SIGUSR1)
    never = processes.threading.Event()
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **keywords: never.wait())
    monkeypatch.setattr(processes.os, "_exit", leave)
    with pytest.raises(Left, match=r"^75$"):
        processes.initialize_processes("localhost:1", 2, 1, stop)
    never.set()
    assert capsys.readouterr().err.startswith("stopped by SIGUSR1 before")


def test_processes_hosts_and_devices_are_named(monkeypatch):
    assert processes.describe_processes() == "1 process on 1 host, 1 x cpu"
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda rows: [[1], [1], [2], [2]])
    assert processes.describe_processes() == "4 processes on 2 hosts, 1 x cpu, 1 in each process"
