"""A run on two processes of which one is killed, and which is resumed, is the run that was not killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlbal.run import RunDirectory, read_jsonl
from tests.resumable import assert_same

ROOT = Path(__file__).parents[2]
RUNS = {"ddp": "grpo", "zero2": "lora", "zero3": "ppo"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All engines in one program, which imports everything once."""
    folder = tmp_path_factory.mktemp("resumed")
    command = [sys.executable, str(ROOT / "tests/e2e/resume_run.py"), str(folder)]
    command += [f"{engine}={case}" for engine, case in RUNS.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("engine", RUNS)
def test_killed_on_one_of_two_processes_and_resumed(engine: str, folder: Path) -> None:
    full, killed = (RunDirectory(folder / engine / name) for name in ("full", "killed"))
    assert [record["step"] for record in read_jsonl(full.metrics_path)] == [1, 2, 3, 4, 5, 6]
    newest = full.checkpoints()[-1]
    # Each process has a state of its own, so two of them really trained.
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {path.name for path in newest.iterdir()}
    assert any(newest.glob("global_step*")) == engine.startswith("zero")
    in_cycle = full.path / "checkpoint-2"
    assert len(list(in_cycle.glob("rollouts_*.safetensors"))) == 2
    assert_same(full, killed)
