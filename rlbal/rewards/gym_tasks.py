"""What a recipe's reasoning-gym data mean for the scorer: the options it needs, and whether it evaluates code.

Nothing here imports reasoning-gym or a reward.
"""

from typing import TYPE_CHECKING, Any

from rlbal.errors import RewardError

if TYPE_CHECKING:  # workers import this module and should start fast
    from rlbal.recipe import AnyData, Recipe, RewardsSection

SCORER = "reward_fns.reasoning_gym:score"
# Scorers that run text as Python code: the completion itself with `eval` or sympy's `parse_expr` (which evals), or,
# in bitwise_arithmetic and number_sorting, text of the dataset. A test compares this with the installed package.
UNSAFE_TASKS = frozenset(
    {
        "binary_matrix",
        "bitwise_arithmetic",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "number_sorting",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)


def task_options(data: "AnyData") -> dict[str, dict[str, Any]]:
    """The tasks that reasoning-gym data come from, each with its options; none for other data.

    What is malformed in a composite is left out here: making the problems refuses it.
    """
    if data.source != "reasoning_gym":
        return {}
    if data.task != "composite":
        return {data.task: data.config}
    parts = data.config.get("datasets")
    named = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return {str(part["name"]): part.get("config") or {} for part in named if "name" in part}


def fit_to_data(recipe: "Recipe") -> "RewardsSection":
    """The recipe's rewards, with reasoning-gym's scorer knowing the options that the problems are made with.

    `configs` in the scorer's `args` is left as it is.

    Raises:
        RewardError: the scorer of a task evaluates code, and the recipe does not say `unsafe: true`.
    """
    options, functions = task_options(recipe.data), dict(recipe.rewards.functions)
    for name, spec in functions.items():
        if spec.function != SCORER or not options:
            continue
        unsafe = sorted(UNSAFE_TASKS & set(options))
        if unsafe and not spec.unsafe:
            raise RewardError(
                f"reward `{name}`: the scorer of the reasoning-gym task `{unsafe[0]}` evaluates text as Python code",
                why="a completion could run anything through it",
                fix=f"choose another task, or accept the risk with `rewards.functions.{name}.unsafe: true`",
            )
        functions[name] = spec.model_copy(update={"args": {"configs": options, **spec.args}})
    return recipe.rewards.model_copy(update={"functions": functions})
