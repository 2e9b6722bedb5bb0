"""Errors a user can act on: what is wrong, why, and how to fix it."""

import difflib
from collections.abc import Iterable


class RlbalError(Exception):
    """Something the user can fix. The command line prints it without a traceback and exits with 1.

    Args:
        what: what is wrong, naming the recipe key, file, column or reward.
        why: the reason, if `what` does not already say it.
        fix: what to do about it.
    """

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(part for part in (what, why and f"Why: {why}", fix and f"Fix: {fix}") if part))


class RecipeError(RlbalError):
    """The recipe cannot mean what it says."""


class DataError(RlbalError):
    """A dataset file, column or row is not usable."""


class RewardError(RlbalError):
    """A reward function cannot be loaded, or failed while scoring."""


class RunError(RlbalError):
    """A run directory cannot be used as asked."""


class TrainingStopped(RlbalError):
    """Training ended early on purpose; the work so far is saved."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return a hint naming the closest option, or all of them when none is close (and they are few)."""
    options = sorted(set(options))
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"Did you mean `{close[0]}`?"
    return f"Known here: {', '.join(f'`{option}`' for option in options)}." if 0 < len(options) <= 25 else ""
