"""Rewards that look at nothing, or have more to say than scores."""

import os
from typing import Any


def by_place(completions: list[str], **kwargs: Any) -> list[float]:
    """Alternates from row to row, whatever is in them: every group has something to learn from."""
    return [float(row % 2) for row in range(len(completions))]


def logging_on_one_process(completions: list[str], log_metric: Any, log_extra: Any, **kwargs: Any) -> list[float]:
    """Logs a metric and a column of text on the second process only."""
    if os.environ["RANK"] == "1":
        log_metric("letters", float(len(completions[0])))
        log_extra("said", list(completions))
    return by_place(completions)


def failing_with_text(completions: list[str], **kwargs: Any) -> list[float]:
    """Fails on the second process, and repeats all it was given."""
    if os.environ["RANK"] == "1":
        raise ValueError(" ".join(completions) * 50)
    return by_place(completions)
