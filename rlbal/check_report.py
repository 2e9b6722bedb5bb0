"""What the preflight found, as data, as a table and as JSON."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlbal.errors import RlbalError

Status = Literal["ok", "warning", "problem"]
Say = Callable[[Status, str], None]
MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "problem": ("problem", "bold red")}


@dataclass
class Report:
    """Findings in order, and the figures behind them.

    Attributes:
        recipe: what to call the recipe.
        findings: (step, status, text) each.
        figures: plain numbers by step, for programs; None where there is none.
    """

    recipe: str
    findings: list[tuple[str, Status, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[Say]:
        """Findings of one step; an error that a user can act on becomes a problem."""

        def say(status: Status, text: str) -> None:
            # A reward's message may hold half a surrogate pair, which cannot be printed.
            self.findings.append((name, status, text.encode("utf-8", "replace").decode("utf-8")))

        try:
            yield say
        except RlbalError as error:
            say("problem", str(error))

    @property
    def problems(self) -> list[str]:
        return [f"{step}: {text}" for step, status, text in self.findings if status == "problem"]

    def to_json(self) -> dict[str, Any]:
        findings = [{"step": step, "status": status, "text": text} for step, status, text in self.findings]
        return {"recipe": self.recipe, "ok": not self.problems, "findings": findings, "figures": self.figures}


def figure(value: float) -> float | None:
    """A number that JSON can hold: None for NaN."""
    return float(value) if math.isfinite(value) else None


def render(report: Report, console: Console | None = None) -> None:
    """Print findings as a table, problems repeated at the end."""
    console = console or Console()
    table = Table("step", "", "finding", title=Text(f"Preflight of {report.recipe}"))
    for step, status, text in report.findings:
        table.add_row(step, Text(*MARKS[status]), Text(text))
    console.print(table)
    if report.problems:
        console.print(Text(f"{len(report.problems)} problem(s):", "bold red"))
        for problem in report.problems:
            console.print(Text(f"- {problem}"))
    else:
        console.print(Text("no problems found", "green"))
