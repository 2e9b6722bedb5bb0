"""Statistics over ragged groups with missing values."""

import math

import pytest
import torch

from rlbal.balance.groups import constant_groups, group_mean, group_std, group_sum

NAN = math.nan


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def test_sums_means_and_deviations_by_hand():
    # Group 0: rows 0, 1, 3 = 1, 2, 6: sum 9, mean 3, deviations -2, -1, 3, their squares 14, 14 / 2 = 7.
    # Group 1: row 2 alone: no deviation. Group 2: row 4 is missing.
    values, group_N = column(1, 2, 5, 6, NAN), torch.tensor([0, 0, 1, 0, 2])
    present = ~values.isnan()
    assert group_sum(values.nan_to_num(), group_N, 3).flatten().tolist() == [9, 5, 0]
    means, counts = group_mean(values, present, group_N, 3)
    assert means.flatten().tolist() == [3, 5, 0]
    assert counts.flatten().tolist() == [3, 1, 0]
    assert group_std(values, present, group_N, 3).flatten().tolist() == [pytest.approx(math.sqrt(7)), 0, 0]


def test_what_is_marked_missing_is_ignored_whatever_stands_there():
    values, group_N = column(1, 3, NAN, math.inf, 1e300), torch.zeros(5, dtype=torch.long)
    present = torch.tensor([True, True, False, False, False]).unsqueeze(1)
    means, counts = group_mean(values, present, group_N, 1)
    assert (means.item(), counts.item()) == (2, 2)
    assert group_std(values, present, group_N, 1).item() == pytest.approx(math.sqrt(2))


def test_columns_are_independent():
    values = torch.tensor([[1.0, NAN], [3.0, 7.0]], dtype=torch.float64)
    means, counts = group_mean(values, ~values.isnan(), torch.tensor([0, 0]), 1)
    assert means.tolist() == [[2, 7]] and counts.tolist() == [[2, 1]]


def test_equal_rewards_have_exactly_no_deviation():
    values = torch.full((1000, 1), 0.1, dtype=torch.float32).double()
    assert (
        group_std(values, torch.ones_like(values, dtype=torch.bool), torch.zeros(1000, dtype=torch.long), 1).item() == 0
    )


def test_constant_groups():
    values = column(
        *(1, 1),  # 0: equal
        *(0, 1),  # 1: differ
        *(2, NAN, 2),  # 2: equal where present
        *(2, NAN, 3),  # 3: differ where present
        5,  # 4: a single row
        *(NAN, NAN),  # 5: nothing present
        *(NAN, 4),  # 6: one present
    )
    group_N = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 5, 6, 6])
    expected = [True, False, True, False, True, True, True]
    assert constant_groups(values, group_N, 7).flatten().tolist() == expected
    shuffled = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    assert constant_groups(values[shuffled], group_N[shuffled], 7).flatten().tolist() == expected


def test_constant_groups_looks_at_each_reward_alone():
    values = torch.tensor([[1.0, 0.0], [1.0, 0.5]])
    assert constant_groups(values, torch.tensor([0, 0]), 1).tolist() == [[True, False]]
