"""Which model `rlbal eval` takes, and what it says when there is none."""

import json
from pathlib import Path

import pytest

from rlbal.errors import RecipeError, RunError
from rlbal.eval_command import evaluate_model, model_folder
from rlbal.run import STATE, RunDirectory
from tests.small_recipe import small


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with whole checkpoints at steps 5 and 10, the first of them the best."""
    run = RunDirectory(tmp_path / "run")
    run.start(small())
    for step in (5, 10):
        folder = run.path / f"checkpoint-{step}"
        folder.mkdir()
        for name in (STATE, "trainer_state.json"):
            (folder / name).write_text("{}")
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
