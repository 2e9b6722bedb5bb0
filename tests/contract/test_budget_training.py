"""Length budgets in training: the number in the prompt, the one that rewards go by and the cap are one."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlbal.prompts.budget import nearest_token
from rlbal.rewards.suite import RewardSuite
from rlbal.trainers.grpo import BalancedGRPOTrainer
from tests.support import make_recipe, make_rows, make_trainer, scripted_rollouts

FILE = Path(__file__).parent.parent / "scripted_rewards.py"
FUNCTIONS = {
    "even": {"function": f"{FILE}:even_share", "range": [0, 1], "weight": 0.6},
    "length": {"function": "reward_fns.length:triangular", "range": [0, 1], "weight": 0.3},
}
TEMPLATE = "{question} in {token_budget}"


class Recorder(BalancedGRPOTrainer):
    """Keeps what the policy was told, what the rewards got and the limit that generation had."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        self.told = [
            *getattr(self, "told", []),
            (self.state.global_step, prompts, [row.get("token_budget") for row in inputs]),
        ]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.scored = [
            *getattr(self, "scored", []),
            ([len(ids) for ids in completion_ids_list], rewards[:, 1].tolist()),
        ]
        return rewards


def train(tmp_path: Path, sampled: bool = False, resume: Path | None = None, **changes: Any) -> Recorder:
    """Train on scripted rollouts, or on real ones; the cap of every generation is kept in `caps`."""
    changes = {"rewards__functions": FUNCTIONS, "data__prompt": TEMPLATE, **changes}
    recipe = make_recipe(tmp_path, **changes)
    rows = make_rows().map(lambda row: {"prompt": row["prompt"] + " in {token_budget}"})
    caps: list[int] = []

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        caps.append(trainer.generation_config.max_new_tokens)
        assert trainer.max_completion_length == 16
        return (trainer._rollouts if sampled else scripted_rollouts)(prompts, trainer)

    with RewardSuite(recipe.rewards) as suite:
        suite.start()
        trainer = make_trainer(recipe, suite, rows=rows, rollout_func=rollouts)
        trainer.__class__ = Recorder
        if resume is not None:
            trainer.learned.load(resume)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    assert isinstance(trainer, Recorder)
    trainer.caps = caps
    return trainer


def numbers(prompts: list[str]) -> list[int]:
    """The budgets that prompts name."""
    return [int(re.search(r" in (\d+)$", prompt)[1]) for prompt in prompts]


def triangular(length: int, budget: int) -> float:
    return max(0.0, length / budget if length <= budget else 2 - length / budget)


def check_one_number(trainer: Recorder) -> list[set[int]]:
    """Prompt, column and score go by one number; the budgets of each batch."""
    budgets = []
    for (_, prompts, column), (lengths, scores) in zip(trainer.told, trainer.scored, strict=True):
        assert numbers(prompts) == column
        assert scores == pytest.approx([triangular(*pair) for pair in zip(lengths, column, strict=True)])
        budgets.append(set(column))
    return budgets


def test_linear_by_steps(tmp_path: Path) -> None:
    """16 to 4 in 3 drops over 8 steps: 16, 12, 8, 4, two steps each. Twice that is the cap, 16 at most."""
    budget = {"schedule": "linear", "start": 16, "end": 4, "decays": 3}
    trainer = train(tmp_path, budget=budget, trainer__max_steps=8)
    assert check_one_number(trainer) == [{16}, {16}, {12}, {12}, {8}, {8}, {4}, {4}]
    assert trainer.caps == [16, 16, 16, 16, 16, 16, 8, 8]
    assert trainer.generation_config.max_new_tokens == 16
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["budget/tokens"] for entry in logs] == [16, 16, 12, 12, 8, 8, 4, 4]
    over = [sum(length > 4 for length in lengths) / 16 for lengths, _ in trainer.scored[-1:]]
    assert logs[-1]["length/over_budget"] == pytest.approx(over[0])


def test_real_rollouts_stop_at_the_cap(tmp_path: Path) -> None:
    budget = {"schedule": "constant", "tokens": 5}
    trainer = train(tmp_path, sampled=True, budget=budget)
    assert max(length for lengths, _ in trainer.scored for length in lengths) == 10
    free = train(tmp_path, sampled=True, budget={**budget, "cap": False})
    assert max(length for lengths, _ in free.scored for length in lengths) == 16
    assert set(free.caps) == {16}


def test_the_cap_is_taken_back_when_generation_fails(tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path, rewards__functions=FUNCTIONS, data__prompt=TEMPLATE, budget={"schedule": "constant", "tokens": 5}
    )

    def failing(prompts: list[str], trainer: Any) -> dict[str, Any]:
        assert trainer.generation_config.max_new_tokens == 10
        raise RuntimeError("out of memory")

    with RewardSuite(recipe.rewards) as suite:
        trainer = make_trainer(recipe, suite, rollout_func=failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.train()
    assert trainer.generation_config.max_new_tokens == 16


def test_several_steps_per_generation_keep_the_number_of_their_generation(tmp_path: Path) -> None:
    """Generation every 4 optimizer steps: at steps 0 and 4 of 8. A level per 2 steps, of which 2 are seen."""
    trainer = train(
        tmp_path,
        budget={"schedule": "linear", "start": 16, "end": 4, "decays": 3},
        trainer__max_steps=8,
        trainer__per_device_train_batch_size=4,
        trainer__steps_per_generation=4,
    )
    assert [step for step, _, _ in trainer.told] == [0, 4]
    assert check_one_number(trainer) == [{16}, {8}]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["budget/tokens"] for entry in logs] == [16] * 4 + [8] * 4


@pytest.mark.parametrize(
    "budget",
    [
        {"schedule": "exponential", "start": 16, "end": 4, "decays": 3},
        {"schedule": "adaptive", "start": 16, "end": 4, "levels": 3, "window": 2, "tolerance": 0.4},
    ],
    ids=["exponential", "adaptive"],
)
def test_a_resumed_run_goes_on_with_its_budget(budget: dict[str, Any], tmp_path: Path) -> None:
    changes = {"budget": budget, "trainer__max_steps": 6, "trainer__save_strategy": "steps", "trainer__save_steps": 3}
    whole = check_one_number(train(tmp_path / "whole", **changes))
    assert len(set().union(*whole)) > 1
    train_to_three(tmp_path, changes).learned.save(tmp_path / "checkpoint-3")
    rest = train(tmp_path, resume=tmp_path / "checkpoint-3", **changes)
    assert check_one_number(rest) == whole[3:]


def train_to_three(tmp_path: Path, changes: dict[str, Any]) -> Recorder:
    """The same run, ended by hand after three steps."""
    from transformers import TrainerCallback

    class AfterThree(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    recipe = make_recipe(tmp_path, **{"rewards__functions": FUNCTIONS, "data__prompt": TEMPLATE, **changes})
    rows = make_rows().map(lambda row: {"prompt": row["prompt"] + " in {token_budget}"})
    with RewardSuite(recipe.rewards) as suite:
        trainer = make_trainer(recipe, suite, rows=rows)
        trainer.add_callback(AfterThree())
        trainer.__class__ = Recorder
        trainer.train()
    assert isinstance(trainer, Recorder) and trainer.state.global_step == 3
    return trainer


def test_prompt_scope_follows_the_belief_about_each_prompt(tmp_path: Path) -> None:
    """Four prompts that come every step; `by_prompt` makes the first easier. B (1 - p / 2) with the default scale."""
    functions = {"solved": {"function": f"{FILE}:by_prompt", "range": [0, 1]}, "length": FUNCTIONS["length"]}
    recipe = make_recipe(
        tmp_path,
        rewards__functions=functions,
        data__prompt=TEMPLATE,
        budget={"schedule": "constant", "tokens": 8, "scope": "prompt"},
        trainer__max_steps=3,
    )
    rows = make_rows().select(range(4)).map(lambda row: {"prompt": row["prompt"] + " in {token_budget}"})
    believed: list[list[float]] = []
    with RewardSuite(recipe.rewards) as suite:
        trainer = make_trainer(recipe, suite, rows=rows)
        trainer.__class__ = Recorder
        own = trainer.allocator.believed

        def watched(prompts: Any, step: int) -> Any:
            if step > len(believed) - 1:
                believed.append(own(range(4), step).tolist())
            return own(prompts, step)

        trainer.allocator.believed = watched  # type: ignore[method-assign]
        trainer.train()
    assert isinstance(trainer, Recorder)
    check_one_number(trainer)
    for (_, prompts, column), rates in zip(trainer.told, believed, strict=True):
        for prompt, budget in zip(prompts, column, strict=True):
            rate = rates[int(re.search(r"say (\d+)", prompt)[1])]
            assert budget == nearest_token(8 * (1 - rate / 2))
    assert len(set(trainer.told[-1][2])) > 1
    assert trainer.batch is not None and trainer.batch.budget_N is not None
    assert sorted(trainer.batch.budget_N.tolist()) == sorted(trainer.told[-1][2])


def test_without_a_schedule_the_field_shows_the_limit_and_rewards_have_their_own_target(tmp_path: Path) -> None:
    functions = {**FUNCTIONS, "length": {**FUNCTIONS["length"], "args": {"target_tokens": 6}}}
    trainer = train(tmp_path, rewards__functions=functions)
    for (_, prompts, column), (lengths, scores) in zip(trainer.told, trainer.scored, strict=True):
        assert set(numbers(prompts)) == {16} and set(column) == {None}
        assert scores == pytest.approx([triangular(length, 6) for length in lengths])
    assert trainer.batch is not None and trainer.batch.budget_N is None
