"""A factor on one step's learning rate, taken back after it."""

from types import SimpleNamespace
from typing import Any

import torch

from rlbal.trainers.step_factor import StepFactor


def optimizer() -> torch.optim.Optimizer:
    one, other = (torch.zeros(1, requires_grad=True) for _ in range(2))
    return torch.optim.SGD([{"params": [one], "lr": 0.5}, {"params": [other], "lr": 0.25}])


def rates(of: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in of.param_groups]


def end_step(factor: StepFactor) -> None:
    nothing: Any = SimpleNamespace()
    factor.on_optimizer_step(nothing, nothing, nothing)


def test_once_per_step_for_every_group() -> None:
    some, factor = optimizer(), StepFactor()
    factor.apply(some, 2.0)
    factor.apply(some, 2.0)  # the second micro-batch of the step
    assert rates(some) == [1.0, 0.5]
    end_step(factor)
    assert rates(some) == [0.5, 0.25]
    factor.apply(some, 0.5)
    assert rates(some) == [0.25, 0.125]


def test_a_rate_set_meanwhile_stays() -> None:
    """DeepSpeed steps its schedule inside the backward pass."""
    some, factor = optimizer(), StepFactor()
    factor.apply(some, 2.0)
    some.param_groups[0]["lr"] = 0.4
    end_step(factor)
    assert rates(some) == [0.4, 0.25]


def test_a_step_that_breaks_off_leaves_nothing_behind() -> None:
    some, factor = optimizer(), StepFactor()
    factor.apply(some, 2.0)
    factor.restore()
    assert rates(some) == [0.5, 0.25]
    end_step(factor)
    assert rates(some) == [0.5, 0.25]
