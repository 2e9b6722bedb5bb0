"""How long completions may get: the recipe's `budget` at work, in prompt, reward and cap at once."""

from typing import TYPE_CHECKING, Any

from rlbal.budget_checks import has_budget_field
from rlbal.budget_sections import TOKEN_BUDGET, NoBudgetSection
from rlbal.prompts.budget import longest_completion, make_budget, prompt_budget, with_budget
from rlbal.recipe import Recipe

if TYPE_CHECKING:
    from rlbal.batch import RolloutBatch
    from rlbal.trainers.allocator import RolloutAllocator

Rows = list[dict[str, Any]]


class LengthBudget:
    """The token budget of one run.

    Args:
        recipe: the run's recipe.
        limit: longest completion in tokens, `trainer.max_completion_length`.
        total: optimizer steps of the run.
        allocator: knows how well each prompt does.
    """

    def __init__(self, recipe: Recipe, limit: int, total: int, allocator: "RolloutAllocator") -> None:
        self.section, self.limit, self.allocator = recipe.budget, limit, allocator
        self.schedule = make_budget(recipe.budget, limit, total)
        self.has_field = has_budget_field(recipe.data)

    def tokens(self, step: int) -> int | None:
        """The budget for rollouts generated after so many optimizer steps, or None."""
        return self.schedule.tokens(step)

    def tell(self, rows: Rows, step: int) -> tuple[Rows, int]:
        """Copies of the rows with their budgets in prompt and column, and the longest completion worth generating.

        Without a schedule, prompts that tell a budget tell the longest completion, and there is no column.
        """
        tokens = self.tokens(step)
        if tokens is None or isinstance(self.section, NoBudgetSection):
            if self.has_field:
                rows = [{**row, "prompt": with_budget(row["prompt"], self.limit)} for row in rows]
            return rows, self.limit
        budgets, widest = [tokens] * len(rows), tokens
        if self.section.scope == "prompt":
            believed = self.allocator.believed([row["prompt_index"] for row in rows], step)
            budgets = [prompt_budget(tokens, rate, *self.section.prompt_scale) for rate in believed.tolist()]
            # One cap for all processes: prompts may have tighter budgets, none has a wider one.
            widest = prompt_budget(tokens, 0.0, *self.section.prompt_scale)
        told = [
            {**row, "prompt": with_budget(row["prompt"], budget), TOKEN_BUDGET: budget}
            for row, budget in zip(rows, budgets, strict=True)
        ]
        return told, longest_completion(self.section, widest, self.limit)

    def observe(self, batch: "RolloutBatch", step: int) -> dict[str, float]:
        """Learn how a batch went, after the allocator has; what metrics.jsonl says of its budget (NaN without one)."""
        tokens = self.tokens(step)
        metrics = {"budget/tokens": float("nan") if tokens is None else float(tokens)}
        if batch.budget_N is not None:
            metrics["budget/told"] = batch.budget_N.double().mean().item()
        self.schedule.observe(self.allocator.accuracy)
        return metrics | self.schedule.metrics()
