import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

from rlbal.balance.hypervolume import HypervolumeWeighting, hypervolume, hypervolume_gain, nondominated
from rlbal.errors import RewardError, RunError


def by_inclusion_exclusion(points_SM: np.ndarray) -> float:
    """Volume of a union of boxes: every set of boxes meets in the box of its smallest coordinates."""
    return sum(
        (-1) ** (size + 1) * np.min(chosen, axis=0).prod()
        for size in range(1, len(points_SM) + 1)
        for chosen in itertools.combinations(points_SM, size)
    )


def make(objectives: dict[str, str] | None = None, smoothing: float = 0.0, **ranges: Any) -> HypervolumeWeighting:
    objectives = objectives or {"right": "max", "short": "max"}
    return HypervolumeWeighting(
        [0.5, 0.5], objectives, {name: ranges.get(name, (0.0, 1.0)) for name in objectives}, smoothing
    )


def observed(weighting: HypervolumeWeighting, *points: tuple[float, ...]) -> list[float]:
    factors = []
    for point in points:
        weighting.observe(dict(zip(weighting.objectives, point, strict=True)))
        factors.append(weighting.factor)
    return factors


# The volume


def test_two_boxes_in_the_plane_by_hand() -> None:
    # 0.5 · 0.5 + 0.25 · 0.75 − overlap 0.25 · 0.5 = 0.25 + 0.1875 − 0.125
    assert hypervolume(np.array([[0.5, 0.5], [0.25, 0.75]])) == pytest.approx(0.3125, abs=1e-15)


def test_three_boxes_in_space_by_hand() -> None:
    a, b, c = [0.8, 0.5, 0.5], [0.5, 0.8, 0.5], [0.2, 0.2, 1.0]
    # a = b = 0.2; a ∩ b = 0.5³ = 0.125; c = 0.04, of which 0.2 · 0.2 · 0.5 = 0.02 lies in a, in b and in both
    # a + b + c − ab − ac − bc + abc = 0.2 + 0.2 + 0.04 − 0.125 − 0.02 − 0.02 + 0.02
    assert hypervolume(np.array([a, b, c])) == pytest.approx(0.295, abs=1e-15)


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5, 6])
def test_random_points_against_inclusion_and_exclusion(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    for _ in range(20):
        points_SM = rng.random((7, dimensions))
        assert hypervolume(points_SM) == pytest.approx(by_inclusion_exclusion(points_SM), abs=1e-12)


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5, 6])
def test_gain_is_the_difference_of_two_volumes(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    for _ in range(20):
        points_SM, score_M = rng.random((6, dimensions)), rng.random(dimensions)
        difference = by_inclusion_exclusion(np.vstack([points_SM, score_M])) - by_inclusion_exclusion(points_SM)
        assert hypervolume_gain(points_SM, score_M) == pytest.approx(difference, abs=1e-12)


def test_gain_of_what_is_covered_is_exactly_zero() -> None:
    points_SM = np.array([[0.1 + 0.2, 0.7], [0.6, 0.1]])
    assert hypervolume_gain(points_SM, points_SM[0]) == 0.0
    assert hypervolume_gain(points_SM, np.array([0.3, 0.7])) == 0.0  # below by rounding only
    assert hypervolume_gain(points_SM, np.array([0.3, 0.7 + 1e-13])) == 0.0
    assert hypervolume_gain(points_SM, np.array([0.3, 0.7 + 1e-9])) == pytest.approx(3e-10)
    assert hypervolume_gain(np.empty((0, 2)), np.array([0.5, 0.5])) == 0.25
    assert hypervolume(np.empty((0, 2))) == 0.0


def test_nondominated_points() -> None:
    points_SM = np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.4], [0.6, 0.1], [0.1, 0.1]])
    assert nondominated(points_SM).tolist() == [[0.5, 0.5], [0.6, 0.1]]


# The factor


def test_three_steps_by_hand() -> None:
    weighting = make()
    assert weighting.factor == 1.0
    assert observed(weighting, (0.5, 0.5)) == [1.0]  # nothing to compare with
    # HV 0.3125 after 0.25: ΔHV 0.0625, its own mean, so relative 1
    assert observed(weighting, (0.25, 0.75)) == pytest.approx([0.5 + 1.5 * math.tanh(1)])
    # Covers both: 0.48 − 0.3125 = 0.1675. Mean (0.0625 + 0.1675)/2 = 0.115.
    assert observed(weighting, (0.6, 0.8)) == pytest.approx([0.5 + 1.5 * math.tanh(0.1675 / 0.115)])
    assert weighting.tables() == {"hypervolume/buffer": [[0.6, 0.8]]}
    metrics = weighting.metrics()
    assert metrics["hypervolume/value"] == pytest.approx(0.48)
    assert metrics["hypervolume/delta"] == pytest.approx(0.1675)
    assert metrics["hypervolume/factor"] == weighting.factor
    assert metrics["hypervolume/score/right"] == 0.6
    assert metrics["hypervolume/points"] == 1.0
    # Covered: no gain. The mean falls to 0.23/3, and the next gain of 0.8 · 0.8 − 0.48 = 0.16 makes it 0.39/4.
    assert observed(weighting, (0.6, 0.7), (0.8, 0.8)) == pytest.approx([0.5, 0.5 + 1.5 * math.tanh(0.16 / 0.0975)])


def test_the_weights_stay_fixed() -> None:
    weighting = make()
    observed(weighting, (0.1, 0.2), (0.9, 0.9))
    assert weighting.weights(0.7).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_constant_scores_reach_nothing(smoothing: float) -> None:
    # 0.1 + 0.2 and the like: an average of equal numbers can differ from them in the last bit.
    weighting = make(smoothing=smoothing)
    assert observed(weighting, *[(0.1 + 0.2, 0.7)] * 50) == [1.0] + [0.5] * 49
    assert weighting.metrics()["hypervolume/points"] == 1.0


def test_a_score_at_the_worst_end_has_no_volume() -> None:
    weighting = make()
    assert observed(weighting, (0.5, 0.5), (0.9, 0.0)) == [1.0, 0.5]
    assert weighting.buffer_SM.tolist() == [[0.5, 0.5]]


def test_directions_and_ranges() -> None:
    weighting = make({"right": "max", "tokens": "min"}, right=(-1.0, 3.0), tokens=(0.0, 200.0))
    observed(weighting, (1.0, 50.0))  # (1 + 1)/4 = 0.5; 1 − 50/200 = 0.75
    assert weighting.buffer_SM.tolist() == [[0.5, 0.75]]
    observed(weighting, (1.0, 20.0))  # 1 − 20/200 = 0.9
    assert weighting.buffer_SM.tolist() == [pytest.approx([0.5, 0.9])]
    assert weighting.factor == pytest.approx(0.5 + 1.5 * math.tanh(1))
    observed(weighting, (1.0, 150.0))  # longer is worse
    assert weighting.factor == 0.5


def test_scores_outside_their_range_are_clipped() -> None:
    weighting = make({"right": "max", "tokens": "min"}, tokens=(0.0, 200.0))
    observed(weighting, (1.5, 300.0))
    assert weighting.buffer_SM.tolist() == [[1.0, 0.0]]
    observed(weighting, (-math.inf, -5.0))
    assert weighting.metrics()["hypervolume/score/right"] == 0.0
    assert weighting.metrics()["hypervolume/score/tokens"] == 1.0


def test_smoothing_by_hand() -> None:
    weighting = make(smoothing=0.75)
    observed(weighting, (0.4, 0.4))  # no pull towards 0: the first average is the first score
    assert weighting.metrics()["hypervolume/score/right"] == pytest.approx(0.4)
    observed(weighting, (0.8, 0.4))
    # (0.75 · 0.25 · 0.4 + 0.25 · 0.8) / (1 − 0.75²) = 0.275 / 0.4375
    assert weighting.metrics()["hypervolume/score/right"] == pytest.approx(0.275 / 0.4375)
    assert weighting.metrics()["hypervolume/score/short"] == pytest.approx(0.4)


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5, 6])
def test_random_runs_stay_in_bounds_and_keep_no_dominated_point(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    weighting = make({f"o{m}": "max" for m in range(dimensions)})
    for step in range(150):
        # Coarse scores, so that ties and repeats come up; the front moves outwards.
        point = np.round(rng.random(dimensions) * (0.5 + step / 300), 1)
        (factor,) = observed(weighting, tuple(point.tolist()))
        assert 0.5 <= factor <= 2.0
        buffer_SM = np.array(weighting.buffer_SM.tolist())
        for one, other in itertools.permutations(buffer_SM, 2):
            assert not (other >= one).all()
    assert weighting.metrics()["hypervolume/value"] == pytest.approx(hypervolume(buffer_SM), abs=1e-12)
    assert len(buffer_SM) > 1


# Missing scores


@pytest.mark.parametrize("missing", [None, math.nan])
def test_an_objective_that_was_never_scored(missing: float | None) -> None:
    weighting = make()
    with pytest.raises(RewardError, match=r"`short` of `weighting.objectives` was never scored") as error:
        weighting.observe({"right": 0.5, "short": missing})
    assert "weighting.objectives" in error.value.fix
    with pytest.raises(RewardError, match="short"):
        make().observe({"right": 0.5})


def test_a_score_missing_later_keeps_the_last_one() -> None:
    weighting = make(smoothing=0.5)
    observed(weighting, (0.4, 0.6), (0.4, math.nan))
    assert weighting.metrics()["hypervolume/score/short"] == pytest.approx(0.6)
    observed(weighting, (0.4, 0.9))
    # As if the missing one had not been: (0.5 · 0.5 · 0.6 + 0.5 · 0.9) / 0.75
    assert weighting.metrics()["hypervolume/score/short"] == pytest.approx(0.8)


# State


@pytest.mark.parametrize("smoothing", [0.0, 0.8])
@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_checkpoint_continues_identically(smoothing: float, after: int) -> None:
    points = [tuple(point) for point in np.random.default_rng(0).random((40, 2))]
    first = make(smoothing=smoothing)
    observed(first, *points[:after])
    second = make(smoothing=smoothing)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert (second.factor, second.metrics(), second.tables()) == (first.factor, first.metrics(), first.tables())
    assert observed(second, *points[after:]) == observed(first, *points[after:])
    assert second.state_dict() == first.state_dict()


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(RunError, match=r"weighting\.objectives"):
        make().load_state_dict({})
    with pytest.raises(RunError, match="short"):
        make().load_state_dict(make({"short": "max", "right": "max"}).state_dict())


# Why the paper's form was changed


def improving_run(steps: int = 200) -> np.ndarray:
    """Accuracy 0.5 to 0.8, conciseness 0.4 to 0.6, clarity 0.3 to 0.9, with noise as of 100 prompts."""
    progress_T = np.linspace(0.0, 1.0, steps)[:, None]
    mean_TM = np.array([0.5, 0.4, 0.3]) + progress_T * np.array([0.3, 0.2, 0.6])
    return np.clip(mean_TM + np.random.default_rng(0).normal(0, 0.04, mean_TM.shape), 0, 1)


def paper_factors(scores_TM: np.ndarray) -> list[float]:
    """Raw scores, the first one as the reference point, and the gain itself in the tanh."""
    reference, buffer, factors = scores_TM[0], np.empty((0, scores_TM.shape[1])), []
    for score_M in scores_TM[1:]:
        above = np.maximum(np.vstack([buffer, score_M]) - reference, 0)
        gain = hypervolume(above) - hypervolume(np.maximum(buffer - reference, 0))
        factors.append(0.5 + 1.5 * math.tanh(max(gain, 0.0)))
        if gain > 0:
            buffer = np.vstack([buffer, score_M])
    return factors


def test_the_papers_form_stays_at_one_half_and_ours_does_not() -> None:
    scores_TM = improving_run()
    paper = np.array(paper_factors(scores_TM))
    assert paper.max() < 0.52 and paper.mean() < 0.501

    weighting = make({"right": "max", "short": "max", "clear": "max"})
    ours = np.array(observed(weighting, *[tuple(score) for score in scores_TM])[1:])
    assert ours.max() > 1.9 and ours.std() > 0.3


def test_raw_token_counts_stick_at_two() -> None:
    # Step n is n · 0.3/19 more right and n · 600/19 tokens shorter than the reference, so its gain is 0.5 · (2n − 1),
    # and from n = 3 on the tanh is 0.99 and more.
    accuracy_T, tokens_T = np.linspace(0.5, 0.8, 20), np.linspace(900, 300, 20)
    paper = np.array(paper_factors(np.stack([accuracy_T, -tokens_T], axis=1)))
    assert paper[2:].min() > 1.97

    weighting = make({"right": "max", "tokens": "min"}, tokens=(0.0, 2048.0))
    ours = np.array(observed(weighting, *zip(accuracy_T.tolist(), tokens_T.tolist(), strict=True))[1:])
    assert ours.min() > 1.0 and ours.max() < 1.9
