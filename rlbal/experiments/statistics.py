"""The judge's arithmetic: paired differences over seeds, and a verdict that knows how many were looked at.

Two arms with the same seed share held-out problems, evaluation noise, order of prompts and, for a model built on the
spot, initial weights. The difference within a seed is free of what both share, so arms are compared by these
differences, one per seed. Student's t assumes that they are roughly normal; with few seeds nothing can check that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
LEVEL = 1 - CONFIDENCE
# Differences whose spread is less than this share of the values differ by rounding alone.
ROUNDING = 1e-12

Direction = Literal["up", "down"]
Verdict = Literal[
    "better",
    "worse",
    "higher",
    "lower",
    "no difference shown",
    "one seed: no verdict",
    "no spread: no verdict",
    "no pairs",
    "not comparable",
]


@dataclass(frozen=True)
class Difference:
    """A paired difference, arm minus baseline.

    Attributes:
        pairs: seeds that both have.
        mean: mean difference; NaN without pairs.
        low, high: ends of the 95 % interval; NaN with less than two pairs.
        p: two-sided p value of the paired t test; NaN with less than two pairs, or if all differences are equal.
    """

    pairs: int
    mean: float
    low: float
    high: float
    p: float


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1); NaN where there are too few values."""
    if not values:
        return math.nan, math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def paired_difference(arm: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Mean of arm − baseline over pairs, with Student's 95 % interval: mean ± t(0.975, n − 1)·s/√n.

    If all pairs differ by the same amount d, the interval is [d, d] and there is no p value: without spread the t test
    has nothing to weigh d against.

    Args:
        arm, baseline: finite values of the same seeds in the same order.
    """
    from scipy.special import stdtr, stdtrit  # cumulative distribution and quantile of Student's t

    values = np.array([arm, baseline], dtype=float)
    differences = values[0] - values[1]
    pairs = len(differences)
    if pairs == 0:
        return Difference(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(differences.mean())
    if pairs == 1:
        return Difference(1, mean, math.nan, math.nan, math.nan)
    std = float(differences.std(ddof=1))
    if std <= ROUNDING * float(np.abs(values).max()):
        return Difference(pairs, mean, mean, mean, math.nan)
    error = std / math.sqrt(pairs)
    half = float(stdtrit(pairs - 1, 0.5 + CONFIDENCE / 2)) * error
    p = 2 * float(stdtr(pairs - 1, -abs(mean) / error))
    return Difference(pairs, mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: those below 0.05 hold together with at most 5 % chance of any false one.

    Sorted ascending, the i-th of m becomes max over j ≤ i of (m − j + 1)·p_j, at most 1 (Holm 1979, Scandinavian
    Journal of Statistics 6:65). NaN, a comparison without a test, stays NaN and is not counted in m.
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted


def verdict(difference: Difference, p_holm: float, direction: Direction | None) -> Verdict:
    """What may be said of a difference.

    Args:
        difference: arm minus baseline.
        p_holm: its p value, adjusted for all comparisons made.
        direction: which way is better; None if neither is.
    """
    if difference.pairs == 0:
        return "no pairs"
    if difference.pairs == 1:
        return "one seed: no verdict"
    if math.isnan(p_holm):
        return "no difference shown" if difference.mean == 0 else "no spread: no verdict"
    if p_holm >= LEVEL:
        return "no difference shown"
    if direction is None:
        return "higher" if difference.mean > 0 else "lower"
    return "better" if (difference.mean > 0) == (direction == "up") else "worse"
