"""The scorers of the installed reasoning-gym, as this package relies on them."""

import ast
import builtins
import inspect
import json
import sys
import textwrap
import types
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from reward_fns.reasoning_gym import UNSAFE_TASKS, score
from rlbal.errors import RewardError

RUNS_CODE = {"eval", "exec", "compile", "__import__", "open", "getattr", "setattr", "globals", "vars"}
# Packages that scorers may reach: read once, and none of these runs text as code. (sympy does, so it is not here.)
HARMLESS = {"numpy", "json", "re", "math", "decimal", "fractions", "datetime", "dateutil", "magiccube", "random"}
HARMLESS |= {
    "builtins",
    "typing",
    "collections",
    "dataclasses",
    "enum",
    "itertools",
    "functools",
    "copy",
    "string",
    "zss",
}


def reached_by(function: Any, owner: type) -> tuple[set[str], set[str]]:
    """Builtins that run code, and other packages, that a scorer and all it calls in reasoning-gym can reach."""
    code, packages, seen, todo = set(), set(), set(), [function]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        names = sys.modules[current.__module__].__dict__
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(current)))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                found = inspect.getattr_static(owner, node.attr, None)
            elif isinstance(node, ast.Name):
                found = names.get(node.id, getattr(builtins, node.id, None))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                packages |= {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name}
                continue
            else:
                continue
            found = getattr(found, "__func__", found)
            module = found.__name__ if isinstance(found, types.ModuleType) else getattr(found, "__module__", None)
            if found in (getattr(builtins, name) for name in RUNS_CODE):
                code.add(found.__name__)
            elif module and module.startswith("reasoning_gym"):
                if isinstance(found, types.FunctionType | type):
                    todo.append(found)
                elif isinstance(found, types.ModuleType):
                    todo += [one for one in vars(found).values() if isinstance(one, types.FunctionType)]
            elif module:
                packages.add(module.partition(".")[0].lstrip("_"))
    return code, packages


def test_unsafe_tasks_are_those_whose_scorers_reach_code_evaluation() -> None:
    found = set()
    for task, (dataset, _) in DATASETS.items():
        if task == "composite":  # its rows name the task they come from
            continue
        code, packages = reached_by(dataset.score_answer, dataset)
        assert packages - HARMLESS <= {"sympy"}, f"{task}: read how its scorer uses {packages - HARMLESS}"
        if code or "sympy" in packages:
            found.add(task)
    assert found == UNSAFE_TASKS


def rows_of(task: str, **config: Any) -> list[dict[str, Any]]:
    dataset = reasoning_gym.create_dataset(task, size=3, seed=5, **config)
    return [dataset[index] for index in range(3)]


def columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "question": [row["question"] for row in rows],
        "answer": [row["answer"] for row in rows],
        "metadata": [json.dumps(row["metadata"]) for row in rows],
    }


@pytest.mark.parametrize(
    "task", ["chain_sum", "simple_equations", "rearc", "shortest_path", "word_sorting", "calendar_arithmetic"]
)
def test_gold_answers_score_1_after_the_way_through_json(task: str) -> None:
    rows = rows_of(task)
    completions = [f"<think>hm</think><answer>{row['answer']}</answer>" for row in rows]
    assert score(completions, **columns(rows)) == [1.0, 1.0, 1.0]


def test_wrong_and_missing_answers() -> None:
    rows = rows_of("chain_sum")
    completions = ["<answer>no</answer>", rows[1]["answer"], f"<answer>{rows[2]['answer']}"]
    assert score(completions, **columns(rows)) == [0.0, 0.0, 0.0]
    assert score(completions, require_tag=False, **columns(rows))[:2] == [0.0, 1.0]


def test_unsafe_tasks_are_refused_unless_allowed() -> None:
    rows = rows_of("countdown")
    completions = [f"<answer>{row['metadata']['expression']}</answer>" for row in rows]
    with pytest.raises(RewardError, match=r"`countdown`(.|\n)*rewards\.functions\.<name>\.unsafe: true"):
        score(completions, **columns(rows))
    assert score(completions, unsafe=True, **columns(rows)) == [1.0, 1.0, 1.0]


def test_a_task_is_scored_with_the_options_it_was_made_with() -> None:
    # decimal_arithmetic accepts an error of one unit in the last place: 0.001 with its default of 3, 0.01 with 2.
    row = {"question": "?", "answer": "1.500", "metadata": json.dumps({"source_dataset": "decimal_arithmetic"})}
    given: dict[str, Any] = {key: [value] for key, value in row.items()}
    assert score(["<answer>1.51</answer>"], **given) == [0.0]
    configs = {"decimal_arithmetic": {"min_num_decimal_places": 2, "max_num_decimal_places": 2}}
    assert score(["<answer>1.51</answer>"], configs=configs, **given) == [1.0]


@pytest.mark.parametrize("metadata", ["", "[]", "{}", None, "3"])
def test_metadata_of_other_datasets_is_refused(metadata: Any) -> None:
    with pytest.raises(RewardError, match="not reasoning-gym's metadata"):
        score(["<answer>1</answer>"], question=["?"], answer=["1"], metadata=[metadata])


def test_unknown_tasks_are_refused_with_the_nearest() -> None:
    with pytest.raises(RewardError, match="Did you mean `chain_sum`"):
        score(["a"], question=["?"], answer=["1"], metadata=['{"source_dataset": "chain_sums"}'])
