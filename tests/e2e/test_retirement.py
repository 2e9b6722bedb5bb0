"""Prompts that are solved leave the pool; when too few are left, training ends well."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from rlbal.experiments.results import unfinished
from rlbal.recipe import Recipe, parse_recipe
from rlbal.run import LEDGER, RunDirectory, read_jsonl
from rlbal.train import train

REWARDS = """
def small_sums(completions, answer, **kwargs):
    return [float(int(gold) < LIMIT) for gold in answer]
"""


def recipe_for(tmp_path: Path, limit: int, **changes: Any) -> Recipe:
    """36 sums of two digits, answers 0 to 10: those with an answer below the limit always succeed."""
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(6) for b in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(f"LIMIT = {limit}\n{REWARDS}")
    values: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "model": {"tiny": {"hidden_size": 32, "layers": 2, "heads": 2, "max_positions": 256}},
        "data": {"source": "file", "path": str(tmp_path / "sums.jsonl"), "eval_size": 4},
        "algorithm": {"rollouts_per_prompt": 8},
        "allocation": {"retire_at": 0.8},
        "rewards": {"functions": {"small": {"function": f"{tmp_path / 'my_rewards.py'}:small_sums", "range": [0, 1]}}},
        "evaluation": {"samples_per_prompt": 1, "at_start": False},
        "trainer": {
            "per_device_train_batch_size": 64,
            "max_completion_length": 6,
            "max_steps": 20,
            "gradient_checkpointing": False,
            "save_steps": 100,
        },
    }
    return parse_recipe({**values, **changes})


def test_training_ends_when_every_prompt_is_solved(tmp_path: Path, capsys: Any) -> None:
    """32 prompts, 8 a batch, all solved: the first epoch of 4 batches is all there is."""
    recipe = recipe_for(tmp_path, limit=100)
    run = RunDirectory(train(recipe))
    records = list(read_jsonl(run.metrics_path))
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    # The belief about 8 of 8 successes is Beta(8.5, 0.5) until there is a prior to fit: above 0.8 at once.
    assert [record["ledger/retired"] for record in records[:2]] == [0.25, 0.5]
    stopped = json.loads(run.stopped_path.read_text())
    assert stopped["step"] == 4 and "`allocation.retire_at`" in stopped["reason"]
    assert "Training ended after step 4" in " ".join(capsys.readouterr().out.split())
    assert [record["step"] for record in read_jsonl(run.evaluations_path)] == [4]
    assert unfinished(run, recipe) is None  # for sweeps, too
    assert run.latest_checkpoint().name == "checkpoint-4"

    train(recipe, resume=True)  # nothing is left to do
    assert len(list(read_jsonl(run.metrics_path))) == 4
    assert unfinished(run, recipe) is None and run.stopped_path.is_file()


def test_only_solved_prompts_leave(tmp_path: Path) -> None:
    run = RunDirectory(train(recipe_for(tmp_path, limit=4)))
    ledger = load_file(run.path / LEDGER)
    last = ledger["last_seen"]
    rows = ledger["counts"][:, :2].sum(axis=1)
    solved = ledger["counts"][:, 0] > 0
    assert len(list(read_jsonl(run.metrics_path))) == 20
    assert 5 < solved.sum() < 20
    assert (last[solved] < 4).all()  # tried in the first epoch, and never again
    assert (last[~solved] > 4).all()
    assert (rows[solved] <= 8).all()


def test_reviewed_prompts_come_back(tmp_path: Path) -> None:
    allocation = {"retire_at": 0.8, "review_fraction": 0.5}
    run = RunDirectory(train(recipe_for(tmp_path, limit=4, allocation=allocation)))
    ledger = load_file(run.path / LEDGER)
    solved = ledger["counts"][:, 0] > 0
    assert (ledger["last_seen"][solved] > 4).any()
