"""Token budgets for completions over time."""


class NoBudget:
    """`budget.schedule: none`: completions are limited by `trainer.max_completion_length` alone."""

    def tokens(self, step: int) -> int | None:
        """The budget B(t) in tokens at an optimizer step, or None."""
        del step
        return None
