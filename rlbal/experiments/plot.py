"""A comparison as a figure: one panel per metric, arms down the side, differences to the baseline across."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbal.errors import RunError
from rlbal.evaluation_view import printable
from rlbal.experiments.compare import Comparison, need_two_arms
from rlbal.experiments.metrics import TRAIN, direction, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: told apart by colour-blind readers too.
COLOURS = {"better": "#009E73", "worse": "#D55E00"}
OTHER = "#4D4D4D"
COLUMNS = 4  # panels side by side, at most


def write_plot(comparison: Comparison, path: Path) -> None:
    """Draw the figure into a file whose ending says the format (png, pdf, svg).

    Raises:
        RunError: there is only one arm, or the file cannot be written.
    """
    need_two_arms(comparison)
    figure = draw(comparison)
    try:
        figure.savefig(path, dpi=160)
    except (ValueError, OSError) as error:
        raise RunError(f"cannot write the plot to {path}", str(error), "name a .png, .pdf or .svg file") from None


def draw(comparison: Comparison) -> "Figure":
    """The figure: points are seeds, bars the mean and its 95 % interval, both arm minus baseline."""
    from matplotlib.figure import Figure

    arms = [arm.label for arm in comparison.arms if arm.label != comparison.baseline]
    rows = math.ceil(len(comparison.metrics) / COLUMNS)
    columns = math.ceil(len(comparison.metrics) / rows)
    size = (1.9 + 2.8 * columns, 1.25 + rows * (1.15 + 0.36 * len(arms)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for place, (panel, metric) in enumerate(zip(panels, comparison.metrics, strict=False)):
        _panel(panel, comparison, metric, arms, labelled=place % columns == 0)
    for panel in panels[len(comparison.metrics) :]:
        panel.set_visible(False)
    title = f"Differences to {_plain(comparison.baseline)}, paired by seed"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    _legend(figure, comparison)
    return figure


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: `$` would start a formula."""
    return printable(text, 40).replace("$", r"\$")


def _panel(panel: "Axes", comparison: Comparison, metric: str, arms: list[str], labelled: bool) -> None:
    panel.axvline(0, color="#808080", linewidth=1.2, zorder=1)
    for place, label in enumerate(arms):
        judgement = comparison.judgements[label, metric]
        colour, difference = COLOURS.get(judgement.verdict, OTHER), judgement.difference
        seeds = list(judgement.differences.values())
        panel.scatter(seeds, [place + 0.2] * len(seeds), s=13, color=colour, alpha=0.35, linewidths=0, zorder=2)
        if judgement.verdict == "not comparable":
            panel.text(0, place, " not comparable", color=OTHER, fontsize=8, va="center", style="italic")
        elif not math.isnan(difference.low):
            panel.plot([difference.low, difference.high], [place, place], color=colour, linewidth=2.2, zorder=2)
        if not math.isnan(difference.mean):
            filled = colour if judgement.verdict in COLOURS else "white"
            panel.plot(difference.mean, place, "o", ms=6.5, mec=colour, mfc=filled, mew=1.6, zorder=3)
    panel.set_ylim(len(arms) - 0.45, -0.55)
    panel.set_yticks(range(len(arms)), [_plain(label) for label in arms] if labelled else [""] * len(arms), fontsize=9)
    source = " (training)" if metric.startswith(TRAIN) else ""
    panel.set_title(_plain(metric.removeprefix(TRAIN)) + source, fontsize=10, loc="left")
    panel.set_xlabel(_axis_label(metric), fontsize=8.5, color="#333333")
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8)
    panel.locator_params(axis="x", nbins=5)
    panel.grid(axis="x", color="#EEEEEE", zorder=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _axis_label(metric: str) -> str:
    way = {"up": "better →", "down": "← better", None: ""}[direction(metric)]
    return "   ".join(part for part in (f"difference, {unit(metric)}" if unit(metric) else "difference", way) if part)


def _legend(figure: "Figure", comparison: Comparison) -> None:
    from matplotlib.lines import Line2D

    bar: dict[str, Any] = {"marker": "o", "markersize": 6.5, "markeredgewidth": 1.6, "linewidth": 2.2}
    handles = [
        Line2D([], [], color=OTHER, marker="o", markersize=3.6, alpha=0.5, linestyle="", label="one seed"),
        Line2D([], [], color=COLOURS["better"], label="better", **bar),
        Line2D([], [], color=COLOURS["worse"], label="worse", **bar),
        Line2D([], [], color=OTHER, markerfacecolor="white", label="no difference shown, or no verdict", **bar),
    ]
    title = f"mean and 95 % interval; verdicts allow for {comparison.tests} tests (Holm)"
    figure.legend(
        handles=handles,
        title=title,
        loc="outside lower left",
        ncols=len(handles),
        fontsize=8,
        title_fontsize=8,
        frameon=False,
        alignment="left",
    )
