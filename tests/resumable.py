"""A small recipe that trains in seconds, with something of everything a checkpoint has to hold, and how to compare
runs of it."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rlbal.recipe import Recipe, parse_recipe
from rlbal.run import RunDirectory, read_jsonl

FILE = Path(__file__).parent / "scripted_rewards.py"
# Wall time, and what is counted from it.
TIMES = ("time/", "gpu_seconds")


def resumable_recipe(output_dir: Path, case: dict[str, Any]) -> Recipe:
    """Six steps, each saved, on 8 prompts of which 4 make a batch: three epochs or more."""
    folder = output_dir.parent
    rows = [{"question": f"{a} + {b} = ?", "answer": str(a + b)} for a in range(4) for b in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": {"tiny": {"hidden_size": 32, "layers": 2, "heads": 2, "max_positions": 128}},
        "data": {"source": "file", "path": str(folder / "sums.jsonl"), "eval_size": 8, "prompt": "{question}"},
        "algorithm": {"rollouts_per_prompt": 4},
        "rewards": {
            "success": "even",
            "functions": {
                "even": {"function": f"{FILE}:even_share", "range": [0, 1]},
                "short": {"function": f"{FILE}:sometimes_missing", "weight": 0.5, "range": [0, 1]},
            },
        },
        "evaluation": {"samples_per_prompt": 2, "pass_at": [1, 2], "every": 2, "greedy": False},
        "trainer": {
            "per_device_train_batch_size": 16,
            "max_completion_length": 12,
            "max_steps": 6,
            "learning_rate": 5e-3,
            "gradient_checkpointing": False,
            "save_steps": 1,
            "report_to": "none",
        },
    }
    for section, own in case.items():
        values[section] = {**values.get(section, {}), **own}
    return parse_recipe(values)


def recorded(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without times."""
    return [{key: value for key, value in record.items() if not key.startswith(TIMES)} for record in read_jsonl(path)]


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor of a folder's safetensors files as bytes."""
    tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            tensors |= {f"{file.name}/{name}": opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118
    return tensors


def assert_same(one: RunDirectory, other: RunDirectory) -> None:
    """Equal metrics, evaluations, best checkpoint and weights."""
    assert recorded(other.metrics_path) == recorded(one.metrics_path)
    assert recorded(other.evaluations_path) == recorded(one.evaluations_path)
    assert other.best() == one.best()
    assert weights(one.model_path) and weights(other.model_path) == weights(one.model_path)
