"""Tables and the picture of this benchmark's result.json."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKER = "<!-- tables: written by run.py -->\n"
LABELS = {
    "variance": "variance\n(paper's measure)",
    "log_odds": "variance / signal²\n(log_odds)",
    "correlation": "variance / signal²\n(correlation)",
}
SIGNAL_TICKS = [0.8, 0.9, 1, 1.1, 1.2, 1.3]
TICKS = {"variance": [0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5], "log_odds": SIGNAL_TICKS, "correlation": SIGNAL_TICKS}
# Okabe-Ito: told apart by colour-blind readers too. Arm -> colour, marker, arm of the exact results.
LINES = {
    "GRPO": ("#E69F00", "s", "GRPO"),
    "moments": ("#0072B2", "o", "BNPO"),
    "beta_binomial": ("#D55E00", "^", "BNPO"),
}


def plot(result: dict[str, Any], path: Path) -> None:
    """One column per population, one row per measure: relative to REINFORCE, by rollouts per prompt."""
    sampled = result["sampled"]
    populations = list(next(iter(sampled.values()))["diagnostics"]["moments"])
    figure, axes = plt.subplots(
        len(LABELS), len(populations), figsize=(15, 7.2), sharex=True, sharey="row", layout="constrained"
    )
    for row, (measure, label) in zip(axes, LABELS.items(), strict=True):
        for axis, name in zip(row, populations, strict=True):
            _panel(axis, result, name, measure)
        row[0].set_ylabel(label)
    for axis, name in zip(axes[0], populations, strict=True):
        axis.set_title(name if name != "drift" else "Beta(½, 3) to Beta(3, ½)", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel("rollouts per prompt (∞: p known exactly)", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, result: dict[str, Any], name: str, measure: str) -> None:
    sampled = result["sampled"]
    at = range(len(sampled))
    axis.axhline(1, color="black", linewidth=1, label="REINFORCE (= 1)")
    for arm, (colour, marker, exact_arm) in LINES.items():
        values = [of["to_reinforce"][arm][name][measure] for of in sampled.values()]
        middle = [value for value, _, _ in values]
        errors = [[m - low for m, low, _ in values], [high - m for m, _, high in values]]
        axis.errorbar(at, middle, errors, color=colour, marker=marker, markersize=4.5, linewidth=1.3, label=arm)
        if name in result["exact"]:
            exact = result["exact"][name][exact_arm][measure]
            axis.plot([at[-1], len(sampled)], [middle[-1], exact], color=colour, linestyle=":", linewidth=1)
            axis.plot(len(sampled), exact, color=colour, marker=marker, markersize=4.5, markerfacecolor="white")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(matplotlib.ticker.FixedLocator(TICKS[measure]))
    axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_xticks([*at, len(sampled)], [*sampled, "∞"])
    axis.grid(axis="y", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _cell(value: list[float]) -> str:
    """Estimate and interval; bold where the interval lies below 1."""
    middle, low, high = value
    text = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    return f"**{text}**" if high < 1 else text


def _exact_table(result: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{of[arm][measure]:.2f}" for measure in LABELS for arm in ("GRPO", "BNPO"))]
        for name, of in result["exact"].items()
    ]
    head = [f"{measure}: {arm}" for measure in LABELS for arm in ("GRPO", "BNPO")]
    return _table(["prompts", *head], rows)


def _arm_table(result: dict[str, Any], measure: str) -> str:
    sampled = result["sampled"]
    arms = [arm for arm in next(iter(sampled.values()))["to_reinforce"] if arm != "REINFORCE"]
    rows = [[arm, *(_cell(of["to_reinforce"][arm]["mean"][measure]) for of in sampled.values())] for arm in arms]
    return _table([measure, *(f"{n} rollouts" for n in sampled)], rows)


def _estimator_table(result: dict[str, Any], measure: str) -> str:
    sampled = result["sampled"]
    names = next(iter(sampled.values()))["beta_binomial_to_moments"]
    rows = [
        [name, *(_cell(of["beta_binomial_to_moments"][name][measure]) for of in sampled.values())] for name in names
    ]
    return _table([measure, *(f"{n} rollouts" for n in sampled)], rows)


def _diagnostics_table(result: dict[str, Any]) -> str:
    arms = ("moments, no cap", "moments", "beta_binomial, smoothing 0", "beta_binomial")
    rows = []
    for n, of in result["sampled"].items():
        for arm in arms:
            by_name = of["diagnostics"][arm]
            steady = {name: values for name, values in by_name.items() if name in result["exact"]}
            v = [values["v"] for values in steady.values()]
            rows.append(
                [
                    n,
                    arm,
                    f"{min(v):.2f} to {max(v):.2f}",
                    f"{max(values['no_prior'] for values in steady.values()):.1%}",
                    f"{max(values['capped'] for values in by_name.values()):.3%}",
                    f"{max(values['largest'] for values in by_name.values()):.1f}",
                ]
            )
    head = ["rollouts", "arm", "mean v over the true one", "batches without a prior", "rows capped", "largest \\|A\\|"]
    return _table(head, rows)


def write_tables(result: dict[str, Any], path: Path) -> None:
    """Replace what follows the marker in the README."""
    settings = result["settings"]
    parts = [
        "### Exact p, relative to REINFORCE\n\n" + _exact_table(result),
        "### Sampled p, relative to REINFORCE\n\nGeometric mean over the six populations that stay as they are; "
        f"{settings['runs']} runs of {settings['batches_measured']} batches of {settings['prompts']} prompts each. In "
        "brackets 95 % bootstrap intervals over runs; bold where they lie below 1.\n\n"
        + "\n\n".join(_arm_table(result, measure) for measure in LABELS),
        "### Sampled p, `beta_binomial` relative to `moments`\n\nBoth with the recipe's defaults; `mean` as above; "
        "bold where the interval lies below 1, in favour of `beta_binomial`.\n\n"
        + "\n\n".join(_estimator_table(result, measure) for measure in LABELS),
        "### Estimates, cap and fallback\n\nRanges or worst cases over populations.\n\n" + _diagnostics_table(result),
    ]
    text = path.read_text(encoding="utf-8").split(MARKER)[0]
    path.write_text(text + MARKER + "\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
