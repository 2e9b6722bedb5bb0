"""The measures with sampled success probabilities: what a trainer gets.

Every batch has 32 prompts, each with its own p and the same number of rollouts; the normaliser sees their rewards only.
One column of a batch is one independent training run, so that hundreds of runs go through one `BetaNormalizer`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from measures import divisor_integral

from rlbal.balance.normalization import BetaNormalizer

PROMPTS, BATCHES, WARM_UP = 32, 40, 20
MEASURED = BATCHES - WARM_UP
RUNS = 60  # of each population
CAP = 10.0
# Beta(a, b) of the prompts at the first batch and at the last.
POPULATIONS = {
    "Beta(½, ½)": ((0.5, 0.5), (0.5, 0.5)),
    "Beta(1, 1)": ((1, 1), (1, 1)),
    "Beta(2, 5)": ((2, 5), (2, 5)),
    "Beta(5, 2)": ((5, 2), (5, 2)),
    "Beta(8, 8)": ((8, 8), (8, 8)),
    "Beta(½, 3)": ((0.5, 3), (0.5, 3)),
    "drift": ((0.5, 3), (3, 0.5)),
}
# Estimator, smoothing, cap. The paper has no cap; the others are as the recipe has them, or one step away.
LEARNED = {
    "moments, no cap": ("moments", 0.0, float("inf")),
    "moments": ("moments", 0.0, CAP),
    "moments, smoothing 0.9": ("moments", 0.9, CAP),
    "beta_binomial, smoothing 0": ("beta_binomial", 0.0, CAP),
    "beta_binomial": ("beta_binomial", 0.9, CAP),
}
KNOWN = "true a and b"
ARMS = ("REINFORCE", "GRPO", *LEARNED, KNOWN)
# Means over a run's batches: A^2 (raw, and with the divisor made a density), A times the score's part along u for both
# lambdas, the shares of capped rows and of batches without a usable prior, the estimated v over the true one; and the
# largest |A|.
RECORDS = ("square", "density_square", "log_odds", "correlation", "capped", "no_prior", "v", "largest")


def population(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """a and b of every column at this batch."""
    share = batch / (BATCHES - 1)
    ends = np.array(list(POPULATIONS.values()), dtype=float)  # (populations, first or last, a or b)
    a, b = ((1 - share) * ends[:, 0] + share * ends[:, 1]).T
    return np.repeat(a, RUNS), np.repeat(b, RUNS)


def true_variance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Variance of Beta(a, b)."""
    return a * b / (a + b) ** 2 / (a + b + 1)


def known_prior(names: list[str], a: np.ndarray, b: np.ndarray) -> BetaNormalizer:
    """The paper's normaliser, told the moments of Beta(a, b) instead of estimating them."""
    normalizer, ones = BetaNormalizer(names, "moments", 0.0, CAP), [1.0] * len(a)
    averages = {"mean": a / (a + b), "variance": true_variance(a, b)}
    normalizer.load_state_dict(
        {"rewards": names, "capped": [0.0] * len(names)}
        | {name: {"total": value.tolist(), "weight": ones} for name, value in averages.items()}
    )
    return normalizer


def advantages(normalizers: dict[str, BetaNormalizer], reward: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The advantages (prompts, rollouts, columns) of every arm for rewards of that shape."""
    prompts, rollouts, columns = reward.shape
    mean = reward.mean(axis=1, keepdims=True)
    centred = reward - mean
    yield "REINFORCE", centred
    with np.errstate(invalid="ignore"):
        yield "GRPO", np.pi / 8 * np.nan_to_num(centred / np.sqrt(mean * (1 - mean)))
    group_N = torch.arange(prompts).repeat_interleave(rollouts)
    reward_NK, centred_NK = (torch.from_numpy(values.reshape(-1, columns)) for values in (reward, centred))
    for arm, normalizer in normalizers.items():
        if arm != KNOWN:
            normalizer.observe(reward_NK, group_N)
        yield arm, normalizer.normalize(centred_NK, reward_NK, group_N).numpy().reshape(reward.shape)


def simulate(rollouts: int, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Every record of every arm at this number of rollouts: (populations, runs)."""
    dice = np.random.default_rng([seed, rollouts])
    columns = len(POPULATIONS) * RUNS
    names = [str(column) for column in range(columns)]
    normalizers = {arm: BetaNormalizer(names, *settings) for arm, settings in LEARNED.items()}
    totals = {arm: {record: np.zeros(columns) for record in RECORDS} for arm in ARMS}
    for batch in range(BATCHES):
        a, b = population(batch)
        p = dice.beta(a, b, size=(PROMPTS, columns)).clip(1e-12, 1 - 1e-12)[:, np.newaxis]
        reward = (dice.random((PROMPTS, rollouts, columns)) < p).astype(float)
        normalizers[KNOWN] = known_prior(names, a, b)
        for arm, A in advantages(normalizers, reward):
            if batch >= WARM_UP:
                _record(totals[arm], A, reward - p, p, normalizers.get(arm), rollouts)
                if arm in LEARNED:
                    totals[arm]["v"] += normalizers[arm].variance.value().numpy() / true_variance(a, b) / MEASURED
    shape = (len(POPULATIONS), RUNS)
    return {
        arm: {record: values.reshape(shape) for record, values in records.items()} for arm, records in totals.items()
    }


def _record(
    total: dict[str, np.ndarray],
    A: np.ndarray,
    surprise: np.ndarray,
    p: np.ndarray,
    normalizer: BetaNormalizer | None,
    rollouts: int,
) -> None:
    """Add one batch to an arm's records."""
    square = (A**2).mean(axis=(0, 1))
    integral: np.ndarray | float = 1.0
    if normalizer is not None:
        a, b = (values_K.numpy() for values_K in normalizer.prior())
        if normalizer.estimator == "beta_binomial":
            integral = divisor_integral(a, b, rollouts)
        total["capped"] += normalizer.capped_K.numpy() / MEASURED
        total["no_prior"] += (a + b == 0) / MEASURED
    total["square"] += square / MEASURED
    total["density_square"] += square * integral**2 / MEASURED
    total["log_odds"] += (A * surprise).mean(axis=(0, 1)) / MEASURED
    total["correlation"] += (A * surprise / np.sqrt(p * (1 - p))).mean(axis=(0, 1)) / MEASURED
    np.maximum(total["largest"], np.abs(A).max(axis=(0, 1)), out=total["largest"])
