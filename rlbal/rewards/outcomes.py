"""What became of a score: a number, nothing (None), or a fault; and when faults should stop a run."""

import math
import numbers
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # workers import this module and should start fast
    from rlbal.recipe import RewardsSection

Reason = Literal[
    "raised", "timeout", "died", "nan", "infinite", "wrong_count", "not_a_number", "out_of_range"
]  # fmt: skip

LONGEST = 500  # characters of an example that are kept: it travels, and may repeat a completion
LARGEST = 3.4028234663852886e38  # of single precision, in which TRL keeps rewards: beyond it they would be infinite

HINTS: dict[str, str] = {
    "raised": "correct the reward function or its `args`",
    "timeout": "raise `rewards.functions.{name}.timeout`, or make the function faster",
    "died": "raise `rewards.memory_mb` if the function needs the memory",
    "nan": "return None where there is no score",
    "infinite": "return finite numbers",
    "wrong_count": "return one value per completion",
    "not_a_number": "return a float or None for each completion",
    "out_of_range": "correct `rewards.functions.{name}.range` or the function",
}


@dataclass(frozen=True)
class Fault:
    """Why one row has no score, although the function should have given one."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Failure:
    """How often a reward failed for one reason, with one example. `count` is in completions."""

    reward: str
    reason: Reason
    count: int
    example: str


Outcome = float | None | Fault


def outcomes(values: Any, rows: int, bounds: tuple[float, float] | None) -> list[Outcome]:
    """Judge what a reward function returned for `rows` completions; None in it is a legitimate "no score".

    A result of the wrong length or kind is a fault of every row, because none can be attributed.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | dict):
        return [Fault("wrong_count", f"returned {type(values).__name__} instead of a list of {rows}")] * rows
    values = list(values)
    if len(values) != rows:
        return [Fault("wrong_count", f"returned {len(values)} values for {rows} completions")] * rows
    return [_outcome(value, bounds) for value in values]


def _outcome(value: Any, bounds: tuple[float, float] | None) -> Outcome:
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        with suppress(AttributeError, TypeError, ValueError, RuntimeError):
            value = value.item()  # a zero-dimensional tensor or array
    if not isinstance(value, numbers.Real):
        return Fault("not_a_number", f"returned {repr(value)[:80]} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        return Fault("infinite", "returned an integer too large for a float")
    if math.isnan(number):
        return Fault("nan", "returned NaN")
    if abs(number) > LARGEST:
        return Fault("infinite", f"returned {number:g}, which is infinite in single precision")
    if bounds is not None and not bounds[0] <= number <= bounds[1]:
        return Fault("out_of_range", f"returned {number:g}, outside its range [{bounds[0]:g}, {bounds[1]:g}]")
    return number


def merge(failures: Iterable[Failure]) -> list[Failure]:
    """Add up the counts of failures of the same reward and reason, keeping the first example of each."""
    merged: dict[tuple[str, str], Failure] = {}
    for failure in failures:
        key = (failure.reward, failure.reason)
        before = merged.get(key)
        merged[key] = (
            Failure(before.reward, before.reason, before.count + failure.count, before.example) if before else failure
        )
    return list(merged.values())


def verdict(failures: Iterable[Failure], N: int, section: "RewardsSection") -> str | None:
    """Why the run must stop, or None.

    With `on_error: raise` any failure stops it; with `skip`, a reward that failed on more than `max_failed_share` of
    the batch, over all reasons together.

    Args:
        failures: of one batch, over all processes.
        N: completions in that batch over all processes.
        section: the recipe's `rewards`.
    """
    merged = merge(failures)
    for name in dict.fromkeys(failure.reward for failure in merged):
        of_reward = sorted((one for one in merged if one.reward == name), key=lambda one: -one.count)
        share = sum(failure.count for failure in of_reward) / max(N, 1)
        if section.on_error == "raise":
            rule = "`rewards.on_error` is `raise`"
            otherwise = "or set `rewards.on_error: skip` to leave such rows without this reward"
        elif share > section.max_failed_share:
            allowed = f"`rewards.max_failed_share` ({section.max_failed_share:.1%})"
            rule = f"that is {share:.1%} of the batch, more than {allowed}"
            otherwise = "or raise `rewards.max_failed_share`"
        else:
            continue
        worst = of_reward[0]
        counts = ", ".join(f"{failure.reason} {failure.count}" for failure in of_reward)
        return (
            f"reward `{name}` failed on {sum(failure.count for failure in of_reward)} of {N} completions ({counts}); "
            f"for example it {worst.example}\nWhy: {rule}\n"
            f"Fix: {HINTS[worst.reason].format(name=name)}, {otherwise}"
        )
    return None
