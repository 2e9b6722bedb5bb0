"""The timeout reaches the groups, and errors of collectives become errors about processes."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed import HashStore, distributed_c10d

from rlbal import process_group
from rlbal.errors import RunError, TrainingStopped
from rlbal.launcher import ending
from rlbal.peers import Peers
from rlbal.process_group import Terminated, explain, first_line, is_mine_to_say

TIMED_OUT = "[/src/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 15000ms for send operation to complete"
CLOSED = (
    "[/src/pair.cc:553] Connection closed by peer [127.0.0.1]:29. This is typically caused by a remote worker crashing."
)


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Peers:
    """The second process of a job of which this one is the first."""
    store = HashStore()
    monkeypatch.setattr(process_group._Job, "peers", Peers(store, 0, 2))
    monkeypatch.setattr(process_group._Job, "timeout", 15.0)
    monkeypatch.setattr(process_group._Job, "ending", False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return Peers(store, 1, 2)


@pytest.mark.parametrize("message", [TIMED_OUT, CLOSED])
def test_a_failed_collective_is_explained_by_the_others_last_words(other: Peers, message: str, tmp_path: Path) -> None:
    other.leave(words="ValueError: no metrics today")
    found = explain(RuntimeError(message))
    assert isinstance(found, RunError)
    assert found.what == "training cannot go on: process 1 ended with an error:\nValueError: no metrics today"
    assert "`trainer.ddp_timeout` (15 s). Process 0 saw: " in found.why and "--resume" in found.fix
    assert json.loads((tmp_path / "error.json").read_text())["message"] == str(found)
    sign = other.others()[0]
    assert sign is not None and sign.victim and not sign.words


@pytest.mark.parametrize("error", [ValueError("a bug"), TrainingStopped("a reward failed")])
def test_an_error_of_its_own_is_left_for_the_others(other: Peers, error: Exception, tmp_path: Path) -> None:
    other.leave(words="something else")
    assert explain(error) is error
    sign = other.others()[0]
    assert sign is not None and sign.words.endswith(str(error)) and not sign.victim
    assert str(error) in json.loads((tmp_path / "error.json").read_text())["message"]


def test_termination_by_the_launcher_names_who_ended_first(other: Peers) -> None:
    other.leave(words="ValueError: no metrics today")
    found = explain(Terminated())
    assert isinstance(found, RunError) and "process 1 ended with an error" in found.what
    assert "Process 0 saw: the launcher's SIGTERM" in found.why


def test_termination_from_outside_blames_nobody(other: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other.find_cause.__func__, "__defaults__", (0.0, False))  # no patience
    assert str(explain(Terminated())).startswith("terminated (SIGTERM)")


def test_a_second_sigterm_does_not_interrupt_the_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group._Job, "ending", False)
    with pytest.raises(Terminated):
        process_group._terminate(signal.SIGTERM, None)
    explain(ValueError())
    process_group._terminate(signal.SIGTERM, None)


def test_where_torch_ends_a_waiting_process_it_says_before_who_is_missing(
    other: Peers, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a timeout of 0 it has waited long enough at its second sign."""
    monkeypatch.setattr(process_group, "INTERVAL", 0.01)
    monkeypatch.setattr(process_group._Job, "timeout", 0.0)
    other.leave(words="ValueError: no metrics today")
    mine = process_group._Job.peers
    assert mine is not None
    end, said = process_group._watch(mine, native=True), ""
    while "no metrics today" not in said:  # pytest's own time limit applies
        said += capfd.readouterr().err
        time.sleep(0.01)
    end()
    assert said.startswith("note: process 0 has been in `")
    assert "`trainer.ddp_timeout` is 0\nprocess 1 ended with an error:\nValueError: no metrics today" in said


def test_a_single_process_explains_nothing() -> None:
    error = RuntimeError(TIMED_OUT)
    assert explain(error) is error


def test_an_error_is_printed_by_the_first_that_has_it(other: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_mine_to_say(RunError("x")) and not is_mine_to_say(RunError("x")) and is_mine_to_say(RunError("y"))
    monkeypatch.setattr(process_group._Job, "peers", None)
    for rank, mine in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert is_mine_to_say(RunError("x")) is mine


def test_what_gloo_says_in_short() -> None:
    assert first_line(RuntimeError(TIMED_OUT)) == "Timed out waiting 15000ms for send operation to complete"
    assert first_line(RuntimeError(CLOSED)) == "Connection closed by peer [127.0.0.1]:29"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A job of which the launcher has started one process so far."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for key, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    for name in ("peers", "timeout", "ending"):
        monkeypatch.setattr(process_group._Job, name, getattr(process_group._Job, name))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the group is accelerate's on GPUs")
def test_a_process_that_never_comes_is_waited_for_as_long_as_configured(alone: None) -> None:
    with pytest.raises(RunError) as caught:
        process_group.join({"ddp_timeout": 1, "ddp_backend": None, "use_cpu": True})
    assert caught.value.what == "the 2 processes did not come together"
    assert caught.value.why == "process 1 never joined the others"


def test_groups_that_deepspeed_adds_have_the_timeout_too(alone: None) -> None:
    """It copies the group of all processes by `new_group(ranks)`, for which torch has a default of 30 minutes."""
    process_group._limit_new_groups(7.0)
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group: Any = distributed.new_group([0])
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)


def test_one_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    process_group.join({"ddp_timeout": 1, "ddp_backend": None, "use_cpu": True})
    assert not distributed.is_initialized() and process_group._Job.peers is None


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (3, "with exit status 3"),
        (-9, "by signal 9 (Killed), as from `kill -9` or from a machine that is out of memory"),
    ],
)
def test_the_launchers_last_line(code: int, how: str) -> None:
    assert ending(1, 42, code) == f"process 1 (pid 42) ended first, {how}"
