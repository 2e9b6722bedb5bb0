"""A reward that says when it ran."""

import time
from typing import Any


def seconds_since(completions: list[Any], start: float, **kwargs: Any) -> list[float]:
    """Seconds from `start` on the monotonic clock, which processes share."""
    return [time.monotonic() - start for _ in completions]
