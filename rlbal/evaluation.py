"""Held-out evaluation: sample, score, and turn the scores into figures with intervals.

`evaluate_policy` knows nothing of models: it is given a function that generates (see `rlbal.sampling`), a reward suite
and, on several processes, a function that gathers arrays. Scores are in `rlbal.scoring`, figures in
`rlbal.scoring_stats`.

Prompts are sampled without a token budget, greedily too if the recipe says so, and at a budget if there is one. Prompts
that tell a budget tell the longest completion where there is none.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from rlbal.errors import DataError, RewardError, RunError, nearest
from rlbal.prompts.budget import longest_completion, tell_budget
from rlbal.recipe import Recipe
from rlbal.rewards.outcomes import Failure, merge, verdict
from rlbal.scoring import Gather, Prompt, Sample, Share, Suite, Table, score_samples
from rlbal.scoring_stats import Array, averages, bootstrap_intervals, by_difficulty, left_out, per_prompt

if TYPE_CHECKING:
    from datasets import Dataset

# (prompts, their positions in the whole evaluation, greedy, longest completion in tokens) -> the samples of each prompt
Generate = Callable[[list[Prompt], list[int], bool, int], list[list[Sample]]]


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        metrics: means over prompts: `pass@k`, `mean@k`, `reward/<name>`, `length/mean` and `length/truncated`; with
            greedy decoding `greedy/pass@1`, `greedy/reward/<name>`, `greedy/length/...`; at a token budget all of the
            first kind as `budget/...`. NaN: nothing to average.
        intervals: 95 % bootstrap intervals over prompts, for every metric.
        left_out: metric -> prompts that have no value for it, where there are any.
        by_difficulty: value of the difficulty column -> its `prompts` and `metrics`, in ascending order.
        missing: reward -> scores that are missing, in all kinds together, where there are any.
        failures: reward -> reason -> scores that failed; rows that even out the processes' shares count twice.
        prompts: number of prompts.
        samples: number of samples of the first kind.
        settings: what was sampled with; with a token budget also `budget` and `budget_max_new_tokens`.
        examples: a few rows with `prompt`, `completion`, `rewards`, `truncated`, `greedy` and, at a token budget,
            `budget`; hostile text, unescaped.
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


class Condition(NamedTuple):
    """One way of sampling the held-out prompts.

    Attributes:
        prefix: of its metrics' names.
        greedy: one completion of the likeliest tokens per prompt.
        told: tokens, where prompts tell a budget.
        limit: longest completion in tokens.
    """

    prefix: str
    greedy: bool
    told: int
    limit: int


def conditions(recipe: Recipe, limit: int, budget: int | None) -> list[Condition]:
    """How the prompts are sampled: without a budget, greedily if the recipe says so, and at the budget.

    Args:
        recipe: its `evaluation.greedy` and `budget`.
        limit: longest completion in tokens without a budget.
        budget: in tokens; None for none.
    """
    found = [Condition("", False, limit, limit)]
    if recipe.evaluation.greedy:
        found.append(Condition("greedy/", True, limit, limit))
    if budget is not None:
        found.append(Condition("budget/", False, budget, longest_completion(recipe.budget, budget, limit)))
    return found


class _Measured(NamedTuple):
    """What one condition shows.

    Attributes:
        columns: metric -> (P,).
        missing: (K,) scores that are missing.
        failures: over all processes.
        examples: this process's own.
    """

    columns: dict[str, Array]
    missing: Array
    failures: list[Failure]
    examples: list[dict[str, Any]]


def _measure(
    generate: Generate, table: Table, suite: Suite, recipe: Recipe, share: Share, condition: Condition
) -> _Measured:
    """Sample this process's rows in one way, score them, and gather the scores of all."""
    told = tell_budget(table, recipe, condition.told)
    samples = generate(told["prompt"], share.positions, condition.greedy, condition.limit)
    local_PSK, shown = score_samples(suite, told, samples, share)
    failed = share.failures(suite)
    if problem := verdict(failed, local_PSK[:, :, 0].size * share.num_processes, recipe.rewards):
        raise RewardError(f"evaluation: {problem}")
    scores_PSK = share.in_order(local_PSK)
    names, success = list(suite.names), recipe.rewards.success_name
    rewards_PSK, declared = scores_PSK[:, :, : len(names)], recipe.rewards.functions[success].range
    columns = per_prompt(
        rewards_PSK,
        lengths_PS=scores_PSK[:, :, -2],
        truncated_PS=scores_PSK[:, :, -1],
        names=names,
        success=success,
        success_range=_check_success(rewards_PSK[:, :, names.index(success)], success, declared),
        pass_at=[1] if condition.greedy else recipe.evaluation.pass_at,
        prefix=condition.prefix,
    )
    budget = {"budget": condition.told} if condition.prefix == "budget/" else {}
    examples = [{**example, "greedy": condition.greedy, **budget} for example in shown]
    return _Measured(columns, np.isnan(rewards_PSK).sum(axis=(0, 1)), failed, examples)


def evaluate_policy(
    generate: Generate,
    rows: "Dataset",
    suite: Suite,
    recipe: Recipe,
    *,
    max_new_tokens: int,
    budget: int | None = None,
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
        suite: the rewards; one call per way of sampling.
        recipe: its sections `evaluation`, `rewards` and `budget`, its templates, `data.difficulty` and seed.
        max_new_tokens: longest completion.
        budget: sample at this token budget too: prompts and the column `token_budget` hold it, and completions end
            where training ends them.
        gather: collects rows over processes; needed when `num_processes` is above 1.

    Raises:
        DataError: no rows, or no difficulty column.
        RewardError: rewards failed more often than `rewards.on_error` allows (on every process alike), or the success
            reward leaves its range.
    """
    settings, count = recipe.evaluation, _rows_to_use(rows, recipe)
    share = Share(count, gather, process_index, num_processes)
    table = rows.select(share.positions)[:]
    ways = conditions(recipe, max_new_tokens, budget)
    measured = [_measure(generate, table, suite, recipe, share, way) for way in ways]
    columns = {name: values_P for one in measured for name, values_P in one.columns.items()}
    missing = np.sum([one.missing for one in measured], axis=0)
    failures: dict[str, dict[str, int]] = {}
    for failure in merge(failure for one in measured for failure in one.failures):
        failures.setdefault(failure.reward, {})[failure.reason] = failure.count
    by_column = recipe.data.difficulty
    used = settings.model_dump(include={"samples_per_prompt", "temperature", "top_p", "top_k"})
    used |= {"max_new_tokens": max_new_tokens, "seed": recipe.seed}
    if budget is not None:
        used |= {"budget": budget, "budget_max_new_tokens": ways[-1].limit}
    return Evaluation(
        metrics=averages(columns),
        intervals=bootstrap_intervals(columns, recipe.seed),
        left_out=left_out(columns),
        by_difficulty=by_difficulty(rows[:count][by_column], columns) if by_column else {},
        missing={name: int(number) for name, number in zip(suite.names, missing, strict=True) if number},
        failures=failures,
        prompts=count,
        samples=count * settings.samples_per_prompt,
        settings=used,
        examples=[example for one in measured for example in one.examples],
    )
