"""Comparing runs: which runs form an arm, what is paired with what, and what a reader is told."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rlbal.cli import app
from rlbal.errors import RunError
from rlbal.experiments.compare import compare_runs
from rlbal.experiments.results import SAVED_LAST, SWEEP_RECORD, find_runs, last_records
from rlbal.run import append_jsonl
from tests.finished_runs import finished_run

OTHER = "advantage.whiten=true"


def sweep(folder, differences, *overrides, **scores):
    """Arms `base` and `other`, one seed per difference; the seeds themselves are far apart."""
    for seed, difference in enumerate(differences):
        finished_run(folder / "base" / f"seed-{seed}", seed=seed, passat1=seed / 10, **scores)
        finished_run(folder / "other" / f"seed-{seed}", OTHER, *overrides, seed=seed, passat1=seed / 10 + difference)
    return folder


def rlbal(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "200"}, catch_exceptions=False)


def words(result):
    return " ".join(result.output.split())


# Differences and verdicts


def test_seeds_are_paired(tmp_path):
    # Differences 0.02, 0.03, 0.04 beside seeds 0.1 apart: mean 0.03, s = 0.01, error 0.01 / sqrt(3) = 0.0057735,
    # t(0.975, 2) = 4.3027: 0.03 ± 0.024841. Unpaired, the seeds would drown it.
    comparison = compare_runs([sweep(tmp_path, [0.02, 0.03, 0.04])])
    assert comparison.baseline == "base" and comparison.metrics == ["pass@1"]
    judgement = comparison.judgements["other", "pass@1"]
    assert judgement.differences == pytest.approx({0: 0.02, 1: 0.03, 2: 0.04})
    assert judgement.difference.mean == pytest.approx(0.03)
    assert judgement.difference.low == pytest.approx(0.03 - 0.024841, abs=1e-6)
    assert judgement.verdict == "better"
    assert comparison.summaries["base", "pass@1"].std == pytest.approx(0.1)


def test_only_seeds_that_both_have_count(tmp_path):
    sweep(tmp_path, [0.02, 0.04])
    finished_run(tmp_path / "base" / "seed-7", seed=7, passat1=0.9)
    comparison = compare_runs([tmp_path])
    assert comparison.judgements["other", "pass@1"].differences == pytest.approx({0: 0.02, 1: 0.04})
    assert comparison.summaries["base", "pass@1"].values[7] == 0.9
    assert "`other` and `base`: left out of the differences, no partner: seed 7" in comparison.notes


def test_more_comparisons_make_a_verdict_harder(tmp_path):
    # p of the differences 0.02, 0.03, 0.04 is 0.0351 (t = 5.196, 2 degrees of freedom: 1 - t / sqrt(2 + t²)).
    for seed, pair in enumerate([(0.02, 0.1), (0.03, -0.1), (0.04, 0.05)]):
        finished_run(tmp_path / "base" / f"{seed}", seed=seed, passat1=0.5, reward__correct=0.5)
        scores = {"passat1": 0.5 + pair[0], "reward__correct": 0.5 + pair[1]}
        finished_run(tmp_path / "other" / f"{seed}", OTHER, seed=seed, **scores)
    alone = compare_runs([tmp_path], metrics=["pass@1"]).judgements["other", "pass@1"]
    both = compare_runs([tmp_path])
    assert alone.difference.p == pytest.approx(0.0351, abs=1e-4) and alone.verdict == "better"
    assert both.tests == 2
    assert both.judgements["other", "pass@1"].p_holm == pytest.approx(0.0702, abs=2e-4)
    assert both.judgements["other", "pass@1"].verdict == "no difference shown"


def test_fewer_tokens_are_better(tmp_path):
    for seed, shorter in enumerate([9.0, 10.0, 11.0]):
        finished_run(tmp_path / "base" / f"{seed}", seed=seed, length__mean=50.0)
        finished_run(tmp_path / "other" / f"{seed}", OTHER, seed=seed, length__mean=50.0 - shorter)
    assert compare_runs([tmp_path]).judgements["other", "length/mean"].verdict == "better"
    worse = compare_runs([tmp_path], baseline="other")
    assert worse.judgements["base", "length/mean"].verdict == "worse"
    assert [arm.label for arm in worse.arms] == ["other", "base"]


@pytest.mark.parametrize(
    ("differences", "said"),
    [([0.3], "one seed: no verdict"), ([0.25, 0.25], "no spread: no verdict"), ([0.0, 0.0], "no difference shown")],
)
def test_what_cannot_be_judged(differences, said, tmp_path):
    comparison = compare_runs([sweep(tmp_path, differences)])
    assert comparison.judgements["other", "pass@1"].verdict == said and comparison.tests == 0


# Metrics


def test_metrics_that_equal_another_in_every_run_are_not_counted_twice(tmp_path):
    for seed in (0, 1):
        scores = {"passat1": 0.1 * seed, "reward__correct": 0.1 * seed, "reward__brief": 0.3 * seed, "meanat4": 0.2}
        finished_run(tmp_path / f"{seed}", seed=seed, **scores)
    comparison = compare_runs([tmp_path])
    assert comparison.metrics == ["pass@1", "reward/brief"]
    assert comparison.notes == ["`reward/correct` equals `pass@1` in every run and is not shown"]


def test_training_metrics_are_means_of_the_last_ten_steps(tmp_path):
    finished_run(tmp_path, steps=12, entropy=0.25)
    comparison = compare_runs([tmp_path], metrics=["entropy", "train/entropy", "rollouts"])
    assert comparison.metrics == ["train/entropy", "rollouts"]
    assert [summary.mean for summary in comparison.summaries.values()] == [0.25, 96.0]


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("pass@2", "Did you mean `pass@1`?"),
        ("entrop", "Did you mean `entropy`?"),
        ("buffer", "no run has the metric `buffer`"),
    ],
)
def test_an_unknown_metric(metric, hint, tmp_path):
    finished_run(tmp_path)
    with pytest.raises(RunError) as caught:
        compare_runs([tmp_path], metrics=[metric])
    assert hint in str(caught.value)


def test_a_missing_value_is_left_out_and_said(tmp_path):
    sweep(tmp_path, [0.1, 0.2])
    finished_run(tmp_path / "base" / "seed-2", seed=2, passat1=None)
    finished_run(tmp_path / "other" / "seed-2", OTHER, seed=2, passat1=0.4)
    comparison = compare_runs([tmp_path])
    assert comparison.judgements["other", "pass@1"].difference.pairs == 2
    assert comparison.notes == ["`pass@1` has no value and is left out for base seed 2"]


def test_runs_without_evaluations_need_a_metric(tmp_path):
    run = finished_run(tmp_path, "evaluation.at_end=false")
    run.evaluations_path.unlink()
    with pytest.raises(RunError, match="no run has an evaluation"):
        compare_runs([tmp_path])
    assert compare_runs([tmp_path], metrics=["entropy"]).summaries


# Arms


def test_runs_that_differ_in_seed_and_place_alone_are_one_arm(tmp_path):
    for seed in (10, 2):
        finished_run(tmp_path / f"run-{seed}", seed=seed)
    (arm,) = compare_runs([tmp_path]).arms
    assert arm.label == tmp_path.name and list(arm.runs) == [2, 10]


def test_arms_in_one_folder_are_told_apart_by_what_differs(tmp_path):
    for index, override in enumerate(["algorithm.name=grpo", "algorithm.name=rloo"]):
        finished_run(tmp_path / f"run-{index}", override)
    comparison = compare_runs([tmp_path])
    labels = [arm.label for arm in comparison.arms]
    assert labels == ["advantage.baseline=group", "advantage.baseline=leave_one_out"]
    others = [note for note in comparison.notes if note.startswith(f"`{labels[1]}` differs from `{labels[0]}` in ")]
    assert len(others) == 1 and "algorithm.name" in others[0] and "advantage.scale" in others[0]


def test_arms_that_take_too_many_words_are_told_apart_by_their_path(tmp_path):
    long = "data.prompt='" + 60 * "x" + "{question}'"
    paths = [finished_run(tmp_path / f"run-{index}", *overrides).path for index, overrides in enumerate([[], [long]])]
    assert [arm.label for arm in compare_runs([tmp_path]).arms] == [str(path) for path in paths]


def test_one_seed_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        finished_run(tmp_path / name)
    with pytest.raises(RunError, match=r"a and .*b have the same recipe and the same seed"):
        compare_runs([tmp_path])
    assert len(compare_runs([tmp_path / "a", tmp_path / "a"]).arms) == 1


def test_arms_come_in_the_order_of_their_sweep_and_runs_by_number(tmp_path):
    for arm, override in (("zero", "advantage.whiten=false"), ("ant", OTHER)):
        for seed in (10, 9):
            finished_run(tmp_path / arm / f"seed-{seed}", override, seed=seed)
    names = [f"{run.path.parent.name}/{run.path.name}" for run in find_runs(tmp_path)]
    assert names == ["ant/seed-9", "ant/seed-10", "zero/seed-9", "zero/seed-10"]
    (tmp_path / SWEEP_RECORD).write_text("arms: {zero: [], ant: []}\n")
    assert compare_runs([tmp_path]).baseline == "zero"


# What a reader is told


def test_unequal_cost_and_other_steps_are_said(tmp_path):
    finished_run(tmp_path / "base" / "0")
    finished_run(tmp_path / "other" / "0", OTHER, rollouts=1960, steps=20)
    assert compare_runs([tmp_path]).notes == [
        "unequal cost: rollouts of a run: base 96, other 1,960",
        "runs stopped at different steps: base 12, other 20",
    ]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.eval_size=64", "data.eval_size"),
        ("evaluation.prompts=8", "evaluation.prompts"),
        ("data.config={max_digits: 3}", "data.config.max_digits"),
        ("rewards.functions.correct.function=reward_fns.accuracy:number_match", "rewards.functions.correct.function"),
    ],
)
def test_what_was_measured_differently_is_not_compared(override, key, tmp_path):
    comparison = compare_runs([sweep(tmp_path, [0.1, 0.3, 0.2], override)])
    assert comparison.judgements["other", "pass@1"].verdict == "not comparable"
    assert comparison.tests == 0
    (note,) = comparison.notes
    assert note.startswith("not comparable: `other` and `base` differ in") and f"`{key}`" in note


def test_the_sampling_an_evaluation_recorded_counts(tmp_path):
    sweep(tmp_path, [0.1, 0.3])
    for run in find_runs(tmp_path / "other"):
        line = json.loads(run.evaluations_path.read_text())
        line["settings"]["max_new_tokens"] = 128
        run.evaluations_path.write_text(json.dumps(line) + "\n")
    comparison = compare_runs([tmp_path])
    assert comparison.judgements["other", "pass@1"].verdict == "not comparable"
    assert "`evaluation.max_new_tokens`" in comparison.notes[0]
    assert (
        compare_runs([tmp_path], metrics=["entropy"]).judgements["other", "train/entropy"].verdict != "not comparable"
    )


@pytest.mark.parametrize("override", ["rewards.functions.correct.weight=2", "data.max_rows=100", "evaluation.every=5"])
def test_what_only_training_sees_does_not_matter(override, tmp_path):
    assert compare_runs([sweep(tmp_path, [0.1, 0.3, 0.2], override)]).tests == 1


def test_training_files_may_differ_when_the_held_out_file_is_the_same(tmp_path):
    held_out = "data={source: file, path: %s.jsonl, prompt: '{question}', eval_path: held_out.jsonl}"
    for arm in ("easy", "hard"):
        finished_run(tmp_path / arm / "0", held_out % arm)
    assert [judgement.difference.pairs for judgement in compare_runs([tmp_path]).judgements.values()] == [1]


def test_unfinished_runs_are_left_out_with_the_reason(tmp_path):
    finished_run(tmp_path / "a" / "done", seed=0)
    no_model = finished_run(tmp_path / "a" / "no_model", seed=1)
    (no_model.model_path / SAVED_LAST).unlink()
    finished_run(tmp_path / "a" / "too_short", "trainer.max_steps=50", seed=2)
    not_evaluated = finished_run(tmp_path / "a" / "not_evaluated", seed=3)
    append_jsonl(not_evaluated.metrics_path, {"step": 13})
    unreadable = finished_run(tmp_path / "a" / "unreadable", seed=4)
    (unreadable.path / "recipe.yaml").write_text("sed: 1\n")
    comparison = compare_runs([tmp_path])
    assert [list(arm.runs) for arm in comparison.arms] == [[0]]
    reasons = {path.name: reason for path, reason in comparison.left_out.items()}
    assert reasons.pop("unreadable").startswith("its recipe is not readable: ")
    assert reasons == {
        "no_model": "it is at step 12 and has no final model yet",
        "too_short": "it is at step 12 of 50",
        "not_evaluated": "it has no evaluation after its last step, 13",
    }


# Errors


def test_a_path_that_is_no_run(tmp_path):
    with pytest.raises(RunError, match="is no run of rlbal and holds none"):
        compare_runs([tmp_path])
    with pytest.raises(RunError, match="there is no folder"):
        compare_runs([tmp_path / "nowhere"])


def test_no_finished_run(tmp_path):
    run = finished_run(tmp_path / "a")
    (run.model_path / SAVED_LAST).unlink()
    with pytest.raises(RunError, match=r"none of 1 runs is finished(.|\n)*no final model yet"):
        compare_runs([tmp_path])


def test_an_unknown_baseline(tmp_path):
    with pytest.raises(RunError, match=r"no arm is called `bas`. Did you mean `base`\?"):
        compare_runs([sweep(tmp_path, [0.1])], baseline="bas")


# Reading from the end of a file


def test_last_records_of_long_lines_and_a_cut_off_one(tmp_path):
    path = tmp_path / "x.jsonl"
    for step in range(6):
        append_jsonl(path, {"step": step, "text": 50_000 * "x"})
    with path.open("a") as file:
        file.write('{"step": 6')
    assert [record["step"] for record in last_records(path, 4)] == [2, 3, 4, 5]
    assert [record["step"] for record in last_records(path, 10)] == [0, 1, 2, 3, 4, 5]
    assert last_records(tmp_path / "none.jsonl", 1) == []
    path.write_text('{"step": 1')
    assert last_records(path, 1) == []
    path.write_text("step 1\n")
    with pytest.raises(RunError, match="not JSON"):
        last_records(path, 1)
    for odd in ("[1, 2]", '{"a": 1}', '{"step": "four"}', "7"):
        path.write_text(odd + "\n")
        with pytest.raises(RunError, match="no record of a step"):
            last_records(path, 1)


# The command


def test_the_table_says_what_it_rests_on(tmp_path):
    result = rlbal(sweep(tmp_path, [0.02, 0.03, 0.04]))
    assert result.exit_code == 0
    text = words(result)
    assert "pass@1 (higher is better)" in text
    assert "other 3 0.130 ± 0.110 +0.030 [+0.005, +0.055] 0.035 better" in text
    assert "base 3 0.100 ± 0.100 baseline" in text
    assert "paired by seed (3 pairs)" in text and "number of tests shown (1)" in text


def test_json_has_everything(tmp_path):
    result = rlbal(sweep(tmp_path, [0.3]), "--json")
    found = json.loads(result.stdout)
    assert found["baseline"] == "base" and found["confidence"] == 0.95
    assert found["metrics"] == {"pass@1": {"direction": "up", "unit": ""}}
    assert found["arms"]["other"]["metrics"]["pass@1"] == {"values": {"0": 0.3}, "mean": 0.3, "std": None}
    assert found["arms"]["other"]["runs"] == {"0": str(tmp_path / "other" / "seed-0")}
    assert found["differences"] == [
        {
            "arm": "other",
            "metric": "pass@1",
            "differences": {"0": 0.3},
            "difference": {"pairs": 1, "mean": 0.3, "low": None, "high": None, "p": None},
            "p_holm": None,
            "verdict": "one seed: no verdict",
        }
    ]


def test_bad_input_exits_1_with_the_message_alone(tmp_path):
    result = rlbal(sweep(tmp_path, [0.1]), "--metric", "pass@9")
    assert result.exit_code == 1 and "Did you mean `pass@1`?" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("file", ["plot.png", "plot.svg"])
def test_the_plot(file, tmp_path):
    sweep(tmp_path / "runs", [0.1, 0.2, 0.15], passat2=0.5)
    finished_run(tmp_path / "runs" / "$1^2" / "seed-0", "data.eval_size=9")  # a label that looks like a formula
    result = rlbal(tmp_path / "runs", "--baseline", "base", "--plot", tmp_path / file)
    assert result.exit_code == 0, result.output
    start = {"plot.png": b"\x89PNG", "plot.svg": b"<?xml"}[file]
    assert (tmp_path / file).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("file", "arms", "message"),
    [("plot.exe", 2, "cannot write the plot"), ("no/plot.png", 2, "cannot write"), ("plot.png", 1, "there is one arm")],
)
def test_a_plot_that_cannot_be(file, arms, message, tmp_path):
    sweep(tmp_path / "runs", [0.1])
    result = rlbal(tmp_path / "runs" / ("base" if arms == 1 else ""), "--plot", tmp_path / file)
    assert result.exit_code == 1 and message in result.output


def test_comparing_needs_no_torch(tmp_path):
    sweep(tmp_path, [0.1, 0.2])
    program = (
        "import sys\nfrom pathlib import Path\nfrom rlbal.experiments.compare_view import compare_command\n"
        f"folder = Path({str(tmp_path)!r})\ncompare_command([folder], None, [], False, folder / 'plot.png')\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_a_run_inside_an_arm_may_be_named_alone(tmp_path):
    sweep(tmp_path, [0.1, 0.2])
    comparison = compare_runs([tmp_path / "base", tmp_path / "other" / "seed-1"])
    assert {arm.label: list(arm.runs) for arm in comparison.arms} == {"base": [0, 1], "other": [1]}
