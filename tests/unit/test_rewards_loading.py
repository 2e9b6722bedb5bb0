from pathlib import Path
from typing import Any

import pytest

from rlbal.errors import RewardError
from rlbal.recipe import RewardSpec, RewardsSection
from rlbal.rewards.loading import Signature, bind, check_columns, check_spec, load_function, required_columns, signature

HERE = Path(__file__).parent
HOSTILE = str(HERE / "hostile_rewards.py")


def spec(function: str, **rest: Any) -> RewardSpec:
    return RewardSpec.model_validate({"function": function, **rest})


def signature_of(function: str) -> Signature:
    return signature(load_function("mine", function))


def test_a_module_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def one(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("a", "mine.py:one")(completions=["x", "y"]) == [1.0, 1.0]
    assert load_function("a", f"{tmp_path}/mine.py:one") is load_function("b", "mine.py:one")
    assert load_function("c", "reward_fns.length:band").__name__ == "band"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_at_all:f", "no module `no_such_module_at_all`"),
        ("reward_fns.lenght:band", "no module `reward_fns.lenght`"),
        ("reward_fns.length:bnad", "Did you mean `band`"),
        ("no/such/file.py:f", "no file"),
        (f"{HERE}/hostile_reward.py:f", "Did you mean `.*hostile_rewards.py`"),
        (f"{HOSTILE}:NOT_A_FUNCTION", "is a int, not a function"),
        ("builtins:max", "does not say which arguments it takes"),
    ],
)
def test_what_cannot_be_loaded(path: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        load_function("good", path)
    assert "reward `good`" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_imports_that_fail_say_why(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(RewardError, match=message):
        load_function("broken", f"{tmp_path}/broken.py:f")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (spec("reward_fns.length:band", args={"target_token": 5}), "Did you mean `target_tokens`"),
        (spec("reward_fns.length:band", args={"completion_ids": 5}), "no such argument"),
        (spec("reward_fns.reasoning_gym:score", rowwise=True, args={"unsafe": True}), "beside `args`"),
        (spec(f"{HOSTILE}:wants_state", rowwise=True), "asks for `trainer_state`"),
        (spec("reward_fns.accuracy:math_correct"), "rewards.functions.mine.rowwise: true"),
        (spec("reward_fns.reasoning_gym:score"), "rewards.functions.mine.rowwise: true"),
        (spec(f"{HOSTILE}:run_code", unsafe=True), "rewards.functions.mine.rowwise: true"),
    ],
)
def test_entries_that_do_not_fit_their_function(entry: RewardSpec, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        check_spec("mine", entry, signature_of(entry.function))


def test_required_columns() -> None:
    matches = spec(f"{HOSTILE}:matches")
    said = signature_of(matches.function)
    assert required_columns(matches, said) == ("answer",)
    assert required_columns(spec(f"{HOSTILE}:matches", args={"answer": ["4"]}), said) == ()
    score = spec("reward_fns.reasoning_gym:score", rowwise=True)
    assert required_columns(score, signature_of(score.function)) == ("question", "answer", "metadata")
    assert required_columns(score, signature_of("reward_fns.length:band")) == ()
    assert required_columns(score, signature_of("reward_fns.length:conciseness")) == ()
    assert required_columns(score, signature_of(f"{HOSTILE}:wants_state")) == ()


def test_the_recipe_wins_over_columns_of_the_same_name() -> None:
    """Else a dataset with a column `unsafe` could allow what the recipe does not."""

    def echo(completions: list[str], unsafe: bool, bonus: float, **kwargs: Any) -> list[Any]:
        return [unsafe, bonus, kwargs]

    given = {"completions": ["x"], "unsafe": [True], "bonus": [9.0], "level": [3]}
    assert bind(echo, {"bonus": 0.5}, False, given)() == [False, 0.5, {"level": [3]}]


def test_missing_columns_name_reward_and_column() -> None:
    section = RewardsSection.model_validate({"functions": {"right": {"function": f"{HOSTILE}:matches"}}})
    signatures = {"right": signature_of(f"{HOSTILE}:matches")}
    check_columns(section, signatures, ["prompt", "answer"])
    with pytest.raises(RewardError, match="reward `right` needs column `answer`; the dataset has `prompt`, `solution`"):
        check_columns(section, signatures, ["solution", "prompt"])


def test_columns_that_the_trainer_adds() -> None:
    section = RewardsSection.model_validate({"functions": {"short": {"function": "m:f"}}})
    needs = {"short": Signature({"token_budget": True, "mean_completion_length": True}, True, False)}
    check_columns(section, needs, ["prompt"], has_budget=True)
    with pytest.raises(RewardError, match="`short` needs column `token_budget`, and the recipe has no budget") as error:
        check_columns(section, needs, ["prompt"])
    assert "budget: {schedule: constant, tokens: 64}" in error.value.fix
    given = RewardsSection.model_validate({"functions": {"short": {"function": "m:f", "args": {"token_budget": [9]}}}})
    check_columns(given, needs, ["prompt"])
    optional = {"short": Signature({"token_budget": False}, True, False)}
    check_columns(section, optional, ["prompt"])
