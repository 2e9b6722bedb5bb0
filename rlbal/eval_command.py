"""`rlbal eval`: evaluate a trained run, or any model under a recipe."""

import json
from pathlib import Path

import typer
from rich.console import Console

from rlbal.errors import RecipeError, RunError
from rlbal.evaluation import Evaluation, evaluate_policy
from rlbal.quiet import quiet_libraries
from rlbal.recipe import Recipe, read_recipe
from rlbal.run import RunDirectory, read_jsonl, to_json


def evaluate_model(
    target: str, recipe_path: Path | None, overrides: list[str], checkpoint: str | None, as_json: bool
) -> None:
    """Evaluate and print.

    Args:
        target: a run directory, a folder with a model or an adapter, or a hub id.
        recipe_path: the recipe whose data, rewards and settings to use; a run has its own.
        overrides: `key.sub=value` on that recipe.
        checkpoint: of a run: `final`, `best` or a step.
        as_json: print one JSON object instead of tables.

    Raises:
        RlbalError: nothing to evaluate there, or nothing to evaluate it on.
    """
    run = RunDirectory(target)
    if not run.is_run and recipe_path is None:
        raise RecipeError(
            f"`{target}` is not a run of rlbal, so it does not say what to evaluate it on",
            fix="give --recipe RECIPE: its `data`, `rewards` and `evaluation` are used",
        )
    if recipe_path is not None:
        recipe = read_recipe(recipe_path, overrides)
    else:
        recipe = read_recipe(run.path / "recipe.yaml", overrides)
    if checkpoint is not None and not run.is_run:
        raise RunError("--checkpoint goes with a run directory", why=f"`{target}` is a model")
    source: str | Path = target
    trained_budget = None
    if run.is_run:
        source = folder = model_folder(run, checkpoint)
        trained_budget = budget_at(run, folder)
    evaluation = _evaluate(recipe, str(source), trained_budget)
    if as_json:
        typer.echo(to_json({"model": str(source), **evaluation.to_json()}))
        return
    from rlbal.evaluation_view import difficulty_table, examples_panel, table

    console, label = Console(), {str(source): evaluation}
    console.print(table(label))
    if evaluation.by_difficulty:
        console.print(difficulty_table(label, recipe.evaluation.best_metric))
    console.print(examples_panel(label))


def model_folder(run: RunDirectory, checkpoint: str | None) -> Path:
    """The folder of a run's final model, its best checkpoint, or the checkpoint of a step.

    Raises:
        RunError: it is not there.
    """
    if checkpoint in (None, "final"):
        if (run.model_path).is_dir():
            return run.model_path
        raise RunError(
            f"{run.path} has no final model yet",
            fix="finish the run (`--resume`), or take a checkpoint: --checkpoint best, or a step number",
        )
    if checkpoint == "best":
        best = run.path / "best.json"
        if not best.is_file():
            raise RunError(f"{run.path} has no best checkpoint", why="`evaluation.every` was not set")
        folder = run.path / json.loads(best.read_text(encoding="utf-8"))["checkpoint"]
    else:
        folder = run.path / f"checkpoint-{checkpoint}"
    if not folder.is_dir():
        steps = ", ".join(path.name.split("-")[1] for path in run.checkpoints()) or "none"
        raise RunError(f"no checkpoint {folder}", fix=f"steps with a checkpoint: {steps}")
    return folder


def budget_at(run: RunDirectory, folder: Path) -> int | None:
    """The token budget that a run went on with from a model of its own; that of its last step for the final model.

    Args:
        run: its metrics.jsonl says `budget/tokens` for every step.
        folder: what `model_folder` gave.

    Returns:
        None where no step had a budget.
    """
    step = int(folder.name.split("-")[1]) if folder != run.model_path else None
    tokens = None
    for record in read_jsonl(run.metrics_path) if run.metrics_path.is_file() else ():
        if record.get("budget/tokens") is not None:
            tokens = int(record["budget/tokens"])
        if step is not None and record["step"] > step:
            break
    return tokens


def _evaluate(recipe: Recipe, source: str, trained_budget: int | None) -> Evaluation:
    """Evaluate the model of a folder or hub id, or an adapter's; at its schedule's last budget where it was not trained
    with one."""
    quiet_libraries()
    from rlbal.model import default_device, load_tokenizer, load_trained
    from rlbal.prompts.budget import last_budget
    from rlbal.prompts.data import load_data
    from rlbal.rewards.suite import RewardSuite
    from rlbal.sampling import generate_samples
    from rlbal.trainer_args import bind_trainer, chat_options, completion_limit

    args, _ = bind_trainer(recipe)
    data = load_data(recipe.data, recipe.seed)
    if data.eval is None:
        raise RecipeError("no rows are held out", fix="set `data.eval_size` above 0")
    tokenizer = load_tokenizer(source, recipe.model)
    model = load_trained(source, recipe.model).to(default_device())
    tokens = recipe.evaluation.max_completion_length or completion_limit(args)
    budget = last_budget(recipe.budget, completion_limit(args), args.max_steps)
    if budget is not None and trained_budget is not None:
        budget = trained_budget
    with RewardSuite.for_recipe(recipe, isolated=True) as suite:
        suite.check_columns(data.eval.column_names)

        def generate(prompts: list, positions: list[int], greedy: bool, limit: int) -> list:
            return generate_samples(
                model,
                tokenizer,
                prompts,
                recipe.evaluation,
                max_new_tokens=limit,
                seed=recipe.seed,
                greedy=greedy,
                positions=positions,
                progress=True,
                chat_template_kwargs=chat_options(args),
            )

        return evaluate_policy(generate, data.eval, suite, recipe, max_new_tokens=tokens, budget=budget)
