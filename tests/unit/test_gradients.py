"""Weights that follow gradients: the update by hand, and that nothing takes them off the simplex."""

import json
import math

import pytest
import torch

from rlbal.balance.gradients import (
    GradientWeighting,
    add_projection_gradients,
    bounded,
    exponentiated_gradient,
    influence,
)

ALL = torch.tensor([True, True, True])


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_projection_gradients_are_sums_of_outer_products() -> None:
    x, u = torch.randn(5, 3), torch.randn(5, 2)
    coefficients = torch.randn(5, 4)
    found = torch.ones(4, 2, 3)
    add_projection_gradients(found, x, u, coefficients)
    for k in range(4):
        expected = sum(coefficients[t, k] * torch.outer(u[t], x[t]) for t in range(5))
        torch.testing.assert_close(found[k], 1 + expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_small_weights(dtype: torch.dtype) -> None:
    """A token among a million weighs 1e-6, which float16 has no digits for; what is left is the rounding of x and u."""
    x, u = torch.randn(200, 3), torch.randn(200, 2) / 64
    coefficients = torch.full((200, 1), 1e-6)
    found = torch.zeros(1, 2, 3)
    add_projection_gradients(found, x.to(dtype), u, coefficients)
    expected = 1e-6 * u.T @ x.to(dtype).float()
    assert (found[0] - expected).abs().max() < 0.02 * expected.abs().max()


def test_influence_by_hand() -> None:
    """g = (1, 0), (0, 2), (-1, 1): Gram ((1, 0, -1), (0, 4, 2), (-1, 2, 2)).

    As they are, the rows add up to 0, 6 and 3. The mean square length is 7/3, so (0, 18/7, 9/7). As cosines,
    G_13 = -1/√2 and G_23 = 2/(2√2) = 1/√2: rows 1 - 1/√2, 1 + 1/√2, 1.
    """
    gram = tensor([[1, 0, -1], [0, 4, 2], [-1, 2, 2]])
    assert influence(gram, ALL, "none").tolist() == [0, 6, 3]
    assert influence(gram, ALL, "mean").tolist() == pytest.approx([0, 18 / 7, 9 / 7])
    root = 1 / math.sqrt(2)
    assert influence(gram, ALL, "unit").tolist() == pytest.approx([1 - root, 1 + root, 1])


def test_the_update_by_hand() -> None:
    """Equal weights, influences 0, ln 2 / s and ln 3 / s: shares 1 : 2 : 3 of 6."""
    start, step = tensor([1 / 3, 1 / 3, 1 / 3]), 0.1
    moved = exponentiated_gradient(start, tensor([0, math.log(2) / step, math.log(3) / step]), ALL, step)
    assert moved.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_a_reward_without_signal_keeps_its_weight() -> None:
    """The others share 0.5 as 1 : 3."""
    active = torch.tensor([False, True, True])
    moved = exponentiated_gradient(tensor([0.5, 0.25, 0.25]), tensor([0, 0, math.log(3)]), active, 1.0)
    assert moved.tolist() == pytest.approx([0.5, 0.125, 0.375])


def test_bounds_by_hand() -> None:
    """0.02 rises to the floor of 0.1; the other two share 0.9 as 0.28 : 0.7. With a cap of 0.6 the largest stops there
    and 0.3 is left for the second."""
    assert bounded(tensor([0.02, 0.28, 0.7]), ALL, 0.1, 1.0).tolist() == pytest.approx(
        [0.1, 0.9 * 0.28 / 0.98, 0.9 * 0.7 / 0.98]
    )
    assert bounded(tensor([0.02, 0.28, 0.7]), ALL, 0.1, 0.6).tolist() == pytest.approx([0.1, 0.3, 0.6])


HOSTILE = [0.0, -0.0, 1e-300, -1.0, 1.0, 1e3, -1e8, 1e300, -1e300, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("scale", ["none", "mean", "unit"])
@pytest.mark.parametrize(("floor", "cap"), [(0.0, 1.0), (0.05, 1.0), (0.1, 0.5), (1 / 3, 1.0), (0.0, 1 / 3)])
def test_weights_stay_on_the_simplex_under_any_gram_matrix(scale: str, floor: float, cap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weighting = GradientWeighting([1.0, 0.5, 0.2], ["a", "b", "c"], 0.5, floor, cap, scale)
    for _ in range(300):
        picks = torch.randint(len(HOSTILE), (3, 3), generator=generator)
        gram = tensor([[HOSTILE[value] for value in row] for row in picks.tolist()])
        weighting.observe(gram)
        weights = weighting.weights(0.0)
        assert weights.isfinite().all() and weights.sum().item() == pytest.approx(1.0, abs=1e-12)
        assert (weights >= floor - 1e-12).all() and (weights <= cap + 1e-12).all()
        assert (weights > 0).all(), "a weight of 0 could never come back"


def test_what_is_not_finite_moves_nothing() -> None:
    weighting = GradientWeighting([1, 1, 1], ["a", "b", "c"], 1.0)
    before = weighting.weights(0.0).tolist()
    for bad in (math.nan, math.inf, -math.inf):
        weighting.observe(tensor([[1, 0, 0], [0, bad, 0], [0, 0, 1]]))
        assert weighting.weights(0.0).tolist() == before
    weighting.observe(tensor([[1, 0, 0], [0, 2, 0], [0, 0, 1]]))
    assert weighting.weights(0.0).tolist() != before


def test_a_constant_reward_moves_nobody() -> None:
    """Two rewards of which one is constant: nothing is left to compare, and nothing moves."""
    weighting = GradientWeighting([0.7, 0.3], ["a", "b"], 1.0)
    weighting.observe(tensor([[5, 0], [0, 0]]))
    assert weighting.weights(0.0).tolist() == pytest.approx([0.7, 0.3])
    assert weighting.metrics() == {"influence/a": 5.0, "influence/b": 0.0}


def test_a_weight_of_zero_stays_and_has_no_say() -> None:
    with_it = GradientWeighting([1, 1, 0], ["a", "b", "logged"], 1.0)
    without = GradientWeighting([1, 1], ["a", "b"], 1.0)
    with_it.observe(tensor([[1, 0.5, 9], [0.5, 3, 9], [9, 9, 100]]))
    without.observe(tensor([[1, 0.5], [0.5, 3]]))
    assert with_it.weights(0.0).tolist() == pytest.approx([*without.weights(0.0).tolist(), 0.0])


def test_opposed_rewards() -> None:
    """Two that pull against each other, and one of their strength that pulls with the first: the second loses."""
    gram = tensor([[1, -1, 1], [-1, 1, -1], [1, -1, 1]])
    weighting = GradientWeighting([1, 1, 1], ["a", "b", "c"], 0.1)
    for _ in range(50):
        weighting.observe(gram)
    a, b, c = weighting.weights(0.0).tolist()
    assert a == pytest.approx(c) and b < 0.01


def test_a_resumed_recipe_may_log_a_reward_only_or_raise_the_floor() -> None:
    first = GradientWeighting([1, 1, 2], ["a", "b", "c"], 0.3)
    other = GradientWeighting([1, 1, 0], ["a", "b", "c"], 0.3, floor=0.3)
    other.load_state_dict(first.state_dict())
    assert other.weights(0.0).tolist() == pytest.approx([0.5, 0.5, 0.0])
    higher = GradientWeighting([1, 1, 2], ["a", "b", "c"], 0.3, floor=0.3)
    higher.load_state_dict(first.state_dict())
    assert higher.weights(0.0).tolist() == pytest.approx([0.3, 0.3, 0.4])


def test_state_survives_a_checkpoint() -> None:
    first = GradientWeighting([1, 2, 3], ["a", "b", "c"], 0.3)
    copy = GradientWeighting([1, 2, 3], ["a", "b", "c"], 0.3)
    copy.load_state_dict(json.loads(json.dumps(first.state_dict()).replace("NaN", "null")))
    assert math.isnan(copy.metrics()["influence/a"])
    gram = tensor([[1, 0.2, 0], [0.2, 2, 0.1], [0, 0.1, 3]])
    first.observe(gram)
    copy.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert copy.metrics() == first.metrics() and copy.tables() == first.tables()
    for weighting in (first, copy):
        weighting.observe(gram)
    assert copy.weights(0.0).tolist() == first.weights(0.0).tolist()
