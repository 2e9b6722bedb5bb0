"""Which normaliser of advantages has the least variance: with exact and with sampled success probabilities.

    python benchmarks/beta_normalization/run.py             # under two minutes on one core
    python benchmarks/beta_normalization/run.py --plot-only # tables and picture from result.json

Writes result.json and variance.png beside this file, and the tables into the README there. `measures` says what is
compared and why, `simulate` how.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import measures
import numpy as np
import report
import simulate
import torch

FOLDER = Path(__file__).parent
SEED = 0
ROLLOUTS = (4, 8, 16, 64)
RESAMPLES = 1000


def exact() -> dict[str, dict[str, dict[str, float]]]:
    """Every measure of every normaliser as a density, for populations that stay as they are: relative to REINFORCE."""
    results = {}
    for name, (first, last) in simulate.POPULATIONS.items():
        if first != last:
            continue
        a, b = first
        densities = {"REINFORCE": (1, 1), "GRPO": (1.5, 1.5), "BNPO": (1 + a / 3, 1 + b / 3)}
        values = {arm: measures.exact(a, b, alpha, beta) for arm, (alpha, beta) in densities.items()}
        results[name] = {
            arm: {measure: value[measure] / values["REINFORCE"][measure] for measure in measures.MEASURES}
            for arm, value in values.items()
        }
    return results


def resampled(records: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The measures of one arm, from all runs and from each bootstrap sample of them: (populations, 1 + resamples)."""
    runs = records["square"].shape[1]
    choice = np.random.default_rng(SEED).integers(runs, size=(RESAMPLES, runs))  # the same for all arms: paired
    choice = np.vstack([np.arange(runs), choice])
    mean = {name: values[:, choice].mean(axis=2) for name, values in records.items()}
    return {
        "variance": mean["density_square"],
        "log_odds": mean["square"] / mean["log_odds"] ** 2,
        "correlation": mean["square"] / mean["correlation"] ** 2,
    }


def interval(samples: np.ndarray) -> list[float]:
    """The estimate, which comes first, and its 95 % bootstrap interval."""
    return [float(samples[0]), *np.percentile(samples[1:], [2.5, 97.5]).tolist()]


def sampled(rollouts: int) -> dict[str, Any]:
    """All arms at this number of rollouts: measures relative to REINFORCE and to `moments`, and diagnostics."""
    records = simulate.simulate(rollouts, SEED)
    values = {arm: resampled(of_arm) for arm, of_arm in records.items()}
    names = list(simulate.POPULATIONS)
    steady = [row for row, (first, last) in enumerate(simulate.POPULATIONS.values()) if first == last]

    def relative(arm: str, to: str) -> dict[str, dict[str, list[float]]]:
        result: dict[str, dict[str, list[float]]] = {name: {} for name in [*names, "mean"]}
        for measure in measures.MEASURES:
            ratio = values[arm][measure] / values[to][measure]
            for row, name in enumerate(names):
                result[name][measure] = interval(ratio[row])
            result["mean"][measure] = interval(np.exp(np.log(ratio[steady]).mean(axis=0)))
        return result

    def diagnostics(arm: str) -> dict[str, dict[str, float]]:
        return {
            name: {
                "largest": float(records[arm]["largest"][row].max()),
                **{what: float(records[arm][what][row].mean()) for what in ("capped", "no_prior", "v")},
            }
            for row, name in enumerate(names)
        }

    return {
        "to_reinforce": {arm: relative(arm, "REINFORCE") for arm in records},
        "beta_binomial_to_moments": relative("beta_binomial", "moments"),
        "diagnostics": {arm: diagnostics(arm) for arm in records},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot-only", action="store_true", help="tables and picture from result.json")
    path = FOLDER / "result.json"
    if not parser.parse_args().plot_only:
        torch.set_num_threads(1)
        started = time.monotonic()
        settings = {
            "seed": SEED,
            "prompts": simulate.PROMPTS,
            "batches_measured": simulate.MEASURED,
            "batches_before": simulate.WARM_UP,
            "runs": simulate.RUNS,
            "resamples": RESAMPLES,
            "arms": {
                arm: dict(zip(("estimator", "smoothing", "cap"), map(str, of), strict=True))
                for arm, of in simulate.LEARNED.items()
            },
        }
        result = {"settings": settings, "exact": exact(), "sampled": {str(n): sampled(n) for n in ROLLOUTS}}
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{time.monotonic() - started:.0f} s")
    result = json.loads(path.read_text(encoding="utf-8"))
    report.plot(result, FOLDER / "variance.png")
    report.write_tables(result, FOLDER / "README.md")


if __name__ == "__main__":
    main()
