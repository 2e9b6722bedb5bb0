"""What a recipe's `weighting` and `advantage` need of its other sections."""

from typing import TYPE_CHECKING

import numpy as np
from pydantic_core import PydanticCustomError

from rlbal.balance_sections import TOKENS, GradientWeights, HypervolumeWeights, ScheduledWeights
from rlbal.errors import RecipeError, nearest
from rlbal.sections import RewardSpec

if TYPE_CHECKING:
    from trl import GRPOConfig

    from rlbal.recipe import Recipe


def check_weighting(recipe: "Recipe") -> None:
    """Whether `weighting` suits the rewards and the evaluation."""
    functions, weighting = recipe.rewards.functions, recipe.weighting
    if isinstance(weighting, ScheduledWeights):
        for name in weighting.points:
            _known_reward(name, "weighting.points", functions)
        _some_weight(weighting, functions)
    if isinstance(weighting, HypervolumeWeights):
        _possible_hypervolume(weighting, recipe)
    if isinstance(weighting, GradientWeights):
        _possible_simplex(weighting, functions)


def check_probe(recipe: "Recipe", args: "GRPOConfig") -> None:
    """Whether TRL's loss lets the rewards' gradients be told apart.

    Raises:
        RecipeError: it does not, or not with this probe.
    """
    section = recipe.weighting
    if not isinstance(section, GradientWeights):
        return
    if args.loss_type == "vespo" and args.use_vllm and args.vllm_importance_sampling_correction:
        raise RecipeError(
            "`weighting.method: gradient` does not know how `trainer.loss_type: vespo` weighs tokens that vLLM sampled",
            fix="use another loss, or set `trainer.vllm_importance_sampling_correction: false`",
        )
    narrow = section.probe == "last_projection"
    if narrow and (args.entropy_coef != 0.0 or args.use_adaptive_entropy):
        raise RecipeError(
            "`weighting.probe: last_projection` cannot tell the rewards' gradients from that of the entropy bonus "
            "(`trainer.entropy_coef`)",
            fix="leave the bonus out, or set `weighting.probe: last_blocks`",
        )
    if not narrow and args.top_entropy_quantile < 1.0:
        raise RecipeError(
            f"`weighting.probe: {section.probe}` counts every token, and `trainer.top_entropy_quantile` trains on some",
            fix="set `weighting.probe: last_projection`",
        )
    checkpointing = args.gradient_checkpointing_kwargs if args.gradient_checkpointing else None
    if not narrow and isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise RecipeError(
            f"`weighting.probe: {section.probe}` cannot go back through reentrant checkpoints",
            fix="set `use_reentrant: false` in `trainer.gradient_checkpointing_kwargs`",
        )


def check_advantage(recipe: "Recipe") -> None:
    """Whether `advantage` suits the rollouts and the rewards."""
    group_size, advantage = recipe.algorithm.rollouts_per_prompt, recipe.advantage
    if group_size == 1 and advantage.baseline in ("group", "leave_one_out"):
        raise PydanticCustomError(
            "group_of_one",
            f"`advantage.baseline: {advantage.baseline}` compares the rollouts of one prompt, but "
            "`algorithm.rollouts_per_prompt` is 1, so every advantage would be 0; use at least 2 rollouts, or "
            "`advantage.baseline: batch` or `none` (algorithm reinforce)",
        )
    if group_size == 1 and advantage.scale in ("group_std", "beta"):
        raise PydanticCustomError(
            "group_of_one",
            f"`advantage.scale: {advantage.scale}` needs several rollouts per prompt, but "
            "`algorithm.rollouts_per_prompt` is 1; use at least 2, or `advantage.scale: none` or `batch_std`",
        )
    if advantage.scale == "beta":
        if advantage.order != "normalize_then_sum":
            raise PydanticCustomError(
                "order",
                "`advantage.scale: beta` normalises each reward by its own Beta density, so it needs "
                "`advantage.order: normalize_then_sum`",
            )
        if advantage.baseline != "group":
            raise PydanticCustomError(
                "baseline",
                "`advantage.scale: beta` is defined around the group mean: set `advantage.baseline: group`",
            )
        for name, spec in recipe.rewards.functions.items():
            if spec.range is None:
                raise PydanticCustomError(
                    "range",
                    f"`advantage.scale: beta` maps rewards to [0, 1]: give `rewards.functions.{name}.range`",
                )


def _known_reward(name: str, key: str, functions: dict[str, RewardSpec], *others: str) -> None:
    if name not in functions:
        known = [*functions, *others]
        raise PydanticCustomError(
            "reward_name", f"`{key}.{name}`: `{name}` is not under `rewards.functions`. {nearest(name, known)}".strip()
        )


def _some_weight(weighting: ScheduledWeights, functions: dict[str, RewardSpec]) -> None:
    """At no time is every weight 0."""
    points = {name: weighting.points.get(name, [(0.0, spec.weight)]) for name, spec in functions.items()}
    for progress in sorted({0.0, 1.0, *(at for some in points.values() for at, _ in some)}):
        if not any(np.interp(progress, *np.array(some).T) for some in points.values()):
            raise PydanticCustomError(
                "weights",
                f"`weighting.points` give every reward the weight 0 at progress {progress:g}, so there is nothing to "
                "learn; give at least one a weight",
            )


def _possible_hypervolume(weighting: HypervolumeWeights, recipe: "Recipe") -> None:
    """Every objective has scores, and a range that maps them to [0, 1]."""
    for name in weighting.objectives:
        if name == TOKENS and TOKENS not in recipe.rewards.functions:
            continue
        _known_reward(name, "weighting.objectives", recipe.rewards.functions, TOKENS)
        if recipe.rewards.functions[name].range is None:
            raise PydanticCustomError(
                "range",
                f"`weighting.objectives` maps every score to [0, 1]: give `rewards.functions.{name}.range`",
            )
    if weighting.source == "validation" and recipe.evaluation.every is None:
        raise PydanticCustomError(
            "never_scored",
            "`weighting.source: validation` takes its scores from evaluations, and there are none: set "
            "`evaluation.every`",
        )
    if weighting.apply == "rewards" and recipe.advantage.scale == "beta":
        raise PydanticCustomError(
            "apply",
            "`weighting.apply: rewards` takes rewards out of the ranges that `advantage.scale: beta` relies on; use "
            "`apply: learning_rate`",
        )


def _possible_simplex(weighting: GradientWeights, functions: dict[str, RewardSpec]) -> None:
    """Gradient weights are positive, sum to 1, and keep between floor and cap."""
    for name, spec in functions.items():
        if spec.weight < 0:
            raise PydanticCustomError(
                "weights",
                f"`weighting.method: gradient` keeps weights on the simplex, so `rewards.functions.{name}.weight` "
                f"cannot be {spec.weight}; let the function return the negated reward",
            )
    used = sum(spec.weight > 0 for spec in functions.values())  # a reward of weight 0 is only logged
    if used < 2:
        raise PydanticCustomError(
            "weights",
            "`weighting.method: gradient` balances rewards against each other, and only one has a weight; give another "
            "one a weight, or use `weighting.method: fixed`",
        )
    if weighting.floor * used > 1:
        raise PydanticCustomError(
            "floor",
            f"`weighting.floor: {weighting.floor}` is too high for {used} rewards whose weights sum to 1; at most "
            f"{1 / used:.3g}",
        )
    if weighting.cap * used < 1:
        raise PydanticCustomError(
            "cap",
            f"`weighting.cap: {weighting.cap}` is too low for {used} rewards whose weights sum to 1; at least "
            f"{1 / used:.3g}",
        )
    if used == 2 and weighting.gradient_scale == "unit":
        raise PydanticCustomError(
            "gradient_scale",
            "`weighting.gradient_scale: unit` gives two rewards the same influence, so their weights would never "
            "move; use `mean` or `none`",
        )
