"""The recipe's `trainer:` section: any field of TRL's GRPOConfig, except those that another section decides."""

import dataclasses
import typing
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from rlbal.errors import RecipeError, nearest
from rlbal.recipe import Recipe

# TRL's key -> where the recipe says it.
OWNED = {
    "output_dir": "`output_dir`",
    "seed": "`seed`",
    "data_seed": "`seed`",
    "num_generations": "`algorithm.rollouts_per_prompt`",
    "num_generations_eval": "`evaluation.samples_per_prompt`",
    "per_device_eval_batch_size": "`evaluation.batch_size`",
    "scale_rewards": "`advantage.scale`",
    "multi_objective_aggregation": "`advantage.order`",
    "reward_weights": "`rewards.functions.<name>.weight`",
    "remove_unused_columns": "nothing: rlbal keeps every column, since rewards may need them",
    "model_init_kwargs": "`model`",
    "trust_remote_code": "`model.trust_remote_code`",
    "do_eval": "`evaluation`",
    "eval_strategy": "`evaluation.every`",
    "eval_steps": "`evaluation.every`",
    "eval_on_start": "`evaluation.at_start`",
    "metric_for_best_model": "`evaluation.best_metric`",
    "greater_is_better": "`evaluation.best_metric`",
    "load_best_model_at_end": "`evaluation.best_metric` (the best checkpoint is kept)",
    "resume_from_checkpoint": "`rlbal train --resume`",
    "save_only_model": "nothing: a run goes on from its checkpoints, which therefore hold everything",
    "save_on_each_node": "nothing: all processes write to one run directory, on a file system they share",
    "sync_ref_model": "nothing: a moving reference model is in no checkpoint, so that a resumed run would lose it",
    "logging_steps": "nothing: every step is logged, so that metrics.jsonl has no gaps",
    "logging_strategy": "nothing: every step is logged, so that metrics.jsonl has no gaps",
}
CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "vllm_mode": ("colocate", "server"),
}

# TRL takes any number here and fails later, or not at all.
POSITIVE = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "generation_batch_size",
    "num_iterations",
    "num_train_epochs",
    "max_completion_length",
    "ddp_timeout",
    "temperature",
}
NOT_NEGATIVE = {"learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "beta"}
BELOW_ONE = {"adam_beta1", "adam_beta2"}


@cache
def trainer_model() -> type[BaseModel]:
    """A pydantic model with GRPOConfig's fields, types, defaults and help texts, without rlbal's own keys."""
    from trl import GRPOConfig

    hints = typing.get_type_hints(GRPOConfig)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(GRPOConfig):
        if not field.init or field.name in OWNED:
            continue
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = None if field.default is dataclasses.MISSING else field.default
        # Choices get their own message in `validate_trainer`, before the types are looked at.
        kind = typing.Literal[CHOICES[field.name]] if field.name in CHOICES else hints[field.name]
        low = 0 if field.name in POSITIVE else None
        least = 0 if field.name in NOT_NEGATIVE | BELOW_ONE else None
        high = 1 if field.name in BELOW_ONE else None
        fields[field.name] = (kind, Field(default, gt=low, ge=least, lt=high, description=field.metadata.get("help")))
    config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=())
    return create_model("TrainerSection", __config__=config, **fields)


def validate_trainer(values: dict[str, Any]) -> dict[str, Any]:
    """Check the keys and types of a `trainer:` section.

    Returns:
        The same keys with values of TRL's types (`"1e-5"` becomes a float).

    Raises:
        RecipeError: a key TRL does not have, one that another section owns, or a value of the wrong type.
    """
    model = trainer_model()
    for key in values:
        if key in OWNED:
            raise RecipeError(f"`trainer.{key}` is not set here", fix=f"its place in the recipe: {OWNED[key]}")
        if key not in model.model_fields:
            raise RecipeError(f"`trainer.{key}` is not a field of TRL's GRPOConfig. {nearest(key, model.model_fields)}")
    # YAML reads a bare `no` as false; here it is the name of a strategy.
    if values.get("save_strategy") is False:
        values = {**values, "save_strategy": "no"}
    try:
        checked = model.model_validate(values)
    except ValidationError as error:
        lines = [f"`trainer.{item['loc'][0]}`: {item['msg']} (got {item['input']!r})" for item in error.errors()]
        raise RecipeError("\n".join(lines)) from None
    return {key: getattr(checked, key) for key in values}


def with_defaults(trainer: dict[str, Any]) -> dict[str, Any]:
    """A checked `trainer:` section with TRL's defaults for what it leaves out."""
    defaults = {name: field.default for name, field in trainer_model().model_fields.items()}
    return {**defaults, **trainer}


def check_generation(recipe: Recipe, trainer: dict[str, Any]) -> None:
    """Refuse generation engines that cannot do what the recipe asks.

    Raises:
        RecipeError: the vLLM server with groups that are not equal and at least two, two engines at once, lengths or
            numbers given to the engine behind the recipe's back, or a loss that cannot correct for vLLM as told.
    """

    def value(key: str) -> Any:
        return trainer.get(key, trainer_model().model_fields[key].default)

    if trainer.get("use_vllm") and trainer.get("use_transformers_continuous_batching"):
        raise RecipeError(
            "`trainer.use_vllm` and `trainer.use_transformers_continuous_batching` are two engines for one job",
            fix="keep one of them",
        )
    equal_groups = recipe.allocation.method == "uniform" and recipe.algorithm.rollouts_per_prompt > 1
    if trainer.get("use_vllm") and value("vllm_mode") == "server" and not equal_groups:
        raise RecipeError(
            "`trainer.vllm_mode: server` needs equal groups of at least 2 rollouts",
            why="TRL sends every num_generations-th prompt to the server and asks for that many completions of each",
            fix="use `trainer.vllm_mode: colocate`, or `allocation.method: uniform` with "
            "`algorithm.rollouts_per_prompt` above 1",
        )
    limits = {"n", "max_tokens", "max_new_tokens", "max_length"} & set(value("generation_kwargs") or {})
    if limits:
        raise RecipeError(
            f"`trainer.generation_kwargs.{min(limits)}` is decided elsewhere",
            fix="`trainer.max_completion_length` and `budget` say how long completions get, `algorithm` and "
            "`allocation` how many there are",
        )
    corrected = trainer.get("use_vllm") and value("vllm_importance_sampling_correction")
    if value("loss_type") == "vespo" and corrected and not value("vllm_importance_sampling_mode").startswith("token_"):
        raise RecipeError(
            "`trainer.loss_type: vespo` corrects for vLLM token by token, but "
            f"`trainer.vllm_importance_sampling_mode` is `{value('vllm_importance_sampling_mode')}`",
            fix="set it to `token_truncate` or `token_mask`",
        )
