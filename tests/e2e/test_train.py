"""Whole runs of a tiny random model: what they leave behind, and what happens when something goes wrong."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer import grpo_trainer

from rlbal.errors import DataError, RecipeError, RewardError, RlbalError, RunError, TrainingStopped
from rlbal.recipe import ModelSection, Recipe, parse_recipe
from rlbal.run import RunDirectory, read_jsonl
from rlbal.tiny import build_model, build_tokenizer
from rlbal.train import train

# What `metrics.jsonl` promises of every step, whatever the recipe.
PROMISED = ["step", "rollouts", "tokens_generated", "flops", "gpu_seconds", "loss", "grad_norm", "learning_rate"]
PROMISED += [f"reward/first/{figure}" for figure in ("mean", "std", "none", "dead_groups")] + ["weight/first"]
PROMISED += ["allocation/min", "allocation/max", "allocation/mean", "effective_gradient_ratio"]
PROMISED += ["length/mean", "length/truncated", "time/generate", "time/reward", "time/balance", "time/train"]

REWARDS = '''
import os, signal
calls = 0
def first(completion_ids, **kwargs):
    """Share of even tokens: it varies under a random model, so that there is something to learn."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
def interrupting(completions, **kwargs):
    """Presses Ctrl-C in the second batch."""
    global calls
    calls += bool(kwargs.get('trainer_state'))  # not when evaluating
    if calls == 2 and kwargs.get('trainer_state'):
        os.kill(os.getpid(), signal.SIGINT)
    return [float(len(text) % 2) for text in completions]
def interrupting_at_the_end(completions, **kwargs):
    """Presses Ctrl-C in the fourth batch."""
    global calls
    calls += bool(kwargs.get('trainer_state'))  # not when evaluating
    if calls == 4 and kwargs.get('trainer_state'):
        os.kill(os.getpid(), signal.SIGINT)
    return [float(len(text) % 2) for text in completions]
def unable_to_evaluate(completions, trainer_state=None, **kwargs):
    """Raises in evaluations until there is a file `repaired`."""
    if trainer_state is None and not os.path.exists(os.path.join(os.path.dirname(__file__), "repaired")):
        raise KeyError("the unit table")
    return [float(len(text) % 2) for text in completions]
def breaking(completions, **kwargs):
    """Raises in the second batch."""
    global calls
    calls += bool(kwargs.get('trainer_state'))  # not when evaluating
    if calls == 2 and kwargs.get('trainer_state'):
        raise KeyError("the unit table")
    return [float(len(text) % 2) for text in completions]
def of_chat(completions, **kwargs):
    return [float(len(messages[0]["content"]) % 2) for messages in completions]
def needs_unit(completions, unit, **kwargs):
    return [0.0 for _ in completions]
'''


def recipe_for(tmp_path: Path, function: str = "first", **trainer: Any) -> Recipe:
    """A recipe on a local file with one reward of the file above."""
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(6) for b in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return parse_recipe(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"tiny": {"hidden_size": 32, "layers": 2, "heads": 2, "max_positions": 256}},
            "data": {"source": "file", "path": str(tmp_path / "sums.jsonl"), "eval_size": 8},
            "algorithm": {"rollouts_per_prompt": 4},
            "rewards": {
                "functions": {"first": {"function": f"{tmp_path / 'my_rewards.py'}:{function}", "range": [0, 1]}}
            },
            "evaluation": {"samples_per_prompt": 2, "pass_at": [1, 2], "every": 2, "greedy": True},
            "trainer": {
                "per_device_train_batch_size": 8,
                "max_completion_length": 12,
                "max_steps": 4,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
                "save_steps": 3,
                **trainer,
            },
        }
    )


def steps(run: RunDirectory) -> list[int]:
    return [record["step"] for record in read_jsonl(run.metrics_path)]


def test_a_run_leaves_everything_it_promises(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, save_steps=1, save_total_limit=2, report_to="tensorboard")
    run = RunDirectory(train(recipe))

    assert run.recipe() == recipe
    records = list(read_jsonl(run.metrics_path))
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert not [key for key in PROMISED if not math.isfinite(record.get(key, math.nan))]
    assert [record["rollouts"] for record in records] == [8, 16, 24, 32]
    tokens = [record["tokens_generated"] for record in records]
    assert tokens[0] == pytest.approx(8 * records[0]["length/mean"])
    assert tokens == sorted(tokens) and records[-1]["flops"] > records[0]["flops"] > 0

    evaluations = list(read_jsonl(run.evaluations_path))
    assert [evaluation["step"] for evaluation in evaluations] == [0, 2, 4]
    for evaluation in evaluations:
        assert {"pass@1", "pass@2", "mean@2", "reward/first", "greedy/reward/first"} <= set(evaluation["metrics"])
        assert {"rollouts", "tokens_generated", "flops", "gpu_seconds"} <= set(evaluation)
    best = json.loads((run.path / "best.json").read_text())
    scored = {evaluation["step"]: evaluation["metrics"]["pass@1"] for evaluation in evaluations if evaluation["step"]}
    assert best["value"] == max(scored.values())
    assert best["step"] == min(step for step, value in scored.items() if value == best["value"])
    kept = {checkpoint.name for checkpoint in run.checkpoints()}
    assert kept == {best["checkpoint"], "checkpoint-4"}
    assert list(run.path.glob("**/events.out.tfevents.*")), "TRL's report_to should be untouched"

    model = AutoModelForCausalLM.from_pretrained(run.model_path)
    assert AutoTokenizer.from_pretrained(run.model_path)("4").input_ids
    assert model.num_parameters() > 0

    with pytest.raises(RunError, match="already holds a run"):
        train(recipe)
    train(recipe_for(tmp_path, max_steps=1), overwrite=True)
    assert steps(run) == [1]


def test_same_recipe_and_seed_give_the_same_metrics(tmp_path: Path) -> None:
    def metrics(name: str) -> list[dict[str, Any]]:
        (tmp_path / name).mkdir()
        run = RunDirectory(train(recipe_for(tmp_path / name, max_steps=2)))
        timed = ("time/", "gpu_seconds", "step_time")
        return [
            {key: value for key, value in record.items() if not key.startswith(timed)}
            for record in read_jsonl(run.metrics_path)
        ]

    assert metrics("a") == metrics("b")


def test_ctrl_c_saves_a_checkpoint_and_resume_goes_on(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "interrupting")
    run = RunDirectory(recipe.output_dir)
    with pytest.raises(TrainingStopped, match=r"stopped after step 2[\s\S]*--resume"):
        train(recipe)
    assert run.latest_checkpoint().name == "checkpoint-2"
    assert not run.model_path.exists()

    train(run.recipe(), resume=True)
    assert steps(run) == [1, 2, 3, 4]
    assert [record["rollouts"] for record in read_jsonl(run.metrics_path)] == [8, 16, 24, 32]
    assert run.model_path.is_dir()


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """A run that dies at step 4 with its last checkpoint at step 3 does step 4 again, once."""
    recipe = recipe_for(tmp_path)
    run = RunDirectory(train(recipe))
    (run.path / "checkpoint-4" / "trainer_state.json").unlink()
    train(recipe, resume=True)
    assert steps(run) == [1, 2, 3, 4]
    assert [evaluation["step"] for evaluation in read_jsonl(run.evaluations_path)] == [0, 2, 4]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    run = RunDirectory(train(recipe))
    model = (run.model_path / "model.safetensors").read_bytes()
    recorded = [path.read_text() for path in (run.metrics_path, run.evaluations_path)]
    train(recipe, resume=True)
    assert [path.read_text() for path in (run.metrics_path, run.evaluations_path)] == recorded
    assert (run.model_path / "model.safetensors").read_bytes() == model
    assert run.latest_checkpoint().name == "checkpoint-4"


def test_ctrl_c_in_the_last_step_leaves_only_the_final_model_to_write(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "interrupting_at_the_end")
    run = RunDirectory(recipe.output_dir)
    with pytest.raises(TrainingStopped, match="stopped after step 4"):
        train(recipe)
    train(recipe, resume=True)
    assert steps(run) == [1, 2, 3, 4]
    assert [evaluation["step"] for evaluation in read_jsonl(run.evaluations_path)] == [0, 2, 4]
    assert run.model_path.is_dir()


def test_an_evaluation_that_failed_before_the_first_step_is_made_up_for(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "unable_to_evaluate")
    run = RunDirectory(recipe.output_dir)
    with pytest.raises(TrainingStopped, match=r"evaluation: reward `first` failed[\s\S]*the unit table"):
        train(recipe)
    assert run.latest_checkpoint().name == "checkpoint-0"
    (tmp_path / "repaired").touch()
    train(recipe, resume=True)
    assert steps(run) == [1, 2, 3, 4]
    assert [evaluation["step"] for evaluation in read_jsonl(run.evaluations_path)] == [0, 2, 4]


def test_the_best_checkpoint_exists_also_when_it_is_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step is no multiple of `every`, nothing else is saved, and each evaluation is better than the last."""
    better = itertools.count()
    monkeypatch.setattr("rlbal.evaluation.averages", lambda columns: dict.fromkeys(columns, float(next(better))))
    recipe = recipe_for(tmp_path, save_strategy="no")
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"every": 3})})
    run = RunDirectory(train(recipe))
    assert [evaluation["step"] for evaluation in read_jsonl(run.evaluations_path)] == [0, 3, 4]
    best = json.loads((run.path / "best.json").read_text())
    assert best["checkpoint"] == "checkpoint-4"
    assert best["checkpoint"] in {checkpoint.name for checkpoint in run.checkpoints()}


def test_overlong_prompts_left_out_leave_too_few_for_a_batch(tmp_path: Path) -> None:
    """Without the check TRL would train 0 steps and say nothing."""
    recipe = recipe_for(tmp_path, max_steps=1)
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write('{"question": "1+1?", "answer": "2"}\n')
    data = recipe.data.model_copy(update={"max_prompt_tokens": 6, "overlong": "drop", "eval_size": 0})
    with pytest.raises(DataError, match="1 training prompts do not fill one generation batch of 2"):
        train(
            recipe.model_copy(update={"data": data, "evaluation": recipe.evaluation.model_copy(update={"every": None})})
        )


def test_the_reference_model_is_of_the_same_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(tmp_path, max_steps=1, beta=0.1)
    model = recipe.model.model_copy(update={"revision": "v2"})
    asked: list[dict[str, Any]] = []
    create = grpo_trainer.create_model_from_path

    def recorded(path: str, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return create(path, **kwargs)

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", recorded)
    train(recipe.model_copy(update={"model": model}))
    assert [kwargs["revision"] for kwargs in asked] == ["v2"]


def test_a_reward_that_raises_stops_the_run_after_a_checkpoint(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "breaking", save_steps=100)
    run = RunDirectory(recipe.output_dir)
    with pytest.raises(TrainingStopped, match=r"reward `first` failed[\s\S]*the unit table[\s\S]*--resume"):
        train(recipe)
    assert run.latest_checkpoint().name == "checkpoint-1"
    train(recipe, resume=True)
    assert steps(run) == [1, 2, 3, 4]


def test_a_reward_whose_column_is_missing_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"`first` needs[\s\S]*`unit`"):
        train(recipe_for(tmp_path, "needs_unit"))


def test_too_few_prompts_for_one_batch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="28 training prompts do not fill one generation batch of 64 prompts"):
        train(recipe_for(tmp_path, per_device_train_batch_size=256))


def test_overwrite_deletes_nothing_when_the_new_run_cannot_start(tmp_path: Path) -> None:
    run = RunDirectory(train(recipe_for(tmp_path, max_steps=1)))
    recipe = recipe_for(tmp_path, max_steps=1)
    no_model = recipe.model_copy(update={"model": ModelSection(name_or_path=str(tmp_path / "nowhere"))})
    with pytest.raises(RlbalError, match="nowhere"):
        train(no_model, overwrite=True)
    misfit = recipe.model_copy(
        update={"model": ModelSection(name_or_path=str(run.model_path)), "lora": {"target_modules": ["nope"]}}
    )
    with pytest.raises(RecipeError, match=r"`lora:` section does not fit"):
        train(misfit, overwrite=True)
    assert steps(run) == [1] and run.model_path.is_dir()


def test_resume_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no checkpoint to resume from[\s\S]*--overwrite"):
        train(recipe_for(tmp_path), resume=True)


def test_chat_prompts(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "of_chat", max_steps=1)
    data = recipe.data.model_copy(update={"system": "Answer with a number.", "conversational": True})
    run = RunDirectory(train(recipe.model_copy(update={"data": data})))
    (first, *_) = read_jsonl(run.evaluations_path)
    assert first["examples"][0]["prompt"][0] == {"role": "system", "content": "Answer with a number."}
    assert steps(run) == [1]


def test_lora_trains_and_its_folder_loads(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, max_steps=2)
    recipe = recipe.model_copy(update={"lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}})
    run = RunDirectory(train(recipe))
    assert (run.model_path / "adapter_config.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(run.model_path).num_parameters() > 0
    assert steps(run) == [1, 2]


def warm_recipe(tmp_path: Path) -> Recipe:
    """The quickstart in small: a warm start of a few steps on chain_sum."""
    recipe = recipe_for(tmp_path, max_steps=1)
    values = recipe.model_dump(mode="json")
    values["model"]["tiny"]["warm_start"] = {"steps": 5, "batch_size": 4}
    values["data"] = {"source": "reasoning_gym", "task": "chain_sum", "size": 40, "eval_size": 8}
    return parse_recipe(values)


def test_a_warm_start_that_did_not_converge_stops_the_run_and_leaves_it_free(tmp_path: Path) -> None:
    recipe = warm_recipe(tmp_path)
    for _ in range(2):  # nothing was recorded, so the same directory may be used again
        with pytest.raises(TrainingStopped, match="warm start"):
            train(recipe)
    assert not RunDirectory(recipe.output_dir).has_results


def test_rl_starts_from_the_warm_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlbal.warm_start.MAX_EXCESS", 100.0)
    run = RunDirectory(train(warm_recipe(tmp_path)))
    warm, cold = run.path / "warm_start", build_model(run.recipe().model.tiny, build_tokenizer([]), seed=0)
    started = AutoModelForCausalLM.from_pretrained(warm)
    same = [torch.equal(a, b) for a, b in zip(started.parameters(), cold.parameters(), strict=True)]
    assert not all(same), "the saved model has not been trained"
    assert [evaluation["step"] for evaluation in read_jsonl(run.evaluations_path)] == [0, 1]
