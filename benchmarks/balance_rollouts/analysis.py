"""What the benchmark computes from finished runs: pure functions, one for each figure of the tables."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlbal.experiments.statistics import Difference, holm, paired_difference, verdict
from rlbal.run import RunDirectory, read_jsonl

WINDOW = 3  # evaluations that a smoothed one is the mean of: itself and those before it
STEPS = 10  # steps that a smoothed training figure is the mean of
TENTHS = 11  # success rates 0, 0.1, ..., 1
BY_RATE, BY_SUCCESS = "allocation/by_rate", "allocation/by_success"

Runs = Mapping[str, Mapping[int, dict[str, Any]]]  # arm -> seed -> figures


def trailing_mean(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of each value and those before it, `window` in all, fewer at the beginning: (E,) -> (E,)."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def rollouts_to(rollouts: Sequence[float], correct: Sequence[float], mark: float) -> float | None:
    """Rollouts after which a curve first reaches the mark, linear between its points; None if it never does."""
    reached = np.flatnonzero(np.asarray(correct) >= mark)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0:
        return float(rollouts[0])
    before = after - 1
    share = (mark - correct[before]) / (correct[after] - correct[before])
    return float(rollouts[before] + share * (rollouts[after] - rollouts[before]))


def step_seconds(step: dict[str, Any]) -> float:
    """What an optimizer step took, without evaluation."""
    return sum(value for key, value in step.items() if key.startswith("time/"))


def allocation_run(path: Path) -> dict[str, Any]:
    """The figures of one finished run of the first part.

    Returns:
        `curve`, smoothed held-out correctness by rollouts, and `correct`, its end; `by_difficulty`, over the same
        evaluations as its end; `effective_gradient_ratio`, mean over steps; `by_rate` and `by_success`, [prompts,
        rollouts] of the whole run by success believed before and found in the batch, in tenths; what the run cost.
    """
    run = RunDirectory(path)
    evaluations, steps = list(read_jsonl(run.evaluations_path)), list(read_jsonl(run.metrics_path))
    smoothed = trailing_mean([line["metrics"]["pass@1"] for line in evaluations], WINDOW)
    seconds = sum(map(step_seconds, steps))
    allocate = sum(step["time/allocate"] for step in steps)
    return {
        "correct": float(smoothed[-1]),
        "curve": {"rollouts": [line["rollouts"] for line in evaluations], "correct": smoothed.tolist()},
        "by_difficulty": _by_difficulty(evaluations[-WINDOW:]),
        "effective_gradient_ratio": float(np.mean([step["effective_gradient_ratio"] for step in steps])),
        "by_rate": np.sum([step[BY_RATE] for step in steps], axis=0).tolist(),
        "by_success": np.sum([step[BY_SUCCESS] for step in steps], axis=0).tolist(),
        "allocate_ms": 1e3 * allocate / len(steps),
        "allocate_share": allocate / seconds,
        "tokens_generated": steps[-1]["tokens_generated"],
        "rollouts": steps[-1]["rollouts"],
    }


def _by_difficulty(evaluations: Sequence[dict[str, Any]]) -> dict[str, float]:
    values = evaluations[-1]["by_difficulty"]
    return {
        value: float(np.mean([line["by_difficulty"][value]["metrics"]["pass@1"] for line in evaluations]))
        for value in values
    }


def training_curve(path: Path) -> dict[str, np.ndarray]:
    """Smoothed training figures by step: correct rollouts, rollouts that can teach, tokens; and the token budget."""
    steps = list(read_jsonl(RunDirectory(path).metrics_path))
    found = {
        name: trailing_mean([step[key] for step in steps], STEPS)
        for name, key in (
            ("correct", "reward/correct/mean"),
            ("effective", "effective_gradient_ratio"),
            ("tokens", "length/mean"),
        )
    }
    budget = [np.nan if step["budget/tokens"] is None else step["budget/tokens"] for step in steps]
    rollouts = np.array([step["rollouts"] for step in steps])
    return {
        **found,
        "budget": np.array(budget),
        "rollouts": rollouts,
        "step": np.array([step["step"] for step in steps]),
    }


def budget_run(path: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The figures of one finished run of the second part.

    Args:
        path: the run.
        evaluation: of its final model at the final budget, as `rlbal eval --json` prints it.

    Returns:
        Held-out correctness and tokens at the final budget and without one (`free_...`); the budget that training
        ended with; tokens generated and seconds a step.
    """
    steps, metrics = list(read_jsonl(RunDirectory(path).metrics_path)), evaluation["metrics"]
    return {
        "correct": metrics["budget/pass@1"],
        "tokens": metrics["budget/length/mean"],
        "truncated": metrics["budget/length/truncated"],
        "free_correct": metrics["pass@1"],
        "free_tokens": metrics["length/mean"],
        "last_budget": steps[-1]["budget/tokens"],
        "tokens_generated": steps[-1]["tokens_generated"],
        "step_seconds": float(np.mean([step_seconds(step) for step in steps])),
        "generate_seconds": float(np.mean([step["time/generate"] for step in steps])),
        "rollouts": steps[-1]["rollouts"],
    }


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean with Student's 95 % interval."""
    found = paired_difference(list(values), [0.0] * len(values))
    return {"mean": found.mean, "low": found.low, "high": found.high}


def averages(runs: Runs, figures: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per arm: the mean of each figure with its interval, and the number of seeds."""
    return {
        arm: {
            **{figure: mean_interval([run[figure] for run in seeds.values()]) for figure in figures},
            "seeds": len(seeds),
        }
        for arm, seeds in runs.items()
    }


def best_arm(runs: Runs, candidates: Sequence[str]) -> str:
    """The candidate with the highest mean of `correct`; the first of equals."""
    return max(candidates, key=lambda arm: np.mean([run["correct"] for run in runs[arm].values()]))


def mean_curve(seeds: Mapping[int, dict[str, Any]]) -> tuple[list[float], np.ndarray]:
    """Rollouts, and the mean over seeds of the smoothed held-out correctness."""
    curves = [run["curve"] for run in seeds.values()]
    return curves[0]["rollouts"], np.mean([curve["correct"] for curve in curves], axis=0)


def rollouts_to_mark(runs: Runs, reference: str) -> dict[str, dict[str, Any]]:
    """Rollouts that every arm needs for the correctness which the reference ends with.

    Returns:
        Per arm: `mean_curve`, by the mean curves of both over the seeds; `by_seed`, each seed's own mark and curve;
        None where the mark is not reached. The reference's own reach it at their end or before.
    """
    found: dict[str, dict[str, Any]] = {}
    mark = mean_curve(runs[reference])[1][-1]
    for arm, seeds in runs.items():
        by_seed = {
            str(seed): rollouts_to(**run["curve"], mark=runs[reference][seed]["correct"])
            for seed, run in seeds.items()
            if seed in runs[reference]
        }
        found[arm] = {"mean_curve": rollouts_to(*mean_curve(seeds), mark), "by_seed": by_seed}
    return found


def by_difficulty(runs: Runs) -> dict[str, dict[str, float]]:
    """Per arm: held-out correctness by difficulty, mean over seeds."""
    values = sorted({value for seeds in runs.values() for run in seeds.values() for value in run["by_difficulty"]})
    return {
        arm: {
            value: float(np.nanmean([run["by_difficulty"].get(value, np.nan) for run in seeds.values()]))
            for value in values
        }
        for arm, seeds in runs.items()
    }


def shares(runs: Runs, table: str) -> dict[str, list[list[int]]]:
    """Per arm: [prompts, rollouts] of all seeds by success in tenths, from the figures' `by_rate` or `by_success`."""
    return {arm: np.sum([run[table] for run in seeds.values()], axis=0).tolist() for arm, seeds in runs.items()}


def differences(
    runs: Runs, pairs: Sequence[tuple[str, str]], figures: Mapping[str, str | None]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Paired differences, arm minus reference over the seeds that both have.

    Args:
        runs: the figures.
        pairs: arm and reference; those with an arm that has no runs are left out.
        figures: name -> which way is better: up, down or None.

    Returns:
        "arm - reference" -> figure -> seeds' differences, mean, 95 % interval, p, p adjusted by Holm over all the
        pairs given, for each figure by itself, and the verdict.
    """
    return _compared(runs, pairs, figures, paired_difference, float)


def ratios(
    runs: Runs, pairs: Sequence[tuple[str, str]], figures: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Ratios arm : reference, geometric means over the seeds that both have; otherwise as `differences`."""
    return _compared(runs, pairs, dict.fromkeys(figures), _log_difference, lambda value: float(np.exp(value)))


def _log_difference(arm: Sequence[float], reference: Sequence[float]) -> Difference:
    return paired_difference(np.log(arm).tolist(), np.log(reference).tolist())


def _compared(
    runs: Runs,
    pairs: Sequence[tuple[str, str]],
    figures: Mapping[str, str | None],
    compare: Callable[[Sequence[float], Sequence[float]], Difference],
    back: Callable[[float], float],
) -> dict[str, dict[str, dict[str, Any]]]:
    pairs = [(arm, reference) for arm, reference in pairs if runs.get(arm) and runs.get(reference)]
    found: dict[str, dict[str, Any]] = {f"{arm} - {reference}": {} for arm, reference in pairs}
    for figure, way in figures.items():
        tests, by_seed = [], []
        for arm, reference in pairs:
            seeds = sorted(set(runs[arm]) & set(runs[reference]))
            values = [(runs[arm][seed][figure], runs[reference][seed][figure]) for seed in seeds]
            tests.append(compare([ours for ours, _ in values], [theirs for _, theirs in values]))
            by_seed.append({str(s): back(compare([a], [b]).mean) for s, (a, b) in zip(seeds, values, strict=True)})
        for pair, test, own, adjusted in zip(found, tests, by_seed, holm([test.p for test in tests]), strict=True):
            found[pair][figure] = {
                "by_seed": own,
                **{name: back(getattr(test, name)) for name in ("mean", "low", "high")},
                "p": test.p,
                "p_holm": adjusted,
                "verdict": verdict(test, adjusted, way),
            }
    return found
