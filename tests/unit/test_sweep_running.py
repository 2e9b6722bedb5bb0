"""Keeping runs going: scripted runs in real processes, with failures, interruption and a second sweep."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlbal.errors import RunError, TrainingStopped
from rlbal.experiments import running
from rlbal.run import read_jsonl
from tests.small_recipe import SMALL

ROOT = Path(__file__).parents[2]

# A run that writes down that it was there, and ends as its arm says: `waits` goes on until Ctrl-C, `meet_a` and
# `meet_b` until both are there.
SCRIPT = """
import json, signal, sys, time
from pathlib import Path
arm, seed, parent, flags = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
def note(what):
    with (parent.parent / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"run": f"{arm}/{seed}", "what": what}) + "\\n")
def stop(*_):
    note("interrupted")
    sys.exit(1)
signal.signal(signal.SIGINT, stop)
note("started")
print("first line")
if arm == "fails" and "--overwrite" not in flags:
    sys.exit("ValueError: \\x1b[31mno thermometer")
if arm == "waits":
    time.sleep(60)
if arm.startswith("meet"):
    others = lambda: [json.loads(line)["run"] for line in (parent.parent / "journal.jsonl").read_text().splitlines()]
    while not {f"meet_a/{seed}", f"meet_b/{seed}"} <= set(others()):
        time.sleep(0.05)
from tests.finished_runs import finished_run
import shutil; shutil.rmtree(parent / f"seed-{seed}", ignore_errors=True)
finished_run(parent / f"seed-{seed}", *OVERRIDES[arm], seed=seed)
note("ended")
"""
ARMS = ["one", "two", "fails", "waits", "meet_a", "meet_b"]
OVERRIDES = {name: [f"data.max_rows={rows}"] for rows, name in enumerate(ARMS, start=100)}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function that runs a sweep of some arms, with scripted runs."""
    (tmp_path / "base.yaml").write_text(SMALL)
    (tmp_path / "script.py").write_text(f"OVERRIDES = {OVERRIDES!r}\n{SCRIPT}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def scripted(run, resume):
        parent = run.directory.path.parent
        flags = ["--resume"] if resume else ["--overwrite"] if run.directory.is_run else []
        return [sys.executable, str(tmp_path / "script.py"), run.arm, str(run.recipe.seed), str(parent), *flags]

    monkeypatch.setattr(running, "command", scripted)

    def start(*arms, seeds=(0, 1), parallel=1):
        lines = [f"output_dir: {tmp_path / 'out'}", f"recipe: {tmp_path / 'base.yaml'}", f"parallel: {parallel}"]
        lines += [f"seeds: {list(seeds)}", "arms:", *(f"  {arm}: {OVERRIDES[arm]}" for arm in arms)]
        (tmp_path / "sweep.yaml").write_text("\n".join(lines))
        running.run_sweep(tmp_path / "sweep.yaml", [], overwrite=False, dry_run=False)

    return start


def journal(tmp_path, what="started"):
    path = tmp_path / "out" / "journal.jsonl"
    return [line["run"] for line in read_jsonl(path) if line["what"] == what] if path.is_file() else []


def test_runs_go_seed_by_seed_and_are_compared(sweep, tmp_path, capsys):
    sweep("one", "two")
    assert journal(tmp_path) == ["one/0", "two/0", "one/1", "two/1"]
    shown = capsys.readouterr().out
    assert "two/seed-1: finished after" in shown and "(4/4 runs finished)" in shown
    assert "no difference shown" in shown and "paired by seed (2 pairs)" in shown
    assert (tmp_path / "out/one/seed-0.log").read_text() == "first line\n"


def test_finished_runs_are_skipped(sweep, tmp_path, capsys):
    sweep("one", seeds=[0])
    capsys.readouterr()
    sweep("one", "two", seeds=[0])
    assert journal(tmp_path) == ["one/0", "two/0"]
    assert "1 of 2 runs are finished already" in capsys.readouterr().out


def test_as_many_runs_at_once_as_asked_for(sweep, tmp_path):
    sweep("meet_a", "meet_b", parallel=2)  # would never end one at a time
    events = [line["what"] for line in read_jsonl(tmp_path / "out" / "journal.jsonl")]
    at_once = [events[: index + 1].count("started") - events[:index].count("ended") for index in range(len(events))]
    assert max(at_once) == 2 and events.count("ended") == 4


def test_a_run_that_fails_does_not_stop_the_others(sweep, tmp_path, capsys):
    with pytest.raises(RunError) as caught:
        sweep("fails", "one")
    assert journal(tmp_path, "ended") == ["one/0", "one/1"]
    message = str(caught.value)
    assert message.startswith("2 of 4 runs failed:\nfails/seed-0 (")
    # The log is hostile text: no escape sequence reaches the terminal.
    assert message.count("    ValueError: no thermometer") == 2 and "\x1b" not in message
    shown = capsys.readouterr().out
    assert "fails/seed-0: failed after" in shown and "one arm" in shown


def interrupt_when(condition, number):
    """Send this process a signal as soon as `condition` holds."""

    def watch():
        while not condition():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_reaches_the_runs_and_says_how_to_go_on(number, sweep, tmp_path):
    before = signal.getsignal(number)
    thread = interrupt_when(lambda: "waits/0" in journal(tmp_path) and "one/0" in journal(tmp_path, "ended"), number)
    with pytest.raises(TrainingStopped) as caught:
        sweep("one", "waits")
    thread.join(5)
    assert journal(tmp_path, "interrupted") == ["waits/0"]
    assert journal(tmp_path) == ["one/0", "waits/0"]  # nothing is started after it
    assert str(caught.value).startswith("stopped with 1 of 4 runs finished\nFix: continue: rlbal sweep ")
    assert signal.getsignal(number) == before


def test_a_second_sweep_in_the_same_folder_is_refused_while_a_run_lasts(sweep, tmp_path):
    holder = "import fcntl, os, sys, time; fd = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(fd, fcntl.LOCK_EX)"
    (tmp_path / "out").mkdir()
    holder += "; print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "out")], stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            with pytest.raises(RunError, match="another sweep, or a run that one has started, is at work"):
                sweep("one")
        finally:
            other.kill()
    assert journal(tmp_path) == []
    sweep("one", seeds=[0])
    assert journal(tmp_path) == ["one/0"]


def test_a_place_that_cannot_be_written(sweep, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RunError, match="cannot write to"):
        sweep("one")
