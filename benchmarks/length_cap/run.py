"""What the generation cap of a length budget saves, against the same training without the cap.

    python benchmarks/length_cap/run.py              # about fifteen minutes, three of them for the base model
    python benchmarks/length_cap/run.py --quick      # does it all work: untrained models, one round; writes nothing
    python benchmarks/length_cap/run.py --only steps # or `course`: the first part, or the second
    python benchmarks/length_cap/run.py --plot-only  # tables and picture from result.json

First the steps of a policy that stays as it is, then a training run from its first step on. With and without the cap
take turns in one process, on the same seeds, and who goes first changes; ratios are taken within each round of turns.
Seconds are of CPU time on one thread, so that other work on the machine does not count.

Writes result.json and length_cap.png beside this file and the tables into README.md; the base models are built once,
into runs/length_cap.
"""

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from report import fill_results, plot, show
from rich.progress import Progress
from transformers import TrainerCallback

from rlbal.assemble import Inputs, build_trainer, load_inputs, load_policy
from rlbal.model import build_tiny
from rlbal.prompts.budget import generation_cap
from rlbal.prompts.data import load_data
from rlbal.quiet import quiet_libraries
from rlbal.recipe import Recipe, read_recipe
from rlbal.run import RunDirectory
from rlbal.trainer_args import completion_limit, training_args

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
RECIPE = ROOT / "recipes/tiny/length_budget.yaml"
BASES = ROOT / "runs/length_cap"
WITH, WITHOUT = "with", "without"
PARTS = ("generation", "training", "step", "clock")
# Few prompts, none held out: a turn has only some steps, and nothing is evaluated.
OVERRIDES = ["data.size=1000", "data.eval_size=0", "trainer.disable_tqdm=true"]
# A policy that stays as it is has the same completions in both arms, up to the cap.
HELD = ["trainer.learning_rate=1.0e-6"]
QUICK = ["trainer.per_device_train_batch_size=16"]
LOGGED = {
    "longest": "completions/max_length",
    "cut_off": "length/truncated",
    "trained_on": "compaction/rows",
    "correct": "reward/correct/mean",
    "reward": "reward",
}
Turns = dict[str, list[dict[str, list[float]]]]  # arm -> rounds -> figure -> steps


@dataclass(frozen=True)
class Workload:
    """A policy and its problems.

    Args:
        name: in the tables.
        base: the model, `warm_start` as in the recipe or `untrained`.
        overrides: of the recipe.
        budgets: in tokens.
    """

    name: str
    base: str
    overrides: tuple[str, ...]
    budgets: tuple[int, ...]


WORKLOADS: tuple[Workload, ...] = (
    Workload("recipe", "warm_start", (), (12, 16, 32, 64)),
    Workload("harder", "warm_start", ("data.config.max_terms=16", "trainer.max_completion_length=192"), (16, 32, 64)),
    Workload("untrained", "untrained", (), (16, 32)),
)
COURSE = replace(WORKLOADS[1], budgets=(32,))


@dataclass(frozen=True)
class Size:
    """How much is measured: rounds of turns, measured steps of a turn, rounds and steps of the training run."""

    rounds: int = 5
    steps: int = 2
    course_rounds: int = 5
    course_steps: int = 20


class StepFigures(TrainerCallback):
    """Figures of each step: what metrics.jsonl says of it, and seconds of CPU time.

    Args:
        trainer: whose generation is timed; `training` is all else, optimizer and rewards included. `clock` are seconds
            of the clock.
    """

    def __init__(self, trainer: Any) -> None:
        self.steps: list[dict[str, float]] = []
        self.generation, self.tokens, self.generate = 0.0, 0.0, trainer._generate
        trainer._generate = self._timed

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        output = self.generate(*args, **kwargs)
        self.generation += time.process_time() - started
        return output

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.generation, self.started = 0.0, time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        whole = time.process_time() - self.started
        seconds = {"generation": self.generation, "training": whole - self.generation, "step": whole}
        seconds["clock"] = sum(value for key, value in logs.items() if key.startswith("time/"))
        tokens, self.tokens = logs["tokens_generated"] - self.tokens, logs["tokens_generated"]
        self.steps.append({"tokens": tokens, **{name: logs[key] for name, key in LOGGED.items()}, **seconds})


def build_bases(quick: bool) -> None:
    """Build the models that turns start from, unless they are there."""
    for name, overrides in (("untrained", ["model.tiny.warm_start=null"]), ("warm_start", [])):
        if name == "untrained" or not quick:
            recipe = read_recipe(RECIPE, overrides)
            train = load_data(recipe.data, recipe.seed).train
            build_tiny(recipe, train, BASES / name, completion_limit(training_args(recipe, 1)[0]))


def make_recipe(workload: Workload, folder: str, budget: int, arm: str, seed: int, overrides: list[str]) -> Recipe:
    """The recipe of one turn."""
    cap = "true" if arm == WITH else "false"
    own = [f"output_dir={folder}", f"seed={seed}", f"model={{name_or_path: {BASES / workload.base}}}"]
    own.append(f"budget={{schedule: constant, tokens: {budget}, cap: {cap}}}")
    return read_recipe(RECIPE, [*own, *OVERRIDES, *workload.overrides, *overrides])


def one_turn(inputs: Inputs, recipe: Recipe) -> dict[str, list[float]]:
    """Train from the base; figures of every step."""
    args, plan = training_args(recipe, 1)
    inputs = replace(inputs, recipe=recipe, args=args, plan=plan)
    trainer = build_trainer(
        inputs, load_policy(inputs, str(recipe.model.name_or_path)), RunDirectory(recipe.output_dir)
    )
    figures = StepFigures(trainer)
    trainer.add_callback(figures)
    trainer.train()
    steps = figures.steps
    del trainer, figures
    gc.collect()  # a trainer is full of circles, and its model would stay
    return {name: [step[name] for step in steps] for name in steps[0]}


def take_turns(workload: Workload, overrides: list[str], rounds: int, tick: Callable[[], None]) -> dict[int, Turns]:
    """The turns for each budget."""
    found: dict[int, Turns] = {budget: {WITHOUT: [], WITH: []} for budget in workload.budgets}
    with tempfile.TemporaryDirectory() as folder:
        first = make_recipe(workload, folder, workload.budgets[0], WITH, 0, overrides)
        inputs = load_inputs(first, *training_args(first, 1))
        with inputs.suite:
            for seed in range(rounds):
                for budget, arms in found.items():
                    # Who goes first changes, so that neither always runs on the warmer cache.
                    for arm in (WITHOUT, WITH)[:: 1 if seed % 2 else -1]:
                        arms[arm].append(one_turn(inputs, make_recipe(workload, folder, budget, arm, seed, overrides)))
                        tick()
    return found


def ratio(without: list[float], capped: list[float]) -> dict[str, float]:
    """Median over the rounds of without over with the cap, and its 95 % bootstrap interval."""
    ratios = np.array(without) / np.array(capped)
    draws = np.median(np.random.default_rng(0).choice(ratios, (5000, len(ratios))), axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def _steps(arms: Turns, steps: slice) -> Turns:
    """Some of the steps."""
    return {
        arm: [{name: values[steps] for name, values in turn.items()} for turn in turns] for arm, turns in arms.items()
    }


def summarise(arms: Turns) -> dict[str, Any]:
    """Means over the steps of a turn, round by round, and ratios without : with the cap.

    Returns:
        `arms`, arm -> figure -> rounds, and `without_to_with`, figure -> median and interval.
    """
    means = {
        arm: {name: [float(np.mean(turn[name])) for turn in turns] for name in turns[0]} for arm, turns in arms.items()
    }
    ratios = {name: ratio(means[WITHOUT][name], means[WITH][name]) for name in ("tokens", *PARTS)}
    return {"arms": means, "without_to_with": ratios}


def measure_steps(
    size: Size, workloads: tuple[Workload, ...], more: list[str], tick: Callable[[], None]
) -> dict[str, Any]:
    """Steps of a policy that stays as it is, after one that warms up: workload -> budget -> figures."""
    result: dict[str, Any] = {}
    for workload in workloads:
        overrides = [*HELD, f"trainer.max_steps={size.steps + 1}", *more]
        found = take_turns(workload, overrides, size.rounds, tick)
        recipe = make_recipe(workload, "runs/length_cap", workload.budgets[0], WITH, 0, overrides)
        limit = completion_limit(training_args(recipe, 1)[0])
        result[workload.name] = {"limit": limit, "budgets": {}}
        for budget, arms in found.items():
            cap = min(limit, generation_cap(budget))
            result[workload.name]["budgets"][str(budget)] = {"cap": cap, **summarise(_steps(arms, slice(1, None)))}
    return result


def measure_course(size: Size, workload: Workload, more: list[str], tick: Callable[[], None]) -> dict[str, Any]:
    """A training run at the recipe's learning rate: the whole of it, its first quarter and the rest, and by step."""
    found = take_turns(workload, [f"trainer.max_steps={size.course_steps}", *more], size.course_rounds, tick)
    budget, arms = next(iter(found.items()))
    early = max(1, size.course_steps // 4)
    spans = {f"first {early} steps": slice(early), "the others": slice(early, None)}
    return {
        "workload": workload.name,
        "budget": budget,
        **summarise(arms),
        "spans": {span: summarise(_steps(arms, steps)) for span, steps in spans.items()},
        "last_ten_steps": summarise(_steps(arms, slice(-10, None)))["arms"],
        "tokens_by_step": {arm: [turn["tokens"] for turn in turns] for arm, turns in arms.items()},
    }


def measure(size: Size, quick: bool, only: str | None, result: dict[str, Any]) -> dict[str, Any]:
    """Both parts or one of them, the other as in `result`; with `quick` small batches of an untrained model alone."""
    workloads, course, more = WORKLOADS, COURSE, QUICK if quick else []
    if quick:
        workloads = tuple(replace(one, base="untrained", budgets=one.budgets[:1]) for one in workloads)
        course = replace(course, base="untrained")
    turns = {"steps": 2 * size.rounds * sum(len(one.budgets) for one in workloads), "course": 2 * size.course_rounds}
    with Progress(refresh_per_second=1) as progress:
        for part in (only,) if only else turns:
            task = progress.add_task(part, total=turns[part])
            tick = partial(progress.advance, task)
            if part == "steps":
                result["steps"] = measure_steps(size, workloads, more, tick)
            else:
                result["course"] = measure_course(size, course, more, tick)
    result["machine"] = {
        "device": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
    }
    return result | {"size": asdict(size)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("steps", "course"), help="measure one part; the other stays as it is")
    parser.add_argument("--quick", action="store_true", help="untrained models and one round; nothing is written")
    parser.add_argument("--plot-only", action="store_true", help="tables and picture of the last result")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    file = FOLDER / "result.json"
    if (options.only or options.plot_only) and not file.is_file():
        parser.error("there is no result.json yet: measure both parts first")
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not options.plot_only:
        build_bases(options.quick)
        size = Size(1, 1, 1, 2) if options.quick else Size()
        result = measure(size, options.quick, None if options.quick else options.only, result)
    show(result)
    if options.quick:
        return
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, FOLDER / "length_cap.png")
    fill_results(result)


if __name__ == "__main__":
    main()
