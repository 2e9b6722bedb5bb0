"""What PPO needs of a recipe's other sections, and what it has no use for."""

from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from rlbal.balance_sections import GradientWeights, HypervolumeWeights
from rlbal.errors import RecipeError

if TYPE_CHECKING:
    from rlbal.recipe import Recipe


def check_section(values: dict[str, Any], is_ppo: bool) -> None:
    """Whether the raw sections of a recipe are those of its algorithm."""
    if not is_ppo and "ppo" in values:
        raise PydanticCustomError("ppo", "`ppo` is for `algorithm.name: ppo`")
    if is_ppo and isinstance(advantage := values.get("advantage"), dict) and advantage:
        raise PydanticCustomError(
            "advantage",
            f"`advantage.{next(iter(advantage))}` has no meaning with `algorithm.name: ppo`, whose critic says what a "
            "token is compared with: leave `advantage` out (`advantage=null` on the command line), and see `ppo.lam` "
            "and `ppo.whiten`",
        )


def check_ppo(recipe: "Recipe") -> None:
    """Whether `ppo` suits `lora` and `weighting`."""
    if recipe.ppo is None:
        return
    if recipe.ppo.critic == "separate" and recipe.lora is not None:
        raise PydanticCustomError(
            "critic",
            "`ppo.critic: separate` would train a whole second model beside the adapter that `lora` asks for: use "
            "`ppo.critic: shared`",
        )
    weighting = recipe.weighting
    mixed = recipe.ppo.critic == "shared" and not recipe.ppo.detach
    if isinstance(weighting, GradientWeights) and weighting.probe == "last_projection" and mixed:
        raise PydanticCustomError(
            "probe",
            "`weighting.probe: last_projection` cannot tell the rewards' gradients from those of a critic on the "
            "policy's hidden states: set `ppo.detach: true`, or `weighting.probe: last_blocks` (not with DeepSpeed or "
            "FSDP)",
        )
    if isinstance(weighting, HypervolumeWeights) and weighting.apply != "learning_rate":
        raise PydanticCustomError(
            "apply",
            f"`weighting.apply: {weighting.apply}` would change what the critic has to predict from one batch to the "
            "next: with `algorithm.name: ppo` leave it at `learning_rate`",
        )


def check_ppo_trainer(recipe: "Recipe", trainer: dict[str, Any]) -> None:
    """Whether the `trainer:` section, with TRL's defaults, leaves PPO its loss.

    Raises:
        RecipeError: it asks for another loss, or would never train the policy.
    """
    if recipe.ppo is None:
        return
    if trainer["mask_truncated_completions"]:
        raise RecipeError(
            "`trainer.mask_truncated_completions` leaves out of the loss what a critic has to learn from",
            fix="leave it out; `ppo.truncation` says what being cut off means",
        )
    if trainer["beta"] != 0.0:
        raise RecipeError(
            "`trainer.beta` puts a KL term into the loss, and PPO has it in the rewards", fix="set `ppo.kl_penalty`"
        )
    if trainer["loss_type"] != "dapo":
        raise RecipeError(
            f"`trainer.loss_type: {trainer['loss_type']}` is not PPO's loss",
            why="that is the clipped one, averaged over all tokens, which TRL calls `dapo`",
            fix="leave `trainer.loss_type` out",
        )
    if trainer["importance_sampling_level"] != "token":
        raise RecipeError(
            "`trainer.importance_sampling_level: sequence` weighs whole completions, and PPO weighs tokens",
            fix="leave it out",
        )
    if recipe.ppo.critic_warmup_steps > 0 and trainer["weight_decay"] > 0:
        raise RecipeError(
            "`trainer.weight_decay` would shrink the policy during `ppo.critic_warmup_steps`, when it is to stay",
            fix="leave one of them out",
        )
    steps = trainer["max_steps"]
    if 0 < steps <= recipe.ppo.critic_warmup_steps:
        raise RecipeError(
            f"`ppo.critic_warmup_steps` ({recipe.ppo.critic_warmup_steps}) leaves none of the {steps} steps "
            "(`trainer.max_steps`) to the policy",
            fix="lower it, or train longer",
        )
