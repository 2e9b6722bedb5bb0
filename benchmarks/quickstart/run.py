"""The quickstart over seeds: before and after RL on held-out problems, with the README's picture.

    python benchmarks/quickstart/run.py             # about ten minutes on 2 cores
    python benchmarks/quickstart/run.py --plot-only # from the runs that are there

Runs sweep.yaml: recipes/quickstart.yaml with seeds 0, 1, 2, one after another; a finished run is kept. Writes
result.json, learning.png beside this file.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from rlbal.experiments.sweep import read_sweep
from rlbal.run import RunDirectory, read_jsonl

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SWEEP = read_sweep(FOLDER / "sweep.yaml")
SEEDS = SWEEP.seeds
METRICS = {
    "correct, sampled": "pass@1",
    "correct, greedy": "greedy/pass@1",
    "format, sampled": "reward/format",
    "tokens, sampled": "length/mean",
}
# Okabe-Ito: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def collect(seed: int) -> dict[str, Any]:
    """First and last evaluation and the training curve of one seed."""
    run = RunDirectory(ROOT / SWEEP.output_dir / "quickstart" / f"seed-{seed}")
    first, *_, last = read_jsonl(run.evaluations_path)
    curve = list(read_jsonl(run.metrics_path))
    return {
        "before": {label: first["metrics"][name] for label, name in METRICS.items()},
        "after": {label: last["metrics"][name] for label, name in METRICS.items()},
        "by_difficulty": {
            when: {value: group["metrics"]["pass@1"] for value, group in line["by_difficulty"].items()}
            for when, line in (("before", first), ("after", last))
        },
        "prompts": last["prompts"],
        "curve": {
            key: [record[key] for record in curve]
            for key in ("step", "reward/correct/mean", "reward/format/mean", "length/mean")
        },
    }


def smooth(values: list[float], window: int = 10) -> np.ndarray:
    """Running mean, shorter at the beginning."""
    sums = np.cumsum(np.insert(np.array(values, dtype=float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot(results: dict[int, dict[str, Any]]) -> None:
    """Learning curves of all seeds, and correctness by number of terms before and after."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for seed, result in results.items():
        curve, label = result["curve"], seed == SEEDS[0]
        left.plot(curve["step"], smooth(curve["reward/correct/mean"]), color=BLUE, label="correct" if label else None)
        left.plot(curve["step"], smooth(curve["reward/format/mean"]), color=GREEN, label="format" if label else None)
        middle.plot(curve["step"], smooth(curve["length/mean"]), color=ORANGE)
    left.set(title="Rewards while training", xlabel="optimizer step", ylim=(0, 1.02))
    left.legend(frameon=False, loc="lower right")
    middle.set(title="Tokens per completion", xlabel="optimizer step")
    middle.set_ylim(bottom=0)
    values = sorted(next(iter(results.values()))["by_difficulty"]["before"], key=float)
    places = np.arange(len(values))
    for offset, (when, colour) in enumerate((("before", "#999999"), ("after", BLUE))):
        means = [np.mean([result["by_difficulty"][when][value] for result in results.values()]) for value in values]
        right.bar(places + 0.4 * offset - 0.2, means, 0.38, color=colour, label=f"{when} RL")
    right.set(title="Held-out problems solved", xlabel="terms in the sum", ylim=(0, 1.2))
    right.set_xticks(places, values)
    right.set_yticks(np.arange(0, 1.01, 0.2))
    right.legend(frameon=False, loc="upper center", ncols=2)
    figure.savefig(FOLDER / "learning.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot-only", action="store_true")
    options = parser.parse_args()
    if not options.plot_only:
        command = [sys.executable, "-m", "rlbal.cli", "sweep", str(FOLDER / "sweep.yaml")]
        subprocess.run(command, cwd=ROOT, check=True)
    results = {seed: collect(seed) for seed in SEEDS}
    table = Table("", *(f"seed {seed}" for seed in SEEDS), "mean before", "mean after", "change", title="Quickstart")
    summary = {}
    for label in METRICS:
        before = float(np.mean([result["before"][label] for result in results.values()]))
        after = float(np.mean([result["after"][label] for result in results.values()]))
        summary[label] = {"before": before, "after": after}
        pairs = [f"{result['before'][label]:.3g} → {result['after'][label]:.3g}" for result in results.values()]
        change = f"{after / before - 1:+.0%}" if "tokens" in label else f"{100 * (after - before):+.1f} points"
        table.add_row(label, *pairs, f"{before:.3g}", f"{after:.3g}", change)
    seeds = {seed: {"before": result["before"], "after": result["after"]} for seed, result in results.items()}
    prompts = results[SEEDS[0]]["prompts"]
    found = {"prompts": prompts, "mean": summary, "seeds": seeds}
    (FOLDER / "result.json").write_text(json.dumps(found, indent=2) + "\n")
    plot(results)
    Console().print(table)


if __name__ == "__main__":
    main()
