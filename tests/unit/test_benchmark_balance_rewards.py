"""The figures of benchmarks/balance_rewards, on runs made by hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "benchmarks/balance_rewards/analysis.py"
spec = importlib.util.spec_from_file_location("balance_rewards_analysis", FILE)
assert spec is not None and spec.loader is not None
analysis = importlib.util.module_from_spec(spec)
spec.loader.exec_module(analysis)


def run(correct: float, form: float, concise: float, **more) -> dict:
    return {"correct": correct, "format": form, "concise": concise, "hypervolume": correct * form * concise, **more}


def test_smoothing_by_hand() -> None:
    """1 and 0 with 0.9 of the old: the second average is 0.9 · 0.1 · 1 over the weights 0.9 · 0.1 + 0.1 = 0.19."""
    assert analysis.smooth(np.array([1.0, 0.0])).tolist() == pytest.approx([1.0, 0.09 / 0.19])
    assert analysis.smooth(np.array([0.3] * 5)).tolist() == pytest.approx([0.3] * 5)


def test_steps_count_from_one_and_may_never_get_there() -> None:
    assert analysis.steps_to([0.1, 0.3, 0.2], 0.3) == 2
    assert analysis.steps_to([0.1, 0.3, 0.2], 0.31) is None


def test_dominance_needs_one_gain_and_no_loss() -> None:
    assert analysis.dominates(run(0.5, 0.9, 0.8), run(0.4, 0.9, 0.8))
    assert not analysis.dominates(run(0.5, 0.9, 0.8), run(0.5, 0.9, 0.8))
    assert not analysis.dominates(run(0.9, 0.9, 0.79), run(0.4, 0.9, 0.8))


def test_the_best_arms_by_mean_hypervolume() -> None:
    arms = {
        "a": {0: run(0.5, 1, 1), 1: run(0.1, 1, 1)},  # 0.3
        "b": {0: run(0.4, 1, 1), 1: run(0.4, 1, 1)},  # 0.4
        "c": {0: run(0.2, 1, 1), 1: run(0.2, 1, 1)},
    }
    assert analysis.best_arms(arms, ("a", "b", "c"), 2) == ["b", "a"]


def test_differences_are_paired_by_seed_and_corrected_over_arms() -> None:
    """Differences 0.1 and 0.3: mean 0.2, s/√2 = 0.1, t(0.975, 1) = 12.706; with t = 2, p = 1 − 2/π · atan 2."""
    arms = {
        "fixed": {0: run(0.1, 1, 1), 1: run(0.2, 1, 1), 2: run(0.9, 1, 1)},
        "a": {0: run(0.2, 1, 1), 1: run(0.5, 1, 1)},
        "b": {0: run(0.1, 1, 1), 1: run(0.2, 1, 1)},
    }
    found = analysis.differences(arms, [("a", "fixed"), ("b", "fixed")])
    one = found["a - fixed"]["correct"]
    p = 1 - 2 / np.pi * np.arctan(2)
    assert one["by_seed"] == pytest.approx({"0": 0.1, "1": 0.3})
    assert [one["mean"], one["low"], one["high"]] == pytest.approx([0.2, 0.2 - 1.2706, 0.2 + 1.2706], abs=1e-4)
    assert one["p"] == pytest.approx(p) and one["p_holm"] == pytest.approx(p)  # `b` has no spread, so no second test
    assert found["b - fixed"]["correct"]["mean"] == 0


def test_the_mark_is_what_fixed_ends_with() -> None:
    more = {"hypervolume_reached": 0.5, "tokens": 20.0, "grad_norm_variation": 0.1, "tokens_generated": 9}
    more |= {"rollouts": 128, "weights": {"correct": 0.3, "format": 0.3, "concise": 0.4}}
    arms = {
        "fixed": {0: run(0.4, 1, 1, smoothed=[0.1, 0.4], **more), 1: run(0.2, 1, 1, smoothed=[0.1, 0.2], **more)},
        "a": {0: run(0.5, 1, 1, smoothed=[0.31, 0.5], **more), 1: run(0.1, 1, 1, smoothed=[0.0, 0.1], **more)},
    }
    summary = analysis.summarise(arms)
    assert summary["a"]["mark"] == pytest.approx(0.3)
    assert summary["a"]["steps_to_mark"] == {"0": 1, "1": None}
    assert (summary["a"]["dominates_fixed"], summary["a"]["dominated_by_fixed"]) == (1, 1)
    assert summary["a"]["correct"]["mean"] == pytest.approx(0.3)
