"""Statistics over ragged groups of rows, with missing values.

Shapes: N rows (completions), K rewards, P groups (prompts). `group_N` holds each row's group, 0..P-1, in any order.
Everything is float64, so that a group of equal rewards has a deviation of exactly 0.
"""

import torch


def group_sum(values_NK: torch.Tensor, group_N: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Sum of the rows of each group: (N, K), (N,) -> (P, K)."""
    sums_PK = values_NK.new_zeros(num_groups, values_NK.shape[1])
    return sums_PK.index_add_(0, group_N, values_NK)


def group_mean(
    values_NK: torch.Tensor, present_NK: torch.Tensor, group_N: torch.Tensor, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the present rows of each group, and their number.

    Args:
        values_NK: values; whatever stands where `present_NK` is False is ignored.
        present_NK: True where the value exists.

    Returns:
        means (P, K), 0 where a group has no value, and counts (P, K).
    """
    counts_PK = group_sum(present_NK.to(values_NK.dtype), group_N, num_groups)
    sums_PK = group_sum(torch.where(present_NK, values_NK, 0.0), group_N, num_groups)
    return sums_PK / counts_PK.clamp(min=1.0), counts_PK


def group_variance(
    values_NK: torch.Tensor, present_NK: torch.Tensor, group_N: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Variance (ddof 1) over the present rows of each group: (P, K), 0 for fewer than two rows."""
    means_PK, counts_PK = group_mean(values_NK, present_NK, group_N, num_groups)
    deviations_NK = torch.where(present_NK, values_NK - means_PK[group_N], 0.0)
    squares_PK = group_sum(deviations_NK.square(), group_N, num_groups)
    return squares_PK / (counts_PK - 1.0).clamp(min=1.0)


def group_std(
    values_NK: torch.Tensor, present_NK: torch.Tensor, group_N: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Standard deviation (ddof 1) over the present rows of each group: (P, K), 0 for fewer than two rows."""
    return group_variance(values_NK, present_NK, group_N, num_groups).sqrt()


def constant_groups(values_NK: torch.Tensor, group_N: torch.Tensor, num_groups: int) -> torch.Tensor:
    """True where no two present values of a group differ: (N, K) with NaN for missing -> (P, K) bool."""
    index_NK = group_N.unsqueeze(1).expand_as(values_NK)
    missing_NK = values_NK.isnan()
    shape = (num_groups, values_NK.shape[1])
    highest_PK = values_NK.new_full(shape, -torch.inf).scatter_reduce(
        0, index_NK, values_NK.masked_fill(missing_NK, -torch.inf), "amax"
    )
    lowest_PK = values_NK.new_full(shape, torch.inf).scatter_reduce(
        0, index_NK, values_NK.masked_fill(missing_NK, torch.inf), "amin"
    )
    return highest_PK <= lowest_PK
