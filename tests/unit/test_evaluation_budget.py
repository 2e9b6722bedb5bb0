"""Evaluation at a token budget: what each way of sampling is told, where completions end, and what is recorded."""

import io
import json
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from rlbal.errors import RecipeError
from rlbal.evaluation import Condition, Evaluation, conditions, evaluate_policy
from rlbal.evaluation_view import comparison, examples_panel, table
from rlbal.recipe import Recipe, parse_recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.scoring import Sample

LIMIT = 64
ROWS = Dataset.from_dict(
    {
        "prompt": ["In {token_budget}: p0", "In {token_budget}: p1"],
        "answer": ["0", "1"],
        "level": [2, 3],
    }
)


def recipe(template: str = "In {token_budget}: {question}", system: str | None = None, **changes: Any) -> Recipe:
    return parse_recipe(
        {
            "output_dir": "runs/x",
            "model": {"tiny": {}},
            "data": {
                "source": "reasoning_gym",
                "task": "chain_sum",
                "prompt": template,
                "system": system,
                "difficulty": "level",
            },
            "rewards": {
                "functions": {
                    "correct": {"function": "reward_fns.accuracy:exact_match"},
                    "length": {"function": "reward_fns.length:band", "args": {"target_tokens": 4}},
                }
            },
            "evaluation": {"samples_per_prompt": 2, "greedy": True, **changes.pop("evaluation", {})},
            **changes,
        }
    )


LINEAR = {"budget": {"schedule": "linear"}}
PLAIN, GREEDY = Condition("", False, LIMIT, LIMIT), Condition("greedy/", True, LIMIT, LIMIT)


@pytest.mark.parametrize(
    ("changes", "limit", "budget", "expected"),
    [
        ({}, LIMIT, None, [PLAIN, GREEDY]),
        (LINEAR, LIMIT, None, [PLAIN, GREEDY]),
        (LINEAR, LIMIT, 20, [PLAIN, GREEDY, Condition("budget/", False, 20, 40)]),
        (LINEAR, LIMIT, 40, [PLAIN, GREEDY, Condition("budget/", False, 40, 64)]),  # 80, but for the limit
        (
            {"budget": {"schedule": "linear", "cap": False}},
            LIMIT,
            20,
            [PLAIN, GREEDY, Condition("budget/", False, 20, 64)],
        ),
        ({**LINEAR, "evaluation": {"greedy": False}}, LIMIT, 20, [PLAIN, Condition("budget/", False, 20, 40)]),
    ],
)
def test_the_ways_of_sampling(
    changes: dict[str, Any], limit: int, budget: int | None, expected: list[Condition]
) -> None:
    assert conditions(recipe(**changes), limit, budget) == expected


class Watched:
    """A real suite that notes the columns it is asked to score."""

    def __init__(self, suite: RewardSuite) -> None:
        self.suite, self.names, self.calls = suite, suite.names, []
        self.take_failures = suite.take_failures

    def score(self, prompts: Any, completions: Any, completion_ids: Any, columns: Any) -> Any:
        self.calls.append((prompts, columns.get("token_budget")))
        return self.suite.score(prompts, completions, completion_ids, columns)


class Policy:
    """Answers right with 6 tokens, and wrong with as many as allowed where greedy or told 5 tokens."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Any], bool, int]] = []

    def __call__(self, prompts: list[Any], positions: list[int], greedy: bool, limit: int) -> list[list[Sample]]:
        self.asked.append((prompts, greedy, limit))
        lazy = greedy or "In 5:" in str(prompts[0])
        right = [Sample([7] * 6, str(position), False) for position in positions]
        return [[Sample([7] * limit, "x", True)] * (1 if greedy else 2) if lazy else [one, one] for one in right]


def evaluate(made: Recipe, rows: Dataset = ROWS, budget: int | None = None) -> tuple[Evaluation, Policy, Watched]:
    policy = Policy()
    with RewardSuite.for_recipe(made) as suite:
        watched = Watched(suite)
        found = evaluate_policy(policy, rows, watched, made, max_new_tokens=LIMIT, budget=budget)
    return found, policy, watched


def test_each_way_is_told_its_own_budget() -> None:
    found, policy, watched = evaluate(recipe(**LINEAR), budget=5)
    plain, tight = ["In 64: p0", "In 64: p1"], ["In 5: p0", "In 5: p1"]
    assert policy.asked == [(plain, False, 64), (plain, True, 64), (tight, False, 10)]
    assert watched.calls == [
        (["In 64: p0", "In 64: p0", "In 64: p1", "In 64: p1"], [64] * 4),
        (plain, [64, 64]),
        (["In 5: p0", "In 5: p0", "In 5: p1", "In 5: p1"], [5] * 4),
    ]
    assert ROWS["prompt"][:] == ["In {token_budget}: p0", "In {token_budget}: p1"]
    # band with L = 64: 6 tokens and 64 tokens earn 1. With L = 5, 10 tokens earn 1 - 5/5 = 0.
    assert found.metrics == pytest.approx(
        {
            "pass@1": 1.0,
            "mean@2": 1.0,
            "reward/correct": 1.0,
            "reward/length": 1.0,
            "length/mean": 6.0,
            "length/truncated": 0.0,
            "greedy/pass@1": 0.0,
            "greedy/mean@1": 0.0,
            "greedy/reward/correct": 0.0,
            "greedy/reward/length": 1.0,
            "greedy/length/mean": 64.0,
            "greedy/length/truncated": 1.0,
            "budget/pass@1": 0.0,
            "budget/mean@2": 0.0,
            "budget/reward/correct": 0.0,
            "budget/reward/length": 0.0,
            "budget/length/mean": 10.0,
            "budget/length/truncated": 1.0,
        }
    )
    assert set(found.intervals) == set(found.metrics) == set(found.by_difficulty["3"]["metrics"])
    assert (found.settings["max_new_tokens"], found.settings["budget"], found.settings["budget_max_new_tokens"]) == (
        64,
        5,
        10,
    )
    assert [example.get("budget") for example in found.examples] == [None, None, None, None, 5, 5]
    assert found.samples == 4
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_between_two_budgets_only_the_target_moves() -> None:
    # 6 tokens under L = 20 earn 1, under L = 4 they earn 1 - 2/4.
    assert evaluate(recipe(**LINEAR), budget=20)[0].metrics["budget/reward/length"] == 1.0
    assert evaluate(recipe(**LINEAR), budget=4)[0].metrics["budget/reward/length"] == 0.5


def test_without_a_schedule_the_field_shows_the_limit_and_rewards_keep_their_target() -> None:
    found, policy, watched = evaluate(recipe())
    assert [prompts for prompts, _, _ in policy.asked] == [["In 64: p0", "In 64: p1"]] * 2
    assert [column for _, column in watched.calls] == [None, None]
    assert found.metrics["reward/length"] == 0.5  # 6 tokens against `target_tokens: 4`
    assert not [name for name in (*found.metrics, *found.settings) if name.startswith("budget")]


def test_without_the_field_nothing_is_replaced() -> None:
    _, policy, watched = evaluate(recipe("{question}"))
    assert policy.asked[0][0] == ROWS["prompt"][:]
    assert watched.calls[0][1] is None


def test_chat_prompts_are_told_in_the_message_that_has_the_field() -> None:
    chat = [
        [{"role": "system", "content": "Within {token_budget}."}, {"role": "user", "content": f"p{row}"}]
        for row in range(2)
    ]
    rows = Dataset.from_dict({"prompt": chat, "answer": ["0", "1"], "level": [2, 3]})
    made = recipe("{question}", "Within {token_budget}.", **LINEAR)
    _, policy, _ = evaluate(made, rows, budget=20)
    assert policy.asked[0][0][0] == [{"role": "system", "content": "Within 64."}, {"role": "user", "content": "p0"}]
    assert policy.asked[2][0][1] == [{"role": "system", "content": "Within 20."}, {"role": "user", "content": "p1"}]


def test_the_best_checkpoint_may_be_chosen_by_a_metric_at_the_budget() -> None:
    made = recipe(**LINEAR, evaluation={"best_metric": "budget/reward/correct"})
    assert set(made.evaluation_metrics()) <= set(evaluate(made, budget=20)[0].metrics)
    with pytest.raises(RecipeError, match=r"`evaluation.best_metric: budget/pass@1` is not measured"):
        recipe(evaluation={"best_metric": "budget/pass@1"})


@pytest.mark.parametrize("process", [0, 1])
def test_several_processes_find_what_one_finds(process: int) -> None:
    made = recipe(**LINEAR)
    one, _, _ = evaluate(made, budget=5)

    def run(process: int, gather: Any) -> Evaluation:
        place = {"process_index": process, "num_processes": 2, "gather": gather}
        with RewardSuite.for_recipe(made) as suite:
            return evaluate_policy(Policy(), ROWS, suite, made, max_new_tokens=LIMIT, budget=5, **place)

    sent: list[Any] = []
    run(1 - process, lambda rows: sent.append(rows) or rows)
    other = iter(sent)
    found = run(process, lambda rows: np.concatenate([rows, next(other)]))
    assert (found.metrics, found.intervals, found.by_difficulty) == (one.metrics, one.intervals, one.by_difficulty)


def shown(renderable: Any) -> list[list[str]]:
    """The cells of every line."""
    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(renderable)
    lines = console.export_text().replace("┃", "│").splitlines()
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines]


def test_the_table_shows_the_budget_and_each_metric_at_it_below_the_plain_one() -> None:
    first, last = (evaluate(recipe(**LINEAR), budget=budget)[0] for budget in (20, 5))
    cells = shown(table({"before": first, "after": last}))
    names = [line[0] for line in cells]
    assert ["budget", "20 tokens", "5 tokens"] in cells
    assert names[names.index("pass@1") + 1] == "budget/pass@1"
    assert names[names.index("length/mean") + 1] == "budget/length/mean"
    (length,) = [line for line in cells if line[0] == "budget/length/mean"]
    assert length == ["budget/length/mean", "6.0 [6.0, 6.0]", "10.0 [10.0, 10.0]", "+4.0"]


def test_a_line_from_before_there_were_budgets_reads_and_shows() -> None:
    old = evaluate(recipe())[0].to_json()
    assert "budget" not in json.dumps(old)
    new = evaluate(recipe(**LINEAR), budget=5)[0].to_json()
    cells = shown(comparison([{"step": 0, **old}, {"step": 9, **new}]))
    assert ["budget", "–", "5 tokens"] in cells
    (row,) = [line for line in cells if line[0] == "budget/pass@1"]
    assert row == ["budget/pass@1", "–", "0.000 [.000, .000]", "–"]
    assert not [line for line in shown(comparison([{"step": 0, **old}])) if line[0].startswith("budget")]


def test_examples_are_those_without_a_budget() -> None:
    text = str(shown(examples_panel({"run": evaluate(recipe(**LINEAR), budget=5)[0]})))
    assert "In 64: p0" in text and "In 5: p0" not in text
