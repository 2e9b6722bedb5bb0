"""The Beta density of BNPO and its parameters: worked out by hand, and by going through every outcome."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from rlbal.balance.normalization import (
    MovingAverage,
    beta_density,
    density_parameters,
    population_prior,
    prompt_moments,
    to_unit_interval,
)

NAN = math.nan
ESTIMATORS = ["moments", "beta_binomial"]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def moments(groups, estimator):
    """m and v of one reward, given as a list of rewards per prompt."""
    unit_N1 = tensor(*itertools.chain(*groups)).unsqueeze(1)
    group_N = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    mean_K, variance_K = prompt_moments(unit_N1, group_N, estimator)
    return mean_K.item(), variance_K.item()


def parameters(mean, variance):
    alpha_K, beta_K = density_parameters(*population_prior(tensor(mean), tensor(variance)))
    return alpha_K.item(), beta_K.item()


# m and v

GROUPS = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1], [0]]


def test_moments_by_hand():
    # p = 3/4, 1/4, 1, 0: m = 1/2, deviations 1/4, -1/4, 1/2, -1/2, their squares 10/16, over 4.
    assert moments(GROUPS, "moments") == pytest.approx((0.5, 10 / 64))


def test_beta_binomial_moments_by_hand():
    # m = 1/2 as before. The single row of the last prompt has no variance, so v is of 3/4, 1/4 and 1: mean 2/3,
    # deviations 1/12, -5/12, 4/12, their squares 42/144, over 2: 7/48. Noise: 1, 1, 1, 0 has the squares
    # 3 (1/4)^2 + (3/4)^2 = 3/4, over 3, over 4 rows: 1/16; so has 1, 0, 0, 0; and 1, 1 has none: (2/16) / 3 = 2/48.
    assert moments(GROUPS, "beta_binomial") == pytest.approx((0.5, 5 / 48))


def test_graded_rewards_have_the_noise_that_they_show():
    # 0.4, 0.6 varies by 0.02, over 2 rows 0.01, where a coin of p = 1/2 would have 0.125; 0.7, 0.9 likewise.
    # p = 0.5 and 0.8: squares 2 (0.15)^2, over 1: 0.045.
    assert moments([[0.4, 0.6], [0.7, 0.9]], "beta_binomial")[1] == pytest.approx(0.045 - 0.01)


def expected_variance(chances, sizes, estimator):
    """Mean of v over every outcome of independent coins, each with its probability."""
    coins = [chance for chance, size in zip(chances, sizes, strict=True) for _ in range(size)]
    cuts = list(itertools.accumulate(sizes, initial=0))
    total = 0.0
    for outcome in itertools.product([0, 1], repeat=len(coins)):
        probability = math.prod(p if win else 1 - p for p, win in zip(coins, outcome, strict=True))
        groups = [list(outcome[start:stop]) for start, stop in itertools.pairwise(cuts)]
        total += float(probability) * moments(groups, estimator)[1]
    return total


def test_beta_binomial_variance_is_unbiased_under_ragged_groups_and_that_of_moments_is_not():
    chances, sizes = [Fraction(1, 5), Fraction(7, 10), Fraction(1, 2)], [2, 4, 3]
    # Of 0.2, 0.7, 0.5: mean 1.4 / 3, squares 0.04 + 0.49 + 0.25 - 1.96 / 3 = 0.38 / 3, over 2 prompts.
    assert expected_variance(chances, sizes, "beta_binomial") == pytest.approx(0.38 / 6)
    # Over 3 prompts, and each p_g has the noise 0.16 / 2, 0.21 / 4, 0.25 / 3, of which a deviation keeps 2/3.
    noise = (0.16 / 2 + 0.21 / 4 + 0.25 / 3) / 3
    assert expected_variance(chances, sizes, "moments") == pytest.approx(0.38 / 9 + noise * 2 / 3)


def test_the_variance_of_prompts_that_do_not_differ_can_come_out_negative():
    # p = 1/2 twice: 0 less the noise 0.5 / 2.
    assert moments([[1, 0], [0, 1]], "beta_binomial") == pytest.approx((0.5, -0.25))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_cannot_be_measured_is_nan(estimator):
    assert all(math.isnan(value) for value in moments([[NAN], [NAN, NAN]], estimator))
    mean, variance = moments([[1, 0, 0, 0], [NAN, NAN]], estimator)
    assert mean == 0.25 and math.isnan(variance)


def test_two_prompts_with_one_row_each_say_nothing_of_the_noise():
    assert moments([[1], [0]], "moments") == pytest.approx((0.5, 0.25))
    mean, variance = moments([[1], [0], [1, 0]], "beta_binomial")
    assert mean == 0.5 and math.isnan(variance)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rewards_are_measured_apart_and_rows_may_lie_anywhere(estimator):
    first, second = [[1, 0], [1, 1, 0], [0, 0, 0, 1]], [[0.5, NAN], [0.2, 0.9, 0.4], [NAN, 0.1, 0.3, NAN]]
    unit_NK = torch.stack([tensor(*itertools.chain(*first)), tensor(*itertools.chain(*second))], dim=1)
    group_N = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    order_N = torch.tensor([5, 0, 7, 2, 8, 4, 1, 6, 3])
    mean_K, variance_K = prompt_moments(unit_NK[order_N], group_N[order_N], estimator)
    alone = [moments(first, estimator), moments([[x for x in group if x == x] for group in second], estimator)]
    assert list(zip(mean_K.tolist(), variance_K.tolist(), strict=True)) == [pytest.approx(pair) for pair in alone]


# a and b, alpha and beta


def test_parameters_by_hand():
    # m = 0.375, v = 0.015625: m (1 - m) / v - 1 = 0.234375 / 0.015625 - 1 = 14.
    # a = 14 * 0.375 = 5.25, b = 14 * 0.625 = 8.75; alpha = 1 + 1.75, beta = 1 + 8.75 / 3.
    assert population_prior(tensor(0.375), tensor(0.015625)) == (pytest.approx([5.25]), pytest.approx([8.75]))
    assert parameters(0.375, 0.015625) == pytest.approx((2.75, 1 + 8.75 / 3))


def test_moments_of_a_beta_give_it_back():
    # Beta(2, 5): m = 2/7, v = 2 * 5 / (7^2 * 8).
    a_K, b_K = population_prior(tensor(2 / 7), tensor(10 / 392))
    assert (a_K.item(), b_K.item()) == pytest.approx((2.0, 5.0))


@pytest.mark.parametrize(
    ("mean", "variance"),
    [
        (NAN, NAN),  # a reward that never was there
        (0.3, NAN),  # never two prompts
        (0.3, 0.0),
        (0.3, -0.1),
        (14 / 15, 1e-33),  # equal, but rounding would give alpha = 1e30
        (0.0, 0.0),  # never a success
        (1.0, 0.0),
        (0.5, 0.25),  # always or never: v = m (1 - m)
        (0.5, 0.3),  # v > m (1 - m)
    ],
)
def test_without_a_prior_alpha_and_beta_are_one(mean, variance):
    assert parameters(mean, variance) == (1.0, 1.0)


def test_prompts_that_succeed_always_or_never_give_one():
    """There v = m (1 - m), and rounding alone decides the sign of a and b."""
    for successes in range(1, 40):
        mean, variance = moments([[1]] * successes + [[0]] * (40 - successes), "moments")
        assert parameters(mean, variance) == pytest.approx((1.0, 1.0), abs=1e-9)
        assert min(parameters(mean, variance)) >= 1.0


# The density


def density(p, alpha, beta):
    return beta_density(tensor(*p), tensor(alpha), tensor(beta)).tolist()


def test_density_by_hand():
    # Beta(2, 3) has B = 1! 2! / 4! = 1 / 12: f(p) = 12 p (1 - p)^2.
    assert density([0.5, 0.25, 0.0, 1.0], 2.0, 3.0) == pytest.approx([1.5, 12 * 0.25 * 0.5625, 0.0, 0.0])
    # Beta(3/2, 3/2): B = Gamma(3/2)^2 / Gamma(3) = (pi / 4) / 2 = pi / 8; f(1/2) = (1/2) / (pi / 8).
    assert density([0.5], 1.5, 1.5) == pytest.approx([4 / math.pi])
    assert density([0.0, 0.1, 0.9, 1.0], 1.0, 1.0) == pytest.approx([1.0] * 4)


def test_density_integrates_to_one():
    steps = 20_000
    p = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    assert beta_density(p, tensor(2.75), tensor(1 + 8.75 / 3)).mean().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1.0, 1.0), (2.0, 5.0), (8.0, 8.0), (3.0, 0.5)])
def test_the_density_minimises_the_variance_of_the_gradient(a, b):
    """E[p (1 - p) / f(p)^2] over p ~ Beta(a, b), by the midpoint rule: the paper's theorem."""
    p = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    weight = p**a * (1 - p) ** b  # p (1 - p) times the density of Beta(a, b), up to a constant

    def variance(alpha, beta):
        return (weight / beta_density(p, tensor(alpha), tensor(beta)).square()).sum().item()

    mean, spread = a / (a + b), a * b / (a + b) ** 2 / (a + b + 1)
    alpha, beta = parameters(mean, spread)
    best = variance(alpha, beta)
    for step in (-0.02, 0.02):
        assert variance(alpha + step, beta) > best < variance(alpha, beta + step)
    assert variance(1.0, 1.0) > best < variance(1.5, 1.5)


# The rest


def test_ranges_map_to_the_unit_interval():
    rewards_NK = torch.tensor([[-1.0, 0.0], [1.0, 5.0], [NAN, 10.0], [0.0, NAN]], dtype=torch.float64)
    unit_NK = to_unit_interval(rewards_NK, torch.tensor([[-1.0, 1.0], [0.0, 10.0]], dtype=torch.float64))
    torch.testing.assert_close(
        unit_NK, torch.tensor([[0.0, 0.0], [1.0, 0.5], [NAN, 1.0], [0.5, NAN]]).double(), equal_nan=True
    )


def test_bounds_are_rounded_as_the_rewards_are():
    """The float32 of 0.1 is 0.10000000149: against the float64 bound it would lie outside of [0, 0.1]."""
    unit_NK = to_unit_interval(torch.tensor([[0.1], [0.0]]), torch.tensor([[0.0, 0.1]], dtype=torch.float64))
    assert unit_NK.dtype == torch.float64 and unit_NK.flatten().tolist() == [1.0, 0.0]


def test_the_average_is_bias_corrected_and_knows_what_it_has_not_seen():
    average = MovingAverage(3, smoothing=0.75)
    average.update(tensor(2.0, NAN, 4.0))
    # One value is its own average: 0.25 * 2 / 0.25.
    assert average.value()[[0, 2]].tolist() == [2.0, 4.0] and math.isnan(average.value()[1])
    average.update(tensor(6.0, 5.0, NAN))
    # (0.75 * 0.5 + 0.25 * 6) / (0.75 * 0.25 + 0.25) = 1.875 / 0.4375
    assert average.value().tolist() == pytest.approx([1.875 / 0.4375, 5.0, 4.0])


def test_without_smoothing_the_average_is_the_last_value():
    average = MovingAverage(1, smoothing=0.0)
    for value in (3.0, 7.0, NAN):
        average.update(tensor(value))
    assert average.value().item() == 7.0
