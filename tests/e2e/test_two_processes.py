"""Two real processes give what one gives with the same global batch, on scripted rollouts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/e2e/scripted_run.py"
# Cumulative wall time, and what TRL takes per process before it averages.
TIMES = ("time/", "gpu_seconds", "step_time")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(folder: Path, loss: str, processes: int) -> list[dict[str, Any]]:
    """Train with 16 rows over all processes; what each process saw."""
    folder.mkdir()
    words = [str(SCRIPT), str(folder), loss, str(16 // processes)]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"]
    launcher += ["--main_process_port", str(free_port())]
    command = [sys.executable, *(launcher if processes == 2 else []), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


def close(mine: Any, theirs: Any, tolerance: float) -> bool:
    absent = mine != mine and theirs != theirs  # NaN: this recipe has no budget
    return mine == theirs or absent or abs(mine - theirs) <= tolerance * max(1.0, abs(theirs))


def in_order(seen: dict[str, Any]) -> dict[str, Any]:
    """With the rows by prompt; those of one prompt are already in the order of their turns."""
    order = sorted(range(len(seen["prompts"])), key=lambda row: seen["prompts"][row])
    return {**seen, **{key: [seen[key][row] for row in order] for key in ("prompts", "advantages", "rewards")}}


@pytest.mark.parametrize("loss", ["dapo", "cispo", "vespo", "knapsack"])
def test_two_processes_equal_one(loss: str, tmp_path: Path) -> None:
    (one,) = map(in_order, run(tmp_path / "one", loss, 1))
    two = [in_order(seen) for seen in run(tmp_path / "two", loss, 2)]
    for rank in two:
        # Several configurations only look like two processes.
        assert rank["num_processes"] == 2
        assert rank["distributed_type"] == "MULTI_CPU" or rank["distributed_type"] == "MULTI_GPU"
        assert rank["wrapped"] == "DistributedDataParallel"
    assert two[0]["moved"] == two[1]["moved"]
    assert two[0]["advantages"] == two[1]["advantages"]
    assert max(map(abs, one["advantages"])) > 0.1
    assert two[0]["advantages"] == pytest.approx(one["advantages"], abs=1e-5)

    largest = max(map(abs, one["moved"]))
    assert largest > 1e-4
    difference = max(abs(a - b) for a, b in zip(one["moved"], two[0]["moved"], strict=True))
    assert difference < 1e-5 * max(largest, 1.0)

    assert two[0]["ledger"] == two[1]["ledger"] == one["ledger"]
    for key in ("allocation", "budget", "weighting"):
        assert two[0]["state"][key] == two[1]["state"][key]
    assert two[0]["state"]["allocation"] == one["state"]["allocation"]
    assert two[0]["prompts"] == one["prompts"]
    if loss == "knapsack":
        assert max(step["allocation/max"] for step in one["metrics"]) > 4
        assert len({step["budget/tokens"] for step in one["metrics"]}) > 1

    assert len(one["metrics"]) == len(two[0]["metrics"]) == (5 if loss == "knapsack" else 3)
    learned = {"dapo": "weight/even", "cispo": "hypervolume/factor", "knapsack": "weight/even"}.get(loss)
    if learned:
        assert len({step[learned] for step in one["metrics"]}) > 1
    for mine, theirs in zip(two[0]["metrics"], one["metrics"], strict=True):
        assert set(mine) == set(theirs)
        different = {
            key: (mine[key], theirs[key])
            for key in mine
            if not key.startswith(TIMES) and not close(mine[key], theirs[key], 1e-4)
        }
        assert not different
