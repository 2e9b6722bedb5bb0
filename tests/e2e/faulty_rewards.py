"""A reward that, in its third batch and on one process, does what the file named by FAULT says: "stop 1"."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

calls = 0


def even_share(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of even token ids; before a fault, note this process and its children beside the file."""
    global calls
    calls += 1
    if calls == 3:
        path = Path(os.environ["FAULT"])
        here = psutil.Process()
        family = [(one.pid, one.create_time()) for one in (here, *here.children(recursive=True))]
        path.with_name(f"family{os.environ['RANK']}.json").write_text(json.dumps(family))
        fault, _, rank = path.read_text().partition(" ")
        if rank == os.environ["RANK"]:
            commit(fault)
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def commit(fault: str) -> None:
    """What goes wrong."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "exit":
        os._exit(3)
    if fault == "raise":
        raise KeyError("the unit table")
    while fault == "hang":
        time.sleep(0.1)
    if fault == "break":
        sys.modules["rlbal.trainers.grpo"].batch_metrics = broken


def broken(*_: Any, **__: Any) -> None:
    """Stands in for a part of the trainer, outside of what is known of rewards."""
    raise ValueError("no metrics today")
