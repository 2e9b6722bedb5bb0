"""How long it takes to gather a batch's numbers, balance it and allocate the next, without a model.

The pieces are the trainer's own, called on made-up batches as large as no model on these machines could fill.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from rlbal.batch import RolloutBatch, batch_metrics, group_rows
from rlbal.batch_plan import BatchPlan, plan_batches
from rlbal.recipe import Recipe, parse_recipe
from rlbal.trainer_section import validate_trainer, with_defaults
from rlbal.trainers.allocator import RolloutAllocator
from rlbal.trainers.balance import RewardBalance

REPEATS, WARM_UP = 9, 2
PARTS = ("gather", "balance", "allocate")
MAX_TOKENS = 1024


def series(wanted: dict[str, list[dict[str, int]]]) -> dict[str, list[dict[str, Any]]]:
    """Seconds of every setting of every series, as `measure` gives them."""
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=5))
    torch.set_num_threads(1)
    return {name: [{**one, **measure(world, **one)} for one in settings] for name, settings in wanted.items()}


def measure(world: int, rollouts: int, per_prompt: int = 8, rewards: int = 2) -> dict[str, Any]:
    """Seconds of each part, one number for each repetition, in the first process."""
    recipe = make_recipe(world, rollouts, per_prompt, rewards)
    plan = plan_batches(recipe, with_defaults(validate_trainer(recipe.trainer)), world)
    # Twice the prompts of a batch: some come again, and the ledger has something to say of them.
    rows = Dataset.from_dict({"prompt": ["?"] * (2 * plan.prompts)})
    balance, allocator = RewardBalance(recipe, MAX_TOKENS), RolloutAllocator(recipe, plan, rows, shuffle=True)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    for step in range(WARM_UP + REPEATS):
        taken = one_step(balance, allocator, plan, recipe, step)
        if step >= WARM_UP:
            for part in PARTS:
                seconds[part].append(taken[part])
    return {"prompts_in_batch": plan.prompts, "seconds": seconds}


def one_step(
    balance: RewardBalance, allocator: RolloutAllocator, plan: BatchPlan, recipe: Recipe, step: int
) -> dict[str, float]:
    """Draw a batch, make it up, gather and balance it, and learn from it; the seconds of each part."""
    clock = Clock()
    index_N = clock("allocate", lambda: allocator.draw(step))
    numbers_NX, rewards_NK = make_up(index_N, recipe, step)
    if plan.num_processes > 1:
        torch.distributed.barrier()  # so that waiting for the other is not counted as sending
    numbers_NX, rewards_NK = clock("gather", lambda: gather(numbers_NX, rewards_NK, plan))
    index, prompt_N, completion_N, truncated_N, _ = numbers_NX.unbind(1)
    names = list(recipe.rewards.functions)

    def balanced() -> RolloutBatch:
        batch = RolloutBatch(
            prompt_index_N=index,
            group_N=group_rows(index),
            rewards_NK=rewards_NK,
            completion_tokens_N=completion_N,
            prompt_tokens_N=prompt_N,
            truncated_N=truncated_N.bool(),
            budget_N=None,
        )
        balance.advantages(batch, 0.5)
        batch_metrics(batch, balance.weights_K, names, 0)
        return batch

    batch = clock("balance", balanced)
    clock("allocate", lambda: allocator.observe(batch, step))
    return clock.seconds


class Clock:
    """Adds up the seconds of calls: of the processor, since others use it too, but on the wall for what waits."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def __call__(self, part: str, action: Callable[[], Any]) -> Any:
        now = time.perf_counter if part == "gather" else time.process_time
        started = now()
        result = action()
        self.seconds[part] += now() - started
        return result


def make_up(index_N: np.ndarray, recipe: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The five integers and the rewards of each row; the same on every process."""
    rng = np.random.default_rng(step)
    rows, rewards = len(index_N), len(recipe.rewards.functions)
    columns = [index_N, np.full(rows, 60), rng.integers(1, MAX_TOKENS, rows), rng.random(rows) < 0.1, np.zeros(rows)]
    success_N = rng.random(rows) < (index_N % 11) / 10  # prompts from never to always solved
    rewards_NK = np.where(np.arange(rewards) == 0, success_N[:, None], rng.random((rows, rewards)))
    return torch.tensor(np.stack(columns, axis=1).astype(np.int64)), torch.tensor(rewards_NK, dtype=torch.float32)


def gather(numbers_NX: torch.Tensor, rewards_NK: torch.Tensor, plan: BatchPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """As if each process had only its own rows: they are sent to all."""
    world = plan.num_processes
    if world == 1:
        return numbers_NX, rewards_NK
    mine = slice(torch.distributed.get_rank() * plan.rollouts // world, None)
    found = []
    for whole in (numbers_NX, rewards_NK):
        own = whole[mine][: plan.rollouts // world].contiguous()
        gathered = torch.empty_like(whole)
        torch.distributed.all_gather_into_tensor(gathered, own)
        found.append(gathered)
    return found[0], found[1]


def make_recipe(world: int, rollouts: int, per_prompt: int, rewards: int) -> Recipe:
    """Knapsack allocation, and advantages by the beta density: the dearest there is of each."""
    functions = {
        f"reward{index}": {"function": "rewards.py:even_share", "range": [0, 1], "weight": 1.0}
        for index in range(rewards)
    }
    return parse_recipe(
        {
            "output_dir": "runs/communication",
            "model": {"tiny": {}},
            "data": {"source": "reasoning_gym", "task": "chain_sum", "eval_size": 0},
            "algorithm": {"rollouts_per_prompt": per_prompt},
            "allocation": {"method": "knapsack"},
            "advantage": {"scale": "beta", "order": "normalize_then_sum"},
            "rewards": {"functions": functions},
            "launch": {"num_processes": world},
            "trainer": {"per_device_train_batch_size": rollouts // world, "max_completion_length": MAX_TOKENS},
        }
    )
