"""Rewards without work of their own; all the same function, under as many names as are wanted."""

from typing import Any


def even_share(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
