"""Rollouts balanced across prompts, and token budgets over time, over matched seeds: runs, tables and pictures.

    python benchmarks/balance_rollouts/run.py                    # about an hour on 2 cores
    python benchmarks/balance_rollouts/run.py --part allocation  # or `budgets`
    python benchmarks/balance_rollouts/run.py --analyse-only     # from the runs that are there
    python benchmarks/balance_rollouts/run.py --quick            # does it all work: 2 seeds, 6 steps, nothing learned

Everything is kept in runs/balance_rollouts, so that it can be stopped and started again; finished runs are kept. Writes
result.json and three pictures beside this file and the tables into README.md (`--quick`: into its folder of runs).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import analysis
import plots
import report

from rlbal.experiments.results import last_step, unfinished
from rlbal.recipe_file import dump_yaml, parse_yaml
from rlbal.run import RunDirectory, write_whole

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
RECIPES = {"allocation": "recipes/tiny/balance_rollouts.yaml", "budgets": "recipes/tiny/length_budget.yaml"}
UNIFORM, LARGE_UNIFORM = "uniform", "large_uniform"
VALUES = ("knapsack", "variance", "nonzero")
STRATA = "allocation.strata=num_terms"
QUICK = ["trainer.max_steps=6", "evaluation.prompts=16"]
Runs = dict[str, dict[int, dict[str, Any]]]


class Benchmark:
    """The stages of the benchmark and where their runs are.

    Args:
        folder: of all runs, relative to the repository's root.
        seeds: of every arm.
        parallel: runs at once.
        quick: untrained base models and a handful of steps.
    """

    def __init__(self, folder: Path, seeds: int, parallel: int, quick: bool) -> None:
        self.folder, self.seeds, self.parallel, self.quick = folder, list(range(seeds)), parallel, quick
        self.sweeps = {name: parse_yaml((FOLDER / f"{name}.yaml").read_text("utf-8")) for name in ("small", "budgets")}

    def build_base(self, part: str) -> None:
        """The model that every run of a part starts from: its recipe's warm start, without a step of RL that counts."""
        base = self.folder / "base" / part
        if (ROOT / base / "warm_start/config.json").is_file():
            return
        words = ["train", RECIPES[part], "--overwrite", f"output_dir={base}", "trainer.max_steps=1"]
        words += ["evaluation.every=null", "evaluation.at_start=false", "evaluation.at_end=false"]
        words += ["budget={schedule: constant, tokens: 64}"] if part == "budgets" else []  # drops need steps
        self._rlbal(*words, *(["model.tiny.warm_start=null"] if self.quick else []))

    def run_small(self) -> None:
        """Allocation on a small pool."""
        self._sweep("small", self.sweeps["small"]["arms"], "allocation")

    def run_large(self, best: str) -> None:
        """Allocation on a large pool: uniform, and the best value with and without strata."""
        self._sweep("large", self.large_arms(best), "allocation")

    def large_arms(self, best: str) -> dict[str, list[str]]:
        overrides = self.sweeps["small"]["arms"][best]
        strata = [*overrides, STRATA]
        arms = {LARGE_UNIFORM: [], f"large_{best}": overrides, f"large_{best}_strata": strata}
        return arms | {f"large_{best}_strata_loss": [*strata, "advantage.aggregation=loss"]}

    def run_budgets(self) -> None:
        """Token budgets, and then the evaluation of all runs at the last one."""
        self._sweep("budgets", self.sweeps["budgets"]["arms"], "budgets")
        paths = [path for arm in self.sweeps["budgets"]["arms"] for _, path in self._finished("budgets", arm)]
        with ThreadPoolExecutor(self.parallel) as pool:
            list(pool.map(self._evaluate, [path for path in paths if not evaluation_file(path).is_file()]))

    def collect_allocation(self, stage: str, arms: list[str]) -> Runs:
        """Figures of a stage's finished runs."""
        found = {
            arm: {seed: analysis.allocation_run(path) for seed, path in self._finished(stage, arm)} for arm in arms
        }
        return {arm: runs for arm, runs in found.items() if runs}

    def collect_budgets(self) -> Runs:
        """Figures of the finished and evaluated runs with budgets."""
        found: Runs = {}
        for arm in self.sweeps["budgets"]["arms"]:
            for seed, path in self._finished("budgets", arm):
                if evaluation_file(path).is_file():
                    evaluation = json.loads(evaluation_file(path).read_text(encoding="utf-8"))
                    found.setdefault(arm, {})[seed] = analysis.budget_run(path, evaluation)
        return found

    def curves(self, stage: str, arms: list[str]) -> dict[str, list[dict[str, Any]]]:
        """Training curves of a stage's finished runs."""
        return {arm: [analysis.training_curve(path) for _, path in self._finished(stage, arm)] for arm in arms}

    def _finished(self, stage: str, arm: str) -> Iterator[tuple[int, Path]]:
        for seed in self.seeds:
            path = ROOT / self.folder / stage / arm / f"seed-{seed}"
            run = RunDirectory(path)
            if run.is_run and last_step(run) > 0 and unfinished(run, run.recipe()) is None:
                yield seed, path

    def _sweep(self, name: str, arms: dict[str, list[str]], part: str) -> None:
        """Write a sweep file, whose runs go to the folder of its name, and run it."""
        overrides = [one for one in self.sweeps.get(name, {}).get("overrides", []) if not one.startswith("model=")]
        base = f"model={{name_or_path: {self.folder / 'base' / part / 'warm_start'}}}"
        quick = [*QUICK, *(["evaluation.every=2"] if part == "allocation" else [])] if self.quick else []
        values = {"output_dir": str(self.folder / name), "recipe": RECIPES[part]}
        values |= {"overrides": [base, *overrides, *quick], "arms": arms}
        file = (self.folder / name).with_suffix(".yaml")
        (ROOT / file).parent.mkdir(parents=True, exist_ok=True)
        text = dump_yaml({**values, "seeds": self.seeds, "parallel": self.parallel})
        (ROOT / file).write_text(text, encoding="utf-8")
        self._rlbal("sweep", str(file))

    def _evaluate(self, path: Path) -> None:
        """Evaluate a run's final model at the last budget: the same for all arms, wherever their schedules ended."""
        recipe = parse_yaml((ROOT / RECIPES["budgets"]).read_text(encoding="utf-8"))
        words = ["eval", str(path / "model"), "--recipe", RECIPES["budgets"], "--json", f"seed={path.name[5:]}"]
        words += [f"budget={{schedule: constant, tokens: {recipe['budget']['end']}}}"]
        words += [f"model={{name_or_path: {path / 'model'}}}", *(QUICK if self.quick else [])]
        # It would believe that it has all cores.
        environment = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.parallel)), **os.environ}
        output = self._rlbal(*words, stdout=subprocess.PIPE, text=True, env=environment).stdout
        write_whole(evaluation_file(path), output)
        print(f"evaluated: {path.relative_to(ROOT)}", flush=True)

    def _rlbal(self, *words: str, **options: Any) -> subprocess.CompletedProcess:
        """Run a command of rlbal from the repository's root."""
        command = [sys.executable, "-m", "rlbal.cli", *words]
        return subprocess.run(command, cwd=ROOT, check=True, **options)


def evaluation_file(path: Path) -> Path:
    """Where the evaluation of a run with a budget is kept."""
    return path.with_name(f"{path.name}-evaluation.json")


def analyse_allocation(benchmark: Benchmark, small: Runs, best: str, output: Path) -> dict[str, Any]:
    """The first part's share of result.json, and its pictures."""
    large = benchmark.collect_allocation("large", list(benchmark.large_arms(best)))
    found: dict[str, Any] = {"best": best}
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for pool, runs, reference in (("small", small, UNIFORM), ("large", large, LARGE_UNIFORM)):
        if reference not in runs:
            continue
        curves[pool] = benchmark.curves(pool, list(runs))
        found[pool] = {
            "arms": analysis.averages(runs, report.ALLOCATION_FIGURES),
            "by_difficulty": analysis.by_difficulty(runs),
            "rollouts_to_mark": analysis.rollouts_to_mark(runs, reference),
            "differences": analysis.differences(
                runs, [(arm, reference) for arm in runs if arm != reference], report.WAYS
            ),
            "by_rate": analysis.shares(runs, "by_rate"),
            "by_success": analysis.shares(runs, "by_success"),
            "runs": {arm: {str(seed): run for seed, run in seeds.items()} for arm, seeds in runs.items()},
        }
    knapsacks = ["mean", *VALUES]
    controls = [*((arm, "uniform_prompt") for arm in knapsacks), (best, "mean")]
    controls += [("knapsack", "knapsack_loss"), ("mean", "mean_loss"), ("knapsack_loss", "mean_loss")]
    found["small"]["controls"] = analysis.differences(small, list(dict.fromkeys(controls)), report.WAYS)
    if "large" in found:
        pair = (f"large_{best}_strata", f"large_{best}")
        found["large"]["controls"] = analysis.differences(large, [pair], report.WAYS)
    plots.learning(found, curves, output / "learning.png")
    plots.allocation(found["small"], output / "allocation.png")
    return found


def analyse_budgets(benchmark: Benchmark, runs: Runs, output: Path) -> dict[str, Any]:
    """The second part's share of result.json, and its picture."""
    capped = [("constant", "constant_uncapped")]
    found = {
        "arms": analysis.averages(runs, report.BUDGET_FIGURES),
        "differences": analysis.differences(runs, report.BUDGET_PAIRS, {"correct": "up", "tokens": "down"}),
        "cap": analysis.ratios(runs, capped, report.CAP_FIGURES),
        "cap_differences": analysis.differences(runs, capped, {"correct": "up", "tokens": "down"}),
        "runs": {arm: {str(seed): run for seed, run in seeds.items()} for arm, seeds in runs.items()},
    }
    plots.budgets(found, benchmark.curves("budgets", list(runs)), output / "budgets.png")
    return found


def allocation(benchmark: Benchmark, analyse_only: bool, output: Path) -> dict[str, Any]:
    """The first part: the small pool, then the large one with the value that did best on the small one."""
    if not analyse_only:
        benchmark.run_small()
    small = benchmark.collect_allocation("small", list(benchmark.sweeps["small"]["arms"]))
    if missing := [arm for arm in (UNIFORM, *VALUES) if arm not in small]:
        sys.exit(f"no finished runs of {', '.join(missing)} in {benchmark.folder}; leave out --analyse-only")
    best = analysis.best_arm(small, VALUES)
    if not analyse_only:
        benchmark.run_large(best)
    return analyse_allocation(benchmark, small, best, output)


def budgets(benchmark: Benchmark, analyse_only: bool, output: Path) -> dict[str, Any]:
    """The second part."""
    if not analyse_only:
        benchmark.run_budgets()
    runs = benchmark.collect_budgets()
    if not runs:
        sys.exit(f"no finished runs with budgets in {benchmark.folder}; leave out --analyse-only")
    return analyse_budgets(benchmark, runs, output)


STAGES = {"allocation": allocation, "budgets": budgets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--parallel", type=int, default=2, help="runs at once")
    parser.add_argument("--quick", action="store_true", help="two seeds of six steps, from untrained models")
    parser.add_argument("--analyse-only", action="store_true", help="from the runs that are there")
    parser.add_argument("--table", action="store_true", help="only write the tables of result.json into README.md")
    options = parser.parse_args()
    if options.table:
        report.fill_results()
        return
    folder = Path("runs/balance_rollouts_quick" if options.quick else "runs/balance_rollouts")
    benchmark = Benchmark(folder, 2 if options.quick else options.seeds, options.parallel, options.quick)
    output = ROOT / folder if options.quick else FOLDER
    # The other part's figures stay as they are.
    found = report.read_result(output / "result.json") | {"seeds": benchmark.seeds}
    for part in STAGES if options.part == "all" else (options.part,):
        if not options.analyse_only:
            benchmark.build_base(part)
        found[part] = STAGES[part](benchmark, options.analyse_only, output)
        report.write_result(output / "result.json", found)
    report.show(output / "result.json")
    if not options.quick:
        report.fill_results()


if __name__ == "__main__":
    main()
