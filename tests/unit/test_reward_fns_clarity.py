import pytest

from reward_fns.clarity import step_by_step

CLEAR = r"""Step 1: The perimeter is 20, so 2(a + b) = 20.
Step 2: Since a = 4, we have b = 6.
Step 3: Therefore the area is 24.

\[
\boxed{24}
\]"""


@pytest.mark.parametrize(
    ("text", "score"),
    [
        # 3 steps, {so, since, therefore}, an answer, 6 different lines of 6.
        (CLEAR, 1.0),
        ("", 0.0),
        (" \n\t\n", 0.0),
        ("24", 0.0),  # a bare number: no step, no word, nothing that says it is the answer
        (r"\boxed{24}", 1 / 3),
        ("<answer>24</answer>", 1 / 3),
        ("#### 24", 1 / 3),
        ("**Answer:** 24", 1 / 3),
        ("The final answer is $24$.", 1 / 3),
        ("I have no answer", 0.0),
        (r"\boxed{}", 0.0),
        # Two of three steps, one connective (then), an answer: (2/3 + 1/3 + 1)/3.
        ("1. Add 2 and 2.\n2. Then divide by 2.\nThe answer is 2.", 2 / 3),
        # Three Markdown steps and nothing else: 1/3. "4.5", "-3 + x" and "a: 4" open no step.
        ("### Step 1\n**2.** Add\n- Divide\n4.5\n-3 + x\na: 4", 1 / 3),
        ("(a) Add\nb) Divide\nFinally multiply", (1 + 1 / 3) / 3),  # 3 steps and `finally`
        # The answer must be near the end: the last three lines do not have it.
        ("\\boxed{24}\nOne\nTwo\nThree", 0.0),
        ("\\boxed{24}\nOne\nTwo", 1 / 3),
    ],
)
def test_by_hand(text: str, score: float) -> None:
    assert step_by_step([text]) == [pytest.approx(score, abs=1e-12)]
    assert step_by_step([[{"role": "assistant", "content": text}]]) == [pytest.approx(score, abs=1e-12)]


def test_repetition_costs() -> None:
    # One step line written three times is one step, and 3 of its 5 lines are left: "Next, add." twice is dropped.
    # Steps 1/3, connectives {next, so} 2/3, answer 1: 2/3 in all, times 3/5.
    text = "Next, add.\nNext, add.\nNext, add.\nSo it is 4.\n\\boxed{4}"
    assert step_by_step([text]) == [pytest.approx(2 / 3 * 3 / 5)]
    # Repeating a clear solution makes it worse each time, down to nothing.
    scores = step_by_step(["\n".join([CLEAR] * times) for times in (1, 2, 10, 100)])
    assert scores == pytest.approx([1, 1 / 2, 1 / 10, 1 / 100])


def test_rows_stand_alone() -> None:
    texts = [CLEAR, "24", r"\boxed{24}"]
    assert step_by_step(texts, answer=["24"] * 3) == [step_by_step([text])[0] for text in texts]


@pytest.mark.parametrize(
    "piece",
    ["<answer>", "\\boxed{", "answer ", "answer********", "#", "* ", "1.", "step ", "(((", "then ", "\n", "\n1. "],
)
def test_long_hostile_text_is_scored(piece: str) -> None:
    """Nothing here may take quadratic time; a million characters are enough to notice."""
    (score,) = step_by_step([piece * (1_000_000 // len(piece))])
    assert 0.0 <= score <= 1.0
