"""The `allocation` section of a recipe: which prompts are tried, how often, and what is remembered of them."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from rlbal.section import Section

FORGETTING = 0.01


class AllocationSection(Section):
    """What all ways of allocating have in common: the ledger (`rlbal.prompts.ledger`) and the pool of prompts."""

    forgetting: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of what is known of a prompt that every optimizer step takes away; default 0.01, and 1 with "
        "`belief: mean`.",
    )
    strata: str | None = Field(
        default=None,
        description="Column whose values (a level, a source) divide the prompts into kinds that share what they have "
        "shown: a prompt never tried starts with the belief about its kind.",
    )
    retire_at: float | None = Field(
        default=None,
        gt=0.5,
        lt=1,
        description="A prompt believed to succeed this often (ScaleRL: 0.9), after 8 rollouts at least, is not drawn "
        "any more; default: none retires.",
    )
    review_fraction: float = Field(
        default=0.0, ge=0, le=1, description="Share of the retired prompts that are drawn in an epoch all the same."
    )

    @model_validator(mode="after")
    def _review(self) -> Self:
        if self.review_fraction > 0 and self.retire_at is None:
            raise PydanticCustomError(
                "review", "`allocation.review_fraction` is for retired prompts: set `allocation.retire_at`, e.g. 0.9"
            )
        return self

    @property
    def resolved_forgetting(self) -> float:
        return FORGETTING if self.forgetting is None else self.forgetting


class UniformAllocation(AllocationSection):
    """Every prompt of a batch gets `algorithm.rollouts_per_prompt` rollouts."""

    method: Literal["uniform"] = "uniform"

    @model_validator(mode="before")
    @classmethod
    def _uniform(cls, values: Any) -> Any:
        if isinstance(values, dict) and (
            foreign := values.keys() & (KnapsackAllocation.model_fields.keys() - cls.model_fields.keys())
        ):
            raise PydanticCustomError("method", f"`allocation.{min(foreign)}` is for `allocation.method: knapsack`")
        return values


class KnapsackAllocation(AllocationSection):
    """Every rollout goes to the prompt where it is worth most (see `rlbal.prompts.allocation`)."""

    method: Literal["knapsack"]
    belief: Literal["posterior", "mean"] = Field(
        default="posterior",
        description="posterior: the expectation over what is not known of a prompt; mean: the paper's, the success "
        "rate of its last visit, after a first epoch of equal shares.",
    )
    value: Literal["knapsack", "variance", "nonzero"] = Field(
        default="knapsack",
        description="What a rollout is worth: the paper's value, less variance of the batch's gradient, or the chance "
        "that a prompt's rollouts differ.",
    )
    low: int = Field(default=2, ge=1, description="Least rollouts of a prompt.")
    high: int = Field(default=128, ge=1, description="Most rollouts of a prompt.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.low > self.high:
            raise PydanticCustomError(
                "bounds", f"`allocation.low` ({self.low}) is above `allocation.high` ({self.high}); swap them"
            )
        if self.belief == "mean" and (self.forgetting is not None or self.strata is not None):
            key = "strata" if self.strata is not None else "forgetting"
            raise PydanticCustomError(
                "belief",
                f"`allocation.{key}` is for `belief: posterior`; with `belief: mean` only a prompt's own last visit "
                "counts: leave it out",
            )
        return self

    @property
    def resolved_forgetting(self) -> float:
        return 1.0 if self.belief == "mean" else super().resolved_forgetting


AnyAllocation = Annotated[UniformAllocation | KnapsackAllocation, Field(discriminator="method")]
ALLOCATIONS: list[str] = [
    get_args(kind.model_fields["method"].annotation)[0] for kind in (UniformAllocation, KnapsackAllocation)
]
