"""A prompt ledger as a figure: what is believed of prompts and how long their answers are; share tried and drift."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import beta

from rlbal.errors import RunError
from rlbal.evaluation_view import printable
from rlbal.ledger_report import LedgerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: told apart by colour-blind readers too.
BLUE, RED = "#0072B2", "#D55E00"
GREY = "#4D4D4D"
EDGES = np.linspace(0, 1, 21)
WINDOW = 20  # steps that the line through the drift averages


def write_plot(report: LedgerReport, title: str, path: Path) -> None:
    """Draw the figure into a file whose ending says the format (png, pdf, svg).

    Raises:
        RunError: the file cannot be written.
    """
    figure = draw(report, title)
    try:
        figure.savefig(path, dpi=160)
    except (ValueError, OSError) as error:
        raise RunError(f"cannot write the plot to {path}", str(error), "name a .png, .pdf or .svg file") from None


def draw(report: LedgerReport, title: str) -> "Figure":
    """The figure, with four panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.2), layout="constrained")
    (believed, lengths), (seen, drift) = figure.subplots(2, 2)
    _believed(believed, report)
    _lengths(figure, lengths, report)
    _seen(seen, report)
    _drift(drift, report)
    for panel in (believed, lengths, seen, drift):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.xaxis.label.set_fontsize(8.5)
        panel.yaxis.label.set_fontsize(8.5)
    plain = printable(title, 60).replace("$", r"\$")  # or matplotlib would start a formula
    figure.suptitle(
        f"What {plain} knows of its prompts after step {report.step}",
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
    )
    return figure


def _title(panel: "Axes", text: str) -> None:
    panel.set_title(text, fontsize=10, loc="left")


def _empty(panel: "Axes", text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", color=GREY, fontsize=9, style="italic")
    panel.set(xticks=[], yticks=[])


def _believed(panel: "Axes", report: LedgerReport) -> None:
    """Prompts by believed success, and where the prior would have them."""
    a, b = report.prior
    tried = len(report.means_T)
    panel.hist(report.means_T, EDGES.tolist(), color=BLUE, alpha=0.75, label=f"{tried:,} tried prompts")
    panel.stairs(tried * np.diff(beta.cdf(EDGES, a, b)), EDGES, color=GREY, linewidth=1.4, label="as many by the prior")
    panel.set(xlim=(0, 1), xlabel="believed success", ylabel="prompts")
    _title(panel, "Believed success")
    if tried:
        panel.legend(fontsize=8, frameon=False)
    else:
        _empty(panel, "no prompt tried yet")


def _lengths(figure: "Figure", panel: "Axes", report: LedgerReport) -> None:
    """Density: a point for each of a million prompts would be a blot."""
    from matplotlib.colors import LogNorm

    panel.set(xlim=(0, 1), xlabel="believed success", ylabel="mean completion tokens")
    _title(panel, "Length of answers")
    if not report.means_T.size:
        _empty(panel, "no prompt tried yet")
        return
    top = max(float(report.lengths_T.max()), 1.0)
    counts, across, up = np.histogram2d(report.means_T, report.lengths_T, (EDGES, 20), ((0, 1), (0, 1.05 * top)))
    shown = np.ma.masked_less(counts.T, 1)
    mesh = panel.pcolormesh(across, up, shown, cmap="Blues", norm=LogNorm(0.3, max(counts.max(), 2)), rasterized=True)
    bar = figure.colorbar(mesh, ax=panel, pad=0.02, format="%d")
    bar.ax.set_ylim(1, max(counts.max(), 2))
    bar.set_label("prompts", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _seen(panel: "Axes", report: LedgerReport) -> None:
    history = report.history
    panel.set(ylim=(0, 1.02), xlabel="step", ylabel="share of prompts")
    _title(panel, "Tried so far")
    if not history.recorded:
        _empty(panel, "not in metrics.jsonl")
        return
    panel.plot(history.steps, history.seen, color=BLUE, linewidth=1.8)
    panel.grid(axis="y", color="#EEEEEE", zorder=0)


def _drift(panel: "Axes", report: LedgerReport) -> None:
    """Above 0: prompts go better than was believed of them."""
    history = report.history
    panel.set(xlabel="step", ylabel="success less belief")
    _title(panel, "Drift")
    known = [(step, drift) for step, drift in zip(history.steps, history.drift, strict=True) if not np.isnan(drift)]
    if not known:
        _empty(panel, "no prompt was tried twice" if history.recorded else "not in metrics.jsonl")
        return
    steps, drifts = np.array(known).T
    panel.axhline(0, color="#808080", linewidth=1.2, zorder=1)
    panel.plot(steps, drifts, "o", ms=2.5, color=RED, alpha=0.35, mew=0, label="a batch")
    window = min(WINDOW, len(drifts))
    means = np.convolve(drifts, np.ones(window) / window, "valid")
    panel.plot(steps[window - 1 :], means, color=RED, linewidth=1.8, label=f"mean of the last {window}")
    panel.legend(fontsize=8, frameon=False)
