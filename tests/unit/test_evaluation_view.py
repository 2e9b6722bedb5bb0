"""Tables and examples on a terminal: readable, and safe to show."""

import io
import math
from dataclasses import replace
from typing import Any

from rich.console import Console

from rlbal.evaluation import Evaluation
from rlbal.evaluation_view import comparison, difficulty_table, examples_panel, printable, table

NAN = math.nan
BEFORE = Evaluation(
    metrics={"pass@1": 0.41, "reward/format": NAN, "length/mean": 31.0},
    intervals={"pass@1": (0.38, 0.44), "reward/format": (NAN, NAN), "length/mean": (30.0, 32.0)},
    left_out={},
    by_difficulty={"2": {"prompts": 3, "metrics": {"pass@1": 0.9}}},
    missing={},
    failures={},
    prompts=512,
    samples=2048,
    settings={},
    examples=[
        {"prompt": "4 - 1 =", "completion": "5", "rewards": {"correct": 0.0}, "truncated": True, "greedy": False}
    ],
)
AFTER = replace(
    BEFORE,
    metrics={"pass@1": 0.88, "reward/format": 0.99, "length/mean": 29.5},
    intervals={"pass@1": (0.86, 0.9), "reward/format": (0.98, 1.0), "length/mean": (29.0, 30.0)},
    by_difficulty={"2": {"prompts": 3, "metrics": {"pass@1": 1.0}}, "3": {"prompts": 1, "metrics": {"pass@1": 0.5}}},
)


def shown(renderable: Any, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(renderable)
    return console.export_text().splitlines()


def line_with(lines: list[str], text: str) -> list[str]:
    (line,) = [line for line in lines if text in line]
    return [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]


def test_before_and_after_fit_80_columns() -> None:
    lines = shown(table({"warm start": BEFORE, "trained": AFTER}))
    assert line_with(lines, "metric") == ["metric", "warm start", "trained", "change"]
    assert line_with(lines, "pass@1") == ["pass@1", "0.410 [.380, .440]", "0.880 [.860, .900]", "+0.470"]
    assert line_with(lines, "format") == ["reward/format", "–", "0.990 [.980, 1.00]", "–"]
    assert line_with(lines, "length") == ["length/mean", "31.0 [30.0, 32.0]", "29.5 [29.0, 30.0]", "-1.5"]


def test_one_evaluation_has_no_change() -> None:
    assert line_with(shown(table({"model": BEFORE})), "metric") == ["metric", "model"]


def test_by_difficulty() -> None:
    lines = shown(difficulty_table({"before": BEFORE, "after": AFTER}, "pass@1"))
    assert line_with(lines, "0.900") == ["2", "3", "0.900", "1.000"]
    assert line_with(lines, "0.500") == ["3", "1", "–", "0.500"]


def test_examples_show_each_prompt_once_with_every_completion() -> None:
    text = "\n".join(shown(examples_panel({"before": BEFORE, "after": AFTER})))
    assert text.count("4 - 1 =") == 1
    assert "before: correct 0.000  cut off" in text
    assert "after: correct 0.000" in text


def test_printable_drops_what_steers_a_terminal() -> None:
    assert printable("a\x1b[31mred\x1b[0m b") == "ared b"
    assert printable("a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\c") == "abc"
    assert printable("a\x1b]52;c;unfinished") == "a52;c;unfinished"  # nothing swallows the rest of the text
    assert printable("a\x9b2Jb\x90q\x9cc\rd\x00e\x08f\x7f") == "abcdef"
    assert printable("a\u202eb\u2066c\u200bd\u2028e") == "abcde"
    assert printable("a\nb\tc") == "a\nb    c"
    assert printable("\ud800") == "\ufffd"


def test_printable_keeps_beginning_and_end() -> None:
    text = printable("a" * 500 + "b" * 500, limit=90)
    assert text == "a" * 60 + " […910 characters…] " + "b" * 30


def test_printable_takes_linear_time_on_unfinished_sequences() -> None:
    """Two hundred thousand openings of strings that never end: quadratic matching would take hours."""
    assert printable("\x90" * 200_000 + "\x1b]" * 200_000 + "\x1b[1;" * 200_000, limit=10_000_000).count("\x1b") == 0


def test_hostile_text_is_shown_as_text() -> None:
    hostile = "[bold red]x[/nothing] :smile: \x1b[2J [link=http://x]y[/link]"
    example = {**BEFORE.examples[0], "prompt": [{"role": "user", "content": hostile}], "completion": hostile}
    lines = shown(examples_panel({"[red]run[/red]": replace(BEFORE, examples=[example])}), width=100)
    text = "\n".join(lines)
    assert text.count("[bold red]x[/nothing] :smile:  [link=http://x]y[/link]") == 2
    assert "[red]run[/red]" in text
    assert "\x1b" not in text
    assert line_with(shown(table({"[red]run[/red]": BEFORE})), "metric") == ["metric", "[red]run[/red]"]


def test_comparison_shows_the_first_and_the_last_line() -> None:
    lines = [{"step": step, **one.to_json()} for step, one in [(0, BEFORE), (50, BEFORE), (100, AFTER)]]
    found = shown(comparison(lines))
    assert line_with(found, "metric") == ["metric", "step 0", "step 100", "change"]
    assert line_with(found, "pass@1")[-1] == "+0.470"
    assert line_with(found, "reward/format")[1] == "–"
    assert any("step 100: correct" in line for line in found)
    assert line_with(shown(comparison(lines[:1])), "metric") == ["metric", "step 0"]
