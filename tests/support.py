"""Shared pieces of the trainer tests: a tiny model, a small dataset, scripted rollouts and simple rewards."""

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from rlbal.recipe import Recipe, parse_recipe
from rlbal.tiny import build_model, build_tokenizer
from rlbal.trainer_args import training_args
from rlbal.trainers.grpo import BalancedGRPOTrainer

REWARDS_FILE = Path(__file__).parent / "scripted_rewards.py"
PROMPTS = [f"say {index}" for index in range(24)]


def scripted_rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that depend on the prompt and the row's place in the global batch only, not on sampling."""
    tokenizer, first = trainer.processing_class, trainer.accelerator.process_index * len(prompts)
    completions = []
    for row, prompt in enumerate(prompts, start=first):
        dice = random.Random(f"{prompt}/{row}/{trainer._step}")
        ids = [dice.randrange(40, 120) for _ in range(dice.randrange(1, 12))]
        completions.append([*ids, tokenizer.eos_token_id] if dice.random() < 0.8 else ids)
    prompt_ids = tokenizer(text=prompts)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


def make_recipe(output_dir: Path | str, **changes: Any) -> Recipe:
    """A small recipe; `changes` are `section__key=value`, merged over the defaults."""
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": {"tiny": {"hidden_size": 32, "layers": 2, "heads": 2, "max_positions": 128}},
        "data": {"source": "reasoning_gym", "task": "chain_sum", "size": 64, "eval_size": 0},
        "algorithm": {"name": "grpo", "rollouts_per_prompt": 4},
        "rewards": {
            "functions": {
                "even": {"function": f"{REWARDS_FILE}:even_share", "weight": 1.0, "range": [0, 1]},
                "short": {"function": f"{REWARDS_FILE}:short", "weight": 0.5, "range": [0, 1]},
            }
        },
        "evaluation": {"at_start": False, "at_end": False},
        "trainer": {
            "per_device_train_batch_size": 16,
            "max_completion_length": 16,
            "max_steps": 3,
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return parse_recipe(values)


def make_rows() -> Dataset:
    """24 prompts with what the trainer needs of a row."""
    return Dataset.from_dict({"prompt": PROMPTS, "prompt_index": list(range(len(PROMPTS)))})


def make_uneven_rows() -> Dataset:
    """The 24 prompts with prefixes of 0 to 23 characters, so that they differ in length."""
    prompts = ["x" * (7 * index % 24) + prompt for index, prompt in enumerate(PROMPTS)]
    return Dataset.from_dict({"prompt": prompts, "prompt_index": list(range(len(PROMPTS)))})


def make_model(recipe: Recipe) -> tuple[torch.nn.Module, Any]:
    """The recipe's tiny model, the same every time, and its tokenizer."""
    assert recipe.model.tiny is not None
    tokenizer = build_tokenizer([])
    return build_model(recipe.model.tiny, tokenizer, seed=0), tokenizer


def make_trainer(recipe: Recipe, suite: Any, num_processes: int = 1, **kwargs: Any) -> BalancedGRPOTrainer:
    """A BalancedGRPOTrainer on scripted rollouts; `kwargs` replace its arguments."""
    args, plan = training_args(recipe, num_processes)
    model, tokenizer = make_model(recipe)
    defaults = {"rows": make_rows(), "model": model, "rollout_func": scripted_rollouts}
    return BalancedGRPOTrainer(
        recipe=recipe,
        plan=plan,
        suite=suite,
        eval_rows=None,
        tokenizer=tokenizer,
        args=args,
        **{**defaults, **kwargs},
    )


def parameters(model: torch.nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])
