"""Problems from reasoning-gym: the same in every process, errors without foreign tracebacks."""

import json
import random
from typing import Any

import pytest

from rlbal.errors import DataError
from rlbal.prompts import generate
from rlbal.prompts.data import PromptData, load_data
from rlbal.prompts.generate import generate_problems, make_problems
from rlbal.recipe import ReasoningGymData


def load(seed: int = 0, **keys: Any) -> PromptData:
    return load_data(ReasoningGymData(source="reasoning_gym", **{"task": "chain_sum", **keys}), seed)


def test_chain_sum_rows() -> None:
    config = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}
    data = load(config=config, size=60, eval_size=20, difficulty="num_terms")
    assert data.eval is not None and len(data.eval) == 20
    dropped = int(data.notes[0].split()[0]) if data.notes else 0
    assert len(data.train) == 40 - dropped
    for row in data.train:
        metadata = json.loads(row["metadata"])
        assert metadata["source_dataset"] == row["source_dataset"] == "chain_sum"
        assert row["num_terms"] == metadata["num_terms"] in (2, 3, 4)
        terms = metadata["expression"].replace("- ", "-").replace("+ ", "").split()
        assert row["answer"] == str(sum(map(int, terms)))
        assert row["prompt"] == row["question"] and metadata["expression"] in row["question"]
    assert "difficulty" not in data.train.column_names  # a mapping in the metadata, no plain value


def test_the_seed_decides_and_neighbouring_seeds_share_nothing() -> None:
    config = {"min_digits": 4, "min_terms": 5}

    def questions(seed: int) -> list[str]:
        return [problem["question"] for problem in make_problems("chain_sum", config, 50, seed)]

    assert questions(0) == questions(0)
    assert not set(questions(0)) & set(questions(1))


def test_tasks_that_depend_on_the_hash_seed_give_every_process_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        results.append(generate_problems("isomorphic_strings", {}, 5, 0))  # iterates over sets
    assert results[0] == results[1] and len(results[0]) == 5


def test_tasks_that_use_the_global_generator_give_every_process_the_same() -> None:
    results = []
    for state in (1, 2):
        random.seed(state)
        results.append(list(make_problems("list_functions", {}, 40, 0)))
    assert results[0] == results[1]


def test_composite() -> None:
    parts = [
        {"name": "chain_sum", "weight": 3, "config": {"max_terms": 2}},
        {"name": "leg_counting"},
    ]
    data = load(task="composite", config={"datasets": parts}, size=60, eval_size=0, difficulty="source_dataset")
    counts = {name: data.train["source_dataset"][:].count(name) for name in ("chain_sum", "leg_counting")}
    assert counts["chain_sum"] > counts["leg_counting"] > 0 and sum(counts.values()) == 60
    assert "num_terms" not in data.train.column_names  # not every problem has it


def test_a_task_without_a_gold_answer_keeps_none() -> None:
    train = load(task="graph_color", size=3, eval_size=0).train
    assert train["answer"][:] == [None, None, None] and train.features["answer"].dtype == "string"


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [
        ("chain_sums", {}, "`data.task: chain_sums` is not a reasoning-gym task\nFix: Did you mean `chain_sum`"),
        (
            "chain_sum",
            {"min_term": 1},
            "`data.config.min_term` is not an option of task `chain_sum`\nFix: .*`min_terms`",
        ),
        ("chain_sum", {"size": 1}, "`data.config.size`: the recipe sets this\nFix: use the key `data.size`"),
        ("chain_sum", {"seed": 1}, "`data.config.seed`: the recipe sets this\nFix: use the key `seed`"),
        (
            "chain_sum",
            {"min_terms": 9, "max_terms": 2},
            "task `chain_sum` refuses the options.*\nWhy: .*max_terms must be",
        ),
        ("chain_sum", {"min_terms": "many"}, "task `chain_sum` refuses the options.*\nWhy: TypeError"),
        ("chain_sum", {"max_digits": 1.5}, "task `chain_sum` failed on problem 1 of 4\nWhy: "),
        ("composite", {}, "needs `data.config.datasets`"),
        ("composite", {"datasets": [{"weight": 1}]}, "`data.config.datasets.0` names no task"),
        (
            "composite",
            {"datasets": [{"name": "gdc"}]},
            "`data.config.datasets.0.name: gdc` .*\nFix: Did you mean `gcd`",
        ),
        ("composite", {"datasets": [{"name": "gcd", "wight": 1}]}, "datasets.0.wight` is unknown\nFix: .*`weight`"),
        (
            "composite",
            {"datasets": [{"name": "gcd", "config": {"min_number": 1}}]},
            "`data.config.datasets.0.config.min_number` is not an option of task `gcd`\nFix: .*`min_numbers`",
        ),
        ("composite", {"datasets": [{"name": "gcd", "weight": -1}]}, "task `composite` refuses .*\nWhy: .*positive"),
        (
            "composite",
            {"datasets": [{"name": "gcd"}, {"name": "gcd"}]},
            "task `composite` refuses .*\nWhy: .*Duplicate",
        ),
    ],
)
def test_options_that_cannot_work(task: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(make_problems(task, config, 4, 0))


def test_errors_cross_the_process() -> None:
    with pytest.raises(DataError, match=r"is not a reasoning-gym task\nFix: Did you mean `chain_sum`") as caught:
        generate_problems("chain_sums", {}, 4, 0)
    assert caught.value.what == "`data.task: chain_sums` is not a reasoning-gym task"


def test_a_generator_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match=r"task `chain_sum` died after 0 of 4 problems\nWhy: .*exit code"):
        generate_problems("chain_sum", {}, 4, 0)


def test_more_held_out_prompts_than_distinct_ones() -> None:
    # One-digit sums of two terms: 10 * 10 operands and 2 signs are at most 200 prompts.
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(DataError, match=r"`data.eval_size: 300` .* 400 rows with 1\d\d distinct prompts"):
        load(config=config, size=400, eval_size=300)
