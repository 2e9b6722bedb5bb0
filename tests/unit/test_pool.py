"""The order of prompts: TRL's in the first epoch, another one in each later epoch; retired ones skipped."""

from collections.abc import Iterable

import numpy as np
import pytest
from trl.trainer.utils import RepeatSampler

from rlbal.prompts.pool import PromptPool, Retired


def gone(prompts: Iterable[int]) -> Retired:
    """Exactly these have retired."""
    them = list(prompts)
    return lambda some: np.isin(some, them)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("num_prompts", "count"), [(11, 3), (12, 3), (5, 1)])
def test_the_first_epoch_is_trls(num_prompts: int, count: int, shuffle: bool) -> None:
    theirs = list(RepeatSampler(range(num_prompts), 1, batch_size=count, shuffle=shuffle, seed=5))
    pool = PromptPool(num_prompts, shuffle, seed=5)
    assert [prompt for _ in range(num_prompts // count) for prompt in pool.draw(count)] == theirs


def test_prompts_that_do_not_fill_a_batch_are_left_out_of_their_epoch() -> None:
    pool = PromptPool(5, shuffle=False, seed=0)
    assert [pool.draw(2).tolist() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]
    assert (pool.epoch, pool.position) == (1, 2)


def test_epochs_differ_and_each_has_every_prompt_once() -> None:
    pool = PromptPool(12, shuffle=True, seed=5)
    first, second = ([prompt for _ in range(4) for prompt in pool.draw(3)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_state_is_epoch_and_position() -> None:
    pool = PromptPool(11, shuffle=True, seed=5, review_fraction=0.5)
    for _ in range(5):
        pool.draw(3, gone([1, 2]))
    other = PromptPool(11, shuffle=True, seed=5, review_fraction=0.5)
    other.load_state_dict(pool.state_dict())
    assert [pool.draw(3, gone([1, 2])).tolist() for _ in range(9)] == [
        other.draw(3, gone([1, 2])).tolist() for _ in range(9)
    ]


def test_retired_prompts_are_skipped_from_the_moment_they_retire() -> None:
    pool = PromptPool(8, shuffle=False, seed=0)
    assert pool.draw(2, gone([])).tolist() == [0, 1]
    assert pool.draw(2, gone([2, 4])).tolist() == [3, 5]
    assert pool.draw(2, gone([2, 4])).tolist() == [6, 7]
    assert pool.draw(3, gone([0, 3])).tolist() == [1, 2, 4]  # back again: whoever is asked decides


def test_a_long_run_of_retired_prompts_is_passed_over() -> None:
    pool = PromptPool(1000, shuffle=False, seed=0)
    assert pool.draw(2, gone(range(1, 999))).tolist() == [0, 999]


def test_an_epoch_without_enough_prompts_leads_to_the_next() -> None:
    pool = PromptPool(6, shuffle=False, seed=0)
    pool.draw(4, gone([]))
    assert pool.draw(3, gone([1])).tolist() == [0, 2, 3]
    assert pool.epoch == 1


def test_a_pool_is_empty_when_neither_epoch_fills_a_batch() -> None:
    pool = PromptPool(6, shuffle=True, seed=3)
    assert not pool.empty(2, gone([0, 1, 2, 3]))
    assert pool.empty(3, gone([0, 1, 2, 3]))
    pool.draw(6, gone([]))  # the epoch's end: the next one counts
    assert not pool.empty(2, gone([0, 1, 2, 3]))
    assert pool.empty(2, gone([0, 1, 2, 3, 4]))


def test_an_empty_pool_is_filled_up_with_retired_prompts() -> None:
    pool = PromptPool(6, shuffle=False, seed=0)
    assert pool.draw(4, gone(range(5))).tolist() == [0, 1, 2, 3]


def test_reviews_bring_back_their_share_and_others_each_epoch() -> None:
    """Of 4,000 retired prompts a quarter: 1,000, with a standard deviation of sqrt(4000 * 3 / 16) = 27."""
    pool, everyone = PromptPool(4000, shuffle=True, seed=1, review_fraction=0.25), gone(range(4000))
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while pool.epoch < 2:
        prompt = int(pool.draw(1, everyone)[0])
        drawn[pool.epoch].append(prompt)
    for epoch in (0, 1):
        assert len(set(drawn[epoch])) == len(drawn[epoch])
        assert abs(len(drawn[epoch]) - 1000) < 4 * 27
    assert abs(len(set(drawn[0]) & set(drawn[1])) - 250) < 4 * 16  # independent: a quarter of a quarter


def test_without_reviews_nothing_comes_back() -> None:
    pool = PromptPool(100, shuffle=True, seed=1)
    drawn = {prompt for _ in range(20) for prompt in pool.draw(10, gone(range(50))).tolist()}
    assert drawn == set(range(50, 100))
