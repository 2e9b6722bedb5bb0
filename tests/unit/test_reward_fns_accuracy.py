from typing import Any

import pytest

from reward_fns.accuracy import exact_match, math_correct


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("<think>9 - 2</think><answer>7</answer>", "7"),
        ("<answer>6</answer> wait <answer>7</answer>", "7"),
        ("She pays 3 + 4 dollars.\n#### 7", "Some 3 and then 4 more.\n#### 7"),
        ("So there are 1234 of them.\n#### 1,234", "1234"),
        ("<answer>$1,234</answer>", "#### 1,234"),
        ("<answer>1/2</answer>", r"\frac{1}{2}"),
        ("<answer>\\frac12</answer>", "0.5"),
        ("<answer>50%</answer>", "1/2"),
        (r"Thus \boxed{x^2 + 2x + 1}.", r"The square is \boxed{(x+1)^2}."),
        (r"<answer>\boxed{\{1, 2\}}</answer>", r"\{2, 1\}"),
        (r"<answer>(3, \frac{\pi}{2})</answer>", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"It falls on a \boxed{Friday}", r"\text{Friday}"),
        ("<answer>north  EAST</answer>", "North East"),
        ([{"role": "assistant", "content": "<answer>7</answer>"}], "7"),
        (r"\frac{3}{4}", "0.75"),
        ("The total is 12.", "12"),
    ],
)
def test_equal_answers(completion: Any, gold: str) -> None:
    conversation = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    assert math_correct([completion, conversation], answer=[gold, gold]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("<answer>8</answer>", "7"),
        ("<answer>7</answer> no, <answer>8</answer>", "7"),
        ("I thought of 7.\n#### 8", "#### 7"),
        (r"<answer>\frac{12}{3}</answer>", r"\frac{1}{23}"),
        (r"\boxed{x^2 + 1}", "(x+1)^2"),
        ("<answer></answer>", "7"),
        ("", "7"),
        ("<answer>south</answer>", "north"),
        ("<answer>1,234</answer>", "1.234"),
    ],
)
def test_different_answers(completion: str, gold: str) -> None:
    assert math_correct([completion], answer=[gold]) == [0.0]


def test_rows_are_independent() -> None:
    assert math_correct(["#### 1", "#### 2", "#### 3"], answer=["1", "5", "3"]) == [1.0, 0.0, 1.0]


def test_exact_match() -> None:
    completions = ["<answer> a  b\n</answer>", "a b", "<answer>A b</answer>", "<answer>7.0</answer>", "so a b"]
    assert exact_match(completions, answer=["a b", "a b", "a b", "7", "a b"]) == [1.0, 1.0, 0.0, 0.0, 0.0]
