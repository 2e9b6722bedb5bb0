"""Statistics of an evaluation: pass@k, means and bootstrap intervals. Numpy only.

Shape suffixes: P prompts, S samples of each prompt, K rewards. Every metric is first one value per prompt (NaN where
the prompt cannot say), then the mean over prompts, so that a prompt counts once however many of its samples count.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# A sample is solved with full marks: the success reward, mapped to [0, 1], is 1 to rounding. Scorers that give partial
# credit (half a point for 15 where 5 is right) would otherwise count wrong answers; mean@k shows the partial credit.
SOLVED = 1 - 1e-6


def pass_at_k(samples_P: Array, solved_P: Array, k: int) -> Array:
    """Unbiased estimate, per prompt, that at least one of k samples is solved.

    1 − C(n−c, k)/C(n, k) with c of n samples solved (Chen et al. 2021, arXiv 2107.03374), as the product of the chances
    that each of k draws without replacement misses.

    Returns:
        (P,) in [0, 1]; NaN where a prompt has fewer than k samples.
    """
    samples_P, solved_P = np.asarray(samples_P, dtype=float), np.asarray(solved_P, dtype=float)
    enough_P = samples_P >= k
    none_solved_P = np.ones_like(samples_P)
    for drawn in range(k):
        unsolved_left_P = np.maximum(samples_P - solved_P - drawn, 0.0)
        none_solved_P *= np.divide(
            unsolved_left_P, samples_P - drawn, out=np.zeros_like(samples_P), where=samples_P > drawn
        )
    return np.where(enough_P, 1.0 - none_solved_P, np.nan)


def mean_without_nan(values: Array, axis: int = 0) -> Array:
    """Mean along an axis that leaves NaN out; NaN (without a warning) where nothing is left."""
    present = ~np.isnan(values)
    totals = np.where(present, values, 0.0).sum(axis=axis)
    counts = present.sum(axis=axis)
    return np.divide(totals, counts, out=np.full(np.shape(totals), np.nan), where=counts > 0)


def per_prompt(
    rewards_PSK: Array,
    lengths_PS: Array,
    truncated_PS: Array,
    names: list[str],
    success: str,
    success_range: tuple[float, float],
    pass_at: list[int],
    prefix: str = "",
) -> dict[str, Array]:
    """Every metric of an evaluation as one value per prompt.

    A sample whose success reward is NaN is no sample for pass@k and mean@k; a prompt left with fewer than k samples has
    NaN for pass@k. Lengths and truncation count every sample.

    Args:
        rewards_PSK: raw rewards, NaN where missing.
        lengths_PS: completion lengths in tokens, end token included.
        truncated_PS: 1 where a completion was cut before its end token.
        names: the K rewards' names.
        success: the name of the success reward.
        success_range: its lowest and highest value, mapped to 0 and 1.
        pass_at: the k of each pass@k.
        prefix: put before every metric's name.

    Returns:
        Metric name -> (P,): `pass@k` for each k, `mean@S` (mean of the mapped success reward), `reward/<name>` (raw),
        `length/mean` and `length/truncated`.
    """
    low, high = success_range
    success_PS = (rewards_PSK[:, :, names.index(success)] - low) / (high - low)
    scored_P = (~np.isnan(success_PS)).sum(axis=1)
    solved_P = (success_PS >= SOLVED).sum(axis=1)
    columns = {f"pass@{k}": pass_at_k(scored_P, solved_P, k) for k in pass_at}
    columns[f"mean@{success_PS.shape[1]}"] = mean_without_nan(success_PS, axis=1)
    for index, name in enumerate(names):
        columns[f"reward/{name}"] = mean_without_nan(rewards_PSK[:, :, index], axis=1)
    columns["length/mean"] = lengths_PS.mean(axis=1)
    columns["length/truncated"] = truncated_PS.mean(axis=1)
    return {prefix + name: values_P for name, values_P in columns.items()}


def averages(columns: dict[str, Array]) -> dict[str, float]:
    """Mean over prompts of every metric; NaN where no prompt has a value."""
    return {name: float(mean_without_nan(values_P)) for name, values_P in columns.items()}


def left_out(columns: dict[str, Array]) -> dict[str, int]:
    """Number of prompts without a value, for the metrics that have any."""
    counts = {name: int(np.isnan(values_P).sum()) for name, values_P in columns.items()}
    return {name: count for name, count in counts.items() if count}


def bootstrap_intervals(
    columns: dict[str, Array], seed: int, resamples: int = 1000, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of every metric's mean over prompts.

    Whole prompts are resampled with replacement, the same ones for all metrics. Samples within a prompt are not, so the
    intervals say how far another draw of prompts could move the mean. NaN for a metric with values for fewer than two
    prompts: there is nothing to resample.

    Returns:
        Metric name -> (low, high).
    """
    if not columns:
        return {}
    values_PM = np.stack(list(columns.values()), axis=1)
    present_PM = ~np.isnan(values_PM)
    prompts = len(values_PM)
    # How often each prompt is drawn in each resample says all that the means need.
    draws_BP = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1.0 / prompts), size=resamples)
    totals_BM = draws_BP @ np.where(present_PM, values_PM, 0.0)
    counts_BM = draws_BP @ present_PM.astype(float)
    means_BM = np.divide(totals_BM, counts_BM, out=np.full_like(totals_BM, np.nan), where=counts_BM > 0)
    tails = [50 * (1 - level), 50 * (1 + level)]
    intervals = {}
    for index, name in enumerate(columns):
        means_B = means_BM[:, index]
        if present_PM[:, index].sum() < 2:
            intervals[name] = (float("nan"), float("nan"))
            continue
        low, high = np.percentile(means_B[~np.isnan(means_B)], tails)
        intervals[name] = (float(low), float(high))
    return intervals


def _numbers_first(text: str) -> tuple[bool, float, str]:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    return (False, number, text) if math.isfinite(number) else (True, 0.0, text)


def by_difficulty(values: Sequence[Any], columns: dict[str, Array]) -> dict[str, dict[str, Any]]:
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
