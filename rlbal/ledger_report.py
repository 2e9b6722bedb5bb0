"""What a prompt ledger says about the prompts of a run, as figures: for the terminal, a plot, or JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

from rlbal.prompts.ledger import NEVER, PromptLedger

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 10  # of believed success, 0 to 1
RECENT_STEPS = 10


@dataclass(frozen=True)
class PromptFigures:
    """One prompt: its number, belief, what the belief rests on, and its text where there is one.

    Attributes:
        mean, low, high: of the believed chance of success, with a 95 % interval.
        successes, rollouts: as far as they still count.
        last_step: policy updates before it was last tried.
        length: mean completion tokens.
    """

    prompt_index: int
    mean: float
    low: float
    high: float
    successes: float
    rollouts: float
    last_step: int
    length: float
    retired: bool
    stratum: str
    prompt: str | None = None


@dataclass(frozen=True)
class Stratum:
    """One kind of prompts; `mean` is the mean belief about those tried, NaN if none was."""

    name: str
    prompts: int
    tried: int
    prior_mean: float
    mean: float


@dataclass(frozen=True)
class History:
    """The ledger's part of metrics.jsonl, step by step; NaN where a step has no figure.

    Attributes:
        rollouts: of the whole run so far; None if not on record.
    """

    steps: list[int]
    seen: list[float]
    drift: list[float]
    rollouts: int | None

    @property
    def recorded(self) -> bool:
        """Whether metrics.jsonl tells of the ledger at all."""
        return not all(map(math.isnan, self.seen))

    def mean_drift(self, last: int | None = None) -> float:
        """Mean over the last steps that have one (all by default), NaN if none has."""
        known = [value for value in self.drift if not math.isnan(value)]
        return float(np.mean(known[-last:] if last else known)) if known else math.nan


@dataclass(frozen=True)
class LedgerReport:
    """Everything that is shown of a ledger. T prompts have been tried and scored.

    Attributes:
        step: policy updates as of which beliefs are meant.
        last_visits: beliefs are meant as of each prompt's last visit instead, since forgetting leaves nothing else.
        unscored: prompts that were tried, but never scored.
        retired: prompts that left the pool; None if none ever does.
        prior: a and b of the Beta prior of all prompts; `prior_fitted` False: Beta(1/2, 1/2) for want of data.
        means_T, lengths_T: believed success, and mean completion tokens.
        counts: prompts by believed success, in `BINS` equal bins.
        strata: empty if all prompts are alike.
    """

    step: int
    last_visits: bool
    prompts: int
    tried: int
    unscored: int
    retired: int | None
    prior: tuple[float, float]
    prior_fitted: bool
    means_T: Floats
    lengths_T: Floats
    counts: list[int]
    strata: list[Stratum]
    hardest: list[PromptFigures]
    easiest: list[PromptFigures]
    history: History

    def to_json(self) -> dict[str, Any]:
        """Plain values, without what only the plot needs; `prompt` is absent where there is no text."""
        a, b = self.prior
        return {
            "step": self.step,
            "beliefs_of": "last visits" if self.last_visits else "step",
            "prompts": self.prompts,
            "tried": self.tried,
            "never_tried": self.prompts - self.tried,
            "never_scored": self.unscored,
            "retired": self.retired,
            "prior": {"a": a, "b": b, "mean": a / (a + b), "fitted": self.prior_fitted},
            "rollouts": self.history.rollouts,
            "drift": {"mean": self.history.mean_drift(), "last_steps": self.history.mean_drift(RECENT_STEPS)},
            "believed_success": {"edges": np.linspace(0, 1, BINS + 1).round(6).tolist(), "prompts": self.counts},
            "strata": [asdict(stratum) for stratum in self.strata],
            "hardest": [_plain(figures) for figures in self.hardest],
            "easiest": [_plain(figures) for figures in self.easiest],
        }


def _plain(figures: PromptFigures) -> dict[str, Any]:
    return {name: value for name, value in asdict(figures).items() if value is not None}


def report(
    ledger: PromptLedger,
    step: int,
    history: History,
    *,
    retire_at: float | None,
    top: int,
    stratum_names: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
) -> LedgerReport:
    """Read a ledger.

    Args:
        ledger: of M prompts.
        step: policy updates so far, at least those before any prompt was last tried.
        history: the ledger's part of metrics.jsonl.
        retire_at: `allocation.retire_at`.
        top: how many of the hardest and the easiest prompts.
        stratum_names: of each stratum; default: their numbers.
        texts: the prompts, M of them.
    """
    everything_M = np.arange(len(ledger.last_seen_M))
    last_visits = ledger.forgetting == 1
    steps_M = ledger.last_seen_M.astype(np.int64) if last_visits else np.full(len(everything_M), step)
    a_M, b_M = ledger.belief(everything_M, steps_M)
    tried_M = ledger.last_seen_M != NEVER
    scored_M = tried_M & ~np.isnan(ledger.success_rates(everything_M))
    retired_M = ledger.retired_M
    names = stratum_names or [str(value) for value in range(len(ledger.stratum_values))]

    def figures(indices: Ints) -> list[PromptFigures]:
        return _figures(ledger, indices, steps_M, retired_M, names, texts)

    mean_M = a_M / (a_M + b_M)
    scored_T = np.flatnonzero(scored_M)
    by_success_T = scored_T[np.lexsort((scored_T, -(a_M + b_M)[scored_T], mean_M[scored_T]))]
    by_failure_T = scored_T[np.lexsort((scored_T, -(a_M + b_M)[scored_T], -mean_M[scored_T]))]
    return LedgerReport(
        step=step,
        last_visits=last_visits,
        prompts=len(everything_M),
        tried=int(tried_M.sum()),
        unscored=int((tried_M & ~scored_M).sum()),
        retired=None if retire_at is None else int(retired_M.sum()),
        prior=ledger.prior.population(),
        prior_fitted=ledger.prior.fitted,
        means_T=mean_M[scored_T],
        lengths_T=ledger.expected_lengths(scored_T),
        counts=np.histogram(mean_M[scored_T], BINS, (0, 1))[0].tolist(),
        strata=_strata(ledger, tried_M, scored_M, mean_M, names) if len(names) > 1 else [],
        hardest=figures(by_success_T[:top]),
        easiest=figures(by_failure_T[:top]),
        history=history,
    )


def _figures(
    ledger: PromptLedger,
    indices_P: Ints,
    steps_M: Ints,
    retired_M: npt.NDArray[np.bool_],
    names: Sequence[str],
    texts: Sequence[str] | None,
) -> list[PromptFigures]:
    a_P, b_P = ledger.belief(indices_P, steps_M[indices_P])
    successes_P, failures_P = ledger.outcomes(indices_P, steps_M[indices_P])
    low_P, high_P = beta.ppf([[0.025], [0.975]], a_P, b_P)
    lengths_P = ledger.expected_lengths(indices_P)
    return [
        PromptFigures(
            prompt_index=int(index),
            mean=float(a_P[place] / (a_P[place] + b_P[place])),
            low=float(low_P[place]),
            high=float(high_P[place]),
            successes=float(successes_P[place]),
            rollouts=float(successes_P[place] + failures_P[place]),
            last_step=int(ledger.last_seen_M[index]),
            length=float(lengths_P[place]),
            retired=bool(retired_M[index]),
            stratum=names[ledger.stratum_M[index]],
            prompt=texts[index] if texts is not None else None,
        )
        for place, index in enumerate(indices_P)
    ]


def _strata(
    ledger: PromptLedger,
    tried_M: npt.NDArray[np.bool_],
    scored_M: npt.NDArray[np.bool_],
    mean_M: Floats,
    names: Sequence[str],
) -> list[Stratum]:
    a_H, b_H = ledger.prior.strata()
    prompts_H, tried_H, scored_H, sum_H = (
        np.bincount(ledger.stratum_M, weights=of_M, minlength=len(names))
        for of_M in (np.ones_like(mean_M), tried_M, scored_M, np.where(scored_M, mean_M, 0.0))
    )
    return [
        Stratum(
            name=name,
            prompts=int(prompts_H[h]),
            tried=int(tried_H[h]),
            prior_mean=float(a_H[h] / (a_H[h] + b_H[h])),
            mean=float(sum_H[h] / scored_H[h]) if scored_H[h] else math.nan,
        )
        for h, name in enumerate(names)
    ]
