"""From `module:function` or `path/to/file.py:function` in a recipe to a function that is known to fit.

Reward code is imported here and nowhere else: by training and checking, and for `rlbal eval` by worker processes only.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from rlbal.errors import RewardError, nearest

if TYPE_CHECKING:  # workers import this module and should start fast
    from rlbal.recipe import RewardSpec, RewardsSection

# What TRL passes besides dataset columns.
ROLLOUT_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
TRAINER_ARGUMENTS = frozenset({"trainer_state", "log_extra", "log_metric", "environments"})
# The one column that says something of the whole batch: its mean completion length in tokens, the same in each row.
# A rowwise reward gets it only by naming it, and can then be scored only when the batch is complete.
MEAN_LENGTH = "mean_completion_length"


def log_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of TRL's `log_extra` and `log_metric` where no trainer is there to log."""


WITHOUT_TRAINER = {"trainer_state": None, "log_extra": log_nothing, "log_metric": log_nothing}


class Signature(NamedTuple):
    """What a reward function says of itself.

    Attributes:
        named: its parameters, and whether each must be given.
        takes_any: it has `**kwargs`.
        must_sandbox: a completion can hang or abuse it, so it may run in workers only.
    """

    named: dict[str, bool]
    takes_any: bool
    must_sandbox: bool

    def accepted(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the given arguments that the function takes."""
        return {key: value for key, value in given.items() if self.takes_any or key in self.named}


def load_function(name: str, path: str) -> Callable[..., Any]:
    """Import the function that a recipe names.

    Args:
        name: the reward's name, for messages.
        path: `module:function`, or `path/to/file.py:function` relative to the working directory.

    Raises:
        RewardError: no such module, file or function; importing it failed; or it cannot be called.
    """
    where, _, function_name = path.rpartition(":")
    is_file = where.endswith(".py") or "/" in where
    module = _import_file(name, Path(where)) if is_file else _import_module(name, where)
    if not hasattr(module, function_name):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(
            f"reward `{name}`: {where} has no function `{function_name}`",
            fix=nearest(function_name, own) or "correct `function:` in the recipe",
        )
    function = getattr(module, function_name)
    if not callable(function):
        raise RewardError(f"reward `{name}`: `{path}` is a {type(function).__name__}, not a function")
    try:
        inspect.signature(function)
    except (TypeError, ValueError):  # some of those written in C
        raise RewardError(
            f"reward `{name}`: `{path}` does not say which arguments it takes", fix="wrap it in a function of your own"
        ) from None
    return function


def _import_module(name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise RewardError(
                f"reward `{name}`: there is no module `{module}`",
                why="it is neither installed nor on Python's path",
                fix="install it, correct the name, or give the file: `path/to/file.py:function`",
            ) from None
        raise _import_failed(name, module, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(name, module, error) from error


def _import_file(name: str, path: Path) -> ModuleType:
    path = path.absolute()
    if not path.is_file():
        near = [str(found) for found in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise RewardError(
            f"reward `{name}`: there is no file {path}",
            why="a reward's file is looked up from the working directory",
            fix=nearest(str(path), near) or "correct `function:` in the recipe",
        )
    module_name = f"rlbal_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"reward `{name}`: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _import_failed(name, str(path), error) from error
    return module


def _import_failed(name: str, where: str, error: BaseException) -> RewardError:
    return RewardError(f"reward `{name}`: importing {where} failed", why=f"{type(error).__name__}: {error}")


def signature(function: Callable[..., Any]) -> Signature:
    """Look at a function that `load_function` gave."""
    parameters = inspect.signature(function).parameters.values()
    named = {
        parameter.name: parameter.default is parameter.empty
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return Signature(named, takes_any, bool(getattr(function, "must_sandbox", False)))


def bind(
    function: Callable[..., Any], args: Mapping[str, Any], unsafe: bool, given: Mapping[str, Any]
) -> Callable[[], Any]:
    """The call of a function with what it accepts of `given`; the recipe's `args` and `unsafe` win over columns."""
    said = signature(function)
    own = {**args, "unsafe": unsafe} if "unsafe" in said.named else args
    return partial(function, **{**said.accepted(given), **own})


def check_spec(name: str, spec: "RewardSpec", said: Signature) -> None:
    """Check that a recipe's entry can work with the function it names.

    Raises:
        RewardError: an argument the function does not name, rows that cannot be scored one by one, or a scorer that
            must not run inside the trainer's process.
    """
    key = f"rewards.functions.{name}"
    options = set(said.named) - ROLLOUT_ARGUMENTS - TRAINER_ARGUMENTS - {"unsafe"}
    for argument in spec.args:
        if argument not in options:
            hint = "set `unsafe: true` beside `args`, not in it" if argument == "unsafe" else nearest(argument, options)
            raise RewardError(
                f"`{key}.args.{argument}`: {spec.function} has no such argument",
                why="an argument must be named in the function's signature, or a misspelt one would be ignored",
                fix=hint or "leave it out",
            )
    if spec.rowwise and (whole := sorted(TRAINER_ARGUMENTS & set(said.named))):
        raise RewardError(
            f"`{key}.rowwise: true`, but {spec.function} asks for `{whole[0]}`",
            why="that exists in the trainer's process only, and rowwise rewards run in workers",
            fix=f"set `{key}.rowwise: false`",
        )
    if not spec.rowwise and (said.must_sandbox or spec.unsafe):
        raise RewardError(
            f"reward `{name}` ({spec.function}) must run in a worker process",
            why="a completion can hang it or run code through it, and inside the trainer it could not be stopped",
            fix=f"set `{key}.rowwise: true`",
        )


def can_overlap(spec: "RewardSpec", said: Signature) -> bool:
    """Whether a row can be scored, in a worker, while the batch's other rows are still being generated."""
    return spec.rowwise and (MEAN_LENGTH not in said.named or MEAN_LENGTH in spec.args)


def required_columns(spec: "RewardSpec", said: Signature) -> tuple[str, ...]:
    """Dataset columns that the function cannot do without: parameters with no default that `args` does not give."""
    given = ROLLOUT_ARGUMENTS | TRAINER_ARGUMENTS | {"unsafe"} | set(spec.args)
    return tuple(parameter for parameter, required in said.named.items() if required and parameter not in given)


def check_columns(
    section: "RewardsSection", signatures: Mapping[str, Signature], columns: Iterable[str], has_budget: bool = False
) -> None:
    """Check that every column that the rewards need is there.

    Args:
        section: the recipe's `rewards`.
        signatures: of each reward's function.
        columns: of the dataset.
        has_budget: whether a budget schedule adds the column `token_budget`; `mean_completion_length` always is added.

    Raises:
        RewardError: naming the reward, the column and what there is.
    """
    from rlbal.budget_sections import TOKEN_BUDGET

    columns, added = sorted(columns), {MEAN_LENGTH, TOKEN_BUDGET} if has_budget else {MEAN_LENGTH}
    for name, said in signatures.items():
        for column in required_columns(section.functions[name], said):
            if column == TOKEN_BUDGET and not has_budget:
                raise RewardError(
                    f"reward `{name}` needs column `{TOKEN_BUDGET}`, and the recipe has no budget",
                    why="only a budget schedule provides it",
                    fix="set `budget.schedule`, e.g. `budget: {schedule: constant, tokens: 64}`, or give it in "
                    f"`rewards.functions.{name}.args`",
                )
            if column not in columns and column not in added:
                there = ", ".join(f"`{one}`" for one in columns)
                raise RewardError(
                    f"reward `{name}` needs column `{column}`; the dataset has {there}",
                    fix=f"map a column to it with `data.columns: {{{column}: <column>}}`, "
                    f"or give it in `rewards.functions.{name}.args`",
                )
