"""What a recipe's `allocation` needs of its batches and its data."""

from typing import TYPE_CHECKING

from rlbal.allocation_sections import KnapsackAllocation
from rlbal.errors import DataError, RecipeError, nearest
from rlbal.prompts.allocation import check_bounds
from rlbal.prompts.ledger import PromptLedger
from rlbal.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from rlbal.batch_plan import BatchPlan


def check_allocation(recipe: Recipe, plan: "BatchPlan") -> None:
    """Whether `allocation.low` and `.high` allow the generation batch, and leave something to decide.

    Raises:
        RecipeError: they do not.
    """
    section = recipe.allocation
    if not isinstance(section, KnapsackAllocation):
        return
    check_bounds(plan.prompts, plan.rollouts, section.low, section.high)
    if plan.prompts == 1 or plan.rollouts_per_prompt in (section.low, section.high):
        raise RecipeError(
            f"{plan.prompts} prompts with {section.low} to {section.high} rollouts each and {plan.rollouts} in all "
            "leave nothing to allocate",
            fix=f"keep `algorithm.rollouts_per_prompt` ({plan.rollouts_per_prompt}) between `allocation.low` and "
            "`allocation.high`, with several prompts to a batch, or set `allocation.method: uniform`",
        )


def strata_of(recipe: Recipe, rows: "Dataset") -> list[str] | None:
    """The stratum of every prompt, by `allocation.strata`; None without the key. Rows without a value are of one kind.

    Raises:
        DataError: the data have no such column.
    """
    column = recipe.allocation.strata
    if column is None:
        return None
    if column not in rows.column_names:
        raise DataError(
            f"`allocation.strata` names the column `{column}`, which the training rows do not have",
            fix=nearest(column, rows.column_names),
        )
    return [str(value) for value in rows[column]]


def check_strata(recipe: Recipe, rows: "Dataset") -> None:
    """Refuse early what a ledger would refuse.

    Raises:
        DataError: `allocation.strata` names no column, or one of too many values.
    """
    PromptLedger(len(rows), 0.0, strata_of(recipe, rows))
