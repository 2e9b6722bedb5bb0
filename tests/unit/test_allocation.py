"""Counts of rollouts: as good as a dynamic program finds, within bounds, met exactly, and without a bias in ties."""

import numpy as np
import pytest
from scipy.stats import beta

from rlbal.errors import RecipeError
from rlbal.prompts.allocation import mean_counts, posterior_counts, posterior_gains, uniform_counts

VALUES = ["knapsack", "variance", "nonzero"]


def rng(seed=0):
    return np.random.default_rng(seed)


def gain_at(value, n, p):
    """The gain at known p of rollout n + 1, as the difference of two values, straight from the definitions."""
    q = 1 - p
    if value == "knapsack":
        return ((1 - p ** (n + 1) - q ** (n + 1)) - (1 - p**n - q**n)) * p * q**2
    if value == "variance":
        return p * q * (1 / n - 1 / (n + 1))
    return (1 - p ** (n + 1) - q ** (n + 1)) - (1 - p**n - q**n)


def expected_gain(value, n, a, b):
    """Its mean over a fine grid of quantiles of Beta(a, b), for the comparison with the dynamic program."""
    return gain_at(value, n, beta.ppf((np.arange(2000) + 0.5) / 2000, a, b)).mean()


def best_by_dynamic_program(gain_PG, low, total):
    """The largest sum of gains: gain_PG[p, g] is what the (g+1)-th rollout above `low` gives prompt p."""
    wanted = total - low * len(gain_PG)
    best = np.full(wanted + 1, -np.inf)
    best[0] = 0.0
    for gains in gain_PG:
        value = np.concatenate([[0.0], np.cumsum(gains)])
        best = np.array([max(best[j - g] + value[g] for g in range(min(j, len(gains)) + 1)) for j in range(wanted + 1)])
    return best[wanted]


def random_bounds(generator, prompts):
    low = int(generator.integers(1, 4))
    high = low + int(generator.integers(1, 9))
    return low, high, int(generator.integers(low * prompts, high * prompts + 1))


def sum_of_gains(gain_PG, counts_P, low):
    return sum(gains[: count - low].sum() for gains, count in zip(gain_PG, counts_P, strict=True))


@pytest.mark.parametrize("value", VALUES)
def test_known_rates_are_worth_as_much_as_by_a_dynamic_program(value):
    generator = rng(1)
    for _ in range(150):
        prompts = int(generator.integers(1, 7))
        low, high, total = random_bounds(generator, prompts)
        rate_P = generator.integers(0, 9, prompts) / 8  # 0 and 1 among them, and equal ones
        counts_P = mean_counts(value, rate_P, total, low, high, generator)
        assert counts_P.sum() == total and counts_P.min() >= low and counts_P.max() <= high
        gain_PG = np.array([[gain_at(value, n, p) for n in range(low, high)] for p in rate_P])
        best = best_by_dynamic_program(gain_PG, low, total)
        assert sum_of_gains(gain_PG, counts_P, low) == pytest.approx(best, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("value", VALUES)
def test_beliefs_are_worth_as_much_as_by_a_dynamic_program(value):
    generator = rng(2)
    for _ in range(70):
        prompts = int(generator.integers(1, 5))
        low, high, total = random_bounds(generator, prompts)
        a_P, b_P = generator.choice([0.5, 1.0, 2.5, 8.5], prompts), generator.choice([0.5, 1.5, 4.5], prompts)
        counts_P = posterior_counts(value, a_P, b_P, total, low, high, generator)
        assert counts_P.sum() == total and counts_P.min() >= low and counts_P.max() <= high
        gain_PG = np.array(
            [[expected_gain(value, n, a, b) for n in range(low, high)] for a, b in zip(a_P, b_P, strict=True)]
        )
        best = best_by_dynamic_program(gain_PG, low, total)
        # The grid's gains are inexact, so that a near tie may be decided otherwise.
        assert sum_of_gains(gain_PG, counts_P, low) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("value", VALUES)
def test_many_prompts_are_served_as_one_at_a_time(value):
    """The same as handing out single rollouts; large enough for candidates to be dropped on the way."""
    generator = rng(3)
    a_P, b_P = generator.uniform(0.1, 9, 300), generator.uniform(0.1, 9, 300)
    gains, at = posterior_gains(value, a_P, b_P), []
    for _ in range(100):
        at.append(gains.now())
        gains.advance()
    for low, high, total in [(1, 100, 2400), (2, 20, 2400), (5, 9, 2000), (1, 100, 300), (1, 3, 900)]:
        expected_P = np.full(300, low)
        for _ in range(total - 300 * low):
            gain_P = [at[n - 1][p] if n < high else -1.0 for p, n in enumerate(expected_P)]
            expected_P[np.argmax(gain_P)] += 1
        np.testing.assert_array_equal(posterior_counts(value, a_P, b_P, total, low, high, rng()), expected_P)


def test_eight_rollouts_seen_of_never_half_and_always_solved_prompts():
    successes_P = np.repeat([0.0, 4.0, 8.0], 32)
    counts_P = posterior_counts("knapsack", 0.5 + successes_P, 8.5 - successes_P, 8 * 96, 2, 128, rng())
    np.testing.assert_array_equal(counts_P, np.repeat([12, 9, 3], 32))


def test_by_the_mean_two_prompts_by_hand():
    # p = 1/2: gain at n is 2 (1/2)^(n+4): 1/16, 1/32, 1/64 at n = 1, 2, 3.
    # p = 1/4: (1/4)^(n+1) (27/64) + (1/16) (3/4)^(n+2): .0264 + .0264, .0066 + .0198, .0016 + .0148 at n = 1, 2, 3.
    # From 1 each, largest first: .0625 (half), .0527 (quarter), .0313 (half), .0264 (quarter), .0165 (quarter).
    rate_P = np.array([0.5, 0.25])
    expected = {2: [1, 1], 3: [2, 1], 4: [2, 2], 5: [3, 2], 6: [3, 3], 7: [3, 4]}
    assert {n: mean_counts("knapsack", rate_P, n, 1, 9, rng()).tolist() for n in expected} == expected


# The paper's rules for rates of 0 and 1, and for none


@pytest.mark.parametrize("value", VALUES)
def test_by_the_mean_hopeless_and_solved_prompts_get_the_least_while_others_can_use_it(value):
    counts_P = mean_counts(value, np.array([0.0, 0.5, 1.0, 0.5]), 32, 2, 16, rng())
    assert counts_P.tolist() == [2, 14, 2, 14]


def test_by_the_mean_what_is_left_goes_to_the_hopeless_and_then_to_the_solved():
    rate_P = np.array([0.0, 0.5, 1.0, 0.0])
    assert mean_counts("knapsack", rate_P, 24, 2, 8, rng()).tolist() == [7, 8, 2, 7]
    assert mean_counts("knapsack", rate_P, 30, 2, 8, rng()).tolist() == [8, 8, 6, 8]


def test_by_the_mean_a_first_epoch_is_uniform():
    np.testing.assert_array_equal(mean_counts("knapsack", np.full(6, np.nan), 48, 2, 128, rng()), 8)
    assert sorted(mean_counts("knapsack", np.full(4, np.nan), 34, 2, 128, rng())) == [8, 8, 9, 9]


def test_by_the_mean_a_prompt_without_a_rate_gets_its_even_share():
    counts_P = mean_counts("knapsack", np.array([np.nan, 0.5, 1.0, np.nan]), 32, 2, 128, rng())
    assert counts_P.tolist() == [8, 14, 2, 8]


# Bounds, ties, determinism


@pytest.mark.parametrize("value", VALUES)
def test_a_tight_total_leaves_no_choice(value):
    a_P, b_P = np.array([0.5, 3.0, 9.0]), np.array([4.0, 0.5, 9.0])
    assert posterior_counts(value, a_P, b_P, 6, 2, 5, rng()).tolist() == [2, 2, 2]
    assert posterior_counts(value, a_P, b_P, 15, 2, 5, rng()).tolist() == [5, 5, 5]
    assert posterior_counts(value, a_P, b_P, 9, 3, 3, rng()).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("total", "low", "high", "message"),
    [
        (8, 0, 4, r"`allocation.low` is 0.*\n.*\nFix: make it 1 at least"),
        (8, 4, 2, r"`allocation.low` \(4\) is above `allocation.high` \(2\)"),
        (
            11,
            3,
            8,
            r"4 prompts with at least 3 rollouts.*`allocation.low`.*11(.|\n)*Fix: lower `allocation.low`, best below 2",
        ),
        (3, 1, 8, r"`allocation.low`(.|\n)*Fix: raise `algorithm.rollouts_per_prompt`"),
        (33, 2, 8, r"`allocation.high`.*33(.|\n)*Fix: raise `allocation.high`, best above 9"),
    ],
)
def test_an_impossible_total_names_the_key(total, low, high, message):
    with pytest.raises(RecipeError, match=message):
        posterior_counts("knapsack", np.ones(4), np.ones(4), total, low, high, rng())
    with pytest.raises(RecipeError, match=message):
        mean_counts("knapsack", np.full(4, 0.5), total, low, high, rng())


@pytest.mark.parametrize("a", [0.0, -1.0, np.nan, np.inf])
def test_what_is_no_belief_is_refused(a):
    with pytest.raises(ValueError, match="above 0"):
        posterior_counts("knapsack", np.array([1.0, a]), np.ones(2), 8, 2, 8, rng())


def test_what_is_no_rate_is_refused():
    with pytest.raises(ValueError, match="success rate"):
        mean_counts("knapsack", np.array([0.5, 1.01]), 8, 2, 8, rng())


@pytest.mark.parametrize("value", VALUES)
def test_equal_beliefs_differ_by_one_and_every_prompt_can_win(value):
    extra_P = np.zeros(10)
    for seed in range(300):
        counts_P = posterior_counts(value, np.full(10, 0.5), np.full(10, 0.5), 83, 2, 128, rng(seed))
        assert sorted(counts_P) == [8] * 7 + [9] * 3
        extra_P += counts_P - 8
    # 300 draws of probability 0.3 have a mean of 90 and a deviation of 7.9.
    assert abs(extra_P - 90).max() < 4.5 * 7.9


def test_ties_between_numbers_of_rollouts_are_decided_by_lot_too():
    """E[p(1-p)] is 1/6 for Beta(1, 1) and 1/12 for Beta(1/4, 1/4); the gain at n is that over n (n+1).

    So a fourth rollout of the first kind is worth 1/72, and so is a third one of the second.
    """
    kind_P = np.repeat([1.0, 0.25], 20)
    given = []
    for seed in range(100):
        counts_P = posterior_counts("variance", kind_P, kind_P, 2 * 40 + 20 + 10, 2, 128, rng(seed))
        assert counts_P[:20].min() == 3 and counts_P[:20].max() <= 4 and counts_P[20:].max() <= 3
        given.append((counts_P[:20] - 3).sum())
    # 10 of 40 ties are drawn, 20 of them of the first kind: mean 5, deviation 1.39, of the mean of 100 draws 0.139.
    assert abs(np.mean(given) - 5) < 4.5 * 0.139


def test_the_same_seed_gives_the_same_counts_and_another_seed_others():
    belief = np.full(50, 0.5), np.full(50, 0.5)
    first, again, other = (posterior_counts("knapsack", *belief, 425, 2, 128, rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("value", VALUES)
def test_without_ties_the_order_of_the_prompts_does_not_matter(value):
    generator = rng(4)
    a_P, b_P, order = generator.uniform(0.1, 9, 64), generator.uniform(0.1, 9, 64), generator.permutation(64)
    counts_P = posterior_counts(value, a_P, b_P, 512, 2, 128, rng(0))
    np.testing.assert_array_equal(posterior_counts(value, a_P[order], b_P[order], 512, 2, 128, rng(1)), counts_P[order])


def test_gains_too_small_to_be_told_from_nothing_still_meet_the_total():
    # (1/2)^n is 0 in floating point from n = 1075 on.
    counts_P = mean_counts("nonzero", np.array([0.5, 0.5]), 6001, 1, 5000, rng())
    assert sorted(counts_P) == [3000, 3001]


def test_uniform_counts():
    assert uniform_counts(3, 12).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="13 rollouts do not divide over 3 prompts"):
        uniform_counts(3, 13)
