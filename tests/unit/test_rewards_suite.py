import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlbal.errors import RewardError
from rlbal.recipe import RewardsSection
from rlbal.rewards.suite import RewardSuite, default_workers

HOSTILE = str(Path(__file__).parent / "hostile_rewards.py")


def suite_of(functions: dict[str, Any], **rest: Any) -> RewardSuite:
    return RewardSuite(RewardsSection.model_validate({"functions": functions, "workers": 1, **rest}))


def hostile(name: str, **rest: Any) -> dict[str, Any]:
    return {"function": f"{HOSTILE}:{name}", **rest}


def called_by_trl(suite: RewardSuite, k: int, completions: list[Any], **columns: Any) -> Any:
    """A reward function as TRL's trainer calls it."""
    return suite.functions[k](
        prompts=["?"] * len(completions),
        completions=completions,
        completion_ids=[[1]] * len(completions),
        trainer_state=0.5,
        log_extra=print,
        log_metric=print,
        **columns,
    )


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (hostile("raises"), "raised"),
        (hostile("hangs", timeout=0.1), "timeout"),
        (hostile("nan"), "nan"),
        (hostile("infinite"), "infinite"),
        (hostile("returns", args={"value": [1.0]}), "wrong_count"),
        (hostile("returns", args={"value": 1.0}), "wrong_count"),
        (hostile("returns", args={"value": ["a", "b"]}), "not_a_number"),
        (hostile("returns", args={"value": [2, 3]}, range=[0, 1]), "out_of_range"),
    ],
)
def test_failures_in_place_become_none_and_are_counted(entry: dict[str, Any], reason: str) -> None:
    with suite_of({"bad": entry}) as suite:
        assert called_by_trl(suite, 0, ["x", "y"]) == [None, None]
        (failure,) = suite.take_failures()
        assert (failure.reward, failure.reason, failure.count) == ("bad", reason, 2)
        assert suite.take_failures() == []


def test_functions_get_what_they_accept() -> None:
    functions = {
        "state": hostile("wants_state"),
        "right": hostile("matches", args={"bonus": 0.25}),
    }
    with suite_of(functions) as suite:
        assert [function.__name__ for function in suite.functions] == ["state", "right"]
        assert called_by_trl(suite, 0, ["4"], answer=["4"]) == [0.5]
        assert called_by_trl(suite, 1, ["4", "5"], answer=["4", "4"], level=[1, 2]) == [1.25, 0.25]
        assert suite.take_failures() == []


def test_none_is_no_failure() -> None:
    functions = {"a": hostile("length_or_none"), "b": hostile("length_or_none", rowwise=True)}
    with suite_of(functions) as suite:
        scores = suite.score(["?"] * 2, ["four", ""], [[1], []], {})
        np.testing.assert_array_equal(scores, [[4.0, 4.0], [math.nan, math.nan]])
        assert suite.take_failures() == []


def test_async_functions_stay_async_and_run_at_once() -> None:
    functions = {
        "slow": hostile("length_async"),
        "hung": hostile("hangs_async", timeout=0.1),
        "plain": hostile("length_or_none"),
        "slow_too": hostile("length_async"),
    }
    with suite_of(functions) as suite:
        assert [asyncio.iscoroutinefunction(function) for function in suite.functions] == [True, True, False, True]
        scores = suite.score(["?"] * 2, ["ab", "abc"], [[1], [1]], {})
        np.testing.assert_array_equal(scores, [[2, math.nan, 2, 2], [3, math.nan, 3, 3]])
        (failure,) = suite.take_failures()
        assert (failure.reward, failure.reason, failure.count) == ("hung", "timeout", 2)
        waiting = suite._loaded["slow"].__globals__["WAITING"]
        assert waiting["most"] == 2


def test_async_rewards_also_score_inside_a_running_event_loop() -> None:
    async def notebook() -> Any:
        with suite_of({"slow": hostile("length_async")}) as suite:
            return suite.score(["?"], ["abc"], [[1]], {})

    assert asyncio.run(notebook()).tolist() == [[3.0]]


def test_trl_rewards_work_unchanged() -> None:
    trl = {"function": "trl.rewards:think_format_reward"}
    with suite_of({"inside": trl, "worker": {**trl, "rowwise": True}}) as suite:
        completions = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "b")]
        np.testing.assert_array_equal(suite.score(["?"] * 2, completions, [[1], [1]], {}), [[1, 1], [0, 0]])


def test_columns_that_cannot_travel() -> None:
    functions = {"named": hostile("matches", rowwise=True), "any": hostile("length_or_none", rowwise=True)}
    with suite_of(functions) as suite:
        with pytest.raises(RewardError, match=r"reward `named`: column `answer`(.|\n)*named.rowwise: false"):
            called_by_trl(suite, 0, ["a"], answer=[object()])
        assert called_by_trl(suite, 1, ["a"], image=[object()]) == [1.0]
        with pytest.raises(RewardError, match="column `answer` has 2 values for 1 completions"):
            called_by_trl(suite, 0, ["a"], answer=["a", "b"])


def test_check_columns() -> None:
    with suite_of({"right": hostile("matches")}) as suite, pytest.raises(RewardError, match="needs column `answer`"):
        suite.check_columns(["prompt"])


def test_an_empty_batch() -> None:
    with suite_of({"a": hostile("length_or_none"), "b": hostile("length_or_none", rowwise=True)}) as suite:
        assert suite.score([], [], [], {}).shape == (0, 2)


def test_cores_are_shared_between_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 3
