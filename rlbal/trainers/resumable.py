"""Checkpoints that are whole or not there, and that a run goes on from as if it had never stopped.

_save_checkpoint   everything is written aside, sealed, brought to disk, and only then gets its name
_get_output_dir    where TRL writes meanwhile
save_model         the final model, likewise
"""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

from rlbal.checkpoint import not_written, put_in_place, seal
from rlbal.run import RunDirectory
from rlbal.trainers.compacted import CompactedGRPOTrainer

if TYPE_CHECKING:
    from rlbal.trainers.allocator import RolloutAllocator
    from rlbal.trainers.state import BalanceState
    from rlbal.trainers.step_factor import StepFactor

# How torch.save's writer in C++ says that a file could not be written.
WRITER_SAYS = ("inline_container", "PytorchStreamWriter", "iostream")


class ResumableGRPOTrainer(CompactedGRPOTrainer):
    """CompactedGRPOTrainer with exact and whole checkpoints."""

    learned: "BalanceState"
    allocator: "RolloutAllocator"
    _step_factor: "StepFactor"
    _report: dict[str, Any]  # what metrics.jsonl says of the rollouts that are trained on

    def __init__(self, **kwargs: Any) -> None:
        self._aside: Path | None = None
        super().__init__(**kwargs)

    @property
    def in_cycle(self) -> bool:
        """Whether the next optimizer step trains on rollouts that are there already."""
        return self._micro_step % self._cycle_length != 0

    @property
    def _cycle_length(self) -> int:
        """Micro-batches from one generation to the next."""
        return (self.args.steps_per_generation or 1) * self.num_iterations

    @property
    def _micro_step(self) -> int:
        """Micro-batches since generation and optimizer step last began together."""
        return self._step % math.lcm(self._cycle_length, self.args.gradient_accumulation_steps)

    def cycle_state(self) -> dict[str, Any]:
        """Where a run is in its generation cycle, and what is logged in each step of it, as JSON types."""
        return {
            "micro_step": self._micro_step,
            "in_cycle": self.in_cycle,
            "report": dict(self._report),
            "compaction": dict(self.compaction_metrics),
            "tables": self.allocator.tables(),
        }

    def load_cycle_state(self, state: dict[str, Any]) -> None:
        """Go on from `cycle_state`; the rollouts come from elsewhere."""
        self._step = state["micro_step"]
        self._report = {name: math.nan if value is None else value for name, value in state["report"].items()}
        self.compaction_metrics = dict(state["compaction"])
        self.allocator.load_tables(state["tables"])

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint of the last complete optimizer step.

        Raises:
            RunError: it could not be written; the one before it is kept.
        """
        run = RunDirectory(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"

        def write(aside: Path) -> None:
            self._aside = aside
            try:
                super(ResumableGRPOTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._aside = None
            self.learned.save_own(aside / name)
            self._name_best(aside, run.path)
            if self.args.should_save:
                self.state.save_to_json(str(aside / name / "trainer_state.json"))
                self.learned.save(aside / name)

        self._write_whole(run, name, write)
        if self.args.should_save:
            # TRL's rotation looked where this checkpoint was being written, and found no other.
            rotate_checkpoints(str(run.path), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _name_best(self, aside: Path, final: Path) -> None:
        """Let the best checkpoint's path be the one it will have."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == aside:
            self.state.best_model_checkpoint = str(final / Path(best).name)

    def save_final_model(self) -> None:
        """Write `model/`, the policy as it is now.

        Raises:
            RunError: it could not be written.
        """
        run = RunDirectory(str(self.args.output_dir))
        self._write_whole(run, run.model_path.name, lambda aside: self.save_model(str(aside / run.model_path.name)))

    def _write_whole(self, run: RunDirectory, name: str, write: Any) -> None:
        """Have `write(folder)` make a folder `name` aside, then put it into the run's directory; all processes call it.

        Raises:
            RunError: it could not be written, on whichever process.
        """
        leads = bool(self.args.should_save)
        problem: Exception | None = None
        try:
            if leads:
                shutil.rmtree(run.aside, ignore_errors=True)
                run.aside.mkdir()
            self.accelerator.wait_for_everyone()
            write(run.aside)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in WRITER_SAYS):
                raise
            problem = error
        failed = self._anywhere(problem is not None)
        if not failed and leads:
            try:
                seal(run.aside / name)
                put_in_place(run.aside / name, run.path / name)
            except OSError as error:
                problem = error
        if self._anywhere(problem is not None):
            if leads:
                shutil.rmtree(run.aside, ignore_errors=True)
            raise not_written(name, run.path, problem or OSError("another process could not write its part"))

    def _anywhere(self, happened: bool) -> bool:
        """Whether something happened on any process; all of them wait for each other."""
        if self.accelerator.num_processes == 1:
            return happened
        flag = torch.tensor(float(happened), device=self.accelerator.device)
        return self.accelerator.reduce(flag, reduction="sum").item() > 0

    def save_now(self) -> None:
        """Write a checkpoint of the last complete optimizer step, outside the training loop."""
        self.learned.take_back()
        self._step_factor.restore()
        self._save_checkpoint(self.model, trial=None)
        self.callback_handler.on_save(self.args, self.state, self.control)
