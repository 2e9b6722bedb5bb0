"""`rlbal ledger`: which ledger it reads, what it says of it, and what it says when it cannot."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import beta
from typer.testing import CliRunner

from rlbal.checkpoint import seal
from rlbal.cli import app
from rlbal.ledger_command import find_ledger
from rlbal.ledger_view import shared_ends
from rlbal.prompts.ledger import PromptLedger
from rlbal.run import LEDGER, STATE, RunDirectory, append_jsonl
from tests.small_recipe import small

PROMPTS = ["What is 1 + 1 in decimal digits?", "What is 2 + 2 in decimal digits?", "Evil \x1b[2J\u202e[bold]x[/bold]"]


def rlbal(*arguments):
    return CliRunner().invoke(
        app, ["ledger", *map(str, arguments)], env={"COLUMNS": "160"}, catch_exceptions=False, color=False
    )


def words(text):
    return " ".join(text.split())


def write_data(path, prompts, kinds=None):
    rows = [{"prompt": prompt, "kind": (kinds or ["k"] * len(prompts))[n]} for n, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, *overrides, prompts=PROMPTS, kinds=None):
    """A run on a file of prompts, without a ledger."""
    folder.mkdir(exist_ok=True)
    write_data(folder / "data.jsonl", prompts, kinds)
    run = RunDirectory(folder / "run")
    data = f"data={{source: file, path: {folder / 'data.jsonl'}, eval_size: 0}}"
    run.start(small(data, *overrides, f"output_dir={run.path}"))
    return run


def add_checkpoint(run, step):
    path = run.path / f"checkpoint-{step}"
    path.mkdir()
    (path / STATE).write_text("{}")
    seal(path)
    return path


def add_metrics(run, ledger, step):
    append_jsonl(run.metrics_path, {"step": step, "rollouts": 8 * step, **ledger.metrics()})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Three prompts: 0 won 1 of 4 at step 0 and 0 of 2 at step 1, 1 won 4 of 4 at step 0, 2 was never tried."""
    run, ledger = make_run(tmp_path, "allocation.forgetting=0.5"), PromptLedger(3, 0.5)
    ledger.observe([0] * 4 + [1] * 4, [1, 0, 0, 0, 1, 1, 1, 1], [10] * 4 + [30] * 4, 0)
    add_metrics(run, ledger, 1)
    ledger.save(add_checkpoint(run, 1) / LEDGER)
    ledger.observe([0, 0], [0, 0], [50, 50], 1)
    add_metrics(run, ledger, 2)
    ledger.save(run.path / LEDGER)
    return run


# What it says


def test_json_by_hand(run: RunDirectory) -> None:
    result = rlbal(run.path, "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["run"] == str(run.path) and shown["ledger"] == str(run.path / LEDGER) and shown["notes"] == []
    assert (shown["step"], shown["prompts"], shown["tried"], shown["never_tried"]) == (2, 3, 2, 1)
    assert shown["rollouts"] == 16 and shown["retired"] is None and shown["strata"] == []
    assert shown["prior"] == {"a": 0.5, "b": 0.5, "mean": 0.5, "fitted": False}
    # After step 1 prompt 0 has 0.5 successes and 1.5 + 2 failures, half of it after step 2; prompt 1 a quarter of 4.
    hardest, easiest = shown["hardest"], shown["easiest"]
    assert [record["prompt_index"] for record in hardest] == [0, 1]
    assert [record["prompt_index"] for record in easiest] == [1, 0]
    assert hardest[0]["mean"] == pytest.approx(0.75 / (0.75 + 2.25))
    assert easiest[0]["mean"] == pytest.approx(1.5 / 2)
    assert [hardest[0]["low"], hardest[0]["high"]] == pytest.approx(beta.interval(0.95, 0.75, 2.25))
    assert (hardest[0]["successes"], hardest[0]["rollouts"]) == pytest.approx((0.25, 2))
    assert (easiest[0]["successes"], easiest[0]["rollouts"]) == pytest.approx((1, 1))
    assert (hardest[0]["last_step"], easiest[0]["last_step"]) == (1, 0)
    assert hardest[0]["length"] == pytest.approx((2 * 10 + 2 * 50) / 4) and easiest[0]["length"] == 30
    assert hardest[0]["prompt"] == PROMPTS[0]
    assert shown["believed_success"]["prompts"] == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert len(shown["believed_success"]["edges"]) == 11
    # Believed at step 1 was (0.5 + 0.5) / (1 + 2) of prompt 0, seen 0.
    assert shown["drift"] == {"mean": pytest.approx(-1 / 3), "last_steps": pytest.approx(-1 / 3)}


def test_the_terminal_says_the_same(run: RunDirectory) -> None:
    text = words(rlbal(run.path).stdout)
    for part in (
        f"{LEDGER}, after step 2",
        "prompts 3 tried 2 (66.7%) never tried 1; believed of them: 0.500, Beta(0.50, 0.50) for want of data",
        "rollouts 16",
        "drift -0.333, last 10 steps -0.333",
        "0.2 to 0.3 1 ██",
        "0 0.25 [.00, .77] 0.2 2.0 1 30 What is 1 + 1 …",
        "1 0.75 [.15, 1.00] 1.0 1.0 0 30 What is 2 + 2 …",
    ):
        assert part in text, (part, text)
    assert "note:" not in text and "kinds" not in text and "retired" not in text


def test_top_limits_the_lists(run: RunDirectory) -> None:
    shown = json.loads(rlbal(run.path, "--json", "--top", 1).stdout)
    assert [len(shown[name]) for name in ("hardest", "easiest")] == [1, 1]
    assert rlbal(run.path, "--top", 0).exit_code == 2


def test_forgetting_everything_shows_the_last_visits(tmp_path: Path) -> None:
    """Otherwise nothing would be known of any prompt but those of the last step."""
    run, ledger = make_run(tmp_path, "allocation={method: knapsack, belief: mean}"), PromptLedger(3, 1)
    ledger.observe([0] * 4 + [1] * 4, [1, 0, 0, 0, 1, 1, 1, 1], [10] * 8, 0)
    ledger.observe([0, 0], [0, 0], [50, 50], 5)
    ledger.save(run.path / LEDGER)
    shown = json.loads(rlbal(run.path, "--json").stdout)
    assert shown["beliefs_of"] == "last visits"
    assert [record["mean"] for record in shown["hardest"]] == pytest.approx([0.5 / 3, 4.5 / 5])
    assert "as each prompt's last visit left it" in words(rlbal(run.path).stdout)


def test_retired_prompts_are_counted(tmp_path: Path) -> None:
    run, ledger = make_run(tmp_path, "allocation.retire_at=0.9"), PromptLedger(3, 0.01)
    ledger.observe([0] * 8 + [1] * 8, [1] * 8 + [0] * 8, [10] * 16, 0)
    ledger.retire([0, 1], 0.9)
    ledger.save(run.path / LEDGER)
    shown = json.loads(rlbal(run.path, "--json").stdout)
    assert shown["retired"] == 1
    assert [record["retired"] for record in shown["easiest"]] == [True, False]
    assert "retired 1" in words(rlbal(run.path).stdout)


def test_strata_go_by_their_names(tmp_path: Path) -> None:
    kinds = ["easy", "hard", "easy", "hard", "unseen"]
    prompts = [f"prompt {n}" for n in range(5)]
    run = make_run(tmp_path, "allocation.strata=kind", prompts=prompts, kinds=kinds)
    ledger = PromptLedger(5, 0.01, kinds)
    ledger.observe([0, 0, 1, 2], [1, 1, 0, math.nan], [10] * 4, 0)
    ledger.save(run.path / LEDGER)
    strata = json.loads(rlbal(run.path, "--json").stdout)["strata"]
    assert [(one["name"], one["prompts"], one["tried"], one["mean"]) for one in strata] == [
        ("easy", 2, 2, pytest.approx(2.5 / 3)),  # of the prompt that was scored
        ("hard", 2, 1, pytest.approx(0.5 / 2)),
        ("unseen", 1, 0, None),
    ]
    text = words(rlbal(run.path).stdout)
    assert "tried 3 (60.0%), 1 of them never scored" in text
    assert "easy 2 2 0.500 0.833" in text and "unseen 1 0 0.500 –" in text
    # The same number of rows in another order: their text would be another prompt's.
    write_data(tmp_path / "data.jsonl", prompts, ["easy", "easy", "hard", "hard", "unseen"])
    shown = json.loads(rlbal(run.path, "--json").stdout)
    assert "prompt" not in shown["hardest"][0] and "the data divide the prompts otherwise" in shown["notes"][0]
    assert [one["name"] for one in shown["strata"]] == ["0", "1", "2"]


def test_nothing_tried_yet(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    PromptLedger(3, 0.01).save(run.path / LEDGER)
    text = words(rlbal(run.path, "--plot", tmp_path / "plot.png").stdout)
    assert "tried 0 (0.0%)" in text and "No prompt has been tried and scored yet." in text
    assert "drift –, not in metrics.jsonl" in text
    assert (tmp_path / "plot.png").is_file()
    shown = json.loads(rlbal(run.path, "--json").stdout)
    assert (shown["step"], shown["hardest"], shown["rollouts"], shown["drift"]["mean"]) == (0, [], None, None)


def test_hostile_text_cannot_steer_the_terminal(run: RunDirectory) -> None:
    ledger = PromptLedger(3, 0.5)
    ledger.observe([2], [1], [5], 0)
    ledger.save(run.path / LEDGER)
    text = rlbal(run.path).stdout
    assert "Evil [bold]x[/bold]" in text and "\x1b" not in text and "\u202e" not in text
    text = rlbal(run.path, "--json").stdout
    assert text.isascii() and "\x1b" not in text
    assert json.loads(text)["hardest"][0]["prompt"] == PROMPTS[2]


def test_conversations_show_their_last_message(tmp_path: Path) -> None:
    run, ledger = make_run(tmp_path, "data.system=Be brief.", prompts=["first", "second"]), PromptLedger(2, 0.01)
    ledger.observe([0, 1], [1, 0], [5, 5], 0)
    ledger.save(run.path / LEDGER)
    shown = json.loads(rlbal(run.path, "--json").stdout)
    assert [record["prompt"] for record in shown["hardest"]] == ["second", "first"]


@pytest.mark.parametrize(
    ("prompts", "ends"),
    [
        (["Solve this: 1 + 1 = ? (in digits)", "Solve this: 1 + 23 = ? (in digits)"], (16, 16)),
        (["abc is what we want to know", "xyz is what we want to know"], (0, len(" is what we want to know"))),
        (["Solve this: 1", "Solve that: 2"], (0, 0)),
        (["the same prompt", "the same prompt"], (0, 0)),
        (["the beginning is all ", "the beginning is all of it"], (21, 0)),
        ([], (0, 0)),
    ],
)
def test_ends_that_all_share(prompts: list[str], ends: tuple[int, int]) -> None:
    assert shared_ends(prompts) == ends


# Which ledger


def test_the_ledger_of_a_step_and_of_the_best(run: RunDirectory) -> None:
    (run.path / "best.json").write_text(json.dumps({"checkpoint": "checkpoint-1"}))
    for checkpoint in ("1", "best"):
        shown = json.loads(rlbal(run.path, "--json", "--checkpoint", checkpoint).stdout)
        assert shown["ledger"] == str(run.path / "checkpoint-1" / LEDGER)
        # As it was then: the metrics of step 2 are left out too.
        assert (shown["step"], shown["rollouts"], shown["drift"]["mean"]) == (1, 8, None)
        assert shown["hardest"][0]["rollouts"] == pytest.approx(2)


def test_an_unfinished_run_shows_its_newest_checkpoint(run: RunDirectory) -> None:
    (run.path / LEDGER).unlink()
    ledger = PromptLedger.open(run.path / "checkpoint-1" / LEDGER, 0.5)
    ledger.save(add_checkpoint(run, 10) / LEDGER)
    cut_off = run.path / "checkpoint-20"
    cut_off.mkdir()
    ledger.save(cut_off / LEDGER)
    assert find_ledger(run, None).parent.name == "checkpoint-10"
    result = rlbal(run.path, "--checkpoint", "final")
    assert result.exit_code == 1 and f"{run.path} has no {LEDGER}" in result.stderr


def test_the_step_is_that_of_the_metrics_and_never_before_a_prompt_was_tried(run: RunDirectory) -> None:
    run.metrics_path.unlink()
    shown = json.loads(rlbal(run.path, "--json").stdout)
    assert shown["step"] == 1 and shown["drift"]["mean"] is None
    append_jsonl(run.metrics_path, {"step": 30})
    assert json.loads(rlbal(run.path, "--json").stdout)["step"] == 30


# The prompts' text


def test_prompts_that_were_too_long_are_left_out_again(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    prompts = ["one two three four five", "six", "seven eight"]
    limits = ("data.max_prompt_tokens=3", "data.overlong=drop")
    run, ledger = make_run(tmp_path, *limits, prompts=prompts), PromptLedger(2, 0.01)
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="<unk>").save_pretrained(
        str(run.model_path)
    )
    ledger.observe([0, 1], [1, 0], [5, 5], 0)
    ledger.save(run.path / LEDGER)
    shown = json.loads(rlbal(run.path, "--json").stdout)
    assert [record["prompt"] for record in shown["hardest"]] == ["seven eight", "six"] and shown["notes"] == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data.unlink(), "data.jsonl"),
        (lambda data: data.write_text("not json\n"), "data.jsonl"),
        (lambda data: write_data(data, PROMPTS[:2]), "the data now have 2 training prompts and the ledger 3"),
    ],
)
def test_without_the_data_prompts_show_as_numbers(run: RunDirectory, spoil, reason: str) -> None:
    spoil(run.path.parent / "data.jsonl")
    result = rlbal(run.path)
    assert result.exit_code == 0
    assert "note: prompts show as numbers: " in words(result.stdout) and reason in words(result.stdout)
    assert "0.25 [.00, .77]" in result.stdout and "What is" not in result.stdout
    assert "prompt" not in json.loads(rlbal(run.path, "--json").stdout)["hardest"][0]


def test_without_the_tokenizer_too(run: RunDirectory) -> None:
    run = make_run(run.path.parent / "other", "data.max_prompt_tokens=5", "data.overlong=drop")
    PromptLedger(2, 0.01).save(run.path / LEDGER)
    result = rlbal(run.path)
    assert result.exit_code == 0
    assert "note: prompts show as numbers: cannot load the tokenizer" in words(result.stdout)


# What cannot be


def test_no_run(tmp_path: Path) -> None:
    result = rlbal(tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "is not a run of rlbal" in result.stderr and "Fix: give the `output_dir`" in result.stderr


def test_a_run_without_a_ledger(run: RunDirectory) -> None:
    (run.path / LEDGER).unlink()
    (run.path / "checkpoint-1" / LEDGER).unlink()
    for arguments, where in (([], "neither"), (["--checkpoint", "1"], "checkpoint-1 has no")):
        result = rlbal(run.path, *arguments)
        assert result.exit_code == 1
        assert where in result.stderr and "made by a version that kept no ledger" in result.stderr
        assert "Fix: train again" in result.stderr


def test_no_such_checkpoint(run: RunDirectory) -> None:
    result = rlbal(run.path, "--checkpoint", "7")
    assert result.exit_code == 1 and "steps with a checkpoint: 1" in result.stderr


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"half"])
def test_a_damaged_ledger(run: RunDirectory, content: bytes) -> None:
    path = run.path / LEDGER
    path.write_bytes(path.read_bytes()[:-8] if content == b"half" else content)
    result = rlbal(run.path)
    assert result.exit_code == 1
    assert f"{path} is no usable ledger" in result.stderr and "Fix: show another one: --checkpoint" in result.stderr


def test_metrics_that_are_none(run: RunDirectory) -> None:
    with run.metrics_path.open("a") as file:
        file.write("[1, 2]\n")
    result = rlbal(run.path)
    assert result.exit_code == 1 and "no record of a step" in result.stderr


# The plot


@pytest.mark.parametrize("file", ["plot.png", "plot.svg"])
def test_the_plot(file: str, run: RunDirectory, tmp_path: Path) -> None:
    result = rlbal(run.path, "--plot", tmp_path / file)
    assert result.exit_code == 0, result.output
    start = {"plot.png": b"\x89PNG", "plot.svg": b"<?xml"}[file]
    assert (tmp_path / file).read_bytes().startswith(start)


def test_the_plot_shows_what_the_report_says(run: RunDirectory) -> None:
    from rlbal.ledger_command import read_ledger
    from rlbal.ledger_plot import draw

    shown, _ = read_ledger(run, run.path / LEDGER, 10)
    believed, _, seen, drift = draw(shown, "a $run").axes[:4]
    heights = [round(bar.get_height()) for bar in believed.patches[:20]]
    assert [place for place, height in enumerate(heights) if height] == [5, 15] and sum(heights) == 2  # 0.25, 0.75
    assert np.asarray(seen.lines[0].get_data()).tolist() == [[1, 2], pytest.approx([2 / 3, 2 / 3])]
    assert np.asarray(drift.lines[1].get_data()).tolist() == [[2], pytest.approx([-1 / 3])]


@pytest.mark.parametrize("file", ["plot.exe", "no/plot.png"])
def test_a_plot_that_cannot_be(file: str, run: RunDirectory, tmp_path: Path) -> None:
    result = rlbal(run.path, "--plot", tmp_path / file)
    assert result.exit_code == 1 and "cannot write the plot" in result.stderr and "Traceback" not in result.output


def test_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom rlbal.cli import app\n"
        "result = CliRunner().invoke(app, ['ledger', '--help'])\n"
        "assert result.exit_code == 0 and '--checkpoint' in result.output, result.output\n"
        "import rlbal.ledger_command, rlbal.ledger_view\n"
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
