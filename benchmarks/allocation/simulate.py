"""What each allocation is worth when the true success probabilities are known: design table, by simulation.

64 prompts with p ~ Beta(1/2, 1/2), a mean of 8 rollouts, 2 at least and 128 at most; what is known of them are the
outcomes of one uniform epoch, or of that and of one that was allocated by the posterior.
"""

import numpy as np
from paper import knapsack_value

from rlbal.prompts.allocation import mean_counts, posterior_counts
from rlbal.prompts.ledger import PromptLedger

PROMPTS, ROLLOUTS, LOW, HIGH = 64, 8, 2, 128
TOTAL = PROMPTS * ROLLOUTS
RUNS = 2000
ARMS = ("uniform", "plug-in mean", "posterior, 1 epoch", "posterior, 2 epochs", "fitted prior, 1 epoch", "oracle")


def one_run(seed: int) -> dict[str, tuple[float, float]]:
    """Effective-gradient ratio (expected share of rollouts in groups that vary) and true value of each arm."""
    rng = np.random.default_rng([0, seed])
    bounds = TOTAL, LOW, HIGH, rng
    p_P = rng.beta(0.5, 0.5, PROMPTS)
    won_P = rng.binomial(ROLLOUTS, p_P)
    ledger = PromptLedger(PROMPTS, forgetting=0)
    outcomes_PG = np.arange(ROLLOUTS) < won_P[:, None]
    rows_N = np.repeat(np.arange(PROMPTS), ROLLOUTS)
    ledger.observe(rows_N, outcomes_PG.reshape(-1).astype(float), np.ones(TOTAL), step=0)

    one_epoch_P = posterior_counts("knapsack", 0.5 + won_P, 0.5 + ROLLOUTS - won_P, *bounds)
    won_again_P = rng.binomial(one_epoch_P, p_P)
    failed_P = ROLLOUTS - won_P + one_epoch_P - won_again_P
    counts = (
        np.full(PROMPTS, ROLLOUTS),
        mean_counts("knapsack", won_P / ROLLOUTS, *bounds),
        one_epoch_P,
        posterior_counts("knapsack", 0.5 + won_P + won_again_P, 0.5 + failed_P, *bounds),
        posterior_counts("knapsack", *ledger.belief(range(PROMPTS), step=0), *bounds),
        mean_counts("knapsack", p_P, *bounds),
    )
    return {arm: measure(counts_P, p_P) for arm, counts_P in zip(ARMS, counts, strict=True)}


def measure(counts_P: np.ndarray, p_P: np.ndarray) -> tuple[float, float]:
    varies_P = 1 - p_P**counts_P - (1 - p_P) ** counts_P
    return float((counts_P * varies_P).sum() / counts_P.sum()), float(knapsack_value(counts_P, p_P).sum())


def mean_and_interval(values: np.ndarray) -> list[float]:
    """Mean over runs and its 95 % interval (normal)."""
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean()), float(values.mean() - half), float(values.mean() + half)]


def simulate() -> dict[str, dict[str, list[float]]]:
    """Both measures of each arm, and the value's paired difference to uniform."""
    runs = [one_run(seed) for seed in range(RUNS)]
    values = {arm: np.array([run[arm] for run in runs]) for arm in ARMS}
    return {
        arm: {
            "ratio": mean_and_interval(of[:, 0]),
            "value": mean_and_interval(of[:, 1]),
            "value_less_uniform": mean_and_interval(of[:, 1] - values["uniform"][:, 1]),
        }
        for arm, of in values.items()
    }
