"""The critic's loss: worked out by hand."""

import math

import pytest
import torch

from rlbal.balance.gae import masked_moments
from rlbal.balance.value_loss import clipped_value_loss, explained_variance

# Every case with V_old = 0.5, ε = 0.2 (so clip(V) in [0.3, 0.7]): value, return, half the larger square, slope in V.
CASES = [
    # near: clip(V) = 0.6; 0.5 (0.6 - 1)² = 0.08
    (0.6, 1.0, 0.08, 0.6 - 1.0),
    # gone too far towards the return: 0.5 (0.7 - 1)² = 0.045 rather than 0.5 (0.9 - 1)² = 0.005, and no slope
    (0.9, 1.0, 0.045, 0.0),
    # gone far away from it: 0.5 (0.1 - 1)² = 0.405 rather than 0.5 (0.3 - 1)² = 0.245
    (0.1, 1.0, 0.405, 0.1 - 1.0),
    # past it: 0.5 (1.3 - 0.8)² = 0.125 rather than 0.5 (0.7 - 0.8)² = 0.005
    (1.3, 0.8, 0.125, 1.3 - 0.8),
]


@pytest.mark.parametrize(("value", "target", "loss", "slope"), CASES)
def test_one_token_by_hand(value, target, loss, slope):
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([[0.5]]), torch.tensor([[target]], dtype=torch.float64)
    found, clipped = clipped_value_loss(values, old, returns, torch.ones(1, 1).bool(), 0.2, 1.0)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(slope)
    assert clipped.item() == (slope == 0)


def batch():
    values, targets, _, _ = (torch.tensor(column) for column in zip(*CASES, strict=True))
    return values.view(2, 2), torch.full((2, 2), 0.5), targets.view(2, 2)


def test_tokens_outside_the_mask_do_not_count():
    values, old, returns = batch()
    mask = torch.tensor([[True, True], [False, True]])
    values[1, 0] = math.nan
    loss, clipped = clipped_value_loss(values, old, returns, mask, 0.2, mask.sum())
    assert loss.item() == pytest.approx((0.08 + 0.045 + 0.125) / 3)
    assert clipped.item() == 1


def test_parts_that_share_their_normaliser_add_up_to_the_whole():
    values, old, returns = batch()
    mask = torch.ones(2, 2, dtype=torch.bool)
    whole, _ = clipped_value_loss(values, old, returns, mask, 0.2, 4)
    parts = [clipped_value_loss(*(one[[row]] for one in (values, old, returns, mask)), 0.2, 4)[0] for row in (0, 1)]
    assert whole.item() == pytest.approx(sum(parts).item()) == pytest.approx((0.08 + 0.045 + 0.405 + 0.125) / 4)


def test_without_a_clip_it_is_the_plain_square():
    values, old, returns = batch()
    loss, clipped = clipped_value_loss(values, old, returns, torch.ones(2, 2).bool(), None, 4)
    assert loss.item() == pytest.approx(0.5 * (0.16 + 0.01 + 0.81 + 0.25) / 4)
    assert clipped.item() == 0


def explained(values, returns):
    values, returns = torch.tensor([values], dtype=torch.float64), torch.tensor([returns], dtype=torch.float64)
    mask = torch.ones_like(values, dtype=torch.bool)
    return explained_variance(masked_moments(returns, mask), masked_moments(returns - values, mask))


def test_explained_variance_by_hand():
    returns = [0.0, 1.0, 2.0, 3.0]  # variance 1.25
    assert explained(returns, returns) == 1
    assert explained([5.0] * 4, returns) == pytest.approx(0)  # a constant explains nothing, wherever it lies
    # Errors 0, 0, 1, 1: variance 0.25, of 1.25.
    assert explained([0.0, 1.0, 1.0, 2.0], returns) == pytest.approx(0.8)
    # Worse than a constant: errors -3, -1, 1, 3 have the variance 5.
    assert explained([3.0, 2.0, 1.0, 0.0], returns) == pytest.approx(-3)
    assert math.isnan(explained([0.0, 1.0], [0.1, 0.1]))
