"""Advantages: worked out by hand, and against what the papers say of the limits."""

import math

import pytest
import torch

from rlbal.balance.advantages import AdvantageRule, compute_advantages, reward_advantages
from rlbal.balance.normalization import BetaNormalizer, to_unit_interval

NAN = math.nan
EPS = 1e-4
BASELINES = ["group", "leave_one_out", "batch", "none"]
ORDERS = ["sum_then_normalize", "normalize_then_sum"]
BETA = AdvantageRule(scale="beta", order="normalize_then_sum")


def compute(rewards, groups, weights, rule, ranges=None, beta=None):
    """Advantages as a list; a Beta normalizer that is not given observes the batch (moments, cap 10)."""
    rewards_NK, group_N = torch.tensor(rewards), torch.tensor(groups)
    ranges_K2 = None if ranges is None else torch.tensor(ranges, dtype=torch.float64)
    if rule.scale == "beta" and beta is None:
        beta = normalizer(rewards_NK.shape[1])
        beta.observe(rewards_NK if ranges is None else to_unit_interval(rewards_NK, ranges_K2), group_N)
    advantages_N = compute_advantages(rewards_NK, group_N, torch.tensor(weights), rule, ranges_K2, beta)
    assert advantages_N.dtype == torch.float32 and advantages_N.shape == group_N.shape
    return advantages_N.tolist()


def normalizer(num_rewards):
    return BetaNormalizer([f"reward{k}" for k in range(num_rewards)], "moments", smoothing=0.0, cap=10.0)


def with_variance(variance):
    """A normalizer of one reward with m = 1/2 and this v."""
    beta = normalizer(1)
    seen = {"mean": 0.5, "variance": variance}
    beta.load_state_dict(
        {"rewards": ["reward0"], "capped": [0.0]}
        | {name: {"total": [value], "weight": [1.0]} for name, value in seen.items()}
    )
    return beta


# By hand: two ragged groups, mixed; three rewards missing in part, and row 5 without any.

GROUPS = [0, 1, 0, 0, 1, 1]
REWARDS = [[1.0, NAN], [4.0, 1.0], [0.0, 1.0], [NAN, 0.0], [2.0, 0.0], [NAN, NAN]]
WEIGHTS = [1.0, 2.0]
CENTRED = {
    # Means of group 0: (1 + 0) / 2 = 0.5 and (1 + 0) / 2 = 0.5; of group 1: (4 + 2) / 2 = 3 and (1 + 0) / 2 = 0.5.
    "group": [(0.5, 0), (1, 0.5), (-0.5, 0.5), (0, -0.5), (-1, -0.5), (0, 0)],
    # Every reward is there twice in either group: the other one is the baseline.
    "leave_one_out": [(1, 0), (2, 1), (-1, 1), (0, -1), (-2, -1), (0, 0)],
    # Means of the batch: (1 + 4 + 0 + 2) / 4 = 1.75 and (1 + 1 + 0 + 0) / 4 = 0.5.
    "batch": [(-0.75, 0), (2.25, 0.5), (-1.75, 0.5), (0, -0.5), (0.25, -0.5), (0, 0)],
    "none": [(1, 0), (4, 1), (0, 1), (0, 0), (2, 0), (0, 0)],
}
# Sums r1 + 2 r2 less the group's means: 0.5, 0.5, -1 in group 0 (squares 1.5, over 2) and 2, -2 in group 1 (8, over 1).
# Less the batch's means: -0.75, 3.25, -0.75, -1, -0.75, mean 0, squares 3 * 0.5625 + 10.5625 + 1 = 13.25, over 4.
SUM_STD = {
    "none": None,
    "group_std": {0: math.sqrt(0.75), 1: math.sqrt(8)},
    "batch_std": {0: math.sqrt(3.3125), 1: math.sqrt(3.3125)},
}
# Each reward alone. Group 0: 1, 0 and 1, 0 (0.5 over 1). Group 1: 4, 2 (2 over 1) and 1, 0. Batch: 1, 4, 0, 2 (squares
# 0.5625 + 5.0625 + 3.0625 + 0.0625 = 8.75, over 3) and 1, 1, 0, 0 (1 over 3).
OWN_STD = {
    "none": None,
    "group_std": {0: (math.sqrt(0.5), math.sqrt(0.5)), 1: (math.sqrt(2), math.sqrt(0.5))},
    "batch_std": {0: (math.sqrt(8.75 / 3), math.sqrt(1 / 3)), 1: (math.sqrt(8.75 / 3), math.sqrt(1 / 3))},
}


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SUM_STD)
def test_sum_then_normalize_by_hand(baseline, scale):
    rule = AdvantageRule(baseline, scale, "sum_then_normalize")
    std = SUM_STD[scale]
    expected = [
        (first + 2 * second) / (1 if std is None else std[group] + EPS)
        for (first, second), group in zip(CENTRED[baseline], GROUPS, strict=True)
    ]
    assert compute(REWARDS, GROUPS, WEIGHTS, rule) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", OWN_STD)
def test_normalize_then_sum_by_hand(baseline, scale):
    rule = AdvantageRule(baseline, scale, "normalize_then_sum")
    std = OWN_STD[scale]
    expected = [
        first / (1 if std is None else std[group][0] + EPS) + 2 * second / (1 if std is None else std[group][1] + EPS)
        for (first, second), group in zip(CENTRED[baseline], GROUPS, strict=True)
    ]
    assert compute(REWARDS, GROUPS, WEIGHTS, rule) == pytest.approx(expected, rel=1e-6)


def test_whitening_by_hand():
    # Group baseline, no scale: 0.5, 2, 0.5, -1, -2 have mean 0 and squares 9.5, over 4; row 5 stays out and stays 0.
    expected = [value / (math.sqrt(2.375) + EPS) for value in (0.5, 2, 0.5, -1, -2, 0)]
    rule = AdvantageRule("group", "none", whiten=True)
    assert compute(REWARDS, GROUPS, WEIGHTS, rule) == pytest.approx(expected, rel=1e-6)


def test_beta_by_hand():
    # Rewards in [-1, 1]. Group 0: p = (1 + 0) / 2 = 0.5; group 1: p = (1 + 0 + 0 + 0) / 4 = 0.25; group 2: p = 1.
    # Over the three prompts: m = 1.75 / 3, v = (0.25 + 0.0625 + 1) / 3 - m^2.
    mean, variance = 1.75 / 3, 1.3125 / 3 - (1.75 / 3) ** 2
    spread = mean * (1 - mean) / variance - 1
    alpha, beta = max(1, 1 + spread * mean / 3), max(1, 1 + spread * (1 - mean) / 3)
    assert alpha > 1 and beta > 1

    def density(p):
        normaliser = math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)
        return p ** (alpha - 1) * (1 - p) ** (beta - 1) / normaliser

    high, low = 0.75 / density(0.25), -0.25 / density(0.25)
    expected = [0.5 / density(0.5), high, -0.5 / density(0.5), low, low, 0, 0, low]
    rewards = [[1.0], [1.0], [-1.0], [-1.0], [-1.0], [1.0], [1.0], [-1.0]]
    values = compute(rewards, [0, 1, 0, 1, 1, 2, 2, 1], [2.0], BETA, [[-1, 1]])
    assert values == pytest.approx([2 * value for value in expected], rel=1e-6)


def test_beta_weights_rewards_after_normalizing_each():
    # Both rewards in [0, 1]. The first has p = 1/2 and 1/4, so alpha = 2.75, beta = 1 + 8.75 / 3 (test_normalization).
    # The second, missing in one row, has p = 1/2 twice: v = 0, f = 1.
    alpha, beta = 2.75, 1 + 8.75 / 3

    def density(p):
        normaliser = math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)
        return p ** (alpha - 1) * (1 - p) ** (beta - 1) / normaliser

    rewards = [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, NAN], [0.0, 0.5]]
    first = [0.5 / density(0.5), -0.5 / density(0.5), 0.75 / density(0.25), *[-0.25 / density(0.25)] * 3]
    second = [0.5, -0.5, 0.5, -0.5, 0, 0]
    values = compute(rewards, [0, 0, 1, 1, 1, 1], [2.0, -3.0], BETA, [[0, 1], [0, 1]])
    expected = [2 * own - 3 * other for own, other in zip(first, second, strict=True)]
    assert values == pytest.approx(expected, rel=1e-6)


# Where we differ from TRL on purpose


def test_a_partly_missing_reward_counts_in_none_of_its_statistics():
    """Row 0 lacks the second reward; in TRL its sum is held against a mean that includes the others' second reward."""
    rewards = [[0.4, NAN], [0.3, 0.4], [0.3, 0.4], [0.2, 0.4]]
    # TRL: a missing reward is 0, so the sums are 0.4, 0.7, 0.7, 0.6 with mean 0.6: row 0 gets 0.4 - 0.6 = -0.2.
    sums = [sum(value for value in row if not math.isnan(value)) for row in rewards]
    assert sums[0] - sum(sums) / 4 == pytest.approx(-0.2)
    # Ours: the first reward has mean 0.3 and the second does not speak about row 0: 0.4 - 0.3 = +0.1.
    # The others: 0 + 0, 0 + 0 and -0.1 + 0, since each of them has the mean 0.4 of the second reward.
    values = compute(rewards, [0] * 4, [1.0, 1.0], AdvantageRule(scale="none"))
    assert values == pytest.approx([0.1, 0.0, 0.0, -0.1], abs=1e-7)


# Limits


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_a_group_of_equal_rewards_teaches_nothing(baseline, scale, order):
    rewards = [[0.1], [0.1], [0.1], [0.7], [0.2], [0.4]]
    values = compute(rewards, [0, 0, 0, 1, 1, 2], [0.3], AdvantageRule(baseline, scale, order))
    assert values[:3] == [0, 0, 0] and values[5] == 0
    assert values[3] > 0 > values[4]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("baseline", "scale"), [("none", "group_std"), ("none", "batch_std"), ("batch", "group_std")])
def test_a_std_of_0_gives_0_also_where_the_mean_is_not_subtracted(baseline, scale, order):
    rewards, groups = [[0.1], [0.1], [0.1], [0.1]], [0, 0, 1, 1]
    assert compute(rewards, groups, [0.3], AdvantageRule(baseline, scale, order)) == [0, 0, 0, 0]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("scale", "order"), [("group_std", ORDERS[0]), ("batch_std", ORDERS[1]), ("beta", ORDERS[1])])
def test_a_batch_without_any_reward_is_all_zero(scale, order, whiten):
    rule = AdvantageRule("group", scale, order, whiten)
    assert compute([[NAN, NAN]] * 3, [0, 0, 1], [1.0, 1.0], rule, [[0, 1], [0, 1]]) == [0, 0, 0]


def binary_batch():
    """One group for every size from 2 to 9 and every number of successes."""
    outcomes = [[float(row < wins) for row in range(size)] for size in range(2, 10) for wins in range(size + 1)]
    rewards = [[value] for group in outcomes for value in group]
    return rewards, [number for number, group in enumerate(outcomes) for _ in group]


def test_beta_one_one_is_reinforce_with_the_group_baseline():
    rewards, groups = binary_batch()
    values = compute(rewards, groups, [2.0], BETA, [[0, 1]], with_variance(1 / 4))  # v = m (1 - m): a = b = 0
    plain = compute(rewards, groups, [2.0], AdvantageRule("group", "none"))
    assert values == pytest.approx(plain, abs=1e-6)
    assert any(value != 0 for value in plain)


def test_beta_without_variance_over_prompts_is_reinforce_with_the_group_baseline():
    # Both prompts have p = 1/3, from 3 and from 6 rows.
    rewards, groups = [[1.0], [0.0], [0.0]] * 3, [0, 0, 0, 1, 1, 1, 1, 1, 1]
    values = compute(rewards, groups, [1.0], BETA, [[0, 1]])
    assert values == pytest.approx([2 / 3, -1 / 3, -1 / 3] * 3)


def test_beta_three_halves_is_grpo_up_to_a_constant():
    """Beta(3/2, 3/2) has the density sqrt(p (1 - p)) / (pi / 8), and sqrt(p (1 - p)) is the group's std (ddof 0)."""
    rewards, groups = binary_batch()
    # m (1 - m) / v - 1 = 3: a = b = 3/2, alpha = beta = 3/2.
    values = compute(rewards, groups, [1.0], BETA, [[0, 1]], with_variance(1 / 16))
    checked = 0
    for value, (reward,), group in zip(values, rewards, groups, strict=True):
        mates = [other for (other,), its in zip(rewards, groups, strict=True) if its == group]
        p = sum(mates) / len(mates)
        if p in (0, 1):
            assert value == 0
        else:
            assert value == pytest.approx(math.pi / 8 * (reward - p) / math.sqrt(p * (1 - p)), rel=1e-5)
            checked += 1
    assert checked > 100


def test_beta_gives_nothing_where_a_prompt_always_or_never_succeeds():
    rewards, groups = [[1.0], [1.0], [0.0], [0.0], [1.0], [0.0], [0.0]], [0, 0, 1, 1, 2, 2, 2]
    values = compute(rewards, groups, [1.0], BETA, [[0, 1]])
    assert values[:4] == [0, 0, 0, 0]
    assert all(math.isfinite(value) and value != 0 for value in values[4:])


@pytest.mark.parametrize(("rule", "ranges"), [(BETA, None), (AdvantageRule(scale="beta"), [[0, 1]])])
def test_beta_without_ranges_or_in_the_other_order_is_refused(rule, ranges):
    with pytest.raises(ValueError, match="scale `beta` needs the range of every reward and the order"):
        compute([[1.0], [0.0]], [0, 0], [1.0], rule, ranges)


def test_beta_without_a_normalizer_that_has_seen_a_batch_is_refused():
    for beta in (None, normalizer(1)):
        with pytest.raises(ValueError, match="scale `beta` needs a normalizer that has observed a batch"):
            reward_advantages(torch.tensor([[1.0]]), torch.tensor([0]), BETA, torch.tensor([[0.0, 1.0]]), beta)


def test_beta_is_cut_off_where_the_density_vanishes():
    """40 prompts at one half and one near 0, where the density is below 1e-12: the cap of 10, times the weight."""
    rewards, groups = [[0.49], [0.51]] * 40 + [[0.0], [0.0002]], [row // 2 for row in range(82)]
    values = compute(rewards, groups, [0.5], BETA, [[0, 1]])
    assert values[-2:] == [-5.0, 5.0]
    assert all(0 < abs(value) < 0.05 for value in values[:-2])


def test_beta_gives_a_prompt_of_equal_rewards_nothing_however_its_mean_is_rounded():
    """The mean of three 0.1 is 0.10000000000000002: over a density of 1e-30 the difference would reach the cap."""
    rewards, groups = [[0.49], [0.51]] * 100 + [[0.1]] * 3, [*[row // 2 for row in range(200)], 100, 100, 100]
    assert sum([0.1] * 3) / 3 != 0.1
    rewards_N1, group_N = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)
    beta = with_variance(1e-5)
    values_N = compute_advantages(rewards_N1, group_N, torch.ones(1), BETA, torch.tensor([[0.0, 1.0]]), beta)
    assert values_N[-3:].tolist() == [0, 0, 0]


# Each reward's own advantages


@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std", "beta"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_reward_that_never_varies_has_no_advantages_of_its_own(baseline, scale):
    rewards_NK = torch.tensor([[1.0, 0.7], [0.0, 0.7], [0.0, NAN], [1.0, 0.7], [0.0, 0.7]])
    group_N, ranges_K2 = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    beta = normalizer(2)
    beta.observe(to_unit_interval(rewards_NK, ranges_K2), group_N)
    rule = AdvantageRule(baseline, scale, "normalize_then_sum")
    values_NK = reward_advantages(rewards_NK, group_N, rule, ranges_K2, beta)
    assert values_NK.dtype == torch.float32
    assert values_NK[:, 1].tolist() == [0, 0, 0, 0, 0]
    assert values_NK[0, 0] > values_NK[1, 0]


@pytest.mark.parametrize("order", ORDERS)
def test_a_reward_that_never_varies_moves_no_advantage(order):
    varying, groups = [1.0, 0.0, 0.5, 1.0, 0.0], [0, 0, 0, 1, 1]
    for baseline, scale in [("group", "group_std"), ("leave_one_out", "none"), ("batch", "batch_std")]:
        rule = AdvantageRule(baseline, scale, order)
        alone = compute([[value] for value in varying], groups, [0.5], rule)
        assert compute([[value, 0.1] for value in varying], groups, [0.5, 0.3], rule) == alone


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch", "none"])
@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("order", ["sum_then_normalize", "normalize_then_sum"])
def test_a_constant_reward_moves_no_advantage(baseline, scale, order):
    rule, group = AdvantageRule(baseline, scale, order), torch.tensor([0, 0, 1, 1])
    alone = torch.tensor([[1.0], [0.0], [0.5], [0.25]])
    beside = torch.cat([alone, torch.full((4, 1), 0.7)], dim=1)
    expected = compute_advantages(alone, group, torch.tensor([0.6]), rule)
    found = compute_advantages(beside, group, torch.tensor([0.6, 0.4]), rule)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
