"""Weights of the rewards over time: fixed, or on a schedule.

`Weighting` is what all four methods share; `rlbal.balance.hypervolume` and `rlbal.balance.gradients` have the two that
learn.
"""

from typing import Any

import numpy as np
import torch


class Weighting:
    """What decides how much each reward counts. It decides values and keeps state; only the trainer logs.

    The trainer asks for `weights` once per generation batch; the `factor` holds for whole optimizer steps. A weighting
    that learns has a method `observe` besides, whose arguments are what it learns from: scores before the step, or
    gradients after it.
    """

    def weights(self, progress: float) -> torch.Tensor:
        """Weight of each reward, shape (K,), float64.

        Args:
            progress: share of the run's optimizer steps done, 0 to 1.
        """
        raise NotImplementedError

    @property
    def factor(self) -> float:
        """How much larger than usual this step should be; 1 for all but `HypervolumeWeighting`."""
        return 1.0

    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl says besides the weights themselves."""
        return {}

    def tables(self) -> dict[str, Any]:
        """What metrics.jsonl says that is no single number: names to nested lists of floats."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on exactly, as JSON types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        del state  # nothing learned, nothing saved


class FixedWeighting(Weighting):
    """The recipe's weights, unchanged throughout (`weighting.method: fixed`)."""

    def __init__(self, weights: list[float]) -> None:
        self.weights_K = torch.tensor(weights, dtype=torch.float64)

    def weights(self, progress: float) -> torch.Tensor:
        del progress
        return self.weights_K


class ScheduledWeighting(Weighting):
    """Weights that follow the run's progress (`weighting.method: schedule`).

    Linear between a reward's points, constant before the first and after the last. The progress at hand is all it
    depends on, so there is no state.

    Args:
        weights: the recipe's weight of each reward, for rewards without points.
        points: for each reward None, or its (progress, weight) pairs with progress rising.
    """

    def __init__(self, weights: list[float], points: list[list[tuple[float, float]] | None]) -> None:
        self.curves = [
            tuple(np.array(own or [(0.0, weight)]).T)  # progress of the points, weight at them
            for weight, own in zip(weights, points, strict=True)
        ]

    def weights(self, progress: float) -> torch.Tensor:
        now = [float(np.interp(progress, at, weight)) for at, weight in self.curves]
        return torch.tensor(now, dtype=torch.float64)
