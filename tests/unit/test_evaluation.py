"""evaluate_policy with scripted samples and a scripted reward suite, on one process and on several."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from rlbal.errors import DataError, RewardError, RunError
from rlbal.evaluation import Evaluation, evaluate_policy
from rlbal.recipe import Recipe, parse_recipe
from rlbal.rewards.outcomes import Failure
from rlbal.rewards.suite import RewardSuite
from rlbal.scoring import Sample, Share

# Five prompts; a completion is right if its text is the answer.
ROWS = Dataset.from_dict(
    {
        "prompt": ["p0", "p1", "p2", "p3", "p4"],
        "prompt_id": ["a", "b", "c", "d", "e"],
        "answer": ["0", "1", "2", "3", "4"],
        "level": [10, 2, 2, 10, 2],
    }
)
TEXTS = [["0", "x", "0", "x"], ["x", "x", "x", "x"], ["2", "2", "2", "2"], ["3", "x", "x", "x"], ["?", "4", "x", "4"]]
GREEDY = ["0", "x", "2", "x", "4"]


def recipe(**changes: Any) -> Recipe:
    evaluation = {"samples_per_prompt": 4, "pass_at": [1, 2], **changes.pop("evaluation", {})}
    functions = {"correct": {"function": "m:f", **changes.pop("correct", {})}, "brief": {"function": "m:g"}}
    data = {"source": "reasoning_gym", "task": "chain_sum", **changes.pop("data", {})}
    return parse_recipe(
        {
            "output_dir": "runs/x",
            "model": {"tiny": {}},
            "data": data,
            "rewards": {"functions": functions, **changes.pop("rewards", {})},
            "evaluation": evaluation,
            **changes,
        }
    )


class Scripted:
    """Rewards by text: `correct` 1 or 0, missing for `?`; `brief` the share of a ten-token limit left."""

    names = ("correct", "brief")

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.failures: list[Failure] = []

    def take_failures(self) -> list[Failure]:
        taken, self.failures = self.failures, []
        return taken

    def score(self, prompts: Any, completions: Any, completion_ids: Any, columns: Any) -> Any:
        self.calls.append(
            {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "columns": columns}
        )
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        correct = [
            math.nan if text == "?" else float(text == answer)
            for text, answer in zip(texts, columns["answer"], strict=True)
        ]
        return np.array([correct, [1 - len(ids) / 10 for ids in completion_ids]]).T


def generate(prompts: list[Any], positions: list[int], greedy: bool, limit: int) -> list[list[Sample]]:
    """Sample s has s + 1 tokens; the fourth was cut off."""
    if greedy:
        return [[Sample([9, 9], GREEDY[position], False)] for position in positions]
    return [
        [Sample([9] * (number + 1), text, number == 3) for number, text in enumerate(TEXTS[position])]
        for position in positions
    ]


def evaluate(rows: Dataset = ROWS, suite: Any = None, **changes: Any) -> Evaluation:
    return evaluate_policy(generate, rows, suite or Scripted(), recipe(**changes), max_new_tokens=4)


def test_metrics_by_hand() -> None:
    found = evaluate(evaluation={"greedy": True})
    # Solved of scored: 2/4, 0/4, 4/4, 1/4, 2/3.  pass@2: 1 − C(2,2)/6 = 5/6, 0, 1, 1 − C(3,2)/6 = 1/2, 1 − 0/3 = 1.
    pass_1 = (1 / 2 + 0 + 1 + 1 / 4 + 2 / 3) / 5
    expected = {
        "pass@1": pass_1,
        "pass@2": (5 / 6 + 0 + 1 + 1 / 2 + 1) / 5,
        "mean@4": pass_1,
        "reward/correct": pass_1,
        "reward/brief": (0.9 + 0.8 + 0.7 + 0.6) / 4,
        "length/mean": 2.5,
        "length/truncated": 0.25,
        "greedy/pass@1": 3 / 5,
        "greedy/mean@1": 3 / 5,
        "greedy/reward/correct": 3 / 5,
        "greedy/reward/brief": 0.8,
        "greedy/length/mean": 2.0,
        "greedy/length/truncated": 0.0,
    }
    assert found.metrics == pytest.approx(expected)
    assert set(found.intervals) == set(expected)
    for name, (low, high) in found.intervals.items():
        assert low - 1e-9 <= expected[name] <= high + 1e-9
    assert (found.prompts, found.samples) == (5, 20)
    assert found.missing == {"correct": 1}
    assert found.left_out == {}
    assert found.by_difficulty == {}


def test_the_recipes_names_for_the_best_metric_are_measured() -> None:
    assert set(recipe().evaluation_metrics()) <= set(evaluate().metrics)


def test_by_difficulty_in_numeric_order() -> None:
    found = evaluate(data={"difficulty": "level"}).by_difficulty
    assert list(found) == ["2", "10"]
    assert [group["prompts"] for group in found.values()] == [3, 2]
    assert found["2"]["metrics"]["pass@1"] == pytest.approx((0 + 1 + 2 / 3) / 3)
    assert found["10"]["metrics"]["pass@1"] == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_prompts_takes_the_first_rows() -> None:
    found = evaluate(evaluation={"prompts": 2}, data={"difficulty": "level"})
    assert found.prompts == 2
    assert found.metrics["pass@1"] == pytest.approx(0.25)
    assert found.by_difficulty["2"]["prompts"] == 1
    assert evaluate(evaluation={"prompts": 99}).prompts == 5


def test_rewards_see_every_sample_with_its_columns_in_one_call() -> None:
    suite = Scripted()
    evaluate(suite=suite)
    (call,) = suite.calls
    assert call["prompts"][:5] == ["p0", "p0", "p0", "p0", "p1"]
    assert call["completions"][:5] == ["0", "x", "0", "x", "x"]
    assert call["completion_ids"][:2] == [[9], [9, 9]]
    assert set(call["columns"]) == {"prompt_id", "answer", "level", "mean_completion_length"}
    assert call["columns"]["answer"][3:5] == ["0", "1"]


def test_chat_completions_are_assistant_messages() -> None:
    suite = Scripted()
    chat = ROWS.remove_columns("prompt").add_column(
        "prompt", [[{"role": "user", "content": text}] for text in ROWS["prompt"]]
    )
    found = evaluate(chat, suite)
    assert suite.calls[0]["completions"][0] == [{"role": "assistant", "content": "0"}]
    assert found.metrics == evaluate().metrics


def test_success_on_another_scale_needs_its_range() -> None:
    class Signed(Scripted):
        def score(self, *args: Any) -> Any:
            return super().score(*args) * [2, 1] - [1, 0]

    with pytest.raises(RewardError, match=r"`correct`.*gave -1, outside \[0, 1\]") as error:
        evaluate(suite=Signed())
    assert "rewards.functions.correct.range" in error.value.fix
    found = evaluate(suite=Signed(), correct={"range": [-1, 1]})
    assert found.metrics["mean@4"] == pytest.approx(evaluate().metrics["mean@4"])
    assert found.metrics["pass@2"] == pytest.approx(evaluate().metrics["pass@2"])
    assert found.metrics["reward/correct"] == pytest.approx(2 * found.metrics["mean@4"] - 1)


def test_no_rows_and_no_difficulty_column_are_named() -> None:
    with pytest.raises(DataError, match="no held-out rows"):
        evaluate(ROWS.select([]))
    with pytest.raises(DataError, match="`levle`") as error:
        evaluate(data={"difficulty": "levle"})
    assert "Did you mean `level`?" in error.value.fix


def test_every_reward_missing_gives_null_in_finite_json() -> None:
    class Silent(Scripted):
        def score(self, *args: Any) -> Any:
            return np.full_like(super().score(*args), math.nan)

    found = evaluate(suite=Silent(), data={"difficulty": "level"})
    assert found.left_out["pass@1"] == 5
    assert found.missing == {"correct": 20, "brief": 20}
    line = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert line["metrics"]["pass@1"] is None
    assert line["intervals"]["mean@4"] == [None, None]
    assert line["by_difficulty"]["2"]["metrics"]["reward/brief"] is None
    assert line["examples"][0]["rewards"] == {"correct": None, "brief": None}
    assert line["metrics"]["length/mean"] == 2.5
    again = Evaluation.from_json({"step": 3, **line})
    assert again.to_json() == found.to_json()
    assert math.isnan(again.metrics["pass@1"])
    assert again.intervals["length/mean"] == found.intervals["length/mean"]
    with pytest.raises(RunError, match="no `metrics`"):
        Evaluation.from_json({"step": 3})


class Failing(Scripted):
    """The reward `correct` fails on three completions of every call."""

    def score(self, *args: Any) -> Any:
        self.failures.append(Failure("correct", "timeout", 3, "was not done after 10 s"))
        return super().score(*args)


def test_failures_are_counted_by_reason_or_stop_the_evaluation() -> None:
    found = evaluate(
        suite=Failing(), evaluation={"greedy": True}, rewards={"on_error": "skip", "max_failed_share": 0.6}
    )
    assert found.failures == {"correct": {"timeout": 6}}
    with pytest.raises(RewardError, match=r"`correct` failed on 3 of 20 completions \(timeout 3\)"):
        evaluate(suite=Failing())
    with pytest.raises(RewardError, match=r"more than `rewards\.max_failed_share`"):  # 3 of 5 greedy ones
        evaluate(suite=Failing(), evaluation={"greedy": True}, rewards={"on_error": "skip"})


def test_a_failure_on_another_process_stops_this_one_too() -> None:
    def gather(rows: Any) -> Any:
        other = np.zeros_like(rows)
        other[0, 1] = 2  # the second reason, `timeout`, of the first reward
        return np.concatenate([rows, other])

    with pytest.raises(RewardError, match=r"failed on 2 of 24 completions \(timeout 2\).*another process"):
        evaluate_policy(generate, ROWS, Scripted(), recipe(), max_new_tokens=4, gather=gather, num_processes=2)


def test_a_real_suite(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def right(completions, answer, **kwargs):\n"
        "    return [float(text == gold) for text, gold in zip(completions, answer)]\n"
    )
    made = parse_recipe(
        {
            "output_dir": "runs/x",
            "model": {"tiny": {}},
            "data": {"source": "reasoning_gym", "task": "chain_sum"},
            "rewards": {"functions": {"right": {"function": f"{tmp_path / 'mine.py'}:right"}}},
        }
    )
    with RewardSuite(made.rewards) as suite:
        found = evaluate_policy(generate, ROWS, suite, made, max_new_tokens=4)
    # `?` is wrong here, not missing: 2/4, 0, 1, 1/4, 2/4.
    assert found.metrics["pass@1"] == pytest.approx(2.25 / 5)


def test_settings_and_examples_are_recorded() -> None:
    found = evaluate(evaluation={"greedy": True, "temperature": 0.5})
    assert found.settings["temperature"] == 0.5
    assert found.settings["max_new_tokens"] == 4
    first = found.examples[0]
    assert first == {
        "prompt": "p0",
        "completion": "0",
        "rewards": {"correct": 1.0, "brief": 0.9},
        "truncated": False,
        "greedy": False,
    }
    assert [example["greedy"] for example in found.examples] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_several_processes_find_what_one_finds(processes: int) -> None:
    """Each process's rows are recorded in a first pass; the second gathers them as a collective operation would."""
    changes = {"evaluation": {"greedy": True}, "data": {"difficulty": "level"}}
    sent: list[list[Any]] = [[] for _ in range(processes)]  # by process, then in order of the calls

    def run(process: int, gather: Any) -> Evaluation:
        place = {"process_index": process, "num_processes": processes}
        return evaluate_policy(generate, ROWS, Scripted(), recipe(**changes), max_new_tokens=4, gather=gather, **place)

    def record(process: int) -> Any:
        def gather(rows: Any) -> Any:
            sent[process].append(rows)
            return rows

        return gather

    for process in range(processes):
        run(process, record(process))
    shapes = {tuple(rows.shape for rows in calls) for calls in sent}
    assert len(shapes) == 1  # a collective operation needs equal shapes
    one = evaluate(**changes)
    for process in range(processes):
        calls = iter(zip(*sent, strict=True))
        found = run(process, lambda rows, calls=calls: np.concatenate(next(calls)))
        assert found.metrics == one.metrics
        assert found.intervals == one.intervals
        assert found.by_difficulty == one.by_difficulty
        assert found.missing == one.missing


def test_the_mean_length_that_rewards_get_counts_every_row_once() -> None:
    """Five rows on two processes: the second takes row 0 again, which must not weigh twice."""
    lengths = {0: [9, 9], 1: [1, 1], 2: [2, 2], 3: [3, 3], 4: [5, 5]}
    seen: list[float] = []

    class Watching(Scripted):
        def score(self, prompts: Any, completions: Any, completion_ids: Any, columns: Any) -> Any:
            seen.append(columns["mean_completion_length"][0])
            return super().score(prompts, completions, completion_ids, columns)

    def generate_long(prompts: Any, positions: list[int], greedy: bool, limit: int) -> list[list[Sample]]:
        return [[Sample([7] * length, "0", False) for length in lengths[position]] for position in positions]

    other = np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0], [0.0, 9.0, 9.0]])  # position, then two lengths

    def gather(rows: Any) -> Any:
        return np.concatenate([rows, other]) if rows.shape == other.shape else rows

    settings = {"samples_per_prompt": 2, "pass_at": [1]}
    evaluate_policy(
        generate_long,
        ROWS,
        Watching(),
        recipe(evaluation=settings),
        max_new_tokens=9,
        gather=gather,
        num_processes=2,
    )
    assert seen == [pytest.approx((9 + 1 + 2 + 3 + 5) / 5)]


def test_shares_cover_every_row_and_are_equally_long() -> None:
    assert [Share(5, None, process, 2).positions for process in range(2)] == [[0, 2, 4], [1, 3, 0]]
    assert [Share(1, None, process, 3).positions for process in range(3)] == [[0], [0], [0]]
