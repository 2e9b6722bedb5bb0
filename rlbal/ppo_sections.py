"""The `ppo` section of a recipe: how the critic of PPO judges and learns."""

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from rlbal.section import Section


class PPOSection(Section):
    """Token advantages from a critic (see `rlbal.balance.gae`) and the critic itself (`rlbal.trainers.value`)."""

    gamma: float = Field(default=1.0, gt=0, le=1, description="Discount of the future, from one token to the next.")
    # Below 1 the critic learns its own guesses: one that starts at 0 says "worth little" for long, of all but the last
    # tokens. benchmarks/algorithms/README.md has a comparison.
    lam: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="λ of generalised advantage estimation: 1 trusts the rewards alone, 0 the critic's next value.",
    )
    whiten: bool = Field(default=True, description="Standardise the advantages over all tokens of a batch.")
    kl_penalty: float = Field(
        default=0.0, ge=0, description="Reward a token loses per nat that it is likelier than in the reference model."
    )
    truncation: Literal["terminal", "bootstrap"] = Field(
        default="terminal",
        description="terminal: a completion that the token limit cuts off has ended; bootstrap: the critic says what "
        "would have come, which rewards never finishing as much as finishing.",
    )
    critic: Literal["shared", "separate"] = Field(
        default="shared",
        description="shared: a head on the policy's hidden states; separate: a second model with such a head.",
    )
    detach: bool = Field(
        default=False, description="With `critic: shared`: values train the head alone, not the policy beneath it."
    )
    critic_warmup_steps: int = Field(
        default=0, ge=0, description="Optimizer steps in which the critic learns and the policy stays as it is."
    )
    critic_learning_rate: float | None = Field(
        default=None, gt=0, description="Of the critic's own weights; default: `trainer.learning_rate`."
    )
    value_coef: float = Field(default=0.1, gt=0, description="What the critic's loss counts beside the policy's.")
    value_clip: float | None = Field(
        default=0.2, gt=0, description="How far a value may move from where it was at the rollouts; null: anywhere."
    )

    @model_validator(mode="after")
    def _critic(self) -> Self:
        if self.critic == "separate" and self.detach:
            raise PydanticCustomError(
                "detach", "`ppo.detach` is for `ppo.critic: shared`; a separate critic never touches the policy"
            )
        return self
