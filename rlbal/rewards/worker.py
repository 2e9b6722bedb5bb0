"""The worker process: `python -P -m rlbal.rewards.worker FD PARENT_PID`.

It speaks lines of JSON over the socket FD. The first line names the functions to import; after "ready" each line is one
row to score, answered by one line. Reading JSON is all the parent ever does with an answer: once a completion has been
scored, nothing that this process says is to be trusted.
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
from typing import Any, BinaryIO

from rlbal.errors import RlbalError
from rlbal.rewards import isolation
from rlbal.rewards.loading import load_function
from rlbal.rewards.outcomes import Fault, outcomes

Functions = dict[str, Callable[..., Any]]
LockDown = Callable[[], list[str]]
MESSAGE_LENGTH = 1000
LARGEST_ANSWER = 64 * 1024


def main() -> None:
    """Serve until the parent closes the socket."""
    with socket.socket(fileno=int(sys.argv[1])) as channel, channel.makefile("rb") as requests:
        isolation.die_with_parent(int(sys.argv[2]))
        network_left = isolation.leave_network()
        setup = json.loads(requests.readline())
        try:
            functions: Functions = {
                name: partial(load_function(name, reward["function"]), **reward["args"])
                for name, reward in setup["rewards"].items()
            }
        except RlbalError as error:
            _send(channel, {"error": str(error)})
            return
        lock_down = partial(isolation.lock_down, setup["memory_mb"], network_left)
        if setup["fresh"]:
            serve_fresh(channel, requests, functions, lock_down)
            return
        _send(channel, {"ready": lock_down()})
        for line in requests:
            _send(channel, answer(line, functions))


def serve_fresh(channel: socket.socket, requests: BinaryIO, functions: Functions, lock_down: LockDown) -> None:
    """Score each row in a copy of this process: what a completion's code changes there is gone with the row."""
    gc.freeze()  # keeps the collector from touching, and so copying, the memory shared with the copies

    def score_row(line: bytes) -> dict[str, Any]:
        lock_down()
        return answer(line, functions)

    channel.sendall(_from_copy(channel, lambda: {"ready": lock_down()}))
    for line in requests:
        reply = _from_copy(channel, partial(score_row, line))
        channel.sendall(reply or _line({"token": _token(line), "fault": ["died", "ended its process"]}))


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


def answer(line: bytes, functions: Functions) -> dict[str, Any]:
    """Score the row of one request (`TOKEN JSON`) and say what became of it."""
    request = json.loads(line.partition(b" ")[2])
    isolation.limit_processor_time(request["timeout"])
    try:
        values = functions[request["reward"]](**request["columns"])
        outcome = outcomes(asyncio.run(values) if inspect.iscoroutine(values) else values, 1, None)[0]
    except BaseException as error:  # whatever a scorer raises, SystemExit and KeyboardInterrupt included
        outcome = Fault("raised", f"raised {type(error).__name__}: {error}")
    if isinstance(outcome, Fault):
        return {"token": _token(line), "fault": [outcome.reason, outcome.message[:MESSAGE_LENGTH]]}
    return {"token": _token(line), "score": outcome}


def _token(line: bytes) -> str:
    return line.partition(b" ")[0].decode()


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(_line(message))


if __name__ == "__main__":
    main()
