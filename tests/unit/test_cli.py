"""The command line: errors without tracebacks, help worth reading, and no torch where it is not needed."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rlbal.cli import app
from rlbal.recipe import parse_recipe, parse_yaml
from rlbal.run import RunDirectory, append_jsonl
from tests.small_recipe import SMALL, small


def rlbal(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"}, catch_exceptions=False)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A small recipe in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.mark.parametrize("command", ["train", "check", "recipes"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.learning_rat=1",
            "`trainer.learning_rat` is not a field of TRL's GRPOConfig. Did you mean `learning_rate`?",
        ),
        ("sed=1", "`sed` is not a key here. Did you mean `seed`?"),
        ("seed", "override `seed` is not `key.sub=value`"),
    ],
)
def test_a_bad_recipe_exits_1_with_the_message_alone(command, override, message, recipe):
    result = rlbal(command, recipe, override)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_missing_recipe(recipe):
    result = rlbal("train", "recipes/qwen2.5-7b/grpo_moth.yaml")
    assert result.exit_code == 1
    assert result.stderr == (
        "no recipe at recipes/qwen2.5-7b/grpo_moth.yaml\nFix: Did you mean `recipes/qwen2.5-7b/grpo_math.yaml`?\n"
    )


def test_a_bad_launch(recipe):
    result = rlbal("train", recipe, "--accelerate", "zero33", "--num-processes", "2")
    assert (result.exit_code, result.stderr) == (1, "no accelerate configuration `zero33`. Did you mean `zero3`?\n")


def test_training_into_an_earlier_run_is_refused(recipe, tmp_path):
    run = RunDirectory(tmp_path / "runs" / "small")
    run.start(small())
    append_jsonl(run.metrics_path, {"step": 1})
    result = rlbal("train", recipe)
    assert result.exit_code == 1
    assert result.stderr == (
        "runs/small already holds a run\n"
        "Fix: continue it with --resume, start afresh with --overwrite, or choose another `output_dir`\n"
    )


def test_resuming_nothing_is_refused(recipe):
    result = rlbal("train", recipe, "--resume")
    assert result.exit_code == 1
    assert result.stderr.startswith("runs/small has no checkpoint to resume from\nFix: ")


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        ([], ["train", "check", "eval", "sweep", "compare", "ledger", "recipes"]),
        (
            ["train"],
            [
                "--resume",
                "--overwrite",
                "--accelerate",
                "--num-processes",
                "accelerate launch",
                "-m rlbal.train",
                "Ctrl-C",
            ],
        ),
        (["train"], ["KEY.SUB=VALUE", "trainer.learning_rate=1e-5", "output_dir", "rlbal recipes"]),
        (["check"], ["--json", "gold", "shuffled", "batch arithmetic", "memory", "Exits with 1"]),
        (["eval"], ["RUN_OR_MODEL", "--recipe", "--checkpoint", "best", "--json", "held-out"]),
        (["recipes"], ["--schema", "resolved", "KEY.SUB=VALUE"]),
    ],
)
def test_help_says_what_matters(arguments, mentioned):
    result = rlbal(*arguments, "--help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    assert [word for word in mentioned if word not in text] == []


def test_recipes_checks_every_section_of_the_one_it_shows(recipe):
    result = rlbal("recipes", recipe, "lora={rank: 8}")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("`lora.rank` is not a field of peft's LoraConfig.")


def test_no_processes_are_not_launched(recipe):
    assert rlbal("train", recipe, "--accelerate", "cpu", "--num-processes", "0").exit_code == 2


def test_recipes_lists_what_ships():
    result = rlbal("recipes")
    assert result.exit_code == 0
    assert "recipes/qwen2.5-1.5b/grpo_gsm8k.yaml" in result.stdout and "yaml-language-server" not in result.stdout


def test_recipes_shows_one_resolved(recipe):
    result = rlbal("recipes", recipe, "trainer.learning_rate=1e-5")
    assert result.exit_code == 0
    plan, text = result.stdout.split("\n", 1)
    assert plan.startswith("# 1 process x 8 rows per device x 1 steps per generation = 8 rollouts")
    shown = parse_recipe(parse_yaml(text))
    assert shown == small("trainer.learning_rate=1e-5")
    assert "baseline: group" in text


# The heavy packages take seconds to import.
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes"], ["train", "nowhere.yaml"]])
def test_torch_stays_out_of_commands_that_do_not_need_it(arguments):
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom rlbal.cli import app\n"
        f"result = CliRunner().invoke(app, {arguments!r})\n"
        "assert result.exit_code in (0, 1) and len(result.output) > 20, result.output\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'accelerate', 'reward_fns'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    "module",
    [
        "rlbal.trainer_args",
        "rlbal.speed",
        "rlbal.run",
        "rlbal.prompts.allocation",
        "rlbal.prompts.budget",
        "rlbal.rewards.suite",
        "rlbal.evaluation",
        "rlbal.scaling.compute",
        "reward_fns.length",
    ],
)
def test_torch_stays_out_of_modules_that_do_not_need_it(module):
    program = f"import sys, {module}\nassert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
