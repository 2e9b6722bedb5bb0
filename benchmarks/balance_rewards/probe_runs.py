"""Training in this process, with nothing written, for what probe.py measures."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from rlbal.model import load_model, load_tokenizer
from rlbal.recipe import Recipe, read_recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.tiny import build_model, build_tokenizer
from rlbal.trainer_args import training_args
from rlbal.trainers.grpo import BalancedGRPOTrainer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/tiny/balance_rewards.yaml"
MEAN_TOKENS = 27  # of scripted completions: about what a trained model writes


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, logging included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.seconds.append(time.perf_counter() - self.started)


def scripted(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions of varied length, the same in every step."""
    dice, tokenizer = random.Random(0), trainer.processing_class
    completions = []
    for _ in prompts:
        length = min(trainer.max_completion_length - 1, max(4, round(dice.gauss(MEAN_TOKENS, 9))))
        completions.append([*(dice.randrange(40, 120) for _ in range(length)), tokenizer.eos_token_id])
    return {"prompt_ids": tokenizer(text=prompts)["input_ids"], "completion_ids": completions, "logprobs": None}


def recipe_with(*overrides: str) -> Recipe:
    """The benchmark's recipe without evaluations, checkpoints or a learning-rate schedule's end in sight."""
    common = [
        "evaluation.every=null",
        "evaluation.at_start=false",
        "evaluation.at_end=false",
        "trainer.disable_tqdm=true",
    ]
    return read_recipe(RECIPE, [*common, "weighting.method=gradient", *overrides])


def train(
    recipe: Recipe,
    suite: RewardSuite,
    rows: Dataset,
    base: Path | None,
    prepare: Callable[[Any], None] | None = None,
    **options: Any,
) -> Any:
    """Train in this process, with nothing written; returns the trainer.

    Args:
        base: the model to start from; None for a random one of the recipe's size.
        prepare: what to do with the trainer before it starts.
    """
    args, plan = training_args(recipe, 1)
    assert recipe.model.tiny is not None
    tokenizer = build_tokenizer(recipe.model.tiny.phrases) if base is None else load_tokenizer(base)
    model = build_model(recipe.model.tiny, tokenizer, recipe.seed) if base is None else load_model(base)
    trainer = BalancedGRPOTrainer(
        recipe=recipe,
        plan=plan,
        suite=suite,
        rows=rows,
        eval_rows=None,
        tokenizer=tokenizer,
        model=model,
        args=args,
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer
