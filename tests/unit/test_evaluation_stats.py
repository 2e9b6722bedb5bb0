"""pass@k, means and bootstrap intervals against hand-worked values and brute force."""

from itertools import combinations

import numpy as np
import pytest

from rlbal.scoring_stats import averages, bootstrap_intervals, left_out, mean_without_nan, pass_at_k, per_prompt

NAN = float("nan")


def test_pass_at_k_by_hand() -> None:
    samples, solved = np.array([4, 4, 4, 4, 1]), np.array([0, 1, 2, 3, 1])
    # 1 − C(4,2)/C(4,2); 1 − C(3,2)/C(4,2) = 1 − 3/6; 1 − C(2,2)/6 = 5/6; C(1,2) = 0; one sample cannot say pass@2.
    np.testing.assert_allclose(pass_at_k(samples, solved, 2), [0, 0.5, 5 / 6, 1, NAN], rtol=1e-15)
    np.testing.assert_allclose(pass_at_k(samples, solved, 1), [0, 0.25, 0.5, 0.75, 1], rtol=1e-15)
    np.testing.assert_allclose(pass_at_k(samples, solved, 4), [0, 1, 1, 1, NAN], rtol=1e-15)


def test_pass_at_k_is_the_share_of_subsets_with_a_solved_sample() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        outcomes = rng.random(rng.integers(1, 9)) < rng.random()
        k = int(rng.integers(1, len(outcomes) + 1))
        share = np.mean([any(subset) for subset in combinations(outcomes.tolist(), k)])
        estimate = pass_at_k(np.array([len(outcomes)]), np.array([outcomes.sum()]), k)
        assert estimate[0] == pytest.approx(share, abs=1e-12)


def test_pass_at_k_stays_exact_for_many_samples() -> None:
    # 1 − C(999, 500)/C(1000, 500) = 1 − 500/1000.
    assert pass_at_k(np.array([1000]), np.array([1]), 500)[0] == pytest.approx(0.5, abs=1e-12)


def test_per_prompt_by_hand() -> None:
    """Two prompts, three samples; the success reward ranges over [−1, 1], so 0 maps to 0.5: half marks, not solved."""
    rewards_PSK = np.array(
        [
            [[1.0, 10.0], [0.0, NAN], [-1.0, 30.0]],  # mapped 1, 0.5, 0: one of three solved
            [[NAN, NAN], [-0.2, NAN], [NAN, NAN]],  # one scored sample, mapped 0.4: not solved
        ]
    )
    columns = per_prompt(
        rewards_PSK,
        lengths_PS=np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 7.0]]),
        truncated_PS=np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        names=["correct", "style"],
        success="correct",
        success_range=(-1.0, 1.0),
        pass_at=[1, 2],
    )
    expected = {
        "pass@1": [1 / 3, 0.0],
        "pass@2": [2 / 3, NAN],  # 1 − C(2,2)/C(3,2) = 2/3; the second prompt has one sample only
        "mean@3": [0.5, 0.4],
        "reward/correct": [0.0, -0.2],
        "reward/style": [20.0, NAN],
        "length/mean": [2.0, 5.0],
        "length/truncated": [1 / 3, 0.0],
    }
    assert list(columns) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values, rtol=1e-12, err_msg=name)
    assert left_out(columns) == {"pass@2": 1, "reward/style": 1}
    means = averages(columns)
    assert means["pass@1"] == pytest.approx(1 / 6)
    assert means["pass@2"] == pytest.approx(2 / 3)
    assert means["reward/style"] == 20.0


def test_mean_without_nan_of_nothing_is_nan_and_silent(recwarn: pytest.WarningsRecorder) -> None:
    assert np.isnan(mean_without_nan(np.array([NAN, NAN])))
    assert not recwarn.list


def test_bootstrap_of_two_prompts_by_hand() -> None:
    """Two prompts with 0 and 1 give means 0, ½, 1 with chances ¼, ½, ¼: the 2.5 and 97.5 % points are 0 and 1."""
    assert bootstrap_intervals({"m": np.array([0.0, 1.0])}, seed=0) == {"m": (0.0, 1.0)}


def test_bootstrap_width_is_that_of_the_normal_approximation() -> None:
    """100 prompts, half of them solved: ±1.96·√(0.25/100) = ±0.098, in steps of 0.01."""
    low, high = bootstrap_intervals({"m": np.repeat([0.0, 1.0], 50)}, seed=1, resamples=4000)["m"]
    assert low == pytest.approx(0.402, abs=0.0151)
    assert high == pytest.approx(0.598, abs=0.0151)


def test_bootstrap_resamples_the_same_prompts_for_every_metric() -> None:
    values = np.random.default_rng(2).random(30)
    intervals = bootstrap_intervals({"m": values, "shifted": values + 5}, seed=3)
    assert intervals["shifted"] == pytest.approx(tuple(end + 5 for end in intervals["m"]))


def test_bootstrap_leaves_nan_out_and_knows_when_there_is_nothing_to_resample() -> None:
    columns = {"some": np.array([1.0, NAN, 1.0]), "one": np.array([NAN, 1.0, NAN])}
    intervals = bootstrap_intervals(columns, seed=0)
    assert intervals["some"] == (1.0, 1.0)
    assert all(np.isnan(intervals["one"]))


def test_bootstrap_is_reproducible_by_seed() -> None:
    columns = {"m": np.random.default_rng(0).random(20)}
    assert bootstrap_intervals(columns, seed=7) == bootstrap_intervals(columns, seed=7)
    assert bootstrap_intervals(columns, seed=7) != bootstrap_intervals(columns, seed=8)
