"""From rewards to advantages. Read this file first.

For reward k of row i in group g (one group per prompt, any sizes), with the mean mu_gk over the group's rows that have
the reward:

    baseline   group          r - mu_gk                           GRPO, arXiv 2402.03300
               leave_one_out  r - mean of the others = n/(n-1) (r - mu_gk)      RLOO, arXiv 2402.14740
               batch          r - mean over the batch
               none           r; 0 if it is the same in the whole batch                REINFORCE
    scale      none           1                                   Dr. GRPO, arXiv 2503.20783
               group_std      1 / (std over the group + eps)      GRPO (ddof 1, eps = 1e-4, as TRL)
               batch_std      1 / (std over the batch + eps)      ScaleRL, arXiv 2510.13786
               beta           1 / f(p_g; alpha, beta), capped     BNPO, see `normalization`
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

from rlbal.balance.groups import constant_groups, group_mean, group_std
from rlbal.balance.normalization import BetaNormalizer, to_unit_interval

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
    beta: BetaNormalizer | None = None,
) -> torch.Tensor:
    """Advantages of a whole generation batch.

    Args:
        rewards_NK: raw rewards over all processes, NaN where missing, shape (N, K).
        group_N: group of each row, 0..P-1, shape (N,).
        weights_K: weight of each reward, shape (K,).
        rule: baseline, scale, order and whitening.
        ranges_K2: declared [low, high] of each reward, shape (K, 2); for `scale: beta` only.
        beta: the normalizer, which has observed this batch; for `scale: beta` only.

    Returns:
        advantages (N,), float32.

    Raises:
        ValueError: `scale: beta` without ranges, without a normalizer that has observed a batch, or with another order
            than `normalize_then_sum`.
    """
    values_NK, weights_K = _values(rewards_NK, rule, ranges_K2, beta), weights_K.double()
    scored_N = (~values_NK.isnan()).any(dim=1)
    if rule.order == "sum_then_normalize":
        advantages_N = _normalize_sum(values_NK, group_N, weights_K, rule)
    else:
        advantages_N = (weights_K * _normalize_each(values_NK, group_N, rule, beta)).sum(dim=1)
    if rule.whiten:
        advantages_N = _whiten(advantages_N, scored_N)
    return torch.where(scored_N, advantages_N, 0.0).float()


def reward_advantages(
    rewards_NK: torch.Tensor,
    group_N: torch.Tensor,
    rule: AdvantageRule,
    ranges_K2: torch.Tensor | None = None,
    beta: BetaNormalizer | None = None,
) -> torch.Tensor:
    """Each reward's own advantages: (N, K) float32; arguments and errors as for `compute_advantages`.

    Column k is what `compute_advantages` gives for reward k alone with weight 1, before whitening. With the order
    `normalize_then_sum`, the weighted sum of the columns is the batch's advantages.
    """
    values_NK = _values(rewards_NK, rule, ranges_K2, beta)
    return _normalize_each(values_NK, group_N, rule, beta).float()


def _values(
    rewards_NK: torch.Tensor, rule: AdvantageRule, ranges_K2: torch.Tensor | None, beta: BetaNormalizer | None
) -> torch.Tensor:
    """Rewards as the rule takes them, float64: mapped to [0, 1] for `scale: beta`."""
    if rule.scale != "beta":
        return rewards_NK.double()
    if ranges_K2 is None or rule.order != "normalize_then_sum":
        raise ValueError("scale `beta` needs the range of every reward and the order `normalize_then_sum`")
    if beta is None or not beta.observed:
        raise ValueError("scale `beta` needs a normalizer that has observed a batch")
    return to_unit_interval(rewards_NK, ranges_K2)


def _normalize_sum(
    values_NK: torch.Tensor, group_N: torch.Tensor, weights_K: torch.Tensor, rule: AdvantageRule
) -> torch.Tensor:
    """Sum of the weighted centred rewards, scaled: (N,)."""
    present_N1 = (~values_NK.isnan()).any(dim=1, keepdim=True)

    def weighted_sum(baseline: str) -> torch.Tensor:
        return (subtract_baseline(values_NK, group_N, baseline) * weights_K).sum(dim=1, keepdim=True)

    # Both stds are of the weighted sum of rewards, about the group's or the batch's mean whatever the baseline is.
    std_N1 = _scale(weighted_sum("group"), weighted_sum("batch"), present_N1, group_N, rule.scale)
    return (weighted_sum(rule.baseline) / std_N1).squeeze(1)


def _normalize_each(
    values_NK: torch.Tensor, group_N: torch.Tensor, rule: AdvantageRule, beta: BetaNormalizer | None
) -> torch.Tensor:
    """Centred rewards, each scaled by itself: (N, K)."""
    centred_NK = subtract_baseline(values_NK, group_N, rule.baseline)
    if rule.scale == "beta":
        assert beta is not None
        return beta.normalize(centred_NK, values_NK, group_N)
    return centred_NK / _scale(values_NK, values_NK, ~values_NK.isnan(), group_N, rule.scale)


def subtract_baseline(values_NK: torch.Tensor, group_N: torch.Tensor, baseline: str) -> torch.Tensor:
    """Rewards less their baseline, 0 where missing (NaN): (N, K).

    Exactly 0 where the rows that the baseline is taken over all have the same reward: the rounding of a mean, divided
    by a density that is as good as 0, would become the largest advantage there is.
    """
    present_NK = ~values_NK.isnan()
    if baseline == "none":
        return torch.where(present_NK & ~says_nothing(values_NK), values_NK, 0.0)
    over_N = torch.zeros_like(group_N) if baseline == "batch" else group_N
    num_groups = int(over_N.max()) + 1
    means_PK, counts_PK = group_mean(values_NK, present_NK, over_N, num_groups)
    centred_NK = values_NK - means_PK[over_N]
    if baseline == "leave_one_out":
        # A row alone in its group has nobody to be compared with: it is constant below.
        centred_NK = centred_NK * (counts_PK / (counts_PK - 1.0).clamp(min=1.0))[over_N]
    varies_PK = ~constant_groups(values_NK, over_N, num_groups)
    return torch.where(present_NK & varies_PK[over_N], centred_NK, 0.0)


def says_nothing(values_NK: torch.Tensor) -> torch.Tensor:
    """Whether a reward is the same in all rows that have it, two at least: (1, K) bool.

    It cannot tell which rollouts are better. Under the baseline `none` its advantages, all equal, would still have a
    gradient: noise, whose mean is 0 since scores have mean 0, but which would pass for an influence of that reward.
    """
    several_1K = (~values_NK.isnan()).sum(dim=0, keepdim=True) > 1
    everyone_N = torch.zeros(len(values_NK), dtype=torch.long, device=values_NK.device)
    return several_1K & constant_groups(values_NK, everyone_N, 1)


def _scale(
    by_group_NK: torch.Tensor, by_batch_NK: torch.Tensor, present_NK: torch.Tensor, group_N: torch.Tensor, scale: str
) -> torch.Tensor:
    """The divisor of every row and column: 1, or std + eps of its group or the batch, infinite where nothing varies."""
    if scale == "none":
        return torch.ones_like(by_group_NK)
    if scale == "group_std":
        std_NK = group_std(by_group_NK, present_NK, group_N, int(group_N.max()) + 1)[group_N]
    else:
        std_NK = group_std(by_batch_NK, present_NK, torch.zeros_like(group_N), 1).expand_as(by_batch_NK)
    # Under a baseline that is not the mean, dividing by eps alone would make 10,000 times the reward of it.
    return torch.where(std_NK > NO_SPREAD, std_NK + EPSILON, torch.inf)


def _whiten(advantages_N: torch.Tensor, scored_N: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit std (ddof 1) over the scored rows."""
    one_group_N = torch.zeros_like(scored_N, dtype=torch.long)
    values_N1, present_N1 = advantages_N.unsqueeze(1), scored_N.unsqueeze(1)
    mean_11, _ = group_mean(values_N1, present_N1, one_group_N, 1)
    std_11 = group_std(values_N1, present_N1, one_group_N, 1)
    return ((values_N1 - mean_11) / (std_11 + EPSILON)).squeeze(1)
