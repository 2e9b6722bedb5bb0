"""A prompt ledger for a terminal. Prompts are hostile text and are cleaned before they show."""

import math

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlbal.evaluation_view import printable
from rlbal.experiments.compare_view import FILE_WIDTH, figure, signed
from rlbal.ledger_report import BINS, RECENT_STEPS, LedgerReport, PromptFigures

PROMPT_LENGTH = 120
BAR = 40  # columns of the longest bar
WORTH_LEAVING_OUT = 12  # characters that all prompts begin or end with


def show(report: LedgerReport, title: str, notes: list[str], console: Console) -> None:
    """Print summary, distribution, strata, and the hardest and easiest prompts."""
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    console.print(Text(printable(f"{title}, after step {report.step}", 2000), "bold"))
    console.print(_summary(report))
    if report.means_T.size:
        console.print(_distribution(report))
    if report.strata:
        console.print(_strata(report))
    if report.hardest:
        left_out = shared_ends([record.prompt for record in [*report.hardest, *report.easiest] if record.prompt])
        console.print(_prompts("hardest", report.hardest, left_out, bool(report.strata)))
        console.print(_prompts("easiest", report.easiest, left_out, bool(report.strata)))
        console.print(_explanation(report, any(left_out)))
    else:
        console.print(Text("No prompt has been tried and scored yet.", "dim"))
    for note in notes:
        console.print(Text(f"note: {printable(note, 2000)}", "yellow"))


def _summary(report: LedgerReport) -> Table:
    a, b = report.prior
    fitted = f"Beta({a:.2f}, {b:.2f})" + ("" if report.prior_fitted else " for want of data")
    drift, recent = report.history.mean_drift(), report.history.mean_drift(RECENT_STEPS)
    undrifted = "no prompt was tried twice" if report.history.recorded else "not in metrics.jsonl"
    unscored = f", {report.unscored:,} of them never scored" if report.unscored else ""
    lines = [
        ("prompts", f"{report.prompts:,}"),
        ("tried", f"{report.tried:,} ({report.tried / max(report.prompts, 1):.1%}){unscored}"),
        ("never tried", f"{report.prompts - report.tried:,}; believed of them: {a / (a + b):.3f}, {fitted}"),
        ("rollouts", "–" if report.history.rollouts is None else f"{report.history.rollouts:,}"),
        (
            "drift",
            f"–, {undrifted}"
            if math.isnan(drift)
            else f"{signed(drift, 3)}, last {RECENT_STEPS} steps {signed(recent, 3)} "
            "(success of a batch less what was believed of it before)",
        ),
    ]
    if report.retired is not None:
        lines.insert(3, ("retired", f"{report.retired:,}"))
    table = Table.grid(padding=(0, 2))
    for name, value in lines:
        table.add_row(Text(name), Text(value))
    return table


def _distribution(report: LedgerReport) -> Table:
    """Tried prompts by believed success, as bars."""
    table = _table("believed success", "range", "prompts", "")
    most = max(report.counts)
    for place, count in enumerate(report.counts):
        bar = "█" * math.ceil(BAR * count / most)  # a single prompt shows
        table.add_row(f"{place / BINS:.1f} to {(place + 1) / BINS:.1f}", f"{count:,}", Text(bar, "cyan"))
    table.columns[1].justify = "right"
    return table


def _strata(report: LedgerReport) -> Table:
    table = _table("kinds (`allocation.strata`)", "kind", "prompts", "tried", "prior mean", "believed, of those tried")
    for column in table.columns[1:]:
        column.justify = "right"
    for stratum in report.strata:
        shares = (figure(stratum.prior_mean, 3), figure(stratum.mean, 3))
        table.add_row(_line(stratum.name, 40), f"{stratum.prompts:,}", f"{stratum.tried:,}", *shares)
    return table


def _prompts(title: str, figures: list[PromptFigures], left_out: tuple[int, int], with_kind: bool) -> Table:
    names = ["prompt", "believed, 95 %", "won", "rollouts", "step", "tokens"]
    table = _table(title, *names)
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    if with_kind:
        table.add_column("kind")
    if any(record.prompt is not None for record in figures):
        table.add_column("text", overflow="fold", ratio=1)
    for record in figures:
        cells: list[RenderableType] = [
            f"{record.prompt_index}",
            Text(f"{record.mean:.2f} [{_short(record.low)}, {_short(record.high)}]"),
            f"{record.successes:.1f}",
            f"{record.rollouts:.1f}",
            f"{record.last_step}",
            f"{record.length:.0f}",
        ]
        cells += [_line(record.stratum, 20)] if with_kind else []
        cells += [_line(_middle(record.prompt, left_out), PROMPT_LENGTH)] if record.prompt is not None else []
        table.add_row(*cells)
    return table


def _explanation(report: LedgerReport, shortened: bool) -> Group:
    when = "as each prompt's last visit left it" if report.last_visits else f"as of step {report.step}"
    lines = [
        f"Of prompts tried and scored, {when}: mean of the belief with its 95 % interval; successes and rollouts as "
        "far as they still count; policy updates before the last try; mean completion tokens."
    ]
    if shortened:
        lines.append("What all prompts shown begin or end with is left out (…).")
    return Group(*(Text(line, "dim") for line in lines))


def shared_ends(prompts: list[str]) -> tuple[int, int]:
    """Characters that all prompts begin with, and end with, up to a blank; 0 where that is not worth leaving out."""
    if len(set(prompts)) < 2:
        return 0, 0
    start = _common_start(prompts)
    head = max(start.rfind(" "), start.rfind("\n")) + 1
    head = head if head >= WORTH_LEAVING_OUT else 0
    end = _common_start([prompt[head:][::-1] for prompt in prompts])
    tail = max(end.rfind(" "), end.rfind("\n")) + 1
    return head, tail if tail >= WORTH_LEAVING_OUT else 0


def _common_start(texts: list[str]) -> str:
    first, last = min(texts), max(texts)  # all others agree with both as far as these two agree
    differ = (place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
    return first[: next(differ, min(len(first), len(last)))]


def _middle(prompt: str, left_out: tuple[int, int]) -> str:
    head, tail = left_out
    return ("… " if head else "") + prompt[head : len(prompt) - tail] + (" …" if tail else "")


def _table(title: str, *columns: str) -> Table:
    heading = Text(title, "bold")
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column)
    return table


def _line(text: str, limit: int) -> Text:
    return Text(printable(text, limit).replace("\n", " "))


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")
