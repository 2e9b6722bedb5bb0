"""One process of a scripted training run; writes what it saw to a folder. Started by accelerate, or alone.

accelerate launch --config_file accelerate_configs/cpu_2proc.yaml tests/e2e/scripted_run.py FOLDER LOSS ROWS
"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlbal.rewards.suite import RewardSuite
from tests.support import make_recipe, make_trainer, parameters

# Loss -> how rewards are weighted in its run.
WEIGHTING = {
    "dapo": {"method": "gradient", "step_size": 1.0},
    "cispo": {"method": "hypervolume", "objectives": {"even": "max", "tokens": "min"}},
    "vespo": {"method": "fixed"},
}


def main(folder: str, loss: str, rows: int) -> None:
    """Train a few steps of SGD on scripted rollouts with `rows` rows per process."""
    functions = {
        "even": {"function": "tests/scripted_rewards.py:even_share", "range": [0, 1]},
        "short": {"function": "tests/scripted_rewards.py:sometimes_missing", "weight": 0.5, "range": [0, 1]},
        "concise": {"function": "reward_fns.length:conciseness", "weight": 0.3},
    }
    world = int(os.environ.get("WORLD_SIZE", "1"))
    recipe = make_recipe(
        Path(folder) / "run",
        rewards__functions=functions,
        trainer__loss_type=loss,
        weighting=WEIGHTING[loss],
        trainer__per_device_train_batch_size=rows,
        launch={"num_processes": world},
    )
    trainer = make_trainer(recipe, RewardSuite(recipe.rewards), world)
    start = parameters(trainer.model)
    trainer.train()
    assert trainer.batch is not None
    accelerator = trainer.accelerator
    seen = {
        "num_processes": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type.value),
        "wrapped": type(trainer.model_wrapped).__name__,
        "advantages": list(trainer._logs["advantages"]),
        "rewards": trainer.batch.rewards_NK.tolist(),
        "metrics": [entry for entry in trainer.state.log_history if "loss" in entry],
        "moved": (parameters(trainer.model) - start).tolist(),
    }
    Path(folder, f"rank{accelerator.process_index}.json").write_text(json.dumps(seen))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
