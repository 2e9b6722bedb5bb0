"""Evaluations as tables and examples for a terminal. Completions are hostile text and are cleaned before they show."""

import math
import re
import unicodedata
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlbal.evaluation import Evaluation

# Escape sequences: CSI (colours, cursor moves), strings (titles, links, clipboard) up to their end, two-character ones.
ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b.?"
)
SHOWN = 600
BUDGET = "budget/"
BUDGET_ROW = "budget"


def printable(text: str, limit: int = SHOWN) -> str:
    """Text that cannot steer a terminal: no escape sequences, control, bidirectional or other invisible characters.

    Line breaks stay, tabs become spaces, lone surrogates `\\ufffd`. Text over `limit` characters keeps its beginning
    and, since answers stand there, its end.
    """
    kept = []
    for character in ESCAPES.sub("", text).replace("\t", "    "):
        category = unicodedata.category(character)
        if category == "Cs":
            kept.append("\ufffd")
        elif character == "\n" or category not in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp"):
            kept.append(character)
    if len(kept) > limit:
        tail = limit // 3
        kept = [*kept[: limit - tail], f" […{len(kept) - limit} characters…] ", *kept[-tail:]]
    return "".join(kept)


def _line(text: Any) -> Text:
    return Text(printable(str(text), 60).replace("\n", " "))


def _number(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if name.endswith("length/mean") else f"{value:.3f}"


def _cell(evaluation: Evaluation, name: str) -> str:
    value = _number(name, evaluation.metrics.get(name, math.nan))
    low, high = evaluation.intervals.get(name, (math.nan, math.nan))
    if math.isnan(low):
        return value
    # Shortened so that two evaluations and their change fit into 80 columns: .842 for 0.842, 1.00 for 1.000.
    short = [_number(name, bound).removeprefix("0").replace("1.000", "1.00") for bound in (low, high)]
    return f"{value} [{short[0]}, {short[1]}]"


def _metric_names(evaluations: dict[str, Evaluation]) -> list[str]:
    """All metrics in order, each at a token budget right after the one without."""
    names = list(dict.fromkeys(name for evaluation in evaluations.values() for name in evaluation.metrics))
    pairs = [(name, BUDGET + name) for name in names if not name.startswith(BUDGET)]
    return [name for pair in pairs for name in pair if name in names]


def table(evaluations: dict[str, Evaluation]) -> Table:
    """Metrics in rows, evaluations in columns, with 95 % intervals; two evaluations also get their difference.

    Where there was a token budget, the first row says which, and every metric at it stands below the one without.
    """
    prompts = sorted({evaluation.prompts for evaluation in evaluations.values()})
    rendered = Table(
        title=Text("Held-out evaluation"),
        caption=Text(f"{' / '.join(map(str, prompts))} prompts; brackets: 95 % bootstrap interval over prompts"),
    )
    rendered.add_column("metric", no_wrap=True)
    for label in evaluations:
        rendered.add_column(_line(label), justify="right")
    if len(evaluations) == 2:
        rendered.add_column("change", justify="right", no_wrap=True)
    budgets = [evaluation.settings.get("budget") for evaluation in evaluations.values()]
    if any(budgets):
        rendered.add_row(Text(BUDGET_ROW), *(Text("–" if tokens is None else f"{tokens} tokens") for tokens in budgets))
    for name in _metric_names(evaluations):
        cells = [_cell(evaluation, name) for evaluation in evaluations.values()]
        if len(evaluations) == 2:
            before, after = (evaluation.metrics.get(name, math.nan) for evaluation in evaluations.values())
            change = _number(name, after - before)
            cells.append(change if change[0] in "-–" else f"+{change}")
        rendered.add_row(_line(name), *map(Text, cells))
    return rendered


def difficulty_table(evaluations: dict[str, Evaluation], metric: str) -> Table:
    """One metric by value of the difficulty column."""
    rendered = Table(title=Text(f"{metric} by difficulty"))
    rendered.add_column("difficulty")
    rendered.add_column("prompts", justify="right")
    for label in evaluations:
        rendered.add_column(_line(label), justify="right")
    values = dict.fromkeys(value for evaluation in evaluations.values() for value in evaluation.by_difficulty)
    for value in values:
        groups = [evaluation.by_difficulty.get(value) for evaluation in evaluations.values()]
        sizes = sorted({group["prompts"] for group in groups if group})
        cells = [_number(metric, group["metrics"].get(metric, math.nan) if group else math.nan) for group in groups]
        rendered.add_row(_line(value), Text(" / ".join(map(str, sizes))), *map(Text, cells))
    return rendered


def _prompt_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def _completion(label: str, example: dict[str, Any]) -> Text:
    rewards = "  ".join(f"{name} {_number(name, value)}" for name, value in example["rewards"].items())
    notes = f"{label}{' (greedy)' if example['greedy'] else ''}: {rewards}{'  cut off' if example['truncated'] else ''}"
    return Text.assemble((printable(notes, 200), "bold"), "\n", printable(example["completion"]))


def examples_panel(evaluations: dict[str, Evaluation], count: int = 3) -> RenderableType:
    """The same few prompts with the sampled completion and rewards of each evaluation, one panel per prompt."""
    sampled = [
        (label, example)
        for label, evaluation in evaluations.items()
        for example in evaluation.examples
        if not example["greedy"] and "budget" not in example  # as prompted without a budget, so that prompts are equal
    ]
    prompts: list[str] = list(dict.fromkeys(_prompt_text(example["prompt"]) for _, example in sampled))
    panels = []
    for prompt in prompts[:count]:
        answers = [
            _completion(label, example) for label, example in sampled if _prompt_text(example["prompt"]) == prompt
        ]
        panels.append(Panel(Group(Text(printable(prompt), "dim"), *answers)))
    return Group(*panels)


def comparison(lines: list[dict[str, Any]]) -> RenderableType:
    """The first and the last of a run's evaluations (lines of `evaluations.jsonl`): table and examples.

    Raises:
        RunError: a line is no evaluation.
    """
    ends = lines if len(lines) == 1 else [lines[0], lines[-1]]
    evaluations = {f"step {line.get('step', '?')}": Evaluation.from_json(line) for line in ends}
    return Group(table(evaluations), examples_panel(evaluations))
