"""What a critic is trained on, and how well it does.

The loss of a value V against the return R, where V_old is what the critic said when the rollouts were made (as in the
code that came with PPO, arXiv 1707.06347): half the larger one of the two squares

    (V - R)²        (clip(V, V_old ± ε) - R)²

so that a value has no gradient from there on where it has moved by ε towards the return already.

Shapes: B rows, T completion tokens.
"""

import torch

from rlbal.balance.gae import mean_and_variance


def clipped_value_loss(
    values_BT: torch.Tensor,
    old_values_BT: torch.Tensor,
    returns_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    clip: float | None,
    num_tokens: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the number of tokens whose value had gone too far to learn.

    Args:
        values_BT: values of the states before each token, with a gradient.
        old_values_BT: the same when the rollouts were made.
        returns_BT: what they should have been.
        mask_BT: True where they count.
        clip: ε, or None for the plain square.
        num_tokens: what the sum is divided by: the tokens that count, in all that one optimizer step is made of. So it
            makes no difference how rows are divided into micro-batches and processes.

    Returns:
        loss and number of clipped tokens, two scalars.
    """
    squares_BT = (values_BT - returns_BT).square()
    clipped_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
    if clip is not None:
        near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
        near_squares_BT = (near_BT - returns_BT).square()
        clipped_BT = mask_BT & (near_squares_BT > squares_BT)
        squares_BT = torch.maximum(squares_BT, near_squares_BT)
    loss = 0.5 * torch.where(mask_BT, squares_BT, 0.0).sum() / num_tokens
    return loss, clipped_BT.sum()


def explained_variance(returns_3: torch.Tensor, errors_3: torch.Tensor) -> float:
    """Share of the returns' variance that the values account for, 1 - Var(R - V) / Var(R); NaN if returns are equal.

    Args:
        returns_3: `rlbal.balance.gae.masked_moments` of the returns, summed over processes.
        errors_3: those of the returns less the values.
    """
    (_, variance), (_, left) = mean_and_variance(returns_3), mean_and_variance(errors_3)
    return (1.0 - left / variance).item() if variance > 0 else float("nan")
