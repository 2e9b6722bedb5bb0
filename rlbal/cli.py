"""The command line. It parses and dispatches; torch is imported only by the commands that need it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rlbal.errors import RlbalError

app = typer.Typer(
    name="rlbal",
    help="Fine-tune language models with RL, deciding while training how much each reward, prompt and token counts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML); `rlbal recipes` lists some.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides, e.g. `trainer.learning_rate=1e-5`."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _run(action: Callable[[], Any]) -> None:
    """Run a command's work; errors a user can act on end without a traceback, with status 1."""
    try:
        action()
    except RlbalError as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from None


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier run in `output_dir` first.")
    ] = False,
    accelerate: Annotated[
        str | None, typer.Option(metavar="X", help="Launch with accelerate_configs/X.yaml (a name or a path).")
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Processes to launch, with --accelerate.")
    ] = None,
) -> None:
    """Train a policy as RECIPE says.

    One process: `rlbal train recipes/quickstart.yaml`

    Several: `rlbal train RECIPE --accelerate zero3 --num-processes 8`, which is short for
    `accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 8 -m rlbal.train RECIPE`

    Everything about the run lands in the recipe's `output_dir`. Ctrl-C saves a checkpoint; `--resume` goes on from it.
    """

    def action() -> None:
        from rlbal.launch import launch
        from rlbal.recipe import read_recipe

        if accelerate is not None or num_processes is not None:
            options = [flag for flag, on in (("--resume", resume), ("--overwrite", overwrite)) if on]
            sys.exit(launch(recipe, overrides or [], options, accelerate, num_processes))
        checked = read_recipe(recipe, overrides or [])
        from rlbal.train import train as run

        run(checked, resume=resume, overwrite=overwrite)

    _run(action)


@app.command()
def check(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Look for what would spoil a run, before it starts.

    Resolves the recipe, loads model, data and rewards, spells out the batch arithmetic, scores gold and shuffled
    answers with every reward, samples a few rollouts, and estimates memory. Exits with 1 if it finds a problem.
    """

    def action() -> None:
        from rlbal.check import check_recipe, render
        from rlbal.recipe import read_recipe

        report = check_recipe(read_recipe(recipe, overrides or []))
        if as_json:
            typer.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
        else:
            render(report)
        if report.problems:
            raise typer.Exit(1)

    _run(action)


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run directory, model or adapter folder, or hub id.")
    ],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Recipe whose data, rewards and `evaluation` to use; default: the run's."),
    ] = None,
    overrides: OverridesArgument = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Of a run: `final` (default), `best`, or a step number.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a trained run, or any model under a recipe, on the held-out rows.

    `rlbal eval runs/quickstart` · `rlbal eval Qwen/Qwen2.5-1.5B-Instruct --recipe recipes/qwen2.5-1.5b/grpo_gsm8k.yaml`
    """

    def action() -> None:
        from rlbal.eval_command import evaluate_model

        evaluate_model(model, recipe, overrides or [], checkpoint, as_json)

    _run(action)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a LoRA run.")],
    checkpoint: Annotated[str | None, typer.Option(help="`final` (default), `best`, or a step number.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the model goes; default: RUN/merged.")
    ] = None,
) -> None:
    """Merge the adapter of a LoRA run into the model below it; the result loads with AutoModelForCausalLM.

    `rlbal merge runs/my_lora_run`
    """

    def action() -> None:
        from rlbal.merge_command import merge_adapter

        typer.echo(f"merged model: {merge_adapter(run, checkpoint, output)}")

    _run(action)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="Sweep file (YAML): base recipe, arms, seeds.")],
    overrides: OverridesArgument = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Do runs again that are there with another recipe.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and their state, and stop.")] = False,
    parallel: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Runs at once; default: the file's `parallel`.")
    ] = None,
) -> None:
    """Train every arm of SWEEP with every seed, then compare the arms.

    SWEEP holds `output_dir`, `recipe`, `arms` (name: list of overrides) and `seeds`, and may hold `overrides` for all
    arms, `parallel` and `gpus`. Each run goes to `<output_dir>/<arm>/seed-<n>`, its output to `seed-<n>.log` beside it.

    A sweep can be started again at any time: finished runs are kept, others go on from their newest checkpoint. Ctrl-C
    lets the runs save theirs. A run that fails does not stop the others; the exit status is then 1.
    """

    def action() -> None:
        from rlbal.experiments.running import run_sweep

        run_sweep(file, overrides or [], overwrite, dry_run, parallel)

    _run(action)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Run directories, folders of runs, or sweeps.")],
    baseline: Annotated[
        str | None, typer.Option(metavar="ARM", help="The arm to compare the others with; default: the first.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="M",
            help="Metric of the last evaluation, or key of metrics.jsonl (mean of the last 10 steps); repeatable.",
        ),
    ] = None,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the differences into a .png, .pdf or .svg file.")
    ] = None,
) -> None:
    """Compare arms over matched seeds: means, paired differences with 95 % intervals, and verdicts.

    Runs whose recipes are equal but for `seed` and `output_dir` form an arm. Verdicts allow for the number of
    comparisons shown. Only finished runs count; unequal cost and anything measured differently is said.

    `rlbal compare runs/my_sweep --plot differences.png`
    """

    def action() -> None:
        from rlbal.experiments.compare_view import compare_command

        compare_command(runs, baseline, metric or [], as_json, plot)

    _run(action)


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="`final`, `best` or a step number; default: `final`, or else the newest.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the ledger into a .png, .pdf or .svg file.")
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="How many of the hardest and easiest prompts.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Show what a run has learned of its prompts: the hardest, the easiest, those never tried, and the drift.

    Beliefs are about the prompts that were trained on, as of the run's last step or the checkpoint's. The data of the
    run's recipe are read again for the prompts' text; where they are gone, prompts show as numbers.

    `rlbal ledger runs/quickstart --plot ledger.png`
    """

    def action() -> None:
        from rlbal.ledger_command import show_ledger

        show_ledger(run, checkpoint, top, as_json, plot)

    _run(action)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Show this recipe, resolved and checked.")
    ] = None,
    overrides: OverridesArgument = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """List the recipes that ship with rlbal, show one resolved, or print the schema."""

    def action() -> None:
        from rlbal.recipe_list import list_recipes, schema_json, show_recipe

        if schema:
            typer.echo(schema_json(), nl=False)
        elif name is None:
            list_recipes()
        else:
            show_recipe(name, overrides or [])

    _run(action)


def main() -> None:
    """Entry point of the `rlbal` command."""
    app()


if __name__ == "__main__":
    main()
