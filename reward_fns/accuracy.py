r"""Is the answer right? Symbolically by math-verify, or as text.

What is graded is the content of the last `<answer>…</answer>`, and the whole completion where there is no such tag.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import math_verify

from reward_fns._text import Completion, completion_text, last_answer, last_boxed, must_sandbox

# What is left of a formula once commands and \text{…} are gone holds no such word; prose does.
COMMANDS = re.compile(r"\\text\w*\s*\{[^{}]*\}|\\[a-zA-Z]+")
TEXT = re.compile(r"\A\\text\w*\{([^{}]*)\}\Z")
WORD = re.compile(r"[a-zA-Z]{3}")
MATH_DELIMITERS = ("$", "\\(", "\\[", "\\boxed")


@must_sandbox
def math_correct(completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any) -> list[float]:
    r"""1 where the completion's answer equals the gold `answer` as mathematics, 0 elsewhere.

    Both may be worked solutions that end in `#### value` or hold a `\boxed{…}`, or a bare number or LaTeX formula. A
    gold answer that math-verify cannot read is compared as text; white space, case and LaTeX wrapping do not count.

    A completion can keep math-verify busy for ever. Its own time limit needs signals, which work in main threads only
    and score a timed-out row 0 as if it were wrong; so it is off here, and rlbal kills the worker process instead. In
    plain TRL there is no limit.
    """
    return [
        float(_is_correct(_graded_text(completion), str(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def exact_match(completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """1 where the completion's answer is the gold `answer` up to white space, 0 elsewhere."""
    return [
        float(_graded_text(completion).split() == str(gold).split())
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _graded_text(completion: Completion) -> str:
    text = completion_text(completion)
    tagged = last_answer(text)
    return text if tagged is None else tagged


def _is_correct(text: str, gold: str) -> bool:
    if not (gold_values := _parse_gold(gold)):
        return _as_text(text).casefold() == _as_text(gold).casefold()
    if _as_text(text) == _as_text(gold):
        return True  # also where the symbolic reading differs, as between `\text{Friday}` and `Friday`
    return bool(math_verify.verify(gold_values, _parse(text), timeout_seconds=None))


def _parse(text: str) -> list[Any]:
    """What math-verify reads: an expression and its source text, or an empty list."""
    text = text.rpartition("####")[2].strip()
    is_prose = WORD.search(COMMANDS.sub("", text)) is not None
    if not is_prose and not any(mark in text for mark in MATH_DELIMITERS):
        text = f"${text}$"  # a bare formula; math-verify looks for LaTeX between delimiters only
    return math_verify.parse(text, parsing_timeout=None)


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[Any]:
    """A gold answer comes back for every rollout of its prompt. Without an expression it counts as not readable."""
    values = _parse(gold)
    return values if any(not isinstance(value, str) for value in values) else []


def _as_text(text: str) -> str:
    r"""The value in `text` without white space, outer `$`, a final dot and an outer `\text{…}`."""
    value = text.rpartition("####")[2]
    boxed = last_boxed(value)
    value = "".join((value if boxed is None else boxed).split()).strip("$").rstrip(".")
    return TEXT.sub(r"\1", value)
