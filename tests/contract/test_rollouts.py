"""Rollouts through TRL's seam: rlbal's own, transformers', and continuous batching."""

import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlbal.rewards.suite import RewardSuite
from rlbal.trainers.grpo import BalancedGRPOTrainer
from rlbal.trainers.rollout import Rollouts, core_to_spare
from tests.support import PROMPTS, make_recipe, make_trainer

FILE = Path(__file__).parent.parent / "scripted_rewards.py"
SHORT = {"short": {"function": f"{FILE}:short"}}


class Recorder(BalancedGRPOTrainer):
    """Keeps completions, and when the rewards were asked for."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        self.asked_at, self.ids = time.monotonic(), completion_ids_list
        self.prompts_seen = prompts
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


def trained(tmp_path: Path, rollout_func: Any = "own", **changes: Any) -> Recorder:
    """One step with real sampling from a random model."""
    recipe = make_recipe(tmp_path, trainer__max_steps=1, **{"rewards__functions": SHORT, **changes})
    with RewardSuite(recipe.rewards) as suite:
        suite.start()
        trainer = make_trainer(recipe, suite, rollout_func=rollout_func)
        if rollout_func == "own":
            trainer.rollout_func = trainer._rollouts
        trainer.__class__ = Recorder
        trainer.train()
    assert isinstance(trainer, Recorder)
    return trainer


def test_rlbal_generates_unless_told_otherwise(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    assert isinstance(trainer.rollout_func, Rollouts)
    assert trainer.notes == []
    assert len(trainer.ids) == 16
    assert max(map(len, trainer.ids)) == 16
    assert min(map(len, trainer.ids)) >= 1


def test_a_rollout_depends_on_the_seed_and_its_number_alone(tmp_path: Path) -> None:
    """Not on the state of any random generator, nor on which rows are decoded together."""
    torch.manual_seed(1)
    one = trained(tmp_path)
    torch.manual_seed(2)
    again = trained(tmp_path, speed__rows_at_once=5)
    assert again.ids == one.ids
    assert trained(tmp_path, seed=1).ids != one.ids


def test_waves_keep_the_rows_of_a_prompt_together_longest_first(tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(tmp_path), RewardSuite(make_recipe(tmp_path).rewards))
    rollouts = Rollouts(trainer, rows_at_once=4)
    # Prompt 0 was short last time, prompt 1 long; prompt 2 is new and taken for average.
    trainer.allocator.ledger.observe(np.array([0, 1]), np.array([0.0, 0.0]), np.array([2, 10]), step=0)
    rollouts.inputs = [{"prompt_index": index} for index in (0, 0, 2, 2, 1, 1)]
    assert rollouts._waves(6) == [[4, 5, 2, 3], [0, 1]]


def test_rows_are_scored_while_others_are_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    when = {"function": f"{FILE.parent / 'clock_reward.py'}:seconds_since", "rowwise": True, "args": {"start": start}}
    prefetch = RewardSuite.prefetch

    def prefetch_and_wait(suite: RewardSuite, *batch: Any) -> None:
        """So that a busy machine cannot make this fail."""
        prefetch(suite, *batch)
        wait(suite._pools["when"]._ahead["when"].values())

    monkeypatch.setattr(RewardSuite, "prefetch", prefetch_and_wait)
    monkeypatch.setattr("rlbal.trainers.rollout.core_to_spare", lambda device: True)
    functions = {"when": when, "short": SHORT["short"]}
    trainer = trained(tmp_path, rewards__functions=functions, trainer__max_completion_length=64)
    assert trainer.batch is not None
    lengths = torch.tensor([len(ids) for ids in trainer.ids])
    assert (lengths < 64).any(), "every row ran to the cap"
    assert (trainer.batch.rewards_NK[:, 0] < trainer.asked_at - start).all()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"speed__generation": "transformers"}, None),
        ({"trainer__cache_implementation": "static"}, "trainer.cache_implementation"),
        ({"trainer__generation_kwargs": {"num_beams": 2}}, "num_beams"),
    ],
)
def test_transformers_generates_where_rlbal_does_not(changes: dict[str, Any], note: str | None, tmp_path: Path) -> None:
    trainer = trained(tmp_path, None, **changes)
    assert trainer._rollouts is None
    assert trainer.rollout_func is None
    assert len(trainer.ids) == 16
    if note is None:
        assert trainer.notes == []
    else:
        assert len(trainer.notes) == 1
        assert note in trainer.notes[0]


def test_continuous_batching_works(tmp_path: Path) -> None:
    settings = {"num_blocks": 512, "max_batch_tokens": 1024, "page_size": 16}  # the default cache takes gigabytes
    trainer = trained(
        tmp_path,
        None,
        trainer__use_transformers_continuous_batching=True,
        trainer__transformers_continuous_batching_config=settings,
    )
    assert trainer._rollouts is None
    assert len(trainer.ids) == 16
    assert {tuple(prompt) for prompt in trainer.prompts_seen} <= {tuple(prompt) for prompt in PROMPTS}


def test_cores_are_spare_beside_an_accelerator_or_fewer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert core_to_spare(torch.device("cuda"))
    assert core_to_spare(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not core_to_spare(torch.device("cpu"))
    assert core_to_spare(torch.device("cuda"))
