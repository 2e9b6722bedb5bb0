"""What a recipe's `budget` needs of its other sections."""

import math
from string import Formatter
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from rlbal.budget_sections import (
    TOKEN_BUDGET,
    AnyBudget,
    ConstantSection,
    DecayingSection,
    ExponentialSection,
    LinearSection,
    NoBudgetSection,
    TokenBudgetSection,
    not_falling,
)
from rlbal.errors import RecipeError

if TYPE_CHECKING:
    from rlbal.recipe import Recipe
    from rlbal.sections import DataSection


def has_budget_field(data: "DataSection") -> bool:
    """Whether `data.prompt` or `data.system` holds the field `{token_budget}`."""
    return any(_holds_field(template) for template in (data.prompt, data.system) if template is not None)


def _holds_field(template: str) -> bool:
    try:
        return any(field == TOKEN_BUDGET for _, field, _, _ in Formatter().parse(template))
    except ValueError:  # no template at all: its own message follows when the data are read
        return True


def check_template(recipe: "Recipe") -> None:
    """Whether the policy is told its budget, so that it can keep to it."""
    if isinstance(recipe.budget, NoBudgetSection) or has_budget_field(recipe.data):
        return
    raise PydanticCustomError(
        "token_budget",
        f"`budget.schedule: {recipe.budget.schedule}` sets a token budget that no prompt mentions: put "
        "`{token_budget}` into `data.prompt` or `data.system`, as in "
        '`data.prompt: "{question} Use at most {token_budget} tokens."`, or set `budget.schedule: none`',
    )


def check_budget(recipe: "Recipe", trainer: dict[str, Any]) -> None:
    """Whether the budget suits the model, the longest completion and the length of the run.

    Args:
        recipe: a recipe.
        trainer: its checked `trainer:` section, TRL's defaults included.

    Raises:
        RecipeError: a budget above the tiny model's positions or `trainer.max_completion_length`, one that does not
            fall once the defaults are filled in, or more drops than there are steps. Other models' positions are known
            when they are loaded (`check_positions`).
    """
    section, limit, tiny = recipe.budget, trainer["max_completion_length"], recipe.model.tiny
    if isinstance(section, NoBudgetSection) or limit is None:
        return
    if tiny is not None:
        _check_room(section, limit, tiny.max_positions, "lower it, or raise `model.tiny.max_positions`")
    if section.cap and trainer["mask_truncated_completions"]:
        raise RecipeError(
            "`trainer.mask_truncated_completions` would take out of the loss just what `budget.cap` cuts off",
            why="nothing would teach the policy to stop within twice its budget",
            fix="set `budget.cap: false`, or leave `trainer.mask_truncated_completions` out",
        )
    key, largest = largest_budget(section, limit)
    if largest > limit:
        raise RecipeError(
            f"`budget.{key}` ({largest}) is more than `trainer.max_completion_length` ({limit}) allows",
            fix="lower the budget, or raise the limit, best to twice the budget: length rewards look that far",
        )
    if isinstance(section, ExponentialSection) and section.gamma is not None:
        return
    if isinstance(section, DecayingSection) and section.last(limit) >= section.first(limit):
        raise RecipeError(not_falling(section.first(limit), section.last(limit)))
    if isinstance(section, LinearSection | ExponentialSection):
        _check_total(section, trainer["max_steps"])


def largest_budget(section: TokenBudgetSection, limit: int) -> tuple[str, int]:
    """The key of the largest budget that any prompt gets, and its tokens, where completions have at most `limit`."""
    if isinstance(section, ConstantSection):
        key, largest = "tokens", section.tokens
    else:
        assert isinstance(section, DecayingSection)
        key, largest = "start", section.first(limit)
    if section.scope == "prompt" and section.prompt_scale[1] > 1:
        return f"{key}` x `budget.prompt_scale", math.floor(largest * section.prompt_scale[1] + 0.5)
    return key, largest


def check_positions(section: AnyBudget, limit: int, positions: int) -> None:
    """Whether a model that is loaded has room for a prompt beside the largest budget and the longest completion.

    Args:
        section: the recipe's `budget`.
        limit: longest completion in tokens.
        positions: of the model, prompt and completion together.

    Raises:
        RecipeError: it has not.
    """
    if not isinstance(section, NoBudgetSection):
        _check_room(section, limit, positions, "lower it, and `trainer.max_completion_length` with it")
    if limit >= positions:
        raise RecipeError(
            f"`trainer.max_completion_length` ({limit}) leaves no room for a prompt in the model's {positions} "
            "positions",
            fix="lower it",
        )


def _check_room(section: TokenBudgetSection, limit: int, positions: int, fix: str) -> None:
    key, largest = largest_budget(section, limit)
    if largest >= positions:
        raise RecipeError(
            f"`budget.{key}` ({largest}) leaves no room for a prompt in the model's {positions} positions", fix=fix
        )


def _check_total(section: LinearSection | ExponentialSection, max_steps: int) -> None:
    """Whether the run is known to have a step for each budget."""
    if max_steps <= 0:
        other = ", or give `budget.gamma` and `budget.interval`" if isinstance(section, ExponentialSection) else ""
        raise RecipeError(
            f"`budget.schedule: {section.schedule}` spreads its drops over the run, and `trainer.max_steps` is not set",
            fix=f"set `trainer.max_steps` instead of epochs{other}",
        )
    if section.drops >= max_steps:
        raise RecipeError(
            f"`budget.decays` ({section.drops}) needs more optimizer steps than `trainer.max_steps` ({max_steps})",
            fix=f"at most {max_steps - 1}" if max_steps > 1 else "use `budget.schedule: constant`",
        )
