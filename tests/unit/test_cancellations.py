"""Where a factor on a whole step is cancelled, and where it is not: rewards, advantages, clipping, learning rate.

Beside each cancellation stands the case in which the same factor acts, so that the test can tell the two apart.
"""

from typing import Any

import pytest
import torch

from rlbal.balance.advantages import EPSILON, AdvantageRule, compute_advantages

STEPS = 50
SIZE = 20
LEARNING_RATE = 1e-3


def advantages(rewards_NK: torch.Tensor, scale: str, order: str) -> torch.Tensor:
    group_N = torch.arange(len(rewards_NK)) // 8
    weights_K = torch.tensor([0.7, 0.3])
    return compute_advantages(rewards_NK, group_N, weights_K, AdvantageRule("group", scale, order)).double()


@pytest.mark.parametrize("order", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group_std", "batch_std"])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_dividing_by_the_deviation_cancels_a_factor_on_the_rewards(scale: str, order: str, factor: float) -> None:
    rewards_NK = torch.rand(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups_PNK = rewards_NK.view(8, 8, 2)
    assert min(groups_PNK.std(dim=1).min(), (groups_PNK @ torch.tensor([0.7, 0.3]).double()).std(dim=1).min()) > 0.1
    plain, scaled = advantages(rewards_NK, scale, order), advantages(factor * rewards_NK, scale, order)
    # c/(c·s + ε) against 1/(s + ε): their ratio differs from 1 by at most ε/s·|1 − 1/c| ≤ ε/s, and s is above 0.1.
    # A sum of normalised rewards can be small where its parts are not, so the bound is on the parts, 3 at most.
    torch.testing.assert_close(scaled, plain, rtol=0, atol=3 * EPSILON / 0.1)
    without = advantages(rewards_NK, "none", order), advantages(factor * rewards_NK, "none", order)
    torch.testing.assert_close(without[1], factor * without[0])


def gradients(steps: int = STEPS) -> list[torch.Tensor]:
    """A fixed sequence of gradients with a drift and noise, as a training run has."""
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return [drift + torch.randn(SIZE, generator=generator, dtype=torch.float64) for _ in range(steps)]


def path(factors: list[float], on: str, optimizer: Any = torch.optim.Adam, clip: float | None = None) -> torch.Tensor:
    """Update of every step, with step t's gradient or learning rate multiplied by factors[t]: (T, SIZE)."""
    parameter = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    rule, updates = optimizer([parameter], lr=LEARNING_RATE), []
    for gradient, factor in zip(gradients(len(factors)), factors, strict=True):
        before = parameter.detach().clone()
        parameter.grad = gradient * (factor if on == "gradient" else 1.0)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([parameter], clip)
        rule.param_groups[0]["lr"] = LEARNING_RATE * (factor if on == "learning_rate" else 1.0)
        rule.step()
        updates.append(parameter.detach() - before)
    return torch.stack(updates)


ONES, TWOS = [1.0] * STEPS, [2.0] * STEPS


def test_adam_cancels_a_constant_factor_on_the_gradient() -> None:
    # Adam divides by |g| + 1e-8, so the factor changes a step by about 1e-8/|g|; rounding adds 1e-17 of a position.
    torch.testing.assert_close(path(TWOS, "gradient"), path(ONES, "gradient"), rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(path(TWOS, "gradient", torch.optim.SGD), 2 * path(ONES, "gradient", torch.optim.SGD))


def test_adam_nearly_cancels_a_slow_factor_on_the_gradient() -> None:
    steps = 4000
    rising = [1 + step / steps for step in range(steps)]  # slow beside Adam's memory of 1,000 steps
    plain, on_gradient, on_rate = (
        path(factors, on)[-200:].norm()  # the factor is 1.95 to 2 here
        for factors, on in (([1.0] * steps, "gradient"), (rising, "gradient"), (rising, "learning_rate"))
    )
    assert on_gradient / plain < 1.2
    assert on_rate / plain > 1.9


def test_clipping_cancels_a_factor_on_the_gradient() -> None:
    # Each norm is above 2, so that all are cut to 1 with or without the factor; clip_grad_norm_ itself adds 1e-6.
    assert min(gradient.norm().item() for gradient in gradients()) > 2
    clipped = path(ONES, "gradient", torch.optim.SGD, clip=1.0)
    torch.testing.assert_close(path(TWOS, "gradient", torch.optim.SGD, clip=1.0), clipped, rtol=1e-6, atol=1e-14)
    above = path(TWOS, "gradient", torch.optim.SGD, clip=1e6)
    torch.testing.assert_close(above, 2 * path(ONES, "gradient", torch.optim.SGD, clip=1e6))


@pytest.mark.parametrize("factor", [0.5, 1.642, 2.0])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_factor_on_the_learning_rate_scales_that_step_and_no_other(factor: float, clip: float | None) -> None:
    at = 9
    plain_TN = path(ONES, "learning_rate", clip=clip)
    scaled_TN = path([*ONES[:at], factor, *ONES[at + 1 :]], "learning_rate", clip=clip)
    expected_TN = plain_TN.clone()
    expected_TN[at] *= factor  # the steps after it are as they were: Adam's moments know nothing of the rate
    assert plain_TN[at].abs().min() > LEARNING_RATE / 1000
    torch.testing.assert_close(scaled_TN, expected_TN, rtol=1e-10, atol=1e-16)
