"""The benchmark's pictures."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Okabe-Ito: told apart by colour-blind readers too.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#888888",
)
STYLES = {
    "uniform": (BLACK, "-"),
    "uniform_prompt": (BLACK, "--"),
    "mean": (ORANGE, "-"),
    "knapsack": (BLUE, "-"),
    "variance": (RED, "-"),
    "nonzero": (GREEN, "-"),
    "constant": (BLACK, "-"),
    "exponential": (BLUE, "-"),
    "linear": (GREEN, "-"),
    "adaptive": (RED, "-"),
}
STRATA, LARGE, UNCAPPED, TRIANGULAR, LOSS = "_strata", "large_", "_uncapped", "_triangular", "_loss"
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def style(arm: str) -> tuple[str, str]:
    """Colour and dashes of an arm: of its schedule or value, dashed for the variant, dotted for a variant of it."""
    plain = arm.removeprefix(LARGE).removesuffix(LOSS).removesuffix(STRATA).removesuffix(TRIANGULAR)
    colour, dash = STYLES[plain.removesuffix(UNCAPPED)]
    if arm.endswith((UNCAPPED, STRATA + LOSS)):
        return colour, ":"
    return colour, "--" if arm.endswith((STRATA, TRIANGULAR, LOSS)) else dash


def learning(found: dict[str, Any], curves: dict[str, dict[str, list[dict[str, Any]]]], file: Path) -> None:
    """Held-out correctness and effective-gradient ratio over rollouts, mean over seeds, small and large pool.

    Args:
        found: the first part of result.json.
        curves: pool -> arm -> what `analysis.training_curve` returns, for each seed.
    """
    figure, grid = plt.subplots(
        2, len(curves), figsize=(6 * len(curves), 7), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for column, (pool, arms) in enumerate(curves.items()):
        top, bottom = grid[:, column]
        for arm, seeds in arms.items():
            colour, dash = style(arm)
            held_out = [run["curve"] for run in found[pool]["runs"][arm].values()]
            at, values_SE = held_out[0]["rollouts"], np.array([curve["correct"] for curve in held_out])
            top.plot(at, values_SE.mean(axis=0), dash, color=colour, label=arm)
            effective_ST = np.array([seed["effective"] for seed in seeds])
            bottom.plot(seeds[0]["rollouts"], effective_ST.mean(axis=0), dash, color=colour)
            if arm.endswith("uniform"):
                top.fill_between(at, values_SE.min(axis=0), values_SE.max(axis=0), color=GREY, alpha=0.2, lw=0)
                top.axhline(values_SE[:, -1].mean(), color=GREY, lw=0.8, ls=":")
        top.set_title(f"{pool} pool", fontsize=11)
        top.legend(frameon=False, loc="lower right")
        bottom.set(xlabel="training rollouts", ylim=(0, 1))
    grid[0, 0].set_ylabel("correct, held out (mean of 3 evaluations)")
    grid[1, 0].set_ylabel("effective-gradient ratio (mean of 10 steps)")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def allocation(found: dict[str, Any], file: Path) -> None:
    """Mean rollouts of a prompt by what was believed of it, and by how it did in the batch itself."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True, layout="constrained")
    at = np.linspace(0, 1, 11)
    for axis, table, label in (
        (axes[0], "by_rate", "success believed before the batch"),
        (axes[1], "by_success", "success in the batch"),
    ):
        for arm, cells in found[table].items():
            if arm == "uniform_prompt":  # where `uniform` is
                continue
            prompts, rollouts = np.array(cells, dtype=float).T
            share = np.divide(rollouts, prompts, out=np.full(len(prompts), np.nan), where=prompts > 0)
            colour, dash = style(arm)
            axis.plot(at, share, dash, color=colour, label=arm, marker="o", ms=3.5)
        axis.set(xlabel=label, xlim=(-0.03, 1.03), ylim=(0, None))
    axes[0].set_ylabel("rollouts of a prompt, mean")
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def budgets(found: dict[str, Any], curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Correctness against tokens at the last budget, seeds small and their mean large; and how training got there."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.6), width_ratios=[1.25, 1, 1], layout="constrained"
    )
    shown = [arm for arm in found["runs"] if not arm.endswith(UNCAPPED)]
    for arm in shown:
        colour, dash = style(arm)
        marker, inside = ("^", "white") if arm.endswith(TRIANGULAR) else ("D", colour)
        runs = list(found["runs"][arm].values())
        tokens, correct = [run["tokens"] for run in runs], [run["correct"] for run in runs]
        left.plot(tokens, correct, marker, color=colour, mfc=inside, ms=4, alpha=0.5, ls="none")
        left.plot(
            np.mean(tokens), np.mean(correct), marker, color=colour, mfc=inside, ms=11, mew=1.6, ls="none", label=arm
        )
        step = curves[arm][0]["step"]
        for axis, name in ((middle, "correct"), (right, "tokens")):
            axis.plot(step, np.mean([seed[name] for seed in curves[arm]], axis=0), dash, color=colour)
        if not arm.endswith(TRIANGULAR):
            budget = np.mean([seed["budget"] for seed in curves[arm]], axis=0)
            right.plot(step, budget, color=colour, lw=0.8, alpha=0.6, drawstyle="steps-mid")
    left.set(xlabel="tokens, held out", ylabel="correct, held out", title="At the last budget: up and left is better")
    figure.legend(loc="outside lower center", ncols=len(shown), frameon=False, markerscale=0.8)
    middle.set(xlabel="optimizer step", title="Correct in training, at the budget of the step")
    right.set(xlabel="optimizer step", title="Tokens in training; thin: the budget", ylim=(0, None))
    figure.savefig(file, dpi=130)
    plt.close(figure)
