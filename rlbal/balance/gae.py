"""Generalised advantage estimation for tokens (Schulman et al., arXiv 1506.02438), on ragged batches.

A state is what the policy has written so far, an action its next token. With V_t the value of the state before token t,

    δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γλ A_{t+1}        return: A_t + V_t

The reward of a completion comes with its last token, less a penalty on every token for leaving the reference policy
where one is wanted. After the last token of a completion that ended there is no state, so its value is 0.

One that was cut off by the token limit is not over, but the limit is part of the task: `terminal` has it end there like
any other. `bootstrap` takes the value of the state it was left in for what would have come; then never finishing is
worth what finishing is believed to be worth, which teaches a policy that earns nothing to go on writing.

Tokens the policy did not write (injected ones, padding) are no actions: they have no advantage, and the state before
the next token it did write follows the state before the last one.

Shapes: B rows, T completion tokens.
"""

from typing import Literal

import torch

Truncation = Literal["terminal", "bootstrap"]

EPSILON = 1e-8
ROUNDING = 1e-12  # of float64, in a difference of squares summed over a batch


def token_rewards(
    rewards_B: torch.Tensor,
    actions_BT: torch.Tensor,
    log_ratio_BT: torch.Tensor | None = None,
    kl_penalty: float = 0.0,
) -> torch.Tensor:
    """r_t: the completion's reward at the last token that the policy wrote, less the penalty at every one.

    Args:
        rewards_B: rewards of the completions, weighed and summed.
        actions_BT: True for tokens the policy wrote.
        log_ratio_BT: log π(token) - log π_reference(token) as sampled, whose mean is the KL divergence.
        kl_penalty: what a nat of it costs.

    Returns:
        (B, T), 0 outside `actions_BT`. A row without a token has nowhere to put its reward.
    """
    T = actions_BT.shape[1]
    later_BT = actions_BT.long().flip(1).cumsum(1).flip(1)
    last_BT = actions_BT & (later_BT == 1)
    rewards_BT = torch.where(last_BT, rewards_B[:, None].expand(-1, T), 0.0)
    if log_ratio_BT is not None:
        rewards_BT = rewards_BT - torch.where(actions_BT, kl_penalty * log_ratio_BT, 0.0)
    return rewards_BT


def final_values(
    values_BT1: torch.Tensor, lengths_B: torch.Tensor, truncated_B: torch.Tensor, truncation: Truncation
) -> torch.Tensor:
    """What is still to come after the last token of each completion: (B,).

    Args:
        values_BT1: values of the states before each token, and at a row's column `lengths_B` of that after its last.
        lengths_B: tokens of each completion, 0..T.
        truncated_B: True where the token limit cut a completion off.
        truncation: what that means, see above.
    """
    after_B = values_BT1.gather(1, lengths_B[:, None])[:, 0]
    bootstrapped_B = truncated_B if truncation == "bootstrap" else torch.zeros_like(truncated_B)
    return torch.where(bootstrapped_B, after_B, 0.0)


def estimate_advantages(
    rewards_BT: torch.Tensor,
    values_BT: torch.Tensor,
    final_B: torch.Tensor,
    actions_BT: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns of every token.

    Args:
        rewards_BT: r_t.
        values_BT: V_t, of the state before token t.
        final_B: value of the state after the last token (`final_values`).
        actions_BT: True for tokens the policy wrote; whatever stands elsewhere is ignored.
        gamma: discount of the future, from one token to the next.
        lam: λ; 1 compares with the whole future, 0 with the next state alone.

    Returns:
        advantages and returns, (B, T) each, 0 outside `actions_BT`.
    """
    values_BT = torch.where(actions_BT, values_BT, 0.0)
    next_values_BT, has_next_BT = _next_values(values_BT, final_B, actions_BT)
    deltas_BT = torch.where(actions_BT, rewards_BT + gamma * next_values_BT - values_BT, 0.0)
    # A token that is no action passes on what comes after it, unchanged.
    decay_BT = torch.where(actions_BT, gamma * lam * has_next_BT.to(values_BT), 1.0)
    advantages_BT = torch.where(actions_BT, _discounted_sums(deltas_BT, decay_BT), 0.0)
    return advantages_BT, advantages_BT + values_BT


def _next_values(
    values_BT: torch.Tensor, final_B: torch.Tensor, actions_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value of the state before the next action, or the final one, and whether there is a next action: (B, T) each."""
    T = values_BT.shape[1]
    places_BT = torch.where(actions_BT, torch.arange(T, device=values_BT.device), T)
    # The first action from each column on, then from the column after it on.
    first_BT = places_BT.flip(1).cummin(1).values.flip(1)
    next_BT = torch.cat([first_BT[:, 1:], torch.full_like(first_BT[:, :1], T)], dim=1)
    values_BT1 = torch.cat([values_BT, final_B[:, None].to(values_BT)], dim=1)
    return values_BT1.gather(1, next_BT), next_BT < T


def _discounted_sums(terms_BT: torch.Tensor, decay_BT: torch.Tensor) -> torch.Tensor:
    """S_t = terms_t + decay_t S_{t+1} for all t at once: after round k every sum covers 2^k tokens."""
    sums_BT, decay_BT, reach = terms_BT.clone(), decay_BT.clone(), 1
    while reach < terms_BT.shape[1]:
        sums_BT[:, :-reach] = sums_BT[:, :-reach] + decay_BT[:, :-reach] * sums_BT[:, reach:]
        decay_BT[:, :-reach] = decay_BT[:, :-reach] * decay_BT[:, reach:]
        reach *= 2
    return sums_BT


def masked_moments(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares where `mask_BT` is True: (3,). Those of several processes add up."""
    inside_BT = torch.where(mask_BT, values_BT, 0.0)
    return torch.stack([mask_BT.sum().to(inside_BT), inside_BT.sum(), inside_BT.square().sum()])


def mean_and_variance(moments_3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (ddof 0) from `masked_moments`; 0 and 0 of nothing. A variance that is rounding alone is 0."""
    count, total, squares = moments_3.unbind()
    mean, mean_square = total / count.clamp(min=1.0), squares / count.clamp(min=1.0)
    variance = mean_square - mean.square()
    return mean, torch.where(variance > ROUNDING * mean_square, variance, 0.0)


def whiten(values_BT: torch.Tensor, mask_BT: torch.Tensor, moments_3: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the batch that `moments_3` describe, 0 outside the mask: (B, T).

    Args:
        values_BT: this process's values, float64.
        mask_BT: True where they count.
        moments_3: sums of `masked_moments` over all processes, so that these agree.
    """
    mean, variance = mean_and_variance(moments_3)
    return torch.where(mask_BT, (values_BT - mean) / (variance.sqrt() + EPSILON), 0.0)
