"""Rewards for the length ℓ of a completion in tokens (`completion_ids`), against a target L or the batch.

`triangular` and `band` follow "Train Long, Think Short" (arXiv 2508.08940). L is the dataset column `token_budget`
where there is one (a budget schedule provides it) and the argument `target_tokens` otherwise.
"""

from collections.abc import Sequence
from typing import Any

from reward_fns._text import Completion
from rlbal.errors import RewardError


def triangular(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    target_tokens: int | None = None,
    token_budget: Sequence[int] | None = None,
    **kwargs: Any,
) -> list[float]:
    """ℓ/L up to L, then 1 − (ℓ − L)/L up to 2L, then 0: highest at the target itself.

    Raises:
        RewardError: no target, or one below 1.
    """
    targets = _targets(len(completion_ids), target_tokens, token_budget)
    return [
        len(ids) / target if len(ids) <= target else _fall(len(ids), target)
        for ids, target in zip(completion_ids, targets, strict=True)
    ]


def band(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    target_tokens: int | None = None,
    token_budget: Sequence[int] | None = None,
    **kwargs: Any,
) -> list[float]:
    """1 up to L, then 1 − (ℓ − L)/L up to 2L, then 0.

    Raises:
        RewardError: no target, or one below 1.
    """
    targets = _targets(len(completion_ids), target_tokens, token_budget)
    return [
        1.0 if len(ids) <= target else _fall(len(ids), target)
        for ids, target in zip(completion_ids, targets, strict=True)
    ]


def conciseness(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    mean_completion_length: Sequence[float] | None = None,
    **kwargs: Any,
) -> list[float]:
    """1/(1 + ℓ/m) with m the batch mean of ℓ: 1 for an empty completion, ½ at the mean, towards 0 beyond.

    A process sees only its own rows, so rlbal's trainer gathers m over all processes and passes it as the column
    `mean_completion_length` (the same value in each row). Without the column m is the mean of the rows at hand.

    The mean score of a batch stays near ½ however short its completions are, so it says nothing of progress; see
    `absolute_conciseness` for that.
    """
    lengths = [len(ids) for ids in completion_ids]
    means = mean_completion_length or [sum(lengths) / max(len(lengths), 1)] * len(lengths)
    return [1 / (1 + length / mean) if mean > 0 else 1.0 for length, mean in zip(lengths, means, strict=True)]


def absolute_conciseness(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    target_tokens: int | None = None,
    token_budget: Sequence[int] | None = None,
    **kwargs: Any,
) -> list[float]:
    """1/(1 + ℓ/L): 1 for an empty completion, ½ at the target, towards 0 beyond. Comparable over a whole run.

    Raises:
        RewardError: no target, or one below 1.
    """
    targets = _targets(len(completion_ids), target_tokens, token_budget)
    return [1 / (1 + len(ids) / target) for ids, target in zip(completion_ids, targets, strict=True)]


def _fall(length: int, target: int) -> float:
    return max(0.0, 1 - (length - target) / target)


def _targets(rows: int, target_tokens: int | None, token_budget: Sequence[int] | None) -> Sequence[int]:
    """The target of each row."""
    if token_budget is None and target_tokens is None:
        raise RewardError(
            "a length reward has no target length",
            why="the dataset has no column `token_budget` and the recipe gives no `target_tokens`",
            fix="add `args: {target_tokens: 64}` (your length) to the reward in the recipe",
        )
    targets = [target_tokens or 0] * rows if token_budget is None else token_budget
    if any(target < 1 for target in targets):
        raise RewardError(f"a length reward needs a target of at least 1 token, not {min(targets)}")
    return targets
