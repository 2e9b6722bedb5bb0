"""The Beta density of BNPO and its parameters."""

import math

import pytest
import torch

from rlbal.balance.normalization import beta_density, beta_parameters, to_unit_interval


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_parameters_by_hand():
    # m = 0.375, v = (0.125^2 + 0.125^2) / 2 = 0.015625, m (1 - m) / v - 1 = 0.234375 / 0.015625 - 1 = 14.
    # a = 14 * 0.375 = 5.25, b = 14 * 0.625 = 8.75; alpha = 1 + 1.75, beta = 1 + 8.75 / 3.
    assert beta_parameters(tensor(0.5, 0.25)) == pytest.approx((2.75, 1 + 8.75 / 3))


@pytest.mark.parametrize(
    "p_P",
    [
        tensor(0.3),  # one prompt: no variance to speak of
        tensor(0.3, 0.3, 0.3),
        tensor(*[14 / 15] * 33),  # equal, but their mean is not: rounding would give alpha = 1e30
        tensor(0.0, 1.0, 1.0),  # v = m (1 - m): a = b = 0
        tensor(0.0, 0.0),
    ],
)
def test_without_a_spread_to_measure_it_is_reinforce(p_P):
    assert beta_parameters(p_P) == pytest.approx((1.0, 1.0), abs=1e-9)


def test_parameters_never_fall_below_one():
    """Where prompts succeed always or never, v = m (1 - m), and rounding alone decides the sign of a and b."""
    for successes in range(40):
        p_P = tensor(*[1.0] * successes, *[0.0] * (40 - successes))
        assert min(beta_parameters(p_P)) >= 1.0


def test_density_by_hand():
    # Beta(2, 3) has B = 1! 2! / 4! = 1 / 12: f(p) = 12 p (1 - p)^2.
    assert beta_density(tensor(0.5, 0.25), 2.0, 3.0).tolist() == pytest.approx([1.5, 12 * 0.25 * 0.5625])
    # Beta(3/2, 3/2): B = Gamma(3/2)^2 / Gamma(3) = (pi / 4) / 2 = pi / 8; f(1/2) = (1/2) / (pi / 8).
    assert beta_density(tensor(0.5), 1.5, 1.5).item() == pytest.approx(4 / math.pi)
    assert beta_density(tensor(0.1, 0.9), 1.0, 1.0).tolist() == pytest.approx([1.0, 1.0])


def test_density_integrates_to_one():
    steps = 20_000
    p = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    assert beta_density(p, 2.75, 1 + 8.75 / 3).mean().item() == pytest.approx(1.0, abs=1e-6)


def test_ranges_map_to_the_unit_interval():
    rewards_NK = torch.tensor([[-1.0, 0.0], [1.0, 5.0], [math.nan, 10.0], [0.0, math.nan]], dtype=torch.float64)
    unit_NK = to_unit_interval(rewards_NK, torch.tensor([[-1.0, 1.0], [0.0, 10.0]], dtype=torch.float64))
    torch.testing.assert_close(
        unit_NK, torch.tensor([[0.0, 0.0], [1.0, 0.5], [math.nan, 1.0], [0.5, math.nan]]).double(), equal_nan=True
    )
