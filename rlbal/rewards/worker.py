"""The worker process: `python -P -m rlbal.rewards.worker FD PARENT_PID`.

It speaks lines of JSON over the socket FD. The first line names the functions to import; after "ready" each line holds
some rows to score, answered by one line. Reading JSON is all the parent ever does with an answer: once a completion has
been scored, nothing that this process says is to be trusted; if it is `sealed`, nothing at all.
"""

import asyncio
import gc
import inspect
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from rlbal.errors import RlbalError
from rlbal.rewards import isolation
from rlbal.rewards.loading import WITHOUT_TRAINER, bind, load_function, signature
from rlbal.rewards.outcomes import Fault, outcomes

MESSAGE_LENGTH = 1000
LARGEST_ANSWER = 64 * 1024  # per row
IMPORTS_MB = 8192  # address space, most of it libraries that are mapped and never touched


class Reward(NamedTuple):
    """A function and what the recipe says of it."""

    function: Callable[..., Any]
    args: dict[str, Any]
    unsafe: bool


Rewards = dict[str, Reward]
LockDown = Callable[[], list[str]]


def main() -> None:
    """Serve until the parent closes the socket."""
    with socket.socket(fileno=int(sys.argv[1])) as channel, channel.makefile("rb") as requests:
        isolation.die_with_parent(int(sys.argv[2]))
        network_left = isolation.leave_network()
        setup = json.loads(requests.readline())
        memory_mb, sealed, missing = setup["memory_mb"], setup["sealed"], []
        if sealed:
            missing = isolation.lock_down(memory_mb + IMPORTS_MB, network_left)
        try:
            rewards = {
                name: Reward(load_function(name, entry["function"]), entry["args"], entry["unsafe"])
                for name, entry in setup["rewards"].items()
            }
        except RlbalError as error:
            _send(channel, {"error": str(error)})
            return
        signatures = {name: signature(reward.function) for name, reward in rewards.items()}
        if sealed:
            isolation.limit_memory(memory_mb)
        elif setup["fresh"]:
            serve_fresh(channel, requests, rewards, signatures, partial(isolation.lock_down, memory_mb, network_left))
            return
        else:
            missing = isolation.lock_down(memory_mb, network_left)
        _send(channel, {"ready": missing, "signatures": signatures})
        for line in requests:
            _send(channel, answer(line, rewards))


def serve_fresh(
    channel: socket.socket, requests: BinaryIO, rewards: Rewards, signatures: dict[str, Any], lock_down: LockDown
) -> None:
    """Score each row in a copy of this process: what a completion's code changes there is gone with the row."""
    gc.freeze()  # keeps the collector from touching, and so copying, the memory shared with the copies

    def score_row(line: bytes) -> dict[str, Any]:
        lock_down()
        return answer(line, rewards)

    channel.sendall(_from_copy(channel, lambda: {"ready": lock_down(), "signatures": signatures}))
    for line in requests:
        reply = _from_copy(channel, partial(score_row, line))
        channel.sendall(reply or _line({"token": _token(line), "outcomes": [["died", "ended its process"]]}))


def _from_copy(channel: socket.socket, action: Callable[[], dict[str, Any]]) -> bytes:
    """Run `action` in a forked copy of this process and return its line; empty if the copy died first."""
    parent = os.getpid()
    incoming, outgoing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            isolation.die_with_parent(parent)
            os.close(channel.fileno())
            os.close(incoming)
            with open(outgoing, "wb") as pipe:
                pipe.write(_line(action()))
        finally:
            os._exit(0)
    os.close(outgoing)
    with open(incoming, "rb") as pipe:
        line = pipe.read(LARGEST_ANSWER)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return line if line.endswith(b"\n") else b""


def answer(line: bytes, rewards: Rewards) -> dict[str, Any]:
    """Score the rows of one request (`TOKEN JSON`): a number, null, or [reason, message] for each."""
    request = json.loads(line.partition(b" ")[2])
    reward, rows = rewards[request["reward"]], request["rows"]
    isolation.limit_processor_time(request["timeout"])
    try:
        values = bind(*reward, given={**WITHOUT_TRAINER, **request["columns"]})()
        judged = outcomes(asyncio.run(values) if inspect.iscoroutine(values) else values, rows, None)
    except BaseException as error:  # whatever a scorer raises, SystemExit and KeyboardInterrupt included
        judged = [Fault("raised", f"raised {type(error).__name__}: {error}")] * rows
    said = [[one.reason, one.message[:MESSAGE_LENGTH]] if isinstance(one, Fault) else one for one in judged]
    return {"token": _token(line), "outcomes": said}


def _token(line: bytes) -> str:
    return line.partition(b" ")[0].decode()


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(_line(message))


if __name__ == "__main__":
    main()
