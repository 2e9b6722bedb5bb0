"""Held-out evaluation: sample, score, and turn the scores into figures with intervals.

`evaluate_policy` knows nothing of models: it is given a function that generates (see `rlbal.sampling`), a reward suite
and, on several processes, a function that gathers arrays. The figures themselves are in `rlbal.scoring_stats`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from rlbal.errors import DataError, RewardError, RunError, nearest
from rlbal.recipe import Recipe
from rlbal.rewards.loading import MEAN_LENGTH
from rlbal.rewards.outcomes import Failure, Reason, verdict
from rlbal.scoring_stats import Array, averages, bootstrap_intervals, by_difficulty, left_out, per_prompt

if TYPE_CHECKING:
    from datasets import Dataset

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

    def take_failures(self) -> list[Failure]:
        """What failed in this process since the last call."""


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
        failures: reward -> reason -> scores that failed; rows that even out the processes' shares count twice.
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
    failures: dict[str, dict[str, int]]
    prompts: int
    samples: int
    settings: dict[str, Any]
    examples: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """A line of `evaluations.jsonl`: plain finite JSON, with null for NaN."""
        return _finite(asdict(self))

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Self:
        """The evaluation of a line that `to_json` gave; keys that others added to it are left aside.

        Raises:
            RunError: a key is missing.
        """
        if missing := [field.name for field in fields(cls) if field.name not in line]:
            raise RunError(f"this line of evaluations.jsonl has no `{missing[0]}`, so it is no evaluation")
        values = {field.name: _with_nan(line[field.name]) for field in fields(cls)}
        return cls(**{**values, "intervals": {name: tuple(ends) for name, ends in values["intervals"].items()}})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def share_of_rows(count: int, process_index: int, num_processes: int) -> list[int]:
    """Positions of one process's rows: every `num_processes`-th, wrapping round so that all have equally many."""
    per_process = math.ceil(count / num_processes)
    return [(process_index + turn * num_processes) % count for turn in range(per_process)]


def score_texts(
    suite: Suite, table: dict[str, list[Any]], texts: list[str], ids: list[list[int]], mean_length: float | None = None
) -> Array:
    """Score completions outside TRL, in one call, so that rewards relative to the batch see all of it.

    Args:
        suite: the K rewards.
        table: P rows as columns, `prompt` among them.
        texts: P x S completions, the S of a row one after another.
        ids: their tokens.
        mean_length: mean completion length in tokens over all processes; default over these.

    Returns:
        (P * S, K) raw rewards, NaN where missing.
    """
    per_row = len(texts) // len(table["prompt"])
    columns = {name: [value for value in values for _ in range(per_row)] for name, values in table.items()}
    prompts = columns.pop("prompt")
    completions: list[Any] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    if mean_length is None:
        mean_length = sum(map(len, ids)) / len(ids)
    columns[MEAN_LENGTH] = [mean_length] * len(texts)
    return np.asarray(suite.score(prompts, completions, ids, columns), dtype=float)


def _score(
    suite: Suite, table: dict[str, list[Any]], samples: list[list[Sample]], in_order: Gather
) -> tuple[Array, list[dict[str, Any]]]:
    """Score every sample.

    Args:
        suite: the K rewards.
        table: P rows as columns.
        samples: S samples of each row.
        in_order: this process's rows -> all rows of the evaluation, once each.

    Returns:
        (P, S, K + 2): rewards, length in tokens, 1 if truncated; and the first sample of the first prompts to show.
    """
    flat = [sample for row in samples for sample in row]
    lengths = np.array([[len(sample.ids), sample.truncated] for sample in flat], dtype=float)
    mean_length = in_order(lengths[:, 0].reshape(len(samples), -1)).mean()
    rewards_NK = score_texts(
        suite, table, [sample.text for sample in flat], [sample.ids for sample in flat], float(mean_length)
    )
    scores_PSK = np.concatenate([rewards_NK, lengths], axis=1).reshape(len(samples), len(samples[0]), -1)
    examples = [
        {
            "prompt": table["prompt"][row],
            "completion": samples[row][0].text,
            "rewards": dict(zip(suite.names, scores_PSK[row, 0, :-2].tolist(), strict=True)),
            "truncated": samples[row][0].truncated,
        }
        for row in range(min(EXAMPLES, len(samples)))
    ]
    return scores_PSK, examples


def _check_success(success_PS: Array, name: str, declared: tuple[float, float] | None) -> tuple[float, float]:
    """The success reward's range, after a look at whether its values keep to it."""
    low, high = declared or (0.0, 1.0)
    values = success_PS[~np.isnan(success_PS)]
    slack = 1e-6 * (high - low)  # gathered values may have been rounded to single precision
    outside = values[(values < low - slack) | (values > high + slack)]
    if len(outside):
        raise RewardError(
            f"reward `{name}` says whether a sample succeeded and gave {outside[0]:g}, outside [{low:g}, {high:g}]",
            why="pass@k and mean@k need it on a scale from failed to solved",
            fix=f"set `rewards.functions.{name}.range` to the lowest and highest value it gives",
        )
    return low, high


def _in_order(local_PSK: Array, *, positions: list[int], count: int, gather: Gather | None) -> Array:
    """Gather all processes' rows and put each at its position; rows that pad a share fall on their twins."""
    position_P1 = np.array(positions, dtype=float)[:, None]
    flat = np.concatenate([position_P1, local_PSK.reshape(len(positions), -1)], axis=1)
    gathered = flat if gather is None else gather(flat)
    scores = np.full((count, flat.shape[1] - 1), np.nan)
    scores[gathered[:, 0].astype(int)] = gathered[:, 1:]
    return scores.reshape(count, *local_PSK.shape[1:])


def _all_failures(suite: Suite, gather: Gather | None) -> list[Failure]:
    """Failures over all processes, from counts alone; the examples are this process's own."""
    found = {(failure.reward, failure.reason): failure for failure in suite.take_failures()}
    kinds = [(name, reason) for name in suite.names for reason in get_args(Reason)]
    counts = np.array([[found[kind].count if kind in found else 0 for kind in kinds]], dtype=float)
    totals = (counts if gather is None else gather(counts)).sum(axis=0)
    return [
        Failure(*kind, int(total), found[kind].example if kind in found else "failed on another process")
        for kind, total in zip(kinds, totals, strict=True)
        if total
    ]


def _rows_to_use(rows: "Dataset", recipe: Recipe) -> int:
    """How many rows, from the first, the evaluation takes."""
    difficulty = recipe.data.difficulty
    count = min(len(rows), recipe.evaluation.prompts or len(rows))
    if count == 0:
        raise DataError("there are no held-out rows to evaluate on", fix="set `data.eval_size` above 0")
    if difficulty is not None and difficulty not in rows.column_names:
        raise DataError(
            f"`data.difficulty` names the column `{difficulty}`, which the held-out rows do not have",
            fix=nearest(difficulty, rows.column_names),
        )
    return count


def evaluate_policy(
    generate: Generate,
    rows: "Dataset",
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
        RewardError: rewards failed more often than `rewards.on_error` allows (on every process alike), or the success
            reward leaves its range.
    """
    settings, success, names = recipe.evaluation, recipe.rewards.success_name, list(suite.names)
    count = _rows_to_use(rows, recipe)
    positions = share_of_rows(count, process_index, num_processes)
    table = rows.select(positions)[:]
    in_order = partial(_in_order, positions=positions, count=count, gather=gather)
    columns: dict[str, Array] = {}
    examples: list[dict[str, Any]] = []
    failures: dict[str, dict[str, int]] = {}
    missing = np.zeros(len(names), dtype=int)
    for greedy in [False, True] if settings.greedy else [False]:
        local_PSK, shown = _score(suite, table, generate(table["prompt"], positions, greedy), in_order)
        failed = _all_failures(suite, gather)
        if problem := verdict(failed, local_PSK[:, :, 0].size * num_processes, recipe.rewards):
            raise RewardError(f"evaluation: {problem}")
        scores_PSK = in_order(local_PSK)
        rewards_PSK = scores_PSK[:, :, : len(names)]
        declared = recipe.rewards.functions[success].range
        columns |= per_prompt(
            rewards_PSK,
            lengths_PS=scores_PSK[:, :, -2],
            truncated_PS=scores_PSK[:, :, -1],
            names=names,
            success=success,
            success_range=_check_success(rewards_PSK[:, :, names.index(success)], success, declared),
            pass_at=[1] if greedy else settings.pass_at,
            prefix="greedy/" if greedy else "",
        )
        for failure in failed:
            reasons = failures.setdefault(failure.reward, {})
            reasons[failure.reason] = reasons.get(failure.reason, 0) + failure.count
        missing += np.isnan(rewards_PSK).sum(axis=(0, 1))
        examples += [{**example, "greedy": greedy} for example in shown]
    by_column = recipe.data.difficulty
    used = settings.model_dump(include={"samples_per_prompt", "temperature", "top_p", "top_k"})
    return Evaluation(
        metrics=averages(columns),
        intervals=bootstrap_intervals(columns, recipe.seed),
        left_out=left_out(columns),
        by_difficulty=by_difficulty(rows[:count][by_column], columns) if by_column else {},
        missing={name: int(number) for name, number in zip(names, missing, strict=True) if number},
        failures=failures,
        prompts=count,
        samples=count * settings.samples_per_prompt,
        settings={**used, "max_new_tokens": max_new_tokens, "seed": recipe.seed},
        examples=examples,
    )
