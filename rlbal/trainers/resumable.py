"""Checkpoints that are whole or not there, and that a run goes on from as if it had never stopped.

_save_checkpoint   everything is written aside, sealed, brought to disk, and only then gets its name
_get_output_dir    where TRL writes meanwhile
save_final_model   the final model, likewise
get_train_dataloader  its random numbers apart from those that training draws
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from rlbal.checkpoint import is_sealed, not_written, put_in_place, seal
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
        self.best: dict[str, Any] | None = None  # which checkpoint scored best, and how
        self.resumed_at: int | None = None  # the step of the checkpoint that this process went on from
        super().__init__(**kwargs)
        # The Trainer counts checkpoints that were cut off, and knows the best by a path that may have changed.
        self._keep, self.args.save_total_limit = self.args.save_total_limit, None

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

    @property
    def engine(self) -> str:
        """Whose way of keeping weights and optimizer states a checkpoint has."""
        plugin: Any = self.args.deepspeed_plugin
        if plugin is not None:
            return f"zero{plugin.zero_stage}"
        return "fsdp" if self.is_fsdp_enabled else "plain"

    def get_train_dataloader(self) -> Any:
        """TRL's, which draws a random number whenever an epoch begins, and once more in a resumed one: so apart from
        the others."""
        loader = super().get_train_dataloader()
        loader.base_dataloader.generator = torch.Generator().manual_seed(0)
        torch.empty((), dtype=torch.int64).random_()  # the first epoch's, as with TRL: what follows stays the same
        return loader

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
            if self.args.should_save:
                # The Trainer names the best checkpoint by where it was written, which is for nobody to find.
                self.state.best_model_checkpoint = None
                self.state.save_to_json(str(aside / name / "trainer_state.json"))
                self.learned.save(aside / name)
                run.sync_records()

        self._write_whole(run, name, write)
        if self.args.should_save:
            run.record_best(self.best)
            run.rotate(self._keep)
        self.accelerator.wait_for_everyone()

    def save_final_model(self) -> None:
        """Write `model/`, the policy as it is now.

        Raises:
            RunError: it could not be written.
        """
        run = RunDirectory(str(self.args.output_dir))
        self._write_whole(run, run.model_path.name, lambda aside: self.save_model(str(aside / run.model_path.name)))

    def _write_whole(self, run: RunDirectory, name: str, write: Callable[[Path], None]) -> None:
        """Have `write(folder)` make a folder `name` aside, then put it into the run's directory; all processes call it.

        Raises:
            RunError: it could not be written. On the process it happened to alone: the others wait for it in the middle
                of their writing, and end with it.
        """
        leads = bool(self.args.should_save)
        try:
            if leads:
                shutil.rmtree(run.aside, ignore_errors=True)
                run.aside.mkdir()
            self.accelerator.wait_for_everyone()
            write(run.aside)
            self.accelerator.wait_for_everyone()
            if leads:
                seal(run.aside / name)
                put_in_place(run.aside / name, run.path / name)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in WRITER_SAYS):
                raise
            if leads:
                shutil.rmtree(run.aside, ignore_errors=True)
            raise not_written(name, run.path, error) from None

    def save_now(self) -> None:
        """Write a checkpoint of the last complete optimizer step after one that failed."""
        self.learned.take_back()
        self._step_factor.restore()
        self.save_if_missing()

    def save_if_missing(self) -> None:
        """Write a checkpoint outside the training loop, unless there is one of this step."""
        run = RunDirectory(str(self.args.output_dir))
        if not is_sealed(run.path / f"checkpoint-{self.state.global_step}"):
            self._save_checkpoint(self.model, trial=None)
            self.callback_handler.on_save(self.args, self.state, self.control)
