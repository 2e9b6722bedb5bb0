"""Two cheap rewards on token ids."""

from typing import Any


def even_share(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def short(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1 for up to 40 tokens, else 0."""
    return [float(len(ids) <= 40) for ids in completion_ids]
