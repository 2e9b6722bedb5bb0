"""Rewards on token ids: one that costs nothing, and one that costs what checking an answer costs."""

import hashlib
from typing import Any


def even_share(completion_ids: list[list[int]], dead: list[bool], **kwargs: Any) -> list[float]:
    """Share of even token ids; ½ for every rollout of a dead prompt, whose group then has no advantage."""
    return [0.5 if constant else _even(ids) for ids, constant in zip(completion_ids, dead, strict=True)]


def verify(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The same share after about 4 ms of hashing per row, in place of parsing and comparing formulas."""
    for ids in completion_ids:
        hashlib.pbkdf2_hmac("sha256", repr(ids).encode(), b"", 8_000)
    return [_even(ids) for ids in completion_ids]


def _even(ids: list[int]) -> float:
    return sum(token % 2 == 0 for token in ids) / len(ids)
