"""A comparison for people: a table per metric in the terminal, or JSON."""

import math
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlbal.evaluation_view import printable
from rlbal.experiments.compare import Comparison, Judgement, compare_runs
from rlbal.experiments.metrics import describe
from rlbal.run import to_json

COLOURS = {"better": "green", "worse": "red", "not comparable": "yellow"}
FILE_WIDTH = 110  # columns where no terminal says how many there are


def compare_command(
    paths: list[Path], baseline: str | None, metrics: list[str], as_json: bool, plot: Path | None
) -> None:
    """Compare and print; with `plot`, also write a figure.

    Raises:
        RlbalError: nothing to compare, or the figure cannot be written.
    """
    comparison = compare_runs(paths, baseline, metrics)
    if plot is not None:
        from rlbal.experiments.plot import write_plot

        write_plot(comparison, plot)
    if as_json:
        typer.echo(to_json(comparison.to_json()))
    else:
        show(comparison, Console(highlight=False))


def show(comparison: Comparison, console: Console) -> None:
    """Print a table per metric, what they rest on, and what a reader must know."""
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    for metric in comparison.metrics:
        console.print(_table(comparison, metric))
    for line in _caption(comparison):
        console.print(Text(line, "dim"))
    for note in comparison.notes:
        console.print(Text(f"note: {printable(note, 2000)}", "yellow"))
    for path, reason in comparison.left_out.items():
        console.print(Text(f"left out: {printable(f'{path}: {reason}', 2000)}", "yellow"))


def _table(comparison: Comparison, metric: str) -> Table:
    title = Text(printable(describe(metric), 200), "bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("arm", overflow="fold", min_width=8)
    for name in ("n", "mean ± sd", "difference, 95 % interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=len("no difference"))
    digits = decimals([value for arm in comparison.arms for value in _values(comparison, arm.label, metric)])
    for arm in comparison.arms:
        summary, label = comparison.summaries[arm.label, metric], Text(printable(arm.label, 200))
        spread = "" if math.isnan(summary.std) else f" ± {figure(summary.std, digits)}"
        cells = [str(len(summary.values)), figure(summary.mean, digits) + spread]
        if arm.label == comparison.baseline:
            table.add_row(label, *cells, "", "", Text("baseline", "dim"))
        else:
            judgement = comparison.judgements[arm.label, metric]
            style = COLOURS.get(judgement.verdict, "")
            table.add_row(label, *cells, *_difference(judgement, digits), Text(judgement.verdict, style))
    return table


def _values(comparison: Comparison, label: str, metric: str) -> list[float]:
    return list(comparison.summaries[label, metric].values.values())


def _difference(judgement: Judgement, digits: int) -> list[Text]:
    difference, p_holm = judgement.difference, judgement.p_holm
    text = signed(difference.mean, digits)
    if not math.isnan(difference.low):
        text += f" [{signed(difference.low, digits)}, {signed(difference.high, digits)}]"
    # Text, or the brackets would be taken for markup.
    p = "–" if math.isnan(p_holm) else f"{p_holm:.3f}" if p_holm >= 0.001 else "<.001"
    return [Text(text), Text(p)]


def decimals(values: list[float]) -> int:
    """Digits after the point that suit a metric of this size."""
    largest = max(map(abs, values), default=0.0)
    return 3 if largest < 10 else 1 if largest < 10_000 else 0


def figure(value: float, digits: int) -> str:
    """A value, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def signed(value: float, digits: int) -> str:
    """A difference with its sign, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:+,.{digits}f}"


def _caption(comparison: Comparison) -> list[str]:
    """What the figures are and how verdicts are reached."""
    lines = ["n: seeds; one arm, so there is nothing to compare it with."]
    if len(comparison.arms) > 1:
        pairs = sorted({judgement.difference.pairs for judgement in comparison.judgements.values()})
        lines = [
            f"Differences are paired by seed ({' / '.join(map(str, pairs))} {'pair' if pairs == [1] else 'pairs'}), "
            f"arm minus {printable(comparison.baseline, 200)}; n: seeds; Student's 95 % intervals, each by itself.",
            f"Verdicts allow for the number of tests shown ({comparison.tests}): p is Holm's and must be below 0.05. "
            "That no difference is shown does not mean that there is none: the interval says what is still possible.",
        ]
    return lines
