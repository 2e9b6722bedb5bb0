"""What rlbal relies on in TRL's GRPOTrainer. A failure here means: read what changed upstream before touching ours."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from rlbal.errors import TrainingStopped
from rlbal.rewards.suite import RewardSuite
from rlbal.trainer_section import CHOICES, OWNED, validate_trainer
from rlbal.trainers.compacted import CompactedGRPOTrainer
from rlbal.trainers.grpo import BalancedGRPOTrainer
from tests.support import PROMPTS, make_recipe, make_trainer, scripted_rollouts

SEAMS = {
    "_get_train_sampler": ["self", "dataset"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ],
    "_compute_loss": ["self", "model", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "log": ["self", "logs", "start_time"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
}


@pytest.mark.parametrize("name", SEAMS)
def test_the_method_is_still_there_with_its_arguments(name: str) -> None:
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == SEAMS[name]
    assert name in {**vars(CompactedGRPOTrainer), **vars(BalancedGRPOTrainer)}


def test_no_other_method_of_trl_is_overridden() -> None:
    own = {**vars(CompactedGRPOTrainer), **vars(BalancedGRPOTrainer)}
    ours = {name for name, value in own.items() if callable(value) and hasattr(GRPOTrainer, name)}
    assert ours - {"__init__"} == set(SEAMS)


def test_owned_and_listed_settings_exist_in_trl() -> None:
    fields = GRPOConfig.__dataclass_fields__
    assert set(OWNED) | set(CHOICES) <= set(fields)


@pytest.mark.parametrize("loss", CHOICES["loss_type"])
def test_trl_knows_every_loss_type_we_list(loss: str) -> None:
    assert validate_trainer({"loss_type": loss}) == {"loss_type": loss}
    assert f'"{loss}"' in inspect.getsource(GRPOTrainer._compute_loss)


class Recorder(BalancedGRPOTrainer):
    """Keeps the arguments that pass through the seams."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.generated = getattr(self, "generated", [])
        self.generated.append([dict(row) for row in inputs])
        return super()._generate_and_score_completions(inputs)


def trained(tmp_path: Path, **changes: Any) -> Recorder:
    recipe = make_recipe(tmp_path, **changes)
    trainer = make_trainer(recipe, RewardSuite(recipe.rewards))
    trainer.__class__ = Recorder
    trainer.train()
    return trainer


def test_the_loader_yields_positions_and_rows_are_fetched_when_due(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    assert trainer.train_dataset.column_names == ["prompt_index"]
    assert len(trainer.generated) == 3
    for rows in trainer.generated:
        assert [row["prompt"] for row in rows] == [PROMPTS[row["prompt_index"]] for row in rows]
        groups = [row["prompt_index"] for row in rows]
        assert [groups.count(index) for index in dict.fromkeys(groups)] == [4, 4, 4, 4]


def test_every_epoch_visits_every_prompt_in_an_order_of_its_own(tmp_path: Path) -> None:
    trainer = trained(tmp_path, trainer__max_steps=12)  # 6 batches of 4 prompts are an epoch of the 24
    visited = [list(dict.fromkeys(row["prompt_index"] for row in rows)) for rows in trainer.generated]
    epochs = [[index for block in visited[start : start + 6] for index in block] for start in (0, 6)]
    assert epochs[0] != epochs[1]
    for epoch, order in enumerate(epochs):
        generator = torch.Generator().manual_seed(trainer.args.seed + epoch)
        assert order == torch.randperm(24, generator=generator).tolist()


def test_generation_happens_once_per_cycle(tmp_path: Path) -> None:
    changes = {
        "trainer__per_device_train_batch_size": 4,
        "trainer__gradient_accumulation_steps": 2,
        "trainer__steps_per_generation": 4,
        "trainer__num_iterations": 2,
        "trainer__max_steps": 8,
    }
    # 8 optimizer steps x 2 micro-batches = 16 micro-batches; a cycle is 4 steps per generation x 2 iterations = 8.
    assert len(trained(tmp_path, **changes).generated) == 2


def test_ragged_groups_reach_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever allocation decides, advantages follow each row's own prompt."""
    monkeypatch.setattr(
        "rlbal.trainers.allocator.uniform_counts", lambda prompts, rollouts: np.array([1, 2, 5, rollouts - 8])
    )
    trainer = trained(tmp_path, advantage__scale="none", trainer__max_steps=1)
    batch = trainer.batch
    assert batch is not None and sorted(batch.counts_P.tolist()) == [1, 2, 5, 8]
    weighted_N = batch.rewards_NK.double() @ torch.tensor([1.0, 0.5], dtype=torch.float64)
    advantages = list(trainer._logs["advantages"])
    for group in range(4):
        rows = (batch.group_N == group).nonzero().flatten().tolist()
        mean = sum(weighted_N[row].item() for row in rows) / len(rows)
        for row in rows:
            assert advantages[row] == pytest.approx(weighted_N[row].item() - mean, abs=1e-6)


def test_one_rollout_per_prompt(tmp_path: Path) -> None:
    trainer = trained(tmp_path, algorithm={"name": "reinforce", "rollouts_per_prompt": 1}, trainer__max_steps=1)
    assert trainer.batch is not None and trainer.batch.num_prompts == 16
    weighted_N = trainer.batch.rewards_NK.double() @ torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert list(trainer._logs["advantages"]) == pytest.approx(weighted_N.tolist(), abs=1e-6)


def test_raw_rewards_are_logged_unweighted(tmp_path: Path) -> None:
    trainer = trained(tmp_path, trainer__max_steps=1)
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert trainer.batch is not None
    for k, name in enumerate(("even", "short")):
        mean = trainer.batch.rewards_NK[:, k].mean().item()
        assert logs[f"reward/{name}/mean"] == pytest.approx(mean, abs=1e-6)
        assert logs[f"rewards/{name}/mean"] == pytest.approx(mean, abs=1e-6)


def test_lengths_and_truncation_match_trls_own_figures(tmp_path: Path) -> None:
    trainer = trained(tmp_path, trainer__max_steps=1)
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logs["length/mean"] == pytest.approx(logs["completions/mean_length"])
    assert logs["length/truncated"] == pytest.approx(logs["completions/clipped_ratio"])


def test_a_failing_reward_stops_training_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def broken(completions, **kwargs):\n    raise ValueError('no such unit')\n")
    recipe = make_recipe(tmp_path / "run", rewards__functions={"broken": {"function": f"{file}:broken"}})
    trainer = make_trainer(recipe, RewardSuite(recipe.rewards))
    with pytest.raises(TrainingStopped, match=r"broken.*no such unit"):
        trainer.train()


def test_skipped_failures_are_counted_and_never_zero(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        "def nan_at_odd(completions, completion_ids, **kwargs):\n"
        "    return [float('nan') if len(ids) % 2 else 1.0 for ids in completion_ids]\n"
    )
    functions = {"odd": {"function": f"{file}:nan_at_odd"}}
    recipe = make_recipe(
        tmp_path / "run",
        rewards={"functions": functions, "on_error": "skip", "max_failed_share": 1.0},
        trainer__max_steps=1,
    )
    trainer = make_trainer(recipe, RewardSuite(recipe.rewards))
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert trainer.batch is not None
    odd = (trainer.batch.completion_tokens_N % 2 == 1).double().mean().item()
    assert 0 < odd < 1
    assert logs["reward/odd/failed/nan"] == pytest.approx(odd)
    assert logs["reward/odd/none"] == pytest.approx(odd)
    assert logs["reward/odd/mean"] == 1.0


def test_conciseness_sees_the_mean_of_the_whole_batch(tmp_path: Path) -> None:
    functions = {"concise": {"function": "reward_fns.length:conciseness"}}
    trainer = trained(tmp_path, rewards__functions=functions, trainer__max_steps=1)
    batch = trainer.batch
    assert batch is not None
    mean = batch.completion_tokens_N.double().mean()
    expected = mean / (mean + batch.completion_tokens_N.double())
    torch.testing.assert_close(batch.rewards_NK[:, 0].double(), expected, rtol=1e-5, atol=1e-6)


def test_rollout_func_is_public_and_gets_prompts_as_text() -> None:
    assert "rollout_func" in inspect.signature(GRPOTrainer.__init__).parameters
    assert callable(scripted_rollouts)
