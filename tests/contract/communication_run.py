"""Two processes that train on scripted rollouts and note what they send each other. Started by a test.

python tests/contract/communication_run.py FILE      writes {run: what the first process noted}
"""

import importlib.util
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlbal.rewards.suite import RewardSuite
from tests.e2e.engines_fork import fork
from tests.support import REWARDS_FILE, make_recipe, make_trainer

FILE = Path(__file__).parents[2] / "benchmarks/communication/exchange.py"
spec = importlib.util.spec_from_file_location("exchange", FILE)
assert spec is not None and spec.loader is not None
exchange = importlib.util.module_from_spec(spec)
sys.modules["exchange"] = exchange  # dataclasses look it up
spec.loader.exec_module(exchange)

STEPS = 2
RUNS: dict[str, dict[str, Any]] = {
    "short": {"length": 3},
    "long": {"length": 15},
    "more rows": {"length": 15, "rows": 32},
    "metric on one process": {"length": 15, "reward": "logging_on_one_process"},
    "table": {"length": 15, "reward": "logging_on_one_process", "trainer__log_completions": True},
    "failures": {"length": 15, "reward": "failing_with_text", "rewards__on_error": "skip"},
}


def rollouts(prompts: list[str], trainer: Any, length: int) -> dict[str, Any]:
    """Completions of one length."""
    dice = random.Random(f"{trainer._step} {trainer.accelerator.process_index}")
    completions = [[dice.randrange(40, 120) for _ in range(length)] for _ in prompts]
    ids = trainer.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def run(folder: Path, length: int, rows: int = 16, reward: str = "by_place", **changes: Any) -> dict[str, Any]:
    """What is exchanged in a few steps of `rows` rows a process."""
    functions = {
        "first": {"function": f"{Path(__file__).with_name('talkative_rewards.py')}:{reward}"},
        "short": {"function": f"{REWARDS_FILE}:short"},
    }
    recipe = make_recipe(
        folder,
        rewards__functions=functions,
        trainer__per_device_train_batch_size=rows,
        trainer__max_steps=STEPS,
        launch={"num_processes": 2},
        **changes,
    )
    suite = RewardSuite(recipe.rewards)
    trainer = make_trainer(recipe, suite, 2, rollout_func=partial(rollouts, length=length))
    noted: list[Any] = []
    with exchange.noting(noted):
        trainer.train()
    assert trainer.accelerator.num_processes == 2
    return {
        "by_function": exchange.by_function(noted),
        "pickled": [[one.owner, one.function, one.sent] for one in noted if one.pickled],
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "table_rows": len(trainer._logs["prompt"]),
    }


def work(rank: int, target: Path) -> None:
    results = {name: run(target.with_name(f"{name}-{rank}"), **settings) for name, settings in RUNS.items()}
    if rank == 0:
        target.write_text(json.dumps(results))


if __name__ == "__main__":
    fork("ddp", partial(work, target=Path(sys.argv[1])))
