"""How many rollouts each prompt of a generation batch gets."""

import torch


def uniform_counts(num_prompts: int, rollouts: int) -> torch.Tensor:
    """The same number of rollouts for every prompt: (P,) int64 summing to `rollouts`.

    Raises:
        ValueError: `rollouts` does not divide by `num_prompts`.
    """
    if rollouts % num_prompts:
        raise ValueError(f"{rollouts} rollouts do not divide over {num_prompts} prompts")
    return torch.full((num_prompts,), rollouts // num_prompts, dtype=torch.long)
