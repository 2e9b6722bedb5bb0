"""With uniform groups, fixed weights and TRL's own settings, rlbal gives TRL's advantages and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from rlbal.rewards.suite import RewardSuite
from rlbal.trainer_args import training_args
from rlbal.trainers.grpo import BalancedGRPOTrainer
from tests.support import make_model, make_recipe, make_rows, make_trainer, parameters, scripted_rollouts

# rlbal's settings next to what they are called in TRL: `config_kwargs` passes the same to both trainers.
TRL_SETTINGS = {
    "group std": {"scale": "group_std"},
    "batch std": {"scale": "batch_std"},
    "no scale (Dr. GRPO)": {"scale": "none"},
    # TRL's normalize_then_sum is GDPO: group std per reward, weighted sum, whitening; it ignores scale_rewards.
    "GDPO": {"scale": "group_std", "order": "normalize_then_sum", "whiten": True},
}
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


class Capture:
    """Keeps the advantages that the loss will see."""

    seen: list[torch.Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        self.seen.append(output["advantages"].clone())
        return output


class CapturedTRL(Capture, GRPOTrainer):
    """Plain TRL."""


class CapturedOurs(Capture, BalancedGRPOTrainer):
    """rlbal's trainer."""


def run_both(recipe: Any) -> tuple[CapturedOurs, CapturedTRL]:
    """Train both for a few steps of plain SGD on the same scripted rollouts."""
    suite = RewardSuite(recipe.rewards)
    ours = make_trainer(recipe, suite)
    ours.__class__ = CapturedOurs
    args, _ = training_args(recipe, 1)
    model, tokenizer = make_model(recipe)
    trl = CapturedTRL(
        model=model,
        args=args,
        train_dataset=make_rows(),
        reward_funcs=list(suite.functions),
        processing_class=tokenizer,
        rollout_func=scripted_rollouts,
    )
    for trainer in (ours, trl):
        trainer.seen = []
        torch.manual_seed(0)  # TRL shuffles the rows of a generation batch
        trainer.train()
    return ours, trl


def assert_equal(ours: CapturedOurs, trl: CapturedTRL) -> None:
    """Same advantages at every step, and SGD has gone the same way: the gradients were the same."""
    assert len(ours.seen) == len(trl.seen) > 0
    for mine, theirs in zip(ours.seen, trl.seen, strict=True):
        assert theirs.abs().max() > 0.01, "the comparison would be empty"
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    initial = parameters(make_model(ours.recipe)[0])
    moved = (parameters(trl.model) - initial).abs().max().item()
    assert moved > 1e-4, "nothing was trained"
    assert (parameters(ours.model) - parameters(trl.model)).abs().max().item() < 1e-5 * max(moved, 1.0)


@pytest.mark.parametrize("settings", TRL_SETTINGS.values(), ids=TRL_SETTINGS)
def test_every_scale_and_order_trl_has(settings: dict[str, Any], tmp_path: Path) -> None:
    changes = {f"advantage__{key}": value for key, value in settings.items()}
    assert_equal(*run_both(make_recipe(tmp_path, **changes)))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_type(loss: str, tmp_path: Path) -> None:
    assert_equal(*run_both(make_recipe(tmp_path, trainer__loss_type=loss)))


def test_several_steps_and_iterations_per_generation(tmp_path: Path) -> None:
    changes = {
        "trainer__per_device_train_batch_size": 4,
        "trainer__gradient_accumulation_steps": 2,
        "trainer__steps_per_generation": 4,
        "trainer__num_iterations": 2,
        "trainer__max_steps": 6,
    }
    assert_equal(*run_both(make_recipe(tmp_path, **changes)))


def test_rows_without_any_reward(tmp_path: Path) -> None:
    """Rows that every reward leaves out: TRL and rlbal agree, since none is only partly missing."""
    functions = {
        name: {"function": f"{Path(__file__).parent.parent / 'scripted_rewards.py'}:{name}"}
        for name in ("sometimes_missing", "always_missing_for_some")
    }
    ours, trl = run_both(make_recipe(tmp_path, rewards__functions=functions))
    assert_equal(ours, trl)
    assert ours.batch is not None and ours.batch.rewards_NK.isnan().all(dim=1).any()


def test_partly_missing_rewards_differ_on_purpose(tmp_path: Path) -> None:
    """TRL counts a missing reward as 0 against the others' baseline; rlbal leaves it out of its statistics."""
    file = Path(__file__).parent.parent / "scripted_rewards.py"
    functions = {name: {"function": f"{file}:{name}"} for name in ("even_share", "sometimes_missing")}
    recipe = make_recipe(tmp_path, rewards__functions=functions, advantage__scale="none", trainer__max_steps=1)
    ours, trl = run_both(recipe)
    assert ours.batch is not None
    rewards_NK, group_N = ours.batch.rewards_NK.double(), ours.batch.group_N
    expected = torch.zeros(len(group_N), dtype=torch.float64)
    for row in range(len(group_N)):
        for k in range(2):
            value = rewards_NK[row, k]
            if not value.isnan():
                expected[row] += value - rewards_NK[group_N == group_N[row], k].nanmean()
    # The trainer shuffles rows after the advantages are set, so they are compared as TRL logged them: in batch order.
    torch.testing.assert_close(torch.tensor(list(ours._logs["advantages"])).double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours.seen[0], trl.seen[0], atol=1e-3)


def test_our_advantages_are_the_ones_logged(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, algorithm__name="rloo", trainer__max_steps=1)
    suite = RewardSuite(recipe.rewards)
    ours = make_trainer(recipe, suite)
    ours.__class__ = CapturedOurs
    ours.seen = []
    ours.train()
    assert list(ours._logs["advantages"]) == ours.seen[0].tolist()
