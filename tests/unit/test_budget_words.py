"""Schedules in words."""

import pytest

from rlbal.budget_sections import (
    AdaptiveSection,
    AnyBudget,
    ConstantSection,
    ExponentialSection,
    LinearSection,
    NoBudgetSection,
)
from rlbal.prompts.budget_words import in_words

TWICE = "; completions end at twice the budget"
LINEAR = LinearSection(schedule="linear", start=64, end=22)
PAPER = ExponentialSection(schedule="exponential", start=256, gamma=0.7, interval=150)
FAST = ExponentialSection(schedule="exponential", start=256, gamma=0.5, interval=1)


@pytest.mark.parametrize(
    ("section", "total", "words"),
    [
        (ConstantSection(schedule="constant", tokens=87), 600, "constant: 87 tokens" + TWICE),
        # Drops of 14; levels of 50 steps.
        (LINEAR, 200, "linear: 64 tokens at step 0, 50 at 50, 36 at 100, 22 at 150" + TWICE),
        # 10/4 = 2.5: level 1 starts at the first step of at least 2.5.
        (LINEAR, 10, "linear: 64 tokens at step 0, 50 at 3, 36 at 5, 22 at 8" + TWICE),
        (PAPER, 600, "exponential: 256 tokens at step 0, 179 at 150, 125 at 300, 88 at 450" + TWICE),
        (
            # 256, 128, 64, 32, then 16, 8, 4, 2, 1; and 1 for ever.
            FAST,
            1000,
            "exponential: 256 tokens at step 0, 128 at 1, 64 at 2, 32 at 3, …, 1 at 8" + TWICE,
        ),
        (
            AdaptiveSection(schedule="adaptive", end=87, levels=4, cap=False),
            600,
            "adaptive: 4 levels from 512 to 87 tokens, tighter while accuracy holds and looser when it falls; "
            "completions may be longer",
        ),
        (
            ConstantSection(schedule="constant", tokens=87, scope="prompt", prompt_scale=(0.5, 1.25)),
            600,
            "constant: 87 tokens; times 0.5 for prompts always solved, 1.25 for those never solved" + TWICE,
        ),
    ],
)
def test_a_schedule_in_a_line(section: AnyBudget, total: int, words: str) -> None:
    assert in_words(section, 512, total) == words


def test_no_schedule_has_no_words() -> None:
    assert in_words(NoBudgetSection(), 512, 600) is None


def test_a_run_of_unknown_length_shows_the_first_budgets() -> None:
    words = in_words(PAPER, 512, -1)
    assert words is not None and words.startswith(
        "exponential: 256 tokens at step 0, 179 at 150, 125 at 300, 88 at 450, "
    )
