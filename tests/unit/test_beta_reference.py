"""Beta advantages of random ragged batches with missing rewards, against plain loops and SciPy's Beta density."""

import math
import random
import statistics

import pytest
import torch
from scipy import stats

from rlbal.balance.advantages import AdvantageRule, compute_advantages, reward_advantages
from rlbal.balance.normalization import BetaNormalizer, to_unit_interval

RULE = AdvantageRule(scale="beta", order="normalize_then_sum")


class Reference:
    """The definitions, for one reward: lists of values per prompt, NaN left out."""

    def __init__(self, estimator, smoothing, cap):
        self.estimator, self.smoothing, self.cap = estimator, smoothing, cap
        self.means, self.variances = [], []

    def observe(self, prompts):
        prompts = [values for values in prompts if values]
        if prompts:
            self.means.append(statistics.fmean(statistics.fmean(values) for values in prompts))
        if self.estimator == "moments":
            p = [statistics.fmean(values) for values in prompts]
            if len(p) > 1:
                self.variances.append(statistics.pvariance(p))
        else:
            several = [values for values in prompts if len(values) > 1]
            if len(several) > 1:
                noise = [statistics.variance(values) / len(values) for values in several]
                spread = statistics.variance([statistics.fmean(values) for values in several])
                self.variances.append(spread - statistics.fmean(noise))

    def average(self, values):
        """Weights 1, s, s^2, ... from the newest to the oldest."""
        weights = [self.smoothing**age for age in reversed(range(len(values)))]
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    def prior(self):
        if not self.variances or self.average(self.variances) <= 1e-12:
            return 0.0, 0.0
        m, v = self.average(self.means), self.average(self.variances)
        size = max(0.0, m * (1 - m) / v - 1)
        return size * m, size * (1 - m)

    def advantage(self, value, values):
        """Of one row whose prompt has `values`."""
        p, n = statistics.fmean(values), len(values)
        if p in (0, 1) or len(set(values)) == 1:
            return 0.0
        a, b = self.prior()
        at = p if self.estimator == "moments" or a + b == 0 else (a + n * p) / (a + b + n)
        density = stats.beta.pdf(at, max(1, 1 + a / 3), max(1, 1 + b / 3))
        return max(-self.cap, min(self.cap, float((value - p) / density))) if density > 0 else math.nan


def random_batch(dice, kinds):
    """Up to 8 prompts of 1 to 9 rows in random order; rewards with a fifth missing, whole columns at times."""
    sizes = [dice.randint(1, 9) for _ in range(dice.randint(1, 8))]
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    dice.shuffle(groups)
    chances = [[dice.betavariate(2, 3) for _ in sizes] for _ in range(kinds)]
    absent = [dice.random() < 0.1 for _ in range(kinds)]

    def reward(group, k):
        if absent[k] or dice.random() < 0.2:
            return math.nan
        win = float(dice.random() < chances[k][group])
        return win if k % 2 == 0 else 0.5 * win + 0.5 * dice.random()

    rewards = torch.tensor([[4 * reward(group, k) - 1 for k in range(kinds)] for group in groups])
    return rewards, torch.tensor(groups), torch.tensor([[-1.0, 3.0]] * kinds)


def by_prompt(column, groups):
    """The values that are there, a list per prompt."""
    return [
        [value for value, its in zip(column, groups, strict=True) if its == group and not math.isnan(value)]
        for group in range(max(groups) + 1)
    ]


@pytest.mark.parametrize("smoothing", [0.0, 0.8])
@pytest.mark.parametrize("estimator", ["moments", "beta_binomial"])
@pytest.mark.parametrize("seed", range(20))
def test_batches_agree_with_plain_loops(seed, estimator, smoothing):
    dice = random.Random(seed)
    kinds, cap = dice.randint(1, 3), dice.choice([1.0, 10.0])
    weights = [dice.uniform(-1, 2) for _ in range(kinds)]
    beta = BetaNormalizer([f"reward{k}" for k in range(kinds)], estimator, smoothing, cap)
    references = [Reference(estimator, smoothing, cap) for _ in range(kinds)]
    for _ in range(4):
        rewards_NK, group_N, ranges_K2 = random_batch(dice, kinds)
        unit_NK, groups = to_unit_interval(rewards_NK, ranges_K2), group_N.tolist()
        beta.observe(unit_NK, group_N)
        expected: list[list[float]] = []
        for k, reference in enumerate(references):
            column = unit_NK[:, k].tolist()
            prompts = by_prompt(column, groups)
            reference.observe(prompts)
            expected.append(
                [
                    0.0 if math.isnan(value) else reference.advantage(value, prompts[group])
                    for value, group in zip(column, groups, strict=True)
                ]
            )
            a, b = reference.prior()
            metrics = beta.metrics()
            assert metrics[f"beta/alpha/reward{k}"] == pytest.approx(1 + a / 3, rel=1e-9)
            assert metrics[f"beta/beta/reward{k}"] == pytest.approx(1 + b / 3, rel=1e-9)
        each_NK = reward_advantages(rewards_NK, group_N, RULE, ranges_K2, beta)
        assert each_NK.T.tolist() == [pytest.approx(column, rel=1e-5, abs=1e-6) for column in expected]
        summed = [sum(w * one for w, one in zip(weights, row, strict=True)) for row in zip(*expected, strict=True)]
        advantages_N = compute_advantages(
            rewards_NK, group_N, torch.tensor(weights, dtype=torch.float64), RULE, ranges_K2, beta
        )
        assert advantages_N.tolist() == pytest.approx(summed, rel=1e-5, abs=1e-6)


def test_the_random_batches_reach_the_edges():
    """What the test above is for would be missed if its batches never had it."""
    seen = set()
    for seed in range(20):
        dice = random.Random(seed)
        for _ in range(4):
            rewards_NK, group_N, _ = random_batch(dice, 2)
            prompts = by_prompt(rewards_NK[:, 0].tolist(), group_N.tolist())
            sizes = [len(values) for values in prompts]
            seen |= {"absent"} if not any(sizes) else set()
            seen |= {"one prompt"} if len(prompts) == 1 else set()
            seen |= {"one row"} if 1 in sizes else set()
            seen |= (
                {"always or never"} if any(len(values) > 1 and len(set(values)) == 1 for values in prompts) else set()
            )
    assert seen == {"absent", "one prompt", "one row", "always or never"}
