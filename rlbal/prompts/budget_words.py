"""What a budget schedule will do, in words."""

from rlbal.budget_sections import AdaptiveSection, AnyBudget, NoBudgetSection
from rlbal.prompts.budget import DecayedBudget, SteppedBudget, make_budget

MOST = 8  # budgets named one by one
FIRST = 4  # of more than that


def in_words(section: AnyBudget, limit: int, total: int) -> str | None:
    """A schedule in a line, as in `linear: 256 tokens at step 0, 172 at 200, 87 at 400`; None without one.

    Args:
        section: the recipe's `budget`.
        limit: longest completion in tokens, `trainer.max_completion_length`.
        total: optimizer steps of the run; below 1 if not known beforehand.
    """
    if isinstance(section, NoBudgetSection):
        return None
    if isinstance(section, AdaptiveSection):
        levels = f"{section.levels} levels from {section.first(limit)} to {section.last(limit)} tokens"
        words = f"{levels}, tighter while accuracy holds and looser when it falls"
    else:
        words = ", ".join(_named(changes(section, limit, total)))
    if section.scope == "prompt":
        easy, hard = section.prompt_scale
        words += f"; times {easy:g} for prompts always solved, {hard:g} for those never solved"
    words += "; completions end at twice the budget" if section.cap else "; completions may be longer"
    return f"{section.schedule}: {words}"


def changes(section: AnyBudget, limit: int, total: int) -> list[tuple[int, int]]:
    """(step, tokens) of the first step and of every step with another budget than before; not for `adaptive`."""
    budget = make_budget(section, limit, total)
    if isinstance(budget, SteppedBudget):
        starts = [-(-level * budget.total // len(budget.levels)) for level in range(len(budget.levels))]
    elif isinstance(budget, DecayedBudget):
        starts = list(range(0, total if total > 0 else MOST * budget.interval, budget.interval))
    else:
        starts = []
    found: list[tuple[int, int]] = []
    for step in starts:
        tokens = budget.tokens(step)
        if tokens is not None and (not found or tokens != found[-1][1]):
            found.append((step, tokens))
    return found


def _named(found: list[tuple[int, int]]) -> list[str]:
    (_, first), *others = found
    if not others:
        return [f"{first} tokens"]
    named = [f"{first} tokens at step 0", *(f"{tokens} at {step}" for step, tokens in others)]
    return named if len(named) <= MOST else [*named[:FIRST], "…", named[-1]]
