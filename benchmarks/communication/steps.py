"""Training steps on scripted rollouts, of which every exchange between processes is noted."""

import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from exchange import by_function, noting
from transformers import PrinterCallback, ProgressCallback
from trl import GRPOTrainer

from rlbal.recipe import Recipe, parse_recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.tiny import build_model, build_tokenizer
from rlbal.trainer_args import training_args
from rlbal.trainers.grpo import BalancedGRPOTrainer

STEPS = 2
PROMPT_LETTERS = 40  # the tiny tokenizer makes a token of each


@dataclass(frozen=True)
class Setting:
    """One training batch over all processes."""

    rollouts: int = 128
    per_prompt: int = 8
    rewards: int = 2
    length: int = 32  # tokens of a completion
    weighting: str = "fixed"


def measure(folder: Path, plain: bool = False, **changes: Any) -> dict[str, Any]:
    """Bytes that one process sends in a step, by who asked for it; `plain` is TRL's own trainer."""
    setting = Setting(**changes)
    trainer = make_trainer(folder, setting, plain)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    noted: list[Any] = []
    with noting(noted):
        trainer.train()
    assert trainer.accelerator.num_processes == 2
    functions = {name: {key: value / STEPS for key, value in sums.items()} for name, sums in by_function(noted).items()}
    return {
        "setting": asdict(setting),
        "bytes": {owner: sum_of(functions, owner) for owner in ("rlbal", "trl", "transformers")},
        "pickled": sum(one.sent for one in noted if one.pickled) / STEPS,
        "calls": {owner: sum_of(functions, owner, "calls") for owner in ("rlbal", "trl", "transformers")},
        "by_function": functions,
        "gradients": sum(one.numel() * one.element_size() for one in trainer.model.parameters()),
    }


def sum_of(functions: dict[str, dict[str, float]], owner: str, key: str = "bytes") -> float:
    """Over the functions of one library."""
    return sum(sums[key] for name, sums in functions.items() if name.startswith(f"{owner}."))


def rollouts(prompts: list[str], trainer: Any, length: int) -> dict[str, Any]:
    """Completions of one length."""
    dice = random.Random(f"{trainer._step} {trainer.accelerator.process_index}")
    completions = [[dice.randrange(40, 120) for _ in range(length)] for _ in prompts]
    return {"prompt_ids": trainer.processing_class(text=prompts)["input_ids"], "completion_ids": completions} | {
        "logprobs": None
    }


def make_recipe(folder: Path, setting: Setting) -> Recipe:
    """The recipe of a setting, on two processes."""
    functions = {
        f"reward{index}": {"function": f"{Path(__file__).with_name('rewards.py')}:even_share", "range": [0, 1]}
        for index in range(setting.rewards)
    }
    trainer = {
        "per_device_train_batch_size": setting.rollouts // 2,
        "gradient_checkpointing": False,
        "max_completion_length": setting.length,
        "max_steps": STEPS,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return parse_recipe(
        {
            "output_dir": str(folder),
            "model": {"tiny": {"hidden_size": 32, "layers": 2, "heads": 2, "max_positions": 256}},
            "data": {"source": "reasoning_gym", "task": "chain_sum", "eval_size": 0},
            "algorithm": {"rollouts_per_prompt": setting.per_prompt},
            "weighting": {"method": setting.weighting},
            "rewards": {"functions": functions},
            "evaluation": {"at_start": False, "at_end": False},
            "launch": {"num_processes": 2},
            "trainer": trainer,
        }
    )


def make_trainer(folder: Path, setting: Setting, plain: bool) -> Any:
    """Ours, or TRL's, on the same rollouts and rewards."""
    recipe = make_recipe(folder, setting)
    args, plan = training_args(recipe, 2)
    assert recipe.model.tiny is not None
    tokenizer = build_tokenizer([])
    prompts = [f"{index:{PROMPT_LETTERS}d}" for index in range(max(64, plan.prompts))]
    rows = Dataset.from_dict({"prompt": prompts, "prompt_index": list(range(len(prompts)))})
    common: dict[str, Any] = {
        "model": build_model(recipe.model.tiny, tokenizer, seed=0),
        "args": args,
        "rollout_func": partial(rollouts, length=setting.length),
    }
    suite = RewardSuite(recipe.rewards)
    if plain:
        return GRPOTrainer(reward_funcs=list(suite.functions), train_dataset=rows, processing_class=tokenizer, **common)
    return BalancedGRPOTrainer(
        recipe=recipe, plan=plan, suite=suite, rows=rows, eval_rows=None, tokenizer=tokenizer, **common
    )
