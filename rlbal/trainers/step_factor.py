"""A factor on the learning rate of single optimizer steps."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepFactor(TrainerCallback):
    """Multiplies the learning rate of the optimizer step that is under way, and takes it back after it.

    It must be applied before the backward passes, since DeepSpeed takes its step inside the last one. Schedules of the
    learning rate never see it: where DeepSpeed's own has set a new rate by the end of the step, that rate stays. Where
    several generation batches make up one step (`steps_per_generation` below `gradient_accumulation_steps`), the first
    one's factor counts.
    """

    def __init__(self) -> None:
        self._changed: list[tuple[dict[str, Any], Any, Any]] = []

    def apply(self, optimizer: Any, factor: float) -> None:
        """Multiply the learning rates once per step, however often it is called."""
        if self._changed or factor == 1.0:
            return
        for group in optimizer.param_groups:
            before = group["lr"]
            group["lr"] = before * factor
            self._changed.append((group, before, group["lr"]))

    def restore(self) -> None:
        """Take the factor back, also from a step that broke off."""
        for group, before, scaled in self._changed:
            if group["lr"] == scaled:
                group["lr"] = before
        self._changed = []

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.restore()
