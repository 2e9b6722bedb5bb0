"""The preflight on small local files and a tiny random model: what it reports, and that it reports nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlbal.check import check_recipe
from rlbal.check_report import Report
from rlbal.cli import app
from rlbal.recipe import parse_recipe

REWARDS = """\
def right(completions, answer, **kwargs):
    return [float(text.rstrip("}").endswith(gold)) for text, gold in zip(completions, answer)]

def generous(completions, answer, **kwargs):
    return [1.0] * len(completions)

def broken(completions, answer, **kwargs):
    raise KeyError("solution")

def other_column(completions, solution, **kwargs):
    return [1.0] * len(completions)

def nothing(completions, **kwargs):
    return [None] * len(completions)
"""
ROWS = 24  # What is 10 + 10? ... What is 10 + 33?


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A good recipe, in a folder with its data and rewards."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is 10 + {number}?", "answer": str(10 + number)} for number in range(10, 10 + ROWS)]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Path("mine.py").write_text(REWARDS)
    return {
        "output_dir": "runs/x",
        "model": {"tiny": {"hidden_size": 32, "layers": 2, "heads": 2, "max_positions": 128}},
        "data": {"source": "file", "path": "rows.jsonl", "prompt": "{question} ", "eval_size": 0},
        "algorithm": {"rollouts_per_prompt": 4},
        "rewards": {"functions": {"right": {"function": "mine.py:right"}}, "workers": 1},
        "evaluation": {"at_start": False, "at_end": False},
        "trainer": {"per_device_train_batch_size": 8, "max_completion_length": 8},
    }


def check(values: dict[str, Any], **changes: Any) -> Report:
    """Check the recipe with `section__key=value` changes."""
    for path, value in changes.items():
        *sections, key = path.split("__")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return check_recipe(parse_recipe(values))


def no_constants(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_a_good_recipe_passes(values: dict[str, Any]) -> None:
    values["rewards"]["functions"] = {
        "correct": {"function": "reward_fns.accuracy:math_correct", "rowwise": True},
        "concise": {"function": "reward_fns.length:conciseness", "weight": 0.1},
        "band": {"function": "reward_fns.length:band", "weight": 0.1, "args": {"target_tokens": 4}},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, ["check", "recipe.yaml", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout, parse_constant=no_constants)
    assert found["ok"] is True
    assert {finding["status"] for finding in found["findings"]} <= {"ok", "warning"}
    steps = ["recipe", "rewards", "data", "model", "prompt lengths", "memory", "speed", "gold answers", "probe"]
    assert list(dict.fromkeys(finding["step"] for finding in found["findings"])) == steps
    figures = found["figures"]
    assert figures["batch"] == {"rollouts": 8, "prompts": 2, "num_processes": 1}
    # One token per byte: "What is 10 + 10? " has 17.
    assert figures["prompt_tokens"] == {"median": 17, "p99": 17, "max": 17}
    correct = figures["gold"]["rewards"]["correct"]
    assert (correct["gold"], correct["shuffled"], figures["gold"]["equal_share"]) == (1.0, 0.0, 0.0)
    assert (figures["gold"]["correctness"], figures["gold"]["rows"]) == (["correct"], ROWS)
    assert (figures["probe"]["prompts"], figures["probe"]["rollouts"]) == (8, 32)
    assert set(figures["probe"]["means"]) == {"correct", "concise", "band"}
    # 32-bit weights, gradients and two moments per parameter: 4 : 4 : 8.
    memory = figures["memory"]["gib_per_device"]
    assert memory["gradients"] == memory["weights"] > 0
    assert memory["optimizer"] == 2 * memory["weights"]


def test_the_table_and_the_exit_code(values: dict[str, Any]) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    good = CliRunner().invoke(app, ["check", "recipe.yaml"], catch_exceptions=False)
    assert good.exit_code == 0 and "no problems found" in good.stdout
    override = "launch.accelerate=zero33"
    bad = CliRunner().invoke(app, ["check", "recipe.yaml", override], catch_exceptions=False)
    assert bad.exit_code == 1
    assert "1 problem(s)" in bad.stdout and "Did you mean `zero3`?" in bad.stdout
    as_json = CliRunner().invoke(app, ["check", "recipe.yaml", "--json", override], catch_exceptions=False)
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["ok"] is False


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        (
            {"rewards__functions__right__function": "mine.py:generous"},
            ["gold answers: right: gold answers 1.000, answers of other rows 1.000 (0.000 are equal"],
        ),
        (
            {"rewards__functions__right__function": "mine.py:other_column"},
            ["columns: reward `right` needs column `solution`; the dataset has `answer`, `prompt`"],
        ),
        (
            {"rewards__functions__right__function": "mine.py:broken"},
            [
                "gold answers: right: gold answers nan",
                # 3 forms of 24 rows each to choose from, then gold and shuffled answers in one of them
                "gold answers: reward `right` failed on 120 of 120 completions (raised 120); for example it raised "
                "KeyError: 'solution'",
                "probe: reward `right` failed on 32 of 32",
            ],
        ),
        (
            {"rewards__functions__right__function": "mine.py:rihgt"},
            ["rewards: reward `right`: mine.py has no function"],
        ),
        (
            {"rewards__functions__right__args": {"bonus": 1}},
            ["rewards: `rewards.functions.right.args.bonus`: mine.py:right has no such argument"],
        ),
        (
            {"data__max_prompt_tokens": 10},
            ["prompt lengths: 24 prompts would stop the run: they are longer than `data.max_prompt_tokens` (10)"],
        ),
        (
            {"data__max_prompt_tokens": 10, "data__overlong": "drop"},
            ["prompt lengths: the 0 prompts left do not fill a generation batch of 2"],
        ),
        (
            {"trainer__max_completion_length": 112},
            ["prompt lengths: longest prompt 17 + `trainer.max_completion_length` 112 is more than the model's 128"],
        ),
        (
            {"trainer__per_device_train_batch_size": 100},
            ["data: 24 training prompts do not fill a generation batch of 25"],
        ),
        ({"data__path": "row.jsonl"}, ["data: "]),
        (
            {"model": {"name_or_path": "/no/such/model"}},
            ["model: cannot load the tokenizer `/no/such/model` (`model.name_or_path`)"],
        ),
        ({"launch__accelerate": "zero33"}, ["recipe: no accelerate configuration `zero33`. Did you mean `zero3`?"]),
        ({"lora": {"rank": 4}}, ["recipe: `lora.rank` is not a field of peft's LoraConfig"]),
        ({"lora": {"target_modules": ["nope"]}}, ["memory: the `lora:` section does not fit the model"]),
        ({"trainer__per_device_train_batch_size": 6}, ["recipe: "]),
    ],
    ids=lambda value: "" if isinstance(value, list) else "-".join(f"{one}" for one in value),
)
def test_problems_are_reported_and_no_others(
    changes: dict[str, Any], problems: list[str], values: dict[str, Any]
) -> None:
    found = check(values, **changes).problems
    assert len(found) == len(problems), found
    for problem, start in zip(found, problems, strict=True):
        assert problem.startswith(start), problem


def test_a_completion_that_just_fits_is_no_problem(values: dict[str, Any]) -> None:
    assert check(values, trainer__max_completion_length=111).problems == []


def test_dropped_prompts_are_a_warning(values: dict[str, Any]) -> None:
    with Path("rows.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"question": "What is the sum of 10 and 1?", "answer": "11"}))
    report = check(values, data__max_prompt_tokens=17, data__overlong="drop")
    assert report.problems == []
    assert "1 prompts are dropped: they are longer than `data.max_prompt_tokens` (17)" in texts(report, "warning")


def texts(report: Report, status: str) -> str:
    return "\n".join(text for _, found, text in report.findings if found == status)


def test_failures_that_are_skipped_are_warnings_and_figures_stay_json(values: dict[str, Any]) -> None:
    values["rewards"]["functions"]["odd"] = {"function": "mine.py:broken", "weight": 0.1}
    report = check(values, rewards__on_error="skip", rewards__max_failed_share=1.0)
    assert "reward `odd` raised on 32 of 32: raised KeyError: 'solution'" in texts(report, "warning")
    figures = json.loads(json.dumps(report.to_json(), allow_nan=False))["figures"]
    assert figures["gold"]["rewards"]["odd"]["gold"] is None
    assert figures["probe"]["means"]["odd"] is None


def test_a_reward_without_scores_leaves_every_group_dead(values: dict[str, Any]) -> None:
    report = check(values, rewards__functions__right__function="mine.py:nothing")
    assert report.problems == []
    assert report.figures["probe"]["dead_groups"] == 1.0
    assert "every group scores the same on `right`" in texts(report, "warning")


def test_data_without_gold_answers(values: dict[str, Any]) -> None:
    values["rewards"]["functions"] = {"short": {"function": "reward_fns.length:conciseness"}}
    report = check(values, data__columns={"reply": "answer"})
    assert report.problems == []
    assert "no column holds gold answers" in texts(report, "warning")


def test_a_warm_start_is_not_run(values: dict[str, Any]) -> None:
    report = check(values, model__tiny__warm_start={})
    assert report.problems == []
    assert "probe" not in report.figures
    assert "left out: the tiny model gets its warm start only when the run starts" in texts(report, "ok")


def test_lora_trains_its_adapters_only(values: dict[str, Any]) -> None:
    # Rank 4 on all linear layers, in + out of each: 4 of 32 + 32 and 3 of 32 + 85 per layer, two layers.
    trainable = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 85))
    report = check(values, lora={"r": 4, "target_modules": "all-linear"})
    assert report.problems == []
    assert f"; {trainable:,} of " in texts(report, "ok")
    assert report.figures["memory"]["gib_per_device"]["gradients"] == trainable * 4 / 2**30
