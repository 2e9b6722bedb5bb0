"""What the benchmark computes from finished runs: pure functions, one for each figure of the table.

A score vector is (correct, format, concise), each in [0, 1] with 1 best; hypervolumes are against the worst corner, 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlbal.balance.hypervolume import hypervolume
from rlbal.experiments.statistics import holm, paired_difference
from rlbal.run import RunDirectory, read_jsonl

REWARDS = ("correct", "format", "concise")
SCORES = (*REWARDS, "hypervolume")
SMOOTHING = 0.9  # of training scores: share of the old in their moving average
FIXED = "fixed"


def smooth(values_T: np.ndarray) -> np.ndarray:
    """Exponential moving average over steps without the pull of its start at 0, along the first axis."""
    total, weight, averages = np.zeros_like(values_T[0]), 0.0, []
    for value in values_T:
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        averages.append(total / weight)
    return np.array(averages)


def summarise_run(path: Path) -> dict[str, Any]:
    """The figures of one finished run.

    Returns:
        Held-out scores after the last step, their hypervolume and that of all evaluations together; `smoothed`, the
        hypervolume of the averaged training scores at each step; the gradient norm's coefficient of variation over
        steps; and what the run cost.
    """
    run = RunDirectory(path)
    evaluations = [line["metrics"] for line in read_jsonl(run.evaluations_path)]
    steps = list(read_jsonl(run.metrics_path))
    scores_SM = np.array([[metrics[f"reward/{name}"] for name in REWARDS] for metrics in evaluations])
    training_TM = np.array([[step[f"reward/{name}/mean"] for name in REWARDS] for step in steps])
    norms_T = np.array([step["grad_norm"] for step in steps], dtype=float)
    return {
        **dict(zip(REWARDS, scores_SM[-1].tolist(), strict=True)),
        "tokens": evaluations[-1]["length/mean"],
        "hypervolume": hypervolume(scores_SM[-1:]),
        "hypervolume_reached": hypervolume(scores_SM),
        "smoothed": smooth(training_TM).prod(axis=1).tolist(),
        "grad_norm_variation": float(norms_T.std(ddof=1) / norms_T.mean()) if norms_T.mean() > 0 else 0.0,
        "rollouts": steps[-1]["rollouts"],
        "tokens_generated": steps[-1]["tokens_generated"],
        "weights": {name: steps[-1][f"weight/{name}"] for name in REWARDS},
    }


def mean_factor(path: Path) -> float:
    """Mean over steps of what hypervolume weighting multiplied the learning rate by."""
    return float(np.mean([step["hypervolume/factor"] for step in read_jsonl(RunDirectory(path).metrics_path)]))


def curves(path: Path) -> dict[str, np.ndarray]:
    """By step: averaged training scores, normalised weights, and the learning-rate factor where there is one."""
    steps = list(read_jsonl(RunDirectory(path).metrics_path))
    weights_TK = np.array([[step[f"weight/{name}"] for name in REWARDS] for step in steps])
    found = {
        "step": np.array([step["step"] for step in steps]),
        "scores": smooth(np.array([[step[f"reward/{name}/mean"] for name in REWARDS] for step in steps])),
        "weights": weights_TK / weights_TK.sum(axis=1, keepdims=True),
    }
    if "hypervolume/factor" in steps[0]:
        found["factor"] = np.array([step["hypervolume/factor"] for step in steps])
    return found


def best_arms(arms: dict[str, dict[int, dict[str, Any]]], candidates: Sequence[str], count: int) -> list[str]:
    """The candidates with the highest mean hypervolume of final held-out scores, best first."""
    means = {name: np.mean([run["hypervolume"] for run in arms[name].values()]) for name in candidates}
    return sorted(candidates, key=lambda name: -means[name])[:count]


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean with Student's 95 % interval."""
    found = paired_difference(list(values), [0.0] * len(values))
    return {"mean": found.mean, "low": found.low, "high": found.high}


def steps_to(smoothed_T: Sequence[float], mark: float) -> int | None:
    """First step, from 1, at which a run's smoothed hypervolume is at least the mark; None if it never is."""
    reached = np.flatnonzero(np.array(smoothed_T) >= mark)
    return int(reached[0]) + 1 if len(reached) else None


def dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a run's final held-out scores are nowhere below another's, and somewhere above."""
    gains = [one[name] - other[name] for name in REWARDS]
    return min(gains) >= 0 and max(gains) > 0


def differences(
    arms: dict[str, dict[int, dict[str, Any]]], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """Paired differences of final held-out scores, arm minus reference over the seeds both have.

    Returns:
        "arm - reference" -> score -> seeds' differences, mean, 95 % interval, p, and p adjusted by Holm over all the
        pairs given, for each score by itself.
    """
    found: dict[str, dict[str, Any]] = {f"{arm} - {reference}": {} for arm, reference in pairs}
    for score in SCORES:
        tests = []
        for arm, reference in pairs:
            seeds = sorted(set(arms[arm]) & set(arms[reference]))
            ours, theirs = ([arms[name][seed][score] for seed in seeds] for name in (arm, reference))
            test = paired_difference(ours, theirs)
            tests.append(test.p)
            found[f"{arm} - {reference}"][score] = {
                "by_seed": {str(seed): a - b for seed, a, b in zip(seeds, ours, theirs, strict=True)},
                "mean": test.mean,
                "low": test.low,
                "high": test.high,
                "p": test.p,
            }
        for (arm, reference), adjusted in zip(pairs, holm(tests), strict=True):
            found[f"{arm} - {reference}"][score]["p_holm"] = adjusted
    return found


def summarise(arms: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per arm: means with intervals, steps to the fixed arm's mark, and how many seeds dominate the fixed arm's.

    The mark is the fixed arm's smoothed hypervolume after its last step, averaged over its seeds.
    """
    mark = float(np.mean([run["smoothed"][-1] for run in arms[FIXED].values()]))
    summary = {}
    for name, runs in arms.items():
        figures = (*SCORES, "hypervolume_reached", "tokens", "grad_norm_variation", "tokens_generated")
        seeds = sorted(set(runs) & set(arms[FIXED]))
        summary[name] = {
            **{figure: mean_interval([run[figure] for run in runs.values()]) for figure in figures},
            "rollouts": sorted({run["rollouts"] for run in runs.values()}),
            "weights": {key: float(np.mean([run["weights"][key] for run in runs.values()])) for key in REWARDS},
            "mark": mark,
            "steps_to_mark": {str(seed): steps_to(run["smoothed"], mark) for seed, run in runs.items()},
            "dominates_fixed": sum(dominates(runs[seed], arms[FIXED][seed]) for seed in seeds),
            "dominated_by_fixed": sum(dominates(arms[FIXED][seed], runs[seed]) for seed in seeds),
            "seeds": len(runs),
        }
    return summary
