"""One turn of one trainer, timed; its memory; and the difference of the gradients."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import rewards
import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOTrainer
from workloads import ROLLOUTS_PER_PROMPT, Setting, make_model, make_rows, scripted_rollouts

from rlbal.recipe import Recipe, parse_recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.scaling.compute import ModelShape, forward_flops
from rlbal.trainer_args import training_args
from rlbal.trainers.grpo import BalancedGRPOTrainer
from rlbal.trainers.totals import model_shape

ARMS = ("trl", "rlbal", "trl_continuous")
FOLDER = Path(__file__).parent


@dataclass
class Step:
    """Seconds of one optimizer step, and what was in it.

    Args:
        lengths_N: completion tokens of each rollout.
        live_N: whether the rollout's group has rewards that differ, so that it has an advantage.
    """

    seconds: dict[str, float] = field(default_factory=lambda: {"generation": 0.0, "reward": 0.0})
    lengths_N: list[int] = field(default_factory=list)
    live_N: list[bool] = field(default_factory=list)

    def flops(self, shape: ModelShape, prompt_tokens: int) -> float:
        """What the step cannot do without: each token forward once, and forward and backward where it can teach."""
        total = 0.0
        for completion, live in zip(self.lengths_N, self.live_N, strict=True):
            length = prompt_tokens + completion
            total += forward_flops(shape, length, length * (length + 1) // 2) * (4 if live else 1)
        return total


class StepClock(TrainerCallback):
    """Times each step from its begin until its logs are written, and generation and rewards within it.

    All three are measured around the same methods of TRL's trainer, whichever trainer runs.
    """

    def __init__(self, device: str) -> None:
        self.device, self.steps = device, list[Step]()

    def attach(self, trainer: Any) -> None:
        """Time the trainer's generation and rewards."""
        trainer._generate = self._timed("generation", trainer._generate, self._note_lengths)
        trainer._calculate_rewards = self._timed("reward", trainer._calculate_rewards, self._note_rewards)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _timed(self, part: str, method: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            output = method(*args, **kwargs)
            self.steps[-1].seconds[part] += self.now() - started
            note(output)
            return output

        return call

    def _note_lengths(self, output: tuple) -> None:
        self.steps[-1].lengths_N += [len(ids) for ids in output[1]]

    def _note_rewards(self, rewards_NK: torch.Tensor) -> None:
        groups = rewards_NK.cpu().view(-1, ROLLOUTS_PER_PROMPT, rewards_NK.shape[1])
        live = (groups != groups[:, :1]).any(dim=2).any(dim=1)
        self.steps[-1].live_N += live.repeat_interleave(ROLLOUTS_PER_PROMPT).tolist()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(Step())
        self.started = self.now()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            seconds = self.steps[-1].seconds
            whole = self.now() - self.started
            seconds |= {"training": whole - sum(seconds.values()), "step": whole}


def make_recipe(setting: Setting, arm: str, steps: int, seed: int, **trainer: Any) -> Recipe:
    """The recipe both trainers run; all that is not said here is TRL's default."""
    function = "verify" if setting.slow_reward else "even_share"
    reward = {"function": f"{FOLDER / 'rewards.py'}:{function}", "range": [0, 1], "rowwise": setting.slow_reward}
    return parse_recipe(
        {
            "output_dir": "runs/speed",
            "seed": seed,
            # `make_model` builds the model; this says in which precision.
            "model": {"tiny": {}, "dtype": "bfloat16" if setting.device == "cuda" else "float32"},
            "data": {"source": "reasoning_gym", "task": "chain_sum", "eval_size": 0},
            "algorithm": {"name": "grpo", "rollouts_per_prompt": ROLLOUTS_PER_PROMPT},
            "rewards": {"functions": {function: reward}},
            "trainer": {
                "per_device_train_batch_size": setting.micro_batch,
                "gradient_accumulation_steps": setting.rollouts // setting.micro_batch,
                "gradient_checkpointing": False,
                "bf16": setting.device == "cuda",
                "max_completion_length": setting.lengths.cap,
                "max_steps": steps,
                "learning_rate": 1e-6,
                "shuffle_dataset": False,
                "use_transformers_continuous_batching": arm == "trl_continuous",
                "save_strategy": "no",
                "disable_tqdm": True,
                **trainer,
            },
        }
    )


def make_trainer(setting: Setting, arm: str, recipe: Recipe, suite: RewardSuite, **kwargs: Any) -> GRPOTrainer:
    """A trainer on the recipe's model and prompts; TRL gets the bare reward functions, rlbal its suite of them."""
    args, plan = training_args(recipe, 1)
    rows = make_rows(setting, args.max_steps)
    model, tokenizer = make_model(setting, setting.dtype if args.bf16 else torch.float32, recipe.seed)
    common = {"model": model, "args": args, **kwargs}
    if arm == "rlbal":
        trainer: GRPOTrainer = BalancedGRPOTrainer(
            recipe=recipe, plan=plan, suite=suite, rows=rows, eval_rows=None, tokenizer=tokenizer, **common
        )
    else:
        functions = [getattr(rewards, name) for name in suite.names]
        trainer = GRPOTrainer(train_dataset=rows, reward_funcs=functions, processing_class=tokenizer, **common)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def one_turn(setting: Setting, arm: str, suite: RewardSuite, steps: int, seed: int) -> tuple[list[Step], ModelShape]:
    """Train `steps` steps after one that warms up; the model's shape comes with them."""
    clock = StepClock(setting.device)
    trainer = make_trainer(setting, arm, make_recipe(setting, arm, steps + 1, seed), suite, callbacks=[clock])
    clock.attach(trainer)
    trainer.train()
    shape = model_shape(trainer.accelerator.unwrap_model(trainer.model))
    del trainer
    gc.collect()  # a trainer is full of circles, and its model would stay
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    return clock.steps[1:], shape


class MemoryBefore(TrainerCallback):
    """Bytes held before the first step."""

    def __init__(self, device: str) -> None:
        self.device, self.bytes = device, -1

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.bytes >= 0:
            return
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.bytes = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            self.bytes = psutil.Process().memory_info().rss


def peak_memory(setting: Setting, arm: str, steps: int = 2) -> int:
    """Bytes that training steps need beyond what is there before the first; run it in a fresh process."""
    before = MemoryBefore(setting.device)
    recipe = make_recipe(setting, arm, steps, seed=0)
    with RewardSuite(recipe.rewards) as suite:
        make_trainer(setting, arm, recipe, suite, callbacks=[before]).train()
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated() - before.bytes
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return peak - before.bytes


class Gradients(TrainerCallback):
    """All gradients of the last optimizer step as one vector."""

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.vector = torch.cat([parameter.grad.detach().flatten().cpu().double() for parameter in model.parameters()])


def gradient_difference(setting: Setting) -> float:
    """max |ours − TRL's| / max |TRL's| after one step on the same rollouts from the same weights.

    In float32 without clipping, so that neither rounding nor scaling hides a difference; run it in a fresh process.
    """
    found = {}
    for arm in ("trl", "rlbal"):
        recipe = make_recipe(setting, arm, 1, seed=0, bf16=False, max_grad_norm=0.0)
        gradients = Gradients()
        with RewardSuite(recipe.rewards) as suite:
            make_trainer(
                setting, arm, recipe, suite, callbacks=[gradients], rollout_func=scripted_rollouts(setting)
            ).train()
        found[arm] = gradients.vector
    return float((found["rlbal"] - found["trl"]).abs().max() / found["trl"].abs().max())


@cache
def matmul_rate(rows: int, inner: int, outer: int, device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a (rows, inner) x (inner, outer) product; measured once for a shape."""
    left, right = (
        torch.randn(rows, inner, device=device, dtype=dtype),
        torch.randn(inner, outer, device=device).to(dtype),
    )
    clock, seconds = StepClock(device), list[float]()
    for _ in range(3):
        left @ right
    while sum(seconds) < 0.5:
        started = clock.now()
        for _ in range(10):
            left @ right
        seconds.append(clock.now() - started)
    return 10 * 2.0 * rows * inner * outer / float(np.median(seconds))
