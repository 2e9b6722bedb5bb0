"""How many rollouts each prompt of a generation batch gets.

Every rollout goes where it is worth most (Knapsack RL, arXiv 2509.25849). With p the success probability of a prompt,
the gain of rollout n + 1 on top of n >= 1 is one of

    knapsack   p^(n+1) (1-p)^3 + p^2 (1-p)^(n+2)     the paper's value (1 - p^n - (1-p)^n) p (1-p)^2
    variance   p (1-p) (1/n - 1/(n+1))               variance of the batch's gradient (Neyman allocation)
    nonzero    p^n (1-p) + (1-p)^n p                 chance that the rollouts of the prompt differ at all

All of them fall with n, so that taking the largest gains, however they are spread over prompts, is exactly optimal, and
no dynamic program is needed. Instead of p there is

    posterior  a belief Beta(a, b): the gain is its expectation, E[p^i (1-p)^j] = B(a+i, b+j) / B(a, b).
    mean       the paper's: the success rate of the last visit stands for p. Prompts at 0 or 1 have no gain and get
               `low`; what nobody has a use for goes to prompts at 0. A prompt without a rate gets what uniform
               allocation would give it, so that the first epoch is uniform.

Each gain is a sum of at most two terms, and each term times (x + n) / (y + n) is the term at n + 1 (times p or 1-p for
`mean`). These products of ratios are positive and at most 1: they neither cancel nor overflow for any a, b and n, as
differences of log-gamma functions would, and they cannot rise through rounding.

Without a signal (equal beliefs) the counts differ by one at most, by lot.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from rlbal.errors import RecipeError

Value = Literal["knapsack", "variance", "nonzero"]
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def uniform_counts(num_prompts: int, rollouts: int) -> Counts:
    """The same number of rollouts for every prompt: (P,) summing to `rollouts`.

    Raises:
        ValueError: `rollouts` does not divide by `num_prompts`.
    """
    if rollouts % num_prompts:
        raise ValueError(f"{rollouts} rollouts do not divide over {num_prompts} prompts")
    return np.full(num_prompts, rollouts // num_prompts, dtype=np.int64)


def posterior_counts(
    value: Value, a_P: Floats, b_P: Floats, total: int, low: int, high: int, rng: np.random.Generator
) -> Counts:
    """The counts with the largest expected value under a Beta belief per prompt.

    Args:
        value: what a rollout is worth.
        a_P, b_P: the beliefs Beta(a, b), above 0, shape (P,).
        total: rollouts to give, over all prompts.
        low, high: least and most rollouts of a prompt.
        rng: decides between equal gains; in the same state on every process.

    Returns:
        counts (P,) within the bounds, summing to `total`.

    Raises:
        RecipeError: the bounds do not allow the total.
        ValueError: a belief that is no Beta distribution.
    """
    check_bounds(len(a_P), total, low, high)
    a_P, b_P = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if not (np.isfinite(a_P) & np.isfinite(b_P) & (a_P > 0) & (b_P > 0)).all():
        raise ValueError("a belief needs finite a and b above 0")
    everyone_P = np.ones(len(a_P), dtype=bool)
    return _largest_gains(posterior_gains(value, a_P, b_P), total, low, high, everyone_P, rng)


def mean_counts(value: Value, rate_P: Floats, total: int, low: int, high: int, rng: np.random.Generator) -> Counts:
    """The paper's counts: the largest value if every prompt's success rate were its probability.

    Args:
        rate_P: success rate at the prompt's last visit, NaN without one, shape (P,).
        value, total, low, high, rng: as for `posterior_counts`.

    Returns:
        counts (P,) within the bounds, summing to `total`.

    Raises:
        RecipeError: the bounds do not allow the total.
        ValueError: a rate outside [0, 1].
    """
    check_bounds(len(rate_P), total, low, high)
    rate_P = np.asarray(rate_P, dtype=np.float64)
    seen_P = ~np.isnan(rate_P)
    if not ((rate_P[seen_P] >= 0) & (rate_P[seen_P] <= 1)).all():
        raise ValueError("a success rate lies in [0, 1]")
    counts_P = np.zeros(len(rate_P), dtype=np.int64)
    _spread(counts_P, total, high, np.ones(len(rate_P), dtype=bool), rng)
    if seen_P.any():
        rate_S, total_S = rate_P[seen_P], int(counts_P[seen_P].sum())
        counts_P[seen_P] = _largest_gains(mean_gains(value, rate_S), total_S, low, high, rate_S == 0, rng)
    return counts_P


def check_bounds(num_prompts: int, total: int, low: int, high: int) -> None:
    """See whether P prompts can share the total with low to high rollouts each.

    Raises:
        RecipeError: they cannot.
    """
    if low < 1:
        raise RecipeError(
            f"`allocation.low` is {low}", "the gain of a rollout is known from the second on", "make it 1 at least"
        )
    if low > high:
        raise RecipeError(f"`allocation.low` ({low}) is above `allocation.high` ({high})", fix="swap them")
    if low * num_prompts > total:
        raise RecipeError(
            f"{num_prompts} prompts with at least {low} rollouts each (`allocation.low`) are more than the {total} "
            "rollouts of a generation batch",
            fix=f"lower `allocation.low`, best below {total // num_prompts}"
            if total >= 2 * num_prompts
            else "raise `algorithm.rollouts_per_prompt`, so that there is something to share out",
        )
    if high * num_prompts < total:
        raise RecipeError(
            f"{num_prompts} prompts with at most {high} rollouts each (`allocation.high`) are fewer than the {total} "
            "rollouts of a generation batch",
            fix=f"raise `allocation.high`, best above {-(-total // num_prompts)}",
        )


@dataclass
class Gains:
    """The gain of one more rollout for each of P prompts, at a number n of rollouts that only goes up.

    terms_JP holds the J terms of the gain at n. The term at n + 1 is (x + s n) / (y + s n) times the term at n.
    """

    terms_JP: Floats
    x_JP: Floats
    y_JP: Floats
    s: int
    n: int = 1

    def now(self) -> Floats:
        """The gains at n: (P,)."""
        return self.terms_JP.sum(axis=0)

    def advance(self) -> None:
        """Go on to n + 1."""
        shift = self.s * self.n
        self.terms_JP = self.terms_JP * ((self.x_JP + shift) / (self.y_JP + shift))
        self.n += 1

    def keep(self, kept_P: npt.NDArray[np.bool_]) -> None:
        """Go on with some of the prompts."""
        self.terms_JP, self.x_JP, self.y_JP = self.terms_JP[:, kept_P], self.x_JP[:, kept_P], self.y_JP[:, kept_P]


def posterior_gains(value: Value, a_P: Floats, b_P: Floats) -> Gains:
    """Expected gains under Beta(a, b), beginning at n = 1: (P,), (P,)."""
    t_P = a_P + b_P
    if value == "knapsack":
        first_P = beta_moment(a_P, b_P, 2, 3)
        return Gains(np.stack([first_P] * 2), np.stack([a_P + 1, b_P + 2]), np.stack([t_P + 4] * 2), s=1)
    first_P = beta_moment(a_P, b_P, 1, 1)
    if value == "nonzero":
        return Gains(np.stack([first_P] * 2), np.stack([a_P, b_P]), np.stack([t_P + 1] * 2), s=1)
    return _variance_gains(first_P)


def mean_gains(value: Value, p_P: Floats) -> Gains:
    """Gains at known p, beginning at n = 1: (P,)."""
    q_P = 1.0 - p_P
    if value == "variance":
        return _variance_gains(p_P * q_P)
    first_P = p_P**2 * q_P**3 if value == "knapsack" else p_P * q_P
    return Gains(np.stack([first_P] * 2), np.stack([p_P, q_P]), np.ones((2, len(p_P))), s=0)


def beta_moment(a_P: Floats, b_P: Floats, i: int, j: int) -> Floats:
    """E[p^i (1-p)^j] under Beta(a, b): (P,), (P,) -> (P,)."""
    moment_P = np.ones_like(a_P)
    for k in range(i):
        moment_P *= (a_P + k) / (a_P + b_P + k)
    for k in range(j):
        moment_P *= (b_P + k) / (a_P + b_P + i + k)
    return moment_P


def _variance_gains(spread_P: Floats) -> Gains:
    """spread (1/n - 1/(n+1)) = spread / (n (n+1)): half of it at n = 1, and then by n / (n+2)."""
    return Gains(spread_P[None] / 2, np.zeros((1, len(spread_P))), np.full((1, len(spread_P)), 2.0), s=1)


def _largest_gains(
    gains: Gains, total: int, low: int, high: int, leftover_P: npt.NDArray[np.bool_], rng: np.random.Generator
) -> Counts:
    """Give `low` to everyone and the rest to the largest gains; what nobody gains from goes to `leftover_P` first.

    All prompts take one rollout more at a time, as long as their gain is among the largest so far. As gains fall, a
    prompt that drops out need not be looked at again: work and memory grow with the rollouts given, not with `high`.
    """
    num_prompts, wanted = gains.terms_JP.shape[1], total - low * len(leftover_P)
    while gains.n < low:
        gains.advance()
    active, bound = np.arange(num_prompts), 0.0
    gain_C, prompt_C = np.empty(0), np.empty(0, dtype=np.int64)  # the candidates
    waiting: list[tuple[Floats, npt.NDArray[np.int64]]] = []
    num_waiting = 0
    while wanted and len(active) and gains.n < high:
        gain_A = gains.now()
        kept_A = (gain_A >= bound) & (gain_A > 0.0)
        if not kept_A.all():
            gains.keep(kept_A)
            active, gain_A = active[kept_A], gain_A[kept_A]
        waiting.append((gain_A, active))
        num_waiting += len(active)
        gains.advance()
        if len(gain_C) + num_waiting >= wanted and num_waiting > len(gain_C) // 4:
            gain_C, prompt_C, bound = _prune(gain_C, prompt_C, waiting, wanted)
            waiting, num_waiting = [], 0
    gain_C, prompt_C, bound = _prune(gain_C, prompt_C, waiting, wanted)

    ties = np.flatnonzero(gain_C == bound)
    above_C = gain_C > bound
    chosen = rng.permutation(ties)[: wanted - int(above_C.sum())]
    given_C = np.concatenate([prompt_C[above_C], prompt_C[chosen]])
    counts_P = low + np.bincount(given_C, minlength=num_prompts)
    left = _spread(counts_P, total - int(counts_P.sum()), high, leftover_P, rng)
    _spread(counts_P, left, high, np.ones(num_prompts, dtype=bool), rng)
    return counts_P


def _prune(
    gain_C: Floats,
    prompt_C: npt.NDArray[np.int64],
    waiting: list[tuple[Floats, npt.NDArray[np.int64]]],
    wanted: int,
) -> tuple[Floats, npt.NDArray[np.int64], float]:
    """Join the candidates and keep the largest `wanted` gains, all of the ties with the smallest of them, and it."""
    gain_C = np.concatenate([gain_C, *(gain for gain, _ in waiting)])
    prompt_C = np.concatenate([prompt_C, *(prompt for _, prompt in waiting)])
    if len(gain_C) <= wanted or wanted == 0:
        return gain_C, prompt_C, 0.0
    bound = float(np.partition(gain_C, len(gain_C) - wanted)[len(gain_C) - wanted])
    kept_C = gain_C >= bound
    return gain_C[kept_C], prompt_C[kept_C], bound


def _spread(
    counts_P: Counts, rollouts: int, high: int, among_P: npt.NDArray[np.bool_], rng: np.random.Generator
) -> int:
    """Add rollouts in equal shares, as far as `high` allows, the remainder by lot; return how many are left."""
    while rollouts and len(open_O := np.flatnonzero(among_P & (counts_P < high))):
        if rollouts < len(open_O):
            open_O = rng.permutation(open_O)[:rollouts]
        given_O = np.minimum(high - counts_P[open_O], rollouts // len(open_O))
        counts_P[open_O] += given_O
        rollouts -= int(given_O.sum())
    return rollouts
