"""Correctness by the scorer of the reasoning-gym task that a row comes from."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from reward_fns._text import Completion, completion_text, last_answer, must_sandbox
from rlbal.errors import RewardError, nearest
from rlbal.rewards.gym_tasks import UNSAFE_TASKS

# Tasks whose scorers compare `metadata["output"]` with a tuple of tuples, which JSON turns into lists.
GRID_TASKS = frozenset({"arc_agi", "rearc"})


@must_sandbox
def score(
    completions: Sequence[Completion],
    question: Sequence[str],
    answer: Sequence[str | None],
    metadata: Sequence[str],
    unsafe: bool = False,
    require_tag: bool = True,
    configs: dict[str, dict[str, Any]] | None = None,
    **kwargs: Any,
) -> list[float]:
    """Score what stands in the last `<answer>…</answer>` with the task's own scorer, which mostly gives 0 to 1.

    Args:
        completions: N completions, plain or conversational.
        question: N questions, as the task made them.
        answer: N gold answers; None where the task accepts any valid solution.
        metadata: N JSON strings of the task's metadata; `source_dataset` in it names the task.
        unsafe: allow scorers that evaluate text as code (`UNSAFE_TASKS`); rlbal passes the recipe's `unsafe`.
        require_tag: a completion without the tag scores 0; otherwise its whole text is the answer.
        configs: the options that each task was made with, where its scorer depends on them (puzzle24's largest
            number, decimal_arithmetic's precision); a task that is not named is scored with its default options.

    Raises:
        RewardError: metadata that is not reasoning-gym's, an unknown task, or one that evaluates code unasked.
    """
    scores = []
    for completion, row_question, row_answer, row_metadata in zip(completions, question, answer, metadata, strict=True):
        facts, task = _read_metadata(row_metadata)
        if task in UNSAFE_TASKS and not unsafe:
            raise RewardError(
                f"the scorer of the reasoning-gym task `{task}` evaluates text as Python code",
                why="a completion could run anything through it",
                fix="choose another task, or accept the risk with `rewards.functions.<name>.unsafe: true`",
            )
        text = completion_text(completion)
        given = last_answer(text) if require_tag else last_answer(text) or text.strip()
        if given is None:
            scores.append(0.0)
            continue
        entry = {"question": row_question, "answer": row_answer, "metadata": facts}
        scores.append(float(_scorer(task, json.dumps((configs or {}).get(task, {})))(given, entry)))
    return scores


@cache
def _scorer(task: str, config: str) -> Callable[[str, dict[str, Any]], float]:
    return reasoning_gym.create_dataset(task, **json.loads(config)).score_answer


def _read_metadata(text: str) -> tuple[dict[str, Any], str]:
    """Metadata as the scorers want it, and the name of the task."""
    try:
        facts = json.loads(text)
        task = facts["source_dataset"]
    except (TypeError, ValueError, KeyError):
        raise RewardError(
            f"the column `metadata` holds {str(text)[:80]!r}, which is not reasoning-gym's metadata as JSON",
            why="the scorer is chosen by `source_dataset` in it",
            fix="use `data.source: reasoning_gym`, or another correctness reward for this dataset",
        ) from None
    if task not in DATASETS:
        raise RewardError(f"reasoning-gym has no task `{task}`", fix=nearest(str(task), DATASETS))
    if task in GRID_TASKS:
        facts["output"] = tuple(tuple(row) for row in facts["output"])
    return facts, task
