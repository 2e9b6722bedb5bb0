"""Tables and the picture of this benchmark's result.json."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKER = "<!-- tables: written by run.py -->\n"
# Okabe-Ito: told apart by colour-blind readers too.
COLOURS = {"knapsack": "#0072B2", "variance": "#D55E00", "nonzero": "#009E73"}
DASHES = {"posterior": "-", "mean": "--"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Time by number of prompts; and the two measures of the simulation, which disagree."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    growth = result["growth"]
    at = [int(prompts) for prompts in growth]
    for name in next(iter(growth.values())):
        belief, value = name.split()
        seconds = [of[name]["core"][0] for of in growth.values()]
        left.plot(
            at, seconds, DASHES[belief], color=COLOURS[value], marker="o", markersize=3.5, label=f"{value}, {belief}"
        )
    left.plot(
        at, [growth["8192"]["posterior knapsack"]["core"][0] * prompts / 8192 for prompts in at], ":", color="grey"
    )
    left.plot(8192, 0.05, "v", color="black", label="goal: 50 ms at 8,192")
    paper = result["paper"]["paper"]["core"][0]
    left.plot(1024, paper, "s", color="black", label="the paper's DP, 1,024 prompts")
    left.set(
        xscale="log", yscale="log", xlabel="prompts (8 rollouts each on average)", ylabel="seconds on a core (median)"
    )
    left.set_title("Allocating", fontsize=10)
    left.legend(fontsize=7.5, frameon=False, handlelength=3)

    ledger = result["ledger"]
    sizes = [int(key.split()[0]) for key in ledger if key.endswith(" 1")]
    for rows, colour in ((1, "#0072B2"), (8, "#D55E00")):
        for what, dash in (("update", "-"), ("belief", "--")):
            cells = [ledger[f"{size} {rows}"][what] for size in sizes]
            if what == "belief" and rows == 8:
                continue
            label = f"update, {8192 * rows:,} rows" if what == "update" else "reading 8,192 beliefs"
            middle.plot(
                sizes, [1e3 * of["core"][0] for of in cells], dash, color=colour, marker="o", markersize=4, label=label
            )
    middle.axhline(5, color="black", linestyle=":", linewidth=1, label="goal: 5 ms")
    middle.set(xscale="log", ylim=(0, None), xlabel="prompts in the ledger", ylabel="ms on a core (median)")
    middle.set_title("Ledger, batches of 8,192 prompts", fontsize=10)
    middle.legend(fontsize=7.5, frameon=False)

    for arm, of in result["simulation"].items():
        x, y = of["ratio"], of["value"]
        right.errorbar(
            x[0], y[0], [[y[0] - y[1]], [y[2] - y[0]]], [[x[0] - x[1]], [x[2] - x[0]]], marker="o", color="#0072B2"
        )
        below = arm.startswith("fitted")  # two arms nearly coincide
        right.annotate(arm, (x[0], y[0]), xytext=(5, -12 if below else 4), textcoords="offset points", fontsize=8)
    right.axhline(result["simulation"]["uniform"]["value"][0], color="black", linestyle=":", linewidth=1)
    right.set(xlabel="effective-gradient ratio", ylabel="true value Σ V(n, p)", xlim=(0.57, 0.9))
    right.set_title("What allocation is worth (64 prompts, mean 8)", fontsize=10)
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _interval(value: list[float], digits: int) -> str:
    middle, low, high = value
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _ms(times: list[float]) -> str:
    """Median, and least to most, in milliseconds."""
    middle, least, most = (f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}" for seconds in times)
    return f"{middle} ({least} to {most})"


def _both(times: dict[str, list[float]]) -> tuple[str, str]:
    return _ms(times["core"]), _ms(times["clock"])


def _simulation(result: dict[str, Any]) -> str:
    rows = [
        [arm, _interval(of["ratio"], 3), _interval(of["value"], 3), _interval(of["value_less_uniform"], 3)]
        for arm, of in result["simulation"].items()
    ]
    return _table(["", "effective-gradient ratio", "true value Σ V(n, p)", "less uniform's, paired"], rows)


def _growth(result: dict[str, Any]) -> str:
    growth = result["growth"]
    rows = [[name, *(_ms(of[name]["core"]) for of in growth.values())] for name in next(iter(growth.values()))]
    return _table(["ms on a core", *(f"{int(prompts):,} prompts" for prompts in growth)], rows)


def _paper(result: dict[str, Any]) -> str:
    paper = result["paper"]
    rows = [
        ["the paper's dynamic program", *_both(paper["paper"]), ""],
        ["`belief: mean`", *_both(paper["mean"]), _interval(paper["times_faster_mean"], 0)],
        ["`belief: posterior`", *_both(paper["posterior"]), _interval(paper["times_faster_posterior"], 0)],
    ]
    return _table(["", "ms on a core", "ms by the clock", "times faster (on a core)"], rows)


def _ledger(result: dict[str, Any]) -> str:
    rows = []
    for key, of in result["ledger"].items():
        prompts, rows_each = key.split()
        if rows_each != "bytes":
            size = result["ledger"][f"{prompts} bytes"] / 1e6
            cells = [_ms(of[what][clock]) for what in ("update", "belief") for clock in ("core", "clock")]
            rows.append([f"{int(prompts):,}", f"{8192 * int(rows_each):,}", *cells, f"{size:.1f}"])
    head = [
        "prompts",
        "rows in the batch",
        "update: ms on a core",
        "by the clock",
        "belief: ms on a core",
        "by the clock",
        "MB in a checkpoint",
    ]
    return _table(head, rows)


def write_tables(result: dict[str, Any], path: Path) -> None:
    """Replace what follows the marker in the README."""
    same = result["paper"]["largest_relative_difference_in_value"]
    parts = [
        f"### Worth\n\nMeans over {result['settings']['runs']} simulated pools, 95 % intervals.\n\n"
        + _simulation(result),
        "### Time of an allocation\n\nMedian (least to most) over rounds.\n\n" + _growth(result),
        "### Against the paper's dynamic program\n\n1,024 prompts, 8,192 rollouts, 2 to 128 each, in turn; median "
        "(least to most), and for the ratio median over rounds with its 95 % bootstrap interval. The values of both "
        f"solutions differ by {same:.1g} of themselves at most.\n\n" + _paper(result),
        "### Ledger\n\nBatches of 8,192 prompts; median (least to most).\n\n" + _ledger(result),
    ]
    text = path.read_text(encoding="utf-8").split(MARKER)[0]
    path.write_text(text + MARKER + "\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
