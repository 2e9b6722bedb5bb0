"""Reward functions for tests; `run_code` gives a completion everything that a hostile one could want."""

import asyncio
import time
from typing import Any

STATE = {"rows": 0.0}


def run_code(completions: list[str], **kwargs: Any) -> list[float]:
    """Run each completion as Python; it sets `score`."""
    scores = []
    for completion in completions:
        scope: dict[str, Any] = {"STATE": STATE}
        exec(completion, scope)  # noqa: S102 - what the sandbox is for
        scores.append(scope["score"])
    return scores


def returns(completions: list[str], value: Any, **kwargs: Any) -> Any:
    """Whatever the recipe says, `value`."""
    return value


def nan(completions: list[str], **kwargs: Any) -> list[float]:
    return [float("nan")] * len(completions)


def infinite(completions: list[str], **kwargs: Any) -> list[float]:
    return [-float("inf")] * len(completions)


def raises(completions: list[str], **kwargs: Any) -> list[float]:
    raise KeyError("gold")


def hangs(completions: list[str], **kwargs: Any) -> list[float]:
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            return [1.0] * len(completions)


async def hangs_async(completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(60)
    return [1.0] * len(completions)


WAITING = {"now": 0, "most": 0}


async def length_async(completions: list[str], **kwargs: Any) -> list[float]:
    WAITING["now"] += 1
    WAITING["most"] = max(WAITING.values())
    await asyncio.sleep(0.05)
    WAITING["now"] -= 1
    return [float(len(completion)) for completion in completions]


def length_or_none(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [float(len(completion)) if completion else None for completion in completions]


def wants_state(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
    return [float(trainer_state)] * len(completions)


def matches(completions: list[str], answer: list[str], bonus: float = 0.0) -> list[float]:
    """No `**kwargs`: it can take nothing but what it names."""
    return [float(one == gold) + bonus for one, gold in zip(completions, answer, strict=True)]


def mean_by_any(completions: list[str], **kwargs: Any) -> list[float]:
    """The batch's mean length if it was given, else -1."""
    return kwargs.get("mean_completion_length", [-1.0] * len(completions))


def mean_by_name(completions: list[str], mean_completion_length: list[float] | None = None) -> list[float]:
    return mean_completion_length or [-1.0] * len(completions)


NOT_A_FUNCTION = 3
