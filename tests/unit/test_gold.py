"""Gold and shuffled answers: forms, shares and what counts as a correctness reward."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rlbal.gold import GoldResult, final, score_gold

Reward = Callable[[str, str], float]


class Rewards:
    """A suite of functions of (completion, gold answer)."""

    def __init__(self, needs: tuple[str, ...] = ("answer",), **functions: Reward) -> None:
        self.names, self.functions, self.needs, self.scored = list(functions), functions, needs, 0

    def required_columns(self, name: str) -> tuple[str, ...]:
        return self.needs

    def score(self, prompts: list[Any], completions: list[Any], ids: Any, columns: dict[str, list[Any]]) -> Any:
        self.scored += len(completions)
        golds = columns[self.needs[0]] if self.needs else [""] * len(completions)
        pairs = list(zip(completions, golds, strict=True))
        return np.array([[function(text, gold) for function in self.functions.values()] for text, gold in pairs])


def rows(**columns: list[Any]) -> dict[str, list[Any]]:
    count = len(next(iter(columns.values())))
    return {"prompt": ["?"] * count, **columns}


def gold(suite: Rewards, data: dict[str, list[Any]]) -> GoldResult:
    suite.scored = 0
    found = score_gold(suite, data, seed=0)  # type: ignore[arg-type]
    assert found is not None and found.completions == suite.scored
    return found


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("2 + 2 = 4.\n#### 4", "4"),
        ("#### 1\nno\n####  1,234 ", "1,234"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{ 2 }", "2"),
        (r"cut off: \boxed{1", r"cut off: \boxed{1"),
        (" North ", "North"),
    ],
)
def test_the_final_answer(solution: str, answer: str) -> None:
    assert final(solution) == answer


def test_each_reward_is_judged_on_the_form_it_likes_best() -> None:
    suite = Rewards(
        plain=lambda text, gold: float(text == gold),
        boxed=lambda text, gold: float(text == f"\\boxed{{{gold}}}"),
        tagged=lambda text, gold: float(f"<answer>{gold}</answer>" in text),
    )
    found = gold(suite, rows(answer=[str(number) for number in range(10)]))
    assert found.forms == {"plain": "as it stands", "boxed": "boxed", "tagged": "in answer tags"}
    assert found.means == dict.fromkeys(suite.names, (1.0, 0.0))
    assert (found.equal_share, found.rows) == (0.0, 10)


def test_the_worked_solution_is_a_completion_and_its_end_the_answer() -> None:
    seen: list[str] = []

    def right(text: str, gold: str) -> float:
        seen.append(text)
        return float(text.endswith(gold))

    data = rows(solution=["1 + 1 is 2", "2 + 1 is 3"], answer=["2", "3"])
    assert gold(Rewards(right=right), data).means == {"right": (1.0, 0.0)}
    assert {"1 + 1 is 2", "2 + 1 is 3", "\\boxed{2}"} < set(seen)


def test_equal_answers_are_counted_whatever_their_solutions() -> None:
    """Two rows: each gets the other's answer. A reward may score those 1."""
    suite = Rewards(right=lambda text, gold: 1.0)
    assert gold(suite, rows(answer=["one way\n#### 1 2", r"another: \boxed{12}"])).equal_share == 1.0
    assert gold(suite, rows(answer=["#### 1", "#### 2"])).equal_share == 0.0


def test_the_column_that_the_rewards_need_holds_the_gold_answers() -> None:
    data = rows(answer=["x", "y"], target=["1", "2"])
    assert gold(Rewards(("target",), right=lambda text, gold: float(text == gold)), data).means["right"] == (1.0, 0.0)
    assert gold(Rewards((), style=lambda text, gold: 0.5), data).correctness == []


def test_rows_without_a_gold_answer_are_left_out() -> None:
    suite = Rewards(right=lambda text, gold: float(text == gold))
    assert gold(suite, rows(answer=["1", None, "2"])).rows == 2
    assert score_gold(suite, rows(answer=["1", None]), seed=0) is None  # type: ignore[arg-type]
    assert score_gold(suite, rows(reply=["1", "2"]), seed=0) is None  # type: ignore[arg-type]


def test_missing_scores_are_left_out_of_the_means() -> None:
    suite = Rewards(some=lambda text, gold: np.nan if gold == "1" else 1.0, none=lambda text, gold: np.nan)
    found = gold(suite, rows(answer=["1", "2", "3"]))
    assert found.means["some"] == (1.0, 1.0)
    assert np.isnan(found.means["none"]).all()
    assert found.to_json()["rewards"]["none"] == {"gold": None, "shuffled": None, "form": "as it stands"}
