"""From a recipe to a trained policy in a run directory.

Started by `rlbal train RECIPE` (one process) or `accelerate launch ... -m rlbal.train RECIPE` (several).
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rlbal import process_group
from rlbal.assemble import Inputs, build_trainer, load_inputs, load_policy
from rlbal.errors import RewardError, RlbalError, RunError, TrainingStopped
from rlbal.quiet import quiet_libraries
from rlbal.recipe import Recipe, read_recipe
from rlbal.run import LEDGER, RunDirectory, read_jsonl, step_of

if TYPE_CHECKING:
    from trl import GRPOConfig

    from rlbal.trainers.grpo import BalancedGRPOTrainer


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
    from rlbal.trainer_section import validate_trainer, with_defaults

    console = console or Console()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    process_group.join(with_defaults(validate_trainer(recipe.trainer)))
    args, plan = training_args(recipe, world)
    if args.world_size != world:
        raise RunError(
            f"{world} processes were started, but only {args.world_size} work together",
            why="the accelerate configuration does not set up a process group for this hardware",
            fix="on CPUs launch with accelerate_configs/cpu_2proc.yaml",
        )
    run = RunDirectory(recipe.output_dir)
    checkpoint = run.latest_checkpoint() if resume else None
    if checkpoint is None:
        run.check_free(overwrite)
    try:
        inputs = load_inputs(recipe, args, plan)
        with inputs.suite:
            # What does not load or fit is found before an earlier run is deleted; a tiny model needs the new one.
            policy = None if recipe.model.tiny else load_policy(inputs, str(recipe.model.name_or_path))
            _claim(run, recipe, args, checkpoint, overwrite)
            policy = policy or load_policy(inputs, _build_tiny(inputs, run))
            step = 0 if checkpoint is None else step_of(checkpoint)
            evaluated = {one for one in run.evaluated_steps() if one <= step}
            trainer = build_trainer(inputs, policy, run, start_evaluation=step == 0 and 0 not in evaluated)
            if step > 0 and step not in evaluated and inputs.data.eval is not None:  # it failed, or was cut off
                trainer.args.eval_on_start = recipe.evaluation.every is not None and step % recipe.evaluation.every == 0
            _train(trainer, run, checkpoint, console, evaluated)
        if args.distributed_state.is_main_process:
            _summarise(run, console)
    finally:
        # gloo aborts the interpreter at exit if its threads are still running.
        args.distributed_state.destroy_process_group()
    return run.path


def _claim(run: RunDirectory, recipe: Recipe, args: "GRPOConfig", checkpoint: Path | None, overwrite: bool) -> None:
    """Make the directory of a new run; the main process does it, the others wait."""
    everyone = args.distributed_state
    everyone.wait_for_everyone()
    if everyone.is_main_process and checkpoint is None:
        run.start(recipe, overwrite)
    everyone.wait_for_everyone()
    if not run.is_run:
        raise RunError(
            f"process {everyone.process_index} does not see {run.path}, which the first process has made",
            why="its machine has another file system there",
            fix="choose an `output_dir` that all machines share",
        )


def _build_tiny(inputs: Inputs, run: RunDirectory) -> Path:
    """Build the recipe's tiny model into the run directory, on one process; where it is."""
    from rlbal.model import WARM_START, build_tiny
    from rlbal.trainer_args import completion_limit

    with inputs.args.distributed_state.main_process_first():
        build_tiny(inputs.recipe, inputs.data.train, run.path / WARM_START, completion_limit(inputs.args))
    return run.path / WARM_START


def _train(
    trainer: "BalancedGRPOTrainer", run: RunDirectory, checkpoint: Path | None, console: Console, evaluated: set[int]
) -> None:
    """Train to the end; `evaluated` are the steps whose evaluations are on record."""
    from rlbal.trainers.callbacks import Interruption, NothingLeft, StepProgress

    with Interruption(console) as interruption, StepProgress(console, trainer.suite.names) as progress:
        interruption.trainer = trainer
        trainer.add_callback(progress)
        trainer.add_callback(interruption)
        if checkpoint is not None:
            _take_up(trainer, run, checkpoint)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except NothingLeft:
            pass  # what may be missing is the last evaluation and the final model
        except (TrainingStopped, RewardError) as stop:
            if isinstance(stop, RewardError) and trainer.accelerator.num_processes > 1:
                raise  # of this process alone, and a checkpoint takes all of them
            trainer.save_now()
            raise TrainingStopped(f"{stop}\nA checkpoint is saved. Continue: {resume_command(run)}") from None
        if interruption.stops:
            trainer.save_if_missing()  # `trainer.save_strategy: best` overrules the wish for a checkpoint
            raise TrainingStopped(
                f"stopped after step {trainer.state.global_step}; the checkpoint is saved",
                fix=f"continue: {resume_command(run)}",
            )
        if trainer.accelerator.is_main_process and run.stopped_path.is_file():
            reason = json.loads(run.stopped_path.read_text(encoding="utf-8"))["reason"]
            console.print(f"Training ended after step {trainer.state.global_step}: {reason}.", highlight=False)
    if trainer.last_evaluation is not None:
        evaluated = evaluated | {trainer.last_evaluation[0]}
    if trainer.recipe.evaluation.at_end and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    if trainer.accelerator.is_main_process:
        trainer.allocator.ledger.save(run.path / LEDGER)
    trainer.save_final_model()


def _take_up(trainer: "BalancedGRPOTrainer", run: RunDirectory, checkpoint: Path) -> None:
    """Load rlbal's part of a checkpoint, and then forget what was recorded after it."""
    told = len(trainer.notes)
    trainer.learned.load(checkpoint)
    trainer.resumed_at = step = step_of(checkpoint)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        for note in trainer.notes[told:]:
            print(f"note: {note}", file=sys.stderr)
        run.rewind(step, trainer.best, at_end=step >= trainer.args.max_steps)
    trainer.accelerator.wait_for_everyone()


def resume_command(run: RunDirectory) -> str:
    """What to type to go on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"launch {run.path / 'recipe.yaml'} as before, with --resume"
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (Exception, process_group.Terminated) as error:
        failure = process_group.explain(error)
        if not isinstance(failure, RlbalError):
            raise
        if process_group.is_mine_to_say(failure):
            Console(stderr=True, highlight=False).print(str(failure), markup=False, style="red", soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
