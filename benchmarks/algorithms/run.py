"""GRPO, RLOO, REINFORCE and PPO over matched seeds, at equal rollouts: runs, tables and picture.

    python benchmarks/algorithms/run.py                 # about 45 minutes on 2 cores
    python benchmarks/algorithms/run.py --tune          # also the runs that settings were chosen by
    python benchmarks/algorithms/run.py --analyse-only  # from the runs that are there
    python benchmarks/algorithms/run.py --quick         # does it all work: 2 seeds, 4 steps, nothing learned

Everything is kept in runs/algorithms, so that it can be stopped and started again; finished runs are kept. Writes
result.json and learning.png beside this file and the tables into README.md (`--quick`: into its folder of runs).
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import plots
import report

from rlbal.experiments.compare import Comparison, compare_runs
from rlbal.experiments.results import last_step, unfinished
from rlbal.recipe_file import dump_yaml, parse_yaml
from rlbal.run import RunDirectory, read_jsonl

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
RECIPE = "recipes/quickstart.yaml"
PLANNED = ["rloo", "reinforce", "ppo"]
ADDED = ["rloo_5e-4"]  # after the others had run
METRICS = ["pass@1", "reward/format", "reward/length", "length/mean"]
CURVES = {"correct": "reward/correct/mean", "explained": "ppo/explained_variance"}
QUICK = ["trainer.max_steps=4", "evaluation.prompts=16"]


def rlbal(*words: str) -> None:
    """Run a command of rlbal from the repository's root."""
    subprocess.run([sys.executable, "-m", "rlbal.cli", *words], cwd=ROOT, check=True)


def build_base(folder: Path, quick: bool) -> None:
    """The model that every run starts from: the quickstart's warm start, without a step of RL that counts."""
    if (ROOT / folder / "base/warm_start/config.json").is_file():
        return
    words = ["train", RECIPE, "--overwrite", f"output_dir={folder / 'base'}", "trainer.max_steps=1"]
    words += ["evaluation.every=null", "evaluation.at_start=false", "evaluation.at_end=false"]
    rlbal(*words, *(["model.tiny.warm_start=null"] if quick else []))


def run_sweep(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Run a sweep file of this folder, or a few steps of it."""
    values = parse_yaml((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    values |= {"output_dir": str(folder / name), "parallel": options.parallel}
    if options.quick:
        base = f"model={{name_or_path: {folder / 'base/warm_start'}}}"
        values |= {"overrides": [base, *values["overrides"][1:], *QUICK], "seeds": values["seeds"][:2]}
    file = (ROOT / folder / name).with_suffix(".yaml")
    file.write_text(dump_yaml(values), encoding="utf-8")
    rlbal("sweep", str(file.relative_to(ROOT)))


def finished(path: Path) -> bool:
    run = RunDirectory(path)
    return run.is_run and last_step(run) > 0 and unfinished(run, run.recipe()) is None


def curves(comparison: Comparison) -> dict[str, dict[str, list[list[float]]]]:
    """Arm -> figure -> the training curve of each seed; only the figures that an arm has."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for arm in comparison.arms:
        records = [list(read_jsonl(run.path / "metrics.jsonl")) for run in arm.runs.values()]
        found[arm.label] = {
            figure: [[line[key] for line in lines] for lines in records]
            for figure, key in CURVES.items()
            if all(key in line for lines in records for line in lines)
        }
    return found


def before(comparison: Comparison) -> dict[str, float]:
    """Scores of the base model, averaged over the seeds' held-out problems."""
    first = [next(iter(read_jsonl(run.path / "evaluations.jsonl"))) for run in comparison.arms[0].runs.values()]
    assert all(line["step"] == 0 for line in first)
    return {metric: sum(line["metrics"][metric] for line in first) / len(first) for metric in METRICS}


def last_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Final scores of the finished runs of a sweep, by arm and seed."""
    found = {}
    for path in sorted((ROOT / folder).glob("*/seed-*")):
        if path.is_dir() and finished(path):
            *_, last = read_jsonl(path / "evaluations.jsonl")
            found[f"{path.parent.name}/{path.name}"] = {metric: last["metrics"][metric] for metric in METRICS}
    return found


def judge(folder: Path, arms: list[str]) -> tuple[Comparison, dict[str, Any]]:
    """Some arms against GRPO: the comparison of the first score, and the figures of all.

    Each score by itself, so that Holm's correction is over the arms, as `rlbal compare --metric` has it.
    """
    paths = [ROOT / folder / "sweep" / arm for arm in ("grpo", *arms)]
    comparisons = [compare_runs(paths, baseline="grpo", metrics=[metric]) for metric in METRICS]
    found: dict[str, Any] = {"arms": {}, "differences": [], "notes": comparisons[0].notes}
    for one in (comparison.to_json() for comparison in comparisons):
        for label, arm in one["arms"].items():
            found["arms"].setdefault(label, {}).update(arm["metrics"])
        found["differences"] += one["differences"]
    return comparisons[0], found


def analyse(folder: Path, output: Path) -> dict[str, Any]:
    """Everything in result.json, and the picture."""
    comparison, found = judge(folder, PLANNED)
    _, found["added"] = judge(folder, ADDED)
    found["before"] = before(comparison)
    found |= {name: last_scores(folder / name) for name in ("tune", "quickstart")}
    lines = curves(comparison)
    found["critic"] = report.thirds(lines["ppo"]["explained"])
    plots.draw(found, lines, output / "learning.png")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parallel", type=int, default=2, help="runs at once")
    parser.add_argument("--tune", action="store_true", help="also run what settings were chosen by")
    parser.add_argument("--quick", action="store_true", help="two seeds of four steps, from an untrained model")
    parser.add_argument("--analyse-only", action="store_true", help="from the runs that are there")
    parser.add_argument("--table", action="store_true", help="only write the tables of result.json into README.md")
    options = parser.parse_args()
    folder = Path("runs/algorithms_quick" if options.quick else "runs/algorithms")
    output = ROOT / folder if options.quick else FOLDER
    if not options.table:
        if not options.analyse_only:
            build_base(folder, options.quick)
            for name in [*(["tune"] if options.tune else []), "sweep", "quickstart"]:
                run_sweep(name, folder, options)
        report.write_result(output / "result.json", analyse(folder, output))
    report.show(output / "result.json")
    if not options.quick:
        report.fill_results()


if __name__ == "__main__":
    main()
