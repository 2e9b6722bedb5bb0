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
from rlbal.recipe import TinySection, parse_recipe
from rlbal.tiny import build_model, build_tokenizer

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


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_the_critic_of_ppo_takes_memory(values: dict[str, Any], kind: str) -> None:
    report = check(values, algorithm__name="ppo", ppo={"critic": kind})
    assert report.problems == []
    memory = report.figures["memory"]["gib_per_device"]
    head = (32 * 32 + 32) + (32 + 1)
    # The model's words are its output layer too, so a critic without one has as many weights. 4 + 4 + 8 bytes each.
    model = memory["weights"] if kind == "separate" else 0.0
    assert memory["critic"] == pytest.approx(4 * model + head * 16 / 2**30, rel=1e-12)


TIGHT = """\
import json

def within(completions, completion_ids, prompts, token_budget, **kwargs):
    # Needs the budget; notes what it was told, and where completions end.
    with open("seen.jsonl", "a") as file:
        file.writelines(
            json.dumps([prompt, budget, len(ids)]) + "\\n"
            for prompt, budget, ids in zip(prompts, token_budget, completion_ids)
        )
    return [float(len(ids) <= budget) for ids, budget in zip(completion_ids, token_budget)]
"""
BUDGET = {"schedule": "exponential", "start": 6, "end": 2, "decays": 1}


@pytest.fixture
def tight(values: dict[str, Any]) -> dict[str, Any]:
    """The good recipe with a prompt that tells the budget and a reward that needs it."""
    Path("tight.py").write_text(TIGHT)
    values["rewards"]["functions"]["within"] = {"function": "tight.py:within"}
    values["data"]["prompt"] = "{question} In {token_budget}: "
    values["trainer"] |= {"max_completion_length": 100, "max_steps": 10}
    values["model"]["tiny"]["max_positions"] = 200
    return values


def test_a_schedule_is_said_in_words_and_its_first_budget_is_tried(tight: dict[str, Any]) -> None:
    report = check(tight, budget=BUDGET)
    assert report.problems == []
    assert "exponential: 6 tokens at step 0, 2 at 5; completions end at twice the budget" in texts(report, "ok")
    seen = [json.loads(line) for line in Path("seen.jsonl").read_text().splitlines()]
    assert {budget for _, budget, _ in seen} == {6}
    assert seen[0][0] == "What is 10 + 10? In 6: "
    rollouts = seen[-32:]  # the probe comes last
    assert max(length for _, _, length in rollouts) == 12
    # "What is 10 + 10? In 100: " has 25 characters: no budget is larger than the longest completion.
    assert report.figures["prompt_tokens"]["max"] == 25


def test_a_field_without_a_schedule_shows_the_longest_completion(tight: dict[str, Any]) -> None:
    del tight["rewards"]["functions"]["within"]
    Path("mine.py").write_text(
        REWARDS + "\ndef told(completions, prompts, **kwargs):\n"
        "    return [float('In 100: ' in prompt) for prompt in prompts]\n"
    )
    tight["rewards"]["functions"]["told"] = {"function": "mine.py:told"}
    report = check(tight)
    assert report.problems == []
    assert report.figures["probe"]["means"]["told"] == 1.0
    assert report.figures["gold"]["rewards"]["told"]["gold"] == 1.0
    assert "budget" not in [step for step, _, _ in report.findings]


def test_a_reward_that_needs_a_budget_without_one(tight: dict[str, Any]) -> None:
    (problem,) = check(tight).problems
    assert problem.startswith("columns: reward `within` needs column `token_budget`, and the recipe has no budget")
    assert "set `budget.schedule`, e.g. `budget: {schedule: constant, tokens: 64}`" in problem


def test_a_budget_above_the_context_of_a_model_that_is_loaded(tight: dict[str, Any]) -> None:
    section = TinySection(hidden_size=32, layers=1, heads=2, max_positions=100)
    tokenizer = build_tokenizer([])
    build_model(section, tokenizer, seed=0).save_pretrained("policy")
    tokenizer.save_pretrained("policy")
    tight["model"] = {"name_or_path": "policy"}
    first, second = check(tight, budget={"schedule": "constant", "tokens": 100}).problems
    assert first == (
        "budget: `budget.tokens` (100) leaves no room for a prompt in the model's 100 positions\n"
        "Fix: lower it, and `trainer.max_completion_length` with it"
    )
    assert second.startswith("prompt lengths: longest prompt 25 + `trainer.max_completion_length` 100 is more")
