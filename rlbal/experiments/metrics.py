"""The figures that runs are compared by: their names, values, directions, and what they were measured with."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from rlbal.errors import RunError, nearest
from rlbal.experiments.arms import Arm, flat
from rlbal.experiments.results import RECENT_STEPS, RunResult, number
from rlbal.experiments.statistics import Direction

COST = ("rollouts", "tokens_generated", "flops", "gpu_seconds")  # cumulative, with every evaluation
TRAIN = "train/"  # prefix of a key of metrics.jsonl
UNITS = {"length/mean": "tokens", "rollouts": "rollouts", "tokens_generated": "tokens", "gpu_seconds": "seconds"}
# Keys of `data` that say nothing about the held-out problems.
TRAIN_ONLY = {"data.max_rows", "data.max_prompt_tokens", "data.overlong", "data.difficulty"}
# With `eval_path` or `eval_split`, neither do these.
WITH_OWN_EVALUATION_DATA = {"data.eval_path": {"data.path", "data.eval_size"}, "data.eval_split": {"data.split"}}


def value_of(result: RunResult, metric: str) -> float:
    """A run's value of a metric, NaN if it has none.

    Of the run's last evaluation; for `train/<key>`, the mean of metrics.jsonl's `<key>` over the last 10 steps, since
    one batch is a small sample.
    """
    if metric.startswith(TRAIN):
        values = [number(record.get(metric.removeprefix(TRAIN))) for record in result.recent]
        values = [value for value in values if not math.isnan(value)]
        return float(np.mean(values)) if values else math.nan
    if metric in COST:
        return number(result.evaluation.get(metric, result.recent[-1].get(metric) if result.recent else None))
    return number(result.evaluation.get("metrics", {}).get(metric))


def describe(metric: str) -> str:
    """The metric's name with its direction and, if it is not from the last evaluation, where it is from."""
    source = f"training, mean of the last {RECENT_STEPS} steps" if metric.startswith(TRAIN) else ""
    way = {"up": "higher is better", "down": "lower is better", None: ""}[direction(metric)]
    return f"{metric.removeprefix(TRAIN)} ({', '.join(part for part in (source, way) if part)})".replace(" ()", "")


def direction(metric: str) -> Direction | None:
    """Which way is better: scores up; lengths, cost and time down; None for what is neither."""
    name = _bare(metric)
    if metric in COST or name in ("length/mean", "length/truncated", "step_time") or name.startswith("time/"):
        return "down"
    if name.startswith(("pass@", "mean@")):
        return "up"
    if name.startswith("reward/"):
        return "up" if not metric.startswith(TRAIN) or name.endswith("/mean") else None
    return None


def unit(metric: str) -> str:
    """The metric's unit, empty for shares and scores."""
    return UNITS.get(_bare(metric), "")


def _bare(metric: str) -> str:
    """The name without what says where and how it was measured."""
    return metric.removeprefix(TRAIN).removeprefix("greedy/").removeprefix("budget/")


def choose_metrics(asked: Iterable[str], results: list[RunResult]) -> tuple[list[str], list[str]]:
    """The metrics to compare by their full names, and notes about the choice.

    Asked for nothing: pass@k, all rewards and the mean length of the last evaluation, without those that equal another
    in every run (the success reward often equals pass@1) and would only dilute the correction for many comparisons.

    Raises:
        RunError: no run has a metric asked for, or nothing is asked for and no run has an evaluation.
    """
    evaluated = [name for result in results for name in result.evaluation.get("metrics", {})]
    if chosen := [_full_name(name, set(evaluated), results) for name in asked]:
        return list(dict.fromkeys(chosen)), []
    shown = [
        name for name in dict.fromkeys(evaluated) if name.startswith(("pass@", "reward/")) or name == "length/mean"
    ]
    if not shown:
        raise RunError(
            "no run has an evaluation",
            why="`evaluation.at_end` was off or no rows were held out",
            fix="compare figures of the training: --metric reward/<name>/mean, or any key of metrics.jsonl",
        )
    kept: dict[str, list[float]] = {}
    notes = []
    for name in shown:
        values = [value_of(result, name) for result in results]
        twin = next((other for other in kept if np.array_equal(kept[other], values, equal_nan=True)), None)
        if twin is None:
            kept[name] = values
        else:
            notes.append(f"`{name}` equals `{twin}` in every run and is not shown")
    return list(kept), notes


def _full_name(name: str, evaluated: set[str], results: list[RunResult]) -> str:
    recorded = {
        key
        for result in results
        for record in result.recent
        for key, value in record.items()
        if not math.isnan(number(value))
    }
    if name in evaluated or name in COST:
        return name
    if name.removeprefix(TRAIN) in recorded:
        return TRAIN + name.removeprefix(TRAIN)
    hint = nearest(name, evaluated | recorded | set(COST))
    raise RunError(
        f"no run has the metric `{name}`. {hint}".strip(),
        fix="metrics are the keys of evaluations.jsonl's `metrics` and of metrics.jsonl",
    )


def measured_with(arm: Arm, metric: str) -> dict[str, Any]:
    """All that decides what an evaluation's metric means, flat; empty for training and cost.

    The held-out problems and their samples also depend on the seed, which is matched.
    """
    if metric.startswith(TRAIN) or metric in COST:
        return {}
    recipe = flat(arm.first.recipe.model_dump(mode="json"))
    leave = set(TRAIN_ONLY)
    for key, others in WITH_OWN_EVALUATION_DATA.items():
        leave |= others if recipe.get(key) else set()
    found = {key: value for key, value in recipe.items() if key.startswith("data.") and key not in leave}
    found["evaluation.prompts"] = recipe.get("evaluation.prompts")
    settings = arm.first.evaluation.get("settings", {})
    at_budget = metric.startswith("budget/")
    settings = {key: value for key, value in settings.items() if at_budget or not key.startswith("budget")}
    found |= {f"evaluation.{key}": value for key, value in settings.items() if key != "seed"}
    return found | _reward_keys(arm, metric)


def _reward_keys(arm: Arm, metric: str) -> dict[str, Any]:
    """The keys of the reward that a metric is made of: not its weight, which only training sees."""
    rewards, name = arm.first.recipe.rewards, _bare(metric)
    if name.startswith(("pass@", "mean@")):
        reward = rewards.success_name
    elif name.startswith("reward/") and name.removeprefix("reward/") in rewards.functions:
        reward = name.removeprefix("reward/")
    else:
        return {}
    spec = rewards.functions[reward].model_dump(mode="json")
    found = flat({key: spec[key] for key in ("function", "args", "range")}, f"rewards.functions.{reward}.")
    if spec["function"].startswith("reward_fns.length:"):  # with a schedule the budget shown is the target
        found["budget.schedule"] = "none" if arm.first.recipe.budget.schedule == "none" else "any"
    return found
