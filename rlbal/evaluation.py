"""Held-out evaluation: sample, score, and turn the scores into figures with intervals.

`evaluate_policy` knows nothing of models: it is given a function that generates (see `rlbal.sampling`), a reward suite
and, on several processes, a function that gathers arrays. The figures themselves are in `rlbal.scoring_stats`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from rlbal.errors import DataError, RewardError, nearest
from rlbal.recipe import Recipe
from rlbal.scoring_stats import Array, averages, bootstrap_intervals, left_out, per_prompt

Prompt = str | list[dict[str, Any]]
EXAMPLES = 4


class Sample(NamedTuple):
    """One completion: token ids with the end token if there is one, the text without special tokens."""

    ids: list[int]
    text: str
    truncated: bool


class Suite(Protocol):
    """What evaluation needs of `rlbal.rewards.RewardSuite`."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the K rewards."""

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: dict[str, list[Any]]
    ) -> NDArray[np.floating[Any]]:
        """(N, K) raw rewards, NaN where a reward is missing."""


# (prompts, their positions in the whole evaluation, greedy) -> the samples of each prompt.
Generate = Callable[[list[Prompt], list[int], bool], list[list[Sample]]]
# One process's rows -> the rows of all processes, in order of process.
Gather = Callable[[Array], Array]


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        metrics: means over prompts: `pass@k`, `mean@k`, `reward/<name>`, `length/mean`, `length/truncated`, and
            `greedy/pass@1`, `greedy/reward/<name>`, `greedy/length/...` with greedy decoding. NaN: nothing to average.
        intervals: 95 % bootstrap intervals over prompts, for every metric.
        left_out: metric -> prompts that have no value for it, where there are any.
        by_difficulty: value of the difficulty column -> its `prompts` and `metrics`, in ascending order.
        missing: reward -> scores that are missing, greedy ones included, where there are any.
        prompts: number of prompts.
        samples: number of samples in all, greedy ones not counted.
        settings: what was sampled with.
        examples: a few rows with `prompt`, `completion`, `rewards`, `truncated` and `greedy`; hostile text, unescaped.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    left_out: dict[str, int]
    by_difficulty: dict[str, dict[str, Any]]
    missing: dict[str, int]
    prompts: int
    samples: int
    settings: dict[str, Any]
    examples: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A line of `evaluations.jsonl`: plain finite JSON, with null for NaN."""
        return _finite(asdict(self))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def share_of_rows(count: int, process_index: int, num_processes: int) -> list[int]:
    """Positions of one process's rows: every `num_processes`-th, wrapping round so that all have equally many."""
    per_process = math.ceil(count / num_processes)
    return [(process_index + turn * num_processes) % count for turn in range(per_process)]


def _score(
    suite: Suite, table: dict[str, list[Any]], samples: list[list[Sample]]
) -> tuple[Array, list[dict[str, Any]]]:
    """Score every sample in one call, so that rewards relative to the batch see all of it.

    Returns:
        (P, S, K + 2): rewards, length in tokens, 1 if truncated; and the first sample of the first prompts to show.
    """
    per_row = len(samples[0])
    flat = [sample for row in samples for sample in row]
    columns = {name: [value for value in values for _ in range(per_row)] for name, values in table.items()}
    prompts = columns.pop("prompt")
    completions: list[Any] = [
        sample.text if isinstance(prompt, str) else [{"role": "assistant", "content": sample.text}]
        for prompt, sample in zip(prompts, flat, strict=True)
    ]
    rewards_NK = np.asarray(suite.score(prompts, completions, [sample.ids for sample in flat], columns), dtype=float)
    lengths = [[len(sample.ids), sample.truncated] for sample in flat]
    scores_PSK = np.concatenate([rewards_NK, np.array(lengths, dtype=float)], axis=1).reshape(len(samples), per_row, -1)
    examples = [
        {
            "prompt": table["prompt"][row],
            "completion": samples[row][0].text,
            "rewards": dict(zip(suite.names, scores_PSK[row, 0].tolist(), strict=False)),
            "truncated": samples[row][0].truncated,
        }
        for row in range(min(EXAMPLES, len(samples)))
    ]
    return scores_PSK, examples


def _check_success(success_PS: Array, name: str, declared: tuple[float, float] | None) -> tuple[float, float]:
    """The success reward's range, after a look at whether its values keep to it."""
    low, high = declared or (0.0, 1.0)
    values = success_PS[~np.isnan(success_PS)]
    outside = values[(values < low) | (values > high)]
    if len(outside):
        raise RewardError(
            f"reward `{name}` says whether a sample succeeded and gave {outside[0]:g}, outside [{low:g}, {high:g}]",
            why="pass@k and mean@k need it on a scale from failed to solved",
            fix=f"set `rewards.functions.{name}.range` to the lowest and highest value it gives",
        )
    return low, high


def _in_order(local_PSK: Array, positions: list[int], count: int, gather: Gather | None) -> Array:
    """Gather all processes' rows and put each at its position; rows that pad a share fall on their twins."""
    position_P1 = np.array(positions, dtype=float)[:, None]
    flat = np.concatenate([position_P1, local_PSK.reshape(len(positions), -1)], axis=1)
    gathered = flat if gather is None else gather(flat)
    scores = np.full((count, flat.shape[1] - 1), np.nan)
    scores[gathered[:, 0].astype(int)] = gathered[:, 1:]
    return scores.reshape(count, *local_PSK.shape[1:])


def _numbers_first(text: str) -> tuple[bool, float, str]:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    return (False, number, text) if math.isfinite(number) else (True, 0.0, text)


def _by_difficulty(values: Sequence[Any], columns: dict[str, Array]) -> dict[str, dict[str, Any]]:
    """Metrics of the prompts that share a value; numbers in numeric order, then other values."""
    groups: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        groups.setdefault(str(value), []).append(row)
    return {
        value: {
            "prompts": len(groups[value]),
            "metrics": averages({name: values_P[groups[value]] for name, values_P in columns.items()}),
        }
        for value in sorted(groups, key=_numbers_first)
    }


def evaluate_policy(
    generate: Generate,
    rows: Dataset,
    suite: Suite,
    recipe: Recipe,
    *,
    max_new_tokens: int,
    gather: Gather | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> Evaluation:
    """Evaluate a policy on the first `evaluation.prompts` rows (held-out rows come shuffled by seed).

    On several processes each generates and scores its share of the rows; raw scores are gathered, and every process
    returns the same metrics (examples are its own).

    Args:
        generate: gives `samples_per_prompt` samples per prompt, or one if greedy.
        rows: columns `prompt` and whatever the rewards ask for.
        suite: the rewards; one call per way of decoding.
        recipe: its sections `evaluation`, `rewards` and `data.difficulty`, and its seed.
        max_new_tokens: longest completion, recorded with the result.
        gather: collects rows over processes; needed when `num_processes` is above 1.

    Raises:
        DataError: no rows, or no difficulty column.
        RewardError: the success reward leaves its range.
    """
    settings, success, difficulty = recipe.evaluation, recipe.rewards.success_name, recipe.data.difficulty
    count = min(len(rows), settings.prompts or len(rows))
    if count == 0:
        raise DataError("there are no held-out rows to evaluate on", fix="set `data.eval_size` above 0")
    if difficulty is not None and difficulty not in rows.column_names:
        raise DataError(
            f"`data.difficulty` names the column `{difficulty}`, which the held-out rows do not have",
            fix=nearest(difficulty, rows.column_names),
        )
    positions = share_of_rows(count, process_index, num_processes)
    table = rows.select(positions)[:]
    names = list(suite.names)
    columns: dict[str, Array] = {}
    examples: list[dict[str, Any]] = []
    missing = np.zeros(len(names), dtype=int)
    for greedy in [False, True] if settings.greedy else [False]:
        local_PSK, shown = _score(suite, table, generate(table["prompt"], positions, greedy))
        scores_PSK = _in_order(local_PSK, positions, count, gather)
        success_range = _check_success(
            scores_PSK[:, :, names.index(success)], success, recipe.rewards.functions[success].range
        )
        columns |= per_prompt(
            scores_PSK[:, :, : len(names)],
            lengths_PS=scores_PSK[:, :, -2],
            truncated_PS=scores_PSK[:, :, -1],
            names=names,
            success=success,
            success_range=success_range,
            pass_at=[1] if greedy else settings.pass_at,
            prefix="greedy/" if greedy else "",
        )
        missing += np.isnan(scores_PSK).sum(axis=(0, 1))[: len(names)]
        examples += [{**example, "greedy": greedy} for example in shown]
    return Evaluation(
        metrics=averages(columns),
        intervals=bootstrap_intervals(columns, recipe.seed),
        left_out=left_out(columns),
        by_difficulty=_by_difficulty(rows[:count][difficulty], columns) if difficulty else {},
        missing={name: int(number) for name, number in zip(names, missing, strict=True) if number},
        prompts=count,
        samples=count * settings.samples_per_prompt,
        settings={
            "samples_per_prompt": settings.samples_per_prompt,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "max_new_tokens": max_new_tokens,
            "seed": recipe.seed,
        },
        examples=examples,
    )
