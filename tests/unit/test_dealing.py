"""Rollouts dealt to processes, and rows weighed by prompt."""

import numpy as np
import pytest

from rlbal.balance.aggregation import prompt_level_factors
from rlbal.prompts.dealing import deal


def test_dealing_by_hand():
    # Longest first: 2 2 | 0 0 | 0 1: the first process takes 2, then the second of 0 0, then 0.
    assert deal([20.0, 10.0, 30.0], [3, 1, 2], 2).tolist() == [0, 0, 2, 0, 1, 2]


def test_one_process_keeps_the_order_of_the_prompts():
    assert deal([1.0, 9.0, 5.0], [2, 1, 3], 1).tolist() == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_get_equal_rows_and_nearly_equal_lengths(processes):
    generator = np.random.default_rng(processes)
    for _ in range(50):
        counts_P = generator.integers(1, 20, 40)
        counts_P[0] += -counts_P.sum() % processes
        expected_P = generator.lognormal(5, 1, 40)
        rows = deal(expected_P, counts_P, processes)
        np.testing.assert_array_equal(np.bincount(rows, minlength=40), counts_P)
        totals = expected_P[rows].reshape(processes, -1).sum(axis=1)
        assert np.ptp(totals) <= np.ptp(expected_P) * (1 + 1e-12)


def test_dealing_without_any_length_known():
    np.testing.assert_array_equal(np.bincount(deal(np.zeros(4), [3, 3, 3, 3], 4)), 3)


def test_what_cannot_be_dealt_is_refused():
    with pytest.raises(ValueError, match="7 rollouts do not divide over 2 processes"):
        deal([1.0, 1.0], [3, 4], 2)
    with pytest.raises(ValueError, match="NaN"):
        deal([1.0, np.nan], [3, 3], 2)


def test_prompt_level_factors_by_hand():
    # 60 tokens, two prompts of 40 and 20 tokens: 60 / (2 * 40) and 60 / (2 * 20).
    np.testing.assert_array_equal(prompt_level_factors([10, 20, 30], [0, 1, 0]), [0.75, 1.5, 0.75])


def test_a_token_mean_with_prompt_level_factors_is_the_mean_of_prompt_means():
    generator = np.random.default_rng(0)
    group_N, tokens_N = generator.permutation(np.repeat(np.arange(5), [1, 2, 8, 16, 5])), generator.integers(1, 99, 32)
    loss_N = generator.normal(size=32)  # of every token of the row
    weighed = (loss_N * prompt_level_factors(tokens_N, group_N) * tokens_N).sum() / tokens_N.sum()
    by_prompt = [np.average(loss_N[group_N == g], weights=tokens_N[group_N == g]) for g in range(5)]
    assert weighed == pytest.approx(np.mean(by_prompt))


def test_a_prompt_without_tokens_in_the_loss_is_not_counted():
    np.testing.assert_array_equal(prompt_level_factors([10, 0, 30, 0], [0, 1, 2, 1]), [2.0, 0.0, 2 / 3, 0.0])
    np.testing.assert_array_equal(prompt_level_factors([0, 0], [0, 1]), [0.0, 0.0])
