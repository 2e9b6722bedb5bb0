"""Which model `rlbal eval` takes, and what it says when there is none."""

import json
from pathlib import Path

import pytest

from rlbal.checkpoint import seal
from rlbal.errors import RecipeError, RunError
from rlbal.eval_command import budget_at, evaluate_model, model_folder
from rlbal.recipe import parse_recipe
from rlbal.run import STATE, RunDirectory, append_jsonl, read_jsonl
from rlbal.train import train
from tests.small_recipe import small


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with whole checkpoints at steps 5 and 10, the first of them the best."""
    run = RunDirectory(tmp_path / "run")
    run.start(small())
    for step in (5, 10):
        folder = run.path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / STATE).write_text("{}")
        seal(folder)
    (run.path / "best.json").write_text(json.dumps({"checkpoint": "checkpoint-5"}))
    return run


def test_the_final_model_is_the_default(run: RunDirectory) -> None:
    run.model_path.mkdir()
    assert model_folder(run, None) == model_folder(run, "final") == run.model_path


def test_the_best_checkpoint_and_that_of_a_step(run: RunDirectory) -> None:
    assert model_folder(run, "best").name == "checkpoint-5"
    assert model_folder(run, "10").name == "checkpoint-10"


def test_an_unfinished_run_says_what_can_be_evaluated(run: RunDirectory) -> None:
    with pytest.raises(RunError, match=r"no final model yet[\s\S]*--checkpoint best"):
        model_folder(run, None)
    with pytest.raises(RunError, match=r"checkpoint-7[\s\S]*steps with a checkpoint: 5, 10"):
        model_folder(run, "7")


def test_a_run_without_evaluations_has_no_best(run: RunDirectory) -> None:
    (run.path / "best.json").unlink()
    with pytest.raises(RunError, match=r"no best checkpoint[\s\S]*evaluation\.every"):
        model_folder(run, "best")


def test_a_model_needs_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--recipe RECIPE"):
        evaluate_model(str(tmp_path), None, [], None, as_json=False)


def test_a_checkpoint_of_a_model_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small().dump())
    with pytest.raises(RunError, match="--checkpoint goes with a run directory"):
        evaluate_model(str(tmp_path), recipe, [], "best", as_json=False)


def test_the_budget_that_training_went_on_with_and_that_of_the_last_step(run: RunDirectory) -> None:
    for step in range(1, 13):
        append_jsonl(run.metrics_path, {"step": step, "budget/tokens": 64 if step <= 5 else 32 if step <= 10 else 16})
    budgets = [budget_at(run, model_folder(run, checkpoint)) for checkpoint in ("5", "10")]
    assert budgets == [32, 16]  # steps 6 and 11 were the first after those checkpoints
    assert budget_at(run, run.model_path) == 16


def test_runs_without_a_budget_have_none(run: RunDirectory) -> None:
    assert budget_at(run, run.model_path) is None  # no step at all
    append_jsonl(run.metrics_path, {"step": 1})  # as runs wrote it that knew no budgets
    append_jsonl(run.metrics_path, {"step": 2, "budget/tokens": None})
    assert budget_at(run, run.model_path) is None


@pytest.mark.e2e
def test_a_finished_run_is_evaluated_as_it_was_while_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four steps with 12·0.7^t tokens: 12, 8.4, 5.88 and 4.1. After the last there is no fifth budget, 2.9."""
    (tmp_path / "mine.py").write_text(
        "def even(completion_ids, **kwargs):\n"
        "    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]\n"
    )
    run = RunDirectory(
        train(
            parse_recipe(
                {
                    "output_dir": str(tmp_path / "run"),
                    "model": {"tiny": {"hidden_size": 32, "layers": 1, "heads": 2, "max_positions": 256}},
                    "data": {
                        "source": "reasoning_gym",
                        "task": "chain_sum",
                        "size": 32,
                        "eval_size": 8,
                        "prompt": "{token_budget} tokens: {question}",
                    },
                    "budget": {"schedule": "exponential", "start": 12, "gamma": 0.7, "interval": 1},
                    "algorithm": {"rollouts_per_prompt": 4},
                    "rewards": {
                        "functions": {
                            "even": {"function": f"{tmp_path / 'mine.py'}:even", "range": [0, 1]},
                            "length": {"function": "reward_fns.length:band", "weight": 0.1},
                        }
                    },
                    "evaluation": {"samples_per_prompt": 2, "every": 1},
                    "trainer": {
                        "per_device_train_batch_size": 8,
                        "max_completion_length": 20,
                        "max_steps": 4,
                        "gradient_checkpointing": False,
                        "save_steps": 1,
                    },
                }
            )
        )
    )
    recorded = {line["step"]: line for line in read_jsonl(run.evaluations_path)}
    budgets = {step: line["settings"]["budget"] for step, line in recorded.items()}
    assert budgets == {0: 12, 1: 8, 2: 6, 3: 4, 4: 4}

    def evaluated(*arguments: object) -> dict:
        capsys.readouterr()
        evaluate_model(*arguments, as_json=True)  # type: ignore[arg-type]
        return json.loads(capsys.readouterr().out)

    for checkpoint, step in (("1", 1), (None, 4)):
        found = evaluated(str(run.path), None, [], checkpoint)
        assert found["settings"] == recorded[step]["settings"]
        assert found["settings"]["budget_max_new_tokens"] == {1: 16, 4: 8}[step]
        assert found["metrics"] == pytest.approx(recorded[step]["metrics"])
        assert found["metrics"]["budget/length/mean"] <= 2 * budgets[step]

    # Another model under the recipe: at the budget that its schedule ends with.
    found = evaluated(str(run.path / "checkpoint-2"), run.path / "recipe.yaml", [], None)
    assert found["settings"]["budget"] == 4
    without = evaluated(
        str(run.path), None, ["budget={schedule: none}", "rewards.functions.length.args={target_tokens: 4}"], None
    )
    assert not [name for name in without["metrics"] if name.startswith("budget/")]
