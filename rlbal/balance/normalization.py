"""Beta normalization of rewards (BNPO, arXiv 2506.02864).

A binary reward with success probability p_g per prompt is treated as p ~ Beta(a, b) over prompts, and the group-centred
reward is divided by the Beta density of p_g with the parameters that minimise the variance of the gradient:

    a = (m(1-m)/v - 1) m        b = (m(1-m)/v - 1)(1-m)         m, v: mean and variance of p_g over prompts
    alpha = max(1, 1 + a/3)     beta = max(1, 1 + b/3)          A = (r - p_g) / f(p_g; alpha, beta)

alpha = beta = 1 is REINFORCE with a group baseline; alpha = beta = 3/2 is GRPO up to a constant (binary rewards).
With no signal: p_g in {0, 1} gives advantage 0; v = 0 or a single prompt gives alpha = beta = 1.
"""

import torch

# A variance below this is rounding: equal means can differ in their last bit, which would make alpha 1e30.
NO_VARIANCE = 1e-12


def beta_parameters(p_P: torch.Tensor) -> tuple[float, float]:
    """The density's (alpha, beta) from the mean rewards of the prompts, by moments (population variance).

    Args:
        p_P: mean reward of each prompt in [0, 1], shape (P,); at least one.
    """
    mean = p_P.mean().item()
    variance = p_P.var(correction=0).item() if len(p_P) > 1 else 0.0
    if variance < NO_VARIANCE:
        return 1.0, 1.0
    concentration = mean * (1.0 - mean) / variance - 1.0
    return max(1.0, 1.0 + concentration * mean / 3.0), max(1.0, 1.0 + concentration * (1.0 - mean) / 3.0)


def beta_density(p_P: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Beta(alpha, beta) density at p, shape-preserving; p strictly between 0 and 1."""
    parameters = p_P.new_tensor([alpha, beta])
    log_normaliser = torch.lgamma(parameters).sum() - torch.lgamma(parameters.sum())
    return ((alpha - 1.0) * p_P.log() + (beta - 1.0) * torch.log1p(-p_P) - log_normaliser).exp()


def to_unit_interval(rewards_NK: torch.Tensor, ranges_K2: torch.Tensor) -> torch.Tensor:
    """Map each reward's declared range [low, high] to [0, 1]; NaN stays NaN. (N, K), (K, 2) -> (N, K)."""
    low_K, high_K = ranges_K2.unbind(1)
    return (rewards_NK - low_K) / (high_K - low_K)
