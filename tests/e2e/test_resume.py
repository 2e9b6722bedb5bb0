"""A run that is resumed gives what one gives that never stopped, bit for bit."""

import itertools
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from rlbal.errors import TrainingStopped
from rlbal.run import RunDirectory, read_jsonl, step_of
from rlbal.train import train
from rlbal.trainers.evaluator import PolicyEvaluator
from rlbal.trainers.grpo import BalancedGRPOTrainer
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
            "advantage": {"scale": "beta", "order": "normalize_then_sum", "beta": {"cap": 0.1}},
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


def failing_once(step: int, call: int) -> Any:
    """Scoring that fails in one call of a step, of several if several generations make up a step; it works again when
    the run is resumed."""
    usual, calls = BalancedGRPOTrainer._calculate_rewards, 0

    def calculate(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += trainer.state.global_step == step
        if calls == call and trainer.state.global_step == step:
            raise TrainingStopped("the scorer is away")
        return usual(trainer, *args, **kwargs)

    return calculate


@pytest.mark.parametrize(
    ("step", "call", "changes"),
    [
        (2, 1, {}),
        # The first step of the second epoch, with random numbers of torch's.
        (4, 1, {"speed": {"generation": "transformers"}}),
        # Before the second generation the second step has trained on the first one's rollouts.
        (1, 1, {"trainer": {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "num_iterations": 3}}),
    ],
)
def test_a_reward_that_failed_leaves_no_trace(
    step: int, call: int, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"save_steps": 100, **changes.get("trainer", {})}
    full = RunDirectory(train(resumable_recipe(tmp_path / "full", {**changes, "trainer": trainer})))
    recipe = resumable_recipe(tmp_path / "failed", {**changes, "trainer": trainer})
    with monkeypatch.context() as patched:
        patched.setattr(BalancedGRPOTrainer, "_calculate_rewards", failing_once(step, call))
        with pytest.raises(TrainingStopped, match="the scorer is away"):
            train(recipe)
    run = RunDirectory(recipe.output_dir)
    assert run.latest_checkpoint().name == f"checkpoint-{step}"
    train(recipe, resume=True)
    assert_same(full, run)


def test_an_evaluation_that_failed_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = RunDirectory(train(resumable_recipe(tmp_path / "full", {})))
    recipe, run = resumable_recipe(tmp_path / "failed", {}), RunDirectory(tmp_path / "failed")
    usual, calls = PolicyEvaluator.run, 0

    def evaluate(evaluator: PolicyEvaluator) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # at steps 0, 2 and 4
            raise TrainingStopped("the scorer is away")
        return usual(evaluator)

    with monkeypatch.context() as patched:
        patched.setattr(PolicyEvaluator, "run", evaluate)
        with pytest.raises(TrainingStopped, match="the scorer is away"):
            train(recipe)
    train(recipe, resume=True)
    assert_same(full, run)


@pytest.mark.parametrize("strategy", ["steps", "best", "no"])
def test_ctrl_c_keeps_its_checkpoint_and_the_best(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one: the Trainer, left to itself, keeps only the best in the end."""
    trainer = {"save_total_limit": 1, "save_strategy": strategy}
    recipe, run = resumable_recipe(tmp_path / "run", {"trainer": trainer}), RunDirectory(tmp_path / "run")
    falling = itertools.count(0, -1)
    monkeypatch.setattr("rlbal.evaluation.averages", lambda columns: dict.fromkeys(columns, float(next(falling))))
    usual = BalancedGRPOTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(BalancedGRPOTrainer, "training_step", training_step)
    with pytest.raises(TrainingStopped, match="stopped after step 4; the checkpoint is saved"):
        train(recipe)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert run.best()["checkpoint"] == "checkpoint-2"  # type: ignore[index]
    # Also when the run has moved, and its path is spelled otherwise.
    shutil.move(run.path, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    train(recipe.model_copy(update={"output_dir": "moved"}), resume=True)
    assert "checkpoint-2" in [path.name for path in RunDirectory("moved").checkpoints()]


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
