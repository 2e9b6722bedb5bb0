"""What is believed of a prompt that was never seen: a Beta prior fitted to the prompts that were.

With p_g the mean success of the n_g rollouts of prompt g, and s_g^2 their unbiased variance,

    m = mean(p_g)        v = Var(p_g) - mean(s_g^2 / n_g)        Beta(m c, (1 - m) c) with c = m (1 - m) / v - 1

as `estimator: beta_binomial` of `rlbal.balance.normalization` has it: Var is unbiased, and a prompt with one rollout
counts in m but not in v. All prompts of the last batches take part, a batch's weight falling by `MEMORY` with every
batch after it: what the policy could do long ago says little.

Rules where the moments do not decide:
    too few      until `ENOUGH` prompts with two rollouts (by weight: the squared sum of weights over the sum of their
                 squares) the prior is Beta(1/2, 1/2).
    no spread    v at or below 0, or very small: c is `MOST`, so that own rollouts can still outweigh the prior.
    all or none  v so large that no Beta has it: c is `LEAST`.
    m at an end  closer to 0 or 1 than half a prompt of those seen: that far from it.
    strata       m and v of a stratum count by the number of its prompts, and those of all prompts as if they were
                 `BORROWED` more. A stratum with fewer than two prompts to compare has the prior of all.
"""

import numpy as np
import numpy.typing as npt

from rlbal.balance.beta_moments import NO_VARIANCE, beta_concentration

Floats = npt.NDArray[np.float64]

MEMORY = 0.9
ENOUGH = 32
BORROWED = 16
LEAST, MOST = 0.5, 100.0

# Columns of the sums: all prompts with a score; those with two scores at least.
WEIGHT, RATE, WEIGHT_2, WEIGHT_2_SQUARED, RATE_2, RATE_2_SQUARED, NOISE_2 = range(7)


class PromptPrior:
    """A Beta prior for each of H strata, from sums that `observe` moves once per batch.

    Args:
        num_strata: H, 1 for prompts that are all alike.
    """

    def __init__(self, num_strata: int) -> None:
        self.sums_HS = np.zeros((num_strata, 7))

    def observe(self, stratum_P: npt.NDArray[np.integer], count_P: Floats, rate_P: Floats, variance_P: Floats) -> None:
        """Take in one batch.

        Args:
            stratum_P: stratum of each prompt, 0..H-1.
            count_P: its scored rollouts, 1 at least.
            rate_P: their mean.
            variance_P: their unbiased variance; ignored for a single one.
        """
        one_P, two_P = np.ones_like(rate_P), (count_P > 1).astype(np.float64)
        noise_P = two_P * variance_P / count_P
        new_SP = [one_P, rate_P, two_P, two_P, two_P * rate_P, two_P * rate_P**2, noise_P]
        self.sums_HS *= MEMORY
        self.sums_HS[:, WEIGHT_2_SQUARED] *= MEMORY
        for column, new_P in enumerate(new_SP):
            self.sums_HS[:, column] += np.bincount(stratum_P, weights=new_P, minlength=len(self.sums_HS))

    @property
    def fitted(self) -> bool:
        """Whether there is enough to fit."""
        return bool(_moments(self.sums_HS.sum(axis=0))[2] >= ENOUGH)

    def population(self) -> tuple[float, float]:
        """a and b for all prompts together."""
        mean, variance, effective = _moments(self.sums_HS.sum(axis=0))
        if not effective >= ENOUGH:
            return 0.5, 0.5
        a, b = _beta(mean, variance, effective)
        return float(a), float(b)

    def strata(self) -> tuple[Floats, Floats]:
        """a and b for each stratum: (H,), (H,)."""
        mean, variance, effective = _moments(self.sums_HS.sum(axis=0))
        if not effective >= ENOUGH:
            return np.full(len(self.sums_HS), 0.5), np.full(len(self.sums_HS), 0.5)
        mean_H, variance_H, effective_H = _moments(self.sums_HS)
        known_H = effective_H >= 2
        own_H = np.where(known_H, effective_H / (effective_H + BORROWED), 0.0)
        mean_H = own_H * np.where(known_H, mean_H, 0.0) + (1 - own_H) * mean
        variance_H = own_H * np.where(known_H, variance_H, 0.0) + (1 - own_H) * variance
        return _beta(mean_H, variance_H, effective)


def _moments(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """m, v and the effective number of prompts behind v: (..., S) -> (...), (...), (...); NaN where there are none."""
    of = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = of[RATE] / of[WEIGHT]
        biased = of[RATE_2_SQUARED] / of[WEIGHT_2] - (of[RATE_2] / of[WEIGHT_2]) ** 2
        effective = of[WEIGHT_2] ** 2 / of[WEIGHT_2_SQUARED]
        variance = biased / (1 - 1 / effective) - of[NOISE_2] / of[WEIGHT_2]
    return mean, variance, effective


def _beta(mean: Floats, variance: Floats, effective: Floats) -> tuple[Floats, Floats]:
    """a and b within the rules above."""
    mean = np.clip(mean, 0.5 / effective, 1 - 0.5 / effective)
    concentration = np.clip(beta_concentration(mean, np.maximum(variance, NO_VARIANCE)), LEAST, MOST)
    return mean * concentration, (1 - mean) * concentration
