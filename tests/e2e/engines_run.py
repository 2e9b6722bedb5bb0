"""Scripted training runs on one process, or on two processes of an engine. Started by tests.

python tests/e2e/engines_run.py FOLDER ENGINE...             forks the processes of each engine: alone, ddp, zero2, ...
accelerate launch ... tests/e2e/engines_run.py FOLDER NAME case=CASE         is one process of a real launch

The processes of an engine write what they saw to FOLDER/ENGINE-RANK.json, and the first of them what is the same on all
to FOLDER/ENGINE-CASE.safetensors, and the trained model to FOLDER/ENGINE-CASE/.
"""

import hashlib
import json
import os
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlbal.model import load_model, lora_config
from rlbal.recipe import Recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.trainer_args import training_args
from rlbal.trainers.allocator import RolloutAllocator
from rlbal.trainers.grpo import BalancedGRPOTrainer
from rlbal.trainers.ppo import BalancedPPOTrainer
from tests.e2e.engines_fork import fork
from tests.support import REWARDS_FILE, make_model, make_recipe, make_rows

STEPS = 4
ROWS = 16  # of a generation batch, over all processes
GRADIENT = {"weighting": {"method": "gradient", "step_size": 1.0}}
SCHEDULE = {"weighting": {"method": "schedule", "points": {"even": [[0.0, 1.0], [1.0, 0.2]]}}}
HYPERVOLUME = {"weighting": {"method": "hypervolume", "objectives": {"even": "max", "tokens": "min"}}}
BETA = {"advantage": {"scale": "beta", "order": "normalize_then_sum", "beta": {"estimator": "beta_binomial"}}}
LORA = {"lora": {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}}
# Four prompts for batches of four: from the third batch on, groups differ in size and cross the processes.
KNAPSACK = {"allocation": {"method": "knapsack", "low": 1, "strata": "prompt"}, "rewards__success": "solved"}
BUDGET = {
    "budget": {"schedule": "adaptive", "window": 1, "start": 16, "end": 4, "scope": "prompt"},
    "data__prompt": "{question} {token_budget}",
}
PPO = {
    "algorithm__name": "ppo",
    "trainer__learning_rate": 0.05,
    "ppo__critic_learning_rate": 0.1,
    "trainer__save_strategy": "steps",
    "trainer__save_steps": STEPS,
}
CASES: dict[str, dict[str, Any]] = {
    "fixed": {"trainer__loss_type": "dapo", "trainer__gradient_accumulation_steps": 2},
    "gradient": {**GRADIENT, **KNAPSACK, **BUDGET, "trainer__loss_type": "dapo"},
    "gradient_lora": {**GRADIENT, **KNAPSACK, **LORA, "trainer__loss_type": "cispo"},
    "hypervolume": {**HYPERVOLUME, "trainer__loss_type": "cispo"},
    "beta_lora": {**HYPERVOLUME, **BETA, **KNAPSACK, **LORA, "trainer__loss_type": "vespo"},
    "schedule": {**SCHEDULE, **KNAPSACK, "trainer__loss_type": "vespo"},
    "ppo": {**PPO, **KNAPSACK, "trainer__gradient_accumulation_steps": 2, "seed": 2},
    "ppo_lora": {**PPO, **GRADIENT, **KNAPSACK, **LORA, "ppo__detach": True, "trainer__gradient_checkpointing": True},
    "ppo_separate": {**PPO, **HYPERVOLUME, "ppo__critic": "separate", "ppo__kl_penalty": 0.05},
    "ppo_detached": {**PPO, **SCHEDULE, "ppo__detach": True, "trainer__num_iterations": 2},
}
# Every feature on every engine at least once; DDP has them all.
ON: dict[str, list[str]] = {
    "alone": list(CASES),
    "ddp": list(CASES),
    "zero2": ["fixed", "gradient_lora", "hypervolume", "schedule", "ppo", "ppo_lora", "ppo_detached"],
    "zero3": ["gradient", "hypervolume", "beta_lora", "schedule", "ppo", "ppo_lora", "ppo_separate"],
    "fsdp2": ["gradient", "hypervolume", "beta_lora", "ppo", "ppo_lora"],
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
    """Keeps what it draws."""

    draws: list[list[int]]

    def draw(self, step: int) -> Any:
        self.drawn = super().draw(step)
        self.draws.append(self.drawn.tolist())
        return self.drawn


class Loaded(Exception):
    """A checkpoint is loaded, and training is about to go on."""


class StopThere(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise Loaded


def recipe_of(case: str, folder: Path, world: int) -> Recipe:
    """Steps of SGD, so that what the parameters move by is the gradients."""
    functions = {
        "even": {"function": f"{REWARDS_FILE}:even_share", "range": [0, 1]},
        "short": {"function": f"{REWARDS_FILE}:sometimes_missing", "weight": 0.5, "range": [0, 1]},
        "concise": {"function": "reward_fns.length:conciseness", "weight": 0.3, "range": [0, 1]},
        "solved": {"function": f"{REWARDS_FILE}:by_prompt", "range": [0, 1], "weight": 0.2},
    }
    changes = {"rewards__functions": functions, "trainer__max_steps": STEPS, "launch": {"num_processes": world}}
    changes |= {"trainer__gradient_checkpointing": False, **CASES[case]}
    accumulation = changes.get("trainer__gradient_accumulation_steps", 1)
    return make_recipe(folder, trainer__per_device_train_batch_size=ROWS // world // accumulation, **changes)


def make_trainer(recipe: Recipe, world: int, base: Path) -> Any:
    """A trainer on scripted rollouts of the model in `base`, which ZeRO-3 loads in pieces."""
    args, plan = training_args(recipe, world)
    rows, kwargs = make_rows(), {}
    kind: Any = BalancedGRPOTrainer
    if recipe.ppo is not None:
        critic = load_model(base, recipe.model) if recipe.ppo.critic == "separate" else None
        kind, kwargs = BalancedPPOTrainer, {"critic_model": critic}
    torch.manual_seed(7)  # LoRA's matrices
    trainer = kind(
        recipe=recipe,
        plan=plan,
        suite=RewardSuite(recipe.rewards),
        rows=rows.select(range(4)) if recipe.allocation.method == "knapsack" else rows,
        eval_rows=None,
        tokenizer=make_model(recipe)[1],
        model=load_model(base, recipe.model),
        args=args,
        peft_config=lora_config(recipe),
        rollout_func=by_turn,
        **kwargs,
    )
    trainer.allocator.__class__, trainer.allocator.draws = Allocator, []
    return trainer


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train, whole also where each process holds a part of them."""
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    partitioned = [one for one in named.values() if hasattr(one, "ds_id")]
    if partitioned:
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned):
            return {name: one.detach().clone() for name, one in named.items()}
    return {
        name: (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone() for name, one in named.items()
    }


def digest(state: dict[str, torch.Tensor]) -> str:
    """Equal for equal parameters only."""
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in state.values())).hexdigest()


def run(case: str, name: str, folder: Path, world: int) -> dict[str, Any]:
    """Train a case; what this process saw of it."""
    output = folder / f"{name}-{case}"
    recipe = recipe_of(case, output, world)
    trainer = make_trainer(recipe, world, folder / "base")
    start = whole_state(trainer.model)
    trainer.train()
    trainer.save_model(str(output / "model"))
    end = whole_state(trainer.model)
    engine, accelerator, batch = trainer.model_wrapped, trainer.accelerator, trainer.batch
    if accelerator.is_main_process:
        moved = {key: end[key] - start[key] for key in end}
        save_file(moved, folder / f"{name}-{case}.safetensors")
    seen = {
        "num_processes": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type.value),
        "wrapped": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
        "engine_steps": getattr(engine, "global_steps", None),
        "partitioned": sum(hasattr(one, "ds_id") or isinstance(one, DTensor) for one in trainer.model.parameters()),
        "parameters": sum(1 for _ in trainer.model.parameters()),
        "digest": digest(end),
        "metrics": [entry for entry in trainer.state.log_history if "loss" in entry],
        "tables": trainer.balance.tables(),
        "advantages": list(trainer._logs["advantages"]),
        "rewards": batch.rewards_NK.tolist(),
        "draws": trainer.allocator.draws,
        "prompts": batch.prompt_index_N.tolist(),
        "ledger": {key: values.tolist() for key, values in trainer.allocator.ledger.state_dict().items()},
        "state": trainer.learned.now(),
    }
    # FSDP's way of loading wants an optimizer with a state, which SGD has not.
    if case in ("ppo", "ppo_lora") and not trainer.is_fsdp_enabled:
        again = make_trainer(recipe, world, folder / "base")
        again.add_callback(StopThere)
        try:
            again.train(resume_from_checkpoint=str(output / f"checkpoint-{STEPS}"))
        except Loaded:
            seen["digest_loaded"] = digest(whole_state(again.model))
    return seen


def runs(cases: list[str], name: str, folder: Path, rank: int) -> None:
    """One process of an engine."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    seen = {case: run(case, name, folder, world) for case in cases}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(seen))


def main(folder: Path, names: list[str]) -> None:
    if names[-1].startswith("case="):
        rank = int(os.environ["RANK"])
        runs([names[1].removeprefix("case=")], names[0], folder, rank)
        torch.distributed.destroy_process_group()
        return
    import deepspeed  # noqa: F401  (once, for all processes)

    make_model(recipe_of("fixed", folder, 1))[0].save_pretrained(folder / "base")
    for engine in names:
        fork(engine, partial(runs, ON[engine], engine, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
