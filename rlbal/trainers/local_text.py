"""Prompts and completions stay on the process that has them.

TRL sends the text of every batch to every process, for a table that only `log_completions` shows. Without that table
nobody reads them there, and with many processes they would be most of what travels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl.trainer import grpo_trainer


class LocalText:
    """What TRL gathers as objects while it generates and scores a batch, left where it is.

    Attributes:
        texts: lists that must not travel.
        metrics_logged: whether a reward on any process has logged a metric of its own (TRL's `log_metric`). Then the
            processes tell each other the metrics' names; otherwise there is nothing to tell.
    """

    def __init__(self) -> None:
        self.texts: tuple[list[Any], ...] = ()
        self.metrics_logged = False

    @contextmanager
    def stays(self) -> Iterator[None]:
        """Stand in for TRL's `gather_object`."""
        gather = grpo_trainer.gather_object

        def gather_names(rows: list[Any]) -> list[Any]:
            if not self.metrics_logged or any(rows is text for text in self.texts):
                return rows
            return gather(rows)

        grpo_trainer.gather_object = gather_names
        try:
            yield
        finally:
            grpo_trainer.gather_object = gather
            self.texts, self.metrics_logged = (), False
