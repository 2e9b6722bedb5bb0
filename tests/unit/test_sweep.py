"""Sweep files and plans: mistakes found before the first run, and what is to be done about what is there."""

import json

import pytest
from typer.testing import CliRunner

from rlbal.checkpoint import seal
from rlbal.cli import app
from rlbal.errors import RecipeError, RlbalError, RunError
from rlbal.experiments.results import SAVED_LAST
from rlbal.experiments.running import command, environment
from rlbal.experiments.sweep import SweepRun, plan, read_sweep, refuse_differing, resolve_runs
from rlbal.run import STATE
from tests.finished_runs import finished_run
from tests.small_recipe import SMALL, small


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A function that writes a sweep over the small recipe, with changes, and returns its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(SMALL)

    def write(**changes):
        values = {"output_dir": "runs/s", "recipe": "base.yaml", "arms": {"one": [], "two": ["advantage.whiten=true"]}}
        values |= {"seeds": [0, 1]} | changes
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "left out"}))
        return path

    return write


# The file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [0]}, "`seed` is not a key here. Did you mean `seeds`?"),
        ({"arms": "left out"}, "`arms`: Field required"),
        ({"arms": {}}, "`arms` is empty"),
        ({"arms": {"a/b": []}}, "the arm `a/b` becomes a folder"),
        ({"arms": {"..": []}}, "the arm `..` becomes a folder"),
        ({"arms": {"a": "seed=1"}}, "`arms.a`: Input should be a valid list"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"seeds": [3, 1, 3]}, "`seeds` has 3 twice"),
        ({"seeds": [-1]}, "`seeds.0`: Input should be greater than or equal to 0"),
        ({"parallel": 0}, "`parallel`: Input should be greater than or equal to 1"),
        ({"parallel": 2, "gpus": [0]}, "one at least for each of the 2 runs at once"),
        ({"gpus": [0, 0]}, "must be different devices"),
    ],
)
def test_a_bad_sweep(changes, message, file):
    path = file(**changes)
    with pytest.raises(RecipeError) as caught:
        read_sweep(path)
    assert str(caught.value).startswith(f"{path}:\n") and message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{a: ", "not YAML"),
        (b"[1, 2]", "is not a sweep: a mapping"),
        (b"\xff\xfe", "cannot read the sweep"),
        (b"a: 1\na: 2", "appears twice"),
    ],
)
def test_a_file_that_is_no_sweep(content, message, tmp_path):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_sweep(tmp_path / "x.yaml")


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the sweep .*none\.yaml"):
        read_sweep(tmp_path / "none.yaml")


def test_an_arm_without_a_value_has_no_overrides(file):
    assert read_sweep(file(arms={"one": None})).arms == {"one": []}


# Resolving


def test_all_arms_of_a_seed_come_before_the_next_seed(file):
    runs = resolve_runs(read_sweep(file()), ["trainer.max_steps=7"])
    assert [run.label for run in runs] == ["one/seed-0", "two/seed-0", "one/seed-1", "two/seed-1"]
    assert [run.steps for run in runs] == [7] * 4
    last = runs[-1]
    assert last.recipe == small(
        "advantage.whiten=true", "trainer.max_steps=7", "seed=1", "output_dir=runs/s/two/seed-1"
    )
    assert (str(last.log), str(last.recipe_file)) == ("runs/s/two/seed-1.log", "runs/s/two/seed-1.yaml")


def test_overrides_apply_in_order_file_arm_command_line(file):
    sweep = file(overrides=["trainer.max_steps=1"], arms={"own": ["trainer.max_steps=2"], "base": []}, seeds=[0])
    assert [run.steps for run in resolve_runs(read_sweep(sweep), [])] == [2, 1]
    with pytest.raises(RecipeError, match="the arms `own` and `base` are the same recipe"):
        resolve_runs(read_sweep(sweep), ["trainer.max_steps=3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.lerning_rate=1",
            "arm `two`: `trainer.lerning_rate` is not a field of TRL's GRPOConfig. Did you mean",
        ),
        ("weigting.method=fixed", "`weigting` is not a key here. Did you mean `weighting`?"),
        (
            "rewards.functions.correct.function=reward_fns.accuracy:exact_mach",
            "reward `correct`: reward_fns.accuracy has no function `exact_mach` Fix: Did you mean `exact_match`?",
        ),
        ("seed=3", "arm `two`: override `seed=3`: a sweep sets `seed` itself"),
        ("output_dir =x", "a sweep sets `output_dir` itself"),
        ("advantage.whiten=false", "the arms `one` and `two` are the same recipe"),
        ("launch.num_processes=2", "needs an accelerate configuration"),
    ],
)
def test_a_bad_arm_is_found_before_any_run(override, message, file):
    with pytest.raises(RlbalError) as caught:
        resolve_runs(read_sweep(file(arms={"one": [], "two": [override]})), [])
    assert message in " ".join(str(caught.value).split())


def test_an_arm_of_several_processes_needs_as_many_gpus(file):
    launch = ["launch.num_processes=2", "launch.accelerate=zero2"]
    sweep = read_sweep(file(arms={"one": launch}, gpus=[4, 5, 6], parallel=2))
    with pytest.raises(RecipeError, match="2 runs at once of 2 processes need 4"):
        resolve_runs(sweep, [])


# What is there


def planned_run(tmp_path, *overrides, seed=0):
    """The run of a sweep whose place is `tmp_path/run`."""
    return SweepRun("arm", small(*overrides, f"seed={seed}", f"output_dir={tmp_path / 'run'}"))


def checkpoint(run, step):
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / STATE).write_text("{}")
    seal(folder)


def test_nothing_there(tmp_path):
    item = plan(planned_run(tmp_path), overwrite=False)
    assert (item.state, item.describe()) == ("start", "to be started")
    assert command(item.run, resume=False)[-1] == str(tmp_path / "seed-0.yaml")


def test_a_finished_run_is_kept(tmp_path):
    finished_run(tmp_path / "run")
    assert plan(planned_run(tmp_path), overwrite=False).state == "finished"
    assert plan(planned_run(tmp_path), overwrite=True).state == "finished"


def test_an_unfinished_run_is_resumed_from_its_checkpoint(tmp_path):
    run = finished_run(tmp_path / "run")
    (run.model_path / SAVED_LAST).unlink()
    checkpoint(run, 10)
    item = plan(planned_run(tmp_path), overwrite=False)
    assert (item.state, item.describe()) == ("resume", "to be resumed from checkpoint-10")
    assert command(item.run, resume=True)[-1] == "--resume"


def test_an_unfinished_run_without_a_checkpoint_starts_afresh(tmp_path):
    run = finished_run(tmp_path / "run")
    (run.model_path / SAVED_LAST).unlink()
    item = plan(planned_run(tmp_path, "trainer.learning_rate=1"), overwrite=False)
    assert (item.state, item.describe()) == ("overwrite", "to be started afresh (stopped at step 12)")
    assert command(item.run, resume=False)[-1] == "--overwrite"


def test_a_run_that_failed_before_its_first_step_is_started(tmp_path):
    planned_run(tmp_path).directory.start(small())
    assert plan(planned_run(tmp_path), overwrite=False).state == "start"


@pytest.mark.parametrize("done", [True, False])
def test_a_run_of_another_recipe_is_an_error_with_its_keys(done, tmp_path):
    run = finished_run(tmp_path / "run", "trainer.learning_rate=1")
    if not done:
        (run.model_path / SAVED_LAST).unlink()
        checkpoint(run, 10)
    item = plan(planned_run(tmp_path, "data.eval_size=64"), overwrite=False)
    assert item.state == "differs"
    with pytest.raises(RunError) as caught:
        refuse_differing([item])
    assert str(caught.value).startswith(
        f"{run.path} is a run of another recipe: data.eval_size, trainer.learning_rate\n"
    )
    assert "--overwrite" in str(caught.value)
    assert plan(item.run, overwrite=True).state == "overwrite"


def test_a_recipe_that_cannot_be_read_is_another_recipe(tmp_path):
    run = finished_run(tmp_path / "run")
    (run.path / "recipe.yaml").write_text("sed: 1")
    assert plan(planned_run(tmp_path), overwrite=False).keys == ["recipe.yaml is not readable"]


def test_runs_that_moved_with_their_sweep_are_still_the_same(tmp_path):
    finished_run(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "run")
    assert plan(planned_run(tmp_path), overwrite=False).state == "finished"


def test_something_else_in_its_place_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(RunError, match="is not a run of rlbal"):
        plan(planned_run(tmp_path), overwrite=True)


# How runs are started


def test_several_processes_are_launched(tmp_path):
    run = planned_run(tmp_path, "launch.num_processes=2", "launch.accelerate=cpu_2proc")
    assert command(run, resume=False)[-4:] == ["--accelerate", "cpu_2proc", "--num-processes", "2"]


@pytest.mark.parametrize(("parallel", "processes", "threads"), [(1, 1, "8"), (2, 1, "4"), (2, 2, "2"), (9, 1, "1")])
def test_runs_share_the_cores(parallel, processes, threads, file, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    run = planned_run(tmp_path, f"launch.num_processes={processes}")
    assert environment(read_sweep(file(parallel=parallel)), run, 0)["OMP_NUM_THREADS"] == threads


def test_threads_the_user_set_stay(file, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment(read_sweep(file()), planned_run(tmp_path), 0)["OMP_NUM_THREADS"] == "3"


def test_each_run_has_its_own_gpus(file, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    one, two = planned_run(tmp_path), planned_run(tmp_path, "launch.num_processes=2")
    assert "CUDA_VISIBLE_DEVICES" not in environment(read_sweep(file()), one, 0)
    sweep = read_sweep(file(parallel=2, gpus=[3, 4, 5, 6]))
    shown = [environment(sweep, run, slot)["CUDA_VISIBLE_DEVICES"] for run in (one, two) for slot in (0, 1)]
    assert shown == ["3", "5", "3,4", "5,6"]


# The command


def rlbal(*arguments):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)], env={"COLUMNS": "200"}, catch_exceptions=False)


def test_a_dry_run_lists_the_runs_and_changes_nothing(file, tmp_path):
    path = file()
    finished_run(tmp_path / "runs/s/one/seed-0", seed=0)
    finished_run(tmp_path / "runs/s/two/seed-1", "trainer.max_steps=3", seed=1)
    before = sorted(tmp_path.rglob("*"))
    result = rlbal(path, "--dry-run")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "one/seed-0 finished" in lines and "two/seed-0 to be started" in lines
    assert "two/seed-1 recorded with another recipe: advantage.whiten, trainer.max_steps" in lines
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_another_recipe_stop_the_sweep_before_it_starts(file, tmp_path):
    finished_run(tmp_path / "runs/s/two/seed-1", "trainer.max_steps=3", seed=1)
    result = rlbal(file())
    assert result.exit_code == 1 and "is a run of another recipe" in result.output
    assert not (tmp_path / "runs/s/one").exists()


def test_a_bad_sweep_exits_1_with_the_message_alone(file):
    result = rlbal(file(seeds=[1, 1]))
    assert result.exit_code == 1 and "`seeds` has 1 twice" in result.output and "Traceback" not in result.output
    assert rlbal(file(), "--parallel", "0").exit_code == 2
