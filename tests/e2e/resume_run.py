"""The same run three times on two processes of an engine: to its end, killed in the middle, and resumed.

python tests/e2e/resume_run.py FOLDER ENGINE=CASE...      leaves FOLDER/ENGINE/full and FOLDER/ENGINE/killed
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch.multiprocessing import ProcessExitedException

sys.path.insert(0, str(Path(__file__).parents[2]))

import rlbal.trainers.ppo  # noqa: F401  (once, for all processes)
from rlbal.train import train
from rlbal.trainers.grpo import BalancedGRPOTrainer
from tests.e2e.engines_fork import fork
from tests.resumable import resumable_recipe

# Two processes with as many rows in all as the tests of one process have; checkpoints at 2 (in a cycle), 4 and 6.
CYCLE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
TRAINER = {**CYCLE, "num_iterations": 2, "max_steps": 6, "save_steps": 2, "use_cpu": True, "ddp_timeout": 60}
KNAPSACK = {"allocation": {"method": "knapsack", "low": 1}}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {**KNAPSACK, "weighting": {"method": "gradient", "step_size": 1.0}},
    "ppo": {**KNAPSACK, "algorithm": {"name": "ppo", "rollouts_per_prompt": 4}},
    "lora": {**KNAPSACK, "lora": {"r": 4, "target_modules": "all-linear"}},
}
KILLED_AT = 4  # micro-batches: in the third step


def killed(recipe: Any, rank: int) -> None:
    """Train until the second process is killed, in the backward passes of a step."""
    usual, calls = BalancedGRPOTrainer.training_step, 0

    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(trainer, *args, **kwargs)

    BalancedGRPOTrainer.training_step = training_step  # type: ignore[method-assign]
    train(recipe)


def go(recipe: Any, resume: bool, rank: int) -> None:
    train(recipe, resume=resume)


def three_times(folder: Path, engine: str, case: str) -> None:
    folder.mkdir()
    changes = {**CASES[case], "trainer": TRAINER, "launch": {"num_processes": 2}}
    full, broken = (resumable_recipe(folder / name, changes) for name in ("full", "killed"))
    fork(engine, partial(go, full, False))
    try:
        fork(engine, partial(killed, broken))
    except ProcessExitedException:
        pass
    else:
        sys.exit("it was not killed")
    fork(engine, partial(go, broken, True))


def main(folder: Path, runs: list[str]) -> None:
    import deepspeed  # noqa: F401

    for run in runs:
        engine, case = run.split("=")
        three_times(folder / engine, engine, case)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
