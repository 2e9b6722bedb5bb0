"""The batch arithmetic of a recipe: how many rollouts, prompts and micro-batches, and whether they divide."""

from dataclasses import dataclass
from typing import Any

from rlbal.errors import RecipeError
from rlbal.recipe import Recipe


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a recipe for a number of processes."""

    num_processes: int
    per_device: int
    accumulation: int
    steps_per_generation: int
    rollouts_per_prompt: int

    @property
    def rollouts(self) -> int:
        """Completions per generation batch, over all processes (N)."""
        return self.num_processes * self.per_device * self.steps_per_generation

    @property
    def prompts(self) -> int:
        """Prompts per generation batch (P)."""
        return self.rollouts // self.rollouts_per_prompt

    def explain(self) -> str:
        """The arithmetic in one sentence."""
        return (
            f"{_count(self.num_processes)} x {self.per_device} rows per device x {self.steps_per_generation} steps "
            f"per generation = {self.rollouts} rollouts = {self.prompts} prompts x {self.rollouts_per_prompt} "
            "rollouts; "
            f"optimizer step every {self.accumulation} micro-batches of {self.per_device * self.num_processes} rows"
        )


def _count(processes: int) -> str:
    return f"{processes} process" if processes == 1 else f"{processes} processes"


def plan_batches(recipe: Recipe, trainer: dict[str, Any], num_processes: int) -> BatchPlan:
    """Work out the batches.

    Args:
        recipe: for its group size.
        trainer: TRL's settings, defaults included.
        num_processes: over all nodes.

    Raises:
        RecipeError: sizes that do not divide, or too few rollouts.
    """
    per_device, accumulation = trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"]
    step_rows, batch = per_device * num_processes, trainer["generation_batch_size"]
    steps = trainer["steps_per_generation"]
    if batch is not None and steps is not None:
        raise RecipeError(
            "`trainer.generation_batch_size` and `trainer.steps_per_generation` say the same thing twice",
            fix="keep one of them",
        )
    if batch is not None and batch % step_rows:
        raise RecipeError(
            f"`trainer.generation_batch_size` ({batch}) does not divide into micro-batches of "
            f"{per_device} rows x {_count(num_processes)} = {step_rows}",
            fix=f"make it a multiple of {step_rows}",
        )
    if batch is not None:
        steps = batch // step_rows
    elif steps is None:
        steps = accumulation
    plan = BatchPlan(num_processes, per_device, accumulation, steps, recipe.algorithm.rollouts_per_prompt)
    if plan.rollouts % plan.rollouts_per_prompt:
        raise RecipeError(
            f"a generation batch of {plan.rollouts} rollouts does not divide into groups of "
            f"{plan.rollouts_per_prompt} (`algorithm.rollouts_per_prompt`)",
            why=f"{_count(num_processes)} x {per_device} rows per device x {steps} steps per generation "
            f"= {plan.rollouts} (`launch.num_processes`, `trainer.per_device_train_batch_size`, "
            "`trainer.steps_per_generation` or `trainer.gradient_accumulation_steps`)",
            fix=f"make that product a multiple of {plan.rollouts_per_prompt}",
        )
    if plan.rollouts < 2:
        raise RecipeError(
            "a generation batch of 1 rollout cannot be compared with anything",
            fix="raise `trainer.per_device_train_batch_size` or `trainer.gradient_accumulation_steps`",
        )
    return plan
