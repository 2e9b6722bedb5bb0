"""Rewards that somebody else wrote, as `rlbal eval` runs them: never imported here, and harmless where they are."""

import math
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from rlbal.errors import RewardError
from rlbal.evaluation import evaluate_policy
from rlbal.recipe import Recipe, RewardsSection, parse_recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.scoring import Sample

HOSTILE = str(Path(__file__).parent / "hostile_rewards.py")


def section(functions: dict[str, Any], **rest: Any) -> RewardsSection:
    return RewardsSection.model_validate({"functions": functions, "workers": 1, "timeout": 1.0, **rest})


def isolated(functions: dict[str, Any], **rest: Any) -> RewardSuite:
    return RewardSuite(section(functions, **rest), isolated=True)


def hostile(name: str, **rest: Any) -> dict[str, Any]:
    return {"function": f"{HOSTILE}:{name}", **rest}


def recipe(reward: dict[str, Any], **rewards: Any) -> Recipe:
    return parse_recipe(
        {
            "output_dir": "runs/theirs",
            "model": {"tiny": {}},
            "data": {"source": "reasoning_gym", "task": "chain_sum"},
            "evaluation": {"samples_per_prompt": 2},
            "rewards": {"functions": {"theirs": reward}, "workers": 1, "timeout": 5.0, **rewards},
        }
    )


def generate(prompts: list[Any], positions: list[int], greedy: bool, limit: int) -> list[list[Sample]]:
    return [[Sample([1] * position, str(position), False), Sample([1], "no", False)] for position in positions]


ROWS = Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": ["0", "1", "5"]})


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        socket.create_connection(server.getsockname()).close()  # it can be reached from here
        server.accept()
        yield server


@pytest.mark.parametrize(
    ("rowwise", "unsafe"), [(False, False), (True, False), (True, True)], ids=["batch", "rowwise", "unsafe"]
)
def test_evaluating_a_strangers_run(
    rowwise: bool, unsafe: bool, tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "theirs.py").write_text(
        textwrap.dedent(
            f"""
            import os, socket, subprocess

            DONE = []

            def attempt(when):
                for what, action in {{
                    "write": lambda: open({str(tmp_path / "marker")!r} + when, "w"),
                    "connect": lambda: socket.create_connection({listener.getsockname()!r}, timeout=5),
                    "run": lambda: subprocess.run(["touch", {str(tmp_path / "marker")!r}], check=True),
                    "kill": lambda: os.kill(os.getppid(), 0),
                    "environment": lambda: os.environ["HF_TOKEN"],
                }}.items():
                    try:
                        action()
                        DONE.append(what)
                    except (OSError, KeyError):
                        pass

            attempt("import")

            def reward(completions, answer, **kwargs):
                attempt("call")
                if DONE:
                    raise RuntimeError(f"could {{DONE}}")
                return [float(one == gold) for one, gold in zip(completions, answer)]
            """
        )
    )
    theirs = recipe({"function": f"{tmp_path / 'theirs.py'}:reward", "rowwise": rowwise, "unsafe": unsafe})
    before = set(sys.modules)
    with RewardSuite.for_recipe(theirs, isolated=True) as suite:
        if "machine" in suite.isolation:
            pytest.skip(suite.isolation)
        found = evaluate_policy(generate, ROWS, suite, theirs, max_new_tokens=4)
    # Completions "0", "1", "2" for the answers 0, 1, 5, and a wrong one beside each.
    assert found.metrics["pass@1"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert found.failures == {}
    assert not list(tmp_path.glob("marker*"))
    with pytest.raises(TimeoutError):
        listener.accept()
    assert not [name for name in set(sys.modules) - before if name.startswith("rlbal_reward")]


def test_a_reward_that_only_shows_its_teeth_is_a_failure(tmp_path: Path) -> None:
    """What a reward does not catch itself is recorded, by import and by call."""
    marker = tmp_path / "marker"
    (tmp_path / "at_import.py").write_text(f"open({str(marker)!r}, 'w')\ndef reward(completions): ...\n")
    (tmp_path / "at_call.py").write_text(f"def reward(completions):\n    open({str(marker)!r}, 'w')\n")
    with pytest.raises(RewardError, match=r"(?s)importing .*at_import.py failed.*Permission denied"):
        RewardSuite.for_recipe(recipe({"function": f"{tmp_path}/at_import.py:reward"}), isolated=True)
    theirs = recipe({"function": f"{tmp_path}/at_call.py:reward"}, on_error="skip", max_failed_share=1.0)
    with RewardSuite.for_recipe(theirs, isolated=True) as suite:
        found = evaluate_policy(generate, ROWS, suite, theirs, max_new_tokens=4)
    assert found.failures == {"theirs": {"raised": 6}}
    assert not marker.exists()


def test_the_same_values_as_in_place() -> None:
    functions = {
        "own": hostile("matches", args={"bonus": 0.25}),
        "by_row": hostile("matches", rowwise=True),
        "waits": hostile("length_async"),
        "none": hostile("length_or_none"),
        "concise": {"function": "reward_fns.length:conciseness"},
        "range": {"function": "reward_fns.length:triangular", "args": {"target_tokens": 2}},
    }
    completions, ids = ["4", "", "four"], [[1] * 3, [], [1] * 9]
    columns = {"answer": ["4", "4", "four"], "mean_completion_length": [8.0] * 3}
    with RewardSuite(section(functions)) as here, isolated(functions) as there:
        expected = here.score(["?"] * 3, completions, ids, columns)
        np.testing.assert_array_equal(there.score(["?"] * 3, completions, ids, columns), expected)
        assert here.take_failures() == there.take_failures() == []
        assert there.score([], [], [], {}).shape == (0, len(functions))
        # 1/(1 + 3/8), 1/(1 + 0/8), 1/(1 + 9/8): against the gathered mean, not against the mean of 4 at hand
        np.testing.assert_allclose(expected[:, 4], [8 / 11, 1, 8 / 17])


def test_what_only_a_trainer_has(tmp_path: Path) -> None:
    (tmp_path / "logs.py").write_text(
        "def logs(completions, trainer_state, log_metric, log_extra):\n"
        "    log_metric('length', 1.0)\n    log_extra('text', completions)\n"
        "    return [1.0 if trainer_state is None else 0.0] * len(completions)\n"
    )
    entry = {"function": f"{tmp_path}/logs.py:logs"}
    for suite in (RewardSuite(section({"logs": entry})), isolated({"logs": entry})):
        with suite:
            np.testing.assert_array_equal(suite.score(["?"] * 2, ["a", "b"], [[1], [1]], {}), [[1], [1]])
            assert suite.take_failures() == []


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (hostile("raises"), "raised"),
        (hostile("hangs", timeout=0.1), "timeout"),
        (hostile("hangs_async", timeout=0.1), "timeout"),
        (hostile("nan"), "nan"),
        (hostile("returns", args={"value": [1.0]}), "wrong_count"),
        (hostile("returns", args={"value": [2, 3]}, range=[0, 1]), "out_of_range"),
    ],
)
def test_failures_of_a_batch(entry: dict[str, Any], reason: str) -> None:
    with isolated({"bad": entry, "good": hostile("length_or_none")}) as suite:
        scores = suite.score(["?"] * 2, ["x", "xyz"], [[1], [1]], {})
        np.testing.assert_array_equal(scores, [[math.nan, 1], [math.nan, 3]])
        (failure,) = suite.take_failures()
        assert (failure.reward, failure.reason, failure.count) == ("bad", reason, 2)


def test_a_large_batch_with_long_failures_still_has_an_answer() -> None:
    with isolated({"bad": hostile("returns", args={"value": ["\x00" * 99] * 500})}, timeout=10) as suite:
        scores = suite.score(["?"] * 500, ["x" * 1000] * 500, [[1] * 100] * 500, {})
        assert np.isnan(scores).all()
        assert [(one.reason, one.count) for one in suite.take_failures()] == [("not_a_number", 500)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (hostile("no_such"), "no function `no_such`"),
        (hostile("matches", args={"bonsu": 1}), "Did you mean `bonus`"),
        (hostile("wants_state", rowwise=True), "asks for `trainer_state`"),
        ({"function": "reward_fns.accuracy:math_correct"}, "rowwise: true"),
    ],
)
def test_entries_that_do_not_fit_are_refused_without_importing_them(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        isolated({"mine": entry})


def test_columns_are_checked_by_what_the_worker_saw() -> None:
    with isolated({"right": hostile("matches"), "short": {"function": "reward_fns.length:conciseness"}}) as suite:
        assert suite.required_columns("right") == ("answer",)
        assert suite.required_columns("short") == ()
        suite.check_columns(["prompt", "answer"])
        with pytest.raises(RewardError, match="needs column `answer`"):
            suite.check_columns(["prompt"])


@pytest.mark.parametrize(
    "signature",
    ["3", "{}", '{"f": 3}', '{"f": [{"a\\u001b": true}, true, true]}', '{"f": [{"a": "x"}, true, true]}'],
)
def test_a_worker_that_lies_about_its_functions(signature: str, tmp_path: Path) -> None:
    """A reward that answers in its worker's place while it is imported."""
    (tmp_path / "liar.py").write_text(
        f"import os\nlie = b'{{\"ready\": [], \"signatures\": ' + {signature!r}.encode() + b'}}\\n'\n"
        "for fd in range(3, 32):\n    try:\n        os.write(fd, lie)\n    except OSError:\n        pass\n"
        "def f(completions): ...\n"
    )
    with pytest.raises(RewardError, match=r"(?s)did not start.*(sent something else|unreadable)"):
        isolated({"f": {"function": f"{tmp_path}/liar.py:f"}})


def test_rewards_of_other_packages_work_sealed() -> None:
    with isolated({"think": {"function": "trl.rewards:think_format_reward"}}, timeout=10) as suite:
        completions = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "b")]
        np.testing.assert_array_equal(suite.score(["?"] * 2, completions, [[1], [1]], {}), [[1], [0]])


def test_the_parent_imports_no_reward_code_at_all() -> None:
    """In a Python of its own, since other tests import the rewards that rlbal ships."""
    code = f"""
        import sys
        from rlbal.recipe import RewardsSection
        from rlbal.rewards.suite import RewardSuite
        right = {{"function": "reward_fns.accuracy:math_correct", "rowwise": True}}
        functions = {{"right": right, "other": {{"function": {HOSTILE!r} + ":length_or_none"}}}}
        section = RewardsSection.model_validate({{"functions": functions, "workers": 1}})
        with RewardSuite(section, isolated=True) as suite:
            assert suite.score(["?"], ["4"], [[1]], {{"answer": ["4"]}}).tolist() == [[1.0, 1.0]]
        imported = ("reward_fns", "rlbal_reward", "math_verify", "torch")
        assert not [name for name in sys.modules if name.startswith(imported)]
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
