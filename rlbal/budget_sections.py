"""The `budget` section of a recipe: how many tokens a completion may use, and how that changes over training."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from rlbal.section import Section

TOKEN_BUDGET = "token_budget"  # the field in templates and the column that rewards get
PROMPT_SCALE = (0.5, 1.0)
DROPS = 3

Tokens = Annotated[int, Field(ge=1)]


class NoBudgetSection(Section):
    """Completions are limited by `trainer.max_completion_length` alone."""

    schedule: Literal["none"] = "none"


class TokenBudgetSection(Section):
    """What all budgets have in common (see `rlbal.prompts.budget`)."""

    cap: bool = Field(
        default=True,
        description="Stop generating at twice the budget, since nothing longer earns length reward; never beyond "
        "`trainer.max_completion_length`.",
    )
    scope: Literal["batch", "prompt"] = Field(
        default="batch",
        description="One budget for all prompts, or a tighter one for prompts that the policy finds easy.",
    )
    prompt_scale: tuple[float, float] = Field(
        default=PROMPT_SCALE,
        description="With `scope: prompt`: what the budget is multiplied by for a prompt believed to be always solved, "
        "and for one never solved; linear in between.",
    )

    @model_validator(mode="after")
    def _prompt_scale(self) -> Self:
        easy, hard = self.prompt_scale
        if not 0 < easy < hard:
            raise PydanticCustomError(
                "prompt_scale",
                f"`budget.prompt_scale` must be [for easy prompts, for hard ones] with 0 < easy < hard, not "
                f"{list(self.prompt_scale)}",
            )
        if self.scope == "batch" and self.prompt_scale != PROMPT_SCALE:
            raise PydanticCustomError("prompt_scale", "`budget.prompt_scale` is for `budget.scope: prompt`")
        return self


class ConstantSection(TokenBudgetSection):
    """The same budget throughout."""

    schedule: Literal["constant"]
    tokens: Tokens


class DecayingSection(TokenBudgetSection):
    """From one budget to a smaller one."""

    start: Tokens | None = Field(default=None, description="First budget; default: `trainer.max_completion_length`.")
    end: Tokens | None = Field(default=None, description="Last budget; default: a third of the first.")

    @model_validator(mode="after")
    def _falling(self) -> Self:
        if self.start is not None and self.end is not None and self.end >= self.start:
            raise PydanticCustomError("end", not_falling(self.start, self.end))
        return self

    def first(self, limit: int) -> int:
        """The first budget, where completions have at most `limit` tokens."""
        return self.start or limit

    def last(self, limit: int) -> int:
        """The last budget, where completions have at most `limit` tokens."""
        return self.end or max(1, self.first(limit) // 3)


class LinearSection(DecayingSection):
    """Equal drops after equal times."""

    schedule: Literal["linear"]
    decays: int = Field(default=DROPS, ge=1, description="How often the budget drops (n).")

    @property
    def drops(self) -> int:
        return self.decays


class ExponentialSection(DecayingSection):
    """Drops by an equal factor, given by `start`, `end` and `decays`, or by `start`, `gamma` and `interval`."""

    schedule: Literal["exponential"]
    decays: int | None = Field(default=None, ge=1, description="How often the budget drops (n); default 3.")
    gamma: float | None = Field(default=None, description="Factor at each drop, between 0 and 1.")
    interval: int | None = Field(default=None, ge=1, description="Optimizer steps between drops.")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.gamma is not None and not 0 < self.gamma < 1:
            raise PydanticCustomError(
                "gamma", f"`budget.gamma: {self.gamma}` must lie between 0 and 1, so that the budget falls"
            )
        if (self.gamma is None) != (self.interval is None):
            missing = "interval" if self.interval is None else "gamma"
            raise PydanticCustomError(
                "gamma",
                f"`budget.{missing}` is missing: `gamma` and `interval` go together, or give `end` and `decays`",
            )
        if self.gamma is not None and (self.end is not None or self.decays is not None):
            raise PydanticCustomError(
                "gamma", "`budget.gamma` with `interval`, and `budget.end` with `decays`, say the same; keep one pair"
            )
        return self

    @property
    def drops(self) -> int:
        """How often the budget drops, without `gamma`."""
        return DROPS if self.decays is None else self.decays


class AdaptiveSection(DecayingSection):
    """Tightens while accuracy holds, loosens when it falls (see `rlbal.prompts.budget.AdaptiveBudget`)."""

    schedule: Literal["adaptive"]
    levels: int = Field(default=8, ge=2, description="Budgets from `start` to `end`, each smaller by an equal factor.")
    window: int = Field(
        default=10, ge=1, description="Generation batches whose mean accuracy decides on the next budget."
    )
    tolerance: float = Field(
        default=0.03,
        gt=0,
        lt=0.5,
        description="How far below its best the accuracy may be for a tighter budget; twice as far, and it loosens.",
    )


AnyBudget = Annotated[
    NoBudgetSection | ConstantSection | ExponentialSection | LinearSection | AdaptiveSection,
    Field(discriminator="schedule"),
]
SCHEDULES: list[str] = [
    get_args(kind.model_fields["schedule"].annotation)[0]
    for kind in (NoBudgetSection, ConstantSection, ExponentialSection, LinearSection, AdaptiveSection)
]


def not_falling(start: int, end: int) -> str:
    """The message for a last budget that is not below the first."""
    return (
        f"`budget.end` ({end}) must be below `budget.start` ({start}), since budgets tighten; swap them, or use "
        "`budget.schedule: constant`"
    )
