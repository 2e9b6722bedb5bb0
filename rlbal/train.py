"""From a recipe to a trained policy in a run directory.

Started by `rlbal train RECIPE` (one process) or `accelerate launch ... -m rlbal.train RECIPE` (several).
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rlbal.errors import DataError, RecipeError, RewardError, RlbalError, RunError, TrainingStopped
from rlbal.quiet import quiet_libraries
from rlbal.recipe import Recipe, read_recipe
from rlbal.run import STATE, RunDirectory, read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import GRPOConfig

    from rlbal.rewards.suite import RewardSuite
    from rlbal.trainer_args import BatchPlan
    from rlbal.trainers.grpo import BalancedGRPOTrainer


@dataclass
class Parts:
    """Everything a trainer is made of."""

    recipe: Recipe
    args: "GRPOConfig"
    plan: "BatchPlan"
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    rows: "Dataset"
    eval_rows: "Dataset | None"
    suite: "RewardSuite"


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Path:
    """Run a recipe to its end, or until it is interrupted.

    Args:
        recipe: what to run; `launch.num_processes` is what it was checked for, WORLD_SIZE what is here.
        resume: go on from the newest checkpoint of the run in `recipe.output_dir`.
        overwrite: delete an earlier run in `recipe.output_dir` first.
        console: where messages go; default standard output.

    Returns:
        The run directory.

    Raises:
        RlbalError: bad input, with what to do about it.
        TrainingStopped: a reward failed or the user interrupted; a checkpoint is saved.
    """
    quiet_libraries()
    from rlbal.trainer_args import training_args

    console = console or Console()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args, plan = training_args(recipe, world)
    if args.world_size != world:
        raise RunError(
            f"{world} processes were started, but only {args.world_size} work together",
            why="the accelerate configuration does not set up a process group for this hardware",
            fix="on CPUs launch with accelerate_configs/cpu_2proc.yaml",
        )
    run = RunDirectory(recipe.output_dir)
    everyone = args.distributed_state
    checkpoint = run.latest_checkpoint() if resume else None
    if not resume:
        run.check_free(overwrite)
    everyone.wait_for_everyone()
    if everyone.is_main_process:
        if checkpoint is None:
            run.start(recipe, overwrite)
        else:
            run.rewind(int(checkpoint.name.split("-")[1]))
    everyone.wait_for_everyone()
    if everyone.is_main_process:
        console.print(plan.explain(), highlight=False)

    try:
        parts = load_parts(recipe, args, plan, run)
        with parts.suite:
            trainer = build_trainer(parts, run, console, start_evaluation=checkpoint is None)
            _train(trainer, run, checkpoint, console)
        if everyone.is_main_process:
            _summarise(run, console)
    finally:
        # gloo aborts the interpreter at exit if its threads are still running.
        everyone.destroy_process_group()
    return run.path


def load_parts(recipe: Recipe, args: "GRPOConfig", plan: "BatchPlan", run: RunDirectory) -> Parts:
    """Load data, model and rewards, and check that they fit together.

    Raises:
        RlbalError: what does not load or does not fit.
    """
    from rlbal.model import WARM_START, build_tiny, context_length, load_model, load_tokenizer
    from rlbal.prompts.data import limit_prompt_tokens, load_data
    from rlbal.rewards.suite import RewardSuite

    data = load_data(recipe.data, recipe.seed)
    suite = RewardSuite(recipe.rewards)
    suite.check_columns(data.train.column_names)
    if recipe.model.tiny is not None:
        source: str | Path = run.path / WARM_START
        with args.distributed_state.main_process_first():
            build_tiny(recipe, data.train, Path(source))
    else:
        assert recipe.model.name_or_path is not None
        source = recipe.model.name_or_path
    tokenizer = load_tokenizer(source, recipe.model)
    rows, note = limit_prompt_tokens(data.train, tokenizer, recipe.data, args.chat_template_kwargs)
    if len(rows) < plan.prompts:
        raise DataError(
            f"{len(rows)} training prompts do not fill one generation batch of {plan.prompts} prompts",
            why=plan.explain(),
            fix="use more data (`data`), smaller batches (`trainer.per_device_train_batch_size`) or more "
            "`algorithm.rollouts_per_prompt`",
        )
    model = load_model(source, recipe.model)
    limit = context_length(model)
    if limit is not None and args.max_completion_length >= limit:
        raise RecipeError(
            f"`trainer.max_completion_length` ({args.max_completion_length}) leaves no room for a prompt in the "
            f"model's {limit} positions",
            fix="lower it",
        )
    if args.distributed_state.is_main_process:
        for text in [*data.notes, *([note] if note else [])]:
            print(f"note: {text}", file=sys.stderr)
    return Parts(recipe, args, plan, model, tokenizer, rows, data.eval, suite)


def build_trainer(
    parts: Parts, run: RunDirectory, console: Console, start_evaluation: bool = True
) -> "BalancedGRPOTrainer":
    """Put the trainer together; `start_evaluation` asks for one before the first step if the recipe does."""
    from transformers import PrinterCallback, ProgressCallback

    from rlbal.model import lora_config
    from rlbal.trainers.callbacks import RunRecorder, StepProgress
    from rlbal.trainers.grpo import BalancedGRPOTrainer

    recipe = parts.recipe
    parts.args.eval_on_start = start_evaluation and recipe.evaluation.at_start and parts.eval_rows is not None
    recorder = RunRecorder(run)
    trainer = BalancedGRPOTrainer(
        recipe=recipe,
        plan=parts.plan,
        suite=parts.suite,
        rows=parts.rows,
        eval_rows=parts.eval_rows,
        tokenizer=parts.tokenizer,
        model=parts.model,
        args=parts.args,
        peft_config=lora_config(recipe),
        callbacks=[recorder, StepProgress(console, parts.suite.names)],
    )
    recorder.trainer = trainer
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train(trainer: "BalancedGRPOTrainer", run: RunDirectory, checkpoint: Path | None, console: Console) -> None:
    from rlbal.trainers.callbacks import Interruption

    with Interruption(console) as interruption:
        interruption.trainer = trainer
        trainer.add_callback(interruption)
        if checkpoint is not None:
            trainer.load_rlbal_state(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (TrainingStopped, RewardError) as stop:
            trainer.save_now()
            raise TrainingStopped(f"{stop}\nA checkpoint is saved. Continue: {resume_command(run)}") from None
        if interruption.requested:
            raise TrainingStopped(
                f"stopped after step {trainer.state.global_step}; the checkpoint is saved",
                fix=f"continue: {resume_command(run)}",
            )
    evaluated = trainer.last_evaluation is not None and trainer.last_evaluation[0] == trainer.state.global_step
    if trainer.recipe.evaluation.at_end and not evaluated:
        trainer.evaluate()
    trainer.save_model(str(run.model_path))


def resume_command(run: RunDirectory) -> str:
    """What to type to go on."""
    return f"rlbal train {run.path / 'recipe.yaml'} --resume"


def _summarise(run: RunDirectory, console: Console) -> None:
    from rlbal.evaluation_view import comparison

    evaluations = list(read_jsonl(run.evaluations_path)) if run.evaluations_path.is_file() else []
    if evaluations:
        console.print(comparison(evaluations))
    console.print(f"run: {run.path}   model: {run.model_path}", highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """`python -m rlbal.train RECIPE [key.sub=value ...] [--resume] [--overwrite]`, one per process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {flag: flag in words for flag in ("--resume", "--overwrite")}
    rest = [word for word in words if word not in flags]
    if not rest or rest[0].startswith("-"):
        print("usage: python -m rlbal.train RECIPE [key.sub=value ...] [--resume] [--overwrite]", file=sys.stderr)
        return 2

    def action() -> None:
        train(read_recipe(rest[0], rest[1:]), resume=flags["--resume"], overwrite=flags["--overwrite"])

    return run_safely(action)


def run_safely(action: Any) -> int:
    """Run `action`; print an error a user can act on without a traceback. Returns the exit status."""
    try:
        action()
    except RlbalError as error:
        if os.environ.get("RANK", "0") == "0":
            Console(stderr=True, highlight=False).print(str(error), markup=False, style="red", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
