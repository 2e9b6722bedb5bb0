"""What the recipe's `speed:` section can do for a recipe, and what it cannot."""

from typing import TYPE_CHECKING

from rlbal.errors import RecipeError
from rlbal.recipe import Recipe

if TYPE_CHECKING:
    from trl import GRPOConfig

# These losses divide by the tokens of the whole generation batch; the others by rows or tokens of a micro-batch.
GLOBAL_TOKEN_LOSSES = ("dapo", "cispo", "vespo")


def inexact(args: "GRPOConfig", aux_loss: bool = False) -> str | None:
    """Why compacted micro-batches would change the gradient, in words; None where they do not.

    Args:
        args: TRL's settings.
        aux_loss: the model adds the auxiliary loss of a mixture of experts.
    """
    if args.beta != 0.0 and args.loss_type not in GLOBAL_TOKEN_LOSSES:
        return f"`trainer.beta` adds a KL term that `trainer.loss_type: {args.loss_type}` averages per micro-batch"
    if args.entropy_coef != 0.0 or args.use_adaptive_entropy:
        return "the entropy bonus (`trainer.entropy_coef`) is averaged per micro-batch"
    if args.top_entropy_quantile < 1.0:
        return "`trainer.top_entropy_quantile` compares the tokens of a micro-batch"
    if aux_loss:
        return "the auxiliary loss of a mixture of experts is averaged per micro-batch"
    return None


def check_speed(recipe: Recipe, args: "GRPOConfig") -> None:
    """Refuse settings that would have no effect.

    Raises:
        RecipeError: a token budget where micro-batches stay as they are, or rows at once for another engine.
    """
    speed, engines = recipe.speed, ("use_vllm", "use_transformers_continuous_batching")
    if speed.max_tokens_per_micro_batch is not None:
        reason = inexact(args)
        if not speed.compact_micro_batches:
            reason = "`speed.compact_micro_batches` is false"
        if reason is not None:
            raise RecipeError(
                "`speed.max_tokens_per_micro_batch` cannot be kept, since micro-batches stay as TRL makes them",
                why=reason,
                fix="leave it out and lower `trainer.per_device_train_batch_size` instead",
            )
    if speed.rows_at_once is not None:
        others = [f"`trainer.{key}`" for key in engines if getattr(args, key)]
        others += ["`speed.generation: transformers`"] if speed.generation == "transformers" else []
        if others:
            raise RecipeError(
                f"`speed.rows_at_once` is for rlbal's own generation, and {others[0]} asks for another",
                fix="leave one of them out",
            )
