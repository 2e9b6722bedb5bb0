"""The run directory: never deletes what is not ours, and reads back only what was written whole."""

import json
import math
import os
from pathlib import Path

import pytest

from rlbal.checkpoint import SEAL, put_in_place, seal
from rlbal.errors import RunError
from rlbal.run import MARKER, STATE, RunDirectory, append_jsonl, read_jsonl, to_json, write_whole
from tests.small_recipe import small


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "one")
    run.start(small())
    return run


def checkpoint(run, name, sealed=True):
    folder = run.path / name
    (folder / "deep").mkdir(parents=True)
    (folder / STATE).write_text("{}")
    (folder / "deep" / "optimizer.pt").write_bytes(bytes(100))
    if sealed:
        seal(folder)
    return folder


# Starting and overwriting


def test_a_run_remembers_its_recipe(run):
    assert run.is_run and run.recipe() == small()


def test_an_empty_folder_may_be_used(tmp_path):
    RunDirectory(tmp_path).start(small())
    assert (tmp_path / MARKER).is_file()


def test_a_second_run_is_refused(run):
    append_jsonl(run.metrics_path, {"step": 1})
    with pytest.raises(RunError) as caught:
        run.start(small())
    assert str(caught.value) == (
        f"{run.path} already holds a run\n"
        "Fix: continue it with --resume, start afresh with --overwrite, or choose another `output_dir`"
    )
    assert list(read_jsonl(run.metrics_path)) == [{"step": 1}]


@pytest.mark.parametrize("result", ["metrics.jsonl", "evaluations.jsonl", "checkpoint-3", "model"])
def test_anything_recorded_or_saved_makes_it_a_run_that_is_kept(run, result):
    (run.path / result).mkdir()
    with pytest.raises(RunError, match="already holds a run"):
        run.start(small())
    assert (run.path / result).exists()


def test_a_run_that_failed_before_its_first_step_may_start_again(run):
    run.start(small("seed=5"))
    assert run.recipe().seed == 5


def test_overwrite_starts_afresh(run):
    checkpoint(run, "checkpoint-5")
    append_jsonl(run.metrics_path, {"step": 1})
    run.start(small("seed=3"), overwrite=True)
    assert sorted(path.name for path in run.path.iterdir()) == [MARKER, "recipe.yaml"]
    assert run.recipe().seed == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_without_our_marker_is_never_deleted(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError) as caught:
        RunDirectory(tmp_path).start(small(), overwrite)
    assert str(caught.value) == (
        f"{tmp_path} exists and is not a run of rlbal\n"
        f"Why: it has no {MARKER} file, so it will not be deleted, with or without --overwrite\n"
        "Fix: choose another `output_dir`, or remove it yourself"
    )
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_never_deleted(tmp_path, overwrite):
    (tmp_path / "file").write_text("text")
    with pytest.raises(RunError, match="exists and is not a run of rlbal"):
        RunDirectory(tmp_path / "file").start(small(), overwrite)
    assert (tmp_path / "file").read_text() == "text"


def test_overwrite_follows_no_links_out_of_the_run(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("kept")
    (run.path / "data").symlink_to(tmp_path / "data")
    run.start(small(), overwrite=True)
    assert not (run.path / "data").exists()
    assert (tmp_path / "data" / "precious").read_text() == "kept"


def test_overwrite_of_a_run_behind_a_link_keeps_the_link(run, tmp_path):
    (tmp_path / "link").symlink_to(run.path)
    append_jsonl(run.metrics_path, {"step": 1})
    RunDirectory(tmp_path / "link").start(small("seed=4"), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert run.recipe().seed == 4 and not run.metrics_path.exists()


def test_the_marker_goes_last_so_that_a_cut_off_deletion_can_be_repeated(run, monkeypatch):
    checkpoint(run, "checkpoint-5")
    checkpoint(run, "checkpoint-6")

    def full(path, *args, **kwargs):
        raise PermissionError(f"cannot delete {path}")

    monkeypatch.setattr("shutil.rmtree", full)
    with pytest.raises(RunError) as caught:
        run.start(small(), overwrite=True)
    assert str(caught.value).startswith(f"cannot write a run to {run.path}\nWhy: cannot delete ")
    monkeypatch.undo()
    run.start(small(), overwrite=True)
    assert run.checkpoints() == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    run = RunDirectory(tmp_path / "file" / "run")
    with pytest.raises(RunError, match=r"cannot write a run to .*file/run\nWhy: .*\nFix: choose another `output_dir`"):
        run.start(small())


def test_no_recipe_outside_a_run(tmp_path):
    with pytest.raises(RunError, match=rf"{tmp_path} is not a run of rlbal\nWhy: it has no {MARKER} file"):
        RunDirectory(tmp_path).recipe()


# Checkpoints


def test_checkpoints_are_ordered_by_step_and_whole(run):
    ten, two = checkpoint(run, "checkpoint-10"), checkpoint(run, "checkpoint-2")
    checkpoint(run, "checkpoint-30", sealed=False)
    (checkpoint(run, "checkpoint-40") / STATE).unlink()
    (checkpoint(run, "checkpoint-41") / "deep" / "optimizer.pt").write_bytes(bytes(99))
    (checkpoint(run, "checkpoint-42") / SEAL).write_text("{half of")
    checkpoint(run, "checkpoint-50-old")
    checkpoint(run, "checkpoint-best")
    assert run.checkpoints() == [two, ten]
    assert run.latest_checkpoint() == ten


def test_nothing_to_resume_from(run):
    checkpoint(run, "checkpoint-1", sealed=False)
    with pytest.raises(RunError) as caught:
        run.latest_checkpoint()
    assert str(caught.value) == (
        f"{run.path} has no checkpoint to resume from\n"
        "Fix: start afresh with --overwrite; `trainer.save_steps` says how often checkpoints are written"
    )


def test_rewind_forgets_later_steps_and_keeps_earlier(run):
    for step in (1, 2, 3, 4):
        append_jsonl(run.metrics_path, {"step": step, "loss": step / 2})
    for step in (0, 4):
        append_jsonl(run.evaluations_path, {"step": step})
    run.rewind(2, None, at_end=False)
    assert list(read_jsonl(run.metrics_path)) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    assert list(read_jsonl(run.evaluations_path)) == [{"step": 0}]


@pytest.mark.parametrize("best", [None, {"step": 1, "checkpoint": "checkpoint-1"}])
def test_rewind_brings_back_the_best_of_then_and_clears_what_was_unfinished(run, best):
    write_whole(run.best_path, '{"step": 4, "checkpoint": "checkpoint-4"}')
    (run.aside / "checkpoint-5").mkdir(parents=True)
    run.rewind(2, best, at_end=False)
    assert run.best() == best
    assert not run.aside.exists()


def test_rewind_leaves_no_checkpoint_of_later_and_no_model_of_another_end(run):
    for step in (2, 3):
        checkpoint(run, f"checkpoint-{step}", sealed=step == 2)
    for folder in (run.model_path, run.path / "merged"):
        folder.mkdir()
    run.rewind(2, None, at_end=True)
    assert run.model_path.is_dir() and (run.path / "merged").is_dir()
    assert [path.name for path in run.path.glob("checkpoint-*")] == ["checkpoint-2"]
    run.rewind(2, None, at_end=False)
    assert not run.model_path.exists() and not (run.path / "merged").exists()


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (3, None, [2, 3, 4]),
        (1, None, [4]),
        (1, 2, [2, 4]),  # neither the best nor the newest goes
        (2, 3, [3, 4]),
        (3, 1, [1, 3, 4]),
    ],
)
def test_old_checkpoints_go_but_not_the_best_nor_the_newest_whole_one(run, keep, best, left):
    for step in (1, 2, 3, 4):
        checkpoint(run, f"checkpoint-{step}")
    checkpoint(run, "checkpoint-9", sealed=False)
    run.record_best(best and {"step": best, "checkpoint": f"checkpoint-{best}"})
    run.rotate(keep)
    assert [path.name for path in run.checkpoints()] == [f"checkpoint-{step}" for step in left]


def test_a_folder_takes_the_place_of_an_older_one(run):
    old, new = checkpoint(run, "checkpoint-3"), run.aside / "checkpoint-3"
    new.mkdir(parents=True)
    (new / "newer").touch()
    seal(new)
    put_in_place(new, old)
    assert sorted(path.name for path in old.iterdir()) == ["newer", SEAL]
    assert list(run.aside.iterdir()) == []


def test_rewind_without_records_is_nothing(run):
    run.rewind(2, None, at_end=False)
    assert not run.metrics_path.exists()


# Records


def test_json_has_no_nan_or_infinity():
    record = {
        "a": math.nan,
        "b": [1.5, -math.inf, (math.inf,)],
        "c": {"d": math.nan, "e": "NaN"},
        "f": True,
        "g": 10**20,
    }
    assert to_json(record) == (
        '{"a": null, "b": [1.5, null, [null]], "c": {"d": null, "e": "NaN"}, "f": true, "g": 100000000000000000000}'
    )


@pytest.mark.parametrize("text", ["é 日本", "line\nbreak\r\u2028\x85", '"\\', "half a pair: \ud800"])
def test_any_text_survives_a_file(tmp_path, text):
    append_jsonl(tmp_path / "x.jsonl", {"text": text})
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [{"text": text}]


def test_a_last_line_cut_off_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"text": "\xc3')
    assert list(read_jsonl(path)) == [{"step": 1}, {"step": 2}]


def test_rewind_repairs_a_cut_off_line(run):
    append_jsonl(run.metrics_path, {"step": 1})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')
    run.rewind(1, None, at_end=False)
    append_jsonl(run.metrics_path, {"step": 2})
    assert list(read_jsonl(run.metrics_path)) == [{"step": 1}, {"step": 2}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"x.jsonl, line 2 is not JSON\nWhy: Expecting value.*\nFix: remove it"):
        list(read_jsonl(path))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "state.json"
    write_whole(path, json.dumps({"step": 1}))

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "fsync", fail) if broken == "fsync" else (type(path), "replace", fail)))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, json.dumps({"step": 2}) * 1000)
    assert json.loads(path.read_text()) == {"step": 1}
    monkeypatch.undo()
    write_whole(path, json.dumps({"step": 3}))
    assert json.loads(path.read_text()) == {"step": 3}


def test_a_full_disk_is_named():
    with pytest.raises(RunError, match=r"/dev/full cannot be written\nWhy: .*No space left[\s\S]*--resume"):
        append_jsonl(Path("/dev/full"), {"step": 1})
