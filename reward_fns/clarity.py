r"""Is a worked solution easy to follow? By rules, in time linear in the length of the completion.

The dynamic-weighting paper (arXiv 2509.11452) rewards "clarity" beside accuracy and conciseness and gives no formula.
Its published code scores 1 where a solution has a `\boxed{…}` and either two enumerators or two words such as "first"
and "then", 0 elsewhere. `step_by_step` is our own graded rule in that spirit. It looks at form only: it does not know
whether a step is right, follows from the one before, or says anything at all.
"""

import re
from collections.abc import Sequence
from typing import Any

from reward_fns._text import Completion, completion_text, last_answer, last_boxed

ENOUGH = 3  # steps, and different connectives, for the full mark
ANSWER_LINES = 3  # a stated answer stands among so many last lines; `\[`, `\boxed{4}`, `\]` may be lines of their own
CONNECTIVES = frozenset(
    {"because", "finally", "first", "hence", "implies", "next", "since", "so", "then", "therefore", "thus", "where"}
)
BULLETS = ("- ", "* ", "• ")
EMPHASIS = "#*_> \t"  # Markdown around a step's number
# Every repetition is bounded, so that no text takes more than linear time.
NUMBERED = re.compile(r"(?:step\s{0,3}\d{1,3}\b|\(?(?:\d{1,3}[.):]|[a-z]\))(?=[\s*]|\Z))", re.IGNORECASE)
ORDINAL = re.compile(r"(?:first|second|third|next|then|finally)\b", re.IGNORECASE)
WORD = re.compile(r"[a-z]+")
STATED = re.compile(r"\banswer\b\W{0,8}(?:is\b|[:=])|####", re.IGNORECASE)


def step_by_step(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    r"""(steps + connectives + answer) / 3 · distinct, between 0 and 1.

    steps: lines that open as a step (`1.`, `(a)`, `Step 2`, a bullet, "Next"), none counted twice, 3 for the full mark.
    connectives: different words such as "because" and "therefore", 3 for the full mark.
    answer: 1 if the last three lines state one: `\boxed{…}`, `<answer>…</answer>`, `####`, "answer is" or "answer:".
    distinct: the share of lines that do not repeat an earlier one, so that repetition costs what it would earn.

    Lines are stripped, and empty ones do not count. No line at all scores 0.
    """
    return [_clarity(completion_text(completion)) for completion in completions]


def _clarity(text: str) -> float:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return 0.0
    different = set(lines)
    steps = sum(_opens_a_step(line) for line in different)
    connectives = len(CONNECTIVES.intersection(WORD.findall(text.lower())))
    answer = _states_an_answer("\n".join(lines[-ANSWER_LINES:]))
    marks = min(steps, ENOUGH) / ENOUGH + min(connectives, ENOUGH) / ENOUGH + answer
    return marks / 3 * len(different) / len(lines)


def _opens_a_step(line: str) -> bool:
    bare = line.lstrip(EMPHASIS)
    return line.startswith(BULLETS) or bool(NUMBERED.match(bare) or ORDINAL.match(bare))


def _states_an_answer(ending: str) -> bool:
    return bool(last_boxed(ending) or last_answer(ending) or STATED.search(ending))
