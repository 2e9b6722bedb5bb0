"""LoRA runs from the recipe to the merged model: what lies on disk, and what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlbal.adapter import WARM_START
from rlbal.eval_command import evaluate_model
from rlbal.merge_command import merge_adapter
from rlbal.recipe import parse_recipe
from rlbal.run import RunDirectory, read_jsonl
from rlbal.train import train
from rlbal.trainers.value import CRITIC_FILE

pytestmark = pytest.mark.e2e

IDS = torch.tensor([[7, 1, 250, 33]])
EVEN = (
    "def even(completion_ids, **kwargs):\n"
    "    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]\n"
)


def trained(folder: Path, steps: int, lora: dict[str, Any], **sections: Any) -> RunDirectory:
    """A LoRA run with a checkpoint after every step."""
    (folder / "mine.py").write_text(EVEN)
    values = {
        "output_dir": str(folder / "run"),
        "model": {"tiny": {"hidden_size": 32, "layers": 1, "heads": 2, "max_positions": 256}},
        "data": {"source": "reasoning_gym", "task": "chain_sum", "size": 32, "eval_size": 8},
        "algorithm": {"rollouts_per_prompt": 4},
        "lora": {"r": 4, **lora},
        "rewards": {"functions": {"even": {"function": f"{folder / 'mine.py'}:even", "range": [0, 1]}}},
        "evaluation": {"samples_per_prompt": 2, "every": 1, "at_start": False},
        "trainer": {
            "per_device_train_batch_size": 8,
            "max_completion_length": 12,
            "learning_rate": 0.05,
            "max_steps": steps,
            "save_steps": 1,
        },
        **sections,
    }
    return RunDirectory(train(parse_recipe(values)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_adapter_alone(folder: Path, *beside: str) -> dict[str, torch.Tensor]:
    """The folder holds no other weights than the adapter's, and those of `beside`; the adapter's."""
    files = [path for path in folder.rglob("*") if path.suffix == ".safetensors" or path.match("*model*.bin")]
    weights = {path.relative_to(folder).as_posix() for path in files}
    assert weights - {"ledger.safetensors"} == {"adapter_model.safetensors", *beside}
    adapter = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    return adapter


def assert_merged_says_what_the_adapter_says(run: RunDirectory) -> None:
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(run.model_path))
    merged = logits(AutoModelForCausalLM.from_pretrained(merge_adapter(run.path)))
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    before = logits(AutoModelForCausalLM.from_pretrained(run.path / WARM_START))
    assert (merged - before).abs().max() > 1e-2


def test_a_run_leaves_its_adapter_which_evaluates_as_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, 2, {"target_modules": "all-linear"})
    monkeypatch.chdir(tmp_path)
    for folder in (run.path / "checkpoint-1", run.model_path):
        assert_adapter_alone(folder)
    assert_merged_says_what_the_adapter_says(run)

    def evaluated(*arguments: Any) -> dict[str, float]:
        capsys.readouterr()
        evaluate_model(*arguments, as_json=True)
        return json.loads(capsys.readouterr().out)["metrics"]

    recorded = {line["step"]: line["metrics"] for line in read_jsonl(run.evaluations_path)}
    assert recorded[1] != recorded[2]
    recipe = run.path / "recipe.yaml"
    assert evaluated(str(run.path), None, [], None) == pytest.approx(recorded[2])
    assert evaluated(str(run.path), None, [], "1") == pytest.approx(recorded[1])
    assert evaluated(str(run.model_path), recipe, [], None) == pytest.approx(recorded[2])


@pytest.mark.parametrize("kind", ["use_dora", "use_rslora"])
def test_dora_and_rslora_train_and_merge(kind: str, tmp_path: Path) -> None:
    run = trained(tmp_path, 1, {kind: True})
    adapter = assert_adapter_alone(run.model_path)
    assert any("magnitude" in name for name in adapter) == (kind == "use_dora")
    assert all(one.abs().max() > 0 for name, one in adapter.items() if "lora_B" in name)  # 0 at first
    assert json.loads((run.model_path / "adapter_config.json").read_text())[kind] is True
    assert_merged_says_what_the_adapter_says(run)


def test_ppo_keeps_its_critic_beside_the_adapter(tmp_path: Path) -> None:
    run = trained(tmp_path, 2, {}, algorithm={"name": "ppo", "rollouts_per_prompt": 1})
    first, last = (load_file(folder / CRITIC_FILE) for folder in (run.path / "checkpoint-1", run.model_path))
    for folder in (run.path / "checkpoint-1", run.model_path):
        assert_adapter_alone(folder, CRITIC_FILE)
    assert {name for name in last if not torch.equal(first[name], last[name])} == set(last)
    assert_merged_says_what_the_adapter_says(run)
