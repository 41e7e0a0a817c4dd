"""Programs on several processes: what two of them make is what one makes, and none goes on without the others."""

import threading
import time

import jax
import pytest

from utils.base import hosts

together = pytest.mark.xdist_group("hosts")  # pairs of processes, one pair at a time


class Store:
    """The keys and values of JAX's service, in this process."""

    def __init__(self):
        self.values = {}
        self.barriers = []

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def blocking_key_value_get(self, key, timeout):
        return self.values[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(f"{prefix}/")]

    def wait_at_barrier(self, name, timeout):
        self.barriers.append(name)


@pytest.fixture
def two(monkeypatch):
    """two(number) makes this process that one of two, which share a store of keys and values."""
    store = Store()
    monkeypatch.setattr(hosts, "_store", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def be(number):
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(hosts, "_calls", iter(range(100)))
        return store

    return be


def test_the_first_process_decides(two):
    two(0)
    values = [3, "text", {"fid": 1.25, "found": None}, [True, float("inf")]]
    assert [hosts.broadcast(value) for value in values] == values
    store = two(1)
    assert [hosts.broadcast("not asked") for _ in values] == values
    hosts.barrier()
    assert store.barriers == [f"barrier/{len(values)}"]


def test_missing_files_are_dealt_out_in_turn(two, tmp_path):
    names = [f"{number}.bin" for number in range(7)]
    for number in (0, 3):
        (tmp_path / names[number]).touch()
    two(0)
    own = hosts.share_files(tmp_path, names)
    two(1)
    (tmp_path / names[1]).touch()  # already finished by process 0, which alone has looked
    assert own == {"1.bin", "4.bin", "6.bin"}
    assert hosts.share_files(tmp_path, names) == {"2.bin", "5.bin"}


def test_a_silent_process_and_one_that_says_so_have_gone(two, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store = two(0)
    watch = hosts.Watch()
    for sign in ("0", "1", "1"):
        store.values["alive/1"] = sign
        now[0] += hosts.PATIENCE
        assert watch.find_lost() is None
    now[0] += 0.1
    assert watch.find_lost() == "process 1 has gone"
    two(1)
    late = hosts.Watch()
    assert late.find_lost() is None  # process 0 alone watches
    store.values["lost/0"] = "process 0 has ended"
    assert late.find_lost() == watch.find_lost() == "process 0 has ended"


def test_the_watch_ends_its_process_with_one_line(two, monkeypatch, capsys):
    class Left(BaseException):
        pass

    def leave(status):
        ended.append(status)
        raise Left

    ended = []
    monkeypatch.setattr(hosts.os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    store = two(1)
    store.values["lost/0"] = "process 0 has ended"
    monkeypatch.setattr(hosts, "_watch", None)
    monkeypatch.setattr(hosts, "_last_word", threading.Lock())
    hosts.start_watch()
    hosts._watch.thread.join(10)
    assert ended == [1]
    assert capsys.readouterr().err.startswith(
        "error: process 0 has ended, and process 1 of 2 cannot finish without it;"
    )


# --- Two processes on this host ---
