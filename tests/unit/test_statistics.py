"""The judge's arithmetic against numbers worked out by hand, and its promises under simulation."""

import math

import numpy as np
import pytest

from rlbal.experiments.statistics import Difference, holm, mean_and_std, paired_difference, verdict

pytestmark = pytest.mark.filterwarnings("error")


def test_mean_and_standard_deviation():
    # Deviations from 4: -2, 0, 2; s = sqrt((4 + 0 + 4) / 2) = 2.
    assert mean_and_std([2.0, 4.0, 6.0]) == (4.0, 2.0)
    mean, std = mean_and_std([7.0])
    assert mean == 7.0 and math.isnan(std)
    assert all(map(math.isnan, mean_and_std([])))


def test_five_pairs_by_hand():
    # Differences 1, 2, 3, 4, 5: mean 3, s = sqrt(10 / 4) = 1.5811, standard error s / sqrt(5) = 0.70711.
    # t(0.975, 4) = 2.776, so the interval is 3 ± 2.776 * 0.70711 = 3 ± 1.963.
    # t = 3 / 0.70711 = 4.2426. With 4 degrees of freedom the distribution function is
    #   F(t) = 1/2 + 3/8 * t / sqrt(1 + t²/4) * (1 - t² / (12 * (1 + t²/4))),
    # and t² = 18: F = 1/2 + 3/8 * 4.2426 / 2.3452 * (1 - 18 / 66) = 0.99338, p = 2 * (1 - F) = 0.01324.
    found = paired_difference([11.0, 22.0, 33.0, 44.0, 55.0], [10.0, 20.0, 30.0, 40.0, 50.0])
    assert found.pairs == 5
    assert found.mean == 3.0
    assert found.low == pytest.approx(3 - 1.963, abs=5e-4)
    assert found.high == pytest.approx(3 + 1.963, abs=5e-4)
    assert found.p == pytest.approx(0.01324, abs=1e-5)


def test_two_pairs_by_hand():
    # With one degree of freedom (Cauchy), p = 1 - 2 atan(t) / pi. Differences 1 and 3: mean 2, s = sqrt(2), error 1,
    # t = 2, p = 1 - 2 * 1.10715 / 3.14159 = 0.29517; t(0.975, 1) = 12.706.
    found = paired_difference([1.0, 3.0], [0.0, 0.0])
    assert found.p == pytest.approx(0.29517, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=5e-4)


def test_exchanging_the_arms_changes_the_sign_alone():
    one, other = [0.3, 0.7, 0.4], [0.1, 0.2, 0.6]
    forward, backward = paired_difference(one, other), paired_difference(other, one)
    assert backward.mean == pytest.approx(-forward.mean)
    assert (backward.low, backward.high) == pytest.approx((-forward.high, -forward.low))
    assert backward.p == pytest.approx(forward.p)


def test_without_spread_the_interval_is_a_point_and_there_is_no_test():
    same = paired_difference([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.low, same.high) == (2.0, 2.0, 2.0) and math.isnan(same.p)


def test_differences_by_rounding_alone_are_no_spread():
    # 0.3 - 0.2 and 0.4 - 0.3 are 0.1 but for the last bit, which would give p = 1e-15.
    assert 0.3 - 0.2 != 0.4 - 0.3
    found = paired_difference([0.3, 0.4, 0.2], [0.2, 0.3, 0.1])
    assert found.low == found.high == pytest.approx(0.1) and math.isnan(found.p)


def test_one_pair_and_none():
    one, none = paired_difference([2.0], [1.5]), paired_difference([], [])
    assert (one.pairs, one.mean) == (1, 0.5) and all(map(math.isnan, (one.low, one.high, one.p)))
    assert none.pairs == 0 and math.isnan(none.mean)


def test_holm_by_hand():
    # Sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, 0.04; never falling: 0.03, 0.06, 0.06.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    # 0.5 * 2 = 1, then 0.9 raised to it.
    assert holm([0.9, 0.5]) == [1.0, 1.0]


def test_holm_does_not_count_what_was_not_tested():
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[0] == pytest.approx(0.04) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.04)
    assert holm([]) == []


@pytest.mark.parametrize(
    ("mean", "p", "pairs", "direction", "said"),
    [
        (0.1, 0.04, 5, "up", "better"),
        (-0.1, 0.04, 5, "up", "worse"),
        (0.1, 0.04, 5, "down", "worse"),
        (-0.1, 0.04, 5, "down", "better"),
        (0.1, 0.04, 5, None, "higher"),
        (-0.1, 0.04, 5, None, "lower"),
        (0.1, 0.06, 5, "up", "no difference shown"),
        (0.1, math.nan, 1, "up", "one seed: no verdict"),
        (0.1, math.nan, 5, "up", "no spread: no verdict"),
        (0.0, math.nan, 5, "up", "no difference shown"),
        (math.nan, math.nan, 0, "up", "no pairs"),
    ],
)
def test_verdicts(mean, p, pairs, direction, said):
    assert verdict(Difference(pairs, mean, math.nan, math.nan, p), p, direction) == said


def test_the_interval_covers_the_truth_in_95_of_100():
    # 4000 sweeps of 5 seeds, true difference 0.3, seeds that differ by 10 times as much. The share that covers has a
    # standard error of sqrt(0.95 * 0.05 / 4000) = 0.0034; the generator is fixed, so this is one number for good.
    dice = np.random.default_rng(0)
    shared = 10 * dice.normal(size=(4000, 5))
    arm, baseline = shared + 0.3 + dice.normal(size=(4000, 5)), shared + dice.normal(size=(4000, 5))
    found = [paired_difference(one, other) for one, other in zip(arm, baseline, strict=True)]
    covered = np.mean([difference.low <= 0.3 <= difference.high for difference in found])
    assert covered == pytest.approx(0.95, abs=0.01)
    # The p value and the interval say the same.
    assert all((difference.p < 0.05) == (difference.low * difference.high > 0) for difference in found)


def test_holm_keeps_false_verdicts_over_a_whole_table_below_5_in_100():
    # 700 tables of 6 arms that equal their common baseline: without Holm far more than 5 % of tables hold a verdict.
    dice = np.random.default_rng(1)
    tables = dice.normal(size=(700, 7, 5))
    p_values = [[paired_difference(arm, table[0]).p for arm in table[1:]] for table in tables]
    assert np.mean([min(row) < 0.05 for row in p_values]) > 0.15
    assert np.mean([min(holm(row)) < 0.05 for row in p_values]) < 0.05
