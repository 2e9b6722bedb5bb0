from typing import Any

import pytest

from rlbal.errors import RewardError
from rlbal.recipe import Recipe, parse_recipe
from rlbal.rewards.gym_tasks import SCORER, UNSAFE_TASKS, fit_to_data
from rlbal.rewards.suite import RewardSuite


def recipe(data: dict[str, Any], **entry: Any) -> Recipe:
    right = {"function": SCORER, "rowwise": True, **entry}
    return parse_recipe(
        {
            "output_dir": "runs/x",
            "model": {"tiny": {}},
            "data": {"source": "reasoning_gym", **data},
            "rewards": {"functions": {"right": right, "short": {"function": "reward_fns.length:conciseness"}}},
        }
    )


def composite(*parts: Any) -> dict[str, Any]:
    return {"task": "composite", "config": {"datasets": list(parts)}}


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(
    "data",
    [{"task": "countdown"}, composite({"name": "chain_sum", "weight": 1}, {"name": "countdown", "weight": 2})],
    ids=["task", "composite"],
)
def test_scorers_that_evaluate_code_are_refused_at_once(data: dict[str, Any], isolated: bool) -> None:
    with pytest.raises(RewardError) as caught:
        RewardSuite.for_recipe(recipe(data), isolated)
    assert "reward `right`" in caught.value.what and "`countdown`" in caught.value.what
    assert "`rewards.functions.right.unsafe: true`" in caught.value.fix
    with RewardSuite.for_recipe(recipe(data, unsafe=True), isolated) as suite:
        assert suite.names == ["right", "short"]


def test_every_unsafe_task_is_refused() -> None:
    for task in UNSAFE_TASKS:
        with pytest.raises(RewardError, match=f"`{task}`"):
            fit_to_data(recipe({"task": task}))


def test_the_scorer_gets_the_options_of_the_data() -> None:
    options = {"min_terms": 3, "max_terms": 4}
    section = fit_to_data(recipe({"task": "chain_sum", "config": options}))
    assert section.functions["right"].args == {"configs": {"chain_sum": options}}
    assert section.functions["short"].args == {}
    parts = composite({"name": "chain_sum", "weight": 1, "config": options}, {"name": "gcd", "weight": 1})
    section = fit_to_data(recipe(parts))
    assert section.functions["right"].args == {"configs": {"chain_sum": options, "gcd": {}}}


def test_what_the_user_says_stays() -> None:
    args = {"configs": {"chain_sum": {"min_terms": 2}}, "require_tag": False}
    given = recipe({"task": "chain_sum", "config": {"min_terms": 5}}, args=args)
    assert fit_to_data(given).functions["right"].args == args


def test_other_scorers_and_other_data_are_left_alone() -> None:
    other = recipe({"task": "countdown"}, function="reward_fns.accuracy:exact_match")
    assert fit_to_data(other) == other.rewards
    file = other.model_dump() | {"data": {"source": "file", "path": "x.jsonl"}}
    file["rewards"]["functions"]["right"]["function"] = SCORER
    assert fit_to_data(parse_recipe(file)).functions["right"].args == {}


@pytest.mark.parametrize("datasets", [None, 3, ["chain_sum"], [{"weight": 1}], [{"name": 3}]])
def test_malformed_composites_are_left_to_those_who_make_the_problems(datasets: Any) -> None:
    broken = recipe({"task": "composite", "config": {"datasets": datasets}})
    configs = fit_to_data(broken).functions["right"].args.get("configs", {})
    assert set(configs) <= {"3"} and not any(configs.values()), "no options are invented for what is not a task"


def test_options_reach_the_scorer() -> None:
    """decimal_arithmetic accepts an error of one unit in the last place it was made with: 0.01 with 2 places."""
    data = {"task": "decimal_arithmetic", "config": {"min_num_decimal_places": 2, "max_num_decimal_places": 2}}
    columns = {"question": ["?"], "answer": ["1.500"], "metadata": ['{"source_dataset": "decimal_arithmetic"}']}
    for suite in (RewardSuite.for_recipe(recipe(data)), RewardSuite(recipe(data).rewards)):
        with suite:
            scores = suite.score(["?"], ["<answer>1.51</answer>"], [[1]], columns)
            assert scores[0, 0] == (1.0 if "configs" in suite.section.functions["right"].args else 0.0)
            assert suite.take_failures() == []
