"""The prior of a prompt: the moments of Beta normalization, and the rules where they do not decide."""

import numpy as np
import pytest
import torch

from rlbal.balance.normalization import population_prior, prompt_moments
from rlbal.prompts.prior import BORROWED, ENOUGH, LEAST, MEMORY, MOST, PromptPrior

RNG = np.random.default_rng(0)


def summary(groups):
    """Count, mean and unbiased variance of each group of successes."""
    counts = np.array([len(group) for group in groups], dtype=float)
    variances = np.array([np.var(group, ddof=1) if len(group) > 1 else 0.0 for group in groups])
    return counts, np.array([np.mean(group) for group in groups]), variances


def random_groups(prompts, a=1.0, b=2.0, rollouts=None):
    sizes = RNG.integers(1, 9, prompts) if rollouts is None else np.full(prompts, rollouts)
    return [RNG.binomial(1, p, n).astype(float) for p, n in zip(RNG.beta(a, b, prompts), sizes, strict=True)]


def observed(groups, strata=None, num_strata=1):
    prior = PromptPrior(num_strata)
    prior.observe(np.zeros(len(groups), dtype=int) if strata is None else strata, *summary(groups))
    return prior


def of_normalization(groups):
    """a and b as `estimator: beta_binomial` finds them for a reward."""
    unit_N1 = torch.tensor(np.concatenate(groups), dtype=torch.float64).unsqueeze(1)
    group_N = torch.tensor(np.repeat(np.arange(len(groups)), [len(group) for group in groups]))
    return tuple(float(x) for x in population_prior(*prompt_moments(unit_N1, group_N, "beta_binomial")))


@pytest.mark.parametrize("graded", [False, True])
def test_one_batch_gives_what_beta_normalization_finds(graded):
    groups = random_groups(200)
    if graded:
        groups = [group * 0.5 + RNG.random(len(group)) * 0.2 for group in groups]
    assert min(map(len, groups)) == 1  # a single rollout has no variance: it counts in m alone
    assert observed(groups).population() == pytest.approx(of_normalization(groups), rel=1e-9)


def test_many_prompts_show_the_population_that_they_come_from():
    prior = observed(random_groups(40000, 0.6, 1.4, rollouts=4))
    # 40,000 prompts of 4 rollouts tell v to about 1 %, and with it a + b to a few.
    assert prior.population() == pytest.approx((0.6, 1.4), rel=0.08)


def test_older_batches_count_less():
    batches = [random_groups(50, a, 2.0, rollouts=n) for a, n in ((0.5, 3), (1.0, 8), (3.0, 5))]
    prior = PromptPrior(1)
    for batch in batches:
        prior.observe(np.zeros(len(batch), dtype=int), *summary(batch))
    weights = np.repeat([MEMORY**2, MEMORY, 1.0], 50)
    _, rates, variances = summary([group for batch in batches for group in batch])
    noise = np.average(variances / np.repeat([3, 8, 5], 50), weights=weights)
    mean, variance = np.average(rates, weights=weights), np.cov(rates, aweights=weights, ddof=1) - noise
    concentration = mean * (1 - mean) / variance - 1
    assert prior.population() == pytest.approx((mean * concentration, (1 - mean) * concentration))


# Rules where the moments do not decide


def test_until_there_is_enough_it_is_the_beta_of_one_half():
    groups = random_groups(ENOUGH, rollouts=4)
    for few in (groups[:-1], [*groups[:-1], groups[-1][:1]]):
        prior = observed(few)
        assert not prior.fitted and prior.population() == (0.5, 0.5)
        assert [x.tolist() for x in prior.strata()] == [[0.5], [0.5]]
    assert observed(groups).fitted
    assert PromptPrior(2).population() == (0.5, 0.5)


def test_small_batches_add_up_to_enough():
    prior = PromptPrior(1)
    for _ in range(60):
        prior.observe(np.zeros(2, dtype=int), *summary(random_groups(2, rollouts=4)))
    # Two prompts a batch: 2 / (1 - 0.9) = 20 by weight, squared over 2 / (1 - 0.81): 38 effective ones.
    assert prior.fitted


def test_prompts_that_do_not_differ_give_the_most_certain_prior():
    prior = observed([np.array([0.0, 1.0])] * 40)
    assert prior.population() == pytest.approx((MOST / 2, MOST / 2))


def test_prompts_that_succeed_always_or_never_give_the_least_certain_prior():
    groups = [np.ones(4)] * 10 + [np.zeros(4)] * 30
    assert prior_sum(observed(groups)) == pytest.approx(LEAST)
    assert observed(groups).population()[0] == pytest.approx(LEAST / 4)


def prior_sum(prior):
    return sum(prior.population())


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_a_mean_at_an_end_is_half_a_prompt_from_it(outcome):
    a, b = observed([np.full(4, outcome)] * 50).population()
    expected = 0.01 if outcome == 0 else 0.99
    assert (a, b) == pytest.approx((MOST * expected, MOST * (1 - expected)))


# Strata


def test_a_stratum_counts_by_its_prompts_against_those_borrowed():
    easy, hard = random_groups(60, 4.0, 1.0, rollouts=6), random_groups(20, 1.0, 4.0, rollouts=6)
    prior = observed(easy + hard, np.repeat([0, 1], [60, 20]), num_strata=3)

    def m_and_v(groups):
        _, rates, variances = summary(groups)
        return np.array([np.mean(rates), np.var(rates, ddof=1) - np.mean(variances / 6)])

    everyone = m_and_v(easy + hard)
    a_H, b_H = prior.strata()
    for stratum, groups in enumerate((easy, hard)):
        own = len(groups) / (len(groups) + BORROWED)
        mean, variance = own * m_and_v(groups) + (1 - own) * everyone
        concentration = mean * (1 - mean) / variance - 1
        assert (a_H[stratum], b_H[stratum]) == pytest.approx((mean * concentration, (1 - mean) * concentration))
    assert (a_H[2], b_H[2]) == pytest.approx(prior.population())  # never seen
    means_H = a_H / (a_H + b_H)
    assert means_H[0] > means_H[2] > means_H[1]


def test_a_stratum_with_one_prompt_has_the_prior_of_all():
    groups = random_groups(41, rollouts=4)
    prior = observed(groups, np.repeat([0, 1], [40, 1]), num_strata=2)
    a_H, b_H = prior.strata()
    assert (a_H[1], b_H[1]) == pytest.approx(prior.population())


def test_one_stratum_is_all_prompts():
    prior = observed(random_groups(80))
    a_H, b_H = prior.strata()
    assert (a_H[0], b_H[0]) == pytest.approx(prior.population())
