"""What a checkpoint needs besides TRL's part: a JSON file, the ledger, and rollouts that are still to be trained on."""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlbal.errors import RunError
from rlbal.resume import check_fits, identity
from rlbal.run import LEDGER, STATE, to_json, write_whole
from rlbal.trainers.cycle import cycle_file, load_cycle, save_cycle

if TYPE_CHECKING:
    from rlbal.trainers.grpo import BalancedGRPOTrainer


class BalanceState:
    """Saves, loads and takes back what a trainer has learned about rewards, prompts and budgets."""

    def __init__(self, trainer: "BalancedGRPOTrainer") -> None:
        self.trainer = trainer

    def now(self) -> dict[str, Any]:
        """All of it but ledger and rollouts, as JSON types."""
        trainer = self.trainer
        return {
            "totals": trainer.totals.metrics(trainer.accelerator.num_processes),
            "budget": trainer.budget.schedule.state_dict(),
            "allocation": trainer.allocator.state_dict(),
            "cycle": trainer.cycle_state(),
            **trainer.balance.state_dict(),
        }

    def save(self, folder: Path) -> None:
        """Write what all processes know into a checkpoint."""
        trainer = self.trainer
        trainer.allocator.ledger.save(folder / LEDGER)
        written_by = identity(trainer.recipe, trainer.plan, trainer.rows, trainer.engine)
        state = {"written_by": written_by, "best": trainer.best, **self.now()}
        write_whole(folder / STATE, to_json(state) + "\n")

    def save_own(self, folder: Path) -> None:
        """Write what only this process has: the rollouts of a generation cycle that is not over."""
        if self.trainer.in_cycle:
            buffered: Any = self.trainer._buffered_inputs
            save_cycle(buffered, cycle_file(folder, self.trainer.accelerator.process_index))

    def load(self, folder: Path) -> None:
        """Go on from what was saved.

        Raises:
            RunError: it does not fit the recipe or the processes, or is of an rlbal that knew less.
        """
        trainer = self.trainer
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if missing := [key for key in ("totals", "budget", "allocation", "cycle", "written_by") if key not in state]:
            raise RunError(
                f"{folder / STATE} has no `{missing[0]}`", "it is of an earlier version of rlbal", "start the run again"
            )
        now = identity(trainer.recipe, trainer.plan, trainer.rows, trainer.engine)
        mid_cycle = state["cycle"]["in_cycle"]
        trainer.notes += check_fits(state["written_by"], now, folder.name, mid_cycle)
        self._take(state)
        trainer.allocator.ledger.load(folder / LEDGER)
        if mid_cycle:
            rollouts = cycle_file(folder, trainer.accelerator.process_index)
            micro_batches = trainer.args.steps_per_generation or 1
            buffered: Any = load_cycle(rollouts, micro_batches, trainer.accelerator.device)
            trainer._buffered_inputs = buffered
        trainer.best = state["best"]
        if trainer.use_vllm:
            trainer.notes.append(
                "vLLM's random numbers are in no checkpoint: rollouts will be others than without a stop"
            )

    def _take(self, state: dict[str, Any]) -> None:
        trainer = self.trainer
        trainer.totals.load(state["totals"])
        trainer.balance.load_state_dict(state)
        trainer.budget.schedule.load_state_dict(state["budget"])
        trainer.allocator.load_state_dict(state["allocation"])
        trainer.load_cycle_state(state["cycle"])

    def remember(self) -> None:
        """Keep it as it is between two steps, for when the next one fails."""
        ledger = {name: array.copy() for name, array in self.trainer.allocator.ledger.state_dict().items()}
        rollouts, tokens = self.trainer._buffered_inputs, self.trainer.state.num_input_tokens_seen
        self._remembered = self.now(), ledger, random_state(), rollouts, tokens

    def take_back(self) -> None:
        """Undo what a step that was not finished has changed, random numbers drawn included."""
        state, ledger, numbers, rollouts, tokens = self._remembered
        self._take(state)
        self.trainer.allocator.ledger.load_state_dict(ledger)
        self.trainer._buffered_inputs, self.trainer.state.num_input_tokens_seen = rollouts, tokens
        set_random_state(numbers)


def random_state() -> dict[str, Any]:
    """The states of all random number generators that training draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to a `random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])
