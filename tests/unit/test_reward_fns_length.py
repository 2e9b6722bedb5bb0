from typing import Any

import pytest

from reward_fns.length import absolute_conciseness, band, conciseness, triangular
from rlbal.errors import RewardError

# Lengths 0, L/2, L, 1.5 L, 2 L, 3 L for L = 10.
LENGTHS = [0, 5, 10, 15, 20, 30]
IDS = [[7] * length for length in LENGTHS]
TEXTS = ["text"] * len(LENGTHS)


def test_triangular_by_hand() -> None:
    # 0/10, 5/10, 10/10, 1 - 5/10, 1 - 10/10, 0
    assert triangular(TEXTS, IDS, target_tokens=10) == pytest.approx([0, 0.5, 1, 0.5, 0, 0], abs=1e-12)


def test_band_by_hand() -> None:
    assert band(TEXTS, IDS, target_tokens=10) == pytest.approx([1, 1, 1, 0.5, 0, 0], abs=1e-12)


def test_around_an_odd_target() -> None:
    # L = 87: 43/87, 87/87, 1 - 1/87, 1 - 86/87, 1 - 87/87. One token short of twice the target still earns something.
    ids = [[7] * length for length in (43, 87, 88, 173, 174)]
    assert triangular([""] * 5, ids, target_tokens=87) == pytest.approx([43 / 87, 1, 86 / 87, 1 / 87, 0], abs=1e-12)
    assert band([""] * 5, ids, target_tokens=87) == pytest.approx([1, 1, 86 / 87, 1 / 87, 0], abs=1e-12)


def test_each_row_has_the_budget_of_its_prompt() -> None:
    # 100 tokens against L = 200, 100 and 80: 100/200, 100/100, 1 - 20/80
    ids, budgets = [[7] * 100] * 3, [200, 100, 80]
    assert triangular([""] * 3, ids, token_budget=budgets) == pytest.approx([0.5, 1, 0.75])
    assert band([""] * 3, ids, token_budget=budgets) == pytest.approx([1, 1, 0.75])


def test_the_column_wins_over_the_argument() -> None:
    # L = 20 for the first row, 5 for the second: 10/20 and 1 - (8 - 5)/5
    scores = triangular(["", ""], [[1] * 10, [1] * 8], target_tokens=10, token_budget=[20, 5])
    assert scores == pytest.approx([0.5, 0.4])


@pytest.mark.parametrize("function", [triangular, band, absolute_conciseness])
def test_a_target_is_needed(function: Any) -> None:
    with pytest.raises(RewardError, match="target_tokens"):
        function(["a"], [[1]])
    with pytest.raises(RewardError, match="at least 1"):
        function(["a"], [[1]], target_tokens=0)
    with pytest.raises(RewardError, match="at least 1"):
        function(["a"], [[1]], token_budget=[0])


def test_conciseness_by_hand() -> None:
    # mean 4: 1/(1 + 0), 1/(1 + 4/4), 1/(1 + 8/4)
    assert conciseness(["", "", ""], [[], [1] * 4, [1] * 8]) == pytest.approx([1, 0.5, 1 / 3])
    assert conciseness(["", ""], [[], []]) == [1.0, 1.0]


def test_conciseness_uses_the_mean_over_all_processes() -> None:
    ids = [[1] * length for length in (2, 4, 6, 20)]
    whole = conciseness([""] * 4, ids)
    # The same batch on two processes; both get the gathered mean (2 + 4 + 6 + 20)/4 = 8.
    first = conciseness([""] * 2, ids[:2], mean_completion_length=[8.0] * 2)
    second = conciseness([""] * 2, ids[2:], mean_completion_length=[8.0] * 2)
    assert first + second == pytest.approx(whole)
    assert conciseness([""] * 2, ids[:2]) != pytest.approx(whole[:2])


def test_absolute_conciseness_by_hand() -> None:
    # 1/(1 + 0), 1/1.5, 1/2, 1/2.5, 1/3, 1/4
    assert absolute_conciseness(TEXTS, IDS, target_tokens=10) == pytest.approx([1, 2 / 3, 0.5, 0.4, 1 / 3, 0.25])
    # The column wins: L = 20 for the first row, 5 for the second.
    assert absolute_conciseness(["", ""], [[1] * 10, [1] * 10], 10, token_budget=[20, 5]) == pytest.approx(
        [2 / 3, 1 / 3]
    )


def test_only_absolute_conciseness_sees_that_all_completions_got_shorter() -> None:
    before, after = [[1] * 20, [1] * 40], [[1] * 10, [1] * 20]
    assert conciseness(["", ""], before) == pytest.approx(conciseness(["", ""], after))
    first, second = (absolute_conciseness(["", ""], ids, target_tokens=20) for ids in (before, after))
    assert all(late > early for early, late in zip(first, second, strict=True))
