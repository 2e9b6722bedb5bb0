"""What a checkpoint needs besides TRL's part: one JSON file, and the ledger beside it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbal.errors import RunError
from rlbal.run import LEDGER, STATE, to_json, write_whole

if TYPE_CHECKING:
    from rlbal.trainers.grpo import BalancedGRPOTrainer


class BalanceState:
    """Saves, loads and takes back what a trainer has learned about rewards, prompts and budgets."""

    def __init__(self, trainer: "BalancedGRPOTrainer") -> None:
        self.trainer = trainer

    def now(self) -> dict[str, Any]:
        """All of it but the ledger, as JSON types."""
        trainer = self.trainer
        return {
            "totals": trainer.totals.metrics(trainer.accelerator.num_processes),
            "budget": trainer.budget.schedule.state_dict(),
            "allocation": trainer.allocator.state_dict(),
            **trainer.balance.state_dict(),
        }

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint; the JSON file last, since it says that the checkpoint is whole."""
        self.trainer.allocator.ledger.save(folder / LEDGER)
        write_whole(folder / STATE, to_json(self.now()) + "\n")

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            RunError: it does not fit the recipe, or is of an rlbal that knew less.
        """
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if missing := [key for key in ("totals", "budget", "allocation") if key not in state]:
            raise RunError(
                f"{folder / STATE} has no `{missing[0]}`", "it is of an earlier version of rlbal", "start the run again"
            )
        self._take(state)
        self.trainer.allocator.ledger.load(folder / LEDGER)

    def _take(self, state: dict[str, Any]) -> None:
        trainer = self.trainer
        trainer.totals.load(state["totals"])
        trainer.balance.load_state_dict(state)
        trainer.budget.schedule.load_state_dict(state["budget"])
        trainer.allocator.load_state_dict(state["allocation"])

    def remember(self) -> None:
        """Keep it as it is between two steps, for when the next one fails."""
        ledger = {name: array.copy() for name, array in self.trainer.allocator.ledger.state_dict().items()}
        self._remembered = self.now(), ledger

    def take_back(self) -> None:
        """Undo what a step that was not finished has changed."""
        state, ledger = self._remembered
        self._take(state)
        self.trainer.allocator.ledger.load_state_dict(ledger)
