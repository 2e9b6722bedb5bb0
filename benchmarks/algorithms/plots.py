"""The picture: how the algorithms learn, where they end, and how well PPO's critic follows."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Okabe-Ito: told apart by colour-blind readers too.
COLOURS = {"grpo": "#0072B2", "rloo": "#E69F00", "reinforce": "#009E73", "ppo": "#D55E00"}
NAMES = {"grpo": "GRPO", "rloo": "RLOO", "reinforce": "REINFORCE", "ppo": "PPO"}
GREY = "#767676"
WINDOW = 10  # steps


def smooth(curve: list[float]) -> np.ndarray:
    """Running mean over the last steps, fewer at the beginning."""
    sums = np.cumsum(np.insert(np.array(curve, dtype=float), 0, 0.0))
    ends = np.arange(1, len(curve) + 1)
    starts = np.maximum(0, ends - WINDOW)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(found: dict[str, Any], curves: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Draw it.

    Args:
        found: result.json.
        curves: arm -> figure -> the training curve of each seed.
        path: of the file.
    """
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12, 3.8), constrained_layout=True, width_ratios=(1.35, 1, 1)
    )
    _learning(left, curves)
    _ends(middle, found)
    _critic(right, curves)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _learning(axes: Any, curves: dict[str, dict[str, list[list[float]]]]) -> None:
    for arm, figures in curves.items():
        lines = np.array([smooth(curve) for curve in figures["correct"]])
        steps = np.arange(1, lines.shape[1] + 1)
        axes.fill_between(steps, lines.min(axis=0), lines.max(axis=0), color=COLOURS[arm], alpha=0.12, linewidth=0)
        axes.plot(steps, lines.mean(axis=0), color=COLOURS[arm], linewidth=2, label=NAMES[arm])
    axes.set(title="Correct while training", xlabel="optimizer step", ylim=(0, 0.9))
    axes.legend(frameon=False, loc="upper left", ncols=2, title="mean and range of seeds", title_fontsize=9)


def _ends(axes: Any, found: dict[str, Any]) -> None:
    axes.axhline(found["before"]["pass@1"], color=GREY, linestyle="--", linewidth=1.2)
    axes.text(-0.45, found["before"]["pass@1"] - 0.02, "before RL", color=GREY, fontsize=9, va="top")
    lines = zip(*(arm["pass@1"]["values"].values() for arm in found["arms"].values()), strict=True)
    for line in lines:
        axes.plot(range(len(line)), line, color="#CCCCCC", linewidth=1, zorder=1)
    for place, (arm, values) in enumerate(found["arms"].items()):
        scores = list(values["pass@1"]["values"].values())
        axes.scatter([place] * len(scores), scores, s=22, color=COLOURS[arm], alpha=0.55, linewidths=0, zorder=2)
        axes.plot([place - 0.22, place + 0.22], [np.mean(scores)] * 2, color=COLOURS[arm], linewidth=3, zorder=3)
    axes.set(title="Correct on held-out problems", ylim=(0, 0.9), xlim=(-0.5, len(found["arms"]) - 0.5))
    axes.set_xticks(range(len(found["arms"])), [NAMES[arm] for arm in found["arms"]], fontsize=9.5)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("dots: seeds, joined; bars: means", fontsize=9)


def _critic(axes: Any, curves: dict[str, dict[str, list[list[float]]]]) -> None:
    for curve in curves["ppo"]["explained"]:
        axes.plot(range(1, len(curve) + 1), smooth(curve), color=COLOURS["ppo"], linewidth=1, alpha=0.5)
    mean = np.mean([smooth(curve) for curve in curves["ppo"]["explained"]], axis=0)
    axes.plot(range(1, len(mean) + 1), mean, color=COLOURS["ppo"], linewidth=2.4)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set(title="PPO's critic: explained variance", xlabel="optimizer step")
