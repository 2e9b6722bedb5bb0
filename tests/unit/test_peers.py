"""Who brought a job down, told from the signs that its processes left."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed import HashStore

from rlbal import peers
from rlbal.peers import Peers, Sign, elsewhere, whereabouts


@pytest.fixture
def store() -> Any:
    return HashStore()


@pytest.fixture
def child() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def two(store: Any) -> tuple[Peers, Peers]:
    return Peers(store, 0, 2), Peers(store, 1, 2)


def test_last_words_are_the_cause(store: Any) -> None:
    mine, other = two(store)
    other.leave(words="ValueError: no metrics today")
    assert mine.find_cause(patience=0.0) == "process 1 ended with an error:\nValueError: no metrics today"


def test_one_that_only_saw_another_fail_is_not_the_cause(store: Any) -> None:
    mine, other = two(store)
    other.leave(victim=True, pid=0)  # gone, too
    assert mine.find_cause(patience=0.0) == ""


def test_a_process_that_is_gone(store: Any, child: subprocess.Popen) -> None:
    mine, other = two(store)
    other.leave(pid=child.pid, place="in `score` (rewards.py, line 7)")
    child.kill()
    child.wait()
    assert mine.find_cause(patience=0.0) == (
        f"process 1 (pid {child.pid} on {os.uname().nodename}) died without a word: killed, out of memory, or crashed; "
        "last seen in `score` (rewards.py, line 7)"
    )


def test_a_process_that_is_stopped(store: Any, child: subprocess.Popen) -> None:
    mine, other = two(store)
    other.leave(pid=child.pid)
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    assert f"process 1 (pid {child.pid} on {os.uname().nodename}) is stopped (SIGSTOP" in mine.find_cause(patience=0.0)


def test_numbers_of_another_machine_are_not_looked_up_here(store: Any, child: subprocess.Popen) -> None:
    mine, other = two(store)
    child.kill()
    child.wait()
    other.leave(pid=child.pid, machine="another")
    assert mine.find_cause(patience=0.0).startswith("process 1 (pid") and "died" not in mine.find_cause(patience=0.0)


def test_silence_is_told_from_being_busy(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, silent = two(store)
    assert "gives no sign of life" in mine.find_cause(patience=0.0)
    monkeypatch.setattr(peers, "INTERVAL", 0.02)
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.01):
            silent.leave(place="in `score` (rewards.py, line 7)", seconds=40.4)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        assert mine.find_cause(patience=1.0) == (
            "process 1 did not come: for 40 s it has been in `score` (rewards.py, line 7)"
        )
    finally:
        ended.set()
        thread.join()


def test_whoever_did_not_wait_for_the_others_asks_for_ends_only(store: Any) -> None:
    mine, _ = two(store)
    assert mine.find_cause(patience=0.0, ends_only=True) == ""


def test_one_that_never_came(store: Any) -> None:
    mine, _ = Peers(store, 0, 3), Peers(store, 1, 3)
    assert mine.others()[2] is None
    assert mine.find_cause(patience=0.0).startswith("process 2 never joined the others\nprocess 1 ")


def test_the_rarest_place_comes_first_and_few_are_named() -> None:
    def sign(rank: int, place: str, waiting: bool = False) -> Sign:
        return Sign(rank, "host", "machine", 1, place=place, seconds=9.0, waiting=waiting)

    crowd = [sign(rank, "at work") for rank in range(4)]
    assert elsewhere([*crowd, sign(4, "lost"), sign(5, "here", waiting=True)]) == (
        "process 4 did not come: for 9 s it has been lost\n"
        "process 0 did not come: for 9 s it has been at work\n"
        "process 1 did not come: for 9 s it has been at work\n"
        "and 2 more processes"
    )
    assert elsewhere([sign(1, "here", waiting=True)]) == ""


def test_a_text_is_said_once(store: Any) -> None:
    mine, other = two(store)
    assert [mine.first_to_say("a"), other.first_to_say("a"), other.first_to_say("b \ud800")] == [True, False, True]


def test_where_a_thread_is_and_for_how_long(store: Any) -> None:
    mine, other = two(store)
    ready, ended = threading.Event(), threading.Event()

    def held_up() -> None:
        ready.set()
        ended.wait()

    thread = threading.Thread(target=held_up)
    thread.start()
    ready.wait()
    time.sleep(0.05)
    try:
        first = mine.look_around(thread.ident or 0)
        again = mine.look_around(thread.ident or 0)
    finally:
        ended.set()
        thread.join()
    line = held_up.__code__.co_firstlineno + 2
    assert first.place.endswith(f"held_up` ({os.path.relpath(__file__)}, line {line})") and not first.waiting
    assert again.place == first.place and again.seconds > first.seconds >= 0
    assert other.others()[0] == again


def test_waiting_for_others_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not whereabouts(sys._getframe())[1]
    monkeypatch.setattr(peers, "WAITING_IN", ("unit/test_peers.py",))
    assert whereabouts(sys._getframe())[1]
