"""What finished runs leave behind, read for comparison. Needs no torch."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbal.errors import RecipeError, RunError
from rlbal.recipe import Recipe
from rlbal.recipe_file import parse_yaml
from rlbal.run import RunDirectory

SWEEP_RECORD = ".rlbal-sweep.yaml"  # in a sweep's folder: the sweep as it was started
SAVED_LAST = "training_args.bin"  # transformers writes it into a model folder when all else is there
RECENT_STEPS = 10


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        path: its directory.
        recipe: its resolved recipe.
        step: optimizer steps done.
        evaluation: its last line of evaluations.jsonl; empty without evaluations.
        recent: its last `RECENT_STEPS` lines of metrics.jsonl.
    """

    path: Path
    recipe: Recipe
    step: int
    evaluation: dict[str, Any]
    recent: list[dict[str, Any]]


def last_records(path: Path, count: int) -> list[dict[str, Any]]:
    """The last whole lines of a .jsonl file, oldest first, read from its end; a line cut off by a crash is left out.

    Raises:
        RunError: one of them is not JSON.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size, block, tail = file.seek(0, os.SEEK_END), 1 << 16, b""
        while tail.count(b"\n") <= count and len(tail) < size:
            file.seek(max(0, size - block))
            tail, block = file.read(min(block, size)), 2 * block
    whole = tail[: tail.rfind(b"\n") + 1].split(b"\n")[:-1]
    try:
        records = [json.loads(line.decode("utf-8", "replace")) for line in whole[-count:]]
    except ValueError as error:
        raise RunError(f"{path}: one of the last lines is not JSON", why=str(error), fix="remove it") from None
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise RunError(
                f"{path}: one of the last lines is no record of a step", why=str(record)[:80], fix="remove it"
            )
    return records


def last_step(run: RunDirectory) -> int:
    """The last optimizer step on record; 0 if there is none."""
    records = last_records(run.metrics_path, 1)
    return int(records[0]["step"]) if records else 0


def unfinished(run: RunDirectory, recipe: Recipe) -> str | None:
    """Why a run is not finished, or None if it is.

    A finished run has done `trainer.max_steps`, if the recipe says how many and it did not stop for want of prompts,
    has the evaluation after its last step on record, if `evaluation.at_end` asks for one, and has saved its final model
    whole.
    """
    step, steps = last_step(run), recipe.trainer.get("max_steps", -1)
    if isinstance(steps, int) and step < steps and not run.stopped_path.is_file():
        return f"it is at step {step} of {steps}"
    if not (run.model_path / SAVED_LAST).is_file():
        return f"it is at step {step} and has no final model yet"
    if recipe.evaluation.at_end and recipe.has_eval_data:
        evaluations = last_records(run.evaluations_path, 1)
        if not evaluations or evaluations[0]["step"] != step:
            return f"it has no evaluation after its last step, {step}"
    return None


def find_runs(path: Path) -> list[RunDirectory]:
    """The runs at a path: a run directory, a folder of runs (an arm), or a folder of arms (a sweep).

    Arms come in the order of the sweep that made them, runs of an arm by number.

    Raises:
        RunError: nothing there is a run of rlbal.
    """
    if RunDirectory(path).is_run:
        return [RunDirectory(path)]
    if not path.is_dir():
        raise RunError(f"there is no folder {path}", fix="give run directories, arms or sweeps, e.g. runs/my_sweep")
    folders = sorted((folder for folder in path.iterdir() if folder.is_dir()), key=_by_number)
    order = _arm_order(path)
    folders.sort(key=lambda folder: order.index(folder.name) if folder.name in order else len(order))
    runs = []
    for folder in folders:
        inside = [folder] if RunDirectory(folder).is_run else sorted(folder.iterdir(), key=_by_number)
        runs += [run for run in map(RunDirectory, inside) if run.is_run]
    if not runs:
        raise RunError(
            f"{path} is no run of rlbal and holds none",
            why="a run directory has a file .rlbal-run",
            fix="give run directories, an arm's folder or a sweep's `output_dir`",
        )
    return runs


def _by_number(path: Path) -> list[tuple[int, str]]:
    """A key that sorts seed-2 before seed-10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", path.name)]


def _arm_order(folder: Path) -> list[str]:
    record = folder / SWEEP_RECORD
    if not record.is_file():
        return []
    values = parse_yaml(record.read_text(encoding="utf-8", errors="replace"))
    return list(values["arms"]) if isinstance(values, dict) and isinstance(values.get("arms"), dict) else []


def read_results(paths: list[Path]) -> tuple[list[RunResult], dict[Path, str]]:
    """Read all finished runs at some paths, each once.

    Returns:
        The results in order, and the runs left out with the reason.

    Raises:
        RunError: a path holds no run, or no run is finished.
    """
    runs = {run.path.resolve(): run for path in paths for run in find_runs(path)}
    results: list[RunResult] = []
    left_out: dict[Path, str] = {}
    for run in runs.values():
        try:
            recipe = run.recipe()
        except RecipeError as error:
            left_out[run.path] = f"its recipe is not readable: {error.what}"
            continue
        if reason := unfinished(run, recipe):
            left_out[run.path] = reason
            continue
        evaluations = last_records(run.evaluations_path, 1)
        recent = last_records(run.metrics_path, RECENT_STEPS)
        results.append(RunResult(run.path, recipe, last_step(run), evaluations[0] if evaluations else {}, recent))
    if not results:
        path, reason = next(iter(left_out.items()))
        raise RunError(
            f"none of {len(left_out)} runs is finished, so there is nothing to compare",
            why=f"{path}: {reason}",
            fix="finish them: `rlbal sweep` again, or `rlbal train RUN/recipe.yaml --resume`",
        )
    return results, left_out


def number(value: Any) -> float:
    """A recorded value as a float; NaN if it is missing or no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)
