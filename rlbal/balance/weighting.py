"""Weights of the rewards over time."""

from typing import Any

import torch


class FixedWeighting:
    """The recipe's weights, unchanged throughout (`weighting.method: fixed`).

    A weighting decides values and keeps its state for checkpoints; only the trainer logs them.
    """

    def __init__(self, weights: list[float]) -> None:
        self.weights_K = torch.tensor(weights, dtype=torch.float64)

    def weights(self) -> torch.Tensor:
        """Current weights, shape (K,)."""
        return self.weights_K

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state  # nothing changes, so nothing was saved
