"""One process of a scripted training run; writes what it saw to a folder. Started by accelerate, or alone.

accelerate launch --config_file accelerate_configs/cpu_2proc.yaml tests/e2e/scripted_run.py FOLDER CASE ROWS
"""

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlbal.rewards.suite import RewardSuite
from rlbal.trainers.allocator import RolloutAllocator
from tests.support import make_recipe, make_rows, make_trainer, parameters

CASES: dict[str, dict[str, Any]] = {
    "dapo": {"weighting": {"method": "gradient", "step_size": 1.0}},
    "cispo": {"weighting": {"method": "hypervolume", "objectives": {"even": "max", "tokens": "min"}}},
    "vespo": {},
    # Four prompts for batches of four: from the second step on, groups differ in size and cross the processes.
    "knapsack": {
        "weighting": {"method": "gradient", "step_size": 1.0},
        "allocation": {"method": "knapsack", "low": 1, "strata": "prompt"},
        "budget": {"schedule": "adaptive", "window": 1, "start": 16, "end": 4, "scope": "prompt"},
        "data__prompt": "{question} {token_budget}",
        "rewards__success": "solved",
        "trainer__max_steps": 5,
    },
}


def by_turn(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that depend on the prompt and on how many rows of the batch it had before."""
    turns: Counter[int] = Counter()
    turn_N = [turns.update([prompt]) or turns[prompt] for prompt in trainer.allocator.drawn.tolist()]
    mine = trainer._local_slice(len(prompts))
    completions = []
    for index, turn in zip(trainer.allocator.drawn[mine].tolist(), turn_N[mine], strict=True):
        dice = random.Random(f"{index}/{turn}/{trainer._step}")
        completions.append([dice.randrange(40, 120) for _ in range(dice.randrange(1, 12))])
    ids = trainer.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


class Allocator(RolloutAllocator):
    """Keeps the last draw."""

    def draw(self, step: int) -> Any:
        self.drawn = super().draw(step)
        return self.drawn


def main(folder: str, case: str, rows: int) -> None:
    """Train a few steps of SGD on scripted rollouts with `rows` rows per process."""
    functions = {
        "even": {"function": "tests/scripted_rewards.py:even_share", "range": [0, 1]},
        "short": {"function": "tests/scripted_rewards.py:sometimes_missing", "weight": 0.5, "range": [0, 1]},
        "concise": {"function": "reward_fns.length:conciseness", "weight": 0.3},
        "solved": {"function": "tests/scripted_rewards.py:by_prompt", "range": [0, 1], "weight": 0.2},
    }
    world = int(os.environ.get("WORLD_SIZE", "1"))
    recipe = make_recipe(
        Path(folder) / "run",
        rewards__functions=functions,
        trainer__loss_type="dapo" if case == "knapsack" else case,
        trainer__per_device_train_batch_size=rows,
        launch={"num_processes": world},
        **CASES[case],
    )
    kwargs = {"rows": make_rows().select(range(4)), "rollout_func": by_turn} if case == "knapsack" else {}
    trainer = make_trainer(recipe, RewardSuite(recipe.rewards), world, **kwargs)
    trainer.allocator.__class__ = Allocator
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
        "prompts": trainer.batch.prompt_index_N.tolist(),
        "ledger": {name: array.tolist() for name, array in trainer.allocator.ledger.state_dict().items()},
        "state": trainer.learned.now(),
    }
    Path(folder, f"rank{accelerator.process_index}.json").write_text(json.dumps(seen))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
