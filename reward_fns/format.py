"""Is the completion written in the form that was asked for? Every check is linear in the length of the completion."""

from collections.abc import Sequence
from typing import Any

from reward_fns._text import Completion, completion_text, last_boxed

THINK_ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_answer(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """1 for one `<think>…</think>`, then one `<answer>…</answer>`, and nothing else but white space; 0 otherwise."""
    return [float(_is_think_answer(completion_text(completion).strip())) for completion in completions]


def _is_think_answer(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in THINK_ANSWER_TAGS):
        return False
    think, end_of_think, answer, end_of_answer = (text.index(tag) for tag in THINK_ANSWER_TAGS)
    return (
        think == 0
        and think < end_of_think < answer < end_of_answer
        and not text[end_of_think + len("</think>") : answer].strip()
        and end_of_answer + len("</answer>") == len(text)
    )


def boxed(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    r"""1 for exactly one `\boxed{…}` whose braces balance and which is not empty; 0 otherwise."""
    texts = [completion_text(completion) for completion in completions]
    return [float(text.count("\\boxed{") == 1 and bool(last_boxed(text))) for text in texts]
