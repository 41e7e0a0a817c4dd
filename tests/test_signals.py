"""Signals: which of them ask for an end, which stay ignored, and what programs without a checkpoint leave behind."""

import resource
import signal
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict

from utils.base import processes
from utils.base.files import atomic_write
from utils.flags import program

ALL = (*processes.END_SIGNALS, *processes.KEYBOARD_SIGNALS)
pytestmark = pytest.mark.usefixtures("signal_handlers")


def test_the_signals_of_terminals_schedulers_and_limits_ask_for_an_end():
    assert {number.name for number in ALL} == {
        "SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"
    }  # fmt: skip
    for number in ALL:
        stop = processes.StopRequest()
        assert not stop.is_due()
        signal.raise_signal(number)
        assert stop.is_due()
        with pytest.raises(processes.Interrupted), stop.interrupting():
            pass


def test_a_second_ctrl_c_interrupts_at_once():
    stop = processes.StopRequest()
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.is_due()


def test_a_repeated_signal_interrupts_an_evaluation_once():
    stop = processes.StopRequest()
    cleaned = []

    def evaluate():
        with stop.interrupting():
            try:
                signal.raise_signal(signal.SIGXCPU)
            finally:
                signal.raise_signal(signal.SIGXCPU)
                cleaned.append(True)

    with pytest.raises(processes.Interrupted):
        evaluate()
    assert cleaned


@pytest.mark.parametrize("take", [processes.StopRequest, program.raise_on_signals])
@pytest.mark.parametrize("number", processes.END_SIGNALS)
def test_what_nohup_ignores_stays_ignored(take, number):
    signal.signal(number, signal.SIG_IGN)
    take()
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_job_in_the_background_of_a_script_stops_by_its_own_signals():
    """A shell without job control starts it with these ignored."""
    for number in processes.KEYBOARD_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    stop = processes.StopRequest()
    signal.raise_signal(signal.SIGQUIT)
    assert stop.is_due()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_before_the_processes_have_joined_reaches_all_of_them(monkeypatch, number):
    sent = []
    monkeypatch.setattr(processes.os, "kill", lambda process, number: sent.append(number))
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    stop = processes.StopRequest()
    signal.raise_signal(number)
    stop.share()
    signal.raise_signal(signal.SIGHUP)
    assert sent == [signal.SIGTERM]


def test_one_process_that_has_joined_itself_keeps_sigterm():
    stop = processes.StopRequest()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as JAX takes it
    stop.share()
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_due()


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [(60, 60, 54), (-1, 600, 540), (30, 600, 30), (5, 5, 4), (10**6, 10**6, 10**6 - 240), (-1, -1, None)],
)
def test_cpu_time_is_kept_for_saving(monkeypatch, soft, hard, expected):
    """`ulimit -t 60` sets both limits, and the kernel would kill without SIGXCPU."""
    limits = []
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(pair))
    processes.StopRequest()
    assert limits == ([(expected, hard)] if expected not in (None, soft) else [])


@pytest.mark.parametrize("number", processes.END_SIGNALS)
def test_a_program_that_is_ended_leaves_no_temporary_file(tmp_path, monkeypatch, capsys, number):
    def main(config):
        with atomic_write(tmp_path / "result.npz") as temporary:
            temporary.write_text("half")
            signal.raise_signal(number)

    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(program, "parse_flags", lambda define_flags, argv: ConfigDict(dict.fromkeys(flags.FLAGS(argv))))
    with pytest.raises(SystemExit) as end:
        program.run_program(lambda: None, main)
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == f"ended by {number.name}\n"
    assert list(tmp_path.iterdir()) == []
