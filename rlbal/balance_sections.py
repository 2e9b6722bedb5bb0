"""The sections of a recipe that balance rewards: `weighting` and `advantage`."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from rlbal.section import Section

TOKENS = "tokens"  # the objective that is no reward: mean completion length


class FixedWeights(Section):
    """`rewards.functions.<name>.weight`, unchanged throughout."""

    method: Literal["fixed"] = "fixed"


class ScheduledWeights(Section):
    """Weights that follow the run's progress (see `rlbal.balance.weighting`)."""

    method: Literal["schedule"]
    points: dict[str, list[tuple[float, float]]] = Field(
        description="Reward name -> [[progress 0..1, weight], ...], linear in between and constant outside; a reward "
        "that is not named keeps its weight."
    )

    @model_validator(mode="after")
    def _points(self) -> Self:
        if not self.points:
            raise PydanticCustomError("points", "`weighting.points` is empty; give at least one reward's points")
        for name, points in self.points.items():
            progress = [at for at, _ in points]
            if not points or progress != sorted(set(progress)) or not 0 <= progress[0] <= progress[-1] <= 1:
                raise PydanticCustomError(
                    "points",
                    f"`weighting.points.{name}` must be [[progress, weight], ...] with progress rising from 0 to 1 at "
                    f"most, not {[list(point) for point in points]}",
                )
        return self


class HypervolumeWeights(Section):
    """Larger steps while the scores reach new ground (see `rlbal.balance.hypervolume`)."""

    method: Literal["hypervolume"]
    objectives: dict[str, Literal["max", "min"]] = Field(
        default_factory=dict,
        description="Reward name -> max or min, 2 to 6 of them; `tokens` is the mean completion length.",
    )
    source: Literal["train", "validation"] = Field(
        default="train",
        description="Scores of the training rollouts, smoothed, or of the evaluations every `evaluation.every` steps.",
    )
    smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="With `source: train`: share of the old in the moving average of scores; default 0.9.",
    )
    apply: Literal["learning_rate", "advantages", "rewards"] = Field(
        default="learning_rate",
        description="What the factor multiplies. Normalization cancels it on rewards, Adam nearly so on advantages: "
        "these two are for comparison.",
    )

    @model_validator(mode="before")
    @classmethod
    def _directions(cls, values: Any) -> Any:
        objectives = values.get("objectives") if isinstance(values, dict) else None
        for name, direction in (objectives or {}).items() if isinstance(objectives or {}, dict) else ():
            if direction not in ("max", "min"):
                raise PydanticCustomError(
                    "direction",
                    f"`weighting.objectives.{name}` has no direction: write `{name}: max` (more is better) or "
                    f"`{name}: min`",
                )
        return values

    @model_validator(mode="after")
    def _objectives(self) -> Self:
        if not 2 <= len(self.objectives) <= 6:
            raise PydanticCustomError(
                "objectives",
                f"`weighting.objectives` needs 2 to 6 objectives with their directions, such as {{correct: max, "
                f"{TOKENS}: min}}, and has {len(self.objectives)}",
            )
        if self.source == "validation" and self.smoothing is not None:
            raise PydanticCustomError(
                "smoothing", "`weighting.smoothing` is for `source: train`; evaluations are not smoothed"
            )
        return self

    @property
    def resolved_smoothing(self) -> float:
        return 0.0 if self.source == "validation" else 0.9 if self.smoothing is None else self.smoothing


class GradientWeights(Section):
    """More weight for rewards whose gradient agrees with the others' (see `rlbal.balance.gradients`)."""

    method: Literal["gradient"]
    step_size: float = Field(default=0.02, gt=0, description="η/μ of the paper: how fast weights follow the influence.")
    interval: int = Field(default=1, ge=1, description="Generation batches from one update of the weights to the next.")
    gradient_scale: Literal["none", "mean", "unit"] = Field(
        default="mean",
        description="What gradients are divided by before they are compared: nothing (the paper), their root mean "
        "square length, so that the step size means the same for every model, or each its own length.",
    )
    floor: float = Field(default=0.05, ge=0, lt=1, description="Least weight of a reward; the weights sum to 1.")
    cap: float = Field(default=1.0, gt=0, le=1, description="Largest weight of a reward.")
    probe: Literal["last_projection", "last_blocks", "trainable"] = Field(
        default="last_projection",
        description="Parameters whose gradients are compared. last_projection: the last projection of the last block, "
        "at next to no cost; last_blocks and trainable (LoRA's matrices, under `lora:`): a backward pass per reward, "
        "not under DeepSpeed or FSDP.",
    )
    blocks: int = Field(default=1, ge=1, description="With `probe: last_blocks`: how many.")

    @model_validator(mode="after")
    def _blocks(self) -> Self:
        if self.blocks != 1 and self.probe != "last_blocks":
            raise PydanticCustomError("blocks", "`weighting.blocks` is for `probe: last_blocks`")
        return self


AnyWeights = Annotated[
    FixedWeights | ScheduledWeights | HypervolumeWeights | GradientWeights, Field(discriminator="method")
]
METHODS: list[str] = [
    get_args(kind.model_fields["method"].annotation)[0]
    for kind in (FixedWeights, ScheduledWeights, HypervolumeWeights, GradientWeights)
]


class BetaSection(Section):
    """How `advantage.scale: beta` finds its density (see `rlbal.balance.normalization`)."""

    estimator: Literal["moments", "beta_binomial"] = Field(
        default="moments",
        description="moments: the paper's, from the prompts' mean rewards; beta_binomial: without the noise that few "
        "rollouts put into them.",
    )
    smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of the old in the moving averages of m and v; default: 0 for moments, 0.9 for "
        "beta_binomial.",
    )
    cap: float = Field(default=10.0, gt=0, description="Largest absolute advantage of one reward, before weighting.")

    @property
    def resolved_smoothing(self) -> float:
        return self.smoothing if self.smoothing is not None else {"moments": 0.0, "beta_binomial": 0.9}[self.estimator]


class AdvantageSection(Section):
    """How rewards become advantages (see `rlbal.balance.advantages`). Unset keys follow `algorithm.name`."""

    baseline: Literal["group", "leave_one_out", "batch", "none"] | None = None
    scale: Literal["none", "group_std", "batch_std", "beta"] | None = None
    order: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    whiten: bool = Field(
        default=False, description="Standardise the final advantages over the batch (GDPO's last step)."
    )
    beta: BetaSection | None = Field(default=None, description="Settings of `scale: beta`.")
    aggregation: Literal["loss", "prompt"] | None = Field(
        default=None,
        description="loss: rows or tokens weigh alike, as `trainer.loss_type` has it, so that a prompt weighs by its "
        "rollouts; prompt: prompts weigh alike. Default: prompt with `allocation.method: knapsack`, else loss.",
    )

    @model_validator(mode="after")
    def _beta(self) -> Self:
        if self.beta is not None and self.scale != "beta":
            raise PydanticCustomError("beta", f"`advantage.beta` is for `advantage.scale: beta`, not `{self.scale}`")
        return self
