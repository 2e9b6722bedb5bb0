"""What the reward functions share: reading the text of a completion."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Completion = str | list[dict[str, Any]]


def completion_text(completion: Completion) -> str:
    """The text of a plain or a conversational completion (its last message)."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def last_answer(text: str) -> str | None:
    """What stands in the last closed `<answer>…</answer>`, stripped; None without one. Linear time."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}`, stripped; None without one or when its braces do not balance."""
    opening = "\\boxed{"
    found = text.rfind(opening)
    if found < 0:
        return None
    start = position = found + len(opening)
    depth = 1
    while position < len(text):
        if text[position] == "\\":  # `\{` and `\}` are characters, not braces
            position += 1
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip()
        position += 1
    return None


def must_sandbox(function: Function) -> Function:
    """Mark a scorer that a completion can hang or abuse: rlbal runs it in worker processes only."""
    function.must_sandbox = True  # type: ignore[attr-defined]
    return function
