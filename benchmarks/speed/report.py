"""Tables and the picture of a result."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table

LABELS = {"trl": "TRL", "rlbal": "rlbal", "trl_continuous": "TRL, continuous batching"}
PARTS = {"generation": "generation", "reward": "rewards", "training": "training", "step": "whole step"}
# Okabe-Ito: told apart by colour-blind readers too.
COLOURS = {"generation": "#0072B2", "reward": "#E69F00", "training": "#009E73", "step": "#000000"}


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def notes(found: dict[str, Any]) -> str:
    """What does not fit into a row per part."""
    limit, step = found["limit"], found["seconds"]
    lines = [
        f"{found['mean_tokens']:.0f} tokens per rollout, longest {found['longest_tokens']}; "
        f"{found['share_of_rollouts_with_advantage']:.0%} of rollouts have an advantage",
        "generated tokens per second of the whole step: "
        + ", ".join(f"{LABELS[arm]} {rate:,.0f}" for arm, rate in found["tokens_per_second"].items()),
        f"{limit['flops'] / 1e9:,.3g} GFLOP needed: {seconds(limit['seconds_at_large_matmul'])} at the rate of large "
        f"matrix products ({limit['large_matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s), "
        f"{seconds(limit['seconds_at_model_matmul'])} at that of the model's "
        f"({limit['model_matmul_flops_per_second'] / 1e9:,.0f})",
        "times the limit (large matrix products): "
        + ", ".join(f"{LABELS[arm]} {step[arm]['step'] / limit['seconds_at_large_matmul']:.1f}" for arm in step),
    ]
    if "peak_bytes" in found:
        held = ", ".join(f"{LABELS[arm]} {size / 2**20:,.0f} MiB" for arm, size in found["peak_bytes"].items())
        lines += [
            f"peak memory of a step: {held}; rlbal/TRL {found['memory_ratio']:.2f}",
            f"maximum gradient difference: {found['gradient_difference']:.1e} of the largest gradient",
        ]
    return "\n".join(lines)


def show(result: dict[str, Any]) -> None:
    """Print a table per workload and one per direction of growth."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for name, found in result["workloads"].items():
        others = list(found["times_faster_than"])
        table = Table(title=name, caption=notes(found), caption_justify="left", title_justify="left", min_width=100)
        for heading in ("", *(LABELS[arm] for arm in found["seconds"])):
            table.add_column(heading, justify="right" if heading else "left")
        for arm in others:
            table.add_column(f"times faster than {LABELS[arm]}", justify="right")
        for part, label in PARTS.items():
            times = (seconds(found["seconds"][arm][part]) for arm in found["seconds"])
            table.add_row(label, *times, *(ratio(found["times_faster_than"][arm][part]) for arm in others))
        console.print(table, "")
    for group, grown in result["growth"].items():
        table = Table(title=f"growing {group}", title_justify="left", min_width=100)
        for heading in (group, "parameters", "TRL step", "rlbal step", "generation", "training", "whole step"):
            table.add_column(heading, justify="right")
        for value, found in grown.items():
            faster, step = found["times_faster_than"]["trl"], found["seconds"]
            table.add_row(
                value,
                f"{found['parameters'] / 1e6:,.2f} M",
                *(seconds(step[arm]["step"]) for arm in ("trl", "rlbal")),
                *(f"{faster[part]['median']:.2f}" for part in ("generation", "training")),
                ratio(faster["step"]),
            )
        console.print(table, "")


def bars(axes: Axes, name: str, found: dict[str, Any]) -> None:
    """Stacked seconds of each trainer's step."""
    for place, (arm, step) in enumerate(found["seconds"].items()):
        bottom = 0.0
        for part in ("generation", "reward", "training"):
            axes.bar(place, step[part], 0.62, bottom=bottom, color=COLOURS[part])
            bottom += step[part]
        faster = found["times_faster_than"].get("trl", {}).get("step") if arm == "rlbal" else None
        if faster:
            axes.annotate(f"{faster['median']:.1f}×", (place, bottom), (0, 4), "data", "offset points", ha="center")
    axes.set_title(name.replace("_", " "))
    axes.set_xticks(
        range(len(found["seconds"])),
        [LABELS[arm].replace(", continuous ", ",\ncontinuous\n") for arm in found["seconds"]],
    )
    axes.margins(x=0.15, y=0.14)


def lines(axes: Axes, group: str, grown: dict[str, Any]) -> None:
    """How many times faster each part is, over the value that grows."""
    places = range(len(grown))
    for part in ("generation", "training", "step"):
        faster = [found["times_faster_than"]["trl"][part] for found in grown.values()]
        medians = [value["median"] for value in faster]
        spread = [
            [value["median"] - value["low"] for value in faster],
            [value["high"] - value["median"] for value in faster],
        ]
        axes.errorbar(places, medians, spread, color=COLOURS[part], marker="o", markersize=4, capsize=2)
    axes.axhline(1, color="#999999", linewidth=0.8, zorder=0)
    axes.set_title(f"growing {group}")
    axes.set_xticks(places, list(grown))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)


def plot(result: dict[str, Any], file: Path) -> None:
    """Seconds of a step per workload above, growth below."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    upper, lower = result["workloads"], result["growth"]
    columns = max(len(upper), len(lower), 1)
    figure, grid = plt.subplots(2, columns, figsize=(3.1 * columns, 7), constrained_layout=True, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, found) in zip(grid[0], upper.items(), strict=False):
        axes.set_axis_on()
        bars(axes, name, found)
    for axes, (group, grown) in zip(grid[1], lower.items(), strict=False):
        axes.set_axis_on()
        lines(axes, group, grown)
    grid[0][0].set_ylabel("seconds per step")
    grid[1][0].set_ylabel("times faster than TRL")
    handles = [Patch(color=COLOURS[part], label=PARTS[part]) for part in PARTS]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=len(handles))
    figure.savefig(file, dpi=130)
    plt.close(figure)
