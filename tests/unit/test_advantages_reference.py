"""Advantages of random ragged batches, against the definitions written as plain loops."""

import itertools
import math
import random

import pytest
import torch

from rlbal.balance.advantages import AdvantageRule, compute_advantages

EPS = 1e-4


def reference(rewards, groups, weights, rule, ranges):
    """The definitions, one row and one reward at a time."""
    rows, kinds = range(len(rewards)), range(len(weights))

    def unit(k, value):
        return (value - ranges[k][0]) / (ranges[k][1] - ranges[k][0]) if rule.scale == "beta" else value

    def values(k, members):
        return [unit(k, rewards[i][k]) for i in members if not math.isnan(rewards[i][k])]

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
        value = unit(k, rewards[i][k])
        if baseline == "group":
            return value - mean(values(k, mates(i)))
        if baseline == "leave_one_out":
            others = values(k, [j for j in mates(i) if j != i])
            return value - mean(others) if others else 0.0
        if baseline == "batch":
            return value - mean(values(k, rows))
        return value

    def total(i, baseline):
        return sum(weights[k] * centred(i, k, baseline) for k in kinds)

    def density(i, k):
        p_P = [
            mean(present)
            for group in sorted(set(groups))
            if (present := values(k, [j for j in rows if groups[j] == group]))
        ]
        m = mean(p_P)
        v = sum((p - m) ** 2 for p in p_P) / len(p_P)
        size = m * (1 - m) / v - 1 if v > 1e-12 else 0.0
        a, b = max(1, 1 + size * m / 3), max(1, 1 + size * (1 - m) / 3)
        p = mean(values(k, mates(i)))
        log_normaliser = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return math.exp((a - 1) * math.log(p) + (b - 1) * math.log(1 - p) - log_normaliser) if 0 < p < 1 else 1.0

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
                    "beta": lambda i=i, k=k: density(i, k),
                }[rule.scale]()
                result[i] += weights[k] * centred(i, k, rule.baseline) / divisor
    if rule.whiten and scored:
        middle, width = mean(list(result.values())), std(list(result.values())) + EPS
        result = {i: (value - middle) / width for i, value in result.items()}
    return [result.get(i, 0.0) for i in rows]


BASELINES = ["group", "leave_one_out", "batch", "none"]
SCALES = ["none", "group_std", "batch_std"]
ORDERS = ["sum_then_normalize", "normalize_then_sum"]
BETA = AdvantageRule(scale="beta", order="normalize_then_sum")
RULES = [
    *(AdvantageRule(*choice) for choice in itertools.product(BASELINES, SCALES, ORDERS, [False, True])),
    BETA,
    AdvantageRule(scale="beta", order="normalize_then_sum", whiten=True),
]


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
    ranges = [[-0.5, 1.5]] * len(weights)
    for rule in [*dice.sample(RULES, 5), BETA]:
        advantages_N, _ = compute_advantages(
            torch.tensor(rewards),
            torch.tensor(groups),
            torch.tensor(weights, dtype=torch.float64),
            rule,
            torch.tensor(ranges),
        )
        expected = reference(rewards, groups, weights, rule, ranges)
        assert advantages_N.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6), rule
