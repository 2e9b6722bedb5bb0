"""Rewards that need no answer: functions of the completion's tokens."""

from typing import Any


def even_share(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def odd_share(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """What `even_share` leaves, to the last bit."""
    return [1.0 - share for share in even_share(completion_ids)]


def short(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1 for up to five tokens, else 0."""
    return [float(len(ids) <= 5) for ids in completion_ids]


def sometimes_missing(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """As `short`, and None where the first token is divisible by 3."""
    return [None if ids[0] % 3 == 0 else float(len(ids) <= 5) for ids in completion_ids]


def always_missing_for_some(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """None wherever `sometimes_missing` is, else the length."""
    return [None if ids[0] % 3 == 0 else len(ids) / 20 for ids in completion_ids]


def even_share_but(completion_ids: list[list[int]], prompt_index: list[int], dead: list[int], **kwargs: Any) -> list:
    """As `even_share`, and the same for every completion of the prompts in `dead`."""
    shares = even_share(completion_ids)
    return [0.5 if index in dead else share for index, share in zip(prompt_index, shares, strict=True)]


def never(completion_ids: list[list[int]], **kwargs: Any) -> list[None]:
    """No score for any row."""
    return [None] * len(completion_ids)


def by_prompt(completion_ids: list[list[int]], prompt_index: list[int], **kwargs: Any) -> list[float]:
    """Success or not: prompt i fails where the first token has one of i + 1 remainders by 7."""
    return [float(ids[0] % 7 > index) for ids, index in zip(completion_ids, prompt_index, strict=True)]


def number_of_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The length, far above 1."""
    return [float(len(ids)) for ids in completion_ids]


def one(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The best score for every row."""
    return [1.0] * len(completion_ids)
