import pytest
import torch

from rlbal.balance.weighting import FixedWeighting, ScheduledWeighting, Weighting


def test_fixed_weights_never_change() -> None:
    weighting = FixedWeighting([1.0, -0.5])
    for progress in (0.0, 0.3, 1.0):
        torch.testing.assert_close(weighting.weights(progress), torch.tensor([1.0, -0.5], dtype=torch.float64))


def test_schedule_by_hand() -> None:
    # First reward: 1 up to 0.2, down to 0 at 0.6 (0.4: halfway, 0.5), up to 3 at 0.8 (0.7: halfway, 1.5), 3 from there.
    weighting = ScheduledWeighting([9.0, 0.25], [[(0.2, 1.0), (0.6, 0.0), (0.8, 3.0)], None])
    expected = {0.0: 1.0, 0.2: 1.0, 0.4: 0.5, 0.6: 0.0, 0.7: 1.5, 0.8: 3.0, 1.0: 3.0}
    for progress, weight in expected.items():
        weights_K = weighting.weights(progress)
        assert weights_K.dtype == torch.float64
        assert weights_K.tolist() == pytest.approx([weight, 0.25], abs=1e-12)


def test_one_point_is_a_constant() -> None:
    weighting = ScheduledWeighting([9.0], [[(0.5, 0.7)]])
    assert [weighting.weights(progress).item() for progress in (0.0, 0.5, 1.0)] == [0.7, 0.7, 0.7]


@pytest.mark.parametrize("weighting", [FixedWeighting([1.0]), ScheduledWeighting([1.0], [[(0.0, 2.0)]])])
def test_what_does_not_learn_has_nothing_to_tell_or_save(weighting: Weighting) -> None:
    before = weighting.weights(0.5)
    weighting.load_state_dict(weighting.state_dict())
    assert (weighting.factor, weighting.metrics(), weighting.tables(), weighting.state_dict()) == (1.0, {}, {}, {})
    assert not hasattr(weighting, "observe")
    assert torch.equal(weighting.weights(0.5), before)
