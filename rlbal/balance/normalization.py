"""Beta normalization of rewards (BNPO, arXiv 2506.02864): what `advantage.scale: beta` divides by.

A reward in [0, 1] has the mean p_g over the rollouts of prompt g, and p is treated as Beta(a, b) over prompts. With m
and v the mean and the variance of p over prompts,

    a = (m(1-m)/v - 1) m        b = (m(1-m)/v - 1)(1-m)
    alpha = max(1, 1 + a/3)     beta = max(1, 1 + b/3)          A = (r - p_g) / f(p_g; alpha, beta)

f is the density of Beta(alpha, beta). Among all densities, this one minimises E[p(1-p) / f(p)^2], which is the variance
of the gradient as long as the score's norm does not depend on the reward (the paper's theorem). alpha = beta = 1 is
REINFORCE with a group baseline, alpha = beta = 3/2 is GRPO up to the constant pi/8 (binary rewards, ddof 0, eps = 0).

Two estimators of m, v and p:

    moments        the paper's: v is the population variance of the sampled p_g over the prompts of the batch, and f is
                   taken at p_g. Few rollouts make v too large, by the noise in p_g, and f can vanish at a stray p_g.
    beta_binomial  v = Var(p_g) - mean(s_g^2 / n_g), with the unbiased variance over prompts and the unbiased variance
                   s_g^2 of the n_g rewards of a prompt: unbiased for groups of any sizes and for graded rewards too. A
                   prompt with a single reward has no s_g^2, so it counts in m but not in v. f is taken at the posterior
                   mean (a + n_g p_g) / (a + b + n_g).

m and v (not alpha and beta, which are no linear functions of them) are averaged over batches; v before it is cut off at
0, since averages of cut-off values would be too large.

Without a signal:
    p_g in {0, 1}     every reward of the prompt is the same: advantage 0.
    v = 0             (up to rounding), a negative v, or never two prompts to compare: alpha = beta = 1, reported as a
                      fallback. Nothing shows that prompts differ; the posterior means would all be m and the divisors
                      all equal, which is REINFORCE up to its scale, and alpha = beta = 1 is REINFORCE on its own scale.
    v >= m(1-m)       more spread than any Beta has (prompts succeed always or never): alpha = beta = 1 by the formula,
                      with p_g itself for the posterior mean. That is a result, not a fallback.
    f far from m      is as good as 0, so the advantage is cut off at +-cap.
"""

from typing import Any

import torch

from rlbal.balance.beta_moments import NO_VARIANCE, beta_concentration
from rlbal.balance.groups import group_mean, group_variance
from rlbal.errors import RunError


def to_unit_interval(rewards_NK: torch.Tensor, ranges_K2: torch.Tensor) -> torch.Tensor:
    """Map each reward's declared range [low, high] to [0, 1], NaN staying NaN: (N, K), (K, 2) -> (N, K) float64.

    Bounds are rounded as the rewards were: the float32 of 0.1 is above the float64 of it.
    """
    low_K, high_K = ranges_K2.to(rewards_NK.dtype).double().unbind(1)
    return (rewards_NK.double() - low_K) / (high_K - low_K)


def prompt_moments(unit_NK: torch.Tensor, group_N: torch.Tensor, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over the prompts of one batch of each reward's success probability.

    Args:
        unit_NK: rewards in [0, 1], NaN where missing, shape (N, K).
        group_N: prompt of each row, 0..P-1, shape (N,).
        estimator: `moments` or `beta_binomial`.

    Returns:
        m (K,), NaN for a reward without any value, and v (K,), NaN with fewer than two prompts to compare. Under
        `beta_binomial` v can be negative.
    """
    present_NK, num_groups = ~unit_NK.isnan(), int(group_N.max()) + 1
    p_PK, counts_PK = group_mean(unit_NK, present_NK, group_N, num_groups)
    everyone_P = torch.zeros(num_groups, dtype=torch.long, device=group_N.device)

    mean_1K, prompts_1K = group_mean(p_PK, counts_PK > 0, everyone_P, 1)
    if estimator == "moments":
        unbiased_1K = group_variance(p_PK, counts_PK > 0, everyone_P, 1)
        compared_1K, variance_1K = prompts_1K, unbiased_1K * (prompts_1K - 1.0) / prompts_1K
    else:
        several_PK = counts_PK > 1
        noise_PK = group_variance(unit_NK, present_NK, group_N, num_groups) / counts_PK.clamp(min=1.0)
        noise_1K, compared_1K = group_mean(noise_PK, several_PK, everyone_P, 1)
        variance_1K = group_variance(p_PK, several_PK, everyone_P, 1) - noise_1K
    mean_1K = torch.where(prompts_1K > 0, mean_1K, torch.nan)
    variance_1K = torch.where(compared_1K > 1, variance_1K, torch.nan)
    return mean_1K.squeeze(0), variance_1K.squeeze(0)


def population_prior(mean_K: torch.Tensor, variance_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The a and b of the Beta distribution with these moments, both 0 where none has them: (K,), (K,)."""
    concentration_K = beta_concentration(mean_K, variance_K)
    usable_K = (variance_K > NO_VARIANCE) & (concentration_K > 0.0)
    a_K, b_K = concentration_K * mean_K, concentration_K * (1.0 - mean_K)
    return torch.where(usable_K, a_K, 0.0), torch.where(usable_K, b_K, 0.0)


def density_parameters(a_K: torch.Tensor, b_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and beta of the density that minimises the variance when p is Beta(a, b); a = b = 0 gives 1 and 1."""
    return 1.0 + a_K / 3.0, 1.0 + b_K / 3.0


def beta_density(p: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Density of Beta(alpha, beta) at p in [0, 1], for shapes that broadcast; alpha and beta 1 at least."""
    log_normaliser = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return (torch.xlogy(alpha - 1.0, p) + torch.special.xlog1py(beta - 1.0, -p) - log_normaliser).exp()


class MovingAverage:
    """Bias-corrected exponential average of K values over batches; a NaN leaves its own average alone.

    Args:
        size: K.
        smoothing: share of the old, 0 (the last value only) to below 1.
    """

    def __init__(self, size: int, smoothing: float) -> None:
        self.smoothing = smoothing
        self.total_K = torch.zeros(size, dtype=torch.float64)
        self.weight_K = torch.zeros(size, dtype=torch.float64)

    def update(self, value_K: torch.Tensor) -> None:
        old, new_K = self.smoothing, ~value_K.isnan()
        self.total_K = torch.where(new_K, old * self.total_K + (1.0 - old) * value_K, self.total_K)
        self.weight_K = torch.where(new_K, old * self.weight_K + (1.0 - old), self.weight_K)

    def value(self) -> torch.Tensor:
        """The averages (K,), NaN where there never was a value."""
        return self.total_K / self.weight_K

    def state_dict(self) -> dict[str, list[float]]:
        return {"total": self.total_K.tolist(), "weight": self.weight_K.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.total_K = torch.tensor(state["total"], dtype=torch.float64)
        self.weight_K = torch.tensor(state["weight"], dtype=torch.float64)


class BetaNormalizer:
    """Divides centred rewards by the Beta density of their prompt's success probability.

    `observe` moves the averages, once per batch; everything else only reads them, so advantages can be computed any
    number of times from one `observe`.

    Args:
        names: names of the K rewards.
        estimator: `moments` or `beta_binomial`.
        smoothing: share of the old in the averages of m and v.
        cap: largest absolute advantage of one reward.
    """

    def __init__(self, names: list[str], estimator: str, smoothing: float, cap: float) -> None:
        self.names, self.estimator, self.cap = names, estimator, cap
        self.mean, self.variance = MovingAverage(len(names), smoothing), MovingAverage(len(names), smoothing)
        self.observed = False
        self.capped_K = torch.zeros(len(names), dtype=torch.float64)

    def observe(self, rewards_NK_unit: torch.Tensor, group_N: torch.Tensor) -> None:
        """Take in one batch: rewards in [0, 1], NaN where missing, (N, K), and the prompt of each row, (N,)."""
        mean_K, variance_K = prompt_moments(rewards_NK_unit.double(), group_N, self.estimator)
        self.mean.update(mean_K)
        self.variance.update(variance_K)
        self.observed = True

    def prior(self) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b of the prompts' success probabilities as seen so far: (K,), (K,), both 0 where they are unknown."""
        return population_prior(self.mean.value(), self.variance.value())

    def densities(self, rewards_NK_unit: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
        """What each row's centred rewards are divided by; infinite where the prompt's p_g is 0 or 1: (N, K)."""
        unit_NK, num_groups = rewards_NK_unit.double(), int(group_N.max()) + 1
        p_PK, counts_PK = group_mean(unit_NK, ~unit_NK.isnan(), group_N, num_groups)
        a_K, b_K = self.prior()
        at_PK = p_PK
        if self.estimator == "beta_binomial":
            # Without a prior (a = b = 0) this is p_g itself.
            at_PK = (a_K + counts_PK * p_PK) / (a_K + b_K + counts_PK).clamp(min=1.0)
        density_PK = beta_density(at_PK, *density_parameters(a_K, b_K))
        return torch.where((p_PK > 0.0) & (p_PK < 1.0), density_PK, torch.inf)[group_N]

    def normalize(self, centred_NK: torch.Tensor, rewards_NK_unit: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
        """Centred rewards, 0 where missing, over their densities, within +-cap: (N, K).

        A density that underflows to 0 gives the cap, and 0 over it gives 0.
        """
        divided_NK = centred_NK / self.densities(rewards_NK_unit, group_N)
        divided_NK = torch.where(centred_NK == 0.0, 0.0, divided_NK)
        scored_K = (~rewards_NK_unit.isnan()).sum(dim=0)
        self.capped_K = (divided_NK.abs() > self.cap).sum(dim=0).double() / scored_K.clamp(min=1)
        return divided_NK.clamp(-self.cap, self.cap)

    def metrics(self) -> dict[str, float]:
        """Per reward `beta/<what>/<name>`; m and v are NaN while there was nothing to measure them by.

        `v` is the average as it is, so under `beta_binomial` it can be negative; `fallback` is 1 where alpha = beta = 1
        stands for an unknown v; `capped` is the share of that reward's rows that the cap touched last.
        """
        mean_K, variance_K = self.mean.value(), self.variance.value()
        alpha_K, beta_K = density_parameters(*self.prior())
        per_reward = {
            "alpha": alpha_K,
            "beta": beta_K,
            "m": mean_K,
            "v": variance_K,
            "fallback": (~(variance_K > NO_VARIANCE)).double(),
            "capped": self.capped_K,
        }
        return {
            f"beta/{what}/{name}": values_K[k].item()
            for what, values_K in per_reward.items()
            for k, name in enumerate(self.names)
        }

    def state_dict(self) -> dict[str, Any]:
        averages = {"mean": self.mean.state_dict(), "variance": self.variance.state_dict()}
        return {"rewards": self.names, **averages, "capped": self.capped_K.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            RunError: the state is of other rewards.
        """
        if state["rewards"] != self.names:
            raise RunError(
                f"the checkpoint's `advantage.beta` averages are of the rewards {state['rewards']}, and the recipe has "
                f"{self.names}",
                fix="resume with the rewards of the run, or start a new one",
            )
        self.mean.load_state_dict(state["mean"])
        self.variance.load_state_dict(state["variance"])
        self.capped_K = torch.tensor(state["capped"], dtype=torch.float64)
        self.observed = bool((self.mean.weight_K > 0).any())
