"""Token budgets for completions over time: the recipe's `budget` section at work.

"Train Long, Think Short" (arXiv 2508.08940, sections 3.4, 4.4 and 4.6) lets a budget fall in steps, so that the policy
first finds solutions and then shortens them. With start S_0, end S_n and n drops, the budget of level k = 0..n is

    exponential  S_k = S_0·d^k, d = (S_n/S_0)^(1/n)        linear  S_k = S_0 − k·(S_0 − S_n)/n

and level k lasts from step k·I on, I = total/(n + 1). With factor γ and interval T: B(t) = max(1, B_0·γ^⌊t/T⌋).
Budgets are rounded to the nearest token, halves up. A step is an optimizer step; the trainer asks at every generation.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

from rlbal.budget_checks import has_budget_field
from rlbal.budget_sections import (
    TOKEN_BUDGET,
    AdaptiveSection,
    AnyBudget,
    ConstantSection,
    LinearSection,
    NoBudgetSection,
)
from rlbal.errors import RunError
from rlbal.recipe import Recipe

PLACEHOLDER = f"{{{TOKEN_BUDGET}}}"

Reason = Literal["waiting", "tightened", "loosened", "held", "at_start", "at_end", "no_signal"]


def nearest_token(tokens: float) -> int:
    """Round to a whole number of tokens, halves up, at least 1."""
    return max(1, math.floor(tokens + 0.5))


def decayed(step: int, start: int, gamma: float, interval: int) -> int:
    """B(t) = max(1, B_0·γ^⌊t/T⌋) in tokens (the paper's section 3.4).

    Args:
        step: optimizer steps done, t.
        start: B_0 in tokens.
        gamma: γ, between 0 and 1.
        interval: T in optimizer steps.
    """
    return nearest_token(start * gamma ** (step // interval))


def exponential_levels(start: int, end: int, decays: int) -> list[int]:
    """The n + 1 budgets S_k = S_0·d^k with d = (S_n/S_0)^(1/n), in tokens (the paper's section 4.4)."""
    return [nearest_token(start * (end / start) ** (k / decays)) for k in range(decays + 1)]


def linear_levels(start: int, end: int, decays: int) -> list[int]:
    """The n + 1 budgets from start to end with equal drops, in tokens (the paper's section 4.6)."""
    return [nearest_token(start - k * (start - end) / decays) for k in range(decays + 1)]


def level_at(step: int, total: int, levels: int) -> int:
    """Which of so many levels, equally long, a step of the run belongs to: 0 .. levels − 1.

    Whole numbers throughout, so that level k starts at the first step of at least k·total/levels. Steps beyond the run
    belong to the last level.
    """
    return min(step * levels // total, levels - 1)


def generation_cap(budget: int) -> int:
    """Longest completion worth generating, 2·B tokens: no length reward is left there (`reward_fns.length`)."""
    return 2 * budget


def prompt_budget(budget: int, belief_mean: float, easy: float, hard: float) -> int:
    """The budget of one prompt: B·(hard + (easy − hard)·p) in tokens, within [easy·B, hard·B] and at least 1.

    Args:
        budget: B in tokens.
        belief_mean: p, the share of rollouts believed to solve the prompt; the prior's mean for one never seen.
        easy: factor at p = 1.
        hard: factor at p = 0, above `easy`.
    """
    share = min(max(belief_mean, 0.0), 1.0)
    return nearest_token(budget * (hard + (easy - hard) * share))


def with_budget(prompt: str | list[dict[str, str]], budget: int) -> str | list[dict[str, str]]:
    """A copy of a rendered prompt with the budget in place of `{token_budget}`.

    Only for prompts whose template holds the field; `rlbal.prompts.templates` has seen to it that no row's own text
    holds these characters then.
    """
    if isinstance(prompt, str):
        return prompt.replace(PLACEHOLDER, str(budget))
    return [{**message, "content": message["content"].replace(PLACEHOLDER, str(budget))} for message in prompt]


def tell_budget(table: dict[str, list[Any]], recipe: Recipe, tokens: int) -> dict[str, list[Any]]:
    """Rows, as columns, that all have one token budget.

    It is in the prompts where a template of the recipe holds the field, and, with a schedule, in the column
    `token_budget`, which length rewards go by.
    """
    told = dict(table)
    if has_budget_field(recipe.data):
        told["prompt"] = [with_budget(prompt, tokens) for prompt in table["prompt"]]
    if not isinstance(recipe.budget, NoBudgetSection):
        told[TOKEN_BUDGET] = [tokens] * len(table["prompt"])
    return told


def longest_completion(section: AnyBudget, tokens: int | None, limit: int) -> int:
    """Tokens at which a completion is cut off: 2·B where `budget.cap` says so, and `limit` in any case.

    Args:
        section: the recipe's `budget`.
        tokens: the budget B, None for none.
        limit: `trainer.max_completion_length`.
    """
    if tokens is None or isinstance(section, NoBudgetSection) or not section.cap:
        return limit
    return min(limit, generation_cap(tokens))


class Budget(ABC):
    """What decides how many tokens completions may use. It decides values and keeps state; only the trainer logs."""

    @abstractmethod
    def tokens(self, step: int) -> int | None:
        """The budget B(t) in tokens for rollouts generated after so many optimizer steps, or None."""

    def observe(self, accuracy: float) -> None:
        """Learn how a generation batch went; once per batch, after `tokens` was asked for it.

        Args:
            accuracy: mean of its success reward, mapped to [0, 1]; NaN if no row has one.
        """
        del accuracy  # most budgets follow the steps alone

    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl says besides the budget itself."""
        return {}

    def tables(self) -> dict[str, Any]:
        """What metrics.jsonl says that is no single number."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on exactly, as JSON types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            RunError: it is of another budget.
        """
        del state  # nothing learned, nothing saved


class NoBudget(Budget):
    """`budget.schedule: none`: completions are limited by `trainer.max_completion_length` alone."""

    def tokens(self, step: int) -> int | None:
        del step
        return None


class SteppedBudget(Budget):
    """Levels of equal length over the run, in tokens: exponential, linear, or just one (constant)."""

    def __init__(self, levels: list[int], total: int) -> None:
        self.levels, self.total = levels, total

    def tokens(self, step: int) -> int:
        return self.levels[level_at(step, self.total, len(self.levels))]


class DecayedBudget(Budget):
    """`budget.schedule: exponential` by factor and interval; see `decayed`."""

    def __init__(self, start: int, gamma: float, interval: int) -> None:
        self.start, self.gamma, self.interval = start, gamma, interval

    def tokens(self, step: int) -> int:
        return decayed(step, self.start, self.gamma, self.interval)


class AdaptiveBudget(Budget):
    """`budget.schedule: adaptive`: tighter while accuracy holds, looser when it falls. Ours, not the paper's.

    After every `window` generation batches their mean accuracy a, all generated at the present budget, is
    compared with the best such mean so far, this one included:

        best − a ≤ tolerance        tightened: one level down (at_end: it is the last level already)
        best − a > 2·tolerance      loosened: one level up (at_start: it is the first level already)
        otherwise                   held: another window at the same budget

    The gap between the two keeps noise from sending the budget back and forth. The best is never forgotten, and as the
    largest of noisy means it is a little too high; so the tolerance should exceed the standard error of a window's
    mean, √(p(1 − p)/rollouts) and more when rollouts share prompts. The run may end before the last level is reached.

    No signal: batches without accuracy (NaN) do not count, and a window of nothing else leaves the budget as it is
    (no_signal). The accuracies are all it depends on, so equal ones give equal budgets.

    Args:
        levels: budgets in tokens, falling.
        window: generation batches per decision.
        tolerance: in accuracy.
    """

    def __init__(self, levels: list[int], window: int, tolerance: float) -> None:
        self.levels, self.window, self.tolerance = levels, window, tolerance
        self.level = 0
        self.batches = 0  # in the present window
        self.accuracies: list[float] = []  # of those that have one
        self.best: float | None = None
        self.reason: Reason = "waiting"

    def tokens(self, step: int) -> int:
        del step
        return self.levels[self.level]

    def observe(self, accuracy: float) -> None:
        self.batches += 1
        if not math.isnan(accuracy):
            self.accuracies.append(accuracy)
        if self.batches < self.window:
            self.reason = "waiting"
            return
        self.reason = self._decide()
        self.level += {"tightened": 1, "loosened": -1}.get(self.reason, 0)
        self.batches, self.accuracies = 0, []

    def _decide(self) -> Reason:
        if not self.accuracies:
            return "no_signal"
        mean = math.fsum(self.accuracies) / len(self.accuracies)
        self.best = mean if self.best is None else max(self.best, mean)
        shortfall = self.best - mean
        if shortfall <= self.tolerance:
            return "tightened" if self.level < len(self.levels) - 1 else "at_end"
        if shortfall > 2 * self.tolerance:
            return "loosened" if self.level > 0 else "at_start"
        return "held"

    def metrics(self) -> dict[str, float]:
        return {
            "budget/level": float(self.level),
            "budget/best_accuracy": float("nan") if self.best is None else self.best,
        }

    def tables(self) -> dict[str, Any]:
        """`budget/reason`: what the last batch led to; a change takes effect with the next batch."""
        return {"budget/reason": self.reason}

    def state_dict(self) -> dict[str, Any]:
        return {
            "levels": self.levels,
            "level": self.level,
            "batches": self.batches,
            "accuracies": list(self.accuracies),
            "best": self.best,
            "reason": self.reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("levels") != self.levels:
            raise RunError(
                f"the checkpoint's budget had the levels {state.get('levels')}, not {self.levels}",
                why="where it stood among them would mean something else",
                fix="resume with the `budget` in the run's recipe.yaml, or start the run again",
            )
        self.level, self.batches = state["level"], state["batches"]
        self.accuracies, self.best, self.reason = list(state["accuracies"]), state["best"], state["reason"]


def make_budget(section: AnyBudget, limit: int, total: int) -> Budget:
    """The recipe's `budget:`.

    Args:
        section: that section.
        limit: longest completion in tokens, `trainer.max_completion_length`.
        total: optimizer steps of the run; used only where the drops are spread over it.
    """
    if isinstance(section, NoBudgetSection):
        return NoBudget()
    if isinstance(section, ConstantSection):
        return SteppedBudget([section.tokens], total=1)
    start, end = section.first(limit), section.last(limit)
    if isinstance(section, LinearSection):
        return SteppedBudget(linear_levels(start, end, section.decays), total)
    if isinstance(section, AdaptiveSection):
        levels = dict.fromkeys(exponential_levels(start, end, section.levels - 1))  # rounding may make some equal
        return AdaptiveBudget(list(levels), section.window, section.tolerance)
    if section.gamma is not None and section.interval is not None:
        return DecayedBudget(start, section.gamma, section.interval)
    return SteppedBudget(exponential_levels(start, end, section.drops), total)


def last_budget(section: AnyBudget, limit: int, total: int) -> int | None:
    """The budget that a run ends with, in tokens; None without a schedule.

    Of `adaptive`, the tightest one, though a run may end before it. Of `gamma` and `interval` in a run whose steps are
    not known beforehand (`total` below 1), the first.

    Args:
        section, limit, total: as for `make_budget`.
    """
    if isinstance(section, AdaptiveSection):
        return section.last(limit)
    return make_budget(section, limit, total).tokens(max(0, total - 1))
