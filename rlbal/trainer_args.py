"""A recipe as TRL's GRPOConfig, for the processes that it asks for or for those that are here."""

import os
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rlbal.allocation_checks import check_allocation
from rlbal.balance_checks import check_probe
from rlbal.batch_plan import BatchPlan, plan_batches
from rlbal.budget_checks import check_budget
from rlbal.errors import RecipeError, RunError
from rlbal.ppo_checks import check_ppo_trainer
from rlbal.recipe import Recipe
from rlbal.speed import check_speed
from rlbal.trainer_section import check_generation, validate_trainer, with_defaults

if TYPE_CHECKING:
    from trl import GRPOConfig


def config_kwargs(recipe: Recipe, trainer: dict[str, Any], plan: BatchPlan) -> dict[str, Any]:
    """Keyword arguments of GRPOConfig: the recipe's `trainer:` section and what the other sections decide."""
    evaluation, equal = recipe.evaluation, recipe.allocation.method == "uniform" and plan.rollouts_per_prompt > 1
    aggregation = recipe.advantage.order
    kwargs: dict[str, Any] = {
        "use_vllm": False,
        "report_to": "none",
        **trainer,
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        # TRL's own advantages are replaced by ours; this only has to satisfy its reshapes. With equal groups it is the
        # truth, so that TRL's own logs are too.
        "num_generations": plan.rollouts_per_prompt if equal else plan.rollouts,
        "num_generations_eval": 1,
        "scale_rewards": {"batch_std": "batch", "none": "none"}.get(str(recipe.advantage.scale), "group"),
        "multi_objective_aggregation": aggregation,
        "reward_weights": [spec.weight for spec in recipe.rewards.functions.values()],
        "remove_unused_columns": False,
        "trust_remote_code": recipe.model.trust_remote_code,
        "logging_steps": 1,
        "eval_strategy": "no" if evaluation.every is None else "steps",
        "eval_steps": evaluation.every,
        "metric_for_best_model": f"eval_{evaluation.best_metric}" if evaluation.every is not None else None,
        "greater_is_better": True if evaluation.every is not None else None,
    }
    if recipe.ppo is not None:
        # TRL then has a reference model and its log-probabilities; the trainer keeps the KL term out of the loss.
        kwargs["beta"] = recipe.ppo.kl_penalty
    return kwargs


def _build(kwargs: dict[str, Any]) -> "GRPOConfig":
    from transformers.integrations import get_reporting_integration_callbacks
    from trl import GRPOConfig

    if kwargs.get("max_completion_length", 1) is None:
        raise RecipeError("`trainer.max_completion_length` needs a number of tokens")
    if kwargs.get("max_steps") == 0:
        raise RecipeError("`trainer.max_steps: 0` would train nothing", fix="leave it out to use `num_train_epochs`")
    if kwargs.get("save_strategy") == "best" and kwargs["metric_for_best_model"] is None:
        raise RecipeError(
            "`trainer.save_strategy: best` needs evaluations to tell which is best",
            fix="set `evaluation.every`, or leave `trainer.save_strategy` out",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            args = GRPOConfig(**kwargs)
        get_reporting_integration_callbacks(args.report_to)  # knows the names; needs none of them installed
        if isinstance(args.lr_scheduler_kwargs, dict) and args.lr_scheduler_kwargs:
            _try_schedule(args.lr_scheduler_type, args.lr_scheduler_kwargs)
    except (ValueError, TypeError, ImportError, NotImplementedError, OSError) as error:
        raise RecipeError("TRL refuses the `trainer:` section", why=str(error)) from None
    if isinstance(args.chat_template_kwargs, str):
        raise RecipeError(
            f"`trainer.chat_template_kwargs`: {args.chat_template_kwargs!r} is not a mapping",
            fix="write it as `{enable_thinking: false}`",
        )
    return args


def _try_schedule(name: Any, kwargs: dict[str, Any]) -> None:
    """Build the learning rate schedule once, for an optimizer of nothing, to try its arguments."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    get_scheduler(name, optimizer, 1, 10, scheduler_specific_kwargs=kwargs)


def missing_package(args: "GRPOConfig") -> RecipeError | None:
    """What the `trainer:` section asks for and this machine has not installed, or None."""
    from transformers.integrations import get_available_reporting_integrations

    if args.use_vllm and find_spec("vllm") is None:
        return RecipeError(
            "`trainer.use_vllm` needs vLLM, which is not installed",
            fix="install the extra `vllm`, as in `pip install -e .[vllm]`, or add `trainer.use_vllm=false` (slower)",
        )
    trackers = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for name in sorted(set(trackers) - {"none", "all"} - set(get_available_reporting_integrations())):
        return RecipeError(f"`trainer.report_to: {name}` needs a package that is not installed", fix=f"install {name}")
    return None


def bind_trainer(recipe: Recipe) -> "tuple[GRPOConfig, BatchPlan]":
    """Check a recipe against TRL, peft and accelerate_configs/ on any machine, also one without the GPUs it asks for.

    Sizes are those of `launch.num_processes`, simulated as one process with as many times the rows.

    Raises:
        RecipeError: what the checks here, GRPOConfig, `check_budget`, `check_speed` or `lora_config` refuse, or an
            accelerate configuration that does not exist or is none.
    """
    from rlbal.launch import accelerate_config, read_accelerate_config
    from rlbal.model import lora_config

    trainer = validate_trainer(recipe.trainer)
    plan = plan_batches(recipe, with_defaults(trainer), recipe.launch.num_processes)
    check_allocation(recipe, plan)
    check_generation(recipe, trainer)
    check_budget(recipe, with_defaults(trainer))
    check_ppo_trainer(recipe, with_defaults(trainer))
    kwargs = config_kwargs(recipe, trainer, plan)
    kwargs["per_device_train_batch_size"] = plan.per_device * plan.num_processes
    kwargs["use_cpu"] = True
    kwargs.pop("tf32", None)  # only a GPU can be asked for it
    args = _build(kwargs)
    check_speed(recipe, args)
    check_probe(recipe, args)
    lora_config(recipe)
    if recipe.launch.accelerate is not None:
        read_accelerate_config(accelerate_config(recipe.launch.accelerate))
    return args, plan


def check_engine(distributed_type: str) -> None:
    """Refuse what accelerate would quietly replace by another engine.

    Args:
        distributed_type: what the processes have become, in accelerate's words.

    Raises:
        RunError: FSDP was asked for, and DDP on CPUs is there.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and distributed_type == "MULTI_CPU":
        raise RunError(
            "FSDP needs GPUs, and there are none",
            why="on CPUs accelerate takes DDP in its place, and says nothing",
            fix="launch with zero2, zero3 or cpu_2proc of accelerate_configs/",
        )


def completion_limit(args: "GRPOConfig") -> int:
    """Longest completion in tokens."""
    assert args.max_completion_length is not None  # checked by `_build`
    return args.max_completion_length


def chat_options(args: "GRPOConfig") -> dict[str, Any]:
    """Keyword arguments of the chat template; TRL has parsed them if the recipe gave a JSON text."""
    assert not isinstance(args.chat_template_kwargs, str)
    return args.chat_template_kwargs or {}


def training_args(recipe: Recipe, num_processes: int) -> "tuple[GRPOConfig, BatchPlan]":
    """The GRPOConfig for the processes that are really here.

    On a machine without accelerator, the CPU is used, in float32 unless the recipe sets `trainer.bf16` or `.fp16`.

    Raises:
        RecipeError: as `bind_trainer`, for the live number of processes; or a package is missing that it needs.
        RunError: as `check_engine`.
    """
    import torch

    trainer = validate_trainer(recipe.trainer)
    plan = plan_batches(recipe, with_defaults(trainer), num_processes)
    check_allocation(recipe, plan)
    check_generation(recipe, trainer)
    check_budget(recipe, with_defaults(trainer))
    check_ppo_trainer(recipe, with_defaults(trainer))
    kwargs = config_kwargs(recipe, trainer, plan)
    if not torch.accelerator.is_available():
        kwargs["use_cpu"] = True
        # TRL and the shipped launch configurations say bf16, which a CPU has no use for.
        if not trainer.get("bf16") and not trainer.get("fp16"):
            kwargs["bf16"] = False
            os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    args = _build(kwargs)
    check_engine(args.distributed_state.distributed_type.value)
    check_speed(recipe, args)
    check_probe(recipe, args)
    if missing := missing_package(args):
        raise missing
    return args, plan
