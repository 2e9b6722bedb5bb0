"""Step time, memory and gradients of rlbal against plain TRL, on the same prompts, seeds and settings.

    python benchmarks/speed/run.py                         # about fifteen minutes on 2 cores
    python benchmarks/speed/run.py --quick                 # a smoke run in under a minute; writes nothing
    python benchmarks/speed/run.py --only late rollouts    # one workload and one growth; the rest is kept
    python benchmarks/speed/run.py --device cuda           # also against TRL's continuous batching
    python benchmarks/speed/run.py --plot-only             # tables and picture from the result file

The trainers take turns in one process, a few steps each after one that warms up, and who goes first changes. Ratios are
taken within each round of turns: how many times faster rlbal is. Peak memory is of fresh processes. The maximum
gradient difference is taken on scripted rollouts in float32. Everything not in `measure.make_recipe` is TRL's default.

Writes result.json and speed.png beside this file (result_cuda.json and speed_cuda.png on a GPU).
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from measure import ARMS, Step, gradient_difference, make_recipe, matmul_rate, one_turn, peak_memory
from report import plot, show
from rich.progress import Progress
from workloads import Setting, growth, workloads

from rlbal.quiet import quiet_libraries
from rlbal.rewards.suite import RewardSuite
from rlbal.scaling.compute import ModelShape

FOLDER = Path(__file__).parent
PARTS = ("generation", "reward", "training", "step")
# Rounds of turns and measured steps of each turn.
ROUNDS, LONG_ROUNDS, CUDA_ROUNDS, GROWTH_ROUNDS, QUICK_ROUNDS = (6, 2), (4, 1), (3, 1), (2, 1), (1, 1)
LARGE_MATMUL = {"cpu": 1024, "cuda": 8192}


def times_faster(baseline: list[float], ours: list[float]) -> dict[str, float]:
    """Median over the rounds of baseline over ours, and its 95 % bootstrap interval."""
    ratios = np.array(baseline) / np.array(ours)
    draws = np.median(np.random.default_rng(0).choice(ratios, (5000, len(ratios))), axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def compute_limit(steps: list[Step], shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Seconds that the step's necessary operations take at the machine's speed of matrix products.

    At two speeds: of a product as large as the machine likes, and of the model's own first MLP product over the tokens
    of one micro-batch.
    """
    tokens = setting.micro_batch * (setting.prompt_tokens + int(np.mean([np.mean(step.lengths_N) for step in steps])))
    flops = float(np.median([step.flops(shape, setting.prompt_tokens) for step in steps]))
    width = LARGE_MATMUL[setting.device]
    large = matmul_rate(width, width, width, setting.device, setting.dtype)
    own = matmul_rate(tokens, setting.hidden_size, setting.hidden_size * 8 // 3, setting.device, setting.dtype)
    return {
        "flops": flops,
        "large_matmul_flops_per_second": large,
        "model_matmul_flops_per_second": own,
        "seconds_at_large_matmul": flops / large,
        "seconds_at_model_matmul": flops / own,
    }


def compare(setting: Setting, arms: tuple[str, ...], rounds: tuple[int, int], tick: Callable[[], None]) -> dict:
    """Take turns on one setting: seconds of each part for each trainer, and how many times faster rlbal is."""
    seconds: dict[str, dict[str, list[float]]] = {arm: {part: [] for part in PARTS} for arm in arms}
    tokens: dict[str, list[float]] = {arm: [] for arm in arms}
    seen: list[Step] = []
    with RewardSuite(make_recipe(setting, "rlbal", 1, 0).rewards) as suite:
        suite.start()
        for number in range(rounds[0]):
            # Who goes first changes, so that neither always runs on the warmer cache.
            first = number % len(arms)
            for arm in arms[first:] + arms[:first]:
                steps, shape = one_turn(setting, arm, suite, rounds[1], seed=number)
                for part in PARTS:
                    seconds[arm][part].append(float(np.median([step.seconds[part] for step in steps])))
                tokens[arm].append(float(np.median([sum(step.lengths_N) for step in steps])))
                seen += steps
                tick()
    medians = {arm: {part: float(np.median(values)) for part, values in seconds[arm].items()} for arm in arms}
    return {
        "setting": asdict(setting),
        "parameters": shape.matmul_parameters,
        "rounds": rounds[0],
        "measured_steps_per_turn": rounds[1],
        "mean_tokens": float(np.mean([np.mean(step.lengths_N) for step in seen])),
        "longest_tokens": max(max(step.lengths_N) for step in seen),
        "share_of_rollouts_with_advantage": float(np.mean([np.mean(step.live_N) for step in seen])),
        "seconds": medians,
        "tokens_per_second": {
            arm: float(np.median(np.array(tokens[arm]) / np.array(seconds[arm]["step"]))) for arm in arms
        },
        "times_faster_than": {
            arm: {part: times_faster(seconds[arm][part], seconds["rlbal"][part]) for part in PARTS}
            for arm in arms
            if arm != "rlbal"
        },
        "limit": compute_limit(seen, shape, setting),
    }


def in_fresh_process(function: Callable[..., Any], setting: Setting, *args: Any) -> Any:
    """Run a function where nothing but imports has happened yet."""
    # A server that has the imports done saves seconds, but CUDA does not survive a fork once it has been looked for.
    context = multiprocessing.get_context("spawn" if setting.device == "cuda" else "forkserver")
    context.set_forkserver_preload(["trl.trainer.grpo_trainer", "rlbal.trainers.grpo"])
    with ProcessPoolExecutor(1, mp_context=context, initializer=quiet_libraries) as pool:
        return pool.submit(function, setting, *args).result()


def examine(setting: Setting, arms: tuple[str, ...], tick: Callable[[], None]) -> dict[str, Any]:
    """Peak memory of each trainer and the maximum gradient difference."""
    memory = {}
    for arm in arms:
        memory[arm] = in_fresh_process(peak_memory, setting, arm)
        tick()
    difference = in_fresh_process(gradient_difference, setting)
    tick()
    return {
        "peak_bytes": memory,
        "memory_ratio": memory["rlbal"] / memory["trl"],
        "gradient_difference": difference,
    }


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
    }


def rounds_of(setting: Setting, quick: bool) -> tuple[int, int]:
    if quick:
        return QUICK_ROUNDS
    if setting.device == "cuda":
        return CUDA_ROUNDS
    return LONG_ROUNDS if setting.lengths.kind == "lognormal" else ROUNDS


def measure_all(options: argparse.Namespace, arms: tuple[str, ...], result: dict[str, Any], save: Callable) -> None:
    """Measure what was asked for, and save after each setting."""
    settings = workloads(options.device, options.quick)
    grown = growth(settings[0], options.quick)
    chosen = options.only or [*(setting.name for setting in settings), *grown]
    settings = [setting for setting in settings if setting.name in chosen]
    varied = workloads(options.device, options.quick)[0]
    to_grow = [(group, setting) for group in grown if group in chosen for setting in grown[group]]
    growth_rounds = QUICK_ROUNDS if options.quick else GROWTH_ROUNDS
    turns = sum(rounds_of(setting, options.quick)[0] * len(arms) + len(arms) + 1 for setting in settings)
    turns += len(to_grow) * growth_rounds[0] * len(arms)
    with Progress() as progress:
        task = progress.add_task("", total=turns)

        def tick() -> None:
            progress.advance(task)

        for setting in settings:
            progress.update(task, description=setting.name)
            found = result["workloads"][setting.name] = compare(setting, arms, rounds_of(setting, options.quick), tick)
            save()
            found |= examine(setting, arms, tick)
            save()
        for group, setting in to_grow:
            progress.update(task, description=f"{group} {setting.name}")
            known = result["workloads"].get("varied")
            if known and replace(setting, name="varied") == varied:
                found = known
                progress.advance(task, growth_rounds[0] * len(arms))
            else:
                found = compare(setting, arms, growth_rounds, tick)
            result["growth"].setdefault(group, {})[setting.name] = found
            save()


def main() -> None:
    names = [*(setting.name for setting in workloads("cpu", False)), *growth(workloads("cpu", False)[0], False)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny settings, nothing is written")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"measure only: {', '.join(names)}")
    parser.add_argument(
        "--continuous-batching", action="store_true", help="also against TRL with it (always on a GPU; slow on a CPU)"
    )
    parser.add_argument("--plot-only", action="store_true", help="tables and picture of the last result")
    options = parser.parse_args()
    quiet_libraries()
    # One arena and a fixed threshold: freed tensors go back to the system, and the peak is of what is alive.
    os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    suffix = "_cuda" if options.device == "cuda" else ""
    file = FOLDER / f"result{suffix}.json"
    result = json.loads(file.read_text()) if file.is_file() and (options.only or options.plot_only) else {}
    result = {"machine": result.get("machine") or machine(options.device), "workloads": {}, "growth": {}} | result

    def save() -> None:
        if not options.quick:
            file.write_text(json.dumps(result, indent=2) + "\n")

    if not options.plot_only:
        started = time.monotonic()
        arms = ARMS if options.continuous_batching or options.device == "cuda" else ARMS[:2]
        measure_all(options, arms, result, save)
        if not options.only:
            result["seconds"] = round(time.monotonic() - started)
        save()
    show(result)
    if not options.quick:
        plot(result, FOLDER / f"speed{suffix}.png")


if __name__ == "__main__":
    main()
