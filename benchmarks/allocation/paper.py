"""The dynamic program by which Knapsack RL (arXiv 2509.25849) finds the counts, in NumPy."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def knapsack_value(n: npt.NDArray[np.int64] | int, p: Floats) -> Floats:
    """(1 - p^n - (1-p)^n) p (1-p)^2, for shapes that broadcast."""
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def paper_counts(p_P: Floats, total: int, low: int, high: int) -> npt.NDArray[np.int64]:
    """The counts with the largest total value: (P,), low to high each, summing to `total`.

    Every prompt gets `low`; W rollouts are left to divide, 0 to G - 1 = high - low for each prompt. best_W[w] is the
    value of the prompts so far with w of them.
    """
    left, options = total - low * len(p_P), high - low + 1
    value_PG = knapsack_value(np.arange(low, high + 1), p_P[:, None])
    chosen_PW = np.empty((len(p_P), left + 1), dtype=np.int16)
    best_W = np.full(left + 1, -np.inf)
    best_W[0] = 0.0
    for prompt, value_G in enumerate(value_PG):
        padded = np.concatenate([np.full(options - 1, -np.inf), best_W])
        # Row w holds best_W[w - G + 1 .. w], so that its last column is the choice of no more rollouts.
        candidates_WG = np.lib.stride_tricks.sliding_window_view(padded, options) + value_G[::-1]
        last_W = candidates_WG.argmax(axis=1)
        best_W = candidates_WG[np.arange(left + 1), last_W]
        chosen_PW[prompt] = options - 1 - last_W
    counts_P = np.empty(len(p_P), dtype=np.int64)
    for prompt in reversed(range(len(p_P))):
        counts_P[prompt] = low + chosen_PW[prompt, left]
        left -= int(chosen_PW[prompt, left])
    return counts_P
