"""The figures of benchmarks/balance_rollouts, on runs made by hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from rlbal.run import append_jsonl
from tests.finished_runs import finished_run

FILE = Path(__file__).parents[2] / "benchmarks/balance_rollouts/analysis.py"
spec = importlib.util.spec_from_file_location("balance_rollouts_analysis", FILE)
assert spec is not None and spec.loader is not None
analysis = importlib.util.module_from_spec(spec)
spec.loader.exec_module(analysis)


def test_smoothing_looks_back_only() -> None:
    assert analysis.trailing_mean([1, 2, 6, 1], window=3).tolist() == pytest.approx([1, 1.5, 3, 3])


def test_the_mark_is_found_between_two_points() -> None:
    """From 0.2 at 100 to 0.6 at 200, 0.3 is a quarter of the way."""
    assert analysis.rollouts_to([0, 100, 200], [0.1, 0.2, 0.6], 0.3) == pytest.approx(125)
    assert analysis.rollouts_to([0, 100, 200], [0.1, 0.2, 0.1], 0.2) == pytest.approx(100)
    assert analysis.rollouts_to([0, 100], [0.4, 0.2], 0.3) == 0
    assert analysis.rollouts_to([0, 100], [0.1, 0.2], 0.3) is None


def a_run(rollouts: list[float], correct: list[float]) -> dict:
    return {"correct": correct[-1], "curve": {"rollouts": rollouts, "correct": correct}}


def test_rollouts_to_the_mark_by_mean_curve_and_by_seed() -> None:
    """Uniform ends at 0.4 and 0.6, on average 0.5. The arm's curves average to 0, 0.4, 0.6: across at 150."""
    at = [0.0, 100.0, 200.0]
    runs = {
        "uniform": {0: a_run(at, [0.0, 0.2, 0.4]), 1: a_run(at, [0.0, 0.2, 0.6])},
        "arm": {0: a_run(at, [0.0, 0.4, 0.7]), 1: a_run(at, [0.0, 0.4, 0.5])},
    }
    found = analysis.rollouts_to_mark(runs, "uniform")
    assert found["uniform"] == {"mean_curve": 200.0, "by_seed": {"0": 200.0, "1": 200.0}}
    assert found["arm"]["mean_curve"] == pytest.approx(150)
    assert found["arm"]["by_seed"] == {"0": pytest.approx(100), "1": None}


def test_differences_are_paired_and_corrected_over_the_pairs_that_have_runs() -> None:
    """Differences 0.1 and 0.3: mean 0.2, s/√2 = 0.1, t(0.975, 1) = 12.706; with t = 2, p = 1 − 2/π · atan 2 = 0.295."""
    runs = {
        "a": {0: {"correct": 0.1}, 1: {"correct": 0.2}, 2: {"correct": 0.9}},
        "b": {0: {"correct": 0.2}, 1: {"correct": 0.5}},
        "c": {0: {"correct": 0.4}, 1: {"correct": 0.9}},
    }
    found = analysis.differences(runs, [("b", "a"), ("c", "a"), ("absent", "a")], {"correct": "up"})
    assert list(found) == ["b - a", "c - a"]
    one, p = found["b - a"]["correct"], 1 - 2 / np.pi * np.arctan(2)
    assert one["by_seed"] == pytest.approx({"0": 0.1, "1": 0.3})
    assert [one["mean"], one["low"], one["high"]] == pytest.approx([0.2, 0.2 - 1.2706, 0.2 + 1.2706], abs=1e-4)
    # c - a: 0.3 and 0.7, t = 0.5/0.2 = 2.5, so p = 0.242 is the smaller one and is doubled; p of b - a is below that.
    assert one["p"] == pytest.approx(p)
    assert one["p_holm"] == pytest.approx(2 * (1 - 2 / np.pi * np.arctan(2.5)))
    assert one["verdict"] == "no difference shown"


def test_ratios_are_geometric_means() -> None:
    """Ratios 2 and 8: the logarithms are ln 2 and 3 ln 2, their mean 2 ln 2 = ln 4."""
    runs = {"a": {0: {"x": 2.0}, 1: {"x": 8.0}}, "b": {0: {"x": 1.0}, 1: {"x": 1.0}}}
    one = analysis.ratios(runs, [("a", "b")], ["x"])["a - b"]["x"]
    assert one["mean"] == pytest.approx(4)
    assert one["by_seed"] == pytest.approx({"0": 2, "1": 8})
    assert one["low"] * one["high"] == pytest.approx(16)  # symmetric about the mean, as a ratio


def test_the_best_value_by_mean_correctness() -> None:
    runs = {"a": {0: {"correct": 0.5}, 1: {"correct": 0.1}}, "b": {0: {"correct": 0.4}, 1: {"correct": 0.3}}}
    assert analysis.best_arm({**runs, "c": {0: {"correct": 0.9}}}, ("a", "b")) == "b"


def with_lines(path: Path, steps: list[dict], evaluations: list[dict]) -> Path:
    """A finished run with other records."""
    run = finished_run(path)
    for file, lines in ((run.metrics_path, steps), (run.evaluations_path, evaluations)):
        file.unlink()
        for line in lines:
            append_jsonl(file, line)
    return path


def a_step(step: int, **more) -> dict:
    zeros = [[0, 0]] * 11
    plain = {
        "step": step,
        "rollouts": 8 * step,
        "tokens_generated": 100 * step,
        "effective_gradient_ratio": 0.5,
        "reward/correct/mean": 0.25,
        "length/mean": 12.5,
        "budget/tokens": None,
        "allocation/by_rate": [[1, 2], *zeros[1:]],
        "allocation/by_success": [*zeros[1:], [1, 6]],
        "time/allocate": 0.01,
        "time/generate": 0.05,
        "time/train": 0.04,
    }
    return {**plain, **more}


def test_the_figures_of_an_allocation_run(tmp_path) -> None:
    """Correct 0, 0.3, 0.6 and 0.9: smoothed, the last is the mean of three, 0.6. Allocating: 10 of 100 ms a step."""
    evaluations = [
        {
            "step": step,
            "rollouts": 8 * step,
            "metrics": {"pass@1": correct},
            "by_difficulty": {"2": {"metrics": {"pass@1": correct}}},
        }
        for step, correct in enumerate([0.0, 0.3, 0.6, 0.9])
    ]
    steps = [a_step(1, effective_gradient_ratio=0.2), a_step(2, effective_gradient_ratio=0.4)]
    found = analysis.allocation_run(with_lines(tmp_path / "run", steps, evaluations))
    assert found["correct"] == pytest.approx(0.6)
    assert found["curve"] == {"rollouts": [0, 8, 16, 24], "correct": pytest.approx([0, 0.15, 0.3, 0.6])}
    assert found["by_difficulty"] == {"2": pytest.approx(0.6)}
    assert found["effective_gradient_ratio"] == pytest.approx(0.3)
    assert found["by_rate"][0] == [2, 4] and found["by_success"][10] == [2, 12]
    assert found["allocate_ms"] == pytest.approx(10) and found["allocate_share"] == pytest.approx(0.1)
    assert (found["rollouts"], found["tokens_generated"]) == (16, 200)


def test_shares_add_up_over_seeds() -> None:
    runs = {"arm": {0: {"by_rate": [[1, 2], [0, 0]]}, 1: {"by_rate": [[1, 4], [2, 8]]}}}
    assert analysis.shares(runs, "by_rate") == {"arm": [[2, 6], [2, 8]]}


def test_the_figures_of_a_budget_run(tmp_path) -> None:
    steps = [a_step(1, **{"budget/tokens": 64.0}), a_step(2, **{"budget/tokens": 32.0, "time/generate": 0.15})]
    path = with_lines(tmp_path / "run", steps, [])
    metrics = {"pass@1": 0.5, "length/mean": 40.0, "budget/pass@1": 0.4, "budget/length/mean": 30.0}
    found = analysis.budget_run(path, {"metrics": {**metrics, "budget/length/truncated": 0.1}})
    assert (found["correct"], found["tokens"], found["free_correct"], found["free_tokens"]) == (0.4, 30.0, 0.5, 40.0)
    assert found["last_budget"] == 32 and found["tokens_generated"] == 200
    assert found["step_seconds"] == pytest.approx(0.15) and found["generate_seconds"] == pytest.approx(0.10)
    curve = analysis.training_curve(path)
    assert curve["budget"].tolist() == [64, 32] and curve["step"].tolist() == [1, 2]
    assert curve["tokens"].tolist() == [12.5, 12.5]
