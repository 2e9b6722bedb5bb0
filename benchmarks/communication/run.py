"""What processes send each other in a step, and how long balancing takes, as rollouts, prompts and rewards grow.

    python benchmarks/communication/run.py            # about five minutes on 2 cores
    python benchmarks/communication/run.py --report   # README.md and the picture from result.json

Two real processes over gloo. Writes result.json, README.md and communication.png beside this file.
"""

import argparse
import json
import os
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import steps
import times
import torch

FOLDER = Path(__file__).parent
RESULT = FOLDER / "result.json"
ROLLOUTS = (32, 128, 512)
TIMED_ROLLOUTS = (64, 1024, 8192, 65536)
REWARDS = (1, 2, 4, 8)
LENGTHS = (8, 64)  # completion tokens
# What varies in each series of exchanges; the rest is `steps.Setting`'s.
EXCHANGES: dict[str, list[dict[str, Any]]] = {
    "rollouts": [{"rollouts": rollouts} for rollouts in ROLLOUTS],
    "length": [{"length": length} for length in LENGTHS],
    "prompts": [{"per_prompt": per_prompt} for per_prompt in (32, 8, 2)],
    "rewards": [{"rewards": rewards} for rewards in REWARDS],
    "gradient": [{"rewards": rewards, "weighting": "gradient"} for rewards in (2, 4)],
}
TIMES: dict[str, list[dict[str, int]]] = {
    "rollouts": [{"rollouts": rollouts} for rollouts in TIMED_ROLLOUTS],
    "prompts": [{"rollouts": 8192, "per_prompt": per_prompt} for per_prompt in (128, 32, 8)],
    "rewards": [{"rollouts": 8192, "rewards": rewards} for rewards in REWARDS],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _process(rank: int, work: Callable[[], Any], world: int, port: int, target: Path) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
    result = work()
    if rank == 0:
        target.write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)


def in_processes(world: int, work: Callable[[], Any]) -> Any:
    """What `work()` gives in the first of `world` forked processes."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        torch.multiprocessing.start_processes(
            _process, args=(work, world, free_port(), target), nprocs=world, start_method="fork"
        )
        return json.loads(target.read_text())


def exchanges() -> dict[str, Any]:
    """Every series of `EXCHANGES`, and plain TRL on the same rollouts."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: [{**changes, **steps.measure(Path(folder), **changes)} for changes in series]
            for name, series in EXCHANGES.items()
        }
        found["plain TRL"] = [
            {**changes, **steps.measure(Path(folder), plain=True, **changes)}
            for changes in [*EXCHANGES["rollouts"], *EXCHANGES["length"]]
        ]
    return found


def main() -> None:
    """Measure, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write README.md and the picture again")
    if not parser.parse_args().report:
        result = {"exchanges": in_processes(2, exchanges), "times": {}}
        for world in (1, 2):
            result["times"][world] = in_processes(world, partial(times.series, TIMES))
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    import report

    report.write(json.loads(RESULT.read_text()), FOLDER)


if __name__ == "__main__":
    main()
