"""The run directory: what a run leaves behind, written so that it can be found again and trusted.

.rlbal-run          marks the directory as ours: only such a directory is ever deleted
recipe.yaml         the resolved recipe
metrics.jsonl       one object per optimizer step
evaluations.jsonl   one object per evaluation
checkpoint-N/       TRL's checkpoint and rlbal's state, the ledger of prompts among it; whole, or not there
best.json           which checkpoint scored best, and how
warm_start/         the tiny model as RL found it (only with `model.tiny.warm_start`)
model/              the final model
merged/             the same with its adapter merged into its base (`rlbal merge`)
ledger.safetensors  what was known of each prompt at the end (`rlbal ledger`)
stopped.json        why the run ended before its last step, if it did
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlbal.checkpoint import is_sealed, sync
from rlbal.errors import RunError
from rlbal.recipe import Recipe, read_recipe

MARKER = ".rlbal-run"
STATE = "rlbal_state.json"
LEDGER = "ledger.safetensors"
MERGED = "merged"
ASIDE = ".unfinished"  # where checkpoints and the final model are written before they get their names


class RunDirectory:
    """One run's folder. Reading needs no torch and imports no reward code."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations_path(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def best_path(self) -> Path:
        return self.path / "best.json"

    @property
    def aside(self) -> Path:
        return self.path / ASIDE

    @property
    def is_run(self) -> bool:
        return (self.path / MARKER).is_file()

    @property
    def has_results(self) -> bool:
        """Whether anything was recorded or saved; a run that failed before its first step has nothing to lose."""
        saved = [self.metrics_path, self.evaluations_path, self.model_path, *self.path.glob("checkpoint-*")]
        return any(path.exists() for path in saved)

    def check_free(self, overwrite: bool = False) -> None:
        """See whether a new run may start here; changes nothing.

        Raises:
            RunError: something is there already and may not be deleted.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.is_run:
            raise RunError(
                f"{self.path} exists and is not a run of rlbal",
                why=f"it has no {MARKER} file, so it will not be deleted, with or without --overwrite",
                fix="choose another `output_dir`, or remove it yourself",
            )
        if not overwrite and self.has_results:
            raise RunError(
                f"{self.path} already holds a run",
                fix="continue it with --resume, start afresh with --overwrite, or choose another `output_dir`",
            )

    def start(self, recipe: Recipe, overwrite: bool = False) -> None:
        """Make the directory for a new run; with `overwrite`, delete the run that is there.

        Raises:
            RunError: as `check_free`, or the directory cannot be written.
        """
        self.check_free(overwrite)
        try:
            if self.is_run:
                self._clear()
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / MARKER).touch()
            write_whole(self.path / "recipe.yaml", recipe.dump())
        except OSError as error:
            raise RunError(f"cannot write a run to {self.path}", str(error), "choose another `output_dir`") from None

    def _clear(self) -> None:
        """Delete what is inside, the marker last: a deletion cut off in the middle can be repeated."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == MARKER):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def recipe(self) -> Recipe:
        """The recipe this run was started with.

        Raises:
            RunError: this is no run directory.
        """
        if not self.is_run:
            raise RunError(f"{self.path} is not a run of rlbal", why=f"it has no {MARKER} file")
        return read_recipe(self.path / "recipe.yaml")

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(filter(is_sealed, self._checkpoint_folders()), key=step_of)

    def _checkpoint_folders(self) -> list[Path]:
        """Whole or not."""
        return [path for path in self.path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]

    def latest_checkpoint(self) -> Path:
        """The newest whole checkpoint.

        Raises:
            RunError: there is none.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            raise RunError(
                f"{self.path} has no checkpoint to resume from",
                fix="start afresh with --overwrite; `trainer.save_steps` says how often checkpoints are written",
            )
        return checkpoints[-1]

    @property
    def stopped_path(self) -> Path:
        return self.path / "stopped.json"

    def record_stop(self, step: int, reason: str) -> None:
        """Write down that the run ended with a step, before `trainer.max_steps`."""
        write_whole(self.stopped_path, to_json({"step": step, "reason": reason}) + "\n")

    def sync_records(self) -> None:
        """Bring metrics and evaluations to disk, which a checkpoint is about to outlive."""
        for path in (self.metrics_path, self.evaluations_path):
            if path.is_file():
                sync(path)

    def evaluated_steps(self) -> set[int]:
        """Optimizer steps after which an evaluation is on record."""
        if not self.evaluations_path.is_file():
            return set()
        return {record["step"] for record in read_jsonl(self.evaluations_path)}

    def best(self) -> dict[str, Any] | None:
        """Which checkpoint scored best, and how; None before one has."""
        return json.loads(self.best_path.read_text(encoding="utf-8")) if self.best_path.is_file() else None

    def record_best(self, best: dict[str, Any] | None) -> None:
        """Write down what `best` is to give."""
        if best is None:
            self.best_path.unlink(missing_ok=True)
        elif best != self.best():
            write_whole(self.best_path, to_json(best) + "\n")

    def rotate(self, keep: int | None) -> None:
        """Delete the oldest checkpoints, but not the newest whole one nor the best, until `keep` are left, if any."""
        if keep is None or keep < 1:
            return
        whole, best = self.checkpoints(), self.best() or {}
        for path in whole[:-1]:
            if len(whole) > keep and path.name != best.get("checkpoint"):
                shutil.rmtree(path, ignore_errors=True)
                whole = [one for one in whole if one != path]

    def rewind(self, step: int, best: dict[str, Any] | None, at_end: bool) -> None:
        """Forget what came after `step`, where the run goes on.

        Args:
            step: of the checkpoint to go on from.
            best: what `best` gave then.
            at_end: it is the run's last step.
        """
        for path in (self.metrics_path, self.evaluations_path):
            if path.is_file():
                kept = [record for record in read_jsonl(path) if record["step"] <= step]
                write_whole(path, "".join(to_json(record) + "\n" for record in kept))
        self.record_best(best)
        for path in (self.path / LEDGER, self.stopped_path):  # of an end that no longer is one
            path.unlink(missing_ok=True)
        later = [path for path in self._checkpoint_folders() if step_of(path) > step]  # cut off, or of a run rewound
        for folder in (self.aside, *later, *([] if at_end else [self.model_path, self.path / MERGED])):
            shutil.rmtree(folder, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done before a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def to_json(record: dict[str, Any]) -> str:
    """One line of JSON; NaN and infinities, which JSON does not have, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    text = json.dumps(finite(record), ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair, which a dataset may hold, is no UTF-8; its backslash escape is valid JSON.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one record as a line.

    Raises:
        RunError: the disk does not take it.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")
    except OSError as error:
        raise RunError(
            f"{path} cannot be written",
            why=str(error),
            fix="make room, then go on with --resume from the last checkpoint",
        ) from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file; a last line cut off by a crash is left out.

    Raises:
        RunError: another line is not JSON.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise RunError(f"{path}, line {number} is not JSON", why=str(error), fix="remove it") from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file by a new version, or leave the old one: never half of either."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
