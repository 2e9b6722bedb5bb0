"""How long it takes to decide how many rollouts each prompt gets, and what the decision is worth.

    python benchmarks/allocation/run.py             # under two minutes on one core
    python benchmarks/allocation/run.py --plot-only # tables and picture from result.json

Writes result.json and allocation.png beside this file, and the tables into the README there. Beliefs are those after
8 rollouts of prompts with p ~ Beta(1/2, 1/2); every round draws new ones, and those who are compared take turns.
Everything runs in one thread. Its time on a core is what is compared; by the clock it also waits for other processes.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report
import simulate
from paper import knapsack_value, paper_counts

from rlbal.prompts.allocation import Value, mean_counts, posterior_counts
from rlbal.prompts.ledger import PromptLedger

FOLDER = Path(__file__).parent
SEEN, MEAN, LOW, HIGH = 8, 8, 2, 128
VALUES: tuple[Value, ...] = ("knapsack", "variance", "nonzero")
GROWTH = {1024: 15, 8192: 15, 65_536: 5, 262_144: 3, 1_000_000: 2}  # prompts: rounds
PAPER_PROMPTS, PAPER_ROUNDS = 1024, 5
LEDGER_PROMPTS, LEDGER_BATCH, LEDGER_ROUNDS = (10_000, 100_000, 1_000_000), 8192, 60


def timed(function: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds by the clock and of this thread on a core, and the result."""
    clock, core = time.perf_counter(), time.thread_time()
    result = function()
    return {"clock": time.perf_counter() - clock, "core": time.thread_time() - core}, result


def summary(times: list[dict[str, float]]) -> dict[str, list[float]]:
    """Median, least and most of each clock."""
    return {of: [float(f([one[of] for one in times])) for f in (np.median, np.min, np.max)] for of in times[0]}


def ratio(slow: list[dict[str, float]], fast: list[dict[str, float]]) -> list[float]:
    """Median over the rounds of slow over fast on a core, and its 95 % bootstrap interval."""
    ratios = np.array([s["core"] / f["core"] for s, f in zip(slow, fast, strict=True)])
    draws = np.median(np.random.default_rng(0).choice(ratios, (5000, len(ratios))), axis=1)
    return [float(np.median(ratios)), *np.percentile(draws, [2.5, 97.5]).tolist()]


def successes(prompts: int, rng: np.random.Generator) -> np.ndarray:
    return rng.binomial(SEEN, rng.beta(0.5, 0.5, prompts))


def growth() -> dict[str, Any]:
    """Seconds of an allocation by number of prompts, for every value and belief."""
    rng, results = np.random.default_rng(1), {}
    for prompts, rounds in GROWTH.items():
        times: dict[str, list[dict[str, float]]] = {f"{belief} {value}": [] for belief in BELIEFS for value in VALUES}
        for _ in range(rounds):
            won_P = successes(prompts, rng)
            for name, of in times.items():
                belief, value = name.split()
                took, counts_P = timed(lambda b=belief, v=value, w=won_P: BELIEFS[b](v, w, rng))
                assert counts_P.sum() == MEAN * prompts and counts_P.min() >= LOW and counts_P.max() <= HIGH
                of.append(took)
        results[str(prompts)] = {name: summary(of) for name, of in times.items()}
    return results


BELIEFS: dict[str, Callable[..., np.ndarray]] = {
    "posterior": lambda value, won_P, rng: posterior_counts(
        value, 0.5 + won_P, 0.5 + SEEN - won_P, MEAN * len(won_P), LOW, HIGH, rng
    ),
    "mean": lambda value, won_P, rng: mean_counts(value, won_P / SEEN, MEAN * len(won_P), LOW, HIGH, rng),
}


def against_the_paper() -> dict[str, Any]:
    """The paper's dynamic program and ours on the same rates, in turn."""
    rng = np.random.default_rng(2)
    paper, ours, posterior, difference = [], [], [], []
    for _ in range(PAPER_ROUNDS):
        won_P = successes(PAPER_PROMPTS, rng)
        rate_P, total = won_P / SEEN, MEAN * PAPER_PROMPTS
        took, counts_P = timed(lambda r=rate_P, t=total: paper_counts(r, t, LOW, HIGH))
        paper.append(took)
        took, our_counts_P = timed(lambda w=won_P: BELIEFS["mean"]("knapsack", w, rng))
        ours.append(took)
        posterior.append(timed(lambda w=won_P: BELIEFS["posterior"]("knapsack", w, rng))[0])
        assert counts_P.sum() == total
        values = [knapsack_value(counts, rate_P).sum() for counts in (counts_P, our_counts_P)]
        difference.append(abs(values[0] - values[1]) / values[0])
    return {
        "paper": summary(paper),
        "mean": summary(ours),
        "posterior": summary(posterior),
        "times_faster_mean": ratio(paper, ours),
        "times_faster_posterior": ratio(paper, posterior),
        "largest_relative_difference_in_value": float(max(difference)),
    }


def ledger() -> dict[str, Any]:
    """Seconds of an update and of reading beliefs, of batches of 8,192 prompts drawn from M."""
    results = {}
    for prompts in LEDGER_PROMPTS:
        rng, book = np.random.default_rng(3), PromptLedger(prompts, 0.01, np.arange(prompts) % 20)
        everyone_M = np.arange(prompts)
        book.observe(everyone_M, np.ones(prompts), np.ones(prompts), 0)  # so that no page of memory is new
        step = 0
        for rows in (1, MEAN):
            updates, reads = [], []
            for _ in range(LEDGER_ROUNDS):
                step += 1
                chosen_P = rng.permutation(prompts)[:LEDGER_BATCH]
                indices_N = rng.permutation(np.repeat(chosen_P, rows))
                won_N, length_N = rng.integers(0, 2, len(indices_N)).astype(float), rng.integers(1, 900, len(indices_N))
                reads.append(timed(lambda c=chosen_P, s=step: book.belief(c, s))[0])  # noqa: B023
                updates.append(timed(lambda i=indices_N, w=won_N, t=length_N, s=step: book.observe(i, w, t, s))[0])  # noqa: B023
            results[f"{prompts} {rows}"] = {"update": summary(updates), "belief": summary(reads)}
        results[f"{prompts} bytes"] = sum(values.nbytes for values in book.state_dict().values())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot-only", action="store_true", help="tables and picture from result.json")
    path = FOLDER / "result.json"
    if not parser.parse_args().plot_only:
        started = time.monotonic()
        settings = {"seen": SEEN, "mean": MEAN, "low": LOW, "high": HIGH, "runs": simulate.RUNS}
        result = {
            "settings": settings,
            "simulation": simulate.simulate(),
            "growth": growth(),
            "paper": against_the_paper(),
            "ledger": ledger(),
        }
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{time.monotonic() - started:.0f} s")
    result = json.loads(path.read_text(encoding="utf-8"))
    report.plot(result, FOLDER / "allocation.png")
    report.write_tables(result, FOLDER / "README.md")


if __name__ == "__main__":
    main()
