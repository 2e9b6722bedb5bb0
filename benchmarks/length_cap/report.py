"""Tables and the picture of a result; figures in README.md are never typed by hand."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from rich import box
from rich.console import Console
from rich.table import Table

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results: generated -->", "<!-- end of results -->"
WITHOUT, WITH = "without", "with"
# Okabe-Ito: told apart by colour-blind readers too.
GENERATION, TRAINING, BLACK, BLUE = "#0072B2", "#009E73", "#000000", "#0072B2"
Rows = tuple[list[str], list[list[str]]]  # columns, lines


def _both(figures: dict[str, Any], name: str, form: str) -> str:
    """Means over the rounds without and with the cap."""
    return " → ".join(format(np.mean(figures["arms"][arm][name]), form) for arm in (WITHOUT, WITH))


def _seconds(figures: dict[str, Any], name: str) -> str:
    return " → ".join(f"{np.median(figures['arms'][arm][name]):.2f}" for arm in (WITHOUT, WITH))


def _times(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f}–{value['high']:.2f})"


def _fewer(value: dict[str, float]) -> str:
    """The share of the tokens that the cap saves, from the ratio without : with."""
    median, low, high = (f"{1 - 1 / value[key]:.0%}" for key in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def token_rows(result: dict[str, Any]) -> Rows:
    """What is generated and what is lost, one line per workload and budget."""
    lines = []
    for name, found in result["steps"].items():
        for budget, figures in found["budgets"].items():
            lines.append(
                [
                    name,
                    f"{budget}, {figures['cap']} of {found['limit']}",
                    _both(figures, "tokens", ",.0f"),
                    _fewer(figures["without_to_with"]["tokens"]),
                    _both(figures, "longest", ".0f"),
                    _both(figures, "cut_off", ".1%"),
                    _both(figures, "correct", ".3f"),
                    _both(figures, "reward", ".3f"),
                    _both(figures, "trained_on", ".0%"),
                ]
            )
    columns = ["policy", "budget, cap of limit", "tokens a step", "saved", "longest", "cut off", "correct", "reward"]
    return [*columns, "rows trained on"], lines


def time_rows(result: dict[str, Any]) -> Rows:
    """What it takes, one line per workload and budget."""
    lines = []
    for name, found in result["steps"].items():
        for budget, figures in found["budgets"].items():
            ratios = figures["without_to_with"]
            cells = [
                cell
                for part in ("generation", "training", "step")
                for cell in (_seconds(figures, part), _times(ratios[part]))
            ]
            lines.append([name, budget, *cells, _times(ratios["clock"])])
    columns = ["policy", "budget", "generation, s", "times faster", "training, s", "times faster"]
    return [*columns, "step, s", "times faster", "by the clock"], lines


def course_rows(result: dict[str, Any]) -> Rows:
    """The training run: one line per arm, then ratios of all of it and of parts."""
    course = result["course"]
    steps = result["size"]["course_steps"]
    lines = []
    for arm in (WITHOUT, WITH):
        figures, last = course["arms"][arm], course["last_ten_steps"][arm]
        tokens, correct, reward = (np.mean(last[name]) for name in ("tokens", "correct", "reward"))
        seconds = [f"{steps * np.median(figures[part]):.1f}" for part in ("generation", "training", "step")]
        generated = f"{steps * np.mean(figures['tokens']) / 1e3:,.0f} k"
        lines.append([arm, generated, *seconds, f"{tokens:,.0f}", f"{correct:.3f}", f"{reward:.3f}"])
    spans = {"without : with": course} | {f"{span}: without : with": found for span, found in course["spans"].items()}
    for span, found in spans.items():
        ratios = found["without_to_with"]
        times = [_times(ratios[name]) for name in ("tokens", "generation", "training", "step")]
        lines.append([span, *times, "", "", ""])
    columns = ["cap", "tokens", "generation, s", "training, s", "whole, s"]
    return [*columns, "tokens a step, last ten", "correct, last ten", "reward, last ten"], lines


def tables(result: dict[str, Any]) -> list[tuple[str, Rows]]:
    """All tables with their titles."""
    size, course = result["size"], result["course"]
    run = f"{size['course_steps']} training steps, {course['workload']}, budget {course['budget']}"
    return [
        (
            f"What is generated: without → with the cap, means over {size['rounds']} rounds of {size['steps']} steps",
            token_rows(result),
        ),
        (f"What it takes: without → with the cap, medians over {size['rounds']} rounds", time_rows(result)),
        (f"{run}: over {size['course_rounds']} seeds", course_rows(result)),
    ]


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    for title, (columns, lines) in tables(result):
        table = Table(*columns, title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def fill_results(result: dict[str, Any]) -> None:
    """Write the tables between README.md's markers."""
    parts = [BEGIN]
    for title, (columns, lines) in tables(result):
        rows = "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *lines])
        parts.append(f"**{title}**\n\n{rows}")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + "\n\n".join([*parts, END]) + after, encoding="utf-8")


def bars(axes: Axes, name: str, found: dict[str, Any]) -> None:
    """Stacked seconds of a step, without and with the cap, for each budget."""
    for place, figures in enumerate(found["budgets"].values()):
        top = 0.0
        for offset, arm in ((-0.2, WITHOUT), (0.2, WITH)):
            generation, training = (np.median(figures["arms"][arm][part]) for part in ("generation", "training"))
            hatch = "" if arm == WITH else "///"
            style: dict[str, Any] = {"width": 0.36, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            axes.bar(place + offset, generation, color=GENERATION, **style)
            axes.bar(place + offset, training, bottom=generation, color=TRAINING, **style)
            top = max(top, generation + training)
        faster = figures["without_to_with"]["step"]["median"]
        axes.annotate(f"{faster:.2f}×", (place, top), (0, 3), "data", "offset points", ha="center")
    axes.set_xticks(range(len(found["budgets"])), [f"{b}\n({f['cap']})" for b, f in found["budgets"].items()])
    axes.set(title=f"{name} (limit {found['limit']})", xlabel="budget (cap)")
    axes.margins(x=0.08, y=0.12)


def course(axes: Axes, result: dict[str, Any]) -> None:
    """Tokens of each step of the training run, mean and range over seeds."""
    found = result["course"]
    for arm, colour in ((WITHOUT, BLACK), (WITH, BLUE)):
        tokens_ST = np.array(found["tokens_by_step"][arm]) / 1e3
        at = np.arange(1, tokens_ST.shape[1] + 1)
        axes.plot(at, tokens_ST.mean(axis=0), color=colour, label=f"{arm} the cap")
        axes.fill_between(at, tokens_ST.min(axis=0), tokens_ST.max(axis=0), color=colour, alpha=0.15, lw=0)
    axes.set(title=f"training: {found['workload']}, budget {found['budget']}", xlabel="optimizer step")
    axes.set_ylabel("thousand tokens a step")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def plot(result: dict[str, Any], file: Path) -> None:
    """Seconds of a step for each policy and budget; tokens over a training run."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    steps = result["steps"]
    widths = [*(1 + len(found["budgets"]) for found in steps.values()), 5]
    figure, panels = plt.subplots(1, len(widths), figsize=(15, 4.4), width_ratios=widths, layout="constrained")
    for axes, (name, found) in zip(panels, steps.items(), strict=False):
        bars(axes, name, found)
    panels[0].set_ylabel("seconds a step")
    course(panels[-1], result)
    handles = [Patch(color=GENERATION, label="generation"), Patch(color=TRAINING, label="training")]
    handles += [Patch(facecolor="#999999", hatch="///", edgecolor="white", label="without the cap")]
    handles += [Patch(facecolor="#999999", label="with the cap; above: how many times faster a step is")]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=len(handles))
    figure.savefig(file, dpi=130)
    plt.close(figure)
