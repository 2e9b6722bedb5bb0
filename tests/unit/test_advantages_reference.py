"""Advantages of random ragged batches, against the definitions written as plain loops.

`test_beta_reference` does the same for `scale: beta`.
"""

import itertools
import math
import random

import pytest
import torch

from rlbal.balance.advantages import AdvantageRule, compute_advantages, reward_advantages
from rlbal.balance.normalization import BetaNormalizer, to_unit_interval

EPS = 1e-4


def reference(rewards, groups, weights, rule):
    """The definitions, one row and one reward at a time."""
    rows, kinds = range(len(rewards)), range(len(weights))

    def values(k, members):
        return [rewards[i][k] for i in members if not math.isnan(rewards[i][k])]

    def mean(numbers):
        return sum(numbers) / len(numbers)

    def std(numbers):
        if len(numbers) < 2:
            return 0.0
        return math.sqrt(sum((number - mean(numbers)) ** 2 for number in numbers) / (len(numbers) - 1))

    def spread(numbers):
        """What a std scale divides by; without spread there is no signal."""
        return std(numbers) + EPS if std(numbers) > 1e-8 else math.inf

    def mates(i):
        return [j for j in rows if groups[j] == groups[i]]

    def centred(i, k, baseline):
        if math.isnan(rewards[i][k]):
            return 0.0
        value = rewards[i][k]
        if baseline == "group":
            return value - mean(values(k, mates(i)))
        if baseline == "leave_one_out":
            others = values(k, [j for j in mates(i) if j != i])
            return value - mean(others) if others else 0.0
        if baseline == "batch":
            return value - mean(values(k, rows))
        everywhere = values(k, rows)
        return 0.0 if len(everywhere) > 1 and len(set(everywhere)) == 1 else value

    def total(i, baseline):
        return sum(weights[k] * centred(i, k, baseline) for k in kinds)

    scored = [i for i in rows if not all(math.isnan(rewards[i][k]) for k in kinds)]
    result = {}
    for i in scored:
        own = [j for j in mates(i) if j in scored]
        if rule.order == "sum_then_normalize":
            divisor = {
                "none": lambda: 1.0,
                "group_std": lambda own=own: spread([total(j, "group") for j in own]),
                "batch_std": lambda: spread([total(j, "batch") for j in scored]),
            }[rule.scale]()
            result[i] = total(i, rule.baseline) / divisor
        else:
            result[i] = 0.0
            for k in [k for k in kinds if not math.isnan(rewards[i][k])]:
                divisor = {
                    "none": lambda: 1.0,
                    "group_std": lambda i=i, k=k: spread(values(k, mates(i))),
                    "batch_std": lambda k=k: spread(values(k, rows)),
                }[rule.scale]()
                result[i] += weights[k] * centred(i, k, rule.baseline) / divisor
    if rule.whiten and scored:
        middle, width = mean(list(result.values())), std(list(result.values())) + EPS
        result = {i: (value - middle) / width for i, value in result.items()}
    return [result.get(i, 0.0) for i in rows]


BASELINES = ["group", "leave_one_out", "batch", "none"]
SCALES = ["none", "group_std", "batch_std"]
ORDERS = ["sum_then_normalize", "normalize_then_sum"]
RULES = [AdvantageRule(*choice) for choice in itertools.product(BASELINES, SCALES, ORDERS, [False, True])]
BETA = AdvantageRule(scale="beta", order="normalize_then_sum")


def random_batch(dice):
    """Up to 6 groups of 1 to 9 rows in random order, 1 to 4 rewards, a fifth of them missing."""
    sizes = [dice.randint(1, 9) for _ in range(dice.randint(1, 6))]
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    dice.shuffle(groups)
    kinds = dice.randint(1, 4)

    def reward():
        if dice.random() < 0.2:
            return math.nan
        return dice.choice([float(dice.random() < 0.5), dice.random()])

    rewards = torch.tensor([[reward() for _ in range(kinds)] for _ in groups])  # float32, as rewards come
    return rewards.tolist(), groups, [dice.uniform(-1, 2) for _ in range(kinds)]


@pytest.mark.parametrize("seed", range(200))
def test_random_ragged_batches_agree_with_plain_loops(seed):
    dice = random.Random(seed)
    rewards, groups, weights = random_batch(dice)
    weights_K = torch.tensor(weights, dtype=torch.float64)
    for rule in dice.sample(RULES, 6):
        advantages_N = compute_advantages(torch.tensor(rewards), torch.tensor(groups), weights_K, rule)
        expected = reference(rewards, groups, weights, rule)
        assert advantages_N.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6), rule


@pytest.mark.parametrize("seed", range(50))
def test_each_rewards_own_advantages(seed):
    dice = random.Random(seed)
    rewards, groups, weights = random_batch(dice)
    rewards_NK, group_N, ranges_K2 = torch.tensor(rewards), torch.tensor(groups), torch.tensor([[0.0, 1.0]])
    beta = BetaNormalizer([str(k) for k in range(len(weights))], dice.choice(["moments", "beta_binomial"]), 0.5, 10.0)
    ranges_K2 = ranges_K2.expand(len(weights), 2)
    beta.observe(to_unit_interval(rewards_NK, ranges_K2), group_N)
    weights_K = torch.tensor(weights, dtype=torch.float64)
    for rule in [*dice.sample(RULES, 6), BETA]:
        plain = AdvantageRule(rule.baseline, rule.scale, rule.order)
        each_NK = reward_advantages(rewards_NK, group_N, rule, ranges_K2, beta)
        for k, only_K in enumerate(torch.eye(len(weights))):
            alone_NK = torch.where(only_K > 0, rewards_NK, math.nan)
            expected_N = compute_advantages(alone_NK, group_N, torch.ones(len(weights)), plain, ranges_K2, beta)
            torch.testing.assert_close(each_NK[:, k], expected_N, rtol=1e-5, atol=1e-6)
        if rule.order == "normalize_then_sum":
            advantages_N = compute_advantages(rewards_NK, group_N, weights_K, plain, ranges_K2, beta)
            torch.testing.assert_close((each_NK.double() @ weights_K).float(), advantages_N, rtol=1e-5, atol=1e-6)
