"""From rewards to advantages. Read this file first.

For reward k of row i in group g (one group per prompt, any sizes), with the mean mu_gk over the group's rows that have
the reward:

    baseline   group          r - mu_gk                           GRPO, arXiv 2402.03300
               leave_one_out  r - mean of the others = n/(n-1) (r - mu_gk)      RLOO, arXiv 2402.14740
               batch          r - mean over the batch
               none           r                                   REINFORCE
    scale      none           1                                   Dr. GRPO, arXiv 2503.20783
               group_std      1 / (std over the group + eps)      GRPO (ddof 1, eps = 1e-4, as TRL)
               batch_std      1 / (std over the batch + eps)      ScaleRL, arXiv 2510.13786
               beta           1 / f(p_g; alpha, beta)             BNPO, see `normalization`
    order      sum_then_normalize   scale(sum_k w_k c_k)          c_k: the reward less its baseline
               normalize_then_sum   sum_k w_k scale(c_k)
    whiten     (A - mean) / (std + eps) over the batch at the end; with group_std and normalize_then_sum this is GDPO

`rloo` is the leave-one-out baseline alone: TRL's RLOOTrainer also puts the KL penalty into the reward and uses
sequence-level ratios. A missing reward (NaN) contributes 0 for that reward and enters none of its statistics; TRL
counts it as 0 against the others' baseline, so the two agree only on batches in which no reward is partly missing. A
row without any reward has advantage 0 and stays out of every statistic.
"""

from dataclasses import dataclass

import torch

from rlbal.balance.groups import group_mean, group_std
from rlbal.balance.normalization import beta_density, beta_parameters, to_unit_interval

EPSILON = 1e-4
NO_SPREAD = 1e-8  # a std up to this is rounding


@dataclass(frozen=True)
class AdvantageRule:
    """One choice of baseline, scale and order (the recipe's `advantage:`)."""

    baseline: str = "group"
    scale: str = "group_std"
    order: str = "sum_then_normalize"
    whiten: bool = False


def compute_advantages(
    rewards_NK: torch.Tensor,
    group_N: torch.Tensor,
    weights_K: torch.Tensor,
    rule: AdvantageRule,
    ranges_K2: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Advantages of a whole generation batch.

    Args:
        rewards_NK: raw rewards over all processes, NaN where missing, shape (N, K).
        group_N: group of each row, 0..P-1, shape (N,).
        weights_K: weight of each reward, shape (K,).
        rule: baseline, scale, order and whitening.
        ranges_K2: declared [low, high] of each reward, shape (K, 2); needed by `scale: beta` only.

    Returns:
        advantages (N,) float32, and metrics with one value per reward: `alpha` and `beta` under `scale: beta`.

    Raises:
        ValueError: `scale: beta` without ranges or with another order than `normalize_then_sum`.
    """
    rewards_NK, weights_K = rewards_NK.double(), weights_K.double()
    metrics: dict[str, list[float]] = {}
    if rule.scale == "beta":
        if ranges_K2 is None or rule.order != "normalize_then_sum":
            raise ValueError("scale `beta` needs the range of every reward and the order `normalize_then_sum`")
        rewards_NK = to_unit_interval(rewards_NK, ranges_K2.double())
    present_NK = ~rewards_NK.isnan()
    scored_N = present_NK.any(dim=1)
    num_groups = int(group_N.max()) + 1
    centred_NK = subtract_baseline(rewards_NK, present_NK, group_N, num_groups, rule.baseline)

    if rule.order == "sum_then_normalize":
        # Both stds are of the weighted sum of rewards, about the group's or the batch's mean whatever the baseline is.
        by_group_N1 = weighted_sum(rewards_NK, present_NK, group_N, num_groups, weights_K, "group")
        by_batch_N1 = weighted_sum(rewards_NK, present_NK, group_N, num_groups, weights_K, "batch")
        present_N1 = scored_N.unsqueeze(1)
        summed_N1 = (centred_NK * weights_K).sum(dim=1, keepdim=True)
        std_N1 = _scale(by_group_N1, by_batch_N1, present_N1, group_N, num_groups, rule.scale)
        advantages_N = (summed_N1 / std_N1).squeeze(1)
    elif rule.scale == "beta":
        density_NK, metrics = _beta_scale(rewards_NK, present_NK, group_N, num_groups)
        advantages_N = (weights_K * centred_NK / density_NK).sum(dim=1)
    else:
        std_NK = _scale(rewards_NK, rewards_NK, present_NK, group_N, num_groups, rule.scale)
        advantages_N = (weights_K * centred_NK / std_NK).sum(dim=1)

    if rule.whiten:
        advantages_N = _whiten(advantages_N, scored_N)
    return torch.where(scored_N, advantages_N, 0.0).float(), metrics


def subtract_baseline(
    rewards_NK: torch.Tensor, present_NK: torch.Tensor, group_N: torch.Tensor, num_groups: int, baseline: str
) -> torch.Tensor:
    """Rewards less their baseline, 0 where missing: (N, K)."""
    if baseline == "none":
        centred_NK = rewards_NK
    elif baseline == "batch":
        one_group_N = torch.zeros_like(group_N)
        means_1K, _ = group_mean(rewards_NK, present_NK, one_group_N, 1)
        centred_NK = rewards_NK - means_1K
    else:
        means_PK, counts_PK = group_mean(rewards_NK, present_NK, group_N, num_groups)
        centred_NK = rewards_NK - means_PK[group_N]
        if baseline == "leave_one_out":
            # A row alone in its group has nobody to be compared with: r - mu is 0 already.
            centred_NK = centred_NK * (counts_PK / (counts_PK - 1.0).clamp(min=1.0))[group_N]
    return torch.where(present_NK, centred_NK, 0.0)


def weighted_sum(
    rewards_NK: torch.Tensor,
    present_NK: torch.Tensor,
    group_N: torch.Tensor,
    num_groups: int,
    weights_K: torch.Tensor,
    baseline: str,
) -> torch.Tensor:
    """Weighted sum of centred rewards, a missing term being 0: (N, 1)."""
    centred_NK = subtract_baseline(rewards_NK, present_NK, group_N, num_groups, baseline)
    return (centred_NK * weights_K).sum(dim=1, keepdim=True)


def _scale(
    by_group_NK: torch.Tensor,
    by_batch_NK: torch.Tensor,
    present_NK: torch.Tensor,
    group_N: torch.Tensor,
    num_groups: int,
    scale: str,
) -> torch.Tensor:
    """The divisor of every row and column: 1, or std + eps of its group or the batch, infinite where nothing varies."""
    if scale == "none":
        return torch.ones_like(by_group_NK)
    if scale == "group_std":
        std_NK = group_std(by_group_NK, present_NK, group_N, num_groups)[group_N]
    else:
        std_NK = group_std(by_batch_NK, present_NK, torch.zeros_like(group_N), 1).expand_as(by_batch_NK)
    # Under a baseline that is not the mean, dividing by eps alone would make 10,000 times the reward of it.
    return torch.where(std_NK > NO_SPREAD, std_NK + EPSILON, torch.inf)


def _beta_scale(
    p_NK: torch.Tensor, present_NK: torch.Tensor, group_N: torch.Tensor, num_groups: int
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Beta density at each row's group mean, 1 where the mean is 0 or 1 (the centred reward is 0 there): (N, K).

    At least EPSILON: with many prompts alike, the density at one that is not underflows, and its advantages with it.
    """
    means_PK, counts_PK = group_mean(p_NK, present_NK, group_N, num_groups)
    density_PK = torch.ones_like(means_PK)
    metrics: dict[str, list[float]] = {"alpha": [], "beta": []}
    for k in range(p_NK.shape[1]):
        seen_P = counts_PK[:, k] > 0
        alpha, beta = beta_parameters(means_PK[seen_P, k]) if seen_P.any() else (1.0, 1.0)
        inside_P = seen_P & (means_PK[:, k] > 0) & (means_PK[:, k] < 1)
        density_PK[inside_P, k] = beta_density(means_PK[inside_P, k], alpha, beta).clamp(min=EPSILON)
        metrics["alpha"].append(alpha)
        metrics["beta"].append(beta)
    return density_PK[group_N], metrics


def _whiten(advantages_N: torch.Tensor, scored_N: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit std (ddof 1) over the scored rows."""
    one_group_N = torch.zeros_like(scored_N, dtype=torch.long)
    values_N1, present_N1 = advantages_N.unsqueeze(1), scored_N.unsqueeze(1)
    mean_11, _ = group_mean(values_N1, present_N1, one_group_N, 1)
    std_11 = group_std(values_N1, present_N1, one_group_N, 1)
    return ((values_N1 - mean_11) / (std_11 + EPSILON)).squeeze(1)
