"""Training runs on several processes and engines, forked from one that has imported everything. Started by a test.

python tests/e2e/compaction_run.py FOLDER ENGINE...     engines: alone, ddp, zero1, zero2, zero3, fsdp2

Every process of an engine writes what it saw of all its runs to FOLDER/ENGINE-RANK.json.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

import rlbal.trainers.microbatch
from rlbal.errors import RecipeError
from rlbal.rewards.suite import RewardSuite
from rlbal.trainers.grpo import BalancedGRPOTrainer
from tests.e2e.engines_fork import fork
from tests.e2e.engines_run import whole_state
from tests.support import REWARDS_FILE, make_model, make_recipe, make_trainer, make_uneven_rows

LOSSES = ("grpo", "bnpo", "dapo")  # two that gather a number per row, and one that does not
ROWS = 16  # per micro-batch, over all processes
# Ways of weighting that act on the engine: one watches its backward passes, the other changes its learning rate.
WEIGHTING = {
    "gradient": {"method": "gradient", "step_size": 1.0},
    "hypervolume": {"method": "hypervolume", "objectives": {"even": "max", "short": "max"}},
    "lora": {"method": "gradient", "step_size": 1.0},
    "wide": {"method": "gradient", "step_size": 1.0, "probe": "trainable"},
}


class Watched(BalancedGRPOTrainer):
    """Keeps the rows and the unmasked rows of every part of every micro-batch, and all completions."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.parts.append([])
        return super().training_step(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.parts[-1].append([len(inputs["prompt_ids"]), int(inputs["completion_mask"].any(dim=1).sum())])
        return super()._compute_loss(model, inputs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.completions.append(self._completion_ids)
        return output


def run(
    folder: Path, world: int, sampled: bool = False, lora: bool = False, prompts: int = 24, **changes: Any
) -> dict[str, Any]:
    """Two optimizer steps on scripted rollouts, or on sampled ones."""
    # A micro-batch has four prompts. Only few prompts teach, so that processes differ in how many rows they keep.
    reward = {"function": f"{REWARDS_FILE}:even_share_but", "args": {"dead": list(range(8, 24))}, "range": [0, 1]}
    settings = {
        "trainer__per_device_train_batch_size": ROWS // world,
        "trainer__gradient_accumulation_steps": 2,
        "trainer__max_steps": 2,
        "trainer__max_completion_length": 40,
        "trainer__gradient_checkpointing": False,
        "rewards__functions": {"even": reward},
        "launch": {"num_processes": world},
    }
    recipe = make_recipe(folder / "run", **(settings | changes))
    model, tokenizer = make_model(recipe)
    # Enough end tokens for completions to end at many lengths.
    model.generation_config.eos_token_id = [*range(48), tokenizer.eos_token_id]
    torch.manual_seed(7)  # LoRA's matrices
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
    suite, rows = RewardSuite(recipe.rewards), make_uneven_rows().select(range(prompts))
    trainer: Any = make_trainer(recipe, suite, world, model=model, rows=rows, peft_config=config)
    trainer.__class__, trainer.parts, trainer.completions = Watched, [], []
    if sampled:
        trainer.rollout_func = trainer._rollouts
    start = whole_parameters(model)
    torch.manual_seed(0)  # TRL shuffles the rows of a generation batch
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    engine = trainer.model_wrapped
    return {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type.value),
        "wrapped": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
        "engine_steps": getattr(engine, "global_steps", None),
        "steps": trainer.state.global_step,
        "parts": trainer.parts,
        "completions": trainer.completions,
        "losses": [entry["loss"] for entry in logs],
        "compaction": [entry.get("compaction/tokens") for entry in logs],
        "learned": [
            {key: value for key, value in entry.items() if key.startswith(("weight/", "influence/", "hypervolume/"))}
            for entry in logs
        ],
        "tables": trainer.balance.tables(),
        "moved": (whole_parameters(model) - start).tolist(),
        "notes": trainer.notes,
        "prompts": trainer.batch.prompt_index_N.tolist(),
        "ledger": {name: values.tolist() for name, values in trainer.allocator.ledger.state_dict().items()},
    }


def whole_parameters(model: torch.nn.Module) -> torch.Tensor:
    """All parameters that train as one vector."""
    return torch.cat([one.flatten().double() for one in whole_state(model).values()])


def runs_of(engine: str, folder: Path, world: int) -> dict[str, Any]:
    """All runs of an engine."""
    if engine == "fsdp2":
        return {"sampled": run(folder, world, sampled=True)}
    results = {}
    if engine != "alone":
        for loss in LOSSES:
            for compact in (True, False):
                changes = {"trainer__loss_type": loss, "speed__compact_micro_batches": compact}
                results[f"{loss} {'compact' if compact else 'whole'}"] = run(folder, world, **changes)
    functions = {
        "even": {"function": f"{REWARDS_FILE}:even_share", "range": [0, 1]},
        "short": {"function": f"{REWARDS_FILE}:short", "weight": 0.5, "range": [0, 1]},
        "concise": {"function": "reward_fns.length:conciseness", "weight": 0.3, "range": [0, 1]},
    }
    for method, weighting in WEIGHTING.items():
        changes = {"trainer__loss_type": "dapo", "rewards__functions": functions, "weighting": weighting}
        try:
            results[method] = run(folder, world, lora=method == "lora", **changes)
        except RecipeError as error:
            results[method] = {"refused": str(error)}
    # Eight prompts fill a batch: the second one has the same again, in unequal groups.
    solved = {"function": f"{REWARDS_FILE}:by_prompt", "range": [0, 1]}
    changes = {"rewards__functions": {"solved": solved}, "allocation": {"method": "knapsack"}}
    for name in ("knapsack", "knapsack lora"):
        results[name] = run(folder, world, sampled=True, lora=name.endswith("lora"), prompts=8, **changes)
    if engine in ("alone", "ddp", "zero3"):
        results["sampled"] = run(folder, world, sampled=True)
    if engine == "zero3":
        results["sampled in parts"] = run(folder, world, sampled=True, trainer__ds3_gather_for_generation=False)
    return results


def write_runs(engine: str, folder: Path, rank: int) -> None:
    """One process of an engine."""
    # The rows of these runs are so small that a part's own cost would put all of them into one.
    rlbal.trainers.microbatch.PART_TOKENS = 4
    results = runs_of(engine, folder / f"{engine}-{rank}", int(os.environ.get("WORLD_SIZE", "1")))
    Path(folder, f"{engine}-{rank}.json").write_text(json.dumps(results))


def main(folder: Path, engines: list[str]) -> None:
    """Run the engines one after another."""
    if any(engine.startswith("zero") for engine in engines):
        import deepspeed  # noqa: F401  (once, for all processes)
    for engine in engines:
        fork(engine, partial(write_runs, engine, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
