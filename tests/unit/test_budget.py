"""Budgets step by step, against values worked out by hand or given by the paper."""

import json
import math

import pytest

from rlbal.budget_sections import (
    AdaptiveSection,
    AnyBudget,
    ConstantSection,
    ExponentialSection,
    LinearSection,
    NoBudgetSection,
)
from rlbal.errors import RunError
from rlbal.prompts.budget import (
    AdaptiveBudget,
    generation_cap,
    last_budget,
    longest_completion,
    make_budget,
    nearest_token,
    prompt_budget,
    tell_budget,
    with_budget,
)
from tests.small_recipe import small

TOTAL = 600


def changes(section: AnyBudget, total: int = TOTAL) -> list[tuple[int, int | None]]:
    """(step, budget) where the budget of a run changes."""
    budget = make_budget(section, limit=512, total=total)
    tokens = [budget.tokens(step) for step in range(total)]
    return [(step, now) for step, now in enumerate(tokens) if step == 0 or now != tokens[step - 1]]


def exponential(**keys: float) -> ExponentialSection:
    return ExponentialSection.model_validate({"schedule": "exponential", **keys})


def test_no_budget_and_a_constant_one() -> None:
    assert changes(NoBudgetSection()) == [(0, None)]
    assert changes(ConstantSection(schedule="constant", tokens=87)) == [(0, 87)]


@pytest.mark.parametrize(
    ("decays", "expected"),
    [
        # d = (87/256)^(1/n): 0.340, 0.698, 0.857; the interval is 600/(n + 1).
        (1, [(0, 256), (300, 87)]),
        # 256·0.698 = 178.7, 256·0.487 = 124.8
        (3, [(0, 256), (150, 179), (300, 125), (450, 87)]),
        # 256·0.857^k: 219.4, 188.1, 161.2, 138.2, 118.4, 101.5
        (
            7,
            [(0, 256), (75, 219), (150, 188), (225, 161), (300, 138), (375, 118), (450, 102), (525, 87)],
        ),
    ],
)
def test_exponential_from_start_to_end(decays: int, expected: list[tuple[int, int]]) -> None:
    assert changes(exponential(start=256, end=87, decays=decays)) == expected


def test_exponential_by_factor_and_interval() -> None:
    # 256·0.7 = 179.2, ·0.49 = 125.44, ·0.343 = 87.8
    assert changes(exponential(start=256, gamma=0.7, interval=150)) == [(0, 256), (150, 179), (300, 125), (450, 88)]


def test_a_factor_never_leads_below_one_token() -> None:
    # 4, 2, 1, then 0.5 and less
    section = exponential(start=4, gamma=0.5, interval=1)
    assert changes(section, total=5000) == [(0, 4), (1, 2), (2, 1)]


@pytest.mark.parametrize(
    ("decays", "expected"),
    [
        (1, [(0, 256), (300, 87)]),
        # drops of 169/3 = 56.33: 199.67, 143.33
        (3, [(0, 256), (150, 200), (300, 143), (450, 87)]),
        # drops of 169/7 = 24.14: 231.86, 207.71, 183.57, 159.43, 135.29, 111.14
        (
            7,
            [(0, 256), (75, 232), (150, 208), (225, 184), (300, 159), (375, 135), (450, 111), (525, 87)],
        ),
    ],
)
def test_linear_drops(decays: int, expected: list[tuple[int, int]]) -> None:
    assert changes(LinearSection(schedule="linear", start=256, end=87, decays=decays)) == expected


def test_steps_that_do_not_divide() -> None:
    # Level k starts at the first step of at least k·10/4 = 2.5, 5, 7.5: drops of 50.
    section = LinearSection(schedule="linear", start=200, end=50, decays=3)
    assert changes(section, total=10) == [(0, 200), (3, 150), (5, 100), (8, 50)]
    assert changes(section, total=4) == [(0, 200), (1, 150), (2, 100), (3, 50)]


def test_steps_after_the_run_keep_the_last_budget() -> None:
    budget = make_budget(exponential(start=256, end=87), limit=512, total=TOTAL)
    assert [budget.tokens(step) for step in (599, 600, 5000)] == [87, 87, 87]


def test_defaults_come_from_the_longest_completion() -> None:
    # start = 90, end = 90 // 3, 3 drops of 20
    section = LinearSection(schedule="linear")
    budget = make_budget(section, limit=90, total=4)
    assert [budget.tokens(step) for step in range(4)] == [90, 70, 50, 30]


def test_rounding_is_to_the_nearest_token_halves_up() -> None:
    # Python's own rounding would give 0, 2 and 2.
    assert [nearest_token(tokens) for tokens in (0.2, 0.5, 1.5, 2.5, 2.49)] == [1, 1, 2, 3, 2]


def test_generation_stops_where_no_length_reward_is_left() -> None:
    assert generation_cap(87) == 174


def test_easy_prompts_get_a_tighter_budget() -> None:
    # 100·(1 − 0.5·p)
    assert [prompt_budget(100, p, easy=0.5, hard=1.0) for p in (0.0, 0.25, 0.5, 1.0)] == [100, 88, 75, 50]
    # 100·(1.5 − p), and nothing outside [50, 150] or below 1 token
    assert [prompt_budget(100, p, easy=0.5, hard=1.5) for p in (-0.1, 0.0, 0.5, 1.1)] == [150, 150, 100, 50]
    assert prompt_budget(1, 1.0, easy=0.1, hard=1.0) == 1


def test_the_budget_takes_its_place_in_text_and_messages() -> None:
    assert with_budget("in {token_budget} tokens, {x}", 87) == "in 87 tokens, {x}"
    messages = [{"role": "system", "content": "{token_budget}!"}, {"role": "user", "content": "q"}]
    assert with_budget(messages, 5) == [{"role": "system", "content": "5!"}, {"role": "user", "content": "q"}]
    assert messages[0]["content"] == "{token_budget}!"  # the next batch has another budget


TOLD = "data.prompt='{question} in {token_budget}'"


def test_rows_are_told_in_prompt_and_column() -> None:
    rows = {"prompt": ["1+1 in {token_budget}", "2+2 in {token_budget}"], "answer": ["2", "4"]}
    told = tell_budget(rows, small(TOLD, "budget.schedule=linear"), 87)
    assert told == {"prompt": ["1+1 in 87", "2+2 in 87"], "answer": ["2", "4"], "token_budget": [87, 87]}
    assert rows["prompt"][0] == "1+1 in {token_budget}" and "token_budget" not in rows
    # Without a schedule rewards keep their own targets; without the field rows may hold its characters.
    assert set(tell_budget(rows, small(TOLD), 87)) == {"prompt", "answer"}
    assert tell_budget(rows, small(TOLD), 87)["prompt"] == told["prompt"]
    assert tell_budget(rows, small(), 87) == rows


def test_where_completions_end() -> None:
    section, uncapped = (ConstantSection(schedule="constant", tokens=87, cap=cap) for cap in (True, False))
    assert longest_completion(section, 87, limit=512) == 174
    assert longest_completion(section, 87, limit=100) == 100
    assert longest_completion(uncapped, 87, limit=512) == 512
    assert longest_completion(NoBudgetSection(), None, limit=512) == 512


def test_the_budget_that_a_run_ends_with() -> None:
    def last(section: AnyBudget, total: int = TOTAL) -> int | None:
        return last_budget(section, 512, total)

    assert last(NoBudgetSection()) is None
    assert last(ConstantSection(schedule="constant", tokens=87)) == 87
    assert last(LinearSection(schedule="linear", start=256, end=87)) == 87
    assert last(ExponentialSection(schedule="exponential", start=256, end=87)) == 87
    # 256·0.7^3 = 87.8 lasts from step 450 to 599; step 600, where 61 would begin, is not in the run.
    paper = ExponentialSection(schedule="exponential", start=256, gamma=0.7, interval=150)
    assert last(paper) == 88
    assert last(paper, total=-1) == 256  # nobody knows how many steps there will be
    assert last(AdaptiveSection(schedule="adaptive", end=90), total=-1) == 90
    assert last(AdaptiveSection(schedule="adaptive")) == 512 // 3


# Adaptive


def adaptive(window: int = 1) -> AdaptiveBudget:
    return AdaptiveBudget([100, 80, 60], window=window, tolerance=0.05)


def play(budget: AdaptiveBudget, accuracies: list[float]) -> list[tuple[int, str]]:
    """The budget every batch was generated with, and what it led to."""
    told = []
    for step, accuracy in enumerate(accuracies):
        used = budget.tokens(step)
        budget.observe(accuracy)
        told.append((used, budget.reason))
    return told


def test_it_tightens_while_accuracy_holds_and_stops_at_the_end() -> None:
    # 0.66 is 0.04 below the best: within the tolerance.
    told = play(adaptive(), [0.70, 0.66, 0.68, 0.67])
    assert told == [(100, "tightened"), (80, "tightened"), (60, "at_end"), (60, "at_end")]


def test_it_loosens_when_accuracy_falls_and_tightens_again_when_it_is_back() -> None:
    # 0.55 is 0.15 below the best, more than twice the tolerance; then 0.72 is the best, and 0.60 is 0.12 below it.
    told = play(adaptive(), [0.70, 0.55, 0.72, 0.60])
    assert told == [(100, "tightened"), (80, "loosened"), (100, "tightened"), (80, "loosened")]


def test_it_holds_in_between() -> None:
    # 0.63 is 0.07 below the best: beyond the tolerance, within twice that.
    told = play(adaptive(), [0.70, 0.63, 0.63, 0.68])
    assert told == [(100, "tightened"), (80, "held"), (80, "held"), (80, "tightened")]


def test_it_cannot_loosen_beyond_the_start() -> None:
    told = play(adaptive(), [0.70, 0.40, 0.40, 0.40])
    assert told == [(100, "tightened"), (80, "loosened"), (100, "at_start"), (100, "at_start")]


def test_a_window_decides_by_its_mean() -> None:
    # Means 0.7, then 0.55: neither 0.9 nor 0.8 decides alone.
    told = play(adaptive(window=2), [0.5, 0.9, 0.8, 0.3])
    assert told == [(100, "waiting"), (100, "tightened"), (80, "waiting"), (80, "loosened")]


def test_batches_of_an_earlier_budget_do_not_count() -> None:
    # The first window, 0.9, is the best; the second, 0.6 at the next budget, is judged by itself.
    told = play(adaptive(window=3), [0.9, 0.9, 0.9, 0.6, 0.6, 0.6])
    assert [reason for _, reason in told] == ["waiting", "waiting", "tightened", "waiting", "waiting", "loosened"]


def test_no_signal_leaves_the_budget_alone() -> None:
    told = play(adaptive(), [0.70, math.nan, math.nan, 0.69])
    assert told == [(100, "tightened"), (80, "no_signal"), (80, "no_signal"), (80, "tightened")]
    # Within a window the batches without accuracy do not count: the mean of the second is 0.5, not 0.25.
    told = play(adaptive(window=2), [0.5, 0.5, math.nan, 0.5])
    assert told[3] == (80, "tightened")
    assert play(adaptive(window=2), [math.nan, math.nan]) == [(100, "waiting"), (100, "no_signal")]
    assert math.isnan(adaptive().metrics()["budget/best_accuracy"])


def test_what_it_logs() -> None:
    budget = adaptive()
    play(budget, [0.70, 0.66])
    assert budget.metrics() == {"budget/level": 2.0, "budget/best_accuracy": 0.70}
    assert budget.tables() == {"budget/reason": "tightened"}


@pytest.mark.parametrize("cut", range(1, 8))
def test_it_goes_on_after_a_checkpoint_as_if_nothing_happened(cut: int) -> None:
    script = [0.7, 0.71, 0.6, math.nan, 0.5, 0.5, 0.72, 0.7]
    whole, first, second = adaptive(window=2), adaptive(window=2), adaptive(window=2)
    expected = play(whole, script)
    before = play(first, script[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert (second.reason, second.metrics()) == (first.reason, pytest.approx(first.metrics(), nan_ok=True))
    assert before + play(second, script[cut:]) == expected
    assert second.state_dict() == whole.state_dict()


def test_a_saved_window_is_not_changed_from_outside() -> None:
    budget = adaptive(window=3)
    budget.observe(0.7)
    state = budget.state_dict()
    budget.observe(0.1)
    assert state["accuracies"] == [0.7]


def test_levels_of_the_adaptive_schedule() -> None:
    # d = (25/100)^(1/2) = 0.5
    budget = make_budget(AdaptiveSection(schedule="adaptive", start=100, end=25, levels=3), limit=512, total=-1)
    assert isinstance(budget, AdaptiveBudget) and budget.levels == [100, 50, 25]
    # 4, 3.2, 2.5, 2: a level that rounding makes equal to another is left out (2.5 is 2.52, rounded 3).
    budget = make_budget(AdaptiveSection(schedule="adaptive", start=4, end=2, levels=4), limit=512, total=-1)
    assert isinstance(budget, AdaptiveBudget) and budget.levels == [4, 3, 2]


@pytest.mark.parametrize("state", [{}, AdaptiveBudget([64, 32], 2, 0.1).state_dict()], ids=["another kind", "levels"])
def test_the_state_of_another_budget_is_refused(state):
    with pytest.raises(RunError, match=r"not \[64, 48, 32\](?s:.)*recipe.yaml"):
        AdaptiveBudget([64, 48, 32], 2, 0.1).load_state_dict(state)
