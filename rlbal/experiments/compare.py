"""Comparing arms over matched seeds: means, paired differences to a baseline, and verdicts that hold together."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlbal.errors import RunError
from rlbal.experiments.arms import Arm, differing, find_arm, group_arms, unnamed_keys
from rlbal.experiments.metrics import choose_metrics, direction, measured_with, unit, value_of
from rlbal.experiments.results import read_results
from rlbal.experiments.statistics import (
    CONFIDENCE,
    Difference,
    Verdict,
    holm,
    mean_and_std,
    paired_difference,
    verdict,
)

TOKENS_APART = 0.1  # share by which two arms' generated tokens may differ before it is worth a note


@dataclass(frozen=True)
class Summary:
    """One metric of one arm over its seeds.

    Attributes:
        values: seed -> value, for the runs that have one.
        mean, std: over them; NaN where there are too few.
    """

    values: dict[int, float]
    mean: float
    std: float


@dataclass(frozen=True)
class Judgement:
    """One metric of one arm against the baseline.

    Attributes:
        differences: seed -> arm minus baseline, for the seeds that both have.
        difference: their mean and interval.
        p_holm: p value adjusted for all comparisons made; NaN without a test.
        verdict: what may be said.
    """

    arm: str
    metric: str
    differences: dict[int, float]
    difference: Difference
    p_holm: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Arms compared.

    Attributes:
        arms: the baseline, then the others in the order given; the labels are unique.
        baseline: label of the arm that the others are compared with.
        metrics: full names, in the order shown.
        summaries: (arm, metric) -> its values.
        judgements: (arm, metric) -> against the baseline, without the baseline's own.
        notes: what a reader must know, such as unequal cost.
        left_out: runs that do not count, with the reason.
    """

    arms: list[Arm]
    baseline: str
    metrics: list[str]
    summaries: dict[tuple[str, str], Summary]
    judgements: dict[tuple[str, str], Judgement]
    notes: list[str]
    left_out: dict[Path, str]

    @property
    def tests(self) -> int:
        """How many comparisons had a p value; Holm's correction is over these."""
        return sum(not math.isnan(judgement.p_holm) for judgement in self.judgements.values())

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain types; NaN where there is no value."""
        return {
            "baseline": self.baseline,
            "confidence": CONFIDENCE,
            "tests": self.tests,
            "metrics": {name: {"direction": direction(name), "unit": unit(name)} for name in self.metrics},
            "arms": {
                arm.label: {
                    "runs": {str(seed): str(run.path) for seed, run in arm.runs.items()},
                    "metrics": {name: asdict(self.summaries[arm.label, name]) for name in self.metrics},
                }
                for arm in self.arms
            },
            "differences": [asdict(judgement) for judgement in self.judgements.values()],
            "notes": self.notes,
            "left_out": {str(path): reason for path, reason in self.left_out.items()},
        }


def compare_runs(paths: list[Path], baseline: str | None = None, metrics: list[str] | None = None) -> Comparison:
    """Compare the finished runs at some paths.

    Args:
        paths: run directories, folders of runs (arms), or folders of arms (sweeps).
        baseline: label of an arm; default the first.
        metrics: see `choose_metrics`.

    Raises:
        RunError: no finished run, a run counted twice, or an unknown baseline or metric.
    """
    results, left_out = read_results(paths)
    arms = group_arms(results)
    base = find_arm(baseline, arms) if baseline is not None else arms[0]
    arms = [base, *(arm for arm in arms if arm is not base)]
    names, notes = choose_metrics(metrics or [], results)
    summaries = {(arm.label, name): _summary(arm, name) for arm in arms for name in names}
    judgements, unlike = _judge(arms, base, names, summaries)
    hidden = {arm.label: unnamed_keys(arm, base) for arm in arms if arm is not base}
    unlike += [
        f"`{label}` differs from `{base.label}` in {', '.join(keys)} too" for label, keys in hidden.items() if keys
    ]
    notes = [*unlike, *_cost_notes(arms, base), *_seed_notes(arms, base), *_missing_notes(arms, names), *notes]
    return Comparison(arms, base.label, names, summaries, judgements, notes, left_out)


def _summary(arm: Arm, metric: str) -> Summary:
    values = {seed: value_of(run, metric) for seed, run in arm.runs.items()}
    values = {seed: value for seed, value in values.items() if not math.isnan(value)}
    return Summary(values, *mean_and_std(list(values.values())))


def _judge(
    arms: list[Arm], base: Arm, metrics: list[str], summaries: dict[tuple[str, str], Summary]
) -> tuple[dict[tuple[str, str], Judgement], list[str]]:
    """All judgements, and notes on arms that were not measured alike."""
    judgements: dict[tuple[str, str], Judgement] = {}
    unlike: dict[tuple[str, str], list[str]] = {}
    for metric in metrics:
        for arm in (arm for arm in arms if arm is not base):
            keys = differing(measured_with(base, metric), measured_with(arm, metric))
            judgements[arm.label, metric] = _paired(arm.label, metric, base.label, summaries, comparable=not keys)
            if keys:
                unlike.setdefault((arm.label, ", ".join(f"`{key}`" for key in keys)), []).append(metric)
    adjusted = holm([judgement.difference.p for judgement in judgements.values()])
    for (key, judgement), p_holm in zip(list(judgements.items()), adjusted, strict=True):
        if judgement.verdict != "not comparable":
            said = verdict(judgement.difference, p_holm, direction(judgement.metric))
            judgements[key] = Judgement(*key, judgement.differences, judgement.difference, p_holm, said)
    notes = [
        f"not comparable: `{label}` and `{base.label}` differ in {keys}, with which {', '.join(names)} "
        f"{'is' if len(names) == 1 else 'are'} measured"
        for (label, keys), names in unlike.items()
    ]
    return judgements, notes


def _paired(
    label: str, metric: str, base: str, summaries: dict[tuple[str, str], Summary], comparable: bool
) -> Judgement:
    """One judgement, before its p value is adjusted for the others."""
    arm, baseline = summaries[label, metric].values, summaries[base, metric].values
    seeds = [seed for seed in arm if seed in baseline] if comparable else []
    difference = paired_difference([arm[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    differences = {seed: arm[seed] - baseline[seed] for seed in seeds}
    return Judgement(label, metric, differences, difference, math.nan, "no pairs" if comparable else "not comparable")


def _cost_notes(arms: list[Arm], base: Arm) -> list[str]:
    """Arms that had more to learn from than the baseline, or stopped at another step."""
    notes = []
    for name, apart in (("rollouts", 0.0), ("tokens_generated", TOKENS_APART)):
        means = {arm.label: _summary(arm, name).mean for arm in arms}
        if any(abs(mean - means[base.label]) > apart * means[base.label] for mean in means.values()):
            figures = ", ".join(f"{label} {mean:,.0f}" for label, mean in means.items())
            notes.append(f"unequal cost: {name.replace('_', ' ')} of a run: {figures}")
    steps = {arm.label: sorted({run.step for run in arm.runs.values()}) for arm in arms}
    if len({step for found in steps.values() for step in found}) > 1:
        figures = ", ".join(f"{label} {' / '.join(map(str, found))}" for label, found in steps.items())
        notes.append(f"runs stopped at different steps: {figures}")
    return notes


def _seed_notes(arms: list[Arm], base: Arm) -> list[str]:
    """Seeds that have no partner, and runs whose last evaluation came before their last step."""
    notes = []
    for arm in arms:
        if alone := sorted(set(arm.runs) ^ set(base.runs)):
            seeds = ", ".join(map(str, alone))
            notes.append(f"`{arm.label}` and `{base.label}`: left out of the differences, no partner: seed {seeds}")
        for run in arm.runs.values():
            if run.evaluation and run.evaluation["step"] != run.step:
                notes.append(f"{run.path} was evaluated at step {run.evaluation['step']} of {run.step}")
    return notes


def _missing_notes(arms: list[Arm], metrics: list[str]) -> list[str]:
    """Runs that have no value for a metric."""
    notes = []
    for metric in metrics:
        missing = [
            f"{arm.label} seed {seed}"
            for arm in arms
            for seed, run in arm.runs.items()
            if math.isnan(value_of(run, metric))
        ]
        if missing:
            notes.append(f"`{metric}` has no value and is left out for {', '.join(missing)}")
    return notes


def need_two_arms(comparison: Comparison) -> None:
    """Raises RunError if there is nothing to compare the baseline with."""
    if len(comparison.arms) < 2:
        raise RunError(
            f"there is one arm, `{comparison.baseline}`, so there are no differences to plot",
            fix="name runs of another recipe as well",
        )
