import subprocess
import sys

import pytest

from reward_fns.format import boxed, think_answer


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>2+2</think><answer>4</answer>", 1.0),
        (" <think>\n2+2\n</think>\n\n<answer>\n4</answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<answer>4</answer><think>2+2</think>", 0.0),
        ("<think>2+2</think>so<answer>4</answer>", 0.0),
        ("well <think>2+2</think><answer>4</answer>", 0.0),
        ("<think>2+2</think><answer>4</answer> done", 0.0),
        ("<think>2+2</think><answer>4", 0.0),
        ("<think>2+2<answer>4</answer></think>", 0.0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_think_answer(text: str, score: float) -> None:
    assert think_answer([text]) == [score]
    assert think_answer([[{"role": "assistant", "content": text}]]) == [score]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (r"so \boxed{\frac{1}{2}}.", 1.0),
        (r"\boxed{\{1, 2\}}", 1.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{1} or \boxed{2}", 0.0),
        (r"\boxed{\frac{1}{2}", 0.0),
        (r"\boxed{\}", 0.0),
        ("4", 0.0),
    ],
)
def test_boxed(text: str, score: float) -> None:
    assert boxed([text]) == [score]


def test_long_hostile_text_is_scored() -> None:
    """Nothing here may take quadratic time or deep recursion; a million characters are enough to notice."""
    for piece in ("<think>", "</answer>", "<answer>", "\\boxed{", "{", "\\"):
        text = piece * (1_000_000 // len(piece))
        assert think_answer([text]) == [0.0]
        assert boxed([text]) == [0.0]


def test_no_reward_function_imports_torch() -> None:
    modules = ["accuracy", "clarity", "format", "length", "reasoning_gym"]
    code = f"import sys, {', '.join(f'reward_fns.{name}' for name in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
