"""The benchmark's pictures."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from analysis import FIXED, REWARDS, SCORES

# Okabe-Ito: told apart by colour-blind readers too.
COLOURS = {"correct": "#0072B2", "format": "#009E73", "concise": "#D55E00"}
FACTOR, GREY = "#CC79A7", "#888888"
LEVEL = 0.05
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def learning(curves: dict[str, list[dict[str, np.ndarray]]], file: Path, columns: int = 5) -> None:
    """Scores and weights over steps: two panels per arm, mean over seeds with the range of all seeds.

    Args:
        curves: arm -> what `analysis.curves` returns, for each seed.
    """
    rows = math.ceil(len(curves) / columns)
    figure, grid = plt.subplots(
        2 * rows,
        columns,
        figsize=(3 * columns, 3.9 * rows),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=[2, 1] * rows,
        layout="constrained",
    )
    for axis in grid.flat:
        axis.set_axis_off()
    fixed = np.mean([one["scores"] for one in curves[FIXED]], axis=0)
    for place, (name, seeds) in enumerate(curves.items()):
        row, column = 2 * (place // columns), place % columns
        top, bottom = grid[row, column], grid[row + 1, column]
        _scores_panel(top, seeds, fixed if name != FIXED else None)
        top.set_title(name, fontsize=11)
        _weights_panel(bottom, seeds)
        if column == 0:
            top.set_ylabel("training score")
            bottom.set_ylabel("weight")
        if place + columns >= len(curves):
            bottom.set_xlabel("optimizer step")
            bottom.tick_params(labelbottom=True)
    lines = [plt.Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    lines.append(plt.Line2D([], [], color=GREY, ls=":", label="the same under fixed"))
    lines.append(plt.Line2D([], [], color=FACTOR, label="factor on the learning rate, halved"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _band(axis: Any, step: np.ndarray, values_ST: np.ndarray, colour: str) -> None:
    axis.fill_between(step, values_ST.min(axis=0), values_ST.max(axis=0), color=colour, alpha=0.18, lw=0)
    axis.plot(step, values_ST.mean(axis=0), color=colour)


def _scores_panel(axis: Any, seeds: list[dict[str, np.ndarray]], fixed_TK: np.ndarray | None) -> None:
    axis.set_axis_on()
    step = seeds[0]["step"]
    for k, name in enumerate(REWARDS):
        if fixed_TK is not None:
            axis.plot(step, fixed_TK[:, k], color=GREY, ls=":", lw=1.2)
        _band(axis, step, np.array([one["scores"][:, k] for one in seeds]), COLOURS[name])
    axis.set_ylim(0, 1.02)


def _weights_panel(axis: Any, seeds: list[dict[str, np.ndarray]]) -> None:
    axis.set_axis_on()
    step = seeds[0]["step"]
    for k, name in enumerate(REWARDS):
        _band(axis, step, np.array([one["weights"][:, k] for one in seeds]), COLOURS[name])
    if all("factor" in one for one in seeds):
        _band(axis, step, np.array([one["factor"] for one in seeds]) / 2, FACTOR)
    axis.set_ylim(0, 1.02)


def differences(found: dict[str, Any], file: Path) -> None:
    """Paired differences of the final held-out scores: mean, 95 % interval and every seed."""
    pairs = {**found["differences"], **found.get("control", {})}
    figure, axes = plt.subplots(
        1, len(SCORES), figsize=(13, 0.8 + 0.42 * len(pairs)), sharey=True, layout="constrained", squeeze=False
    )
    for axis, score in zip(axes[0], SCORES, strict=True):
        axis.axvline(0, color=GREY, lw=0.8)
        for place, scores in enumerate(pairs.values()):
            test = scores[score]
            seeds = list(test["by_seed"].values())
            axis.plot(seeds, [place] * len(seeds), "|", color=GREY, ms=9)
            sure = not math.isnan(_value(test["p_holm"])) and test["p_holm"] < LEVEL
            colour = COLOURS.get(score, "black")
            axis.plot([_value(test["low"]), _value(test["high"])], [place] * 2, color=colour, lw=2)
            axis.plot(test["mean"], place, "o", color=colour, mfc=colour if sure else "white", ms=7)
        axis.set_title(score)
        axis.set_yticks(range(len(pairs)), [pair.replace(" - ", " − ") for pair in pairs])
        axis.margins(x=0.08)
    axes[0, 0].invert_yaxis()
    figure.supxlabel(
        "difference of final held-out scores, with 95 % interval; bars: seeds; filled: Holm's p < 0.05", fontsize=10
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _value(number: float | None) -> float:
    return math.nan if number is None else number


def pareto(found: dict[str, Any], file: Path) -> None:
    """Correctness against conciseness, final held-out scores: every seed small, the mean of an arm large."""
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    colours = plt.get_cmap("tab10").colors
    for place, (name, arm) in enumerate(found["arms"].items()):
        runs, colour = found["runs"][name].values(), colours[place % len(colours)]
        axis.plot(
            [run["correct"] for run in runs], [run["concise"] for run in runs], "o", color=colour, ms=4, alpha=0.45
        )
        centre = arm["correct"]["mean"], arm["concise"]["mean"]
        axis.plot(*centre, "D", color=colour, ms=9, mec="black", mew=0.6, label=name)
        if name == FIXED:
            axis.axvline(centre[0], color=GREY, lw=0.8, ls=":")
            axis.axhline(centre[1], color=GREY, lw=0.8, ls=":")
    axis.set(xlabel="correct, held out", ylabel="concise, held out")
    axis.set_title("Final scores: up and right of the dotted lines beats fixed in both", fontsize=11)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=130)
    plt.close(figure)
