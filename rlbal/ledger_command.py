"""`rlbal ledger`: what a run has learned of its prompts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from rlbal.errors import DataError, RlbalError, RunError
from rlbal.eval_command import model_folder
from rlbal.experiments.results import number
from rlbal.ledger_report import History, LedgerReport, report
from rlbal.prompts.ledger import PromptLedger
from rlbal.recipe import Recipe
from rlbal.run import LEDGER, RunDirectory, read_jsonl, to_json

if TYPE_CHECKING:
    from datasets import Dataset


def show_ledger(target: Path, checkpoint: str | None, top: int, as_json: bool, plot: Path | None) -> None:
    """Read a run's ledger and print it; with `plot`, also draw it.

    Args:
        target: a run directory.
        checkpoint: `best` or a step; default: the finished run's ledger, or else that of the newest checkpoint.
        top: how many of the hardest and the easiest prompts.
        as_json: print one JSON object instead of tables.
        plot: a .png, .pdf or .svg file.

    Raises:
        RlbalError: there is no run, no ledger, or no usable one; or the figure cannot be written.
    """
    run = RunDirectory(target)
    path = find_ledger(run, checkpoint)
    shown, notes = read_ledger(run, path, top)
    if plot is not None:
        from rlbal.ledger_plot import write_plot

        write_plot(shown, run.path.resolve().name, plot)
    if as_json:
        result = {"run": str(run.path), "ledger": str(path), **shown.to_json(), "notes": notes}
        # ASCII: the text of a dataset cannot steer the terminal.
        typer.echo(json.dumps(json.loads(to_json(result)), indent=2))
        return
    from rlbal.ledger_view import show

    show(shown, str(path), notes, Console(highlight=False))


def find_ledger(run: RunDirectory, checkpoint: str | None) -> Path:
    """The file of a run's ledger.

    Raises:
        RunError: this is no run, or it has no ledger there.
    """
    if not run.is_run:
        raise RunError(
            f"{run.path} is not a run of rlbal",
            why="it has no .rlbal-run file",
            fix="give the `output_dir` of a training, and --checkpoint for one of its checkpoints",
        )
    folders = [run.path, *reversed(run.checkpoints())]
    if checkpoint is not None:
        folders = [run.path if checkpoint == "final" else model_folder(run, checkpoint)]
    found = [folder / LEDGER for folder in folders if (folder / LEDGER).is_file()]
    if found:
        return found[0]
    if checkpoint is not None:
        what = f"{folders[0]} has no {LEDGER}"
    else:
        what = f"neither {run.path} nor a checkpoint in it has a {LEDGER}"
    raise RunError(
        what,
        why="the run stopped before its first checkpoint, or was made by a version that kept no ledger",
        fix=f"train again: rlbal train {run.path / 'recipe.yaml'} --overwrite, or --resume to go on",
    )


def read_ledger(run: RunDirectory, path: Path, top: int) -> tuple[LedgerReport, list[str]]:
    """The figures of a ledger file, and notes for people.

    Raises:
        RlbalError: the run's recipe, metrics or ledger cannot be read.
    """
    recipe = run.recipe()
    try:
        ledger = PromptLedger.open(path, recipe.allocation.resolved_forgetting)
    except RunError as error:
        reason = f"{error.what}: {error.why}" if error.why else error.what
        raise RunError(f"{path} is no usable ledger", reason, "show another one: --checkpoint STEP") from None
    final = path.parent == run.path
    number_of = path.parent.name.removeprefix("checkpoint-")
    history = read_history(run, int(number_of) if number_of.isdecimal() and not final else None)
    step = max([int(ledger.last_seen_M.max(initial=0)), *history.steps[-1:]])
    texts, names, notes = None, None, []
    try:
        texts, names = read_data(ledger, recipe, run.model_path if final else path.parent)
    except RlbalError as error:
        notes.append(f"prompts show as numbers: {error}")
    shown = report(
        ledger, step, history, retire_at=recipe.allocation.retire_at, top=top, stratum_names=names, texts=texts
    )
    return shown, notes


def read_history(run: RunDirectory, until: int | None) -> History:
    """The ledger's part of a run's metrics.jsonl, up to a step.

    Raises:
        RunError: a line is no record of a step.
    """
    history, rollouts = History([], [], [], None), None
    records = read_jsonl(run.metrics_path) if run.metrics_path.is_file() else ()
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise RunError(f"{run.metrics_path}: a line is no record of a step", why=str(record)[:80], fix="remove it")
        if until is None or record["step"] <= until:
            history.steps.append(record["step"])
            history.seen.append(number(record.get("ledger/seen")))
            history.drift.append(number(record.get("ledger/drift")))
            rollouts = record.get("rollouts", rollouts)
    return History(history.steps, history.seen, history.drift, rollouts if isinstance(rollouts, int) else None)


def read_data(ledger: PromptLedger, recipe: Recipe, model: Path) -> tuple[list[str], list[str] | None]:
    """The text of a ledger's prompts, and the names of its strata; None without `allocation.strata`.

    Args:
        ledger: of M prompts.
        recipe: of the run.
        model: a folder with its tokenizer: prompts that are too long were left out.

    Raises:
        RlbalError: the data cannot be read, or are not those of the ledger.
    """
    from rlbal.allocation_checks import strata_of
    from rlbal.prompts.data import load_data

    rows, prompts = load_data(recipe.data, recipe.seed).train, len(ledger.last_seen_M)
    if len(rows) != prompts and recipe.data.max_prompt_tokens is not None:
        rows = _short_enough(rows, recipe, model)
    if len(rows) != prompts:
        raise DataError(f"the data now have {len(rows):,} training prompts and the ledger {prompts:,}")
    strata_M = strata_of(recipe, rows)
    names = None if strata_M is None else _stratum_names(ledger, strata_M)
    return [prompt_text(prompt) for prompt in rows["prompt"][:]], names


def _short_enough(rows: "Dataset", recipe: Recipe, model: Path) -> "Dataset":
    from rlbal.quiet import quiet_libraries

    quiet_libraries()
    from rlbal.model import load_tokenizer
    from rlbal.prompts.lengths import limit_prompt_tokens
    from rlbal.trainer_args import bind_trainer, chat_options, completion_limit

    args, _ = bind_trainer(recipe)
    tokenizer = load_tokenizer(model, recipe.model)
    return limit_prompt_tokens(rows, tokenizer, recipe.data, completion_limit(args), chat_options(args))[0]


def _stratum_names(ledger: PromptLedger, strata_M: list[str]) -> list[str]:
    """What each stratum is called; the ledger itself has numbers alone."""
    names: dict[int, str] = {}
    same = all(
        names.setdefault(stratum, name) == name
        for stratum, name in zip(ledger.stratum_M.tolist(), strata_M, strict=True)
    )
    if not same or len(set(names.values())) != len(names):
        raise DataError("the data divide the prompts otherwise than the ledger (`allocation.strata`)")
    return [names[stratum] for stratum in range(len(names))]


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt in one text: of a conversation, the last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
