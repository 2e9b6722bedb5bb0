"""Ways of weighting three rewards, over matched seeds, at equal rollouts: runs, table and pictures.

    python benchmarks/balance_rewards/run.py                  # about 45 minutes on 2 cores
    python benchmarks/balance_rewards/run.py --seeds 20 --parallel 16
    python benchmarks/balance_rewards/run.py --analyse-only   # from the runs that are there
    python benchmarks/balance_rewards/run.py --quick          # does it all work: 2 seeds, 4 steps, nothing learned

Everything is kept in runs/balance_rewards, so that it can be stopped and started again; finished runs are kept. Writes
result.json and three pictures beside this file and the table into README.md (`--quick`: into its folder of runs).
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import analysis
import plots
import report

from rlbal.experiments.results import last_step, unfinished
from rlbal.recipe_file import dump_yaml, parse_yaml
from rlbal.run import RunDirectory

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
RECIPE = "recipes/tiny/balance_rewards.yaml"
WEIGHTINGS = ("fixed", "fixed_correct", "schedule", "hypervolume", "gradient")
CONTROL, CONTROLLED = "hypervolume_control", "hypervolume"
BETA = ["advantage.scale=beta", "advantage.order=normalize_then_sum"]
COMBINED = 2  # weightings that are also run with beta
QUICK = ["trainer.max_steps=4", "evaluation.every=2", "evaluation.prompts=16"]


class Benchmark:
    """The stages of the benchmark and where their runs are.

    Args:
        folder: of all runs, relative to the repository's root.
        seeds: of every arm.
        parallel: runs at once.
        quick: an untrained base model and a handful of steps.
    """

    def __init__(self, folder: Path, seeds: int, parallel: int, quick: bool) -> None:
        self.folder, self.seeds, self.parallel, self.quick = folder, list(range(seeds)), parallel, quick
        sweep = parse_yaml((FOLDER / "sweep.yaml").read_text(encoding="utf-8"))
        base = f"model={{name_or_path: {folder / 'base/warm_start'}}}"
        self.common = {"recipe": RECIPE, "overrides": [base, *(QUICK if quick else [])]}
        self.first_arms: dict[str, list[str]] = sweep["arms"]

    def build_base(self) -> None:
        """The model that every run starts from."""
        base = RunDirectory(ROOT / self.folder / "base")
        if (base.path / "warm_start/config.json").is_file():
            return
        words = ["train", RECIPE, "--overwrite", f"output_dir={self.folder / 'base'}", "trainer.max_steps=1"]
        words += ["evaluation.every=null", "evaluation.at_start=false", "evaluation.at_end=false"]
        rlbal(*words, *(["model.tiny.warm_start=null"] if self.quick else []))

    def first_stage(self) -> None:
        """The arms of sweep.yaml."""
        rlbal("sweep", str(self._write("stage1", self.first_arms, self.seeds, self.parallel)))

    def second_arms(self, seed: int, chosen: list[str]) -> dict[str, list[str]]:
        """The arms that depend on the first stage: beta with the chosen weightings, and a seed's control."""
        rate = parse_yaml((ROOT / RECIPE).read_text(encoding="utf-8"))["trainer"]["learning_rate"]
        factor = analysis.mean_factor(self.path(CONTROLLED, seed))
        beta = {f"beta_{name}": [*self.first_arms[name], *BETA] for name in chosen}
        return {CONTROL: [f"trainer.learning_rate={rate * factor:.6g}"], **beta}

    def second_stage(self, chosen: list[str]) -> None:
        """One sweep per seed, since the control's learning rate is the seed's own; as many at once as asked for."""
        # None of these sweeps knows that there are others, so each would give its run all cores.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.parallel)))
        files = [self._write(f"stage2/seed-{seed}", self.second_arms(seed, chosen), [seed], 1) for seed in self.seeds]
        # Each of these sweeps believes that it has all cores.
        threads = max(1, len(os.sched_getaffinity(0)) // self.parallel)
        with ThreadPoolExecutor(self.parallel) as pool:
            for _ in pool.map(lambda file: sweep_quietly(file, threads), files):
                pass

    def path(self, arm: str, seed: int) -> Path:
        """Where a run of an arm is."""
        stage = "stage1" if arm in self.first_arms else f"stage2/seed-{seed}"
        return ROOT / self.folder / stage / arm / f"seed-{seed}"

    def collect(self, arms: list[str]) -> dict[str, dict[int, dict[str, Any]]]:
        """Figures of all finished runs: arm -> seed -> figures."""
        paths = {arm: {seed: self.path(arm, seed) for seed in self.seeds} for arm in arms}
        return {
            arm: {seed: analysis.summarise_run(path) for seed, path in runs.items() if is_finished(path)}
            for arm, runs in paths.items()
        }

    def _write(self, name: str, arms: dict[str, list[str]], seeds: list[int], parallel: int) -> Path:
        """A sweep file, whose runs go to the folder of its name."""
        file = (self.folder / name).with_suffix(".yaml")
        values = {"output_dir": str(self.folder / name), **self.common, "arms": arms}
        (ROOT / file).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / file).write_text(dump_yaml({**values, "seeds": seeds, "parallel": parallel}), encoding="utf-8")
        return file


def rlbal(*words: str, **options: Any) -> None:
    """Run a command of rlbal from the repository's root."""
    subprocess.run([sys.executable, "-m", "rlbal.cli", *words], cwd=ROOT, check=True, **options)


def sweep_quietly(file: Path, threads: int) -> None:
    """Run a sweep with its output in a log beside its file; OMP_NUM_THREADS, if set, goes before `threads`."""
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with (ROOT / file.with_suffix(".log")).open("wb") as log:
        rlbal("sweep", str(file), stdout=log, stderr=subprocess.STDOUT, env=environment)
    print(f"done: {file}", flush=True)


def is_finished(path: Path) -> bool:
    """Whether a run is there and done."""
    run = RunDirectory(path)
    return run.is_run and last_step(run) > 0 and unfinished(run, run.recipe()) is None


def analyse(benchmark: Benchmark, chosen: list[str], output: Path) -> None:
    """Write result.json and the pictures."""
    runs = benchmark.collect([*benchmark.first_arms, CONTROL, *(f"beta_{name}" for name in chosen)])
    runs = {arm: found for arm, found in runs.items() if found}
    pairs = [(arm, analysis.FIXED) for arm in runs if arm != analysis.FIXED]
    found = {
        "seeds": benchmark.seeds,
        "chosen": chosen,
        "arms": analysis.summarise(runs),
        "differences": analysis.differences(runs, pairs),
        "factor": {},
        "runs": {arm: {str(seed): run for seed, run in some.items()} for arm, some in runs.items()},
    }
    if CONTROL in runs:
        found["control"] = analysis.differences(runs, [(CONTROLLED, CONTROL)])
        found["factor"] = {
            str(seed): analysis.mean_factor(benchmark.path(CONTROLLED, seed)) for seed in runs[CONTROLLED]
        }
    for some in found["runs"].values():
        for run in some.values():
            del run["smoothed"]  # it is in the runs' metrics.jsonl, step by step
    report.write_result(output / "result.json", found)
    curves = {arm: [analysis.curves(benchmark.path(arm, seed)) for seed in some] for arm, some in runs.items()}
    plots.learning(curves, output / "learning.png")
    plots.differences(found, output / "differences.png")
    plots.pareto(found, output / "pareto.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--parallel", type=int, default=2, help="runs at once")
    parser.add_argument("--quick", action="store_true", help="two seeds of four steps, from an untrained model")
    parser.add_argument("--analyse-only", action="store_true", help="from the runs that are there")
    parser.add_argument("--base-only", action="store_true", help="only build the model that every run starts from")
    parser.add_argument("--table", action="store_true", help="only write the table of result.json into README.md")
    options = parser.parse_args()
    if options.table:
        report.fill_results()
        return
    folder = Path("runs/balance_rewards_quick" if options.quick else "runs/balance_rewards")
    benchmark = Benchmark(folder, 2 if options.quick else options.seeds, options.parallel, options.quick)
    if not options.analyse_only:
        benchmark.build_base()
        if options.base_only:
            return
        benchmark.first_stage()
    weightings = benchmark.collect(list(WEIGHTINGS))
    if missing := [name for name, runs in weightings.items() if not runs]:
        parser.error(f"no finished runs of {', '.join(missing)} in {folder}; leave out --analyse-only")
    chosen = analysis.best_arms(weightings, WEIGHTINGS, COMBINED)
    if not options.analyse_only:
        benchmark.second_stage(chosen)
    output = ROOT / folder if options.quick else FOLDER
    analyse(benchmark, chosen, output)
    report.show(output / "result.json")
    if not options.quick:
        report.fill_results()


if __name__ == "__main__":
    main()
