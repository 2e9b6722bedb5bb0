"""What BalancedGRPOTrainer adds to a step of plain TRL on the same rollouts, with its `speed:` switched off.

    python benchmarks/overhead/run.py            # about two minutes on 2 cores

Both trainers get the same model, prompts, rewards, settings and scripted completions (no sampling, so that the step is
as short, and the share of the overhead as large, as it can be). They run in turn, a few steps each, many times over, in
one process; the ratio is taken within each pair of turns. Writes result.json beside this file.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOTrainer

from rlbal.recipe import Recipe, parse_recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.tiny import build_model, build_tokenizer
from rlbal.trainer_args import training_args
from rlbal.trainers.grpo import BalancedGRPOTrainer

FOLDER = Path(__file__).parent
MAX_TOKENS, MEAN_TOKENS = 96, 40


def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Scripted completions of varied length, the same for both trainers at the same micro-step."""
    dice, tokenizer = random.Random(trainer._step), trainer.processing_class
    completions = []
    for _ in prompts:
        length = min(MAX_TOKENS - 1, max(4, round(dice.gauss(MEAN_TOKENS, 20))))
        completions.append([*(dice.randrange(40, 120) for _ in range(length)), tokenizer.eos_token_id])
    return {"prompt_ids": tokenizer(text=prompts)["input_ids"], "completion_ids": completions, "logprobs": None}


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, logging included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.seconds.append(time.perf_counter() - self.started)


def make_recipe(steps: int, seed: int) -> Recipe:
    """A recipe of the quickstart's size: 128 rollouts of at most 96 tokens in groups of 8."""
    functions = {
        name: {"function": f"{FOLDER / 'rewards.py'}:{name}", "range": [0, 1]} for name in ("even_share", "short")
    }
    trainer = {
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "max_completion_length": MAX_TOKENS,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return parse_recipe(
        {
            "output_dir": "runs/overhead",
            "seed": seed,
            "model": {"tiny": {}},
            "data": {"source": "reasoning_gym", "task": "chain_sum", "eval_size": 0},
            "rewards": {"functions": functions},
            "speed": {"compact_micro_batches": False},
            "trainer": trainer,
        }
    )


def one_turn(ours: bool, recipe: Recipe, suite: RewardSuite, rows: Dataset) -> list[float]:
    """Train a few steps with one of the two trainers; seconds per step without the first."""
    args, plan = training_args(recipe, 1)
    assert recipe.model.tiny is not None
    tokenizer = build_tokenizer([])
    model = build_model(recipe.model.tiny, tokenizer, recipe.seed)
    times = StepTimes()
    common = {"model": model, "args": args, "callbacks": [times], "rollout_func": rollouts}
    if ours:
        trainer: GRPOTrainer = BalancedGRPOTrainer(
            recipe=recipe, plan=plan, suite=suite, rows=rows, eval_rows=None, tokenizer=tokenizer, **common
        )
    else:
        trainer = GRPOTrainer(
            train_dataset=rows, reward_funcs=list(suite.functions), processing_class=tokenizer, **common
        )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return times.seconds[1:]


def interval(ratios: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draws = np.random.default_rng(seed).choice(ratios, (5000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    rows = Dataset.from_dict({"prompt": [f"say {i}" for i in range(512)], "prompt_index": list(range(512))})
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with RewardSuite(make_recipe(1, 0).rewards) as suite:
        for turn in track(range(options.turns), "turns"):
            # Whoever goes first changes, so that neither always runs on the warmer cache.
            for ours in (turn % 2 == 0, turn % 2 == 1):
                times = one_turn(ours, make_recipe(options.steps, turn), suite, rows)
                seconds[ours].append(float(np.median(times)))
    ratios = np.array(seconds[True]) / np.array(seconds[False])
    low, high = interval(ratios)
    result = {
        "turns": options.turns,
        "steps_per_turn": options.steps,
        "threads": torch.get_num_threads(),
        "trl_step_seconds": float(np.median(seconds[False])),
        "rlbal_step_seconds": float(np.median(seconds[True])),
        "ratio": float(np.median(ratios)),
        "ratio_95": [low, high],
    }
    (FOLDER / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    table = Table("plain TRL", "rlbal", "ratio", "95 % interval", title="Step time on the same rollouts")
    table.add_row(
        f"{result['trl_step_seconds'] * 1e3:.1f} ms",
        f"{result['rlbal_step_seconds'] * 1e3:.1f} ms",
        f"{result['ratio']:.3f}",
        f"{low:.3f} to {high:.3f}",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
