"""Sweeps of real runs, as people type them: trained, compared, interrupted and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlbal.recipe_file import dump_yaml
from rlbal.run import RunDirectory, read_jsonl
from tests.e2e.test_train import recipe_for

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e


def start(*words: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, "-m", "rlbal.cli", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def rlbal(*words: str) -> str:
    """Run a command to its end and return what it printed."""
    with start(*words) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out


def write_sweep(tmp_path: Path, steps: int, seeds: list[int], arms: dict[str, list[str]]) -> Path:
    recipe = recipe_for(tmp_path, max_steps=steps, save_strategy="no")
    (tmp_path / "base.yaml").write_text(recipe.dump())
    values = {"output_dir": str(tmp_path / "out"), "recipe": str(tmp_path / "base.yaml"), "arms": arms}
    values |= {"overrides": ["evaluation.every=null"], "seeds": seeds, "parallel": 2}
    (tmp_path / "sweep.yaml").write_text(dump_yaml(values))
    return tmp_path / "sweep.yaml"


def test_a_sweep_trains_its_arms_and_compares_them(tmp_path: Path) -> None:
    arms = {"slow": [], "fast": ["trainer.learning_rate=0.01"]}
    shown = rlbal("sweep", str(write_sweep(tmp_path, 2, [1], arms)))
    assert "(2/2 runs finished)" in shown and "paired by seed (1 pair), arm minus slow" in shown
    run = RunDirectory(tmp_path / "out" / "fast" / "seed-1")
    assert (run.recipe().seed, run.recipe().trainer["learning_rate"]) == (1, 0.01)
    assert "Held-out evaluation" in (tmp_path / "out" / "fast" / "seed-1.log").read_text()

    found = json.loads(rlbal("compare", str(tmp_path / "out"), "--metric", "reward/first", "--json"))
    assert list(found["arms"]) == ["slow", "fast"] and found["left_out"] == {} and found["notes"] == []
    last = list(read_jsonl(run.evaluations_path))[-1]["metrics"]["reward/first"]
    assert found["arms"]["fast"]["metrics"]["reward/first"]["values"]["1"] == last
    # Before any step, arms of one seed are the same model on the same problems: this is what pairing rests on.
    starts = [
        next(read_jsonl(RunDirectory(tmp_path / "out" / arm / "seed-1").evaluations_path))["metrics"] for arm in arms
    ]
    assert starts[0] == starts[1]


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    sweep, run = write_sweep(tmp_path, 30, [3], {"only": []}), RunDirectory(tmp_path / "out" / "only" / "seed-3")
    with start("sweep", str(sweep)) as process:
        deadline = time.monotonic() + 120
        while not (run.metrics_path.is_file() and len(list(read_jsonl(run.metrics_path))) >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and f"continue: rlbal sweep {sweep}" in err
    saved = run.latest_checkpoint().name
    shown = rlbal("sweep", str(sweep))
    assert f"only/seed-3: resumed from {saved}" in shown and "(1/1 runs finished)" in shown
    assert [record["step"] for record in read_jsonl(run.metrics_path)] == list(range(1, 31))
    assert (tmp_path / "out" / "only" / "seed-3.log").read_text().count("Held-out evaluation") == 1
