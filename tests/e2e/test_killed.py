"""Runs that are killed with SIGKILL, at every bad moment, and resumed: nothing is lost, doubled or changed."""

import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlbal import checkpoint as checkpoints
from rlbal.errors import RunError
from rlbal.run import RunDirectory, read_jsonl
from rlbal.train import train
from rlbal.trainers import callbacks, resumable
from rlbal.trainers.evaluator import PolicyEvaluator
from rlbal.trainers.grpo import BalancedGRPOTrainer
from rlbal.trainers.state import BalanceState
from tests.resumable import assert_same, resumable_recipe

# Rollouts of four optimizer steps; a checkpoint after every other step, so that some are in a cycle.
CHANGES: dict[str, Any] = {
    "trainer": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_steps": 8,
        "save_steps": 2,
        "save_total_limit": 2,
    },
}


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, then: Callable[..., Any], usual: Callable[..., Any]) -> Callable[..., Any]:
    """`usual`, but the call of that number, from 1, is `then`."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (then if calls == number else usual)(*args, **kwargs)

    return call


def half_a_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(f'{{"step": {record["step"]}, "loss"')
    die()


def half_a_file(data: Any, path: Any, **kwargs: Any) -> None:
    Path(path).write_bytes(b"half of it")
    die()


# Moment -> (object, name, number of the call, what happens in it).
MOMENTS: dict[str, tuple[Any, str, int, Callable[..., Any]]] = {
    "before the first step": (BalancedGRPOTrainer, "_allocate", 1, die),
    "after generating": (BalancedGRPOTrainer, "_gather_batch", 2, die),
    "in a cycle": (BalancedGRPOTrainer, "_compute_loss", 7, die),
    "in a line of metrics.jsonl": (callbacks, "append_jsonl", 8, half_a_line),
    "in an evaluation": (PolicyEvaluator, "run", 3, die),
    "after the best evaluation": (RunDirectory, "record_best", 2, die),
    "in the optimizer's file": (torch, "save", 4, half_a_file),
    "before the state is written": (BalanceState, "save", 3, die),
    "before the rename": (resumable, "put_in_place", 3, die),
    "while old checkpoints are deleted": (RunDirectory, "rotate", 3, die),
    "in the final model": (resumable, "seal", 5, die),
}


def in_child(work: Callable[[], Any]) -> int:
    """Run something in a forked process; its exit code, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(300)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return RunDirectory(train(resumable_recipe(tmp_path_factory.mktemp("full") / "run", CHANGES)))


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(moment: str, full: RunDirectory, tmp_path: Path) -> None:
    recipe, run = resumable_recipe(tmp_path / "run", CHANGES), RunDirectory(tmp_path / "run")
    owner, name, number, then = MOMENTS[moment]

    def killed() -> None:
        setattr(owner, name, at_call(number, then, getattr(owner, name)))
        train(recipe)

    assert in_child(killed) == -signal.SIGKILL
    assert not run.model_path.exists()
    found = [path.name for path in run.checkpoints()]
    for path in run.path.glob("checkpoint-*"):
        assert checkpoints.is_sealed(path), f"{path} is half a checkpoint"
    train(recipe, resume=bool(found), overwrite=not found)
    assert_same(full, run)
    assert [path.name for path in run.checkpoints()] == [path.name for path in full.checkpoints()]
    assert not run.aside.exists() or not any(run.aside.iterdir())


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(full: RunDirectory, tmp_path: Path) -> None:
    """Files may have 100 kB from the third checkpoint on: the model has more, a line of metrics.jsonl less."""
    recipe, run = resumable_recipe(tmp_path / "run", CHANGES), RunDirectory(tmp_path / "run")
    usual = resumable.ResumableGRPOTrainer._save_checkpoint

    def filling(trainer: Any, model: Any, trial: Any) -> None:
        if trainer.state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        usual(trainer, model, trial)

    def refused() -> None:
        resumable.ResumableGRPOTrainer._save_checkpoint = filling  # type: ignore[method-assign]
        told = r"checkpoint-6 could not be written[\s\S]*checkpoint-4 is whole[\s\S]*--resume"
        with pytest.raises(RunError, match=told):
            train(recipe)

    assert in_child(refused) == 0
    assert [path.name for path in run.checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert not run.aside.exists()
    train(recipe, resume=True)
    assert_same(full, run)


def test_a_checkpoint_that_lost_a_part_is_passed_over(full: RunDirectory, tmp_path: Path) -> None:
    """As a copy leaves it that ran out of space, or a disk that lied about what it had written."""
    shutil.copytree(full.path, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    shutil.rmtree(run.model_path)
    (eight,) = [path for path in run.checkpoints() if path.name == "checkpoint-8"]
    with (eight / "optimizer.pt").open("r+b") as file:
        file.truncate(1000)
    assert run.latest_checkpoint() == run.checkpoints()[-1] != eight
    train(full.recipe().model_copy(update={"output_dir": str(run.path)}), resume=True)
    assert_same(full, run)


def test_no_step_is_missing_or_twice(full: RunDirectory) -> None:
    assert [record["step"] for record in read_jsonl(full.metrics_path)] == list(range(1, 9))
