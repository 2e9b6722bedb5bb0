"""Calling a reward function inside the trainer's process, on the whole batch.

Nothing here can be killed. With a time limit, an async function is cancelled at its next `await`; a synchronous one is
interrupted at its next line of Python, and only when called from the main thread.
"""

import asyncio
import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from rlbal.rewards.outcomes import Fault, Outcome, outcomes


class InPlaceTimeout(BaseException):
    """A reward in the trainer's process took too long; no `except Exception` of the reward should hide it."""


def call(
    function: Callable[[], Any], N: int, bounds: tuple[float, float] | None, seconds: float | None
) -> list[Outcome]:
    """Score N completions; a failure of the function is a fault of every row."""
    try:
        with _time_limit(seconds):
            return outcomes(function(), N, bounds)
    except InPlaceTimeout:
        return [_too_slow(N, seconds)] * N
    except (Exception, SystemExit) as error:
        return [Fault("raised", f"raised {type(error).__name__}: {error}")] * N


async def call_async(
    function: Callable[[], Any], N: int, bounds: tuple[float, float] | None, seconds: float | None
) -> list[Outcome]:
    """As `call`, for an async function."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return outcomes(await function(), N, bounds)
    except (Exception, SystemExit) as error:
        if limit.expired():
            return [_too_slow(N, seconds)] * N
        return [Fault("raised", f"raised {type(error).__name__}: {error}")] * N


def _too_slow(N: int, seconds: float | None) -> Fault:
    return Fault("timeout", f"was not done with {N} completions after {seconds:g} s")


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine, for functions, partials and callable objects."""
    inner: Any = function
    while isinstance(inner, partial):
        inner = inner.func
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `InPlaceTimeout` inside the block after `seconds`; without effect outside the main thread."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise InPlaceTimeout

    handler = signal.signal(signal.SIGALRM, interrupt)
    earlier = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *earlier)
        signal.signal(signal.SIGALRM, handler)
