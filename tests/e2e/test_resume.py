"""A run that is resumed gives what one gives that never stopped, bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from rlbal.run import RunDirectory, read_jsonl, step_of
from rlbal.train import train
from tests.resumable import assert_same, resumable_recipe

# Two generations of two micro-batches in four optimizer steps, so that every other checkpoint is in a cycle.
CYCLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "plain": ({}, [1, 3]),
    "cycle": ({"trainer": {**CYCLE, "num_iterations": 2, "max_steps": 8}}, [1, 2, 3, 6]),
    # Three iterations of micro-batches that do not divide evenly into optimizer steps, in small waves.
    "uneven_cycle": (
        {
            "trainer": {
                "per_device_train_batch_size": 16,
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 1,
                "num_iterations": 3,
            },
            "speed": {"rows_at_once": 5},
        },
        [1, 2, 4],
    ),
    "everything": (
        {
            "weighting": {"method": "gradient", "step_size": 1.0, "interval": 2},
            "allocation": {"method": "knapsack", "low": 1},
            "data": {"prompt": "{question} {token_budget}"},
            "budget": {"schedule": "adaptive", "window": 1, "start": 12, "end": 4, "scope": "prompt"},
            "advantage": {"scale": "beta", "order": "normalize_then_sum"},
            "trainer": {**CYCLE, "num_iterations": 2, "max_steps": 8},
        },
        [1, 3, 4],
    ),
    "hypervolume": (
        {
            "weighting": {"method": "hypervolume", "objectives": {"even": "max", "tokens": "min"}},
            "trainer": {**CYCLE, "max_steps": 6},
        },
        [1, 2, 5],
    ),
    "lora_generate": (
        {
            "lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
            "speed": {"generation": "transformers"},
            "trainer": {**CYCLE, "beta": 0.05},
        },
        [1, 2],
    ),
    "ppo": (
        {
            "algorithm": {"name": "ppo", "rollouts_per_prompt": 4},
            "trainer": {**CYCLE, "num_iterations": 2, "max_steps": 8},
        },
        [1, 3, 4],
    ),
}


def cut_off(full: RunDirectory, step: int, path: Path) -> RunDirectory:
    """A copy of a run as it was when it was killed soon after the checkpoint of a step."""
    shutil.copytree(full.path, path)
    run = RunDirectory(path)
    shutil.rmtree(run.model_path)
    for checkpoint in run.checkpoints():
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    return run


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_run(case: str, tmp_path: Path) -> None:
    changes, stops = CASES[case]
    recipe = resumable_recipe(tmp_path / "full", changes)
    full = RunDirectory(train(recipe))
    assert len(list(read_jsonl(full.metrics_path))) == recipe.trainer["max_steps"]
    for step in stops:
        run = cut_off(full, step, tmp_path / f"from-{step}")
        train(recipe.model_copy(update={"output_dir": str(run.path)}), resume=True)
        assert_same(full, run)
