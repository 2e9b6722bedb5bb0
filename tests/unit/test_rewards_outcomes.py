from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from rlbal.recipe import RewardsSection
from rlbal.rewards.outcomes import Failure, Fault, merge, outcomes, verdict


class ZeroDimensional:
    """As a tensor of one number behaves."""

    def item(self) -> float:
        return 0.25


def test_numbers_and_none_pass() -> None:
    given = [1, 0.5, None, True, np.float32(0.5), np.int64(3), Fraction(1, 4), ZeroDimensional()]
    assert outcomes(given, 8, None) == [1.0, 0.5, None, 1.0, 0.5, 3.0, 0.25, 0.25]
    assert outcomes(np.array([1.0, 2.0]), 2, None) == [1.0, 2.0]
    assert outcomes((one for one in [1, 2]), 2, (1, 2)) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "nan"),
        (np.float64("nan"), "nan"),
        (float("inf"), "infinite"),
        (-float("inf"), "infinite"),
        (10**400, "infinite"),
        (1e39, "infinite"),  # TRL keeps rewards in single precision, where this is infinity and its advantages NaN
        ("1.0", "not_a_number"),
        ([1.0], "not_a_number"),
        (1j, "not_a_number"),
        (np.array([1.0, 2.0]), "not_a_number"),
        (1.01, "out_of_range"),
        (-0.01, "out_of_range"),
    ],
)
def test_faults_cost_their_row_only(value: Any, reason: str) -> None:
    first, faulty, last = outcomes([0.0, value, 1.0], 3, (0, 1))
    assert (first, last) == (0.0, 1.0)
    assert isinstance(faulty, Fault) and faulty.reason == reason


@pytest.mark.parametrize("values", [[1.0], [1.0] * 3, [], None, 1.0, "ab", {"a": 1, "b": 2}])
def test_a_wrong_count_costs_every_row(values: Any) -> None:
    judged = outcomes(values, 2, None)
    assert [one.reason for one in judged if isinstance(one, Fault)] == ["wrong_count"] * 2


def test_merge_adds_counts_by_reward_and_reason() -> None:
    merged = merge([Failure("a", "nan", 2, "x"), Failure("b", "nan", 1, "y"), Failure("a", "nan", 3, "z")])
    assert merged == [Failure("a", "nan", 5, "x"), Failure("b", "nan", 1, "y")]


def section(**rest: Any) -> RewardsSection:
    return RewardsSection.model_validate({"functions": {"a": {"function": "m:f"}, "b": {"function": "m:g"}}, **rest})


def test_raise_stops_at_the_first_failure() -> None:
    assert verdict([], 8, section()) is None
    message = verdict([Failure("a", "timeout", 1, "was not done after 10 s")], 8, section())
    assert message is not None
    for part in ("`a`", "1 of 8", "timeout", "not done after 10 s", "rewards.functions.a.timeout", "on_error: skip"):
        assert part in message


def test_skip_stops_above_the_share_of_one_reward_over_all_reasons() -> None:
    skip = section(on_error="skip", max_failed_share=0.5)
    half = [Failure("a", "nan", 2, "x"), Failure("a", "raised", 2, "y")]
    assert verdict([*half, Failure("b", "nan", 4, "x")], 8, skip) is None
    message = verdict([*half, Failure("a", "died", 1, "z"), Failure("b", "nan", 4, "x")], 8, skip)
    assert message is not None and "`a` failed on 5 of 8" in message and "62.5%" in message
    assert verdict([Failure("b", "nan", 8, "x")], 8, section(on_error="skip", max_failed_share=1.0)) is None
