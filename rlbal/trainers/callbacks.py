"""What happens around training steps: records, interruption, progress."""

import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlbal.run import RunDirectory, append_jsonl

if TYPE_CHECKING:
    from rlbal.trainers.grpo import BalancedGRPOTrainer


class NothingLeft(Exception):
    """A resumed run has done all its steps already; TRL's loop would do one more all the same."""


class RunRecorder(TrainerCallback):
    """Writes metrics.jsonl and evaluations.jsonl; asks for checkpoints of the best and the last step."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.trainer: BalancedGRPOTrainer | None = None
        self.stopped: str | None = None  # why training ended before its last step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        self.trainer.learned.remember()
        state.compute_steps(args, state.max_steps)  # a checkpoint brings those of the recipe it was written with
        self._note_end(state)
        if state.global_step >= state.max_steps or self.stopped is not None:
            raise NothingLeft

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The last evaluation belongs inside the loop, where a best checkpoint can still be saved.
        trainer = self.trainer
        assert trainer is not None
        trainer.learned.remember()
        if trainer.generation_is_due:
            self._note_end(state)
        if self.stopped is not None:
            control.should_training_stop = control.should_save = True
        if (self.stopped or state.global_step >= state.max_steps) and trainer.evaluator is not None:
            control.should_evaluate |= trainer.recipe.evaluation.at_end

    def _note_end(self, state: TrainerState) -> None:
        """Find out, and record, whether there are no prompts left before the last step."""
        assert self.trainer is not None
        if state.global_step < state.max_steps:
            self.stopped = self.trainer.allocator.exhausted
        if self.stopped is not None and state.is_world_process_zero:
            self.run.record_stop(state.global_step, self.stopped)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        self.trainer.step_started = time.perf_counter()
        self.trainer.learned.remember()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None and "loss" in logs:
            assert self.trainer is not None
            trainer = self.trainer
            tables = trainer.balance.tables() | trainer.budget.schedule.tables() | trainer.allocator.tables()
            append_jsonl(self.run.metrics_path, {"step": state.global_step, **logs, **tables})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        assert self.trainer is not None and self.trainer.last_evaluation is not None
        step, evaluation = self.trainer.last_evaluation
        if state.is_world_process_zero:
            cost = self.trainer.totals.metrics(self.trainer.accelerator.num_processes)
            append_jsonl(self.run.evaluations_path, {"step": step, **cost, **evaluation.to_json()})
        # The Trainer compares after this callback; asking for a checkpoint here keeps the best one.
        name = args.metric_for_best_model
        value = (metrics or {}).get(name) if name else None
        best_before = float("-inf") if state.best_metric is None else state.best_metric
        if value is None or state.global_step == 0 or not value > best_before:
            return
        control.should_save = True
        best = {"step": state.global_step, "metric": name, "value": value}
        self.trainer.best = {**best, "checkpoint": f"checkpoint-{state.global_step}"}  # on record once it is saved
        if not self.trainer.is_in_train or state.global_step == self.trainer.resumed_at:
            state.best_metric, state.best_global_step = (
                value,
                state.global_step,
            )  # the Trainer compares in its loop only


class Interruption(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. Another Ctrl-C later on stops at once.

    Under a launcher one Ctrl-C arrives several times: from the terminal, and from the launcher passing it on. So only
    one that comes `AT_ONCE_AFTER` seconds later is taken for a second.
    """

    AT_ONCE_AFTER = 2.0

    def __init__(self, console: Console) -> None:
        self.console = console
        self.requested_at: float | None = None
        self.agreed = False
        self.trainer: BalancedGRPOTrainer | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.requested_at is not None

    @property
    def stops(self) -> bool:
        """Whether the run stops: several processes go by what they have agreed on, not by what one of them heard."""
        assert self.trainer is not None
        return self.agreed or (self.requested and self.trainer.accelerator.num_processes == 1)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested_at is None:
            self.requested_at = now
            self.console.print("\nStopping after this step and saving a checkpoint; Ctrl-C again to stop at once.")
        elif number == signal.SIGINT and now - self.requested_at > self.AT_ONCE_AFTER:
            raise KeyboardInterrupt

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A signal may reach the processes on either side of a step's end; they must agree on the step they stop at.
        assert self.trainer is not None
        accelerator = self.trainer.accelerator
        flag = torch.tensor(float(self.requested), device=accelerator.device)
        if accelerator.num_processes > 1:
            flag = accelerator.reduce(flag, reduction="sum")
        if flag.item() > 0:
            self.agreed = True
            control.should_save = control.should_training_stop = True


class StepProgress(TrainerCallback):
    """A progress bar over optimizer steps on a terminal, a line now and then elsewhere; on the main process only."""

    SECONDS_BETWEEN_LINES = 20.0

    def __init__(self, console: Console, reward_names: list[str]) -> None:
        self.console, self.reward_names = console, reward_names
        self.progress: Progress | None = None
        self.last_line = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[last]}"),
                console=self.console,
            )
            self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, last="")
            self.progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        means = [f"{name} {logs.get(f'reward/{name}/mean', float('nan')):.2f}" for name in self.reward_names]
        line = "  ".join([*means, f"length {logs.get('length/mean', float('nan')):.0f}"])
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step, last=line)
        elif time.monotonic() - self.last_line > self.SECONDS_BETWEEN_LINES or state.global_step == state.max_steps:
            self.last_line = time.monotonic()
            print(f"step {state.global_step}/{state.max_steps}  {line}", file=sys.stderr, flush=True)

    def __enter__(self) -> "StepProgress":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was, also after an error."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
