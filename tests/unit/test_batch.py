"""The rollout batch and what `metrics.jsonl` says of it."""

import math

import pytest
import torch

from rlbal.batch import RolloutBatch, batch_metrics, group_rows

NAN = math.nan


def test_groups_are_numbered_by_prompt_wherever_its_rows_lie():
    assert group_rows(torch.tensor([7, 3, 7, 90, 3])).tolist() == [1, 0, 1, 2, 0]


@pytest.fixture
def batch():
    """Prompt 3 with 3 rollouts, prompt 7 with 2, prompt 9 with 1, mixed."""
    prompt_index_N = torch.tensor([3, 7, 3, 9, 7, 3])
    rewards = [[1.0, 0.5, NAN], [0.0, 0.5, NAN], [0.0, 0.5, NAN], [1.0, 0.25, NAN], [0.0, NAN, NAN], [1.0, 0.5, NAN]]
    return RolloutBatch(
        prompt_index_N=prompt_index_N,
        group_N=group_rows(prompt_index_N),
        rewards_NK=torch.tensor(rewards),
        completion_tokens_N=torch.tensor([10, 20, 30, 40, 50, 60]),
        prompt_tokens_N=torch.tensor([5] * 6),
        truncated_N=torch.tensor([False, False, False, False, True, True]),
        budget_N=torch.tensor([25, 19, 25, 50, 49, 60]),
    )


def test_counts(batch):
    assert batch.num_prompts == 3
    assert batch.counts_P.tolist() == [3, 2, 1]


def test_metrics_by_hand(batch):
    metrics = batch_metrics(batch, torch.tensor([1.0, 0.5, 0.0]), ["correct", "format", "absent"], success=0)
    nothing = metrics.pop("reward/absent/mean")
    assert math.isnan(nothing) and math.isnan(metrics.pop("reward/absent/prompt_mean"))
    assert metrics == pytest.approx(
        {
            # 1, 0, 0, 1, 0, 1: mean 1/2, std sqrt(6 / 4 / 5). Prompts 7 (0, 0) and 9 (alone) are dead: 2 of 3.
            "reward/correct/mean": 0.5,
            # Prompt 3: 1, 0, 1; prompt 7: 0, 0; prompt 9: 1.
            "reward/correct/prompt_mean": (2 / 3 + 0 + 1) / 3,
            "reward/correct/std": math.sqrt(0.3),
            "reward/correct/none": 0.0,
            "reward/correct/dead_groups": 2 / 3,
            "weight/correct": 1.0,
            # 0.5 four times and 0.25: mean 0.45, deviations 0.05 (4 times) and -0.2: 0.05 / 4 = 0.0125. 1 of 6 missing.
            "reward/format/mean": 0.45,
            "reward/format/prompt_mean": (0.5 + 0.5 + 0.25) / 3,
            "reward/format/std": math.sqrt(0.0125),
            "reward/format/none": 1 / 6,
            "reward/format/dead_groups": 1.0,
            "weight/format": 0.5,
            "reward/absent/std": 0.0,
            "reward/absent/none": 1.0,
            "reward/absent/dead_groups": 1.0,
            "weight/absent": 0.0,
            "allocation/min": 1,
            "allocation/max": 3,
            "allocation/mean": 2.0,
            # Only prompt 3 varies, in `correct`: 3 of 6 rollouts.
            "effective_gradient_ratio": 0.5,
            "any_reward_gradient_ratio": 0.5,
            "length/mean": 35.0,
            "length/truncated": 2 / 6,
            # 20 over 19, 30 over 25, 50 over 49; not 10 of 25, 40 of 50 and 60 of 60.
            "length/over_budget": 3 / 6,
        }
    )


def test_the_gradient_ratio_is_of_the_success_reward(batch):
    batch.budget_N = None
    metrics = batch_metrics(batch, torch.ones(3), ["correct", "format", "absent"], success=1)
    assert math.isnan(metrics["length/over_budget"])
    assert (metrics["effective_gradient_ratio"], metrics["any_reward_gradient_ratio"]) == (0.0, 0.5)
