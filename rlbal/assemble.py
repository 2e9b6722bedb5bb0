"""What a run is put together from: data, rewards, model and trainer."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlbal.budget_checks import check_positions
from rlbal.errors import DataError
from rlbal.recipe import Recipe
from rlbal.run import RunDirectory

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import GRPOConfig

    from rlbal.batch_plan import BatchPlan
    from rlbal.prompts.data import PromptData
    from rlbal.rewards.suite import RewardSuite
    from rlbal.trainers.grpo import BalancedGRPOTrainer


@dataclass(frozen=True)
class Inputs:
    """What a run is made of before there is a run directory or a model."""

    recipe: Recipe
    args: "GRPOConfig"
    plan: "BatchPlan"
    data: "PromptData"
    suite: "RewardSuite"


@dataclass(frozen=True)
class Policy:
    """The model to train, its tokenizer, the training rows whose prompts it can take, and a separate critic if any."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    rows: "Dataset"
    critic: "PreTrainedModel | None" = None


def load_inputs(recipe: Recipe, args: "GRPOConfig", plan: "BatchPlan") -> Inputs:
    """Load data and rewards, and check that they fit together and fill a batch.

    Raises:
        RlbalError: what does not load or does not fit.
    """
    from rlbal.allocation_checks import check_strata
    from rlbal.model import lora_config
    from rlbal.prompts.data import load_data
    from rlbal.rewards.suite import RewardSuite

    lora_config(recipe)
    suite = RewardSuite.for_recipe(recipe)
    data = load_data(recipe.data, recipe.seed)
    _check_fills_batch(len(data.train), plan)
    suite.check_columns(data.train.column_names)
    check_strata(recipe, data.train)
    suite.start()
    if args.distributed_state.is_main_process:
        print(plan.explain(), file=sys.stderr)
        if plan.num_processes != recipe.launch.num_processes:
            print(
                f"note: the recipe is written for {recipe.launch.num_processes} processes (`launch.num_processes`) and "
                f"{plan.num_processes} are here, so the generation batch is another one",
                file=sys.stderr,
            )
        for note in data.notes:
            print(f"note: {note}", file=sys.stderr)
    return Inputs(recipe, args, plan, data, suite)


def _check_fills_batch(prompts: int, plan: "BatchPlan") -> None:
    if prompts < plan.prompts:
        raise DataError(
            f"{prompts} training prompts do not fill one generation batch of {plan.prompts} prompts",
            why=plan.explain(),
            fix="use more data (`data`), smaller batches (`trainer.per_device_train_batch_size`) or more "
            "`algorithm.rollouts_per_prompt`",
        )


def load_policy(inputs: Inputs, source: str | Path) -> Policy:
    """Load the model and its tokenizer from a hub id or a folder, and see whether the run fits them.

    Raises:
        RlbalError: it does not load, `lora:` does not suit it, or prompts and completions do not fit.
    """
    from rlbal.model import adapter_parameters, context_length, load_model, load_tokenizer, lora_config
    from rlbal.prompts.lengths import limit_prompt_tokens
    from rlbal.trainer_args import chat_options, completion_limit

    recipe, args = inputs.recipe, inputs.args
    tokenizer, model = load_tokenizer(source, recipe.model), load_model(source, recipe.model)
    if (positions := context_length(model)) is not None:
        check_positions(recipe.budget, completion_limit(args), positions)
    lora = lora_config(recipe)
    if lora is not None and args.deepspeed_plugin is None:  # ZeRO-3 has the weights in pieces already
        adapter_parameters(model, lora)
    rows, note = limit_prompt_tokens(
        inputs.data.train, tokenizer, recipe.data, completion_limit(args), chat_options(args)
    )
    if note is not None and args.distributed_state.is_main_process:
        print(f"note: {note}", file=sys.stderr)
    _check_fills_batch(len(rows), inputs.plan)  # again: overlong prompts may be gone
    separate = recipe.ppo is not None and recipe.ppo.critic == "separate"
    return Policy(model, tokenizer, rows, load_model(source, recipe.model) if separate else None)


def build_trainer(
    inputs: Inputs, policy: Policy, run: RunDirectory, start_evaluation: bool = True
) -> "BalancedGRPOTrainer":
    """Put the trainer together; `start_evaluation` asks for one before the first step if the recipe does."""
    from transformers import PrinterCallback, ProgressCallback

    from rlbal.model import lora_config, train_in_float32
    from rlbal.trainers.callbacks import RunRecorder
    from rlbal.trainers.grpo import BalancedGRPOTrainer
    from rlbal.trainers.ppo import BalancedPPOTrainer

    recipe, args = inputs.recipe, inputs.args
    kind: Any = BalancedGRPOTrainer if recipe.ppo is None else partial(BalancedPPOTrainer, critic_model=policy.critic)
    if recipe.model.revision is not None:
        args.model_init_kwargs = {"revision": recipe.model.revision}  # TRL loads the reference model itself
    args.eval_on_start = start_evaluation and recipe.evaluation.at_start and inputs.data.eval is not None
    recorder = RunRecorder(run)
    trainer: BalancedGRPOTrainer = kind(
        recipe=recipe,
        plan=inputs.plan,
        suite=inputs.suite,
        rows=policy.rows,
        eval_rows=inputs.data.eval,
        tokenizer=policy.tokenizer,
        model=policy.model,
        args=args,
        peft_config=lora_config(recipe),
        callbacks=[recorder],
    )
    if recipe.model.quantization is not None:
        train_in_float32(cast(Any, trainer.model))
    recorder.trainer = trainer
    if args.distributed_state.is_main_process:
        for note in trainer.notes:
            print(f"note: {note}", file=sys.stderr)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer
